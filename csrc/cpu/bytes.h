// What stands between the integer products of a network: numbers become bytes, bytes are pooled and
// added up. Each element for itself, as in the formula, so that the bits are the formula's.
#pragma once

#include "activation.h"
#include "scratch.h"

namespace minidl::MINIDL_ISA {

template <class B>
constexpr int kLeast = static_cast<B>(-1) < 0 ? -128 : 0;

// Half to even, and saturated: y + zero, where `low` and `high` are what fits, less zero.
template <class B>
MINIDL_INLINE B rounded(float y, float low, float high, int zero) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: beside it there is no room for a fraction
  const float inside = y < low ? low : y > high ? high : y;
  return static_cast<B>(static_cast<int>(inside + kRound - kRound) + zero);
}

// q = round(x / scale) + zero
template <class B>
void quantize(Index n, const float* x, float scale, int zero, B* q) {
  const float low = static_cast<float>(kLeast<B> - zero), high = low + 255;
  parallel_for(divide_up(n, kElements), [&](Index job) {
    for (Index i = job * kElements; i < smaller(n, (job + 1) * kElements); ++i) {
      q[i] = rounded<B>(x[i] / scale, low, high, zero);
    }
  });
}

// The compiler may not carry products over this line, to make them and the sum one instruction.
MINIDL_INLINE void keep_apart(float* a, float* b) {
  asm volatile("" : : "r"(a), "r"(b) : "memory");
}

// y = round((a - a_zero) * a_scale + (b - b_zero) * b_scale) + zero
template <class B>
void add(Index n, const B* a, const B* b, const AddBytes& p, B* y) {
  const float most = static_cast<float>(kLeast<B> + 255 - p.zero);
  const float low = p.relu ? 0 : most - 255;
  parallel_for(divide_up(n, kElements), [&](Index job) {
    constexpr Index block = 256;
    float left[block];
    for (Index i0 = job * kElements; i0 < smaller(n, (job + 1) * kElements); i0 += block) {
      const Index count = smaller(block, smaller(n, (job + 1) * kElements) - i0);
      // In loops of their own, so that products and sum are rounded each, as in the formula.
      float right[block];
      for (Index i = 0; i < count; ++i) left[i] = static_cast<float>(a[i0 + i] - p.a_zero);
      for (Index i = 0; i < count; ++i) right[i] = static_cast<float>(b[i0 + i] - p.b_zero);
      for (Index i = 0; i < count; ++i) left[i] *= p.a_scale;
      for (Index i = 0; i < count; ++i) right[i] *= p.b_scale;
      keep_apart(left, right);
      for (Index i = 0; i < count; ++i) {
        y[i0 + i] = rounded<B>(left[i] + right[i], low, most, p.zero);
      }
    }
  });
}

template <Index N>
struct Fixed {
  constexpr operator Index() const { return N; }
};

// The largest byte of each window. What lies beyond the edges never wins.
template <class B>
void max_pool(const Pool2d& p, const B* x, B* y) {
  parallel_for(p.planes, [&](Index plane) {
    const B* in = x + plane * p.h * p.w;
    B* out = y + plane * p.oh * p.ow;
    for (Index row = 0; row < p.oh; ++row, out += p.ow) {
      for (Index q = 0; q < p.ow; ++q) out[q] = static_cast<B>(kLeast<B>);
      for (Index r = 0; r < p.kh; ++r) {
        const Index h = row * p.stride_h - p.pad_h + r * p.dilation_h;
        if (h < 0 || h >= p.h) continue;
        for (Index s = 0; s < p.kw; ++s) {
          const Index left = s * p.dilation_w - p.pad_w;  // column of window 0
          const Index first = left >= 0 ? 0 : divide_up(-left, p.stride_w);
          const Index last = left >= p.w ? 0 : smaller(p.ow, (p.w - 1 - left) / p.stride_w + 1);
          const B* from = in + h * p.w + left;
          const auto take = [&](auto stride) {
            for (Index q = first; q < last; ++q) {
              const B next = from[q * stride];
              out[q] = next > out[q] ? next : out[q];
            }
          };
          // A stride that the compiler knows is one that it can vectorize.
          if (p.stride_w == 1) {
            take(Fixed<1>{});
          } else if (p.stride_w == 2) {
            take(Fixed<2>{});
          } else {
            take(p.stride_w);
          }
        }
      }
    }
  });
}

}  // namespace minidl::MINIDL_ISA
