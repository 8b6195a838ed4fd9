// Convolution of bytes, summed up exactly in 32 bits; zero points are taken off as in integer.h.
//
// A word holds four channels of a pixel, so an image of bytes is an image of words with a quarter
// of the channels, and convolution is what it is in conv.h. Where a group has one channel
// (depthwise, or a grey image), four neighbouring taps of a row are the word: three instead of nine
// for a 3x3 kernel.
#pragma once

#include "conv.h"
#include "integer.h"

namespace minidl::MINIDL_ISA {

// The zero point of one output's weights once they are signed, and their sum less that of the
// zeros.
inline void sum_of_weights(const std::uint8_t* w, Index count, std::uint8_t flip,
                           std::int32_t& zero, std::int32_t& sum) {
  sum = 0;
  for (Index q = 0; q < count; ++q) sum += static_cast<std::int8_t>(w[q] ^ flip);
  zero -= flip;
  sum = wrapping_difference(sum, wrapping_product(static_cast<std::int32_t>(count), zero));
}

// ---- One channel in each group ----------------------------------------------------------------

inline Index words_of_row(const Conv2d& p) { return divide_up(p.kw, 4); }

// [o][kh][kw / 4]
inline void pack_one_channel(const Conv2d& p, Bytes w, PackedBytes packed) {
  const std::uint8_t flip = to_signed(w.is_signed);
  Word* word = packed.words;
  for (Index i = 0; i < p.o; ++i) {
    const std::uint8_t* src = w.data + i * p.kh * p.kw;
    for (Index r = 0; r < p.kh; ++r) {
      for (Index s = 0; s < p.kw; s += 4) *word++ = word_of(src + r * p.kw + s, 1, p.kw - s, flip);
    }
    sum_of_weights(src, p.kh * p.kw, flip, packed.zero[i], packed.sum[i]);
  }
}

// A plane as the taps see it: for each word of a kernel's row, lines as wide as the output, laid
// end to end, so that what a tap sees of consecutive outputs, across the ends of rows, is a run of
// memory. With a vertical stride the lines are sorted by their residue, and with a horizontal one
// the bytes of a line are.
class WordPlane {
 public:
  explicit WordPlane(const Conv2d& p)
      : p_(p),
        words_(words_of_row(p)),
        lines_(divide_up((p.oh - 1) * p.stride_h + (p.kh - 1) * p.dilation_h + 1, p.stride_h)),
        size_(p.stride_h * lines_ * p.ow + kTileColumns<Word>),
        width_(round_up(p.ow, kLanes<Word>) + (p.kw - 1) * p.dilation_w / p.stride_w),
        tap_(p.kh * words_),
        byte_(4 * words_) {
    for (Index t = 0; t < p.kh * words_; ++t) {
      const Index y = t / words_ * p.dilation_h;
      tap_.get()[t] = t % words_ * size_ + (y % p.stride_h * lines_ + y / p.stride_h) * p.ow;
    }
    for (Index t = 0; t < 4 * words_; ++t) {  // behind the kernel: any byte, its weight is zero
      const Index x = smaller(t, p.kw - 1) * p.dilation_w;
      byte_.get()[t] = x % p.stride_w * width_ + x / p.stride_w;
    }
  }

  // How many of them `fill` makes of a plane, by way of how many bytes.
  Index words() const { return words_ * size_; }
  Index bytes() const { return p_.stride_h * lines_ * p_.stride_w * width_; }

