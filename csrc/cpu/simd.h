// Vectors of one instruction set, in the compiler's own notation: `a * b + c` on a Vec is one
// instruction for 4, 8 or 16 floats. No intrinsics, so the same source serves every processor.
//
// Files that include this one are compiled once for each instruction set, each time in a namespace
// of its own (MINIDL_ISA, see CMakeLists.txt). They must not use the standard library's templates:
// the linker keeps one copy of each, perhaps the one compiled for a processor that is not here.
#pragma once

#include <cstring>

#include "types.h"

namespace minidl::MINIDL_ISA {

// The micro-kernel keeps a tile of kTileRows x (kTileVectors vectors) of the result in registers:
// as many as there are, less those for one row of B and one element of A.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64, kTileRows = 8, kTileVectors = 3;  // 24 of 32 registers
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32, kTileRows = 6, kTileVectors = 2;  // 12 of 16
#elif defined(__aarch64__)
constexpr int kVectorBytes = 16, kTileRows = 8, kTileVectors = 3;  // 24 of 32
#else
constexpr int kVectorBytes = 16, kTileRows = 4, kTileVectors = 2;  // 8 of 16: SSE2 has no FMA
#endif

template <class T>
struct Simd;
template <>
struct Simd<float> {
  typedef float Vec __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Simd<double> {
  typedef double Vec __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Simd<std::int32_t> {
  typedef std::int32_t Vec __attribute__((vector_size(kVectorBytes)));
};
template <>
struct Simd<Word> : Simd<std::int32_t> {};
template <class T>
using Vec = typename Simd<T>::Vec;

template <class T>
constexpr Index kLanes = kVectorBytes / sizeof(T);
template <class T>
constexpr Index kTileColumns = kTileVectors * kLanes<T>;

template <class T>
MINIDL_INLINE Vec<T> load(const T* p) {  // from any address
  Vec<T> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class T>
MINIDL_INLINE void store(T* p, Vec<T> v) {
  std::memcpy(p, &v, sizeof v);
}

MINIDL_INLINE Index smaller(Index a, Index b) { return a < b ? a : b; }
MINIDL_INLINE Index larger(Index a, Index b) { return a > b ? a : b; }
MINIDL_INLINE Index divide_up(Index a, Index b) { return (a + b - 1) / b; }  // a >= 0
MINIDL_INLINE Index divide_down(Index a, Index b) {                          // also for a < 0
  return a >= 0 ? a / b : -((-a + b - 1) / b);
}
MINIDL_INLINE Index round_up(Index a, Index b) { return divide_up(a, b) * b; }

// dst[c * ldd + r] = src[r * lds + c]. Few rows at a time: if lds is a power of two, all of them
// would fall into the same few places of the cache.
template <class T>
inline void transpose(T* dst, Index ldd, const T* src, Index lds, Index rows, Index cols) {
  constexpr Index kRows = 8;
  for (Index r0 = 0; r0 < rows; r0 += kRows) {
    const Index r1 = smaller(rows, r0 + kRows);
    for (Index c = 0; c < cols; ++c) {
      for (Index r = r0; r < r1; ++r) dst[c * ldd + r] = src[r * lds + c];
    }
  }
}

#if defined(__clang__) || __GNUC__ >= 12
#define MINIDL_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define MINIDL_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, Int4{i, j, k, l})
#endif

// The same for four bytes: blocks of 4 x 4 are turned in registers, eight shuffles for 16 elements.
template <class T>
inline void transpose_4x4(T* dst, Index ldd, const T* src, Index lds, Index rows, Index cols) {
  typedef float Float4 __attribute__((vector_size(16)));
  typedef int Int4 __attribute__((vector_size(16), unused));
  const Index rows4 = rows / 4 * 4, cols4 = cols / 4 * 4;
  for (Index r = 0; r < rows4; r += 4) {
    for (Index c = 0; c < cols4; c += 4) {
      Float4 a, b, d, e;
      const T* s = src + r * lds + c;
      std::memcpy(&a, s, 16);
      std::memcpy(&b, s + lds, 16);
      std::memcpy(&d, s + 2 * lds, 16);
      std::memcpy(&e, s + 3 * lds, 16);
      const Float4 ab_low = MINIDL_SHUFFLE(a, b, 0, 4, 1, 5);
      const Float4 ab_high = MINIDL_SHUFFLE(a, b, 2, 6, 3, 7);
      const Float4 de_low = MINIDL_SHUFFLE(d, e, 0, 4, 1, 5);
      const Float4 de_high = MINIDL_SHUFFLE(d, e, 2, 6, 3, 7);
      const Float4 column0 = MINIDL_SHUFFLE(ab_low, de_low, 0, 1, 4, 5);
      const Float4 column1 = MINIDL_SHUFFLE(ab_low, de_low, 2, 3, 6, 7);
      const Float4 column2 = MINIDL_SHUFFLE(ab_high, de_high, 0, 1, 4, 5);
      const Float4 column3 = MINIDL_SHUFFLE(ab_high, de_high, 2, 3, 6, 7);
      T* q = dst + c * ldd + r;
      std::memcpy(q, &column0, 16);
      std::memcpy(q + ldd, &column1, 16);
      std::memcpy(q + 2 * ldd, &column2, 16);
      std::memcpy(q + 3 * ldd, &column3, 16);
    }
    for (Index c = cols4; c < cols; ++c) {
      for (Index i = r; i < r + 4; ++i) dst[c * ldd + i] = src[i * lds + c];
    }
  }
  for (Index r = rows4; r < rows; ++r) {
    for (Index c = 0; c < cols; ++c) dst[c * ldd + r] = src[r * lds + c];
  }
}
template <>
inline void transpose<float>(float* dst, Index ldd, const float* src, Index lds, Index rows,
                             Index cols) {
  transpose_4x4(dst, ldd, src, lds, rows, cols);
}
template <>
inline void transpose<Word>(Word* dst, Index ldd, const Word* src, Index lds, Index rows,
                            Index cols) {
  transpose_4x4(dst, ldd, src, lds, rows, cols);
}

}  // namespace minidl::MINIDL_ISA
