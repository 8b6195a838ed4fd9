// conv.cu: convolution, and its gradients with respect to image and weight, as matrix products
// whose image side is never unfolded: the source of a tile computes where an element is.
//
//   forward          y[o][npq]  = sum over crs  of  w[o][crs]  x[crs at npq]
//   input gradient   x[c][nhw]  = sum over ors  of  w[ors][c]  y[ors at nhw]
//   weight gradient  w[o][crs]  = sum over npq  of  y[npq][o]  x[crs at npq]
//
// The names are those of cuDNN: image (N, C, H, W), weight (O, C/groups, R, S), result
// (N, O, P, Q). float32 reads all three as they are. float16 and int8, on the tensor cores, read
// copies with channels last, each group's padded to a multiple of 16 bytes (quantize.cu makes
// them), so that 16 bytes are always channels of one pixel. blockIdx.z is the group, and in the
// weight gradient the group and the part of a sum that is cut into `splits`.
#include "gemm.cuh"

#define GEOMETRY                                                                             \
  int N, int C, int H, int W, int O, int R, int S, int P, int Q, int stride_h, int stride_w, \
      int pad_h, int pad_w, int dilation_h, int dilation_w
#define GEOMETRY_ARGUMENTS \
  N, C, H, W, O, R, S, P, Q, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w

// C and O count the channels of one group.
struct Geometry {
  int N, C, H, W, O, R, S, P, Q, stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
};

// The unfolded image: (pixels of the result) x (taps of the kernel).
//
// Pixel (n, p, q) and tap (c, r, s) meet at channel c of image n, row p stride - pad + r dilation,
// and column likewise. Each index alone gives an offset and a share of the row and the column; only
// the sums tell whether that is inside the image. `backward` turns the same around for the input
// gradient: the pixels are those of x, and y is read at p = (h + pad - r dilation) / stride, where
// that is a whole number.
template <class T, bool channels_last, bool backward>
struct Patches {
  typedef T Element;
  struct Row {  // or column
    Offset offset;
    int h, w;
  };
  typedef Row Column;

  const T* p;
  int height, width, stride_h, stride_w, image_stride, channel_stride, pixel_stride;
  int pixels, taps, tap_h, tap_w, step_h, step_w, start_h, start_w;
  Divisor grid, grid_w, window, window_w, by_stride_h, by_stride_w;

  // `channels`: of one group as stored; `groups`: so many side by side in the image.
  __device__ Patches(const T* p, const Geometry& g, int channels, int groups)
      : p(p),
        height(backward ? g.P : g.H),
        width(backward ? g.Q : g.W),
        stride_h(g.stride_h),
        stride_w(g.stride_w),
        image_stride(channels * groups * height * width),
        channel_stride(channels_last ? 1 : height * width),
        pixel_stride(channels_last ? channels * groups : 1),
        pixels(g.N * (backward ? g.H * g.W : g.P * g.Q)),
        taps(channels * g.R * g.S),
        tap_h(backward ? -g.dilation_h : g.dilation_h),
        tap_w(backward ? -g.dilation_w : g.dilation_w),
        step_h(backward ? 1 : g.stride_h),
        step_w(backward ? 1 : g.stride_w),
        start_h(backward ? g.pad_h : -g.pad_h),
        start_w(backward ? g.pad_w : -g.pad_w),
        grid(backward ? g.H * g.W : g.P * g.Q),
        grid_w(backward ? g.W : g.Q),
        window(channels_last ? channels : g.R * g.S),
        window_w(g.S),
        by_stride_h(g.stride_h),
        by_stride_w(g.stride_w) {}

  __device__ int rows() const { return pixels; }
  __device__ int columns() const { return taps; }

  __device__ Row row(int i) const {
    if (i >= pixels) return {-1, 0, 0};
    int n = grid.quotient(i), rest = grid.remainder(i, n);
    int down = grid_w.quotient(rest), across = grid_w.remainder(rest, down);
    return {n * image_stride, down * step_h + start_h, across * step_w + start_w};
  }

  __device__ Column column(int k) const {  // counted (c, r, s), or with channels last (r, s, c)
    if (k >= taps) return {-1, 0, 0};
    int outer = window.quotient(k), inner = window.remainder(k, outer);
    int c = channels_last ? inner : outer, rs = channels_last ? outer : inner;
    int r = window_w.quotient(rs), s = window_w.remainder(rs, r);
    return {c * channel_stride, r * tap_h, s * tap_w};
  }

