// ladder.cu: six ways to multiply matrices, y (M, N) = a (M, K) b (K, N), each a step faster.
//
// All six compute the same sums. What changes is how often a number is fetched, from where, and in
// whose company. minidl.use("matmul", "cuda_naive") and so on select one; `minidl kernels --step
// matmul` counts what each asks of the memory. The steps are those of Boehm 2022, "How to optimize
// a CUDA matmul kernel for cuBLAS-like performance"; gemm.cuh is what comes after the last.
#include "ptx.cuh"

// 1. One thread a result. Thread x has row x, so that the 32 threads of a warp, which read at the
// same time, read numbers of a that are a whole row apart: each comes in a sector of its own, of 32
// bytes, of which 4 are used.
extern "C" __global__ void __launch_bounds__(1024)
    matmul_naive(int M, int N, int K, const float* a, const float* b, float* y) {
  int m = blockIdx.x * 32 + threadIdx.x, n = blockIdx.y * 32 + threadIdx.y;
  if (m >= M || n >= N) return;
  float sum = 0;
  for (int k = 0; k < K; ++k) sum += a[m * K + k] * b[k * N + n];
  y[m * N + n] = sum;
}

// 2. Thread x has column x: now a warp reads 32 numbers of b that lie side by side, four full
// sectors, and all read the same number of a. Nothing else has changed.
extern "C" __global__ void __launch_bounds__(1024)
    matmul_coalesced(int M, int N, int K, const float* a, const float* b, float* y) {
  int m = blockIdx.y * 32 + threadIdx.y, n = blockIdx.x * 32 + threadIdx.x;
  if (m >= M || n >= N) return;
  float sum = 0;
  for (int k = 0; k < K; ++k) sum += a[m * K + k] * b[k * N + n];
  y[m * N + n] = sum;
}

// 3. The block's 32 x 32 results need the same 32 rows of a and columns of b. So they are fetched
// together, 32 of k at a time, into memory on the chip, and each number then serves 32 results. The
// first barrier: all have brought their part. The second: all have used it, it may be overwritten.
extern "C" __global__ void __launch_bounds__(1024)
    matmul_shared(int M, int N, int K, const float* a, const float* b, float* y) {
  __shared__ float a_tile[32][32], b_tile[32][32];
  int x = threadIdx.x, row = threadIdx.y, m = blockIdx.y * 32 + row, n = blockIdx.x * 32 + x;
  float sum = 0;
  for (int k0 = 0; k0 < K; k0 += 32) {
    a_tile[row][x] = m < M && k0 + x < K ? a[m * K + k0 + x] : 0;
    b_tile[row][x] = n < N && k0 + row < K ? b[(k0 + row) * N + n] : 0;
    __syncthreads();
    for (int k = 0; k < 32; ++k) sum += a_tile[row][k] * b_tile[k][x];
    __syncthreads();
  }
  if (m < M && n < N) y[m * N + n] = sum;
}

// 4. Rung 3 reads two numbers from shared memory for every multiply-add, and that is its limit. Let
// a thread have 8 x 8 results: 16 numbers, read into registers, serve 64 multiply-adds. a's tile
// is turned on the way in, so that both are read along a row.
extern "C" __global__ void __launch_bounds__(256)
    matmul_register(int M, int N, int K, const float* a, const float* b, float* y) {
  __shared__ float a_tile[8][128 + 4], b_tile[8][128 + 4];
  int m0 = blockIdx.y * 128, n0 = blockIdx.x * 128, m = threadIdx.x / 16 * 8,
      n = threadIdx.x % 16 * 8;
  float sum[8][8] = {};
  for (int k0 = 0; k0 < K; k0 += 8) {
    for (int i = threadIdx.x; i < 8 * 128; i += 256) {
      int am = m0 + i / 8, ak = k0 + i % 8, bk = k0 + i / 128, bn = n0 + i % 128;
      a_tile[i % 8][i / 8] = am < M && ak < K ? a[am * K + ak] : 0;
      b_tile[i / 128][i % 128] = bk < K && bn < N ? b[bk * N + bn] : 0;
    }
    __syncthreads();
    for (int k = 0; k < 8; ++k) {
      float of_a[8], of_b[8];
#pragma unroll
      for (int i = 0; i < 8; ++i) of_a[i] = a_tile[k][m + i];
#pragma unroll
      for (int j = 0; j < 8; ++j) of_b[j] = b_tile[k][n + j];
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] += of_a[i] * of_b[j];
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j)
      if (m0 + m + i < M && n0 + n + j < N) y[(m0 + m + i) * N + n0 + n + j] = sum[i][j];
}

