// Convolution with one input channel in each group (depthwise). There is no sum over channels, so a
// matrix product would have nothing to reuse: each plane is correlated with its own few taps, a
// vector of neighbouring pixels at a time.
#pragma once

#include "scratch.h"
#include "simd.h"
#include "threads.h"

namespace minidl::MINIDL_ISA {

// With many outputs for each input channel a matrix product has something to reuse after all.
inline bool depthwise(const Conv2d& p) { return p.c == p.groups && p.o < 4 * p.groups; }

// A copy of one plane with zeros around it, so wide that whole vectors can be read at every tap.
// Its columns are sorted by their residue modulo the stride, so that the pixels which one tap
// sees lie side by side.
template <class T>
class PaddedPlane {
 public:
  // Serves out_h x out_w outputs of a kernel that reaches over reach_h x reach_w. pad_h lines and
  // pad_w columns come before the plane (if negative, as many of the plane are left out).
  PaddedPlane(Index h, Index w, Index pad_h, Index pad_w, Index out_h, Index out_w, Index reach_h,
              Index reach_w, Index stride_h, Index stride_w)
      : h_(h),
        w_(w),
        pad_h_(pad_h),
        pad_w_(pad_w),
        stride_w_(stride_w),
        lines_((out_h - 1) * stride_h + reach_h),
        width_(divide_up((round_up(out_w, kLanes<T>) - 1) * stride_w + reach_w, stride_w)),
        row_step_(stride_h * stride_w * width_),
        memory_(lines_ * stride_w * width_) {}

  void fill(const T* plane) const {
    for (Index phase = 0; phase < stride_w_; ++phase) {
      const Index shift = phase - pad_w_;  // element i is column i * stride + shift of the plane
      const Index begin = smaller(width_, shift >= 0 ? 0 : divide_up(-shift, stride_w_));
      const Index end = smaller(width_, divide_down(w_ - 1 - shift, stride_w_) + 1);
      for (Index line = 0; line < lines_; ++line) {
        T* dst = memory_.get() + (line * stride_w_ + phase) * width_;
        const Index y = line - pad_h_, stop = y < 0 || y >= h_ ? begin : larger(begin, end);
        const T* src = plane + y * w_ + shift;
        for (Index i = 0; i < begin; ++i) dst[i] = 0;
        if (stride_w_ == 1) {
          for (Index i = begin; i < stop; ++i) dst[i] = src[i];
        } else {
          for (Index i = begin; i < stop; ++i) dst[i] = src[i * stride_w_];
        }
        for (Index i = stop; i < width_; ++i) dst[i] = 0;
      }
    }
  }

  // What the first output sees at `down` lines and `right` columns from its corner. The next
  // output's is the next element, the next row's is row_step() on.
  const T* at(Index down, Index right) const {
    return memory_.get() + (down * stride_w_ + right % stride_w_) * width_ + right / stride_w_;
  }

  Index row_step() const { return row_step_; }

 private:
  Index h_, w_, pad_h_, pad_w_, stride_w_, lines_, width_, row_step_;
  Scratch<T> memory_;
};

// V vectors of one output row: y = `first`, or y, + the sum over taps of weight[t] * tap[t][offset
// ...].
template <class T, int V>
MINIDL_INLINE void correlate_vectors(Index taps, const T* const* tap, Index offset, const T* weight,
                                     T first, T* y, Index columns, bool add) {
  Vec<T> sum[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) sum[v] = Vec<T>{} + first;
  for (Index t = 0; t < taps; ++t) {
    const T* x = tap[t] + offset;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[v] += weight[t] * load(x + v * kLanes<T>);
  }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v, y += kLanes<T>, columns -= kLanes<T>) {
    if (columns >= kLanes<T>) {
      store(y, add ? load(y) + sum[v] : sum[v]);
    } else {
      T last[kLanes<T>];
      store(last, sum[v]);
      for (Index i = 0; i < columns; ++i) y[i] = add ? y[i] + last[i] : last[i];
    }
  }
}

