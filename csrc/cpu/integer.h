// Products of bytes, summed up exactly in 32 bits. (Convolutions: conv_integer.h.)
//
// A quantized number q stands for scale * (q - zero). What is wanted is
//
//   C[i][j] = sum over k of (a[i][k] - za[i]) * (b[k][j] - zb[j]).
//
// The nest (gemm.h) runs on Words: four bytes that follow one another along k, the left ones signed
// and the right ones unsigned, as the instruction wants them (narrow.h). Bytes of the other kind
// have their upper bit flipped, which moves them and their zero point by 128. The zero points are
// taken off at the end, for
//
//   C[i][j] = sum of a b  -  za[i] * (sum of b[..][j])  -  (sum of a[i][..] - K za[i]) * zb[j].
//
// All of that may wrap around in 32 bits: if C itself fits, so does the outcome.
#pragma once

#include "gemm.h"

namespace minidl::MINIDL_ISA {

MINIDL_INLINE std::int32_t wrapping_product(std::int32_t a, std::int32_t b) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(a) * static_cast<std::uint32_t>(b));
}
MINIDL_INLINE std::int32_t wrapping_difference(std::int32_t a, std::int32_t b) {
  return static_cast<std::int32_t>(static_cast<std::uint32_t>(a) - static_cast<std::uint32_t>(b));
}

// Four bytes a stride apart, the bits of `flip` turned; those from `count` on are 0.
MINIDL_INLINE Word word_of(const std::uint8_t* p, Index stride, Index count, std::uint8_t flip) {
  std::uint8_t bytes[4] = {0, 0, 0, 0};
  for (Index q = 0; q < 4; ++q) {
    if (q < count) bytes[q] = static_cast<std::uint8_t>(p[q * stride] ^ flip);
  }
  Word word;
  std::memcpy(&word, bytes, 4);
  return word;
}

constexpr std::uint8_t to_signed(bool is_signed) { return is_signed ? 0 : 128; }
constexpr std::uint8_t to_unsigned(bool is_signed) { return is_signed ? 128 : 0; }

inline bool is_word_aligned(const void* p) {
  return reinterpret_cast<std::uintptr_t>(p) % sizeof(Word) == 0;
}

// ---- The operands of a matrix product ---------------------------------------------------------

struct BytesLeft {
  Bytes a;
  Index bytes;  // along k
  void pack(Word* dst, Index i0, Index rows, Index k0, Index depth) const {
    const std::uint8_t flip = to_signed(a.is_signed);
    const std::uint32_t flips = flip * 0x01010101u;
    for (Index i = 0; i < rows; ++i) {
      const std::uint8_t* src = a.data + (i0 + i) * a.row_stride + 4 * k0 * a.col_stride;
      Index k = 0;
      for (; a.col_stride == 1 && k < depth && 4 * (k0 + k) + 4 <= bytes; ++k) {
        std::uint32_t bits;
        std::memcpy(&bits, src + 4 * k, 4);
        dst[k * rows + i] = static_cast<Word>(bits ^ flips);
      }
      for (; k < depth; ++k) {
        dst[k * rows + i] =
            word_of(src + 4 * k * a.col_stride, a.col_stride, bytes - 4 * (k0 + k), flip);
      }
    }
  }
};

// b: (n, k), the transpose of the right matrix, as weights are kept.
struct BytesRight {
  Bytes b;
  Index bytes;
  void pack(Word* dst, Index k0, Index depth, Index j0, Index columns) const {
    constexpr Index nr = kTileColumns<Word>, lanes = kLanes<Word>;
    const std::uint8_t flip = to_unsigned(b.is_signed);
    const std::uint32_t flips = flip * 0x01010101u;
    for (Index j = 0; j < columns; j += nr, dst += depth * nr) {
      const Index n = smaller(nr, columns - j);
      const std::uint8_t* src = b.data + (j0 + j) * b.row_stride + 4 * k0 * b.col_stride;
      if (n < nr) std::memset(dst, 0, static_cast<std::size_t>(depth * nr) * sizeof(Word));
      Index k = 0;
      if (b.col_stride == 1 && b.row_stride % 4 == 0 &&
          is_word_aligned(src)) {  // words as they are
        k = smaller(depth, bytes / 4 - k0);
        transpose(dst, nr, reinterpret_cast<const Word*>(src), b.row_stride / 4, n, k);
        for (Index i = 0; i < k * nr; i += lanes) {
          store(dst + i, load(dst + i) ^ static_cast<std::int32_t>(flips));
        }
      }
      for (; k < depth; ++k) {
        const Index here = 4 * (k0 + k) + 4 <= bytes ? 4 : bytes - 4 * (k0 + k);
        const std::uint8_t* from = src + 4 * k * b.col_stride;
        Word* to = dst + k * nr;
        Index t = 0;
        if (b.row_stride == 1 &&
            here == 4) {  // four rows that lie in memory as they are: interleave
          for (; t + lanes <= n; t += lanes) {
            Vec<Word> word = load_bytes(from + t);
            for (int q = 1; q < 4; ++q) word |= load_bytes(from + q * b.col_stride + t) << 8 * q;
            store(to + t, word ^ static_cast<std::int32_t>(flips));
          }
        }
        for (; t < n; ++t) to[t] = word_of(from + t * b.row_stride, b.col_stride, here, flip);
      }
    }
  }
};

