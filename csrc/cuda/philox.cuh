// philox.cuh: random numbers that are a function of (key, position): Philox4x64-10 (Salmon et al.
// 2011), to the bit what minidl/backend/random.py computes with NumPy.
#pragma once
#include "ptx.cuh"

// 8 numbers of 32 bits: those from 8 block on, of the stream `key`, `call`.
struct Philox {
  u32 numbers[8];

  __device__ Philox(u64 key0, u64 key1, u64 call, u64 block) {
    // NumPy counts up before it computes, so its first block is number 1.
    u64 counter[4] = {block + 1, call, 0, 0};
#pragma unroll
    for (int round = 0; round < 10; ++round) {
      const u64 first = 0xD2E7470EE14C6C93ull, second = 0xCA5A826395121157ull;
      u64 high0 = __umul64hi(first, counter[0]), low0 = first * counter[0];
      u64 high1 = __umul64hi(second, counter[2]), low1 = second * counter[2];
      counter[0] = high1 ^ counter[1] ^ key0;
      counter[1] = low1;
      counter[2] = high0 ^ counter[3] ^ key1;
      counter[3] = low0;
      key0 += 0x9E3779B97F4A7C15ull;
      key1 += 0xBB67AE8584CAA73Bull;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      numbers[2 * i] = u32(counter[i]);
      numbers[2 * i + 1] = u32(counter[i] >> 32);
    }
  }

  // In [0, 1), exact: 24 of the 32 bits.
  __device__ float uniform(int i) const { return float(numbers[i] >> 8) * 5.9604644775390625e-8f; }
};
