// reduce.cu: sums, and softmax. In what order numbers are added depends on shapes alone, so the
// same input gives the same bits every time: no atomics.
#include "ptx.cuh"

__device__ inline float sum_of_warp(float x) {
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
  return x;
}
__device__ inline float max_of_warp(float x) {
  for (int apart = 16; apart > 0; apart /= 2) x = max(x, __shfl_xor_sync(~0u, x, apart));
  return x;
}

// y[i] = sum over parts of x[part][i], in order: the end of a sum that was cut.
extern "C" __global__ void __launch_bounds__(256)
    sum_parts(int parts, int length, const float* x, float* y) {
  int i = blockIdx.x * 256 + threadIdx.x;
  if (i >= length) return;
  float sum = 0;
  for (int part = 0; part < parts; ++part) sum += x[(long long)(part)*length + i];
  y[i] = sum;
}

// y[row] = sum of x[row][...]: a warp a row, 8 rows a block.
extern "C" __global__ void __launch_bounds__(256)
    sum_rows(int rows, int columns, const float* x, float* y) {
  int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  float sum = 0;
  if (row < rows)
    for (int i = lane; i < columns; i += 32) sum += x[(long long)(row)*columns + i];
  sum = sum_of_warp(sum);
  if (row < rows && lane == 0) y[row] = sum;
}

// Softmax of rows, or its logarithm: y = exp(x - max) / sum, or x - max - log sum. A warp a row.
//
// max and sum in one reading of the row ("online softmax", Milakov & Gimelshein 2018): when a
// larger number turns up, what was summed before is scaled down.
__device__ void softmax_row(int rows, int columns, const float* x, float* y, bool logarithm) {
  int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  if (row < rows) {
    x += (long long)(row)*columns;
    y += (long long)(row)*columns;
  }
  const float lowest = -3.4e38f;
  float most = lowest, sum = 0;
  if (row < rows)
    for (int i = lane; i < columns; i += 32) {
      float before = most;
      most = max(most, x[i]);
      sum = sum * expf(before - most) + expf(x[i] - most);
    }
  float most_of_all = max_of_warp(most);
  sum = sum_of_warp(sum * expf(most - most_of_all));
  if (row < rows)
    for (int i = lane; i < columns; i += 32) {
      float away = x[i] - most_of_all;
      y[i] = logarithm ? away - logf(sum) : expf(away) / sum;
    }
}

extern "C" __global__ void __launch_bounds__(256)
    softmax(int rows, int columns, const float* x, float* y) {
  softmax_row(rows, columns, x, y, false);
}
extern "C" __global__ void __launch_bounds__(256)
    log_softmax(int rows, int columns, const float* x, float* y) {
  softmax_row(rows, columns, x, y, true);
}

// The gradients, from the result y: y (g - sum g y), and g - exp(y) sum g.
__device__ void softmax_gradient_row(int rows, int columns, const float* g, const float* y,
                                     float* dx, bool logarithm) {
  int row = blockIdx.x * 8 + threadIdx.x / 32, lane = threadIdx.x % 32;
  long long start = (long long)(row)*columns;
  float sum = 0;
  if (row < rows)
    for (int i = lane; i < columns; i += 32)
      sum += logarithm ? g[start + i] : g[start + i] * y[start + i];
  sum = sum_of_warp(sum);
  if (row < rows)
    for (int i = lane; i < columns; i += 32) {
      float of_y = y[start + i], of_g = g[start + i];
      dx[start + i] = logarithm ? of_g - expf(of_y) * sum : of_y * (of_g - sum);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    softmax_gradient(int rows, int columns, const float* g, const float* y, float* dx) {
  softmax_gradient_row(rows, columns, g, y, dx, false);
}
extern "C" __global__ void __launch_bounds__(256)
    log_softmax_gradient(int rows, int columns, const float* g, const float* y, float* dx) {
  softmax_gradient_row(rows, columns, g, y, dx, true);
}
