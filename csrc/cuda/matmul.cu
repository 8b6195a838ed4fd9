// matmul.cu: matrix products, y[m][n] = sum over k of a[m][k] b[k][n].
//
// Float operands may have any strides, so transposed views need no copy; blockIdx.z counts a batch.
// Each float kernel comes for large tiles (128 x 128 results a block) and small ones (64 x 64), for
// when large ones would leave most of the GPU idle.
#include "gemm.cuh"

template <class Product>
__device__ void matmul_float(int M, int N, int K, const float* a, int a_m, int a_k,
                             long long a_batch, const float* b, int b_k, int b_n, long long b_batch,
                             float* y) {
  int batch = blockIdx.z;
  auto A = make_matrix(a + batch * a_batch, Strided{M, a_m}, Strided{K, a_k});
  auto B = make_matrix(b + batch * b_batch, Strided{N, b_n}, Strided{K, b_k});
  auto store = [=](int m, int n, float sum) { y[batch * (long long)(M)*N + m * N + n] = sum; };
  if (a_k == 1 && b_k == 1)
    gemm_float<Product, true, true>(A, B, 0, K, store);
  else if (a_k == 1)
    gemm_float<Product, true, false>(A, B, 0, K, store);
  else if (b_k == 1)
    gemm_float<Product, false, true>(A, B, 0, K, store);
  else
    gemm_float<Product, false, false>(A, B, 0, K, store);
}

extern "C" __global__ void __launch_bounds__(256)
    matmul_f32_large(int M, int N, int K, const float* a, int a_m, int a_k, long long a_batch,
                     const float* b, int b_k, int b_n, long long b_batch, float* y) {
  matmul_float<Fma<128, 128>>(M, N, K, a, a_m, a_k, a_batch, b, b_k, b_n, b_batch, y);
}

extern "C" __global__ void __launch_bounds__(64, 5)
    matmul_f32_small(int M, int N, int K, const float* a, int a_m, int a_k, long long a_batch,
                     const float* b, int b_k, int b_n, long long b_batch, float* y) {
  matmul_float<Fma<64, 64>>(M, N, K, a, a_m, a_k, a_batch, b, b_k, b_n, b_batch, y);
}

// On the tensor cores, 128 x 128 results a block. The pitch of a row, in elements, must be a
// multiple of 16 bytes: quantize.cu writes such rows.

typedef TensorCores<float, 128, 128, 64, 64> HalfProduct;
typedef TensorCores<int, 128, 128, 64, 64> Int8Product;

// y = x w^T + bias: x (M, K), w (N, K), as a linear layer has them. bias may be null.
extern "C" __global__ void __launch_bounds__(128)
    matmul_f16_nt(int M, int N, int K, const half* x, int x_pitch, const half* w, int w_pitch,
                  const float* bias, float* y) {
  gemm_vector<HalfProduct, true, true>(
      make_matrix(x, Strided{M, x_pitch}, Strided{K, 1}),
      make_matrix(w, Strided{N, w_pitch}, Strided{K, 1}), 0, K,
      [=](int m, int n, float sum) { y[m * N + n] = sum + (bias ? bias[n] : 0); });
}

// y = a b: a (M, K), b (K, N).
extern "C" __global__ void __launch_bounds__(128)
    matmul_f16_nn(int M, int N, int K, const half* a, int a_pitch, const half* b, int b_pitch,
                  half* y) {
  gemm_vector<HalfProduct, true, false>(make_matrix(a, Strided{M, a_pitch}, Strided{K, 1}),
                                        make_matrix(b, Strided{N, 1}, Strided{K, b_pitch}), 0, K,
                                        [=](int m, int n, float sum) { y[m * N + n] = half(sum); });
}

// y = a^T b: a (K, M), b (K, N): the gradient of a linear layer's weights.
extern "C" __global__ void __launch_bounds__(128)
    matmul_f16_tn(int M, int N, int K, const half* a, int a_pitch, const half* b, int b_pitch,
                  float* y) {
  gemm_vector<HalfProduct, false, false>(make_matrix(a, Strided{M, 1}, Strided{K, a_pitch}),
                                         make_matrix(b, Strided{N, 1}, Strided{K, b_pitch}), 0, K,
                                         [=](int m, int n, float sum) { y[m * N + n] = sum; });
}

// The exact product of int8 matrices: x (M, K), w (N, K).
extern "C" __global__ void __launch_bounds__(128)
    matmul_s8(int M, int N, int K, const s8* x, int x_pitch, const s8* w, int w_pitch, int* y) {
  gemm_vector<Int8Product, true, true>(make_matrix(x, Strided{M, x_pitch}, Strided{K, 1}),
                                       make_matrix(w, Strided{N, w_pitch}, Strided{K, 1}), 0, K,
                                       [=](int m, int n, int sum) { y[m * N + n] = sum; });
}

// A linear layer in int8, dequantized while the sums are in registers: y = sx sw (x w^T) + bias.
// One scale a row of w; one a row of x, or, if x_scales is 1, one for all. bias may be null.
extern "C" __global__ void __launch_bounds__(128)
    linear_s8(int M, int N, int K, const s8* x, int x_pitch, const s8* w, int w_pitch,
              const float* x_scale, int x_scales, const float* w_scale, const float* bias,
              float* y) {
  gemm_vector<Int8Product, true, true>(make_matrix(x, Strided{M, x_pitch}, Strided{K, 1}),
                                       make_matrix(w, Strided{N, w_pitch}, Strided{K, 1}), 0, K,
                                       [=](int m, int n, int sum) {
                                         float scale = x_scale[x_scales == 1 ? 0 : m] * w_scale[n];
                                         y[m * N + n] = float(sum) * scale + (bias ? bias[n] : 0);
                                       });
}