template <class T>
void correlate(const PaddedPlane<T>& plane, Index taps, const T* const* tap, const T* weight,
               T first, T* y, Index out_h, Index out_w, bool add) {
  for (Index row = 0; row < out_h; ++row, y += out_w) {
    Index q = 0;
    for (; q + 3 * kLanes<T> < out_w; q += 4 * kLanes<T>) {
      correlate_vectors<T, 4>(taps, tap, row * plane.row_step() + q, weight, first, y + q,
                              out_w - q, add);
    }
    for (; q < out_w; q += kLanes<T>) {
      // The last vector is a whole one too: it computes some pixels again (unless it adds to them).
      const Index at = add || out_w < kLanes<T> ? q : smaller(q, out_w - kLanes<T>);
      correlate_vectors<T, 1>(taps, tap, row * plane.row_step() + at, weight, first, y + at,
                              out_w - at, add);
    }
  }
}

template <class T>
void depthwise_conv2d(const Conv2d& p, const T* x, const T* w, const T* bias, T* y) {
  const Index many = p.o / p.groups, taps = p.kh * p.kw;  // `many` outputs for each input channel
  parallel_for(p.n * p.c, [&](Index job) {
    const Index image = job / p.c, c = job % p.c;
    const PaddedPlane<T> plane(p.h, p.w, p.pad_h, p.pad_w, p.oh, p.ow,
                               (p.kh - 1) * p.dilation_h + 1, (p.kw - 1) * p.dilation_w + 1,
                               p.stride_h, p.stride_w);
    const Scratch<const T*> tap(taps);
    for (Index t = 0; t < taps; ++t) {
      tap.get()[t] = plane.at(t / p.kw * p.dilation_h, t % p.kw * p.dilation_w);
    }
    plane.fill(x + job * p.h * p.w);
    for (Index o = c * many; o < (c + 1) * many; ++o) {
      T* to = y + (image * p.o + o) * p.oh * p.ow;
      correlate(plane, taps, tap.get(), w + o * taps, bias ? bias[o] : T(0), to, p.oh, p.ow, false);
      if (!p.relu) continue;
      for (Index i = 0; i < p.oh * p.ow; ++i) to[i] = to[i] < 0 ? 0 : to[i];  // NaN stays NaN
    }
  });
}

// The output positions [begin, end) that see an input position, `shift` from theirs, inside [0,
// in).
struct Inside {
  Index begin, end;
  Inside(Index out, Index in, Index stride, Index shift)
      : begin(smaller(out, shift >= 0 ? 0 : divide_up(-shift, stride))),
        end(larger(begin, smaller(out, divide_down(in - 1 - shift, stride) + 1))) {}
};

