// Convolution as a matrix product whose right matrix is never built ("implicit im2col").
//
//   y[o][pixel] = sum over k = (channel, tap) of  W[o][k] * B[k][pixel],
//   B[(channel, tap)][pixel] = the image's channel, shifted by the tap.
//
// B is kh*kw times as large as the image. Only the part that the loop nest asks for is made, in the
// packed order, straight from the image.
//
// The gradient with respect to x is the same product: gx at a pixel collects g from the outputs
// that saw this pixel. With a stride, the pixels fall into stride_h * stride_w phases, and within a
// phase all pixels have the same taps, so each phase is an ordinary convolution with stride 1 of g
// by a part of the kernel. (The gradient with respect to w is conv_weight.h.)
#pragma once

#include "depthwise.h"
#include "gemm.h"

namespace minidl::MINIDL_ISA {

// The taps of one axis: output position q sees input position q * step + shift, for each shift.
struct Taps {
  const Index* shift;
  Index count;
  Index step;
};

// ---- B, packed from the image -----------------------------------------------------------------

// Images that lie in memory as they are: image_stride apart, their channels `plane` apart.
template <class T>
struct Stored {
  static constexpr bool as_it_is = true;
  const T* x;
  Index image_stride, plane;
  // `count` pixels of a channel from `first` on; another source may write them into `room`.
  const T* pixels(Index image, Index channel, Index first, Index, T*) const {
    return x + image * image_stride + channel * plane + first;
  }
};

// For one channel after the other the packing makes "shifted planes": for each horizontal tap, the
// image's rows as this tap sees them, padded, cut to the output's width and laid end to
// end. There the tap (r, s) of a run of output pixels is a run of memory, whatever the stride and
// the padding, and across the ends of rows: packing is then copying. With a vertical stride, the
// rows seen by one tap are every stride-th, so the rows are kept apart by their residue ("class").
template <class T, class Source = Stored<T>>
class Im2col {
 public:
  // The output has out_h x out_w pixels an image. Beyond its edges the image is `border`.
  Im2col(const Source& x, Index h, Index w, Index out_h, Index out_w, Taps vertical,
         Taps horizontal, T border = T{})
      : x_(x),
        border_(border),
        h_(h),
        w_(w),
        out_h_(out_h),
        out_w_(out_w),
        vertical_(vertical),
        horizontal_(horizontal),
        class_(vertical.count),
        offset_(vertical.count),
        first_row_(vertical.count),
        above_(0),
        below_(0),
        classes_(0) {
    const Index step = vertical.step;
    for (Index r = 0; r < vertical.count; ++r) {
      const Index offset = divide_down(vertical.shift[r], step);
      above_ = r == 0 ? offset : smaller(above_, offset);
      below_ = r == 0 ? offset : larger(below_, offset);
    }
    // A plane holds the rows from the highest tap to the lowest. With a large dilation most of them
    // would never be read: then each tap has planes of its own.
    const bool spread = below_ - above_ > 2 * vertical.count;
    if (spread) above_ = below_ = 0;
    for (Index r = 0; r < vertical.count; ++r) {
      const Index offset = spread ? 0 : divide_down(vertical.shift[r], step);
      const Index row = vertical.shift[r] - offset * step;
      Index known = 0;
      while (known < classes_ && first_row_.get()[known] != row) ++known;
      if (known == classes_) first_row_.get()[classes_++] = row;
      class_.get()[r] = known;
      offset_.get()[r] = offset;
    }
    lowest_ = highest_ = first_row_.get()[0];
    for (Index cls = 1; cls < classes_; ++cls) {
      lowest_ = smaller(lowest_, first_row_.get()[cls]);
      highest_ = larger(highest_, first_row_.get()[cls]);
    }
    // A 1x1 kernel that moves by one pixel sees the image as it is: nothing to shift.
    plain_ = Source::as_it_is && vertical.count == 1 && horizontal.count == 1 && step == 1 &&
             horizontal.step == 1 && vertical.shift[0] == 0 && horizontal.shift[0] == 0 &&
             out_w == w && out_h <= h;
  }