  void fill(const std::uint8_t* plane, std::uint8_t border, std::uint8_t flip, std::uint8_t* bytes,
            Word* words) const {
    std::memset(bytes, border, static_cast<std::size_t>(this->bytes()));
    for (Index y = 0; y < smaller(p_.h, p_.stride_h * lines_ - p_.pad_h); ++y) {
      fill_line(plane + y * p_.w, bytes + (y + p_.pad_h) * p_.stride_w * width_);
    }
    const auto flips = static_cast<std::int32_t>(flip * 0x01010101u);
    for (Index s = 0; s < words_; ++s) {
      const Index* byte = byte_.get() + 4 * s;
      Word* dst = words + s * size_;
      for (Index residue = 0; residue < p_.stride_h; ++residue) {
        const std::uint8_t* line = bytes + residue * p_.stride_w * width_;
        for (Index i = 0; i < lines_;
             ++i, dst += p_.ow, line += p_.stride_h * p_.stride_w * width_) {
          // The vector at the end of a line reaches into the next, which is written later.
          for (Index q = 0; q < p_.ow; q += kLanes<Word>) {
            const std::uint8_t* x = line + q;
            const Vec<Word> word = load_bytes(x + byte[0]) | load_bytes(x + byte[1]) << 8 |
                                   load_bytes(x + byte[2]) << 16 | load_bytes(x + byte[3]) << 24;
            store(dst + q, word ^ flips);
          }
        }
      }
    }
  }

  // sum[t] = sum over the taps of weight * what it sees of output j + t, for `columns` outputs;
  // whole tiles of them are computed.
  void correlate(const Word* words, const Word* weight, Index j, Index columns,
                 std::int32_t* sum) const {
    const Index taps = p_.kh * words_;
    for (Index end = j + columns; j < end; j += kTileColumns<Word>, sum += kTileColumns<Word>) {
      Vec<std::int32_t> total[kTileVectors] = {};
      for (Index t = 0; t < taps; ++t) {
        const Word* x = words + tap_.get()[t] + j;
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
          total[v] = multiply_add(weight[t], load(x + v * kLanes<Word>), total[v]);
        }
      }
#pragma GCC unroll 4
      for (int v = 0; v < kTileVectors; ++v) store(sum + v * kLanes<Word>, total[v]);
    }
  }

 private:
  // The part of a line that lies inside the plane; around it there is border already.
  void fill_line(const std::uint8_t* src, std::uint8_t* line) const {
    if (p_.stride_w == 1) {
      const Index count = smaller(p_.w, width_ - p_.pad_w);
      if (count > 0) std::memcpy(line + p_.pad_w, src, static_cast<std::size_t>(count));
      return;
    }
    for (Index residue = 0; residue < p_.stride_w; ++residue, line += width_) {
      const Inside columns(width_, p_.w, p_.stride_w, residue - p_.pad_w);
      for (Index q = columns.begin; q < columns.end; ++q) {
        line[q] = src[q * p_.stride_w + residue - p_.pad_w];
      }
    }
  }

  const Conv2d p_;
  Index words_, lines_;  // of a row of the kernel; of each residue
  Index size_, width_;   // of the lines of one word; of the bytes of one residue
  Scratch<Index> tap_, byte_;
};

inline void conv_one_channel(const Conv2d& p, Bytes x, std::int32_t x_zero, PackedBytes w,
                             const Finish& how, void* y) {
  constexpr Index run = 4 * kTileColumns<Word>;
  const Index many = p.o / p.groups, pixels = p.oh * p.ow, taps = p.kh * words_of_row(p);
  const std::uint8_t flip = to_unsigned(x.is_signed);
  const WordPlane plane(p);
  const Scratch<Word> ones(taps);  // weights whose products are the sums of the patches
  for (Index t = 0; t < taps; ++t) {
    const std::uint8_t one[4] = {1, 1, 1, 1};
    ones.get()[t] = word_of(one, 1, p.kw - t % words_of_row(p) * 4, 0);
  }
  with_result(how.type, y, [&](auto* result) {
    using R = typename Pointee<decltype(result)>::Type;
    parallel_for(p.n * p.groups, [&](Index job) {
      const Scratch<std::uint8_t> bytes(plane.bytes());
      const Scratch<Word> words(plane.words());
      plane.fill(x.data + job * p.h * p.w, static_cast<std::uint8_t>(x_zero), flip, bytes.get(),
                 words.get());
      const Scratch<std::int32_t> patch(round_up(pixels, kTileColumns<Word>));
      const FinishIntegers<R, true> finish{w.zero,        patch.get(), w.sum, nullptr,
                                           x_zero + flip, how,         0};
      bool patches_known = false;
      for (Index i = 0; i < many; ++i) {
        const Index o = job % p.groups * many + i;
        R* out = result + (job * many + i) * pixels;
        if (w.zero[o] != 0 && !patches_known) {
          plane.correlate(words.get(), ones.get(), 0, pixels, patch.get());
          patches_known = true;
        }
        for (Index j = 0; j < pixels; j += run) {
          std::int32_t sum[run];
          const Index columns = smaller(run, pixels - j);
          plane.correlate(words.get(), w.words + o * taps, j, columns, sum);
          finish.finish(o, j, columns, sum, out + j);
        }
      }
    });
  });
}