  __device__ const T* at(const Row& row, const Column& column) const {
    int h = row.h + column.h, w = row.w + column.w;
    if (row.offset < 0 || column.offset < 0 || h < 0 || w < 0) return nullptr;
    if constexpr (backward) {
      int p = by_stride_h.quotient(h), q = by_stride_w.quotient(w);
      if (p * stride_h != h || q * stride_w != w) return nullptr;
      h = p;
      w = q;
    }
    if (h >= height || w >= width) return nullptr;
    return p + row.offset + column.offset + (h * width + w) * pixel_stride;
  }
};
template <class T>
using Unfolded = Patches<T, false, false>;
template <class T>
using UnfoldedChannelsLast = Patches<T, true, false>;

// Where pixel i of a result with channels first is: (n, h w) -> n * channels * area + h w.
__device__ inline Split pixel_offsets(int N, int area, int channels) {
  return Split(N * area, area, channels * area, 1);
}

// float32 -----------------------------------------------------------------------------------------

template <class Product>
__device__ void conv2d_float(const Geometry& g, const float* x, const float* w, const float* bias,
                             float* y) {
  int group = blockIdx.z, groups = gridDim.z, taps = g.C * g.R * g.S, area = g.P * g.Q;
  Split pixels = pixel_offsets(g.N, area, g.O * groups);
  gemm_float<Product, true, false>(
      make_matrix(w + group * g.O * taps, Strided{g.O, taps}, Strided{taps, 1}),
      Unfolded<float>(x + group * g.C * g.H * g.W, g, g.C, groups), 0, taps,
      [=](int o, int pixel, float sum) {
        int channel = group * g.O + o;
        y[channel * area + pixels(pixel)] = sum + (bias ? bias[channel] : 0);
      });
}

template <class Product>
__device__ void conv2d_input_float(const Geometry& g, const float* y, const float* w, float* x) {
  int group = blockIdx.z, groups = gridDim.z, window = g.R * g.S, area = g.H * g.W;
  int taps = g.O * window;
  Split pixels = pixel_offsets(g.N, area, g.C * groups);
  gemm_float<Product, true, false>(
      make_matrix(w + group * taps * g.C, Strided{g.C, window},
                  Split(taps, window, g.C * window, 1)),
      Patches<float, false, true>(y + group * g.O * g.P * g.Q, g, g.O, groups), 0, taps,
      [=](int c, int pixel, float sum) { x[(group * g.C + c) * area + pixels(pixel)] = sum; });
}

// The sum is over all pixels of all images, and the result is small: so it is cut into `splits`
// parts, for enough blocks to keep the GPU busy; sum_parts (reduce.cu) adds them in order.
// w is (splits, O, C/groups, R, S).
template <class Product>
__device__ void conv2d_weight_float(const Geometry& g, int splits, int part_length, const float* y,
                                    const float* x, float* w) {
  int group = blockIdx.z / splits, split = blockIdx.z % splits, groups = gridDim.z / splits;
  int taps = g.C * g.R * g.S, area = g.P * g.Q, pixels = g.N * area;
  float* part = w + (long long)(split * groups + group) * (g.O * taps);
  gemm_float<Product, true, true>(
      make_matrix(y + group * g.O * area, Strided{g.O, area},
                  pixel_offsets(g.N, area, g.O * groups)),
      Turned<Unfolded<float>>({x + group * g.C * g.H * g.W, g, g.C, groups}), split * part_length,
      min((split + 1) * part_length, pixels),
      [=](int o, int tap, float sum) { part[o * taps + tap] = sum; });
}

extern "C" __global__ void __launch_bounds__(256)
    conv2d_f32_large(GEOMETRY, const float* x, const float* w, const float* bias, float* y) {
  conv2d_float<Fma<128, 128>>({GEOMETRY_ARGUMENTS}, x, w, bias, y);
}
extern "C" __global__ void __launch_bounds__(64, 5)
    conv2d_f32_small(GEOMETRY, const float* x, const float* w, const float* bias, float* y) {
  conv2d_float<Fma<64, 64>>({GEOMETRY_ARGUMENTS}, x, w, bias, y);
}
extern "C" __global__ void __launch_bounds__(256)
    conv2d_input_f32_large(GEOMETRY, const float* y, const float* w, float* x) {
  conv2d_input_float<Fma<128, 128>>({GEOMETRY_ARGUMENTS}, y, w, x);
}
extern "C" __global__ void __launch_bounds__(64, 5)
    conv2d_input_f32_small(GEOMETRY, const float* y, const float* w, float* x) {
  conv2d_input_float<Fma<64, 64>>({GEOMETRY_ARGUMENTS}, y, w, x);
}
extern "C" __global__ void __launch_bounds__(256)
    conv2d_weight_f32_large(GEOMETRY, int splits, int part_length, const float* y, const float* x,
                            float* w) {
  conv2d_weight_float<Fma<128, 128>>({GEOMETRY_ARGUMENTS}, splits, part_length, y, x, w);
}
extern "C" __global__ void __launch_bounds__(64, 5)
    conv2d_weight_f32_small(GEOMETRY, int splits, int part_length, const float* y, const float* x,
                            float* w) {
  conv2d_weight_float<Fma<64, 64>>({GEOMETRY_ARGUMENTS}, splits, part_length, y, x, w);
}