  void pack(T* dst, Index k0, Index depth, Index j0, Index columns) const {
    constexpr Index nr = kTileColumns<T>;
    const Index pixels = out_h_ * out_w_, taps = vertical_.count * horizontal_.count;
    if (columns % nr != 0) {  // the columns behind the last one: computed with, but not stored
      std::memset(dst + columns / nr * nr * depth, 0,
                  static_cast<std::size_t>(depth * nr) * sizeof(T));
    }
    const Index most_rows = smaller(out_h_, (columns - 1) / out_w_ + 2) + below_ - above_;
    const Scratch<T> planes(plain_ ? 0 : horizontal_.count * classes_ * most_rows * out_w_);
    const Index most_seen = smaller(h_, most_rows * vertical_.step + highest_ - lowest_);
    const Scratch<T> room(Source::as_it_is ? 0 : most_seen * w_);
    const Scratch<Index> tap_row(plain_ ? kPlainRows : taps);

    for (Index j = j0, end; j < j0 + columns; j = end) {  // image by image
      const Index image = j / pixels, from = j - image * pixels;
      end = smaller(j0 + columns, (image + 1) * pixels);
      const Index y0 = from / out_w_, y1 = (from + (end - j) - 1) / out_w_ + 1;
      locate_taps(tap_row.get(), y1 - y0);
      // Column j0 of the block would be at `origin` of a plane: the planes begin at row y0.
      const Index origin = from - (j - j0) - (plain_ ? 0 : y0 * out_w_);
      for (Index k = 0, count; k < depth; k += count) {  // channel by channel
        const Index channel = (k0 + k) / taps, tap = (k0 + k) % taps;
        const T* source = planes.get();
        if (plain_) {
          count = smaller(kPlainRows, depth - k);
          source = x_.pixels(image, channel, 0, h_ * w_, nullptr);
        } else {
          count = smaller(taps - tap, depth - k);
          // Rows of the image that are seen. The planes stay in the L1 cache until copied.
          const Index top = larger(0, (y0 + above_) * vertical_.step + lowest_);
          const Index bottom = smaller(h_, (y1 + below_ - 1) * vertical_.step + highest_ + 1);
          const Index seen = larger(0, bottom - top) * w_;
          fill_planes(planes.get(), x_.pixels(image, channel, top * w_, seen, room.get()), top, y0,
                      y1);
        }
        copy_columns(dst + k * nr, depth, j - j0, end - j0, source + origin, tap_row.get() + tap,
                     count);
      }
    }
  }

 private:
  static constexpr Index kPlainRows = 8;  // channels that are copied together if there is one tap

  // Rows above_ + y0 ... below_ + y1 - 1 of one channel, for every horizontal tap and every class.
  // src: the image's rows from `top` on.
  void fill_planes(T* dst, const T* src, Index top, Index y0, Index y1) const {
    for (Index s = 0; s < horizontal_.count; ++s) {
      // The output columns [left, right) of this tap lie inside the image.
      const Index shift = horizontal_.shift[s], step = horizontal_.step;
      const Index left = smaller(out_w_, shift >= 0 ? 0 : divide_up(-shift, step));
      const Index right = larger(left, smaller(out_w_, divide_down(w_ - 1 - shift, step) + 1));
      for (Index cls = 0; cls < classes_; ++cls) {
        for (Index i = y0 + above_; i < y1 + below_; ++i, dst += out_w_) {
          const Index row = i * vertical_.step + first_row_.get()[cls];
          if (row < 0 || row >= h_) {
            for (Index q = 0; q < out_w_; ++q) dst[q] = border_;
            continue;
          }
          for (Index q = 0; q < left; ++q) dst[q] = border_;
          const T* in = src + (row - top) * w_ + shift;
          if (step == 1) {
            copy_run(dst + left, in + left, right - left);
          } else {
            for (Index q = left; q < right; ++q) dst[q] = in[q * step];
          }
          for (Index q = right; q < out_w_; ++q) dst[q] = border_;
        }
      }
    }
  }

  // Where in the planes of a channel each tap begins; or in the image itself, each channel.
  void locate_taps(Index* tap_row, Index rows) const {
    if (plain_) {
      for (Index i = 0; i < kPlainRows; ++i) tap_row[i] = i * h_ * w_;
      return;
    }
    const Index plane = (rows + below_ - above_) * out_w_;
    for (Index r = 0; r < vertical_.count; ++r) {
      for (Index s = 0; s < horizontal_.count; ++s) {
        *tap_row++ =
            (s * classes_ + class_.get()[r]) * plane + (offset_.get()[r] - above_) * out_w_;
      }
    }
  }

