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
// The nest does not know where A and B come from. It asks `left` and `right` to pack a part, `out`
// where a column of C lies, and `epilogue` what to do with a finished sum:
//
//   left.pack(dst, i0, rows, k0, depth)      dst[k][i] = A[i0 + i][k0 + k]      (one micro-panel)
//   right.pack(dst, k0, depth, j0, columns)  dst[j / NR][k][j % NR] = B[k0 + k][j0 + j]
//   out.column(j)                            address of C[0][j];  C[i][j] is i * out.row_stride on
//   out.contiguous(j, n)                     do columns j ... j+n-1 lie side by side?
//   epilogue.finish(i, j, n, sum, c)         c[t] = what becomes of C[i][j + t] = sum[t], t < n
//
// A convolution is this product with a `right` that packs straight from the image (conv.h). T, the
// type of a packed element, decides the arithmetic: float and double, or Word, four bytes at once
// (narrow.h). The epilogue runs once for each element, when its sum is complete and its tile still
// in the L1 cache; `sum` and `c` may be the same. C may be of another type than the sums are
// (Epilogue::Result), which is how integers are requantized.
//
// Each element of C is computed by one thread, in the order of k, in chunks whose length depends
// on the shape alone. So the bits depend neither on the number of threads nor on the blocks.
#pragma once

#include "narrow.h"
#include "scratch.h"
#include "simd.h"
#include "threads.h"
#include "vector_math.h"

namespace minidl::MINIDL_ISA {

constexpr Index kDepth = 320;
constexpr Index kBlockRows = 96;
constexpr Index kBlockColumns = 480;

// ---- The micro-kernel -------------------------------------------------------------------------

// C (M rows, V vectors) = or += sum over k of A[k][0..M) * B[k][0..V vectors); the last vector
// of C has only `tail` columns. A[k] has M elements, B[k] has kTileColumns<T>. B may be stored in
// fewer bits (Half, BFloat16, int8_t): they become T on the way into the registers.
template <class T, class B, int M, int V>
void multiply_tile(Index depth, const T* a, const B* b, Sum<T>* c, Index row_stride, Index tail,
                   bool add) {
  Vec<Sum<T>> sum[M][V];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sum[i][v] = Vec<Sum<T>>{};
  }
  for (Index k = 0; k < depth; ++k, a += M, b += kTileColumns<T>) {
    Vec<T> row[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) row[v] = load_as<T>(b + v * kLanes<T>);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sum[i][v] = multiply_add(a[i], row[v], sum[i][v]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
    Sum<T>* p = c + i * row_stride;
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v, p += kLanes<T>) {
      if (v < V - 1 || tail == kLanes<T>) {
        store(p, add ? load(p) + sum[i][v] : sum[i][v]);
      } else {
        Sum<T> last[kLanes<T>];
        store(last, sum[i][v]);
        for (Index t = 0; t < tail; ++t) p[t] = add ? p[t] + last[t] : last[t];
      }
    }
  }
}

template <class T, class B>
using TileKernel = void (*)(Index depth, const T* a, const B* b, Sum<T>* c, Index row_stride,
                            Index tail, bool add);

// One micro-kernel for every number of rows and vectors, so that a tile at the edge computes no
// more than it must. kernels[rows - 1][vectors - 1].
template <class T, class B, int M = 1, int V = 1>
struct FillTable {
  template <class Table>
  static constexpr void fill(Table& table) {
    table.kernel[M - 1][V - 1] = &multiply_tile<T, B, M, V>;
    if constexpr (V < kTileVectors) {
      FillTable<T, B, M, V + 1>::fill(table);
    } else if constexpr (M < kTileRows) {
      FillTable<T, B, M + 1, 1>::fill(table);
    }
  }
};
template <class T, class B>
struct TileTable {
  TileKernel<T, B> kernel[kTileRows][kTileVectors];
  constexpr TileTable() : kernel{} { FillTable<T, B>::fill(*this); }
};
template <class T, class B>
constexpr TileTable<T, B> tile_table{};

template <class T, class B>
TileKernel<T, B> kernel_for(const B*, Index rows, Index vectors) {
  return tile_table<T, B>.kernel[rows - 1][vectors - 1];
}

