// Convolution with one input channel a group (depthwise, and its first-layer cousin with several
// outputs for each input). There is no sum over channels, so a matrix product would have nothing to
// reuse: plain loops, the innermost along a row, where the compiler makes vectors of it.
#pragma once

#include "simd.h"
#include "threads.h"

namespace minidl::MINIDL_ISA {

// With many outputs for each input channel a matrix product has something to reuse after all.
inline bool depthwise(const Conv2d& p) { return p.c == p.groups && p.o < 4 * p.groups; }

// The output columns [begin, end) whose tap s lies inside the image.
struct Inside {
  Index begin, end;
  Inside(Index out, Index in, Index stride, Index shift)
      : begin(smaller(out, shift >= 0 ? 0 : divide_up(-shift, stride))),
        end(larger(begin, smaller(out, divide_down(in - 1 - shift, stride) + 1))) {}
};

// Calls visit(output row, input row, r, s, columns, shift) for all taps that lie inside.
template <class Visit>
MINIDL_INLINE void for_each_tap(const Conv2d& p, Visit visit) {
  for (Index r = 0; r < p.kh; ++r) {
    const Index down = r * p.dilation_h - p.pad_h;
    const Inside rows(p.oh, p.h, p.stride_h, down);
    for (Index s = 0; s < p.kw; ++s) {
      const Index right = s * p.dilation_w - p.pad_w;
      const Inside columns(p.ow, p.w, p.stride_w, right);
      for (Index y = rows.begin; y < rows.end; ++y) {
        visit(y, y * p.stride_h + down, r * p.kw + s, columns, right);
      }
    }
  }
}

template <class T>
void depthwise_conv2d(const Conv2d& p, const T* x, const T* w, T* y) {
  const Index many = p.o / p.groups;  // outputs for each input channel
  parallel_for(p.n * p.o, [&](Index job) {
    const Index image = job / p.o, o = job % p.o;
    const T* in = x + (image * p.c + o / many) * p.h * p.w;
    T* out = y + job * p.oh * p.ow;
    std::memset(out, 0, static_cast<std::size_t>(p.oh * p.ow) * sizeof(T));
    for_each_tap(p, [&](Index row, Index in_row, Index tap, Inside columns, Index right) {
      const T weight = w[o * p.kh * p.kw + tap];
      const T* __restrict a = in + in_row * p.w + right;
      T* __restrict b = out + row * p.ow;
      if (p.stride_w == 1) {
        for (Index q = columns.begin; q < columns.end; ++q) b[q] += weight * a[q];
      } else {
        for (Index q = columns.begin; q < columns.end; ++q) b[q] += weight * a[q * p.stride_w];
      }
    });
  });
}

template <class T>
void depthwise_conv2d_input(const Conv2d& p, const T* g, const T* w, T* gx) {
  const Index many = p.o / p.groups;
  parallel_for(p.n * p.c, [&](Index job) {
    const Index image = job / p.c, c = job % p.c;
    T* out = gx + job * p.h * p.w;
    std::memset(out, 0, static_cast<std::size_t>(p.h * p.w) * sizeof(T));
    for (Index o = c * many; o < (c + 1) * many; ++o) {
      const T* in = g + (image * p.o + o) * p.oh * p.ow;
      for_each_tap(p, [&](Index row, Index in_row, Index tap, Inside columns, Index right) {
        const T weight = w[o * p.kh * p.kw + tap];
        const T* __restrict a = in + row * p.ow;
        T* __restrict b = out + in_row * p.w + right;
        if (p.stride_w == 1) {
          for (Index q = columns.begin; q < columns.end; ++q) b[q] += weight * a[q];
        } else {
          for (Index q = columns.begin; q < columns.end; ++q) b[q * p.stride_w] += weight * a[q];
        }
      });
    }
  });
}

template <class T>
void depthwise_conv2d_weight(const Conv2d& p, const T* g, const T* x, T* gw) {
  const Index many = p.o / p.groups;
  parallel_for(p.o, [&](Index o) {
    T* out = gw + o * p.kh * p.kw;
    for (Index t = 0; t < p.kh * p.kw; ++t) out[t] = 0;
    for (Index image = 0; image < p.n; ++image) {
      const T* a0 = g + (image * p.o + o) * p.oh * p.ow;
      const T* b0 = x + (image * p.c + o / many) * p.h * p.w;
      for_each_tap(p, [&](Index row, Index in_row, Index tap, Inside columns, Index right) {
        const T* a = a0 + row * p.ow;
        const T* b = b0 + in_row * p.w + right;
        Vec<T> sums = {};  // a sum for each lane: the compiler may not reorder one sum
        Index q = columns.begin;
        if (p.stride_w == 1) {
          for (; q + kLanes<T> <= columns.end; q += kLanes<T>) sums += load(a + q) * load(b + q);
        }
        T sum = 0;
        for (; q < columns.end; ++q) sum += a[q] * b[q * p.stride_w];
        for (Index lane = 0; lane < kLanes<T>; ++lane) sum += sums[lane];
        out[tap] += sum;
      });
    }
  });
}

}  // namespace minidl::MINIDL_ISA
