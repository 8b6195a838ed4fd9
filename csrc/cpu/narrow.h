// Narrow numbers: what the micro-kernel does with 16 and with 8 bits.
//
// Half, BFloat16 and int8_t are widened to float in registers, so that a product that waits for
// memory reads half or a quarter of the bytes. Four bytes in a Word are multiplied with four others
// and added up in 32 bits, exactly. Some processors have an instruction for each; it is chosen
// here, and nowhere else, beside a way that every processor knows.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "simd.h"

namespace minidl::MINIDL_ISA {

// In what a sum of products of T is kept.
template <class T>
struct SumOf {
  using Type = T;
};
template <>
struct SumOf<Word> {
  using Type = std::int32_t;
};
template <class T>
using Sum = typename SumOf<T>::Type;

// ---- Products ---------------------------------------------------------------------------------

template <class T>
MINIDL_INLINE Vec<T> multiply_add(T a, Vec<T> b, Vec<T> sum) {
  return sum + a * b;
}

// For each lane: sum + a0 b0 + a1 b1 + a2 b2 + a3 b3, the bytes of a signed, those of b unsigned.
// (a is the same for all lanes.) Exact: overflow wraps around, so that only the final sum must fit.
MINIDL_INLINE Vec<std::int32_t> multiply_add(Word a, Vec<Word> b, Vec<std::int32_t> sum) {
  const Vec<std::int32_t> four = Vec<std::int32_t>{} + static_cast<std::int32_t>(a);
#if defined(__AVX512VNNI__)
  return (Vec<std::int32_t>)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)b, (__m512i)four);
#else
  // Even and odd bytes apart, widened to 16 bits. (The instruction that multiplies bytes as they
  // are, pmaddubsw, saturates.)
  typedef std::int16_t Short __attribute__((vector_size(kVectorBytes)));
  typedef std::uint16_t Bits __attribute__((vector_size(kVectorBytes)));
  const Short b_even = (Short)((Bits)b & 0xff), b_odd = (Short)((Bits)b >> 8);
  const Short a_even = (Short)((Bits)four << 8) >> 8, a_odd = (Short)four >> 8;
#if defined(__AVX512BW__)
  return sum + (Vec<std::int32_t>)_mm512_madd_epi16((__m512i)b_even, (__m512i)a_even) +
         (Vec<std::int32_t>)_mm512_madd_epi16((__m512i)b_odd, (__m512i)a_odd);
#elif defined(__AVX2__)
  return sum + (Vec<std::int32_t>)_mm256_madd_epi16((__m256i)b_even, (__m256i)a_even) +
         (Vec<std::int32_t>)_mm256_madd_epi16((__m256i)b_odd, (__m256i)a_odd);
#elif defined(__SSE2__)
  return sum + (Vec<std::int32_t>)_mm_madd_epi16((__m128i)b_even, (__m128i)a_even) +
         (Vec<std::int32_t>)_mm_madd_epi16((__m128i)b_odd, (__m128i)a_odd);
#else
  const auto low = [](Short x) { return (Vec<std::int32_t>)x << 16 >> 16; };
  const auto high = [](Short x) { return (Vec<std::int32_t>)x >> 16; };
  return sum + low(b_even) * low(a_even) + high(b_even) * high(a_even) + low(b_odd) * low(a_odd) +
         high(b_odd) * high(a_odd);
#endif
#endif
}

// ---- Widening ---------------------------------------------------------------------------------

// The lanes of a vector of T, from elements that are stored as B.
template <class T, class B>
struct Widen;
template <class T>
struct Widen<T, T> {
  static MINIDL_INLINE Vec<T> load(const T* p) { return MINIDL_ISA::load(p); }
};

template <>
struct Widen<float, Half> {
  static MINIDL_INLINE Vec<float> load(const Half* p) {
#if defined(__AVX512F__)
    const __m256i narrow = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    return (Vec<float>)_mm512_maskz_cvtph_ps(0xffff, narrow);  // unmasked, GCC 12 warns
#elif defined(__F16C__)
    return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    // The exponent and the fraction, shifted to a float's place, are a float that is 2^112 too
    // small (also where they are a subnormal number), or that should be infinite or no number.
    typedef std::uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
    typedef std::uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    Bits16 narrow;
    std::memcpy(&narrow, p, sizeof narrow);
    const Bits bits = __builtin_convertvector(narrow, Bits), size = (bits & 0x7fff) << 13;
    const Vec<float> scaled = (Vec<float>)size * 0x1p112f;
    const Bits special = (Bits)(size >= 0x7c00u << 13) & 0x7f800000u;
    return (Vec<float>)((Bits)scaled | special | (bits & 0x8000) << 16);
#endif
  }
};

template <>
struct Widen<float, BFloat16> {
  static MINIDL_INLINE Vec<float> load(const BFloat16* p) {
    typedef std::uint16_t Bits16 __attribute__((vector_size(kVectorBytes / 2)));
    typedef std::uint32_t Bits __attribute__((vector_size(kVectorBytes)));
    Bits16 narrow;
    std::memcpy(&narrow, p, sizeof narrow);
    return (Vec<float>)(__builtin_convertvector(narrow, Bits) << 16);
  }
};

template <>
struct Widen<float, std::int8_t> {
  static MINIDL_INLINE Vec<float> load(const std::int8_t* p) {
#if defined(__AVX512F__)
    const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return (Vec<float>)_mm512_maskz_cvtepi32_ps(0xffff, _mm512_maskz_cvtepi8_epi32(0xffff, narrow));
#elif defined(__AVX2__)
    const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return (Vec<float>)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(narrow));
#else
    typedef std::int8_t Byte __attribute__((vector_size(kVectorBytes / 4)));
    Byte narrow;
    std::memcpy(&narrow, p, sizeof narrow);
    return __builtin_convertvector(__builtin_convertvector(narrow, Vec<std::int32_t>), Vec<float>);
#endif
  }
};

// As many unsigned bytes as there are lanes, one a lane.
MINIDL_INLINE Vec<std::int32_t> load_bytes(const std::uint8_t* p) {
#if defined(__AVX512F__)
  const __m128i narrow = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return (Vec<std::int32_t>)_mm512_maskz_cvtepu8_epi32(0xffff, narrow);
#elif defined(__AVX2__)
  const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (Vec<std::int32_t>)_mm256_cvtepu8_epi32(narrow);
#else
  typedef std::uint8_t Byte __attribute__((vector_size(kVectorBytes / 4)));
  Byte narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  return __builtin_convertvector(narrow, Vec<std::int32_t>);
#endif
}

template <class T, class B>
MINIDL_INLINE Vec<T> load_as(const B* p) {
  return Widen<T, B>::load(p);
}

}  // namespace minidl::MINIDL_ISA
