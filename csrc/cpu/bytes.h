// What stands between the integer products of a network: numbers become bytes, bytes are pooled and
// added up. Each element for itself, as in the formula, so that the bits are the formula's.
#pragma once

#include "activation.h"
#include "pool.h"

namespace minidl::MINIDL_ISA {

template <class B>
constexpr int kLeast = static_cast<B>(-1) < 0 ? -128 : 0;

// 1.5 * 2^23, and * 2^52: beside it there is no room for a fraction.
template <class T>
constexpr T kRound = sizeof(T) == 4 ? T(12582912) : T(6755399441055744);

// Half to even, and saturated: y + zero, where `low` and `high` are what fits, less zero.
template <class B, class T>
MINIDL_INLINE B rounded(T y, T low, T high, int zero) {
  const T inside = y < low ? low : y > high ? high : y;
  return static_cast<B>(static_cast<int>(inside + kRound<T> - kRound<T>) + zero);
}

// The inner loops are functions of their own: a byte may lie anywhere, so the compiler takes what a
// lambda has captured for changed by every byte that is written, unless it came by value.

template <class B>
void quantize_some(Index n, const float* __restrict x, float scale, int zero, B* __restrict q) {
  const float low = static_cast<float>(kLeast<B> - zero), high = low + 255;
  for (Index i = 0; i < n; ++i) q[i] = rounded<B>(x[i] / scale, low, high, zero);
}

// q = round(x / scale) + zero
template <class B>
void quantize(Index n, const float* x, float scale, int zero, B* q) {
  parallel_for(divide_up(n, kElements), [&](Index job) {
    const Index i = job * kElements;
    quantize_some(smaller(kElements, n - i), x + i, scale, zero, q + i);
  });
}

// The compiler may not carry products over this line, to make them and the sum one instruction.
MINIDL_INLINE void keep_apart(float* a, float* b) {
  asm volatile("" : : "r"(a), "r"(b) : "memory");
}

template <class B>
void add_some(Index n, const B* __restrict a, const B* __restrict b, AddBytes p, B* __restrict y) {
  const float high = static_cast<float>(kLeast<B> + 255 - p.zero);
  const float low = p.relu ? 0 : high - 255;
  constexpr Index block = 256;
  float left[block], right[block];
  for (Index i0 = 0; i0 < n; i0 += block) {
    const Index count = smaller(block, n - i0);
    // In loops of their own, so that products and sum are rounded each, as in the formula.
    for (Index i = 0; i < count; ++i) {
      left[i] = static_cast<float>(a[i0 + i] - p.a_zero) * p.a_scale;
      right[i] = static_cast<float>(b[i0 + i] - p.b_zero) * p.b_scale;
    }
    keep_apart(left, right);
    for (Index i = 0; i < count; ++i) y[i0 + i] = rounded<B>(left[i] + right[i], low, high, p.zero);
  }
}

// y = round((a - a_zero) * a_scale + (b - b_zero) * b_scale) + zero
template <class B>
void add(Index n, const B* a, const B* b, const AddBytes& p, B* y) {
  parallel_for(divide_up(n, kElements), [&](Index job) {
    const Index i = job * kElements;
    add_some(smaller(kElements, n - i), a + i, b + i, p, y + i);
  });
}

template <Index N>
struct Fixed {
  constexpr operator Index() const { return N; }
};

// f(plane) for all planes of so many bytes, enough of them in a job that it is worth a thread.
template <class F>
void for_some(Index planes, Index size, const F& f) {
  const Index together = larger(1, kElements / larger(1, size));
  parallel_for(divide_up(planes, together), [&](Index job) {
    for (Index plane = job * together; plane < smaller(planes, (job + 1) * together); ++plane) {
      f(plane);
    }
  });
}

// y[i] = max(y[i], x[i * stride]); a stride that the compiler knows is one that it can vectorize.
template <class B, class Stride>
MINIDL_INLINE void take_larger(Index n, const B* __restrict x, Stride stride, B* __restrict y) {
  for (Index i = 0; i < n; ++i) y[i] = x[i * stride] > y[i] ? x[i * stride] : y[i];
}

// Windows of 2x2 side by side: the larger of each two rows, then of each two columns.
template <class B>
void max_pool_2x2(Index rows, Index w, const B* __restrict x, B* __restrict y) {
  B tall[1024];
  const Index at_once = sizeof tall / static_cast<std::size_t>(w);
  for (Index row = 0; row < rows; row += at_once) {
    const Index count = smaller(at_once, rows - row);
    for (Index r = 0; r < count; ++r) {
      const B *above = x + 2 * (row + r) * w, *below = above + w;
      for (Index i = 0; i < w; ++i) tall[r * w + i] = below[i] > above[i] ? below[i] : above[i];
    }
    B* out = y + row * w / 2;
    for (Index i = 0; i < count * w / 2; ++i) {
      out[i] = tall[2 * i + 1] > tall[2 * i] ? tall[2 * i + 1] : tall[2 * i];
    }
  }
}

// The largest byte of each window. What lies beyond the edges never wins.
template <class B>
void max_pool(const Pool2d& p, const B* x, B* y) {
  const bool side_by_side = side_by_side_2x2(p) && p.w == 2 * p.ow && p.w <= 1024;
  for_some(p.planes, p.h * p.w, [&](Index plane) {
    const B* in = x + plane * p.h * p.w;
    B* out = y + plane * p.oh * p.ow;
    if (side_by_side) return max_pool_2x2(p.oh, p.w, in, out);
    for (Index row = 0; row < p.oh; ++row, out += p.ow) {
      for (Index q = 0; q < p.ow; ++q) out[q] = static_cast<B>(kLeast<B>);
      for (Index r = 0; r < p.kh; ++r) {
        const Index h = row * p.stride_h - p.pad_h + r * p.dilation_h;
        if (h < 0 || h >= p.h) continue;
        for (Index s = 0; s < p.kw; ++s) {
          const Index left = s * p.dilation_w - p.pad_w;  // column of window 0
          const Index first = left >= 0 ? 0 : divide_up(-left, p.stride_w);
          const Index last = left >= p.w ? 0 : smaller(p.ow, (p.w - 1 - left) / p.stride_w + 1);
          const B* from = in + h * p.w + left + first * p.stride_w;
          if (p.stride_w == 1) {
            take_larger(last - first, from, Fixed<1>{}, out + first);
          } else if (p.stride_w == 2) {
            take_larger(last - first, from, Fixed<2>{}, out + first);
          } else {
            take_larger(last - first, from, p.stride_w, out + first);
          }
        }
      }
    }
  });
}

// Of each plane: round(scale / n * sum of (x - x_zero)) + zero. In double, as in the formula.
template <class B>
void mean(Index planes, Index n, const B* x, float scale, int x_zero, int zero, B* y) {
  const double share = scale / static_cast<float>(n);
  const double low = kLeast<B> - zero, high = low + 255;
  for_some(planes, n, [&](Index plane) {
    std::int32_t sum = 0;
    for (const B* p = x + plane * n; p < x + (plane + 1) * n; ++p) sum += *p - x_zero;
    y[plane] = rounded<B>(sum * share, low, high, zero);
  });
}

}  // namespace minidl::MINIDL_ISA
