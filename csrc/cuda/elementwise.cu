// elementwise.cu: what a number of array operations would do one after the other, each reading and
// writing memory, done in one pass. These kernels wait for memory, not for arithmetic.
#include "divisor.cuh"
#include "philox.cuh"

// The elements that a thread of a grid of any size takes care of: neighbours take neighbours.
#define EACH(i, length)                                                              \
  for (long long i = blockIdx.x * (long long)(blockDim.x) + threadIdx.x; i < length; \
       i += (long long)(gridDim.x) * blockDim.x)

// Bias and activation -----------------------------------------------------------------------------

enum Activation { linear, relu, hyperbolic_tangent, logistic };

// y = f(x + bias[channel]): x is (N, channels, area).
extern "C" __global__ void __launch_bounds__(256)
    bias_activation(long long length, int channels, int area, int activation, const float* x,
                    const float* bias, float* y) {
  EACH(i, length) {
    float z = x[i] + bias[i / area % channels];
    if (activation == relu) z = z < 0 ? 0 : z;  // NaN stays
    if (activation == hyperbolic_tangent) z = tanhf(z);
    if (activation == logistic) z = 1 / (1 + expf(-z));
    y[i] = z;
  }
}

// dx = g f'(x), from y = f(x).
extern "C" __global__ void __launch_bounds__(256)
    activation_gradient(long long length, int activation, const float* g, const float* y,
                        float* dx) {
  EACH(i, length) {
    float of_y = y[i], slope = 1;
    if (activation == relu) slope = of_y > 0;
    if (activation == hyperbolic_tangent) slope = 1 - of_y * of_y;
    if (activation == logistic) slope = of_y * (1 - of_y);
    dx[i] = g[i] * slope;
  }
}

// Normalisation -----------------------------------------------------------------------------------
//
// x is (outer, sets, inner), and each set has its mean and variance, over outer and inner: in batch
// norm a set is a channel and outer the batch; in layer norm a set is a row and outer is 1. weight
// and bias (either may be null) have an entry for each set, or, `by_inner`, for each inner index.
// A block of 512 threads computes a set.

constexpr int set_threads = 512;

// The sum over the block, for all of its threads. `of_warp` has a place for each warp.
__device__ inline float sum_of_block(float x, float* of_warp) {
  for (int apart = 16; apart > 0; apart /= 2) x += __shfl_xor_sync(~0u, x, apart);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = x;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < set_threads / 32; ++i) sum += of_warp[i];
  __syncthreads();  // of_warp may be used again
  return sum;
}

struct Set {
  int count;
  long long stride;
  Divisor inner;
  const float* x;
  float mean, rstd;

  // Finds the mean, and 1 / sqrt(variance + eps), in two passes: the sum of squares alone would
  // lose what is small beside the mean.
  __device__ Set(int outer, int sets, int inner, const float* x, float eps, float* of_warp)
      : count(outer * inner), stride((long long)(sets)*inner), inner(inner), x(x) {
    float sum = 0;
    for (int j = threadIdx.x; j < count; j += set_threads) sum += x[place(j)];
    mean = sum_of_block(sum, of_warp) / float(count);
    sum = 0;
    for (int j = threadIdx.x; j < count; j += set_threads) {
      float away = x[place(j)] - mean;
      sum += away * away;
    }
    rstd = 1 / sqrtf(sum_of_block(sum, of_warp) / float(count) + eps);
  }
  // Where the set's element j is in the array.
  __device__ long long place(int j) const {
    int o = inner.quotient(j);
    return o * stride + (long long)(blockIdx.x) * inner.d + inner.remainder(j, o);
  }
  // The index of its weight and bias.
  __device__ int parameter(int j, int by_inner) const {
    return by_inner ? inner.remainder(j, inner.quotient(j)) : blockIdx.x;
  }
};

extern "C" __global__ void __launch_bounds__(512)
    standardize(int outer, int sets, int inner, float eps, int by_inner, const float* x,
                const float* weight, const float* bias, float* y) {
  __shared__ float of_warp[set_threads / 32];
  Set set(outer, sets, inner, x, eps, of_warp);
  for (int j = threadIdx.x; j < set.count; j += set_threads) {
    long long i = set.place(j);
    int parameter = set.parameter(j, by_inner);
    float z = (x[i] - set.mean) * set.rstd;
    if (weight) z *= weight[parameter];
    if (bias) z += bias[parameter];
    y[i] = z;
  }
}

