// ptx_on_cpu.h: the functions of ptx.cuh on a CPU. Who holds which number is as the PTX manual has
// it ("Matrix fragments for mma.m16n8k16", "ldmatrix"), so a wrong index shows here.
#pragma once
#include "cuda_on_cpu.h"

using half = _Float16;

#define DYNAMIC_SHARED(name) unsigned char* name = cuda_on_cpu::machine.dynamic

namespace cuda_on_cpu {

// T: what is multiplied, Sum: what is added up.
template <class T, class Sum>
void multiply(Sum (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, Here here) {
  struct Fragments {
    Sum* d;
    const u32* a;
    u32 b[2];
  } mine{d, a, {b0, b1}};
  meet_warp(~0u, "mma", here, mine, [](Fragments** lanes) {
    constexpr int word = 4 / sizeof(T), K = 8 * word;
    T a[16][K], b[8][K];
    for (int lane = 0; lane < 32; ++lane) {
      int g = lane / 4, t = lane % 4;
      for (int i = 0; i < 4; ++i)
        std::memcpy(&a[g + i % 2 * 8][(t + i / 2 * 4) * word], &lanes[lane]->a[i], 4);
      for (int i = 0; i < 2; ++i) std::memcpy(&b[g][(t + i * 4) * word], &lanes[lane]->b[i], 4);
    }
    Sum x[16][K], y[K][8], product[16][8] = {};
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < K; ++k) x[m][k] = Sum(a[m][k]);
    for (int k = 0; k < K; ++k)
      for (int n = 0; n < 8; ++n) y[k][n] = Sum(b[n][k]);
    for (int m = 0; m < 16; ++m)
      for (int k = 0; k < K; ++k)
        for (int n = 0; n < 8; ++n) product[m][n] += x[m][k] * y[k][n];
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i)
        lanes[lane]->d[i] += product[lane / 4 + i / 2 * 8][lane % 4 * 2 + i % 2];
  });
}

// A row is 8 words of 16 bits. Lane l receives, of each matrix, the words (l / 4, 2 (l % 4)) and
// the one beside it; of the transposed matrix, (2 (l % 4), l / 4) and the one below it.
inline void load_rows(u32 (&r)[4], const void* row, bool transposed, Here here) {
  struct Rows {
    uint16_t in[8], out[8];
  } mine;
  {
    WATCH(Quiet quiet;)
    if (reinterpret_cast<uintptr_t>(row) % 16)
      fail("ldmatrix at " + here.text() + ": the address is not a multiple of 16");
    WATCH(watch_matrix_row(row, here);)
    for (int i = 0; i < 8; ++i) mine.in[i] = static_cast<const uint16_t*>(row)[i];
  }
  meet_warp(~0u, transposed ? "ldmatrix.trans" : "ldmatrix", here, mine, [&](Rows** lanes) {
    for (int lane = 0; lane < 32; ++lane)
      for (int matrix = 0; matrix < 4; ++matrix)
        for (int i = 0; i < 2; ++i) {
          int across = lane / 4, along = lane % 4 * 2 + i;
          lanes[lane]->out[2 * matrix + i] = transposed ? lanes[matrix * 8 + along]->in[across]
                                                        : lanes[matrix * 8 + across]->in[along];
        }
  });
  std::memcpy(r, mine.out, 16);
}

inline void copy_now(const Copy& copy) {
  WATCH(watch_copy(copy);)
  // Words, and not memcpy, so that the sanitizers see an access of this thread.
  for (int i = 0; i < copy.bytes; i += 4) {
    u32 word = 0;
    if (i < copy.valid) std::memcpy(&word, copy.from + i, size_t(min(4, copy.valid - i)));
    *reinterpret_cast<u32*>(copy.to + i) = word;
  }
}

}  // namespace cuda_on_cpu

inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, cuda_on_cpu::Here here = {}) {
  cuda_on_cpu::multiply<half>(d, a, b0, b1, here);
}
inline void mma(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1, cuda_on_cpu::Here here = {}) {
  cuda_on_cpu::multiply<s8>(d, a, b0, b1, here);
}

inline void load_matrices(u32 (&r)[4], const void* row, cuda_on_cpu::Here here = {}) {
  cuda_on_cpu::load_rows(r, row, false, here);
}
inline void load_matrices_transposed(u32 (&r)[4], const void* row, cuda_on_cpu::Here here = {}) {
  cuda_on_cpu::load_rows(r, row, true, here);
}

template <int bytes>
void copy_async(void* to, const void* from, int valid, cuda_on_cpu::Here here = {}) {
  [[maybe_unused]] cuda_on_cpu::Quiet quiet;
  auto misaligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % bytes != 0; };
  if (misaligned(to) || misaligned(from))
    cuda_on_cpu::fail("cp.async at " + here.text() + ": an address is not a multiple of " +
                      std::to_string(bytes));
  if (valid < 0 || valid > bytes)
    cuda_on_cpu::fail("cp.async at " + here.text() + ": " + std::to_string(valid) + " of " +
                      std::to_string(bytes) + " bytes are valid");
  cuda_on_cpu::self().copies.push_back(
      {static_cast<char*>(to), static_cast<const char*>(from), bytes, valid, here});
  WATCH(cuda_on_cpu::watch_issue(cuda_on_cpu::self().copies.back());)
}

inline void copy_commit() {
  [[maybe_unused]] cuda_on_cpu::Quiet quiet;
  auto& thread = cuda_on_cpu::self();
  thread.groups.push_back(thread.copies.size());
}

template <int pending>
void copy_wait() {
  WATCH(cuda_on_cpu::Quiet quiet;)
  auto& copies = cuda_on_cpu::self().copies;
  auto& groups = cuda_on_cpu::self().groups;
  if (groups.size() <= pending) return;
  size_t finished = groups.size() - pending, end = groups[finished - 1];
  for (size_t i = 0; i < end; ++i) cuda_on_cpu::copy_now(copies[i]);
  copies.erase(copies.begin(), copies.begin() + long(end));
  groups.erase(groups.begin(), groups.begin() + long(finished));
  for (size_t& group : groups) group -= end;
}

inline void expect_launch(unsigned threads, size_t dynamic_bytes) {
  [[maybe_unused]] cuda_on_cpu::Quiet quiet;
  auto& machine = cuda_on_cpu::machine;
  if (machine.threads.size() != threads || machine.dynamic_bytes != dynamic_bytes)
    cuda_on_cpu::fail("launched with " + std::to_string(machine.threads.size()) + " threads and " +
                      std::to_string(machine.dynamic_bytes) + " bytes of shared memory, expects " +
                      std::to_string(threads) + " and " + std::to_string(dynamic_bytes));
}

inline float4 load_float4(const float* p) {
  typedef float Vector __attribute__((vector_size(16)));
  Vector v = *reinterpret_cast<const Vector*>(p);  // one access of 16 bytes
  return {v[0], v[1], v[2], v[3]};
}
