// Average pooling, and its transpose: every pixel of a window gets an equal share of its gradient.
//
// Windows are runs of rows and of columns; where they begin and end, and what a sum is divided by,
// is in tables that the caller makes once. So ordinary and adaptive pooling are one kernel.
#pragma once

#include "simd.h"
#include "threads.h"

namespace minidl::MINIDL_ISA {

template <class T>
void avg_pool2d(const Windows& s, const T* x, T* y) {
  const Index together = larger(1, 16384 / larger(1, s.h * s.w));
  parallel_for(divide_up(s.planes, together), [&](Index job) {
    for (Index plane = job * together; plane < smaller(s.planes, (job + 1) * together); ++plane) {
      const T* in = x + plane * s.h * s.w;
      T* out = y + plane * s.oh * s.ow;
      for (Index p = 0; p < s.oh; ++p) {
        for (Index q = 0; q < s.ow; ++q) {
          T sum = T(0);
          for (Index r = s.rows[2 * p]; r < s.rows[2 * p + 1]; ++r) {
            T row = T(0);
            for (Index c = s.columns[2 * q]; c < s.columns[2 * q + 1]; ++c) row += in[r * s.w + c];
            sum += row;
          }
          out[p * s.ow + q] = sum / static_cast<T>(s.divisors[p * s.ow + q]);
        }
      }
    }
  });
}

template <class T>
void avg_pool2d_input(const Windows& s, const T* y, T* x) {
  const Index together = larger(1, 16384 / larger(1, s.h * s.w));
  parallel_for(divide_up(s.planes, together), [&](Index job) {
    for (Index plane = job * together; plane < smaller(s.planes, (job + 1) * together); ++plane) {
      const T* in = y + plane * s.oh * s.ow;
      T* out = x + plane * s.h * s.w;
      std::memset(out, 0, static_cast<std::size_t>(s.h * s.w) * sizeof(T));
      for (Index p = 0; p < s.oh; ++p) {
        for (Index q = 0; q < s.ow; ++q) {
          const T share = in[p * s.ow + q] / static_cast<T>(s.divisors[p * s.ow + q]);
          for (Index r = s.rows[2 * p]; r < s.rows[2 * p + 1]; ++r) {
            for (Index c = s.columns[2 * q]; c < s.columns[2 * q + 1]; ++c) {
              out[r * s.w + c] += share;
            }
          }
        }
      }
    }
  });
}

}  // namespace minidl::MINIDL_ISA
