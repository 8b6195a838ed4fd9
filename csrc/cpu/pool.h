// Max pooling, and its gradient: each output passes its gradient to the input that won.
//
// A later element wins only if it is larger (so the first of equals wins, in row-major order) or if
// it is NaN: PyTorch's rule. The winner's position, h * W + w in its plane, is kept as an int32.
#pragma once

#include "scratch.h"
#include "simd.h"
#include "threads.h"

namespace minidl::MINIDL_ISA {

template <int N>
struct Constant {
  static constexpr int value = N;
};

// At least a block of them in a row, see below.
inline bool side_by_side_2x2(const Pool2d& p) {
  return p.kh == 2 && p.kw == 2 && p.stride_h == 2 && p.stride_w == 2 && p.pad_h == 0 &&
         p.pad_w == 0 && p.dilation_h == 1 && p.dilation_w == 1 && 2 * p.oh <= p.h &&
         2 * p.ow <= p.w && p.ow >= 4;
}

// N windows of 2x2 side by side, a register for each of their four corners: no window reaches over
// an edge, and no branch is taken. (Which pixel wins is a coin toss: a branch would be wrong
// often.)
template <class T, int N>
struct Windows2x2 {
  typedef T Vec __attribute__((vector_size(N * sizeof(T))));
  Vec a, b, c, d;  // upper left, upper right, lower left, lower right

  Windows2x2(const T* above, const T* below) {
    split(above, a, b);
    split(below, c, d);
  }

  static MINIDL_INLINE auto wins(Vec next, Vec best) { return (next > best) | (next != next); }

  MINIDL_INLINE void largest(T* y) const {
    const Vec of_above = wins(b, a) ? b : a, of_three = wins(c, of_above) ? c : of_above;
    const Vec best = wins(d, of_three) ? d : of_three;
    std::memcpy(y, &best, sizeof best);
  }

  // The winner is found again, and all four pixels are written.
  MINIDL_INLINE void gradient(const T* from, T* to_above, T* to_below) const {
    const auto b_wins = wins(b, a);
    const Vec of_above = b_wins ? b : a;
    const auto c_wins = wins(c, of_above);
    const Vec of_three = c_wins ? c : of_above;
    const auto d_wins = wins(d, of_three), below = c_wins | d_wins;
    Vec g;
    const Vec zero = {};
    std::memcpy(&g, from, sizeof g);
    join(below | b_wins ? zero : g, below | ~b_wins ? zero : g, to_above);
    join(c_wins & ~d_wins ? g : zero, d_wins ? g : zero, to_below);
  }

 private:
  static MINIDL_INLINE void split(const T* p, Vec& even, Vec& odd) {
    Vec low, high;
    std::memcpy(&low, p, sizeof low);
    std::memcpy(&high, p + N, sizeof high);
#if defined(__clang__) || __GNUC__ >= 12
    if constexpr (N == 8) {
      even = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14);
      odd = __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15);
      return;
    } else if constexpr (N == 4) {
      even = __builtin_shufflevector(low, high, 0, 2, 4, 6);
      odd = __builtin_shufflevector(low, high, 1, 3, 5, 7);
      return;
    }
#endif
    for (int i = 0; i < N; ++i) even[i] = p[2 * i], odd[i] = p[2 * i + 1];
  }
  static MINIDL_INLINE void join(Vec even, Vec odd, T* p) {
#if defined(__clang__) || __GNUC__ >= 12
    if constexpr (N == 8) {
      const Vec low = __builtin_shufflevector(even, odd, 0, 8, 1, 9, 2, 10, 3, 11);
      const Vec high = __builtin_shufflevector(even, odd, 4, 12, 5, 13, 6, 14, 7, 15);
      std::memcpy(p, &low, sizeof low);
      std::memcpy(p + N, &high, sizeof high);
      return;
    } else if constexpr (N == 4) {
      const Vec low = __builtin_shufflevector(even, odd, 0, 4, 1, 5);
      const Vec high = __builtin_shufflevector(even, odd, 2, 6, 3, 7);
      std::memcpy(p, &low, sizeof low);
      std::memcpy(p + N, &high, sizeof high);
      return;
    }
#endif
    for (int i = 0; i < N; ++i) p[2 * i] = even[i], p[2 * i + 1] = odd[i];
  }
};

// f(first window, so many windows) until a row of them is done. The last block may reach back over
// the one before it, and then finds the same again: so no row has a rest.
template <class F>
MINIDL_INLINE void for_blocks(Index columns, const F& f) {
  const auto blocks_of = [&](auto size) {
    constexpr Index n = decltype(size)::value;
    for (Index q = 0; q + n <= columns; q += n) f(q, size);
    if (columns % n) f(columns - n, size);
  };
  if (columns >= 8) {
    blocks_of(Constant<8>{});
  } else {
    blocks_of(Constant<4>{});
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
  const bool is_2x2 = side_by_side_2x2(p) && !index;
  for_planes(p.planes, [&](Index plane) {
    const T* in = x + plane * p.h * p.w;
    T* out = y + plane * p.oh * p.ow;
    std::int32_t* winners = index ? index + plane * p.oh * p.ow : nullptr;
    for (Index row = 0; row < p.oh; ++row) {
      if (is_2x2) {
        const T *above = in + 2 * row * p.w, *below = above + p.w;
        for_blocks(p.ow, [&](Index q, auto n) {
          Windows2x2<T, n.value>(above + 2 * q, below + 2 * q).largest(out + row * p.ow + q);
        });
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
        for_blocks(p.ow, [&](Index q, auto n) {
          const Index above = 2 * (row * p.w + q), below = above + p.w;
          Windows2x2<T, n.value>(in + above, in + below)
              .gradient(from + q, out + above, out + below);
        });
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
