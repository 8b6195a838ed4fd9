// gemm.cuh: the one tiled matrix product behind every matmul and convolution,
//
//     D[m][n] = sum over k of A[m][k] B[n][k].
//
// A block of threads computes a tile of D. It walks along k in slabs: while the tensor cores (or
// plain multiply-adds) work on one slab in shared memory, the next ones are on their way there.
// Four parts can be exchanged:
//
//   source    where A[i][k] is: in a matrix, or in an image that is read as im2col would unfold it
//   tile      how a slab of it lies in shared memory: FloatTile, VectorTile
//   product   Fma: exact float32; TensorCores: half or int8
//   store     a function of (m, n, sum): scaled, biased, rounded, put in its place
//
// To read next: matmul.cu, whose kernels are a line of choices each; ladder.cu, how one gets here.
#pragma once
#include "divisor.cuh"
#include "ptx.cuh"

// Sources -----------------------------------------------------------------------------------------
//
// A source has `rows` and `columns`; row(i) and column(k) are what can be known of an element from
// one index alone, so that it is computed once; at(row, column) is its address, or null outside.

typedef int Offset;  // in elements, of which an array has fewer than 2^31; negative: outside

struct Strided {  // index i is `stride` elements after index i - 1
  int length;
  Offset stride;
  __device__ Offset operator()(int i) const { return i < length ? i * stride : -1; }
};

struct Split {               // an index that counts (outer, inner) pairs, each with a stride
  int length, inner_length;  // of the inner ones, those from inner_length on are outside
  Offset outer_stride, inner_stride;
  Divisor inner;
  __device__ Split(int length, int inner, Offset outer_stride, Offset inner_stride,
                   int inner_length)
      : length(length),
        inner_length(inner_length),
        outer_stride(outer_stride),
        inner_stride(inner_stride),
        inner(inner) {}
  __device__ Split(int length, int inner, Offset outer_stride, Offset inner_stride)
      : Split(length, inner, outer_stride, inner_stride, inner) {}
  __device__ Offset operator()(int i) const {
    int o = inner.quotient(i), j = inner.remainder(i, o);
    return i < length && j < inner_length ? o * outer_stride + j * inner_stride : -1;
  }
};

template <class T, class Rows = Strided, class Columns = Strided>
struct Matrix {
  typedef T Element;
  typedef Offset Row, Column;
  const T* p;
  Rows row;
  Columns column;
  __device__ int rows() const { return row.length; }
  __device__ int columns() const { return column.length; }
  __device__ const T* at(Offset r, Offset c) const { return r < 0 || c < 0 ? nullptr : p + r + c; }
};
template <class T, class Rows, class Columns>
__device__ Matrix<T, Rows, Columns> make_matrix(const T* p, Rows rows, Columns columns) {
  return {p, rows, columns};
}

// A source with rows and columns exchanged.
template <class Source>
struct Turned {
  typedef typename Source::Element Element;
  typedef typename Source::Column Row;
  typedef typename Source::Row Column;
  Source source;
  const Element* p;
  __device__ explicit Turned(const Source& source) : source(source), p(source.p) {}
  __device__ int rows() const { return source.columns(); }
  __device__ Row row(int i) const { return source.column(i); }
  __device__ Column column(int k) const { return source.row(k); }
  __device__ const Element* at(const Row& row, const Column& column) const {
    return source.at(column, row);
  }
};

// Tiles -------------------------------------------------------------------------------------------

// A slab of 16 floats of k, always with i contiguous, [16][size + 4], as Fma reads it. Copied word
// by word, so any strides and alignments will do; neighbouring lanes copy what is contiguous in
// the source, along i or along k. Along k, a warp copies 8 k of 4 i: whole sectors of 32 bytes from
// the source, and to 32 different banks (4 k + i modulo 32, the pitch being 4 modulo 32).
template <class Source, int size, int threads, bool along_k>
struct FloatTile {
  static constexpr int slab = 16, pitch = size + 4, bytes = slab * pitch * 4;
  static constexpr int row_copies = along_k ? size * 8 / threads : 1;
  static constexpr int column_copies = along_k ? 2 : slab * size / threads;

  Source source;
  int i, k;
  typename Source::Row rows[row_copies];

  __device__ FloatTile(const Source& source, int first) : source(source) {
    i = along_k ? threadIdx.x / 8 : threadIdx.x % size;
    k = along_k ? threadIdx.x % 8 : threadIdx.x / size;
#pragma unroll
    for (int r = 0; r < row_copies; ++r) rows[r] = source.row(first + i + r * (threads / 8));
  }

  __device__ void load(unsigned char* tile, int first_k, int end_k) const {
#pragma unroll
    for (int c = 0; c < column_copies; ++c) {
      int ck = k + c * (along_k ? 8 : threads / size);
      bool inside = first_k + ck < end_k;
      auto column = source.column(inside ? first_k + ck : 0);
      float* to = reinterpret_cast<float*>(tile) + ck * pitch + i;
#pragma unroll
      for (int r = 0; r < row_copies; ++r) {
        const float* from = inside ? source.at(rows[r], column) : nullptr;
        copy_async<4>(to + r * (threads / 8), from ? from : source.p, from ? 4 : 0);
      }
    }
  }
};

