// A copy in row-major order of an array that lies crosswise: neighbours in memory differ in another
// dimension than the last (a transpose, NHWC as NCHW). Read or written one element at a time, each
// would cost a cache line; so it is turned in tiles, of which both sides fit into a cache.
#pragma once

#include "simd.h"
#include "threads.h"

namespace minidl::MINIDL_ISA {

constexpr Index kTileNear = 16, kTileLast = 64;

template <class T>
void in_order(const Layout& s, const T* x, T* y) {
  const int last = s.dims - 1;
  Index to[Layout::kMost];  // strides of y
  to[last] = 1;
  for (int d = last; d > 0; --d) to[d - 1] = to[d] * s.size[d];
  Index planes = 1;
  for (int d = 0; d < last; ++d) planes *= d == s.near ? 1 : s.size[d];
  const Index rows = s.size[last], columns = s.size[s.near];
  const Index strips = divide_up(rows, kTileLast);
  const Index together = larger(1, 8192 / (smaller(rows, kTileLast) * columns));

  const auto strip = [&](Index job) {
    Index plane = job / strips, from = 0, at = 0;
    for (int d = last - 1; d >= 0; --d) {
      if (d == s.near) continue;
      from += plane % s.size[d] * s.stride[d];
      at += plane % s.size[d] * to[d];
      plane /= s.size[d];
    }
    const Index r = job % strips * kTileLast, height = smaller(kTileLast, rows - r);
    for (Index c = 0; c < columns; c += kTileNear) {
      transpose(y + at + c * to[s.near] + r, to[s.near], x + from + r * s.stride[last] + c,
                s.stride[last], height, smaller(kTileNear, columns - c));
    }
  };
  parallel_for(divide_up(planes * strips, together), [&](Index job) {
    for (Index i = job * together; i < smaller(planes * strips, (job + 1) * together); ++i)
      strip(i);
  });
}

}  // namespace minidl::MINIDL_ISA