// ---- The epilogue -----------------------------------------------------------------------------

// Takes the zero points off (their terms may be null: nothing to take off) and finishes the sum, a
// vector at a time: with few bytes to add up for each output, this is what costs.
template <class R, bool kChannelIsRow>
struct FinishIntegers {
  using Result = R;
  const std::int32_t *left_zero, *right_sum;  // za[i], sum of b[..][j]
  const std::int32_t *left_sum, *right_zero;  // sum of a[i][..] - K za[i], zb[j] ...
  std::int32_t right_zero_of_all;             // ... which is this one where that is null
  Finish how;
  Index channel0;

  void finish(Index i, Index j, Index n, const std::int32_t* sum, R* c) const {
    const Index channel = channel0 + (kChannelIsRow ? i : j);
    const Finish to = how;  // a copy: for all the compiler knows, c is part of this object
    const std::int32_t *const of_columns = right_sum, *const zeros = right_zero;
    const auto left = static_cast<std::uint32_t>(left_zero ? left_zero[i] : 0);
    const auto total = static_cast<std::uint32_t>(zeros || right_zero_of_all ? left_sum[i] : 0);
    std::uint32_t row = zeros ? 0 : total * static_cast<std::uint32_t>(right_zero_of_all);
    if (kChannelIsRow && to.bias) row -= static_cast<std::uint32_t>(to.bias[channel]);
    Vec<float> scale = Vec<float>{} + (kChannelIsRow && to.scale ? to.scale[channel] : 0);
    constexpr int least = is_same<R, std::int8_t> ? -128 : 0;
    const Vec<float> low = Vec<float>{} + static_cast<float>(to.relu ? 0 : least - to.zero);
    const Vec<float> high = Vec<float>{} + static_cast<float>(least + 255 - to.zero);

    const auto finish_vector = [&](Index t, Index count) __attribute__((always_inline)) {
      Wrapping v = load_some<Wrapping>(sum + t, count) - row;
      if (left != 0) v -= load_some<Wrapping>(of_columns + j + t, count) * left;
      if (zeros) v -= load_some<Wrapping>(zeros + j + t, count) * total;
      if (!kChannelIsRow && to.bias) v += load_some<Wrapping>(to.bias + channel + t, count);
      const auto exact = (Vec<std::int32_t>)v;
      if constexpr (is_same<R, std::int32_t>) {
        store_some(c + t, count, to.relu ? (exact < 0 ? Vec<R>{} : exact) : exact);
      } else {
        if (!kChannelIsRow) scale = load_some<Vec<float>>(to.scale + channel + t, count);
        const Vec<float> y = __builtin_convertvector(exact, Vec<float>) * scale;
        if constexpr (is_same<R, float>) {
          store_some(c + t, count, y);
        } else {
          // Saturate first, so that adding and taking off 1.5 * 2^23 rounds to an integer, half to
          // even.
          constexpr float kRound = 12582912.0f;
          const Vec<float> above = y < low ? low : y, inside = above > high ? high : above;
          const auto q = __builtin_convertvector(inside + kRound - kRound, Vec<std::int32_t>);
          store_some(c + t, count, __builtin_convertvector(q + to.zero, Narrow));
        }
      }
    };
    Index t = 0;
    for (; t + kLanes<Word> <= n; t += kLanes<Word>) finish_vector(t, kLanes<Word>);
    if (t < n) finish_vector(t, n - t);
    if constexpr (is_same<R, float>) {
      // In a loop of its own, so that product and sum are rounded each, as in the formula.
      for (t = 0; to.offset && t < n; ++t) c[t] += to.offset[channel + (kChannelIsRow ? 0 : t)];
      for (t = 0; to.relu && t < n; ++t) c[t] = c[t] < 0 ? 0 : c[t];
    }
  }

