// quantize.cu: from float32 to what the tensor cores take, float16 and int8, laid out as their
// kernels want it: rows (or channels) padded with zeros to a multiple of 16 bytes.
#include "ptx.cuh"

constexpr int side = 32;  // of a tile that is transposed through shared memory

// round(x / scale), to even at a half, within -127 .. 127; 0 where the scale is 0.
__device__ inline s8 quantized(float x, float scale) {
  if (scale == 0) return 0;
  return s8(max(-127, min(127, __float2int_rn(x / scale))));
}

// The larger of two; NaN if one is (fmaxf would drop it).
__device__ inline float larger(float a, float b) { return a != a || b <= a ? a : b; }

// largest[row] = max |x[row][...]|: a block of 256 threads a row. For one scale of a whole array,
// take it as a few hundred rows, and then the results as one.
extern "C" __global__ void __launch_bounds__(256)
    absmax(int rows, int columns, const float* x, float* largest) {
  __shared__ float of_warp[8];
  int row = blockIdx.x;
  float most = 0;
  for (int i = threadIdx.x; i < columns; i += 256)
    most = larger(most, fabsf(x[(long long)(row)*columns + i]));
  for (int apart = 16; apart > 0; apart /= 2)
    most = larger(most, __shfl_xor_sync(~0u, most, apart));
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = most;
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int i = 0; i < 8; ++i) most = larger(most, of_warp[i]);
    largest[row] = most;
  }
}

// q[row][i] = round(x[row][i] / scale), one scale a row, or one for all if `scales` is 1; `pitch`
// numbers a row of q. One thread a number; grid (pitch / 256, rows).
extern "C" __global__ void __launch_bounds__(256)
    quantize_s8(int rows, int columns, int pitch, const float* x, const float* scale, int scales,
                s8* q) {
  int i = blockIdx.x * 256 + threadIdx.x;
  for (long long row = blockIdx.y; row < rows; row += gridDim.y)
    if (i < pitch)
      q[row * pitch + i] =
          i < columns ? quantized(x[row * columns + i], scale[scales == 1 ? 0 : row]) : s8(0);
}

extern "C" __global__ void __launch_bounds__(256)
    to_f16(int rows, int columns, int pitch, const float* x, half* y) {
  int i = blockIdx.x * 256 + threadIdx.x;
  for (long long row = blockIdx.y; row < rows; row += gridDim.y)
    if (i < pitch) y[row * pitch + i] = half(i < columns ? x[row * columns + i] : 0.0f);
}

// Channels last: x (images, channels, area) -> y (images, area, padded), where image counts also
// the groups if they stand outside: then images = N * groups, and `groups` of them share a pixel,
// y (N, area, groups, padded). A block of 32 x 8 threads turns a tile of 32 channels x 32 pixels:
// it reads along the pixels and writes along the channels.
typedef float Square[side][side + 1];  // + 1: a column of it lies in 32 different banks

template <class T, class Convert>
__device__ void channels_last(Square& tile, int groups, int channels, int area, int padded,
                              const float* x, T* y, Convert convert) {
  int image = blockIdx.z, c0 = blockIdx.y * side, i0 = blockIdx.x * side;
  x += (long long)(image)*channels * area;
  y += (long long)(image / groups) * area * groups * padded + image % groups * padded;
  for (int down = threadIdx.y; down < side; down += 8) {
    int c = c0 + down, i = i0 + threadIdx.x;
    tile[down][threadIdx.x] = c < channels && i < area ? x[(long long)(c)*area + i] : 0.0f;
  }
  __syncthreads();
  for (int down = threadIdx.y; down < side; down += 8) {
    int c = c0 + threadIdx.x, i = i0 + down;
    if (c < padded && i < area)
      y[(long long)(i)*groups * padded + c] = convert(tile[threadIdx.x][down]);
  }
}

extern "C" __global__ void __launch_bounds__(256)
    channels_last_f16(int groups, int channels, int area, int padded, const float* x, half* y) {
  __shared__ Square tile;
  channels_last(tile, groups, channels, area, padded, x, y,
                [](float value) { return half(value); });
}

extern "C" __global__ void __launch_bounds__(256)
    channels_last_s8(int groups, int channels, int area, int padded, const float* x,
                     const float* scale, int scales, s8* y) {
  // One scale for all, or one an image: the output channels of a weight.
  float by = scale[scales == 1 ? 0 : blockIdx.z];
  __shared__ Square tile;
  channels_last(tile, groups, channels, area, padded, x, y,
                [=](float value) { return quantized(value, by); });
}
