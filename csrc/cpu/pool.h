// Max pooling, and its gradient: each output passes its gradient to the input that won.
//
// A later element wins only if it is larger (so the first of equals wins, in row-major order) or if
// it is NaN: PyTorch's rule. The winner's position, h * W + w in its plane, is kept as an int32.
#pragma once

#include "scratch.h"
#include "simd.h"
#include "threads.h"

namespace minidl::MINIDL_ISA {

inline bool side_by_side_2x2(const Pool2d& p) {
  return p.kh == 2 && p.kw == 2 && p.stride_h == 2 && p.stride_w == 2 && p.pad_h == 0 &&
         p.pad_w == 0 && p.dilation_h == 1 && p.dilation_w == 1 && 2 * p.oh <= p.h &&
         2 * p.ow <= p.w;
}

// 2x2 windows side by side: no window reaches over an edge, and a row is computed without a branch.
template <class T>
inline void max_pool_2x2_row(const T* __restrict above, const T* __restrict below, Index columns,
                             std::int32_t at, std::int32_t width, T* __restrict y,
                             std::int32_t* __restrict index) {
  for (Index q = 0; q < columns; ++q) {
    const T candidate[3] = {above[2 * q + 1], below[2 * q], below[2 * q + 1]};
    const std::int32_t first = at + 2 * static_cast<std::int32_t>(q);
    const std::int32_t position[3] = {first + 1, first + width, first + width + 1};
    T best = above[2 * q];
    std::int32_t winner = first;
    for (int i = 0; i < 3; ++i) {
      const bool wins = (candidate[i] > best) | (candidate[i] != candidate[i]);
      best = wins ? candidate[i] : best;
      winner = wins ? position[i] : winner;
    }
    y[q] = best;
    index[q] = winner;
  }
}

// The same where nobody asks who won.
template <class T>
inline void max_pool_2x2_row(const T* __restrict above, const T* __restrict below, Index columns,
                             T* __restrict y) {
  const auto larger_or_nan = [](T best, T next) {
    return ((next > best) | (next != next)) ? next : best;
  };
  for (Index q = 0; q < columns; ++q) {
    T best = larger_or_nan(above[2 * q], above[2 * q + 1]);
    best = larger_or_nan(best, below[2 * q]);
    y[q] = larger_or_nan(best, below[2 * q + 1]);
  }
}

// The gradient of such a row: the winner is found again, and all four pixels are written.
template <class T>
inline void max_pool_2x2_gradient_row(const T* __restrict above, const T* __restrict below,
                                      Index columns, const T* __restrict g, T* __restrict to_above,
                                      T* __restrict to_below) {
  for (Index q = 0; q < columns; ++q) {
    const T a = above[2 * q], b = above[2 * q + 1], c = below[2 * q], d = below[2 * q + 1];
    const bool b_wins = (b > a) | (b != b);
    const T of_above = b_wins ? b : a;
    const bool c_wins = (c > of_above) | (c != c);
    const T of_three = c_wins ? c : of_above;
    const bool d_wins = (d > of_three) | (d != d), in_above = !(c_wins | d_wins);
    to_above[2 * q] = (in_above & !b_wins) ? g[q] : T(0);
    to_above[2 * q + 1] = (in_above & b_wins) ? g[q] : T(0);
    to_below[2 * q] = (c_wins & !d_wins) ? g[q] : T(0);
    to_below[2 * q + 1] = d_wins ? g[q] : T(0);
  }
}

// Where in its plane the winner of a window is.
template <class T>
inline Index winner_of_window(const Pool2d& p, const T* in, Index row, Index column) {
  const Index top = row * p.stride_h - p.pad_h, left = column * p.stride_w - p.pad_w;
  const Index r0 = top >= 0 ? 0 : divide_up(-top, p.dilation_h);
  const Index s0 = left >= 0 ? 0 : divide_up(-left, p.dilation_w);
  Index winner = (top + r0 * p.dilation_h) * p.w + left + s0 * p.dilation_w;
  for (Index r = r0; r < p.kh && top + r * p.dilation_h < p.h; ++r) {
    for (Index s = s0; s < p.kw && left + s * p.dilation_w < p.w; ++s) {
      const Index at = (top + r * p.dilation_h) * p.w + left + s * p.dilation_w;
      if (in[at] > in[winner] || in[at] != in[at]) winner = at;
    }
  }
  return winner;
}

constexpr Index kPlanes = 8;  // planes a job

template <class F>
void for_planes(Index planes, const F& f) {
  parallel_for(divide_up(planes, kPlanes), [&](Index job) {
    for (Index plane = job * kPlanes; plane < smaller(planes, (job + 1) * kPlanes); ++plane) {
      f(plane);
    }
  });
}

// `index` may be null.
template <class T>
void max_pool2d(const Pool2d& p, const T* x, T* y, std::int32_t* index) {
  const bool is_2x2 = side_by_side_2x2(p);
  for_planes(p.planes, [&](Index plane) {
    const T* in = x + plane * p.h * p.w;
    T* out = y + plane * p.oh * p.ow;
    std::int32_t* winners = index ? index + plane * p.oh * p.ow : nullptr;
    for (Index row = 0; row < p.oh; ++row) {
      const T* above = in + 2 * row * p.w;
      if (is_2x2 && winners) {
        max_pool_2x2_row(above, above + p.w, p.ow, static_cast<std::int32_t>(2 * row * p.w),
                         static_cast<std::int32_t>(p.w), out + row * p.ow, winners + row * p.ow);
      } else if (is_2x2) {
        max_pool_2x2_row(above, above + p.w, p.ow, out + row * p.ow);
      } else {
        for (Index q = row * p.ow; q < (row + 1) * p.ow; ++q) {
          const Index winner = winner_of_window(p, in, row, q - row * p.ow);
          out[q] = in[winner];
          if (winners) winners[q] = static_cast<std::int32_t>(winner);
        }
      }
    }
  });
}

template <class T>
void max_pool2d_gradient(const Pool2d& p, const T* x, const T* g, T* gx) {
  const bool is_2x2 = side_by_side_2x2(p);
  const bool all_covered = is_2x2 && 2 * p.oh == p.h && 2 * p.ow == p.w;
  for_planes(p.planes, [&](Index plane) {
    const T* in = x + plane * p.h * p.w;
    const T* from = g + plane * p.oh * p.ow;
    T* out = gx + plane * p.h * p.w;
    if (!all_covered) std::memset(out, 0, static_cast<std::size_t>(p.h * p.w) * sizeof(T));
    for (Index row = 0; row < p.oh; ++row, from += p.ow) {
      if (is_2x2) {
        const Index above = 2 * row * p.w, below = above + p.w;
        max_pool_2x2_gradient_row(in + above, in + below, p.ow, from, out + above, out + below);
      } else {
        for (Index q = 0; q < p.ow; ++q) out[winner_of_window(p, in, row, q)] += from[q];
      }
    }
  });
}

template <class T>
bool max_pool2d_input(const Pool2d& p, const T* g, const std::int32_t* index, T* gx) {
  const Scratch<char> valid(divide_up(p.planes, kPlanes));
  parallel_for(divide_up(p.planes, kPlanes), [&](Index job) {
    bool all_inside = true;
    for (Index plane = job * kPlanes; plane < smaller(p.planes, (job + 1) * kPlanes); ++plane) {
      T* out = gx + plane * p.h * p.w;
      std::memset(out, 0, static_cast<std::size_t>(p.h * p.w) * sizeof(T));
      const T* in = g + plane * p.oh * p.ow;
      const std::int32_t* winners = index + plane * p.oh * p.ow;
      for (Index q = 0; q < p.oh * p.ow; ++q) {
        const bool inside = winners[q] >= 0 && winners[q] < p.h * p.w;
        all_inside &= inside;
        if (inside) out[winners[q]] += in[q];
      }
    }
    valid.get()[job] = all_inside;
  });
  bool all = true;
  for (Index job = 0; job < divide_up(p.planes, kPlanes); ++job) all &= valid.get()[job] != 0;
  return all;
}

}  // namespace minidl::MINIDL_ISA
