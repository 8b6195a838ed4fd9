// The one matrix product, C = A B, on which convolution and matmul run.
//
// The loop nest is Goto's (K. Goto and R. van de Geijn, "Anatomy of High-Performance Matrix
// Multiplication", 2008; F. Van Zee and R. van de Geijn, "BLIS", 2015). Arithmetic is cheap and
// memory is slow, so every operand is cut to the size of the memory that it is read from again and
// again, and copied ("packed") into the order in which it is read:
//
//   registers   a tile of C, kTileRows x kTileColumns<T>: the micro-kernel's accumulators
//   L1 cache    a micro-panel of B: kDepth rows of kTileColumns<T> elements
//   L2 cache    a block of A: kBlockRows rows, kDepth deep, as micro-panels of kTileRows rows
//   L2/L3       a block of B: kDepth deep, kBlockColumns wide
//
// The nest does not know where A and B come from. It asks `left` and `right` to pack a part, and
// `out` where a column of C lies:
//
//   left.pack(dst, i0, rows, k0, depth)      dst[k][i] = A[i0 + i][k0 + k]      (one micro-panel)
//   right.pack(dst, k0, depth, j0, columns)  dst[j / NR][k][j % NR] = B[k0 + k][j0 + j]
//   out.column(j)                            address of C[0][j];  C[i][j] is i * out.row_stride on
//   out.contiguous(j, n)                     do columns j ... j+n-1 lie side by side?
//
// A convolution is this product with a `right` that packs straight from the image (conv.h).
//
// Each element of C is computed by one thread, in the order of k, in chunks whose length depends
// on the shape alone. So the bits depend neither on the number of threads nor on the blocks.
#pragma once

#include "scratch.h"
#include "simd.h"
#include "threads.h"

namespace minidl::MINIDL_ISA {

constexpr Index kDepth = 320;
constexpr Index kBlockRows = 96;
constexpr Index kBlockColumns = 480;

// ---- The micro-kernel -------------------------------------------------------------------------

// C (M rows, V vectors) = or += sum over k of A[k][0..M) * B[k][0..V vectors); the last vector
// of C has only `tail` columns. A[k] has M elements, B[k] has kTileColumns<T>.
template <class T, int M, int V>
void multiply_tile(Index depth, const T* a, const T* b, T* c, Index row_stride, Index tail,
                   bool add) {
  Vec<T> sum[M][V];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[i][v] = Vec<T>{};
  }
  for (Index k = 0; k < depth; ++k, a += M, b += kTileColumns<T>) {
    Vec<T> row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load(b + v * kLanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] += a[i] * row[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    T* p = c + i * row_stride;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v, p += kLanes<T>) {
      if (v < V - 1 || tail == kLanes<T>) {
        store(p, add ? load(p) + sum[i][v] : sum[i][v]);
      } else {
        T last[kLanes<T>];
        store(last, sum[i][v]);
        for (Index t = 0; t < tail; ++t) p[t] = add ? p[t] + last[t] : last[t];
      }
    }
  }
}

template <class T>
using TileKernel = void (*)(Index depth, const T* a, const T* b, T* c, Index row_stride, Index tail,
                            bool add);

// One micro-kernel for every number of rows and vectors, so that a tile at the edge computes no
// more than it must. kernels[rows - 1][vectors - 1].
template <class T, int M = 1, int V = 1>
struct FillTable {
  template <class Table>
  static constexpr void fill(Table& table) {
    table.kernel[M - 1][V - 1] = &multiply_tile<T, M, V>;
    if constexpr (V < kTileVectors) {
      FillTable<T, M, V + 1>::fill(table);
    } else if constexpr (M < kTileRows) {
      FillTable<T, M + 1, 1>::fill(table);
    }
  }
};
template <class T>
struct TileTable {
  TileKernel<T> kernel[kTileRows][kTileVectors];
  constexpr TileTable() : kernel{} { FillTable<T>::fill(*this); }
};
template <class T>
constexpr TileTable<T> tile_table{};

// ---- The loop nest ----------------------------------------------------------------------------

// `total` things in ceil(total / most) parts, as equal as can be: 32 rows become 6 6 5 5 5 5, not
// 6 6 6 6 6 2, for a tile of two rows leaves the multipliers idle.
struct EvenParts {
  Index parts, least, longer;  // the first `longer` parts have one more than `least`
  EvenParts(Index total, Index most)
      : parts(divide_up(total, most)), least(total / parts), longer(total % parts) {}
  Index begin(Index i) const { return i * least + smaller(i, longer); }
  Index size(Index i) const { return least + (i < longer ? 1 : 0); }
};

// How far a sum goes before it is added to C: about kDepth, a multiple of `unit` where that is
// small (all the taps of a channel), and a function of the shape alone.
inline Index depth_of_block(Index k, Index unit) {
  const Index depth = divide_up(k, divide_up(k, kDepth));
  return smaller(k, unit <= kDepth / 2 ? round_up(depth, unit) : depth);
}

