// The words that the kernels and the Python module share: sizes, shapes, and the table of kernels.
//
// Everything here is plain data. The header is included by files that are compiled for different
// instruction sets, and of an inline function that exists in several of them the linker keeps one
// copy, perhaps one that this processor cannot run.
#pragma once

#include <cstdint>

// For the few functions that files of several instruction sets share: never a copy of their own.
#define MINIDL_INLINE inline __attribute__((always_inline))

namespace minidl {

using Index = std::int64_t;  // every size, stride and offset: 64 bits, signed

// A matrix is a pointer and two strides (in elements), so a transposed view costs nothing.
template <class T>
struct Matrix {
  const T* data;
  Index row_stride, col_stride;
};

// Numbers that are stored in 16 bits and computed with as floats, and four bytes that are
// multiplied and added up together (narrow.h).
struct Half {  // IEEE 754 binary16
  std::uint16_t bits;
};
struct BFloat16 {  // the upper half of a float
  std::uint16_t bits;
};
enum class Word : std::uint32_t {};

// The geometry of y = conv2d(x, w): x (n,c,h,w), w (o, c/groups, kh, kw), y (n,o,oh,ow).
struct Conv2d {
  Index n, c, h, w;
  Index o, kh, kw;
  Index stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Index groups;
  Index oh, ow;
  bool relu;  // conv2d: what is negative becomes 0
};

// The geometry of max pooling over `planes` images of h x w.
struct Pool2d {
  Index planes, h, w;
  Index kh, kw;
  Index stride_h, stride_w, pad_h, pad_w, dilation_h, dilation_w;
  Index oh, ow;
};

// What one instruction set offers for one element type. All arrays are C-contiguous, and never
// empty: the caller has dealt with sizes of zero.
template <class T>
struct KernelsFor {
  // bias: for each column, or for each output channel; or null
  void (*matmul)(Index m, Index n, Index k, Matrix<T> a, Matrix<T> b, const T* bias, T* c);
  void (*conv2d)(const Conv2d&, const T* x, const T* w, const T* bias, T* y);
  void (*conv2d_input)(const Conv2d&, const T* g, const T* w, T* gx);
  void (*conv2d_weight)(const Conv2d&, const T* g, const T* x, T* gw);
  void (*max_pool2d)(const Pool2d&, const T* x, T* y, std::int32_t* index);
  // Returns false if an index lies outside its plane; those gradients are dropped.
  bool (*max_pool2d_input)(const Pool2d&, const T* g, const std::int32_t* index, T* gx);
};

// 3x3 with stride 1, dilation 1, one group, padding 0 to 2: with fewer multiplications.
struct Winograd {
  void (*conv2d)(const Conv2d&, const float* x, const float* w, const float* bias, float* y);
  void (*conv2d_input)(const Conv2d&, const float* g, const float* w, float* gx);
  void (*conv2d_weight)(const Conv2d&, const float* g, const float* x, float* gw);
};

// The rungs below those kernels (ladder.h), and the loops that measure the machine (peak.h).
template <class T>
struct LadderFor {
  using Matmul = void (*)(Index m, Index n, Index k, const T* a, const T* b, T* c);
  Matmul matmul_naive, matmul_reordered, matmul_tiled;
  void (*conv2d_naive)(const Conv2d&, const T* x, const T* w, T* y);
  Index (*multiply_add_loop)(Index steps, T factor, T term, T* out);
  void (*triad)(Index n, T factor, const T* b, const T* c, T* a);
  Index peak_chunks;  // how many elements multiply_add_loop writes
};

struct Ladder {
  LadderFor<float> f32;
  LadderFor<double> f64;
};

// Windows of an image that are averaged: window (p, q) has the rows rows[2p] to rows[2p+1]-1 and
// columns likewise, and its sum is divided by divisors[p * ow + q].
struct Windows {
  Index planes, h, w, oh, ow;
  const Index* rows;
  const Index* columns;
  const double* divisors;
};

// The geometry of a normalisation. A group of elements shares a mean and a variance; it lies in
// memory as `runs` runs of `length` elements side by side:
//   batch norm: a channel, of which each image holds a run;  layer norm: a sample, one run;
//   group norm: some channels of a sample, a run each.
// Weight and bias of a run start at (group % weight_period) * weight_stride + run * weight_step; if
// `along`, each element has its own, else the whole run shares that one.
struct Norm {
  Index groups, runs, length;
  Index group_stride, run_stride;
  Index weight_period, weight_stride, weight_step;
  bool along;
};

// Scores of `classes` classes for outer * inner samples: x (outer, classes, inner).
struct Scores {
  Index outer, classes, inner;
};

// The numbers 0 ... count-1 of a Philox stream, `repeat` elements to each.
struct Mask {
  std::uint64_t key[2], call;
  std::uint32_t threshold;  // of 2^24: a number below it drops its elements
  Index count, repeat;
};

// One parameter of an optimizer's step: its array, its gradient, and what is remembered of it.
template <class T>
struct Slice {
  T* p;
  const T* g;
  T* state[3];  // null: the optimizer as it is set needs none
  Index size;
  T step_size, correction;  // Adam's, which depend on how often this parameter was updated
  bool first;               // SGD's first step with momentum
};
template <class T>
struct Sgd {
  T lr, momentum, share, weight_decay;  // share = 1 - dampening
  bool nesterov, maximize;
};
template <class T>
struct Adam {
  T beta1, beta2, one_less_beta1, one_less_beta2, eps;
  T weight_decay;  // as an L2 penalty
  T shrink;        // what p is multiplied by: decoupled weight decay
  bool maximize;
};
template <class T>
struct RmsProp {
  T lr, alpha, one_less_alpha, eps, weight_decay, momentum;
  bool maximize;
};

// An array that lies crosswise: `near` is the dimension, not the last, whose stride is 1.
struct Layout {
  static constexpr int kMost = 8;
  int dims, near;
  Index size[kMost], stride[kMost];  // in elements; strides may be negative
};

// What else a training step does, for one element type.
template <class T>
struct TrainingFor {
  void (*max_pool2d_gradient)(const Pool2d&, const T* x, const T* g, T* gx);
  void (*avg_pool2d)(const Windows&, const T* x, T* y);
  void (*avg_pool2d_input)(const Windows&, const T* y, T* x);
  void (*statistics)(const Norm&, const T* x, T* mean, T* variance);
  void (*standardize)(const Norm&, T eps, const T* x, const T* weight, const T* bias, const T* mean,
                      const T* variance, T* y);
  // gw and gb have the size of weight and bias; with `along` or several groups to a weight, the
  // sums over groups are cut into parts that depend on the shape alone.
  void (*standardize_gradient)(const Norm&, T eps, const T* g, const T* x, const T* weight,
                               const T* mean, const T* variance, T* gx, T* gw, T* gb);
  void (*scale_shift)(Index planes, Index channels, Index size, const T* x, const T* scale,
                      const T* shift, T* y);
  void (*softmax)(const Scores&, const T* x, T* y);
  void (*softmax_gradient)(const Scores&, const T* g, const T* y, T* gx);
  void (*log_softmax)(const Scores&, const T* x, T* y);
  void (*log_softmax_gradient)(const Scores&, const T* g, const T* y, T* gx);
  // Labels outside [0, classes) do not count. `weight` may be null.
  void (*cross_entropy)(const Scores&, const T* x, const Index* label, const T* weight, T smoothing,
                        T* loss);
  void (*cross_entropy_gradient)(const Scores&, const T* g, bool one_g, const T* x,
                                 const Index* label, const T* weight, T smoothing, T* gx);
  void (*dropout)(const Mask&, const T* x, T scale, T* y);
  void (*in_order)(const Layout&, const T* x, T* y);
  void (*relu)(Index n, const T* x, T* y);
  void (*relu_gradient)(Index n, const T* g, const T* y, T* gx);
  void (*sgd)(const Sgd<T>&, Index count, const Slice<T>* slices);
  void (*adam)(const Adam<T>&, Index count, const Slice<T>* slices);
  void (*rmsprop)(const RmsProp<T>&, Index count, const Slice<T>* slices);
};

// A recurrent layer over sequences of `steps` steps; lengths (of each sequence) may be null.
enum class RecurrentCell { rnn_tanh, rnn_relu, lstm, gru };
struct Recurrent {
  RecurrentCell cell;
  Index steps, batch, hidden;
  const Index* lengths;
};

template <class T>
struct RecurrentFor {  // see recurrent.h
  void (*forward)(const Recurrent&, const T* a, const T* w_hh, const T* b_ih, const T* b_hh,
                  const T* first, T* states, T* kept);
  void (*backward)(const Recurrent&, const T* kept, const T* w_hh, const T* g, T* da, T* db,
                   T* d_first);
};

// Vectors of `size` at so many places, of n images.
struct Places {
  Index n, places, size;
};

template <class T>
struct AttentionFor {  // see attention.h
  void (*scores)(const Places&, const T* u, const T* v, const T* w, T* e);
  void (*scores_gradient)(const Places&, const T* g, const T* u, const T* v, const T* w, T* gu,
                          T* gv, T* gw);
};

struct RecurrentKernels {
  RecurrentFor<float> f32;
  RecurrentFor<double> f64;
  AttentionFor<float> attention_f32;
  AttentionFor<double> attention_f64;
};

// An affine warp of n images: pixel (column j, row i) of the result is fetched from column
// m[0] j + m[1] i + m[2] and row m[3] j + m[4] i + m[5] of its image.
struct Warp {
  enum Padding { kZeros, kBorder, kReflection };
  Index n, c, h, w, oh, ow;
  const double* matrices;  // (n, 2, 3)
  bool nearest;            // else bilinear
  Padding padding;
};

template <class T>
struct WarpFor {
  void (*affine)(const Warp&, const T* x, T fill, T* y);
  void (*affine_input)(const Warp&, const T* y, T* x);
};

struct WarpKernels {
  WarpFor<float> f32;
  WarpFor<double> f64;
};

struct Training {
  TrainingFor<float> f32;
  TrainingFor<double> f64;
};

// ---- Narrow numbers ---------------------------------------------------------------------------

// A matrix of bytes, signed or unsigned.
struct Bytes {
  const std::uint8_t* data;
  Index row_stride, col_stride;
  bool is_signed;
};

// Weights (n, k) of an integer product, packed: the words, and for each of the n the sum of its
// bytes as they are packed and its zero point (integer.h).
struct PackedBytes {
  Word* words;
  std::int32_t *sum, *zero;
};

// What becomes of an integer sum, for each output channel. Arrays may be null.
struct Finish {
  enum Type { kInt32, kFloat32, kInt8, kUint8 };
  Type type;                 // of the result:
  const std::int32_t* bias;  // all: added to the sum
  const float* scale;        // all but kInt32: multiplied with that
  const float* offset;       // kFloat32: added to that
  std::int32_t zero;         // kInt8, kUint8: added after rounding (half to even)
  bool relu;                 // nothing less than (what stands for) zero
};

// y = round((a - a_zero) * a_scale + (b - b_zero) * b_scale) + zero
struct AddBytes {
  float a_scale, b_scale;
  std::int32_t a_zero, b_zero, zero;
  bool relu;  // nothing less than zero
};

template <class B>
struct BytesFor {
  void (*quantize)(Index n, const float* x, float scale, int zero, B* q);
  void (*add)(Index n, const B* a, const B* b, const AddBytes&, B* y);
  void (*max_pool)(const Pool2d&, const B* x, B* y);
  void (*mean)(Index planes, Index n, const B* x, float scale, int x_zero, int zero, B* y);
};

template <class E>
struct NarrowFor {
  // w (n, k) -> E[k * packed_width(n)]
  void (*pack)(Index n, Index k, Matrix<E> w, E* packed);
  // y[i][j] = scale[j] * sum over k of x[i][k] * w[j][k]  + bias[j]; scale and bias may be null
  void (*linear)(Index m, Index n, Index k, Matrix<float> x, const E* packed, const float* scale,
                 const float* bias, float* y);
  void (*linear_unpacked)(Index m, Index n, Index k, Matrix<float> x, Matrix<E> w,
                          const float* scale, const float* bias, float* y);
};

// Weights (n, k) of four bits, two in a byte; `group` of a row share a scale. Rows of what they are
// multiplied with are `padded` long.
struct Int4 {
  Index n, k, group, padded;
  const std::uint8_t* w;
  const float* scale;
};

struct Narrow {
  Index (*packed_width)(Index n);  // n rounded up to whole panels
  // w (n, k) -> Word[divide_up(k, 4) * packed_width(n)]; zero[j] is overwritten
  void (*pack_bytes)(Index n, Index k, Bytes w, PackedBytes packed);
  // sum over k of (a - a_zero)(w - zero): a_zero has m elements
  void (*matmul_integer)(Index m, Index n, Index k, Bytes a, const std::int32_t* a_zero,
                         PackedBytes w, const Finish& finish, void* c);
  // w (o, c / groups, kh, kw) -> Word[o * divide_up(c / groups, 4) * kh * kw]
  void (*pack_conv)(const Conv2d&, Bytes w, PackedBytes packed);
  void (*conv_integer)(const Conv2d&, Bytes x, std::int32_t x_zero, PackedBytes w,
                       const Finish& finish, void* y);
  // peak.h; `out` as for LadderFor's
  Index (*multiply_add_bytes_loop)(Index steps, Word factor, std::int32_t* out);
  NarrowFor<float> f32;
  NarrowFor<Half> f16;
  NarrowFor<BFloat16> bf16;
  NarrowFor<std::int8_t> s8;
  BytesFor<std::int8_t> signed_bytes;
  BytesFor<std::uint8_t> unsigned_bytes;
  void (*linear_int4)(const Int4&, Index m, const float* even, const float* odd, const float* bias,
                      float* y);  // int4.h
};

struct Kernels {
  const char* isa;
  KernelsFor<float> f32;
  KernelsFor<double> f64;
  const Ladder* ladder;
  const Training* training;
  const Narrow* narrow;
  const Winograd* winograd;
  const RecurrentKernels* recurrent;
  const WarpKernels* warp;
};

}  // namespace minidl
