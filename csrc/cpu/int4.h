// Weights of four bits, two in a byte: widened in a register, so that a product that waits for
// memory reads an eighth of the bytes of float32 (minidl/ops/quantized.py: linear_int4).
#pragma once

#include "narrow.h"
#include "threads.h"
#include "vector_math.h"

namespace minidl::MINIDL_ISA {

// Four bits of each lane, as the number from -8 to 7 that they stand for.
MINIDL_INLINE Vec<float> from_four_bits(Vec<std::int32_t> q) {
  return __builtin_convertvector(((q & 15) ^ 8) - 8, Vec<float>);
}

// y[i][j] = sum over groups g of scale[j][g] * sum over k in g of x[i][k] w[j][k]  + bias[j]
// Of x come the even columns and the odd ones, each row `padded` long, with zeros at its end: they
// meet the lower and the upper halves of the bytes. A group is whole vectors of bytes, or all of
// the row.
inline void linear_int4(const Int4& s, Index m, const float* even, const float* odd,
                        const float* bias, float* y) {
  constexpr Index lanes = kLanes<float>, rows = 4, together = 16;
  const Index bytes = divide_up(s.k, 2), groups = divide_up(s.k, s.group);
  parallel_for(divide_up(s.n, together), [&](Index job) {
    for (Index j = job * together; j < smaller(s.n, (job + 1) * together); ++j) {
      const std::uint8_t* w = s.w + j * bytes;
      for (Index i0 = 0; i0 < m; i0 += rows) {
        const Index some = smaller(rows, m - i0);
        Vec<float> total[rows]{};
        for (Index g = 0; g < groups; ++g) {
          const Index end = smaller(bytes, divide_up((g + 1) * s.group, 2));
          Vec<float> sum[rows]{};
          for (Index b = g * s.group / 2; b < end; b += lanes) {
            std::uint8_t last[lanes]{};
            if (bytes - b < lanes) std::memcpy(last, w + b, static_cast<std::size_t>(bytes - b));
            const Vec<std::int32_t> q = load_bytes(bytes - b < lanes ? last : w + b);
            const Vec<float> low = from_four_bits(q), high = from_four_bits(q >> 4);
            for (Index i = 0; i < some; ++i) {
              const Index at = (i0 + i) * s.padded + b;
              sum[i] += low * load(even + at) + high * load(odd + at);
            }
          }
          for (Index i = 0; i < some; ++i) total[i] += sum[i] * s.scale[j * groups + g];
        }
        for (Index i = 0; i < some; ++i) {
          y[(i0 + i) * s.n + j] =
              static_cast<float>(sum_of<float>(total[i])) + (bias ? bias[j] : 0.0f);
        }
      }
    }
  });
}

}  // namespace minidl::MINIDL_ISA
