// ReLU and its gradient: one pass, on all threads.
#pragma once

#include "simd.h"
#include "threads.h"

namespace minidl::MINIDL_ISA {

constexpr Index kElements = 32768;  // a job

template <class T>
void relu(Index n, const T* x, T* y) {
  parallel_for(divide_up(n, kElements), [&](Index job) {
    for (Index i = job * kElements; i < smaller(n, (job + 1) * kElements); ++i) {
      y[i] = x[i] < T(0) ? T(0) : x[i];  // NaN stays
    }
  });
}

template <class T>
void relu_gradient(Index n, const T* g, const T* y, T* gx) {
  parallel_for(divide_up(n, kElements), [&](Index job) {
    for (Index i = job * kElements; i < smaller(n, (job + 1) * kElements); ++i) {
      gx[i] = g[i] * (y[i] > T(0) ? T(1) : T(0));  // 0 times infinity is NaN, as in the rule
    }
  });
}

}  // namespace minidl::MINIDL_ISA
