// Max pooling, and its gradient: each output passes its gradient to the input that won.
//
// A later element wins only if it is larger (so the first of equals wins, in row-major order) or if
// it is NaN: PyTorch's rule. The winner's position, h * W + w in its plane, is kept as an int32.
#pragma once

#include "scratch.h"
#include "simd.h"
#include "threads.h"

namespace minidl::MINIDL_ISA {

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

template <class T>
void max_pool2d(const Pool2d& p, const T* x, T* y, std::int32_t* index) {
  const bool is_2x2 = p.kh == 2 && p.kw == 2 && p.stride_h == 2 && p.stride_w == 2 &&
                      p.pad_h == 0 && p.pad_w == 0 && p.dilation_h == 1 && p.dilation_w == 1 &&
                      2 * p.oh <= p.h && 2 * p.ow <= p.w;
  constexpr Index kPlanes = 8;  // planes a job
  parallel_for(divide_up(p.planes, kPlanes), [&](Index job) {
    for (Index plane = job * kPlanes; plane < smaller(p.planes, (job + 1) * kPlanes); ++plane) {
      const T* in = x + plane * p.h * p.w;
      T* out = y + plane * p.oh * p.ow;
      std::int32_t* winners = index + plane * p.oh * p.ow;
      for (Index row = 0; row < p.oh; ++row, out += p.ow, winners += p.ow) {
        if (is_2x2) {
          const T* above = in + 2 * row * p.w;
          max_pool_2x2_row(above, above + p.w, p.ow, static_cast<std::int32_t>(2 * row * p.w),
                           static_cast<std::int32_t>(p.w), out, winners);
          continue;
        }
        const Index top = row * p.stride_h - p.pad_h;
        const Index r0 = top >= 0 ? 0 : divide_up(-top, p.dilation_h);
        for (Index q = 0; q < p.ow; ++q) {
          const Index left = q * p.stride_w - p.pad_w;
          const Index s0 = left >= 0 ? 0 : divide_up(-left, p.dilation_w);
          Index winner = (top + r0 * p.dilation_h) * p.w + left + s0 * p.dilation_w;
          T best = in[winner];
          for (Index r = r0; r < p.kh && top + r * p.dilation_h < p.h; ++r) {
            for (Index s = s0; s < p.kw && left + s * p.dilation_w < p.w; ++s) {
              const Index at = (top + r * p.dilation_h) * p.w + left + s * p.dilation_w;
              if (in[at] > best || in[at] != in[at]) {
                best = in[at];
                winner = at;
              }
            }
          }
          out[q] = best;
          winners[q] = static_cast<std::int32_t>(winner);
        }
      }
    }
  });
}

template <class T>
bool max_pool2d_input(const Pool2d& p, const T* g, const std::int32_t* index, T* gx) {
  constexpr Index kPlanes = 8;
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