 private:
  typedef std::uint32_t Wrapping __attribute__((vector_size(kVectorBytes)));
  typedef R Narrow __attribute__((vector_size(kLanes<Word> * sizeof(R))));

  template <class V, class T>
  static MINIDL_INLINE V load_some(const T* p, Index n) {
    V v;
    if (n >= kLanes<Word>) {
      std::memcpy(&v, p, sizeof v);
    } else {
      T last[kLanes<Word>] = {};
      for (Index t = 0; t < n; ++t) last[t] = p[t];
      std::memcpy(&v, last, sizeof v);
    }
    return v;
  }

  static MINIDL_INLINE void store_some(R* p, Index n, Narrow v) {
    if (n >= kLanes<Word>) {
      std::memcpy(p, &v, sizeof v);
    } else {
      R last[kLanes<Word>];
      std::memcpy(last, &v, sizeof v);
      for (Index t = 0; t < n; ++t) p[t] = last[t];
    }
  }
};

template <class P>
struct Pointee;
template <class R>
struct Pointee<R*> {
  using Type = R;
};

// Calls f with a pointer of the result's type.
template <class F>
void with_result(Finish::Type type, void* c, const F& f) {
  switch (type) {
    case Finish::kInt32:
      return f(static_cast<std::int32_t*>(c));
    case Finish::kFloat32:
      return f(static_cast<float*>(c));
    case Finish::kInt8:
      return f(static_cast<std::int8_t*>(c));
    case Finish::kUint8:
      return f(static_cast<std::uint8_t*>(c));
  }
}

// ---- Matrix products --------------------------------------------------------------------------

inline Index packed_width(Index n) { return round_up(n, kTileColumns<Word>); }

inline void pack_bytes(Index n, Index k, Bytes w, PackedBytes packed) {
  constexpr Index nr = kTileColumns<Word>;
  const Index words = divide_up(k, 4), depth = depth_of_block(words, 1);
  pack_right(n, words, 1, BytesRight{w, k}, packed.words);
  // The sums of the columns are the product with a row of ones.
  const Scratch<Word> ones(depth);
  for (Index i = 0; i < depth; ++i) ones.get()[i] = Word{0x01010101};
  parallel_for(divide_up(n, nr), [&](Index panel) {
    const Index j = panel * nr, columns = smaller(nr, n - j);
    const Index vectors = divide_up(columns, kLanes<Word>);
    for (Index k0 = 0; k0 < words; k0 += depth) {
      const Index kn = smaller(depth, words - k0);
      const Word* block = packed.words + k0 * packed_width(n) + j * kn;
      kernel_for<Word>(block, 1, vectors)(kn, ones.get(), block, packed.sum + j, nr,
                                          columns - (vectors - 1) * kLanes<Word>, k0 > 0);
    }
    for (Index t = j; t < j + columns; ++t) packed.zero[t] += to_unsigned(w.is_signed);
  });
}

inline void matmul_integer(Index m, Index n, Index k, Bytes a, const std::int32_t* a_zero,
                           PackedBytes w, const Finish& how, void* c) {
  const std::uint8_t flip = to_signed(a.is_signed);
  const Scratch<std::int32_t> zero(m), sum(m);
  bool any_zero = false;
  for (Index i = 0; i < m; ++i) {
    zero.get()[i] = a_zero[i] - flip;
    any_zero |= zero.get()[i] != 0;
  }
  parallel_for(m, [&](Index i) {
    const std::uint8_t* p = a.data + i * a.row_stride;
    std::int32_t of_row = 0;
    if (a.col_stride == 1) {
      for (Index q = 0; q < k; ++q) of_row += static_cast<std::int8_t>(p[q] ^ flip);
    } else {
      for (Index q = 0; q < k; ++q) of_row += static_cast<std::int8_t>(p[q * a.col_stride] ^ flip);
    }
    sum.get()[i] =
        wrapping_difference(of_row, wrapping_product(static_cast<std::int32_t>(k), zero.get()[i]));
  });
  with_result(how.type, c, [&](auto* result) {
    using R = typename Pointee<decltype(result)>::Type;
    const FinishIntegers<R, false> finish{
        any_zero ? zero.get() : nullptr, w.sum, sum.get(), w.zero, 0, how, 0};
    gemm<Word>(m, n, divide_up(k, 4), 1, BytesLeft{a, k},
               PackedRight<Word>{w.words, packed_width(n)}, MatrixOut<R>{result, n}, finish);
  });
}

}  // namespace minidl::MINIDL_ISA