  // `count` rows of B: dst[micro-panel][k][column] = source[tap_row[k] + column], for the columns
  // from ... to - 1.
  static void copy_columns(T* dst, Index depth, Index from, Index to, const T* source,
                           const Index* tap_row, Index count) {
    constexpr Index nr = kTileColumns<T>;
    for (Index panel = from / nr * nr; panel < to; panel += nr) {
      const Index a = larger(from, panel) - panel, b = smaller(to, panel + nr) - panel;
      const T* in = source + panel;
      T* q = dst + panel * depth;
      if (b - a == nr) {
        for (Index k = 0; k < count; ++k, q += nr) {
          const T* row = in + tap_row[k];
#pragma GCC unroll 4
          for (int v = 0; v < kTileVectors; ++v) {
            store(q + v * kLanes<T>, load(row + v * kLanes<T>));
          }
        }
      } else {
        for (Index k = 0; k < count; ++k, q += nr) copy_run(q + a, in + tap_row[k] + a, b - a);
      }
    }
  }

  // memcpy for runs so short that calling it would cost more.
  static MINIDL_INLINE void copy_run(T* dst, const T* src, Index n) {
    Index i = 0;
    for (; i + kLanes<T> <= n; i += kLanes<T>) store(dst + i, load(src + i));
    if (i == n) return;
    if (n >= kLanes<T>) {
      store(dst + n - kLanes<T>, load(src + n - kLanes<T>));
    } else {
      for (; i < n; ++i) dst[i] = src[i];
    }
  }

