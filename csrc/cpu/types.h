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
  // bias: for each column, or null
  void (*matmul)(Index m, Index n, Index k, Matrix<T> a, Matrix<T> b, const T* bias, T* c);
  void (*conv2d)(const Conv2d&, const T* x, const T* w, T* y);
  void (*conv2d_input)(const Conv2d&, const T* g, const T* w, T* gx);
  void (*conv2d_weight)(const Conv2d&, const T* g, const T* x, T* gw);
  void (*max_pool2d)(const Pool2d&, const T* x, T* y, std::int32_t* index);
  // Returns false if an index lies outside its plane; those gradients are dropped.
  bool (*max_pool2d_input)(const Pool2d&, const T* g, const std::int32_t* index, T* gx);
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

struct Kernels {
  const char* isa;
  KernelsFor<float> f32;
  KernelsFor<double> f64;
  const Ladder* ladder;
};

}  // namespace minidl