template <class T, class Left, class Right, class Out>
void gemm(Index m, Index n, Index k, Index unit, const Left& left, const Right& right,
          const Out& out) {
  constexpr Index nr = kTileColumns<T>;
  const Index depth = depth_of_block(k, unit), depths = divide_up(k, depth);
  const EvenParts panels(m, kTileRows);

  // All of A is packed once, and shared by the threads: for each block of depths, all the panels.
  const Scratch<T> packed_left(m * k);
  const auto left_panel = [&](Index d, Index i) {
    return packed_left.get() + d * depth * m + panels.begin(i) * smaller(depth, k - d * depth);
  };
  const auto pack_left = [&](Index job) {
    const Index d = job / panels.parts, i = job % panels.parts;
    left.pack(left_panel(d, i), panels.begin(i), panels.size(i), d * depth,
              smaller(depth, k - d * depth));
  };
  if (m * k >= 16384) {
    parallel_for(depths * panels.parts, pack_left);
  } else {  // not worth waking anyone
    for (Index job = 0; job < depths * panels.parts; ++job) pack_left(job);
  }

  // C is cut into jobs: blocks of columns, several for each thread so that a slow one does no harm,
  // and if there are too few of them, blocks of rows as well.
  const Index threads = get_num_threads();
  const Index width =
      smaller(kBlockColumns / nr * nr, larger(round_up(divide_up(n, 4 * threads), nr), 4 * nr));
  const Index column_jobs = divide_up(n, width);
  const Index row_jobs = smaller(divide_up(2 * threads, column_jobs), divide_up(panels.parts, 2));
  const EvenParts row_parts(panels.parts, divide_up(panels.parts, row_jobs));

  parallel_for(column_jobs * row_parts.parts, [&](Index job) {
    const Index j0 = job / row_parts.parts * width, columns = smaller(width, n - j0);
    const Index first = row_parts.begin(job % row_parts.parts);
    const Index last = first + row_parts.size(job % row_parts.parts);
    const Scratch<T> packed_right(depth * round_up(columns, nr));
    alignas(64) T corner[kTileRows * kTileColumns<T>];

    for (Index d = 0; d < depths; ++d) {
      const Index k0 = d * depth, kn = smaller(depth, k - k0);
      right.pack(packed_right.get(), k0, kn, j0, columns);
      for (Index block = first; block < last; block += kBlockRows / kTileRows) {
        const Index block_end = smaller(last, block + kBlockRows / kTileRows);
        for (Index j = 0; j < columns; j += nr) {
          const Index width_here = smaller(nr, columns - j);
          const Index vectors = divide_up(width_here, kLanes<T>);
          const Index tail = width_here - (vectors - 1) * kLanes<T>;
          const T* b = packed_right.get() + j * kn;
          T* column[kTileColumns<T>];
          const bool direct = out.contiguous(j0 + j, width_here);
          for (Index t = 0; t < (direct ? 1 : width_here); ++t) column[t] = out.column(j0 + j + t);
          for (Index i = block; i < block_end; ++i) {
            const Index rows = panels.size(i), row0 = panels.begin(i) * out.row_stride;
            const auto kernel = tile_table<T>.kernel[rows - 1][vectors - 1];
            if (direct) {
              kernel(kn, left_panel(d, i), b, column[0] + row0, out.row_stride, tail, d > 0);
              continue;
            }
            // The columns lie apart (two images, or every second pixel): by way of a small tile.
            kernel(kn, left_panel(d, i), b, corner, nr, tail, false);
            for (Index r = 0; r < rows; ++r) {
              const Index row = row0 + r * out.row_stride;
              const T* from = corner + r * nr;
              if (d == 0) {
                for (Index t = 0; t < width_here; ++t) column[t][row] = from[t];
              } else {
                for (Index t = 0; t < width_here; ++t) column[t][row] += from[t];
              }
            }
          }
        }
      }
    }
  });
}

// ---- Matrices as operands ---------------------------------------------------------------------

template <class T>
struct MatrixLeft {
  Matrix<T> a;
  void pack(T* dst, Index i0, Index rows, Index k0, Index depth) const {
    const T* src = a.data + i0 * a.row_stride + k0 * a.col_stride;
    if (a.col_stride == 1) {
      transpose(dst, rows, src, a.row_stride, rows, depth);
      return;
    }
    for (Index k = 0; k < depth; ++k) {
      for (Index i = 0; i < rows; ++i) dst[k * rows + i] = src[i * a.row_stride + k * a.col_stride];
    }
  }
};

template <class T>
struct MatrixRight {
  Matrix<T> b;
  void pack(T* dst, Index k0, Index depth, Index j0, Index columns) const {
    constexpr Index nr = kTileColumns<T>;
    for (Index j = 0; j < columns; j += nr, dst += depth * nr) {
      const Index n = smaller(nr, columns - j);
      const T* src = b.data + k0 * b.row_stride + (j0 + j) * b.col_stride;
      if (n < nr) std::memset(dst, 0, static_cast<std::size_t>(depth * nr) * sizeof(T));
      if (b.col_stride == 1 && n == nr) {
        for (Index k = 0; k < depth; ++k) {
          std::memcpy(dst + k * nr, src + k * b.row_stride, nr * sizeof(T));
        }
      } else if (b.row_stride == 1) {
        transpose(dst, nr, src, b.col_stride, n, depth);
      } else {
        for (Index k = 0; k < depth; ++k) {
          for (Index t = 0; t < n; ++t) dst[k * nr + t] = src[k * b.row_stride + t * b.col_stride];
        }
      }
    }
  }
};

template <class T>
struct MatrixOut {
  T* c;
  Index row_stride;
  T* column(Index j) const { return c + j; }
  bool contiguous(Index, Index) const { return true; }
};

template <class T>
void matmul(Index m, Index n, Index k, Matrix<T> a, Matrix<T> b, T* c) {
  gemm<T>(m, n, k, 1, MatrixLeft<T>{a}, MatrixRight<T>{b}, MatrixOut<T>{c, n});
}

}  // namespace minidl::MINIDL_ISA