// Tensor cores ------------------------------------------------------------------------------------
//
// x is (N, H, W, groups, C'), y (N, P, Q, groups, O'), w (O, R, S, C'), where C' and O' are C and O
// padded; results have channels first and are not padded.

typedef TensorCores<float, 128, 128, 64, 64> HalfProduct;
typedef TensorCores<int, 128, 128, 64, 64> Int8Product;

__device__ inline int padded(int channels, int vector) {
  return (channels + vector - 1) / vector * vector;
}

template <class Product, class T, class Store>
__device__ void conv2d_vector(const Geometry& g, const T* x, const T* w, Store store) {
  int group = blockIdx.z, groups = gridDim.z, C = padded(g.C, 16 / sizeof(T));
  int taps = g.R * g.S * C, area = g.P * g.Q;
  Split pixels = pixel_offsets(g.N, area, g.O * groups);
  gemm_vector<Product, true, true>(
      make_matrix(w + group * g.O * taps, Strided{g.O, taps}, Strided{taps, 1}),
      UnfoldedChannelsLast<T>(x + group * C, g, C, groups), 0, taps,
      [=](int o, int pixel, auto sum) {
        int channel = group * g.O + o;
        store(channel, channel * area + pixels(pixel), sum);
      });
}

extern "C" __global__ void __launch_bounds__(128)
    conv2d_f16(GEOMETRY, const half* x, const half* w, const float* bias, float* y) {
  conv2d_vector<HalfProduct>({GEOMETRY_ARGUMENTS}, x, w,
                             [=](int o, int i, float sum) { y[i] = sum + (bias ? bias[o] : 0); });
}

// Dequantized as it is stored: one scale for x, one for each output channel of w.
extern "C" __global__ void __launch_bounds__(128)
    conv2d_s8(GEOMETRY, const s8* x, const s8* w, const float* x_scale, const float* w_scale,
              const float* bias, float* y) {
  conv2d_vector<Int8Product>({GEOMETRY_ARGUMENTS}, x, w, [=](int o, int i, int sum) {
    y[i] = float(sum) * (x_scale[0] * w_scale[o]) + (bias ? bias[o] : 0);
  });
}

extern "C" __global__ void __launch_bounds__(128)
    conv2d_input_f16(GEOMETRY, const half* y, const half* w, float* x) {
  Geometry g{GEOMETRY_ARGUMENTS};
  int group = blockIdx.z, groups = gridDim.z, window = R * S, area = H * W;
  int C_ = padded(C, 8), O_ = padded(O, 8), taps = window * O_;
  Split pixels = pixel_offsets(N, area, C * groups);
  // w[o][rs][c], seen as [c][rs o]. y has padding behind its last channel, w has no such rows.
  gemm_vector<HalfProduct, false, true>(
      make_matrix(w + group * O * window * C_, Strided{C, 1}, Split(taps, O_, C_, window * C_, O)),
      Patches<half, true, true>(y + group * O_, g, O_, groups), 0, taps,
      [=](int c, int pixel, float sum) { x[(group * C + c) * area + pixels(pixel)] = sum; });
}

extern "C" __global__ void __launch_bounds__(128)
    conv2d_weight_f16(GEOMETRY, int splits, int part_length, const half* y, const half* x,
                      float* w) {
  Geometry g{GEOMETRY_ARGUMENTS};
  int group = blockIdx.z / splits, split = blockIdx.z % splits, groups = gridDim.z / splits;
  int C_ = padded(C, 8), O_ = padded(O, 8), window = R * S, pixels = N * P * Q;
  float* part = w + (long long)(split * groups + group) * (O * C * window);
  Divisor by_channels(C_);
  gemm_vector<HalfProduct, false, false>(
      make_matrix(y + group * O_, Strided{O, 1}, Strided{pixels, groups * O_}),
      Turned<UnfoldedChannelsLast<half>>({x + group * C_, g, C_, groups}), split * part_length,
      min((split + 1) * part_length, pixels), [=](int o, int tap, float sum) {
        int rs = by_channels.quotient(tap), c = by_channels.remainder(tap, rs);
        if (c < C) part[(o * C + c) * window + rs] = sum;
      });
}
