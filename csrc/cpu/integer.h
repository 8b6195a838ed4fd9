// Products and convolutions of bytes, summed up exactly in 32 bits.
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

#include "conv.h"
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

// Takes the zero points off (their terms may be null: nothing to take off) and finishes the sum.
template <class R, bool kChannelIsRow>
struct FinishIntegers {
  using Result = R;
  const std::int32_t *left_zero, *right_sum;  // za[i], sum of b[..][j]
  const std::int32_t *left_sum, *right_zero;  // sum of a[i][..] - K za[i], zb[j] ...
  std::int32_t right_zero_of_all;             // ... which is this one where that is null
  Finish how;
  Index channel0;

  void finish(Index i, Index j, Index n, const std::int32_t* sum, R* c) const {
    std::int32_t v[kTileColumns<Word>];
    const Index channel = channel0 + (kChannelIsRow ? i : j);
    std::int32_t row = right_zero ? 0 : wrapping_product(left_sum[i], right_zero_of_all);
    if (kChannelIsRow && how.bias) row = wrapping_difference(row, how.bias[channel]);
    for (Index t = 0; t < n; ++t) v[t] = wrapping_difference(sum[t], row);
    if (left_zero && left_zero[i] != 0) {
      for (Index t = 0; t < n; ++t) {
        v[t] = wrapping_difference(v[t], wrapping_product(left_zero[i], right_sum[j + t]));
      }
    }
    if (right_zero) {
      for (Index t = 0; t < n; ++t) {
        v[t] = wrapping_difference(v[t], wrapping_product(left_sum[i], right_zero[j + t]));
      }
    }
    if (!kChannelIsRow && how.bias) {
      for (Index t = 0; t < n; ++t) {
        v[t] = wrapping_difference(v[t], wrapping_difference(0, how.bias[channel + t]));
      }
    }
    if constexpr (is_same<R, std::int32_t>) {
      for (Index t = 0; t < n; ++t) c[t] = how.relu && v[t] < 0 ? 0 : v[t];
    } else {
      float scaled[kTileColumns<Word>];
      if (kChannelIsRow) {
        const float scale = how.scale[channel];
        for (Index t = 0; t < n; ++t) scaled[t] = static_cast<float>(v[t]) * scale;
      } else {
        for (Index t = 0; t < n; ++t) scaled[t] = static_cast<float>(v[t]) * how.scale[channel + t];
      }
      store_scaled(channel, n, scaled, c);
    }
  }

 private:
  void store_scaled(Index channel, Index n, const float* scaled, float* c) const {
    for (Index t = 0; t < n; ++t) {
      const float y =
          how.offset ? scaled[t] + how.offset[kChannelIsRow ? channel : channel + t] : scaled[t];
      c[t] = how.relu && y < 0 ? 0 : y;
    }
  }

