// ptx.cuh: what every kernel includes: CUDA or its imitation on a CPU, and the three instructions
// that have no name in CUDA C++, here as functions of inline PTX. On the CPU, ptx_on_cpu.h has the
// same functions with the movement of data spelled out.
//
// Kernels are compiled by nvcc and, where they run, by NVRTC, which has no standard headers: so
// there are none.
#pragma once

typedef unsigned int u32;
typedef unsigned long long u64;
typedef signed char s8;

#ifdef __CUDACC__

#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]

// A 16-bit float that is stored, moved and converted: sums are float32.
struct half {
  unsigned short bits;
  half() = default;
  __device__ explicit half(float x) { asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(x)); }
  __device__ operator float() const {
    float x;
    asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(bits));
    return x;
  }
};

__device__ inline u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// d += a b on the tensor cores, for 16 x 8 results and 32 bytes of k: 16 half or 32 int8. One
// layout serves both. Lane 4g + t holds, as words of 4 bytes along k,
//   A[g][t], A[g + 8][t], A[g][t + 4], A[g + 8][t + 4];   B[g][t], B[g][t + 4] (B by its columns);
// and of the results D[g][2t], D[g][2t + 1], D[g + 8][2t], D[g + 8][2t + 1].
__device__ inline void mma(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"
      " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ inline void mma(int (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32"
      " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Four 8 x 8 matrices of 16-bit words from shared memory: lane l names row l % 8 of matrix l / 8
// (16 bytes, aligned), and receives word l % 4 of row l / 4 of each: the fragments that mma wants.
__device__ inline void load_matrices(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
// The same, each matrix transposed: for tiles whose rows run along m or n, not along k.
__device__ inline void load_matrices_transposed(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Copy 4 or 16 bytes from global to shared memory, past the registers and without waiting; zeros
// after the first `valid` bytes.
template <int bytes>
__device__ inline void copy_async(void* to, const void* from, int valid) {
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid)
                 : "memory");
}
// The copies since the last commit become a group ...
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// ... and this waits until at most `pending` of this thread's groups are under way. (That others'
// copies have arrived is known only after a __syncthreads.)
template <int pending>
__device__ inline void copy_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Nothing here; on the CPU, an error if the kernel was launched with other numbers than these.
__device__ inline void expect_launch(unsigned /*threads*/, unsigned /*dynamic_bytes*/) {}

// 16 bytes of shared memory in one instruction.
__device__ inline float4 load_float4(const float* p) { return *(const float4*)p; }

#else

#include "ptx_on_cpu.h"

#endif
