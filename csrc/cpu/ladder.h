// The rungs below gemm.h and conv.h: the same products, written as one would write them first.
//
// Each rung adds one idea to the one before, and `minidl bench ladder` shows what it is worth:
//
//   matmul_naive      the definition, in the order in which it is read
//   matmul_reordered  two loops swapped: the innermost one walks along rows, so the compiler can
//                     use vectors, and every byte of a cache line that was fetched is used
//   matmul_tiled      a tile of C stays in registers while its whole sum is added up: a number that
//                     was loaded is used kTileRows or kTileColumns times
//   gemm.h            packing and blocks, so that the loads come from a near cache
//   conv2d_naive      the definition: seven loops
//   conv.h            a matrix product whose right matrix is packed straight from the image
//
// All arrays are C-contiguous and not empty. The rungs run on all threads (each writes rows of its
// own), so that they are measured against the same peak.
#pragma once

#include "simd.h"
#include "threads.h"

namespace minidl::MINIDL_ISA {

// C (m, n) = A (m, k) B (k, n). One element of C at a time: a sum is a chain of additions, each
// waiting for the last, and every step down a column of B is in another cache line.
template <class T>
void matmul_naive(Index m, Index n, Index k, const T* a, const T* b, T* c) {
  parallel_for(m, [=](Index i) {
    for (Index j = 0; j < n; ++j) {
      T sum = 0;
      for (Index l = 0; l < k; ++l) sum += a[i * k + l] * b[l * n + j];
      c[i * n + j] = sum;
    }
  });
}

// Columns j0 to n of one row of C: a row of B, scaled, is added to it k times.
template <class T>
void row_times_matrix(Index j0, Index n, Index k, const T* a, const T* b, T* c) {
  for (Index j = j0; j < n; ++j) c[j] = 0;
  for (Index l = 0; l < k; ++l) {
    for (Index j = j0; j < n; ++j) c[j] += a[l] * b[l * n + j];
  }
}

template <class T>
void matmul_reordered(Index m, Index n, Index k, const T* a, const T* b, T* c) {
  parallel_for(m, [=](Index i) { row_times_matrix(0, n, k, a + i * k, b, c + i * n); });
}

// Per step, kTileRows + kTileVectors loads feed kTileRows * kTileVectors multiplications of whole
// vectors; above it was one multiplication for two loads and a store.
template <class T>
void matmul_tiled(Index m, Index n, Index k, const T* a, const T* b, T* c) {
  constexpr Index columns = kTileColumns<T>;
  parallel_for(divide_up(m, kTileRows), [=](Index job) {
    const Index i0 = job * kTileRows, i1 = smaller(i0 + kTileRows, m);
    Index j = 0;
    for (; i1 - i0 == kTileRows && j + columns <= n; j += columns) {
      Vec<T> sum[kTileRows][kTileVectors];
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) sum[r][v] = Vec<T>{};
      }
      for (Index l = 0; l < k; ++l) {
        Vec<T> row[kTileVectors];
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) row[v] = load(b + l * n + j + v * kLanes<T>);
#pragma GCC unroll 8
        for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
          for (int v = 0; v < kTileVectors; ++v) sum[r][v] += a[(i0 + r) * k + l] * row[v];
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kTileRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kTileVectors; ++v) {
          store(c + (i0 + r) * n + j + v * kLanes<T>, sum[r][v]);
        }
      }
    }
    for (Index i = i0; i < i1; ++i) {  // the border, which no whole tile covers
      row_times_matrix(j, n, k, a + i * k, b, c + i * n);
    }
  });
}

// y[n,o,p,q] = sum over c, i, j of x[n, c, p*s - pad + i*d, q*s - pad + j*d] * w[o,c,i,j]
template <class T>
void conv2d_naive(const Conv2d& p, const T* x, const T* w, T* y) {
  const Index channels = p.c / p.groups, outputs = p.o / p.groups;  // of one group
  parallel_for(p.n * p.o, [=](Index plane) {
    const Index n = plane / p.o, o = plane % p.o, c0 = o / outputs * channels;
    for (Index row = 0; row < p.oh; ++row) {
      for (Index col = 0; col < p.ow; ++col) {
        T sum = 0;
        for (Index c = 0; c < channels; ++c) {
          for (Index i = 0; i < p.kh; ++i) {
            for (Index j = 0; j < p.kw; ++j) {
              const Index h = row * p.stride_h - p.pad_h + i * p.dilation_h;
              const Index v = col * p.stride_w - p.pad_w + j * p.dilation_w;
              if (h < 0 || h >= p.h || v < 0 || v >= p.w) continue;  // padding: zero
              sum += x[((n * p.c + c0 + c) * p.h + h) * p.w + v] *
                     w[((o * channels + c) * p.kh + i) * p.kw + j];
            }
          }
        }
        y[(plane * p.oh + row) * p.ow + col] = sum;
      }
    }
  });
}

}  // namespace minidl::MINIDL_ISA