// ---- Epilogues --------------------------------------------------------------------------------

template <class T>
struct NoEpilogue {  // C is the sum
  using Result = Sum<T>;
};

// A bias for each row or for each column (or neither: null), then perhaps ReLU.
template <class T>
struct Bias {
  using Result = T;
  const T *of_row, *of_column;
  bool relu;
  void finish(Index i, Index j, Index n, const T* sum, T* c) const {
    const T row = of_row ? of_row[i] : 0;
    if (of_column) {
      for (Index t = 0; t < n; ++t) c[t] = sum[t] + of_column[j + t];
    } else {
      for (Index t = 0; t < n; ++t) c[t] = sum[t] + row;
    }
    if (!relu) return;
    for (Index t = 0; t < n; ++t) c[t] = c[t] < 0 ? 0 : c[t];  // NaN stays NaN
  }
};

template <class T, class U>
constexpr bool is_same = false;
template <class T>
constexpr bool is_same<T, T> = true;

// ---- The loop nest ----------------------------------------------------------------------------

// `total` things in ceil(total / most) parts, as equal as can be: 32 rows become 6 6 5 5 5 5, not
// 6 6 6 6 6 2, for a tile of two rows leaves the multipliers idle.
struct EvenParts {
  Index parts, least, longer;  // the first `longer` parts have one more than `least`
  EvenParts(Index total, Index most) : EvenParts(in(total, divide_up(total, most))) {}
  static EvenParts in(Index total, Index parts) { return {parts, total / parts, total % parts}; }
  Index begin(Index i) const { return i * least + smaller(i, longer); }
  Index size(Index i) const { return least + (i < longer ? 1 : 0); }

 private:
  EvenParts(Index parts, Index least, Index longer) : parts(parts), least(least), longer(longer) {}
};

// How far a sum goes before it is added to C: about kDepth, a multiple of `unit` where that is
// small (all the taps of a channel), and a function of the shape alone.
inline Index depth_of_block(Index k, Index unit) {
  const Index depth = divide_up(k, divide_up(k, kDepth));
  return smaller(k, unit <= kDepth / 2 ? round_up(depth, unit) : depth);
}

// All of A, packed: for each block of depths, all the panels. m * k elements.
template <class T, class Left>
void pack_left(Index m, Index k, Index unit, const Left& left, T* dst) {
  const EvenParts panels(m, kTileRows);
  const Index depth = depth_of_block(k, unit), depths = divide_up(k, depth);
  const auto pack = [&](Index job) {
    const Index d = job / panels.parts, i = job % panels.parts;
    const Index k0 = d * depth, kn = smaller(depth, k - k0);
    left.pack(dst + k0 * m + panels.begin(i) * kn, panels.begin(i), panels.size(i), k0, kn);
  };
  if (m * k >= 16384) {
    parallel_for(depths * panels.parts, pack);
  } else {  // not worth waking anyone
    for (Index job = 0; job < depths * panels.parts; ++job) pack(job);
  }
}

// All of B, packed: for each block of depths, all the panels. k * round_up(n, NR) elements.
template <class T, class Right>
void pack_right(Index n, Index k, Index unit, const Right& right, T* dst) {
  constexpr Index nr = kTileColumns<T>;
  const Index depth = depth_of_block(k, unit), depths = divide_up(k, depth);
  const Index panels = divide_up(n, nr);
  parallel_for(depths * panels, [&](Index job) {
    const Index k0 = job / panels * depth, kn = smaller(depth, k - k0), j = job % panels * nr;
    right.pack(dst + k0 * panels * nr + j * kn, k0, kn, j, smaller(nr, n - j));
  });
}

// What pack_right made, as an operand. E: the type it is stored in.
template <class E>
struct PackedRight {
  const E* data;
  Index width;  // n, rounded up to whole panels
};

// The part of B that a job works on: packed now, or long ago.
template <class T, class Right>
const T* block_of(const Right& right, T* room, Index k0, Index depth, Index j0, Index columns) {
  right.pack(room, k0, depth, j0, columns);
  return room;
}
template <class T, class E>
const E* block_of(const PackedRight<E>& right, T*, Index k0, Index depth, Index j0, Index) {
  return right.data + k0 * right.width + j0 * depth;
}

