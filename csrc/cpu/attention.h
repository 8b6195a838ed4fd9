// How well each place fits what is to be said (minidl/ops/attention.py), in one pass over the
// places' vectors: e[n][i] = sum over a of w[a] tanh(u[n][i][a] + v[n][a]).
#pragma once

#include "threads.h"
#include "vector_math.h"

namespace minidl::MINIDL_ISA {

template <class T>
void additive_scores(const Places& s, const T* u, const T* v, const T* w, T* e) {
  parallel_for(s.n, [&](Index n) {
    for (Index i = 0; i < s.places; ++i) {
      const T* at = u + (n * s.places + i) * s.size;
      Vec<T> sum{};
      for (Index a = 0; a < s.size; a += kLanes<T>) {
        const Index left = s.size - a;
        const Vec<T> t =
            vtanh<T>(load_up_to(at + a, left, T(0)) + load_up_to(v + n * s.size + a, left, T(0)));
        sum += t * load_up_to(w + a, left, T(0));
      }
      e[n * s.places + i] = static_cast<T>(sum_of<T>(sum));
    }
  });
}

// tanh is computed again: that is quicker than to write it down and read it. gw is (n, size), for
// each n its share, so that the sum over them has one order.
template <class T>
void additive_scores_gradient(const Places& s, const T* g, const T* u, const T* v, const T* w,
                              T* gu, T* gv, T* gw) {
  parallel_for(s.n, [&](Index n) {
    for (Index a = 0; a < s.size; a += kLanes<T>) {
      const Index left = s.size - a;
      const Vec<T> of_v = load_up_to(v + n * s.size + a, left, T(0));
      const Vec<T> of_w = load_up_to(w + a, left, T(0));
      Vec<T> to_v{}, to_w{};
      for (Index i = 0; i < s.places; ++i) {
        const Index at = (n * s.places + i) * s.size + a;
        const Vec<T> t = vtanh<T>(load_up_to(u + at, left, T(0)) + of_v);
        const T ge = g[n * s.places + i];
        const Vec<T> d = ge * of_w * (T(1) - t * t);
        store_up_to(gu + at, d, left);
        to_v += d;
        to_w += ge * t;
      }
      store_up_to(gv + n * s.size + a, to_v, left);
      store_up_to(gw + n * s.size + a, to_w, left);
    }
  });
}

}  // namespace minidl::MINIDL_ISA
