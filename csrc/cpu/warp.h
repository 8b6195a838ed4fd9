// Affine warps of images, and their transpose.
//
// Where a pixel is fetched from does not depend on the channel. So the neighbours and their shares
// are worked out for a few pixels at a time, without a branch, and then serve all channels. Places
// are computed in double, as the formula's are: a shared rounding error would move whole edges.
#pragma once

#include <cfloat>

#include "simd.h"
#include "threads.h"

namespace minidl::MINIDL_ISA {

constexpr Index kWarpPixels = 64;  // at a time

template <class T>
struct Neighbours {
  int corners;                      // 4, or 1 if it is the nearest
  std::int32_t at[4][kWarpPixels];  // row * w + column, or -1: outside
  T share[4][kWarpPixels];
};

// A place as it is without anything outside: on the border, or in a mirror at the pixels' outer
// edges, -1/2 and size - 1/2.
inline double folded(double place, Index size, Warp::Padding padding) {
  const double length = static_cast<double>(size);
  if (padding == Warp::kReflection && !(place >= 0 && place <= length - 1)) {
    place = __builtin_fmod(__builtin_fabs(place + 0.5), 2 * length);
    place = (place < length ? place : 2 * length - place) - 0.5;
  }
  place = place > 0 ? place : 0;
  return place < length - 1 ? place : length - 1;
}

// Of `count` pixels from (row, column) of result n.
template <class T>
inline void find_neighbours(const Warp& s, Index n, Index row, Index column, Index count,
                            Neighbours<T>& to) {
  const double* m = s.matrices + n * 6;
  const double i = static_cast<double>(row), h = static_cast<double>(s.h),
               w = static_cast<double>(s.w);
  double across[kWarpPixels], down[kWarpPixels];
  for (Index k = 0; k < count; ++k) {
    const double j = static_cast<double>(column + k);
    across[k] = m[0] * j + m[1] * i + m[2];
    down[k] = m[3] * j + m[4] * i + m[5];
    const bool finite =
        (__builtin_fabs(across[k]) <= DBL_MAX) & (__builtin_fabs(down[k]) <= DBL_MAX);
    across[k] = finite ? across[k] : -DBL_MAX;
    down[k] = finite ? down[k] : -DBL_MAX;
  }
  if (s.padding != Warp::kZeros) {
    for (Index k = 0; k < count; ++k) {
      if (across[k] == -DBL_MAX && down[k] == -DBL_MAX) continue;
      across[k] = folded(across[k], s.w, s.padding);
      down[k] = folded(down[k], s.h, s.padding);
    }
  }
  // A place that is far away becomes one just outside, so that it fits an int32.
  const auto within = [](double place, double size) {
    place = place > -2 ? place : -2;
    return static_cast<std::int32_t>(place < size ? place : size);
  };
  const auto height = static_cast<std::int32_t>(s.h), width = static_cast<std::int32_t>(s.w);
  const auto pixel = [=](std::int32_t r, std::int32_t c) {
    return ((r >= 0) & (r < height) & (c >= 0) & (c < width)) ? r * width + c : -1;
  };
  to.corners = s.nearest ? 1 : 4;
  if (s.nearest) {  // of two the even one
    for (Index k = 0; k < count; ++k) {
      to.at[0][k] = pixel(within(__builtin_rint(down[k]), h), within(__builtin_rint(across[k]), w));
    }
    return;
  }
  for (Index k = 0; k < count; ++k) {
    const double left = __builtin_floor(across[k]), top = __builtin_floor(down[k]);
    const double right_share = across[k] - left, bottom_share = down[k] - top;
    const std::int32_t r = within(top, h), c = within(left, w);
    to.at[0][k] = pixel(r, c);
    to.at[1][k] = pixel(r, c + 1);
    to.at[2][k] = pixel(r + 1, c);
    to.at[3][k] = pixel(r + 1, c + 1);
    to.share[0][k] = static_cast<T>((1 - bottom_share) * (1 - right_share));
    to.share[1][k] = static_cast<T>((1 - bottom_share) * right_share);
    to.share[2][k] = static_cast<T>(bottom_share * (1 - right_share));
    to.share[3][k] = static_cast<T>(bottom_share * right_share);
  }
}

template <class T>
void warp_affine(const Warp& s, const T* x, T fill, T* y) {
  const Index rows = larger(1, 4096 / s.ow);  // a job
  const Index jobs = divide_up(s.oh, rows);
  parallel_for(s.n * jobs, [&](Index job) {
    const Index n = job / jobs, first = job % jobs * rows;
    Neighbours<T> from;
    for (Index row = first; row < smaller(s.oh, first + rows); ++row) {
      for (Index column = 0; column < s.ow; column += kWarpPixels) {
        const Index count = smaller(kWarpPixels, s.ow - column);
        find_neighbours(s, n, row, column, count, from);
        for (Index plane = n * s.c; plane < (n + 1) * s.c; ++plane) {
          const T* __restrict in = x + plane * s.h * s.w;
          T* __restrict out = y + (plane * s.oh + row) * s.ow + column;
          const auto value = [&](int corner, Index k) {
            const std::int32_t at = from.at[corner][k];
            const T found = in[at > 0 ? at : 0];
            return at >= 0 ? found : fill;
          };
          if (s.nearest) {
            for (Index k = 0; k < count; ++k) out[k] = value(0, k);
          } else {
            for (Index k = 0; k < count; ++k) {
              out[k] = from.share[0][k] * value(0, k) + from.share[1][k] * value(1, k) +
                       from.share[2][k] * value(2, k) + from.share[3][k] * value(3, k);
            }
          }
        }
      }
    }
  });
}

// The transpose: every pixel of y is added to where it was fetched from. A plane belongs to one
// thread, which adds in the order of y's pixels.
template <class T>
void warp_affine_input(const Warp& s, const T* y, T* x) {
  constexpr Index kChannels = 4;  // a job
  const Index jobs = divide_up(s.c, kChannels);
  parallel_for(s.n * jobs, [&](Index job) {
    const Index n = job / jobs, first = n * s.c + job % jobs * kChannels;
    const Index end = smaller((n + 1) * s.c, first + kChannels);
    std::memset(x + first * s.h * s.w, 0,
                static_cast<std::size_t>((end - first) * s.h * s.w) * sizeof(T));
    Neighbours<T> to;
    for (Index row = 0; row < s.oh; ++row) {
      for (Index column = 0; column < s.ow; column += kWarpPixels) {
        const Index count = smaller(kWarpPixels, s.ow - column);
        find_neighbours(s, n, row, column, count, to);
        for (Index plane = first; plane < end; ++plane) {
          const T* in = y + (plane * s.oh + row) * s.ow + column;
          T* out = x + plane * s.h * s.w;
          for (Index k = 0; k < count; ++k) {
            for (int corner = 0; corner < to.corners; ++corner) {
              const std::int32_t at = to.at[corner][k];
              if (at >= 0) out[at] += s.nearest ? in[k] : to.share[corner][k] * in[k];
            }
          }
        }
      }
    }
  });
}

}  // namespace minidl::MINIDL_ISA
