// Dropout with Philox4x64-10 (Salmon et al. 2011), the same bits as minidl/backend/random.py:
// NumPy's stream, of which number i is the upper 24 of 32 bits.
//
// A block of the stream, 256 bits, is a function of its position alone, so any thread can make any.
#pragma once

#include "simd.h"
#include "threads.h"

namespace minidl::MINIDL_ISA {

constexpr Index kPhiloxNumbers = 8;  // of 32 bits, in a block

// Block `position` of a stream. NumPy steps the counter before it mixes, so the first block is 1.
inline void philox(const Mask& m, std::uint64_t position, std::uint32_t out[kPhiloxNumbers]) {
  std::uint64_t c[4] = {position + 1, m.call, 0, 0}, k0 = m.key[0], k1 = m.key[1];
  if (c[0] == 0) ++c[1];
  for (int round = 0; round < 10; ++round) {
    const auto product0 = static_cast<unsigned __int128>(0xD2E7470EE14C6C93u) * c[0];
    const auto product1 = static_cast<unsigned __int128>(0xCA5A826395121157u) * c[2];
    const auto high0 = static_cast<std::uint64_t>(product0 >> 64);
    const auto high1 = static_cast<std::uint64_t>(product1 >> 64);
    c[0] = high1 ^ c[1] ^ k0;
    c[1] = static_cast<std::uint64_t>(product1);
    c[2] = high0 ^ c[3] ^ k1;
    c[3] = static_cast<std::uint64_t>(product0);
    k0 += 0x9E3779B97F4A7C15u;  // the golden ratio
    k1 += 0xBB67AE8584CAA73Bu;  // sqrt(3) - 1
  }
  for (int i = 0; i < 4; ++i) {
    out[2 * i] = static_cast<std::uint32_t>(c[i]);
    out[2 * i + 1] = static_cast<std::uint32_t>(c[i] >> 32);
  }
}

template <class T>
void dropout(const Mask& m, const T* x, T scale, T* y) {
  const Index blocks = divide_up(m.count, kPhiloxNumbers);
  const Index together = larger(1, 16384 / (kPhiloxNumbers * m.repeat));
  parallel_for(divide_up(blocks, together), [&](Index job) {
    for (Index block = job * together; block < smaller(blocks, (job + 1) * together); ++block) {
      std::uint32_t bits[kPhiloxNumbers];
      philox(m, static_cast<std::uint64_t>(block), bits);
      const Index first = block * kPhiloxNumbers;
      for (Index i = 0; i < smaller(kPhiloxNumbers, m.count - first); ++i) {
        const bool keep = bits[i] >> 8 >= m.threshold;
        const Index at = (first + i) * m.repeat;
        for (Index k = at; k < at + m.repeat; ++k) y[k] = keep ? x[k] * scale : T(0);
      }
    }
  });
}

}  // namespace minidl::MINIDL_ISA