  const Source x_;
  T border_;
  Index h_, w_, out_h_, out_w_;
  Taps vertical_, horizontal_;
  Scratch<Index> class_, offset_, first_row_;  // of each vertical tap; of each class
  Index above_, below_;                        // rows that a plane has beyond the output's
  Index classes_, lowest_, highest_;           // of first_row_
  bool plain_;
};

// ---- W ----------------------------------------------------------------------------------------

// Row i, column k = (a, r, s) of the left matrix: base[i * row + a * channel + at[r, s]].
template <class T>
struct Weights {
  const T* base;
  Index row, channel;
  const Index* at;
  Index taps;
  void pack(T* dst, Index i0, Index rows, Index k0, Index depth) const {
    const T* src = base + k0 / taps * channel + i0 * row;
    for (Index k = 0, t = k0 % taps; k < depth; ++k, dst += rows) {
      for (Index i = 0; i < rows; ++i) dst[i] = src[at[t] + i * row];
      if (++t == taps) {
        t = 0;
        src += channel;
      }
    }
  }
};

// ---- Where the result goes --------------------------------------------------------------------

// Column j is pixel (q_h, q_w) of the n-th image; it lies at (q_h * step_h, q_w * step_w) there.
template <class T>
struct Pixels {
  T* base;
  Index image_stride, row_stride;  // row_stride: from one channel to the next
  Index h, w, line, step_h, step_w;
  T* column(Index j) const {
    const Index image = j / (h * w), p = j % (h * w);
    return base + image * image_stride + p / w * step_h * line + p % w * step_w;
  }
  bool contiguous(Index j, Index n) const {
    return step_h == 1 && step_w == 1 && line == w && j % (h * w) + n <= h * w;
  }
};

// ---- The kernels ------------------------------------------------------------------------------

template <class T>
void conv2d(const Conv2d& p, const T* x, const T* w, const T* bias, T* y) {
  if (depthwise(p)) return depthwise_conv2d(p, x, w, bias, y);
  const Index c = p.c / p.groups, o = p.o / p.groups, taps = p.kh * p.kw;
  const Scratch<Index> down(p.kh), right(p.kw), at(taps);
  for (Index r = 0; r < p.kh; ++r) down.get()[r] = r * p.dilation_h - p.pad_h;
  for (Index s = 0; s < p.kw; ++s) right.get()[s] = s * p.dilation_w - p.pad_w;
  for (Index t = 0; t < taps; ++t) at.get()[t] = t;
  for (Index group = 0; group < p.groups; ++group) {
    const Im2col<T> image({x + group * c * p.h * p.w, p.c * p.h * p.w, p.h * p.w}, p.h, p.w, p.oh,
                          p.ow, {down.get(), p.kh, p.stride_h}, {right.get(), p.kw, p.stride_w});
    const Weights<T> weights{w + group * o * c * taps, c * taps, taps, at.get(), taps};
    const Pixels<T> out{
        y + group * o * p.oh * p.ow, p.o * p.oh * p.ow, p.oh * p.ow, p.oh, p.ow, p.ow, 1, 1};
    const Index pixels = p.n * p.oh * p.ow;
    if (bias || p.relu) {
      const Bias<T> of_output{bias ? bias + group * o : nullptr, nullptr, p.relu};
      gemm<T>(o, pixels, c * taps, taps, weights, image, out, of_output);
    } else {
      gemm<T>(o, pixels, c * taps, taps, weights, image, out);
    }
  }
}

template <class T>
void conv2d_input(const Conv2d& p, const T* g, const T* w, T* gx) {
  if (p.c == p.groups) return depthwise_conv2d_input(p, g, w, gx);
  const Index c = p.c / p.groups, o = p.o / p.groups;
  const Scratch<Index> up(p.kh), left(p.kw), rows(p.kh), cols(p.kw), at(p.kh * p.kw);

  // Input row y = q * stride + phase is seen by output row (y + pad - r * dilation) / stride,
  // for those taps r for which this division leaves no remainder.
  const auto taps_of_phase = [](Index phase, Index pad, Index dilation, Index stride, Index count,
                                Index* tap, Index* shift) {
    Index found = 0;
    for (Index r = 0; r < count; ++r) {
      const Index distance = phase + pad - r * dilation;
      if (distance % stride == 0) {
        tap[found] = r;
        shift[found++] = distance / stride;
      }
    }
    return found;
  };
  const Index phases_h = smaller(p.stride_h, p.h), phases_w = smaller(p.stride_w, p.w);
  for (Index phase_h = 0; phase_h < phases_h; ++phase_h) {
    const Index kh =
        taps_of_phase(phase_h, p.pad_h, p.dilation_h, p.stride_h, p.kh, rows.get(), up.get());
    for (Index phase_w = 0; phase_w < phases_w; ++phase_w) {
      const Index kw =
          taps_of_phase(phase_w, p.pad_w, p.dilation_w, p.stride_w, p.kw, cols.get(), left.get());
      const Index qh = divide_up(p.h - phase_h, p.stride_h);
      const Index qw = divide_up(p.w - phase_w, p.stride_w), taps = kh * kw;
      for (Index t = 0; t < taps; ++t) {
        at.get()[t] = rows.get()[t / kw] * p.kw + cols.get()[t % kw];
      }
      T* first = gx + phase_h * p.w + phase_w;
      if (taps == 0) {  // no output ever saw these pixels
        parallel_for(p.n * p.c, [&](Index plane) {
          for (Index y = 0; y < qh; ++y) {
            T* line = first + (plane * p.h + y * p.stride_h) * p.w;
            for (Index q = 0; q < qw; ++q) line[q * p.stride_w] = 0;
          }
        });
        continue;
      }
      for (Index group = 0; group < p.groups; ++group) {
        const Im2col<T> image({g + group * o * p.oh * p.ow, p.o * p.oh * p.ow, p.oh * p.ow}, p.oh,
                              p.ow, qh, qw, {up.get(), kh, 1}, {left.get(), kw, 1});
        const Weights<T> weights{w + group * o * c * p.kh * p.kw, p.kh * p.kw, c * p.kh * p.kw,
                                 at.get(), taps};
        const Pixels<T> out{first + group * c * p.h * p.w,
                            p.c * p.h * p.w,
                            p.h * p.w,
                            qh,
                            qw,
                            p.w,
                            p.stride_h,
                            p.stride_w};
        gemm<T>(c, p.n * qh * qw, o * taps, taps, weights, image, out);
      }
    }
  }
}

}  // namespace minidl::MINIDL_ISA
