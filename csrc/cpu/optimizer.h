// One step of an optimizer for all parameters in one call; minidl/optim has the formulas.
//
// Each element is updated from itself alone, so it is read and written once: what NumPy does in ten
// passes over memory takes one. Parameters are cut into chunks, which are the jobs.
#pragma once

#include "scratch.h"
#include "simd.h"
#include "threads.h"

namespace minidl::MINIDL_ISA {

constexpr Index kChunk = 16384;

template <class T>
MINIDL_INLINE T root(T x) {
  if constexpr (sizeof(T) == 4) {
    return __builtin_sqrtf(x);
  } else {
    return __builtin_sqrt(x);
  }
}

// The gradient that counts: of the loss with its L2 penalty, or of the loss to be maximised.
template <class T>
MINIDL_INLINE T decayed(T g, bool maximize, T weight_decay, T p) {
  g = maximize ? -g : g;
  return weight_decay != 0 ? g + weight_decay * p : g;
}

// Calls update(slice, begin, end) for every chunk of every parameter.
template <class T, class F>
void for_chunks(Index count, const Slice<T>* slices, const F& update) {
  const Scratch<Index> ends(count);  // how many chunks there are up to and with a parameter
  Index chunks = 0;
  for (Index i = 0; i < count; ++i) ends.get()[i] = chunks += divide_up(slices[i].size, kChunk);
  parallel_for(chunks, [&](Index chunk) {
    Index low = 0, high = count - 1;
    while (low < high) {  // the first parameter that ends after this chunk
      const Index middle = (low + high) / 2;
      if (ends.get()[middle] > chunk) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    const Slice<T>& slice = slices[low];
    const Index begin = (chunk - (low ? ends.get()[low - 1] : 0)) * kChunk;
    update(slice, begin, smaller(slice.size, begin + kChunk));
  });
}

template <class T>
void sgd(const Sgd<T>& s, Index count, const Slice<T>* slices) {
  for_chunks(count, slices, [&](const Slice<T>& slice, Index begin, Index end) {
    T* __restrict p = slice.p;
    const T* __restrict gradient = slice.g;
    T* __restrict v = slice.state[0];
    for (Index i = begin; i < end; ++i) {
      T g = decayed(gradient[i], s.maximize, s.weight_decay, p[i]);
      if (v) {
        v[i] = slice.first ? g : s.momentum * v[i] + s.share * g;
        g = s.nesterov ? g + s.momentum * v[i] : v[i];
      }
      p[i] -= s.lr * g;
    }
  });
}

// What some optimizers do only with a setting is a parameter of the template: a branch around a
// load or a store keeps the compiler from making vectors of a loop.

template <bool kAmsgrad, class T>
void adam_chunk(const Adam<T>& settings, const Slice<T>& slice, Index begin, Index end) {
  const Adam<T> s = settings;  // a copy, which no store below can change
  T* __restrict p = slice.p;
  const T* __restrict gradient = slice.g;
  T* __restrict m = slice.state[0];
  T* __restrict v = slice.state[1];
  T* __restrict largest = slice.state[2];
  const T step_size = slice.step_size, correction = slice.correction;
  for (Index i = begin; i < end; ++i) {
    const T g = decayed(gradient[i], s.maximize, s.weight_decay, p[i]);
    m[i] = s.beta1 * m[i] + s.one_less_beta1 * g;
    v[i] = s.beta2 * v[i] + s.one_less_beta2 * (g * g);
    T square = v[i];
    if constexpr (kAmsgrad) {
      const bool keep = (largest[i] > square) | (largest[i] != largest[i]);  // NaN stays
      square = largest[i] = keep ? largest[i] : square;
    }
    p[i] = s.shrink * p[i] - step_size * (m[i] / (root(square) / correction + s.eps));
  }
}

template <class T>
void adam(const Adam<T>& s, Index count, const Slice<T>* slices) {
  for_chunks(count, slices, [&](const Slice<T>& slice, Index begin, Index end) {
    const auto update = slice.state[2] ? adam_chunk<true, T> : adam_chunk<false, T>;
    update(s, slice, begin, end);
  });
}

template <bool kCentered, bool kMomentum, class T>
void rmsprop_chunk(const RmsProp<T>& settings, const Slice<T>& slice, Index begin, Index end) {
  const RmsProp<T> s = settings;
  T* __restrict p = slice.p;
  const T* __restrict gradient = slice.g;
  T* __restrict v = slice.state[0];
  T* __restrict m = slice.state[1];
  T* __restrict buffer = slice.state[2];
  for (Index i = begin; i < end; ++i) {
    const T g = decayed(gradient[i], s.maximize, s.weight_decay, p[i]);
    v[i] = s.alpha * v[i] + s.one_less_alpha * (g * g);
    T variance = v[i];
    if constexpr (kCentered) {
      m[i] = s.alpha * m[i] + s.one_less_alpha * g;
      variance -= m[i] * m[i];
    }
    T step = g / (root(variance) + s.eps);
    if constexpr (kMomentum) step = buffer[i] = s.momentum * buffer[i] + step;
    p[i] -= s.lr * step;
  }
}

template <class T>
void rmsprop(const RmsProp<T>& s, Index count, const Slice<T>* slices) {
  for_chunks(count, slices, [&](const Slice<T>& slice, Index begin, Index end) {
    const bool centered = slice.state[1], momentum = slice.state[2];
    const auto update =
        centered   ? momentum ? rmsprop_chunk<true, true, T> : rmsprop_chunk<true, false, T>
        : momentum ? rmsprop_chunk<false, true, T>
                   : rmsprop_chunk<false, false, T>;
    update(s, slice, begin, end);
  });
}

}  // namespace minidl::MINIDL_ISA