// dx, and, if not null, dweight and dbias of each set. With xh = (x - mean) rstd and gw = g weight:
// dx = (gw - mean(gw) - xh mean(gw xh)) rstd;  dweight = sum g xh;  dbias = sum g.
extern "C" __global__ void __launch_bounds__(512)
    standardize_gradient(int outer, int sets, int inner, float eps, int by_inner, const float* g,
                         const float* x, const float* weight, float* dx, float* dweight,
                         float* dbias) {
  __shared__ float of_warp[set_threads / 32];
  Set set(outer, sets, inner, x, eps, of_warp);
  float sum = 0, sum_xh = 0, weighted = 0, weighted_xh = 0;
  for (int j = threadIdx.x; j < set.count; j += set_threads) {
    long long i = set.place(j);
    float xh = (x[i] - set.mean) * set.rstd, gw = g[i];
    sum += gw;
    sum_xh += gw * xh;
    if (weight) gw *= weight[set.parameter(j, by_inner)];
    weighted += gw;
    weighted_xh += gw * xh;
  }
  weighted = sum_of_block(weighted, of_warp) / float(set.count);
  weighted_xh = sum_of_block(weighted_xh, of_warp) / float(set.count);
  for (int j = threadIdx.x; j < set.count; j += set_threads) {
    long long i = set.place(j);
    float xh = (x[i] - set.mean) * set.rstd;
    float gw = weight ? g[i] * weight[set.parameter(j, by_inner)] : g[i];
    dx[i] = (gw - weighted - xh * weighted_xh) * set.rstd;
  }
  sum = sum_of_block(sum, of_warp);
  sum_xh = sum_of_block(sum_xh, of_warp);
  if (threadIdx.x == 0 && dweight) dweight[blockIdx.x] = sum_xh;
  if (threadIdx.x == 0 && dbias) dbias[blockIdx.x] = sum;
}

// Random numbers ----------------------------------------------------------------------------------

// minidl.backend.random.uniform: length numbers in [0, 1); 8 a thread.
extern "C" __global__ void __launch_bounds__(256)
    uniform(long long length, u64 key0, u64 key1, u64 call, float* y) {
  EACH(block, (length + 7) / 8) {
    Philox random(key0, key1, call, block);
    for (int j = 0; j < 8 && 8 * block + j < length; ++j) y[8 * block + j] = random.uniform(j);
  }
}

// y = x scale where the random number of that position is at least p, else 0. The mask is never
// stored: the gradient is the same call on g.
extern "C" __global__ void __launch_bounds__(256)
    dropout(long long length, u64 key0, u64 key1, u64 call, float p, float scale, const float* x,
            float* y) {
  EACH(block, (length + 7) / 8) {
    Philox random(key0, key1, call, block);
    for (int j = 0; j < 8 && 8 * block + j < length; ++j)
      y[8 * block + j] = random.uniform(j) >= p ? x[8 * block + j] * scale : 0;
  }
}

// Optimizers, over all parameters at once in one flat buffer --------------------------------------

// minidl.optim.SGD. In the first step the momentum is the gradient itself.
extern "C" __global__ void __launch_bounds__(256)
    sgd(long long length, float lr, float momentum, float dampening, float weight_decay,
        int nesterov, int first, const float* g, float* p, float* velocity) {
  EACH(i, length) {
    float step = g[i] + weight_decay * p[i];
    if (momentum != 0) {
      float v = first ? step : momentum * velocity[i] + (1 - dampening) * step;
      velocity[i] = v;
      step = nesterov ? step + momentum * v : v;
    }
    p[i] -= lr * step;
  }
}

// minidl.optim.Adam, and with `decoupled` AdamW. correction1 = 1 - beta1^t, correction2 =
// sqrt(1 - beta2^t). The shares 1 - beta are arguments too: of 1 - 0.999f four digits are right.
extern "C" __global__ void __launch_bounds__(256)
    adam(long long length, float lr, float beta1, float share1, float beta2, float share2,
         float eps, float weight_decay, int decoupled, float correction1, float correction2,
         const float* g, float* p, float* m, float* v) {
  EACH(i, length) {
    float parameter = p[i], gradient = g[i];
    if (decoupled)
      parameter *= 1 - lr * weight_decay;
    else
      gradient += weight_decay * parameter;
    float mean = m[i] = beta1 * m[i] + share1 * gradient;
    float square = v[i] = beta2 * v[i] + share2 * gradient * gradient;
    p[i] = parameter - lr / correction1 * (mean / (sqrtf(square) / correction2 + eps));
  }
}

// Warping -----------------------------------------------------------------------------------------

// y[n][c] at (row i, column j) is x[n][c] at column a0 j + a1 i + a2, row a3 j + a4 i + a5, with
// a = matrix[n], all in pixels; between four pixels, their mean by nearness; outside, `fill`.
extern "C" __global__ void __launch_bounds__(256)
    warp_affine(int N, int C, int H, int W, int out_h, int out_w, float fill, const float* x,
                const float* matrix, float* y) {
  EACH(i, (long long)(N)*out_h * out_w) {
    int column = int(i % out_w), row = int(i / out_w % out_h), n = int(i / out_w / out_h);
    const float* a = matrix + n * 6;
    float across = a[0] * column + a[1] * row + a[2], down = a[3] * column + a[4] * row + a[5];
    float left = floorf(across), top = floorf(down), right_share = across - left,
          bottom_share = down - top;
    for (int c = 0; c < C; ++c) {
      const float* image = x + ((long long)(n)*C + c) * H * W;
      float sum = 0;
      for (int corner = 0; corner < 4; ++corner) {
        float share = (corner / 2 ? bottom_share : 1 - bottom_share) *
                      (corner % 2 ? right_share : 1 - right_share);
        float h = top + corner / 2, w = left + corner % 2;
        bool inside = h >= 0 && h < H && w >= 0 && w < W;
        sum += share * (inside ? image[int(h) * W + int(w)] : fill);
      }
      y[(((long long)(n)*C + c) * out_h + row) * out_w + column] = sum;
    }
  }
}
