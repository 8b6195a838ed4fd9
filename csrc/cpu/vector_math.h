// exp, sigmoid and tanh of a whole vector, without a branch; and vectors at the end of an array.
//
// Error, measured against long double over the whole range (tests/test_native_train.py holds
// them to it): exp, sigmoid and tanh at most 4 units in the last place. Results below the
// smallest normal number become 0. NaN stays NaN, exp(inf) = inf, exp(-inf) = 0.
#pragma once

#include "simd.h"

namespace minidl::MINIDL_ISA {

template <class T>
struct Bits;
template <>
struct Bits<float> {
  using Int = std::int32_t;
  typedef Int Ints __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissa = 23, kBias = 127;
};
template <>
struct Bits<double> {
  using Int = std::int64_t;
  typedef Int Ints __attribute__((vector_size(kVectorBytes)));
  static constexpr int kMantissa = 52, kBias = 1023;
};

template <class T>
MINIDL_INLINE Vec<T> broadcast(T value) {
  return Vec<T>{} + value;
}

template <class To, class From>
MINIDL_INLINE To bits_as(From v) {
  static_assert(sizeof(To) == sizeof(From), "the same bits");
  To out;
  std::memcpy(&out, &v, sizeof out);
  return out;
}

// p[0 ... count-1], and `fill` beyond.
template <class T>
MINIDL_INLINE Vec<T> load_some(const T* p, Index count, T fill) {
  T lanes[kLanes<T>];
  for (Index i = 0; i < kLanes<T>; ++i) lanes[i] = i < count ? p[i] : fill;
  return load(lanes);
}
template <class T>
MINIDL_INLINE void store_some(T* p, Vec<T> v, Index count) {
  T lanes[kLanes<T>];
  store(lanes, v);
  for (Index i = 0; i < count; ++i) p[i] = lanes[i];
}
template <class T>
MINIDL_INLINE Vec<T> load_up_to(const T* p, Index count, T fill) {
  return count >= kLanes<T> ? load(p) : load_some(p, count, fill);
}
template <class T>
MINIDL_INLINE void store_up_to(T* p, Vec<T> v, Index count) {
  count >= kLanes<T> ? store(p, v) : store_some(p, v, count);
}

template <class T>
MINIDL_INLINE double sum_of(Vec<T> v) {
  T lanes[kLanes<T>];
  store(lanes, v);
  double sum = 0;
  for (Index i = 0; i < kLanes<T>; ++i) sum += static_cast<double>(lanes[i]);
  return sum;
}

// A long sum: lane by lane for a while, then all lanes into a double, so that the error does not
// grow with the length. The order depends on nothing but what is added.
template <class T>
struct Total {
  Vec<T> lanes{};
  double total = 0;
  int since = 0;
  MINIDL_INLINE void add(Vec<T> v) {
    lanes += v;
    if (++since == 64) flush();
  }
  MINIDL_INLINE void flush() {
    total += sum_of<T>(lanes);
    lanes = Vec<T>{};
    since = 0;
  }
  MINIDL_INLINE double value() {
    flush();
    return total;
  }
};

// exp(x) = 2^n exp(r) with n = round(x / ln 2), |r| <= ln 2 / 2; exp(r) is a polynomial, and 2^n
// is made by writing n into the exponent, in two halves so that it cannot overflow early.
template <class T>
MINIDL_INLINE Vec<T> vexp(Vec<T> x) {
  using B = Bits<T>;
  using Ints = typename B::Ints;
  constexpr bool f32 = sizeof(T) == 4;
  constexpr T log2e = T(1.4426950408889634074), most = f32 ? T(89) : T(710),
              least = f32 ? T(-88) : T(-709);
  // ln 2 in two parts, the first with so few bits that n times it is exact.
  constexpr T ln2_high = f32 ? T(0.693359375) : T(6.93145751953125e-1);
  constexpr T ln2_low = f32 ? T(-2.12194440054690583e-4) : T(1.42860682030941723212e-6);
  constexpr T rounder = f32 ? T(12582912) : T(6755399441055744.0);  // 1.5 * 2^mantissa

  Vec<T> clipped = x < most ? x : broadcast(most);
  clipped = clipped > least ? clipped : broadcast(least);
  const Vec<T> shifted = clipped * log2e + rounder;  // its lowest bits are n
  const Vec<T> n = shifted - rounder;
  const Vec<T> r = (clipped - n * ln2_high) - n * ln2_low;

  Vec<T> p;
  if constexpr (f32) {  // Taylor's coefficients, which in this small range are good to 2^-26
    p = broadcast(T(1.0 / 5040));
    p = p * r + T(1.0 / 720);
    p = p * r + T(1.0 / 120);
    p = p * r + T(1.0 / 24);
    p = p * r + T(1.0 / 6);
    p = p * r + T(0.5);
  } else {
    p = broadcast(T(1.0 / 6227020800.0));
    p = p * r + T(1.0 / 479001600.0);
    p = p * r + T(1.0 / 39916800.0);
    p = p * r + T(1.0 / 3628800.0);
    p = p * r + T(1.0 / 362880.0);
    p = p * r + T(1.0 / 40320.0);
    p = p * r + T(1.0 / 5040.0);
    p = p * r + T(1.0 / 720.0);
    p = p * r + T(1.0 / 120.0);
    p = p * r + T(1.0 / 24.0);
    p = p * r + T(1.0 / 6.0);
    p = p * r + T(0.5);
  }
  p = (p * r) * r + r + T(1);

  const Ints exponent = bits_as<Ints>(shifted) - bits_as<Ints>(broadcast(rounder));
  const Ints half = exponent >> 1, rest = exponent - half;
  p = p * bits_as<Vec<T>>((half + B::kBias) << B::kMantissa);
  p = p * bits_as<Vec<T>>((rest + B::kBias) << B::kMantissa);
  p = x < least ? Vec<T>{} : p;
  p = x > most ? broadcast(T(__builtin_inf())) : p;
  return x == x ? p : x;
}

template <class T>
MINIDL_INLINE Vec<T> vsigmoid(Vec<T> x) {
  return T(1) / (T(1) + vexp<T>(-x));
}

// tanh: near 0 an odd polynomial or rational function (Moshier's, Cephes), beyond by exp.
template <class T>
MINIDL_INLINE Vec<T> vtanh(Vec<T> x) {
  const Vec<T> magnitude = x < T(0) ? -x : x;
  const Vec<T> z = x * x;
  Vec<T> near;
  if constexpr (sizeof(T) == 4) {
    near = broadcast(T(-5.70498872745e-3));
    near = near * z + T(2.06390887954e-2);
    near = near * z + T(-5.37397155531e-2);
    near = near * z + T(1.33314422036e-1);
    near = near * z + T(-3.33332819422e-1);
  } else {
    Vec<T> p = broadcast(T(-9.64399179425052238628e-1));
    p = p * z + T(-9.92877231001918586564e1);
    p = p * z + T(-1.61468768441708447952e3);
    Vec<T> q = z + T(1.12811678491632931402e2);
    q = q * z + T(2.23548839060100448583e3);
    q = q * z + T(4.84406305325125486048e3);
    near = p / q;
  }
  near = near * z * x + x;
  Vec<T> far = T(1) - T(2) / (vexp<T>(magnitude + magnitude) + T(1));
  far = x < T(0) ? -far : far;
  return magnitude < T(0.625) ? near : far;
}

}  // namespace minidl::MINIDL_ISA
