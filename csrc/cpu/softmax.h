// Softmax, its logarithm, and cross entropy with class labels, forwards and backwards, each in one
// pass over the scores (minidl/ops/softmax.py, loss.py).
//
// x is (outer, classes, inner). A sample's scores lie side by side if inner is 1: then vectors run
// along the classes, and else along the samples.
#pragma once

#include "threads.h"
#include "vector_math.h"

namespace minidl::MINIDL_ISA {

// Samples a job: about 16,384 scores.
inline Index samples_a_job(Index classes) { return larger(1, 16384 / larger(1, classes)); }

template <class T>
MINIDL_INLINE T largest_of(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  T best = lanes[0];
  for (Index i = 1; i < kLanes<T>; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

constexpr double kInfinity = __builtin_inf();

// The largest score and the sum of exp(score - largest). (A NaN is not the largest, but makes the
// sum NaN, and so all that is computed from it.)
template <class T>
struct Row {
  T largest;
  double sum;
  Row(const T* x, Index n) {
    Vec<T> most = broadcast(static_cast<T>(-kInfinity));
    for (Index i = 0; i < n; i += kLanes<T>) {
      const Vec<T> v = load_up_to(x + i, n - i, static_cast<T>(-kInfinity));
      most = v > most ? v : most;
    }
    largest = largest_of<T>(most);
    // Beyond the end: exp(-inf) = 0, also where largest is -inf and the sum is NaN anyway.
    Total<T> total;
    for (Index i = 0; i < n; i += kLanes<T>) {
      total.add(vexp<T>(load_up_to(x + i, n - i, static_cast<T>(-kInfinity)) - largest));
    }
    sum = total.value();
  }
};

// The same for as many samples as a vector has lanes, `inner` elements from score to score.
template <class T>
struct Columns {
  Vec<T> largest, sum;
  Columns(const T* x, Index classes, Index inner, Index count) {
    largest = broadcast(static_cast<T>(-kInfinity));
    for (Index c = 0; c < classes; ++c) {
      const Vec<T> v = load_up_to(x + c * inner, count, T(0));
      largest = v > largest ? v : largest;
    }
    sum = Vec<T>{};
    for (Index c = 0; c < classes; ++c) {
      sum += vexp<T>(load_up_to(x + c * inner, count, T(0)) - largest);
    }
  }
};

// Calls row(sample) for every sample if their scores lie side by side, and otherwise
// columns(outer, i, count) for every vector of them.
template <class R, class C>
void for_samples(const Scores& s, Index lanes, const R& row, const C& columns) {
  if (s.inner == 1) {
    const Index together = samples_a_job(s.classes);
    parallel_for(divide_up(s.outer, together), [&](Index job) {
      for (Index n = job * together; n < smaller(s.outer, (job + 1) * together); ++n) row(n);
    });
    return;
  }
  const Index vectors = divide_up(s.inner, lanes);
  const Index together = divide_up(samples_a_job(s.classes), lanes);
  parallel_for(divide_up(s.outer * vectors, together), [&](Index job) {
    for (Index v = job * together; v < smaller(s.outer * vectors, (job + 1) * together); ++v) {
      const Index i = v % vectors * lanes;
      columns(v / vectors, i, smaller(lanes, s.inner - i));
    }
  });
}

template <class T>
void softmax(const Scores& s, const T* x, T* y) {
  const auto row = [&](Index n) {
    const T* in = x + n * s.classes;
    T* out = y + n * s.classes;
    const Row<T> r(in, s.classes);
    const T inverse = static_cast<T>(1 / r.sum);
    for (Index i = 0; i < s.classes; i += kLanes<T>) {
      const Index left = s.classes - i;
      store_up_to(out + i, vexp<T>(load_up_to(in + i, left, T(0)) - r.largest) * inverse, left);
    }
  };
  const auto columns = [&](Index o, Index i, Index count) {
    const Index at = o * s.classes * s.inner + i;
    const Columns<T> r(x + at, s.classes, s.inner, count);
    for (Index c = 0; c < s.classes; ++c) {
      const Index k = at + c * s.inner;
      store_up_to(y + k, vexp<T>(load_up_to(x + k, count, T(0)) - r.largest) / r.sum, count);
    }
  };
  for_samples(s, kLanes<T>, row, columns);
}

template <class T>
MINIDL_INLINE Vec<T> log_of(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (Index i = 0; i < kLanes<T>; ++i) {
    lanes[i] = static_cast<T>(__builtin_log(static_cast<double>(lanes[i])));
  }
  return load(lanes);
}

template <class T>
void log_softmax(const Scores& s, const T* x, T* y) {
  const auto row = [&](Index n) {
    const T* in = x + n * s.classes;
    T* out = y + n * s.classes;
    const Row<T> r(in, s.classes);
    const T log_sum = static_cast<T>(__builtin_log(r.sum));
    for (Index i = 0; i < s.classes; i += kLanes<T>) {
      const Index left = s.classes - i;
      store_up_to(out + i, (load_up_to(in + i, left, T(0)) - r.largest) - log_sum, left);
    }
  };
  const auto columns = [&](Index o, Index i, Index count) {
    const Index at = o * s.classes * s.inner + i;
    const Columns<T> r(x + at, s.classes, s.inner, count);
    const Vec<T> log_sum = log_of<T>(r.sum);
    for (Index c = 0; c < s.classes; ++c) {
      const Index k = at + c * s.inner;
      store_up_to(y + k, (load_up_to(x + k, count, T(0)) - r.largest) - log_sum, count);
    }
  };
  for_samples(s, kLanes<T>, row, columns);
}

// gx = y (g - sum(g y)) for softmax, and g - exp(y) sum(g) for its logarithm.
template <class T, bool kLog>
void softmax_backward(const Scores& s, const T* g, const T* y, T* gx) {
  const auto term = [](Vec<T> gi, Vec<T> yi) { return kLog ? gi : gi * yi; };
  const auto result = [](Vec<T> gi, Vec<T> yi, Vec<T> sum) {
    if constexpr (kLog) {
      return gi - vexp<T>(yi) * sum;
    } else {
      return gi * yi - yi * sum;
    }
  };
  const auto row = [&](Index n) {
    const Index at = n * s.classes;
    Total<T> total;
    for (Index i = 0; i < s.classes; i += kLanes<T>) {
      const Index left = s.classes - i;
      total.add(term(load_up_to(g + at + i, left, T(0)), load_up_to(y + at + i, left, T(0))));
    }
    const Vec<T> sum = broadcast(static_cast<T>(total.value()));
    for (Index i = 0; i < s.classes; i += kLanes<T>) {
      const Index k = at + i, left = s.classes - i;
      const Vec<T> gi = load_up_to(g + k, left, T(0)), yi = load_up_to(y + k, left, T(0));
      store_up_to(gx + k, result(gi, yi, sum), left);
    }
  };
  const auto columns = [&](Index o, Index i, Index count) {
    const Index at = o * s.classes * s.inner + i;
    Vec<T> sum{};
    for (Index c = 0; c < s.classes; ++c) {
      const Index k = at + c * s.inner;
      sum += term(load_up_to(g + k, count, T(0)), load_up_to(y + k, count, T(0)));
    }
    for (Index c = 0; c < s.classes; ++c) {
      const Index k = at + c * s.inner;
      const Vec<T> gi = load_up_to(g + k, count, T(0)), yi = load_up_to(y + k, count, T(0));
      store_up_to(gx + k, result(gi, yi, sum), count);
    }
  };
  for_samples(s, kLanes<T>, row, columns);
}

template <class T>
void softmax_gradient(const Scores& s, const T* g, const T* y, T* gx) {
  softmax_backward<T, false>(s, g, y, gx);
}
template <class T>
void log_softmax_gradient(const Scores& s, const T* g, const T* y, T* gx) {
  softmax_backward<T, true>(s, g, y, gx);
}

// ---- Cross entropy ------------------------------------------------------------------------------
//
// loss = -sum_c q_c log p_c, where q has w_label (1 - smoothing) at the label, and for every class
// c smoothing / classes * w_c besides. Its gradient is p sum(q) - q.

template <class T>
MINIDL_INLINE double weight_of(const T* weight, Index c) {
  return weight ? static_cast<double>(weight[c]) : 1.0;
}

template <class T>
void cross_entropy(const Scores& s, const T* x, const Index* label, const T* weight, T smoothing,
                   T* loss) {
  const double share = static_cast<double>(smoothing) / static_cast<double>(s.classes);
  // The scores of sample i of image o begin at `in`, `inner` apart.
  const auto one = [&](Index n, const T* in, double largest, double log_sum) {
    if (label[n] < 0 || label[n] >= s.classes) {
      loss[n] = T(0);
      return;
    }
    const auto log_p = [&](Index c) {
      return (static_cast<double>(in[c * s.inner]) - largest) - log_sum;
    };
    // A class of weight 0 does not count, however unlikely it is: 0 log 0 = 0.
    const double at_label = weight_of(weight, label[n]) * (1 - static_cast<double>(smoothing));
    double sum = at_label == 0 ? 0.0 : at_label * log_p(label[n]);
    if (share != 0) {
      for (Index c = 0; c < s.classes; ++c) {
        const double q = share * weight_of(weight, c);
        if (q != 0) sum += q * log_p(c);
      }
    }
    loss[n] = static_cast<T>(-sum);
  };
  const auto row = [&](Index n) {
    const Row<T> r(x + n * s.classes, s.classes);
    one(n, x + n * s.classes, static_cast<double>(r.largest), __builtin_log(r.sum));
  };
  const auto columns = [&](Index o, Index i, Index count) {
    const T* in = x + o * s.classes * s.inner + i;
    const Columns<T> r(in, s.classes, s.inner, count);
    T largest[kLanes<T>], sum[kLanes<T>];
    store(largest, r.largest);
    store(sum, r.sum);
    for (Index k = 0; k < count; ++k) {
      one(o * s.inner + i + k, in + k, static_cast<double>(largest[k]),
          __builtin_log(static_cast<double>(sum[k])));
    }
  };
  for_samples(s, kLanes<T>, row, columns);
}

// g holds one number for each sample, or (one_g) one for all.
template <class T>
void cross_entropy_gradient(const Scores& s, const T* g, bool one_g, const T* x, const Index* label,
                            const T* weight, T smoothing, T* gx) {
  const T share = smoothing / static_cast<T>(s.classes);
  double all_weights = 0;
  for (Index c = 0; c < s.classes; ++c) all_weights += weight_of(weight, c);
  const auto counts = [&](Index n) { return label[n] >= 0 && label[n] < s.classes; };
  const auto at_label = [&](Index n) {
    return static_cast<T>(weight_of(weight, label[n])) * (T(1) - smoothing);
  };
  const auto sum_q = [&](Index n) { return at_label(n) + share * static_cast<T>(all_weights); };

  const auto row = [&](Index n) {
    const T* in = x + n * s.classes;
    T* out = gx + n * s.classes;
    if (!counts(n)) {
      // As the formula does: 0 of ordinary scores, but NaN where the probabilities are NaN.
      const Row<T> r(in, s.classes);
      for (Index c = 0; c < s.classes; ++c) out[c] = r.sum == r.sum ? T(0) : static_cast<T>(r.sum);
      return;
    }
    const T gn = g[one_g ? 0 : n];
    const Row<T> r(in, s.classes);
    const T factor = static_cast<T>(static_cast<double>(sum_q(n)) / r.sum);
    for (Index i = 0; i < s.classes; i += kLanes<T>) {
      const Index left = s.classes - i;
      Vec<T> q{};
      if (share != 0) {
        q = weight ? load_up_to(weight + i, left, T(0)) * share : broadcast(share);
      }
      const Vec<T> e = vexp<T>(load_up_to(in + i, left, T(0)) - r.largest);
      store_up_to(out + i, (e * factor - q) * gn, left);
    }
    out[label[n]] -= at_label(n) * gn;
  };
  const auto columns = [&](Index o, Index i, Index count) {
    const Index at = o * s.classes * s.inner + i;
    const Columns<T> r(x + at, s.classes, s.inner, count);
    T factors[kLanes<T>] = {}, gs[kLanes<T>] = {}, counted[kLanes<T>] = {};
    for (Index k = 0; k < count; ++k) {
      const Index n = o * s.inner + i + k;
      gs[k] = g[one_g ? 0 : n];
      counted[k] = counts(n);
      factors[k] = counts(n) ? sum_q(n) : T(0);
    }
    const Vec<T> gn = load(gs), factor = load(factors) / r.sum, counting = load(counted) * share;
    for (Index c = 0; c < s.classes; ++c) {
      const Index k = at + c * s.inner;
      const Vec<T> e = vexp<T>(load_up_to(x + k, count, T(0)) - r.largest);
      const Vec<T> q = counting * (weight ? weight[c] : T(1));
      store_up_to(gx + k, (e * factor - q) * gn, count);
    }
    for (Index k = 0; k < count; ++k) {
      const Index n = o * s.inner + i + k;
      if (counts(n)) gx[at + label[n] * s.inner + k] -= at_label(n) * gs[k];
    }
  };
  for_samples(s, kLanes<T>, row, columns);
}

}  // namespace minidl::MINIDL_ISA
