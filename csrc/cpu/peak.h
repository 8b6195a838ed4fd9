// What this processor could do at most: the roofs that the kernels are measured against
// (S. Williams, A. Waterman, D. Patterson, "Roofline", 2009).
#pragma once

#include "narrow.h"
#include "simd.h"
#include "threads.h"

namespace minidl::MINIDL_ISA {

constexpr Index kPeakChunks = 64;  // so that a thread that wakes late does no harm

// Multiplications and additions on registers alone. As many independent sums as the micro-kernel
// has, since one multiply-add waits several cycles for the one before. Returns the number of
// operations; `out` (kPeakChunks elements) keeps the compiler from leaving them out.
template <class T>
Index multiply_add_loop(Index steps, T factor, T term, T* out) {
  constexpr int sums = kTileRows * kTileVectors;
  parallel_for(kPeakChunks, [=](Index chunk) {
    Vec<T> sum[sums];
#pragma GCC unroll 32
    for (int s = 0; s < sums; ++s) sum[s] = Vec<T>{} + static_cast<T>(chunk + s);
    for (Index step = 0; step < steps; ++step) {
#pragma GCC unroll 32
      for (int s = 0; s < sums; ++s) sum[s] = sum[s] * factor + term;
    }
    Vec<T> total{};
#pragma GCC unroll 32
    for (int s = 0; s < sums; ++s) total += sum[s];
    out[chunk] = total[0];
  });
  return kPeakChunks * steps * sums * kLanes<T> * 2;
}

// The same with bytes, four products and additions to a lane. (A factor is the sum itself: a
// product that stayed the same could be taken out of the loop.)
inline Index multiply_add_bytes_loop(Index steps, Word factor, std::int32_t* out) {
  constexpr int sums = kTileRows * kTileVectors;
  parallel_for(kPeakChunks, [=](Index chunk) {
    Vec<std::int32_t> sum[sums], total{};
#pragma GCC unroll 32
    for (int s = 0; s < sums; ++s)
      sum[s] = Vec<std::int32_t>{} + static_cast<std::int32_t>(chunk + s);
    for (Index step = 0; step < steps; ++step) {
#pragma GCC unroll 32
      for (int s = 0; s < sums; ++s) sum[s] = multiply_add(factor, sum[s], sum[s]);
    }
#pragma GCC unroll 32
    for (int s = 0; s < sums; ++s) total ^= sum[s];
    out[chunk] = total[0];
  });
  return kPeakChunks * steps * sums * kLanes<Word> * 8;
}

// a = b + factor * c on long arrays: what memory delivers (J. McCalpin, "STREAM", 1995).
template <class T>
void triad(Index n, T factor, const T* b, const T* c, T* a) {
  constexpr Index chunk = 1 << 16;
  parallel_for(divide_up(n, chunk), [=](Index job) {
    const Index end = smaller(n, (job + 1) * chunk);
    for (Index i = job * chunk; i < end; ++i) a[i] = b[i] + factor * c[i];
  });
}

}  // namespace minidl::MINIDL_ISA
