// Normalisation: each group of elements to mean 0 and variance 1, times weight plus bias
// (minidl/ops/norm.py is the formula). A group is read from memory once and then from a cache:
// first for its mean, again for its variance, again to be written.
#pragma once

#include "scratch.h"
#include "threads.h"
#include "vector_math.h"

namespace minidl::MINIDL_ISA {

// A job for every group, or for several if they are small.
template <class F>
void for_groups(const Norm& s, const F& f) {
  const Index together = larger(1, 8192 / larger(1, s.runs * s.length));
  parallel_for(divide_up(s.groups, together), [&](Index job) {
    for (Index g = job * together; g < smaller(s.groups, (job + 1) * together); ++g) f(g);
  });
}

template <class T>
struct Run {
  const Norm& s;
  Index group, run;
  Index begin() const { return group * s.group_stride + run * s.run_stride; }
  Index weight() const { return group % s.weight_period * s.weight_stride + run * s.weight_step; }
};

// weight[i ...] of a run, or the one that the run shares; without weights, `none`.
template <class T>
MINIDL_INLINE Vec<T> weight_at(const Norm& s, const T* weight, Index at, Index i, Index count,
                               T none) {
  if (!weight) return broadcast(none);
  return s.along ? load_up_to(weight + at + i, count, T(0)) : broadcast(weight[at]);
}

template <class T>
void statistics(const Norm& s, const T* x, T* mean, T* variance) {
  for_groups(s, [&](Index g) {
    const double count = static_cast<double>(s.runs * s.length);
    Total<T> sum;
    for (Index r = 0; r < s.runs; ++r) {
      const T* p = x + Run<T>{s, g, r}.begin();
      for (Index i = 0; i < s.length; i += kLanes<T>) {
        sum.add(load_up_to(p + i, s.length - i, T(0)));
      }
    }
    const T mu = static_cast<T>(sum.value() / count);
    Total<T> squares;
    for (Index r = 0; r < s.runs; ++r) {
      const T* p = x + Run<T>{s, g, r}.begin();
      for (Index i = 0; i < s.length; i += kLanes<T>) {
        const Vec<T> away = load_up_to(p + i, s.length - i, mu) - mu;
        squares.add(away * away);
      }
    }
    mean[g] = mu;
    variance[g] = static_cast<T>(squares.value() / count);
  });
}

template <class T>
T reciprocal_root(T variance, T eps) {
  return static_cast<T>(1 /
                        __builtin_sqrt(static_cast<double>(variance) + static_cast<double>(eps)));
}

template <class T>
void standardize(const Norm& s, T eps, const T* x, const T* weight, const T* bias, const T* mean,
                 const T* variance, T* y) {
  for_groups(s, [&](Index g) {
    const T mu = mean[g], rstd = reciprocal_root(variance[g], eps);
    for (Index r = 0; r < s.runs; ++r) {
      const Run<T> run{s, g, r};
      const Index begin = run.begin(), at = run.weight();
      for (Index i = 0; i < s.length; i += kLanes<T>) {
        const Index left = s.length - i;
        const Vec<T> w = weight_at(s, weight, at, i, left, T(1)) * rstd;
        const Vec<T> b = weight_at(s, bias, at, i, left, T(0));
        store_up_to(y + begin + i, (load_up_to(x + begin + i, left, T(0)) - mu) * w + b, left);
      }
    }
  });
}

// With x^ = (x - mean) rstd and h = g weight:  gx = (h - mean(h) - x^ mean(h x^)) rstd,
// gw = sum g x^, gb = sum g.
template <class T>
void standardize_gradient(const Norm& s, T eps, const T* g, const T* x, const T* weight,
                          const T* mean, const T* variance, T* gx, T* gw, T* gb) {
  // Several groups add to the same weight, if there are more groups than periods, or if the
  // weights lie along the runs: each part, a range of groups, sums into an array of its own.
  const Index per_group = s.along ? s.length : s.weight_step ? s.runs * s.weight_step : 1;
  const Index weights = (s.weight_period - 1) * s.weight_stride + per_group;
  const bool own = !s.along && s.groups == s.weight_period;
  const Index parts = own ? 1 : smaller(32, s.groups);
  const Index in_part = own ? 1 : divide_up(s.groups, parts);
  const Scratch<T> sums(own ? 1 : 2 * parts * weights);

  parallel_for(own ? s.groups : parts, [&](Index job) {
    T* to_w = own ? gw : sums.get() + 2 * job * weights;
    T* to_b = own ? gb : to_w + weights;
    if (!own) std::memset(to_w, 0, static_cast<std::size_t>(2 * weights) * sizeof(T));
    for (Index group = job * in_part; group < smaller(s.groups, (job + 1) * in_part); ++group) {
      const T mu = mean[group], rstd = reciprocal_root(variance[group], eps);
      double total_h = 0, total_hx = 0, total_g = 0, total_gx = 0;
      for (Index r = 0; r < s.runs; ++r) {
        const Run<T> run{s, group, r};
        const Index begin = run.begin(), at = run.weight();
        Total<T> sum_g, sum_gx, sum_h, sum_hx;
        for (Index i = 0; i < s.length; i += kLanes<T>) {
          const Index left = s.length - i;
          const Vec<T> gi = load_up_to(g + begin + i, left, T(0));
          const Vec<T> gxi = gi * ((load_up_to(x + begin + i, left, mu) - mu) * rstd);
          if (s.along) {
            const Vec<T> w = weight_at(s, weight, at, i, left, T(1));
            sum_h.add(gi * w);
            sum_hx.add(gxi * w);
            T* const pw = to_w + at + i;
            T* const pb = to_b + at + i;
            store_up_to(pw, load_up_to(pw, left, T(0)) + gxi, left);
            store_up_to(pb, load_up_to(pb, left, T(0)) + gi, left);
          } else {
            sum_g.add(gi);
            sum_gx.add(gxi);
          }
        }
        if (s.along) {
          total_h += sum_h.value();
          total_hx += sum_hx.value();
          continue;
        }
        const double run_g = sum_g.value(), run_gx = sum_gx.value();
        const double w = weight ? static_cast<double>(weight[at]) : 1.0;
        total_h += run_g * w;
        total_hx += run_gx * w;
        if (s.weight_step) {
          to_w[at] = (own ? T(0) : to_w[at]) + static_cast<T>(run_gx);
          to_b[at] = (own ? T(0) : to_b[at]) + static_cast<T>(run_g);
        } else {
          total_g += run_g;
          total_gx += run_gx;
        }
      }
      if (!s.along && !s.weight_step) {
        const Index at = Run<T>{s, group, 0}.weight();
        to_w[at] = (own ? T(0) : to_w[at]) + static_cast<T>(total_gx);
        to_b[at] = (own ? T(0) : to_b[at]) + static_cast<T>(total_g);
      }

      const double count = static_cast<double>(s.runs * s.length);
      const T mean_h = static_cast<T>(total_h / count), mean_hx = static_cast<T>(total_hx / count);
      for (Index r = 0; r < s.runs; ++r) {
        const Run<T> run{s, group, r};
        const Index begin = run.begin(), at = run.weight();
        for (Index i = 0; i < s.length; i += kLanes<T>) {
          const Index left = s.length - i;
          const Vec<T> h =
              load_up_to(g + begin + i, left, T(0)) * weight_at(s, weight, at, i, left, T(1));
          const Vec<T> normal = (load_up_to(x + begin + i, left, mu) - mu) * rstd;
          store_up_to(gx + begin + i, (h - mean_h - normal * mean_hx) * rstd, left);
        }
      }
    }
  });
  if (own) return;
  for (Index i = 0; i < weights; ++i) {
    double total_w = 0, total_b = 0;
    for (Index part = 0; part < parts; ++part) {
      total_w += static_cast<double>(sums.get()[2 * part * weights + i]);
      total_b += static_cast<double>(sums.get()[(2 * part + 1) * weights + i]);
    }
    gw[i] = static_cast<T>(total_w);
    gb[i] = static_cast<T>(total_b);
  }
}

// y = x * scale + shift, one of each for a channel: batch norm with given statistics.
template <class T>
void scale_shift(Index planes, Index channels, Index size, const T* x, const T* scale,
                 const T* shift, T* y) {
  const Index together = larger(1, 16384 / larger(1, size));
  parallel_for(divide_up(planes, together), [&](Index job) {
    for (Index plane = job * together; plane < smaller(planes, (job + 1) * together); ++plane) {
      const T a = scale[plane % channels], b = shift[plane % channels];
      const T* in = x + plane * size;
      T* out = y + plane * size;
      for (Index i = 0; i < size; ++i) out[i] = in[i] * a + b;
    }
  });
}

}  // namespace minidl::MINIDL_ISA