template <class T>
void depthwise_conv2d_input(const Conv2d& p, const T* g, const T* w, T* gx) {
  const Index many = p.o / p.groups, taps = p.kh * p.kw;
  const Index reach_h = (p.kh - 1) * p.dilation_h, reach_w = (p.kw - 1) * p.dilation_w;

  // Without a stride: g correlated with the kernel turned by 180 degrees.
  if (p.stride_h == 1 && p.stride_w == 1) {
    parallel_for(p.n * p.c, [&](Index job) {
      const Index image = job / p.c, c = job % p.c;
      const PaddedPlane<T> plane(p.oh, p.ow, reach_h - p.pad_h, reach_w - p.pad_w, p.h, p.w,
                                 reach_h + 1, reach_w + 1, 1, 1);
      const Scratch<const T*> tap(taps);
      for (Index t = 0; t < taps; ++t) {
        tap.get()[t] =
            plane.at(reach_h - t / p.kw * p.dilation_h, reach_w - t % p.kw * p.dilation_w);
      }
      for (Index o = c * many; o < (c + 1) * many; ++o) {
        plane.fill(g + (image * p.o + o) * p.oh * p.ow);
        correlate(plane, taps, tap.get(), w + o * taps, T(0), gx + job * p.h * p.w, p.h, p.w,
                  o > c * many);
      }
    });
    return;
  }

  // With one: each output adds its share to the inputs that it saw.
  parallel_for(p.n * p.c, [&](Index job) {
    const Index image = job / p.c, c = job % p.c;
    T* plane = gx + job * p.h * p.w;
    std::memset(plane, 0, static_cast<std::size_t>(p.h * p.w) * sizeof(T));
    for (Index o = c * many; o < (c + 1) * many; ++o) {
      const T* g_plane = g + (image * p.o + o) * p.oh * p.ow;
      for (Index r = 0; r < p.kh; ++r) {
        const Index down = r * p.dilation_h - p.pad_h;
        const Inside rows(p.oh, p.h, p.stride_h, down);
        for (Index s = 0; s < p.kw; ++s) {
          const Index right = s * p.dilation_w - p.pad_w;
          const Inside columns(p.ow, p.w, p.stride_w, right);
          const T weight = w[o * taps + r * p.kw + s];
          for (Index y = rows.begin; y < rows.end; ++y) {
            T* to = plane + (y * p.stride_h + down) * p.w + right;
            const T* from = g_plane + y * p.ow;
            for (Index q = columns.begin; q < columns.end; ++q) {
              to[q * p.stride_w] += weight * from[q];
            }
          }
        }
      }
    }
  });
}

// sum[t] += the inner product of g (rows of whole vectors) with what tap t sees, for N taps.
template <class T, int N>
void inner_products(Index rows, Index width, const T* g, const T* const* tap, Index row_step,
                    T* sum) {
  Vec<T> total[N] = {};  // a sum for each lane, added up at the end
  for (Index row = 0; row < rows; ++row, g += width) {
    for (Index q = 0; q < width; q += kLanes<T>) {
      const Vec<T> b = load(g + q);
#pragma GCC unroll 8
      for (int t = 0; t < N; ++t) total[t] += b * load(tap[t] + row * row_step + q);
    }
  }
  for (int t = 0; t < N; ++t) {
    T all = 0;
    for (Index lane = 0; lane < kLanes<T>; ++lane) all += total[t][lane];
    sum[t] += all;
  }
}

template <class T>
void depthwise_conv2d_weight(const Conv2d& p, const T* g, const T* x, T* gw) {
  const Index many = p.o / p.groups, taps = p.kh * p.kw;
  const Index width = round_up(p.ow, kLanes<T>);
  parallel_for(p.o, [&](Index o) {
    const PaddedPlane<T> plane(p.h, p.w, p.pad_h, p.pad_w, p.oh, p.ow,
                               (p.kh - 1) * p.dilation_h + 1, (p.kw - 1) * p.dilation_w + 1,
                               p.stride_h, p.stride_w);
    const PaddedPlane<T> whole(p.oh, p.ow, 0, 0, p.oh, p.ow, 1, 1, 1, 1);  // g in whole vectors
    const Scratch<const T*> tap(taps);
    for (Index t = 0; t < taps; ++t) {
      tap.get()[t] = plane.at(t / p.kw * p.dilation_h, t % p.kw * p.dilation_w);
      gw[o * taps + t] = 0;
    }
    for (Index image = 0; image < p.n; ++image) {
      plane.fill(x + (image * p.c + o / many) * p.h * p.w);
      whole.fill(g + (image * p.o + o) * p.oh * p.ow);
      Index t = 0;
      for (; t + 3 <= taps; t += 3) {
        inner_products<T, 3>(p.oh, width, whole.at(0, 0), tap.get() + t, plane.row_step(),
                             gw + o * taps + t);
      }
      for (; t < taps; ++t) {
        inner_products<T, 1>(p.oh, width, whole.at(0, 0), tap.get() + t, plane.row_step(),
                             gw + o * taps + t);
      }
    }
  });
}

}  // namespace minidl::MINIDL_ISA