// 5. Two changes. Shared memory is read 16 bytes at a time, by threads that lie so that no two want
// different words of one bank: columns 4 n and 64 + 4 n in the place of 8 n. And there are two
// pairs of tiles: while one is multiplied, asynchronous copies fill the other, past the registers,
// so that one barrier a tile is enough and nobody waits for memory.
extern "C" __global__ void __launch_bounds__(256)
    matmul_vector(int M, int N, int K, const float* a, const float* b, float* y) {
  __shared__ __align__(16) float a_tiles[2][8][128 + 4], b_tiles[2][8][128 + 4];
  int m0 = blockIdx.y * 128, n0 = blockIdx.x * 128, m = threadIdx.x / 16 * 4,
      n = threadIdx.x % 16 * 4;
  auto fetch = [&](int k0) {
    auto &a_tile = a_tiles[k0 / 8 % 2], &b_tile = b_tiles[k0 / 8 % 2];
    for (int i = threadIdx.x; i < 8 * 128; i += 256) {  // one number at a time: a is turned
      int am = m0 + i / 8, ak = k0 + i % 8;
      bool inside = am < M && ak < K;
      copy_async<4>(&a_tile[i % 8][i / 8], inside ? a + am * K + ak : a, inside ? 4 : 0);
    }
    int bk = k0 + threadIdx.x / 32, x = threadIdx.x % 32 * 4;
    int left = bk < K ? max(0, min(4, N - n0 - x)) : 0;  // of the next four, those inside
    float* to = &b_tile[threadIdx.x / 32][x];
    const float* from = left ? b + bk * N + n0 + x : b;
    if (N % 4 == 0)
      copy_async<16>(to, from, left * 4);
    else  // the rows of b begin anywhere
      for (int j = 0; j < 4; ++j) copy_async<4>(to + j, j < left ? from + j : b, j < left ? 4 : 0);
    copy_commit();
  };

  float sum[8][8] = {};
  fetch(0);
  for (int k0 = 0; k0 < K; k0 += 8) {
    copy_wait<0>();
    __syncthreads();  // this tile has come, for all; the other one is used up, by all
    fetch(k0 + 8);
    auto &a_tile = a_tiles[k0 / 8 % 2], &b_tile = b_tiles[k0 / 8 % 2];
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      float4 a0 = load_float4(&a_tile[k][m]), a1 = load_float4(&a_tile[k][m + 64]);
      float4 b0 = load_float4(&b_tile[k][n]), b1 = load_float4(&b_tile[k][n + 64]);
      float of_a[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
      float of_b[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] += of_a[i] * of_b[j];
    }
  }
#pragma unroll
  for (int i = 0; i < 8; ++i)
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      int row = m0 + m + i / 4 * 64 + i % 4, column = n0 + n + j / 4 * 64 + j % 4;
      if (row < M && column < N) y[row * N + column] = sum[i][j];
    }
}

// 6. The tensor cores: a warp multiplies 16 x 16 by 16 x 8 in one instruction, 2,048 multiply-adds,
// of 16-bit floats with 32-bit sums. The block has 64 x 64 results, each of its 4 warps 32 x 32.
// Lanes fetch their share of the operands by ldmatrix, which knows who needs what.
extern "C" __global__ void __launch_bounds__(128)
    matmul_tensor(int M, int N, int K, const half* a, const half* b, half* y) {
  // A row is 16 bytes longer than its contents: ldmatrix reads 8 rows at a time, in all 32 banks.
  __shared__ __align__(16) half a_tile[64][32 + 8], b_tile[32][64 + 8];
  int m0 = blockIdx.y * 64, n0 = blockIdx.x * 64, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int m = warp / 2 * 32, n = warp % 2 * 32;
  float sum[2][4][4] = {};
  for (int k0 = 0; k0 < K; k0 += 32) {
    for (int i = threadIdx.x; i < 64 * 32; i += 128) {
      int am = m0 + i / 32, ak = k0 + i % 32, bk = k0 + i / 64, bn = n0 + i % 64;
      a_tile[i / 32][i % 32] = am < M && ak < K ? a[am * K + ak] : half(0.0f);
      b_tile[i / 64][i % 64] = bk < K && bn < N ? b[bk * N + bn] : half(0.0f);
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < 32; k += 16) {
      u32 of_a[2][4], of_b[2][4];
      int down = lane % 16, across = lane / 16 * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i) load_matrices(of_a[i], &a_tile[m + i * 16 + down][k + across]);
#pragma unroll
      for (int j = 0; j < 2; ++j)
        load_matrices_transposed(of_b[j], &b_tile[k + down][n + j * 16 + across]);
#pragma unroll
      for (int i = 0; i < 2; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
          mma(sum[i][j], of_a[i], of_b[j / 2][j % 2 * 2], of_b[j / 2][j % 2 * 2 + 1]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < 2; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j)
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        int row = m0 + m + i * 16 + lane / 4 + r / 2 * 8;
        int column = n0 + n + j * 8 + lane % 4 * 2 + r % 2;
        if (row < M && column < N) y[row * N + column] = half(sum[i][j][r]);
      }
}