// ---- Any number of channels -------------------------------------------------------------------

inline void pack_conv(const Conv2d& p, Bytes w, PackedBytes packed) {
  if (p.c == p.groups) return pack_one_channel(p, w, packed);
  const Index c = p.c / p.groups, o = p.o / p.groups, taps = p.kh * p.kw, words = divide_up(c, 4);
  const std::uint8_t flip = to_signed(w.is_signed);
  const Scratch<Word> turned(p.o * words * taps);  // [o][c / 4][tap]
  parallel_for(p.o, [&](Index i) {
    const std::uint8_t* src = w.data + i * c * taps;
    sum_of_weights(src, c * taps, flip, packed.zero[i], packed.sum[i]);
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

// Words, made of the bytes of four channels where they are asked for.
struct WordsOfBytes {
  static constexpr bool as_it_is = false;
  const std::uint8_t* x;  // of a group
  Index image_stride, plane, channels;
  std::uint8_t flip;

  const Word* pixels(Index image, Index word, Index first, Index count, Word* room) const {
    const std::uint8_t* src = x + image * image_stride + 4 * word * plane + first;
    const Index bytes = smaller(4, channels - 4 * word);
    Index q = 0;
    for (; q + kLanes<Word> <= count; q += kLanes<Word>) {
      Vec<Word> four = load_bytes(src + q) ^ flip;
      for (Index i = 1; i < bytes; ++i) {
        four |= (load_bytes(src + i * plane + q) ^ flip) << static_cast<int>(8 * i);
      }
      store(room + q, four);
    }
    for (; q < count; ++q) room[q] = word_of(src + q, plane, bytes, flip);
    return room;
  }
};

// For each output pixel of a group: the sum of the bytes that it sees, those outside the image too.
inline void sum_patches(const Conv2d& p, const WordsOfBytes& x, std::int32_t border,
                        std::int32_t* sum) {
  const Scratch<std::int32_t> plane(p.n * p.h * p.w);
  parallel_for(p.n, [&](Index image) {
    for (Index q = 0; q < p.h * p.w; ++q) {
      const std::uint8_t* byte = x.x + image * x.image_stride + q;
      std::int32_t of_pixel = 0;
      for (Index i = 0; i < x.channels; ++i) of_pixel += byte[i * x.plane] ^ x.flip;
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
  if (p.c == p.groups) return conv_one_channel(p, x, x_zero, w, how, y);
  const Index c = p.c / p.groups, o = p.o / p.groups, taps = p.kh * p.kw, words = divide_up(c, 4);
  const Index pixels = p.h * p.w, out_pixels = p.oh * p.ow;
  const std::uint8_t flip = to_unsigned(x.is_signed);
  x_zero += flip;
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
      const WordsOfBytes image{x.data + group * c * pixels, p.c * pixels, pixels, c, flip};
      if (any_zero) sum_patches(p, image, static_cast<std::int32_t>(c) * x_zero, patch.get());
      const Im2col<Word, WordsOfBytes> columns(image, p.h, p.w, p.oh, p.ow,
                                               {down.get(), p.kh, p.stride_h},
                                               {right.get(), p.kw, p.stride_w}, border);
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