  template <class Byte>
  void store_scaled(Index, Index n, const float* scaled, Byte* c) const {
    // Saturate first, so that adding and taking off 1.5 * 2^23 rounds to an integer, half to even.
    constexpr float kRound = 12582912.0f;
    constexpr int least = is_same<Byte, std::int8_t> ? -128 : 0;
    const float low = static_cast<float>(how.relu ? 0 : least - how.zero);
    const float high = static_cast<float>(least + 255 - how.zero);
    for (Index t = 0; t < n; ++t) {
      float y = scaled[t] < low ? low : scaled[t];
      y = y > high ? high : y;
      c[t] = static_cast<Byte>(static_cast<std::int32_t>(y + kRound - kRound) + how.zero);
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

// ---- Convolution ------------------------------------------------------------------------------
//
// Channels four at a time are the bytes of a word, so an image of bytes is an image of words with a
// quarter of the channels, and convolution is what it is in conv.h.

inline void pack_conv(const Conv2d& p, Bytes w, PackedBytes packed) {
  const Index c = p.c / p.groups, o = p.o / p.groups, taps = p.kh * p.kw, words = divide_up(c, 4);
  const std::uint8_t flip = to_signed(w.is_signed);
  const Scratch<Word> turned(p.o * words * taps);  // [o][c / 4][tap]
  parallel_for(p.o, [&](Index i) {
    const std::uint8_t* src = w.data + i * c * taps;
    std::int32_t sum = 0;
    for (Index q = 0; q < c * taps; ++q) sum += static_cast<std::int8_t>(src[q] ^ flip);
    packed.zero[i] -= flip;
    packed.sum[i] = wrapping_difference(
        sum, wrapping_product(static_cast<std::int32_t>(c * taps), packed.zero[i]));
    for (Index q = 0; q < words; ++q) {
      for (Index t = 0; t < taps; ++t) {
        turned.get()[(i * words + q) * taps + t] =
            word_of(src + 4 * q * taps + t, taps, c - 4 * q, flip);
      }
    }
  });
  const Scratch<Index> at(taps);
  for (Index t = 0; t < taps; ++t) at.get()[t] = t;
  for (Index group = 0; group < p.groups; ++group) {
    const Index first = group * o * words * taps;
    const Weights<Word> weights{turned.get() + first, words * taps, taps, at.get(), taps};
    pack_left(o, words * taps, taps, weights, packed.words + first);
  }
}

// For each output pixel of a group: the sum of the bytes that it sees, those outside the image too.
inline void sum_patches(const Conv2d& p, const Word* x, Index image_stride, Index words,
                        std::int32_t border, std::int32_t* sum) {
  const Scratch<std::int32_t> plane(p.n * p.h * p.w);
  parallel_for(p.n, [&](Index image) {
    for (Index q = 0; q < p.h * p.w; ++q) {
      std::int32_t of_pixel = 0;
      for (Index word = 0; word < words; ++word) {
        const auto bits =
            static_cast<std::uint32_t>(x[image * image_stride + word * p.h * p.w + q]);
        for (int byte = 0; byte < 4; ++byte) of_pixel += bits >> 8 * byte & 255;
      }
      plane.get()[image * p.h * p.w + q] = of_pixel;
    }
    for (Index q = 0; q < p.oh * p.ow; ++q) {
      std::int32_t of_patch = 0;
      for (Index t = 0; t < p.kh * p.kw; ++t) {
        const Index row = q / p.ow * p.stride_h - p.pad_h + t / p.kw * p.dilation_h;
        const Index col = q % p.ow * p.stride_w - p.pad_w + t % p.kw * p.dilation_w;
        const bool inside = row >= 0 && row < p.h && col >= 0 && col < p.w;
        of_patch += inside ? plane.get()[(image * p.h + row) * p.w + col] : border;
      }
      sum[image * p.oh * p.ow + q] = of_patch;
    }
  });
}

inline void conv_integer(const Conv2d& p, Bytes x, std::int32_t x_zero, PackedBytes w,
                         const Finish& how, void* y) {
  const Index c = p.c / p.groups, o = p.o / p.groups, taps = p.kh * p.kw, words = divide_up(c, 4);
  const Index pixels = p.h * p.w, out_pixels = p.oh * p.ow;
  const std::uint8_t flip = to_unsigned(x.is_signed);
  x_zero += flip;

  const Scratch<Word> image(p.n * p.groups * words * pixels);
  parallel_for(p.n * p.groups * words, [&](Index job) {
    const Index of_group = job % words, plane = job / words * c + 4 * of_group;
    const Index count = smaller(4, c - 4 * of_group);
    const std::uint8_t* src = x.data + plane * pixels;
    Word* dst = image.get() + job * pixels;
    Index q = 0;
    for (; q + kLanes<Word> <= pixels; q += kLanes<Word>) {
      Vec<Word> word = load_bytes(src + q) ^ flip;
      for (Index i = 1; i < count; ++i) {
        word |= (load_bytes(src + i * pixels + q) ^ flip) << static_cast<int>(8 * i);
      }
      store(dst + q, word);
    }
    for (; q < pixels; ++q) dst[q] = word_of(src + q, pixels, count, flip);
  });

  bool any_zero = false;
  for (Index i = 0; i < p.o; ++i) any_zero |= w.zero[i] != 0;
  const Scratch<std::int32_t> patch(any_zero ? p.n * out_pixels : 0);
  const Scratch<Index> down(p.kh), right(p.kw);
  for (Index r = 0; r < p.kh; ++r) down.get()[r] = r * p.dilation_h - p.pad_h;
  for (Index s = 0; s < p.kw; ++s) right.get()[s] = s * p.dilation_w - p.pad_w;
  const Word border = static_cast<Word>(static_cast<std::uint32_t>(x_zero) * 0x01010101u);

  with_result(how.type, y, [&](auto* result) {
    using R = typename Pointee<decltype(result)>::Type;
    for (Index group = 0; group < p.groups; ++group) {
      const Word* first = image.get() + group * words * pixels;
      const Index image_stride = p.groups * words * pixels;
      if (any_zero) {
        sum_patches(p, first, image_stride, words, static_cast<std::int32_t>(c) * x_zero,
                    patch.get());
      }
      const Im2col<Word> columns(first, image_stride, p.h, p.w, p.oh, p.ow,
                                 {down.get(), p.kh, p.stride_h}, {right.get(), p.kw, p.stride_w},
                                 border);
      const Pixels<R> out{
          result + group * o * out_pixels, p.o * out_pixels, out_pixels, p.oh, p.ow, p.ow, 1, 1};
      const FinishIntegers<R, true> finish{any_zero ? w.zero + group * o : nullptr,
                                           patch.get(),
                                           w.sum + group * o,
                                           nullptr,
                                           x_zero,
                                           how,
                                           group * o};
      gemm_packed<Word>(o, p.n * out_pixels, words * taps, taps, w.words + group * o * words * taps,
                        columns, out, finish);
    }
  });
}

}  // namespace minidl::MINIDL_ISA