// A slab of 64 bytes of k, 32 halves or 64 int8, copied 16 bytes at a time: what is contiguous in
// the source must begin at a multiple of 16 bytes (its end may be ragged). The tile has i along its
// rows or k, as the source; ldmatrix transposes on the way to the registers. ldmatrix reads 16
// bytes of 8 rows at a time, and these must lie in all 32 banks: rows along i are 16 bytes longer
// than their contents, and in rows along k, of 64 bytes, the four vectors change places from row to
// row.
template <class Source, int size, int threads, bool along_k>
struct VectorTile {
  typedef typename Source::Element T;
  static constexpr int vector = 16 / sizeof(T), slab = 64 / sizeof(T);
  static constexpr int copies = size * 4 / threads;
  static constexpr int per_row = along_k ? 4 : size / vector;  // copies in a row of the tile
  static constexpr int pitch = along_k ? 64 : per_row * 16 + 16;
  static constexpr int bytes = (along_k ? size : slab) * pitch;
  static_assert(along_k || sizeof(T) == 2, "ldmatrix transposes 16-bit words only");

  Source source;
  int first, across;
  typename Source::Row rows[along_k ? copies : 1];

  __device__ VectorTile(const Source& source, int first) : source(source), first(first) {
    across = threadIdx.x % per_row;
#pragma unroll
    for (int c = 0; c < (along_k ? copies : 1); ++c)
      rows[c] = source.row(along_k ? first + down(c) : first + across * vector);
  }
  // Where vector `x` of row `r` of the tile is.
  __device__ static int place(int r, int x) {
    return r * pitch + (along_k ? x ^ r / 2 % 4 : x) * 16;
  }
  __device__ static int down(int copy) { return (threadIdx.x + copy * threads) / per_row; }

  __device__ void load(unsigned char* tile, int first_k, int end_k) const {
#pragma unroll
    for (int c = 0; c < copies; ++c) {
      int k = first_k + (along_k ? across * vector : down(c));
      bool inside = k < end_k;
      int left = along_k ? end_k - k : source.rows() - (first + across * vector);
      const T* from = inside ? source.at(rows[along_k ? c : 0], source.column(k)) : nullptr;
      copy_async<16>(tile + place(down(c), across), from ? from : source.p,
                     from ? min(left, vector) * int(sizeof(T)) : 0);
    }
  }

  // 16 rows (i) and 32 bytes of k as mma wants them: for A the halves come in the order
  // (first 8 i, first 16 bytes), (last, first), (first, last), (last, last); for B, k goes faster.
  __device__ static void fragments(u32 (&f)[4], const unsigned char* tile, int i, int k,
                                   bool is_b) {
    int lane = threadIdx.x % 32, fast = lane / 8 % 2, slow = lane / 16;
    int half_k = is_b ? fast : slow;
    i += (is_b ? slow : fast) * 8;
    if (along_k)
      load_matrices(f, tile + place(i + lane % 8, k / 16 + half_k));
    else
      load_matrices_transposed(f, tile + place(k / 2 + half_k * 8 + lane % 8, i / 8));
  }
};

// Products ----------------------------------------------------------------------------------------

// Exact float32. A thread has 8 x 8 results, so each number that it reads serves 8 multiply-adds;
// a warp has 32 x 64, thread (ty, tx) of its 4 x 8 those of rows 4 ty .. and 16 + 4 ty ..
template <int tile_m, int tile_n>
struct Fma {
  static constexpr int BM = tile_m, BN = tile_n, threads = BM * BN / 64;
  float sum[8][8] = {};
  int m, n;

  __device__ Fma() {
    int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    m = warp / (BN / 64) * 32 + lane / 8 * 4;
    n = warp % (BN / 64) * 64 + lane % 8 * 4;
  }

  template <class A, class B>
  __device__ void add(const unsigned char* a_tile, const unsigned char* b_tile) {
    const float *a = reinterpret_cast<const float*>(a_tile) + m,
                *b = reinterpret_cast<const float*>(b_tile) + n;
#pragma unroll
    for (int k = 0; k < A::slab; ++k) {
      float4 a0 = load_float4(a + k * A::pitch), a1 = load_float4(a + k * A::pitch + 16);
      float4 b0 = load_float4(b + k * B::pitch), b1 = load_float4(b + k * B::pitch + 32);
      float x[8] = {a0.x, a0.y, a0.z, a0.w, a1.x, a1.y, a1.z, a1.w};
      float y[8] = {b0.x, b0.y, b0.z, b0.w, b1.x, b1.y, b1.z, b1.w};
#pragma unroll
      for (int i = 0; i < 8; ++i)
#pragma unroll
        for (int j = 0; j < 8; ++j) sum[i][j] += x[i] * y[j];
    }
  }

