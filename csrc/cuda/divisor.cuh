// divisor.cuh: what an index computation spends its time on, made cheap.
#pragma once
#include "ptx.cuh"

// Division by a number known only at run time, in two instructions (Granlund & Montgomery 1994):
// n / d = floor(n * ceil(2^(31+l) / d) / 2^(31+l)) with l = ceil(log2 d), for 0 <= n < 2^31.
struct Divisor {
  int d, shift;
  u32 multiplier;
  __device__ explicit Divisor(int d) : d(d), shift(31 + (d > 1 ? 32 - __clz(d - 1) : 0)) {
    multiplier = u32(((u64(1) << shift) + d - 1) / d);
  }
  __device__ int quotient(int n) const { return int(u64(u32(n)) * multiplier >> shift); }
  __device__ int remainder(int n, int quotient) const { return n - quotient * d; }
};