template <class T, class Right, class Out, class Epilogue>
void gemm_packed(Index m, Index n, Index k, Index unit, const T* left, const Right& right,
                 const Out& out, const Epilogue& epilogue) {
  using Result = typename Epilogue::Result;
  constexpr bool finishes = !is_same<Epilogue, NoEpilogue<T>>;
  constexpr bool in_place =
      is_same<Sum<T>, Result>;  // C itself can hold sums that are not complete
  constexpr Index nr = kTileColumns<T>;
  const Index depth = depth_of_block(k, unit), depths = divide_up(k, depth);
  const EvenParts panels(m, kTileRows);

  // C is cut into jobs: blocks of columns, and if these are few, blocks of rows as well. There are
  // several for each thread, and as many for one as for the other: 7 blocks of 6 panels would leave
  // the second of two threads idle for a seventh of the time.
  const Index threads = get_num_threads(), column_panels = divide_up(n, nr);
  const Index blocks = larger(divide_up(column_panels, kBlockColumns / nr),
                              smaller(4 * threads, divide_up(column_panels, 4)));
  const EvenParts column_parts =
      EvenParts::in(column_panels, smaller(column_panels, round_up(blocks, threads)));
  const Index row_jobs =
      smaller(divide_up(4 * threads, column_parts.parts), divide_up(panels.parts, 4));
  const EvenParts row_parts(panels.parts, divide_up(panels.parts, row_jobs));

  parallel_for(column_parts.parts * row_parts.parts, [&](Index job) {
    const Index part = job / row_parts.parts, j0 = column_parts.begin(part) * nr;
    const Index columns = smaller(column_parts.size(part) * nr, n - j0);
    const Index first = row_parts.begin(job % row_parts.parts);
    const Index last = first + row_parts.size(job % row_parts.parts);
    const Scratch<T> packed_right(depth * round_up(columns, nr));
    alignas(64) Sum<T> corner[kTileRows * kTileColumns<T>];
    // Sums that wait for their next block of depths, where C cannot hold them.
    const Index row0 = panels.begin(first), rows_here = panels.begin(last) - row0;
    const Scratch<Sum<T>> waiting(in_place || depths == 1 ? 0 : rows_here * round_up(columns, nr));

    for (Index d = 0; d < depths; ++d) {
      const Index k0 = d * depth, kn = smaller(depth, k - k0);
      const auto* b_block = block_of(right, packed_right.get(), k0, kn, j0, columns);
      const bool complete = d == depths - 1;
      for (Index block = first; block < last; block += kBlockRows / kTileRows) {
        const Index block_end = smaller(last, block + kBlockRows / kTileRows);
        for (Index j = 0; j < columns; j += nr) {
          const Index width_here = smaller(nr, columns - j);
          const Index vectors = divide_up(width_here, kLanes<T>);
          const Index tail = width_here - (vectors - 1) * kLanes<T>;
          const auto* b = b_block + j * kn;
          Result* column[kTileColumns<T>];
          const bool side_by_side = out.contiguous(j0 + j, width_here);
          for (Index t = 0; t < (side_by_side ? 1 : width_here); ++t) {
            column[t] = out.column(j0 + j + t);
          }
          for (Index i = block; i < block_end; ++i) {
            const Index rows = panels.size(i), begin = panels.begin(i);
            const T* a = left + k0 * m + begin * kn;
            const auto kernel = kernel_for<T>(b, rows, vectors);
            if constexpr (in_place) {
              if (side_by_side) {
                Result* c = column[0] + begin * out.row_stride;
                kernel(kn, a, b, c, out.row_stride, tail, d > 0);
                if constexpr (finishes) {
                  for (Index r = 0; complete && r < rows; ++r, c += out.row_stride) {
                    epilogue.finish(begin + r, j0 + j, width_here, c, c);
                  }
                }
                continue;
              }
            }
            // The columns lie apart (two images, or every second pixel), or are of another type:
            // by way of a small tile.
            Sum<T>* tile = corner;
            if constexpr (in_place) {
              for (Index r = 0; d > 0 && r < rows; ++r) {
                const Index row = (begin + r) * out.row_stride;
                for (Index t = 0; t < width_here; ++t) tile[r * nr + t] = column[t][row];
              }
            } else if (depths > 1) {
              tile = waiting.get() + j * rows_here + (begin - row0) * nr;
            }
            kernel(kn, a, b, tile, nr, tail, d > 0);
            if (!in_place && !complete) continue;
            for (Index r = 0; r < rows; ++r) {
              const Index row = (begin + r) * out.row_stride;
              if constexpr (finishes) {
                if (complete) {
                  Result finished[kTileColumns<T>];
                  Result* c = side_by_side ? column[0] + row : finished;
                  epilogue.finish(begin + r, j0 + j, width_here, tile + r * nr, c);
                  if (!side_by_side) {
                    for (Index t = 0; t < width_here; ++t) column[t][row] = finished[t];
                  }
                  continue;
                }
              }
              if constexpr (in_place) {
                for (Index t = 0; t < width_here; ++t) column[t][row] = tile[r * nr + t];
              }
            }
          }
        }
      }
    }
  });
}