  template <class Store>
  __device__ void each(Store store) const {
#pragma unroll
    for (int i = 0; i < 8; ++i)
#pragma unroll
      for (int j = 0; j < 8; ++j) store(m + i / 4 * 16 + i % 4, n + j / 4 * 32 + j % 4, sum[i][j]);
  }
};

// half with float sums, or int8 with int sums. A warp has WM x WN results, in 16 x 8 pieces.
template <class Sum, int tile_m, int tile_n, int WM, int WN>
struct TensorCores {
  static constexpr int BM = tile_m, BN = tile_n, threads = BM / WM * (BN / WN) * 32;
  Sum sum[WM / 16][WN / 8][4] = {};
  int m, n;

  __device__ TensorCores() {
    int warp = threadIdx.x / 32;
    m = warp / (BN / WN) * WM;
    n = warp % (BN / WN) * WN;
  }

  template <class A, class B>
  __device__ void add(const unsigned char* a_tile, const unsigned char* b_tile) {
#pragma unroll
    for (int k = 0; k < 64; k += 32) {  // bytes
      u32 a[WM / 16][4], b[WN / 16][4];
#pragma unroll
      for (int i = 0; i < WM / 16; ++i) A::fragments(a[i], a_tile, m + i * 16, k, false);
#pragma unroll
      for (int j = 0; j < WN / 16; ++j) B::fragments(b[j], b_tile, n + j * 16, k, true);
#pragma unroll
      for (int i = 0; i < WM / 16; ++i)
#pragma unroll
        for (int j = 0; j < WN / 8; ++j)
          mma(sum[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }

  template <class Store>
  __device__ void each(Store store) const {
    int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int i = 0; i < WM / 16; ++i)
#pragma unroll
      for (int j = 0; j < WN / 8; ++j)
#pragma unroll
        for (int r = 0; r < 4; ++r)
          store(m + i * 16 + g + r / 2 * 8, n + j * 8 + 2 * t + r % 2, sum[i][j][r]);
  }
};

// The loop ----------------------------------------------------------------------------------------

constexpr int stages = 3;  // slabs in shared memory: one at work, two on their way

// The tile of D that begins at (m0, n0), summed over begin_k <= k < end_k.
template <class Product, class A, class B, class Store>
__device__ void gemm(const A& a, const B& b, int m0, int n0, int begin_k, int end_k, Store store) {
  DYNAMIC_SHARED(shared);
  expect_launch(Product::threads, stages * (A::bytes + B::bytes));
  int slabs = (end_k - begin_k + A::slab - 1) / A::slab;
  auto tile = [&](int s) { return shared + s % stages * (A::bytes + B::bytes); };
  auto load = [&](int s) {
    if (s < slabs) {
      a.load(tile(s), begin_k + s * A::slab, end_k);
      b.load(tile(s) + A::bytes, begin_k + s * A::slab, end_k);
    }
    copy_commit();
  };

  Product product;
  for (int s = 0; s < stages - 1; ++s) load(s);
  for (int s = 0; s < slabs; ++s) {
    copy_wait<stages - 2>();
    __syncthreads();  // everyone's part of slab s has come, and nobody needs slab s - 1 any more
    load(s + stages - 1);
    product.template add<A, B>(tile(s), tile(s) + A::bytes);
  }
  int M = a.source.rows() - m0, N = b.source.rows() - n0;
  product.each([&](int m, int n, auto sum) {
    if (m < M && n < N) store(m0 + m, n0 + n, sum);
  });
}

// The tile of block (x, y) for sources A[m][k] and B[n][k], whose contiguous dimension is k or not.
template <class Product, bool a_along_k, bool b_along_k, class SourceA, class SourceB, class Store>
__device__ void gemm_float(const SourceA& a, const SourceB& b, int begin_k, int end_k,
                           Store store) {
  int m0 = blockIdx.y * Product::BM, n0 = blockIdx.x * Product::BN;
  FloatTile<SourceA, Product::BM, Product::threads, a_along_k> tile_a(a, m0);
  FloatTile<SourceB, Product::BN, Product::threads, b_along_k> tile_b(b, n0);
  gemm<Product>(tile_a, tile_b, m0, n0, begin_k, end_k, store);
}
template <class Product, bool a_along_k, bool b_along_k, class SourceA, class SourceB, class Store>
__device__ void gemm_vector(const SourceA& a, const SourceB& b, int begin_k, int end_k,
                            Store store) {
  int m0 = blockIdx.y * Product::BM, n0 = blockIdx.x * Product::BN;
  VectorTile<SourceA, Product::BM, Product::threads, a_along_k> tile_a(a, m0);
  VectorTile<SourceB, Product::BN, Product::threads, b_along_k> tile_b(b, n0);
  gemm<Product>(tile_a, tile_b, m0, n0, begin_k, end_k, store);
}