template <class T, class Left, class Right, class Out, class Epilogue = NoEpilogue<T>>
void gemm(Index m, Index n, Index k, Index unit, const Left& left, const Right& right,
          const Out& out, const Epilogue& epilogue = {}) {
  const Scratch<T> packed(m * k);  // shared by the threads
  pack_left(m, k, unit, left, packed.get());
  gemm_packed(m, n, k, unit, packed.get(), right, out, epilogue);
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

// C = A B of few rows, where the columns of B lie in one piece (a layer's weights, transposed):
// such a product takes as long as B takes to come from memory, so B is read once, where it lies.
constexpr Index kFewRows = 4;

template <class T, int M>
void dot_products(Index n, Index k, Matrix<T> a, Matrix<T> b, const T* bias, T* c) {
  constexpr Index columns = 8;  // of a job
  parallel_for(divide_up(n, columns), [&](Index job) {
    for (Index j = job * columns; j < smaller(n, (job + 1) * columns); ++j) {
      const T* w = b.data + j * b.col_stride;
      Vec<T> sum[M][2] = {};
      Index i = 0;
      for (; i + 2 * kLanes<T> <= k; i += 2 * kLanes<T>) {
        const Vec<T> w0 = load(w + i), w1 = load(w + i + kLanes<T>);
        for (int r = 0; r < M; ++r) {
          const T* x = a.data + r * a.row_stride + i;
          sum[r][0] += load(x) * w0;
          sum[r][1] += load(x + kLanes<T>) * w1;
        }
      }
      for (; i < k; i += kLanes<T>) {
        const Vec<T> last = load_up_to(w + i, k - i, T(0));
        for (int r = 0; r < M; ++r) {
          sum[r][0] += load_up_to(a.data + r * a.row_stride + i, k - i, T(0)) * last;
        }
      }
      for (int r = 0; r < M; ++r) {
        const T total = static_cast<T>(sum_of<T>(sum[r][0] + sum[r][1]));
        c[r * n + j] = bias ? total + bias[j] : total;
      }
    }
  });
}

// C = A B, plus a bias for each column if there is one.
template <class T>
void matmul(Index m, Index n, Index k, Matrix<T> a, Matrix<T> b, const T* bias, T* c) {
  if (n == 1 && m > 1 && !bias) {  // one column: the same numbers are one row of Cᵀ = Bᵀ Aᵀ
    return matmul<T>(1, m, k, {b.data, b.col_stride, b.row_stride},
                     {a.data, a.col_stride, a.row_stride}, nullptr, c);
  }
  if (m <= kFewRows && b.row_stride == 1 && a.col_stride == 1) {
    constexpr decltype(&dot_products<T, 1>) of_rows[kFewRows] = {
        dot_products<T, 1>, dot_products<T, 2>, dot_products<T, 3>, dot_products<T, 4>};
    return of_rows[m - 1](n, k, a, b, bias, c);
  }
  const MatrixLeft<T> left{a};
  const MatrixRight<T> right{b};
  const MatrixOut<T> out{c, n};
  if (bias) {
    gemm<T>(m, n, k, 1, left, right, out, Bias<T>{nullptr, bias, false});
  } else {
    gemm<T>(m, n, k, 1, left, right, out);
  }
}

}  // namespace minidl::MINIDL_ISA
