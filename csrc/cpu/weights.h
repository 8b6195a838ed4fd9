// Products with weights in 32 bits, or in 16 or 8 to save memory; packed once and kept, or as they
// come.
//
// With few rows a product is as fast as its weights come from memory, so the micro-kernel reads
// them as they are stored, once, and widens them in registers. With many rows the arithmetic is
// what costs: then a block of weights is widened once for all rows.
#pragma once

#include "gemm.h"

namespace minidl::MINIDL_ISA {

// The transpose of w (n, k), in the packed order of floats but stored as E.
template <class E>
struct WeightsRight {
  Matrix<E> w;
  void pack(E* dst, Index k0, Index depth, Index j0, Index columns) const {
    constexpr Index nr = kTileColumns<float>;
    for (Index j = 0; j < columns; j += nr, dst += depth * nr) {
      const Index n = smaller(nr, columns - j);
      const E* src = w.data + (j0 + j) * w.row_stride + k0 * w.col_stride;
      if (n < nr) std::memset(dst, 0, static_cast<std::size_t>(depth * nr) * sizeof(E));
      if (w.col_stride == 1) {
        transpose(dst, nr, src, w.row_stride, n, depth);
      } else {
        for (Index k = 0; k < depth; ++k) {
          for (Index t = 0; t < n; ++t) dst[k * nr + t] = src[t * w.row_stride + k * w.col_stride];
        }
      }
    }
  }
};

// Packed weights of type E as an operand whose blocks are floats.
template <class E>
struct Widening {
  PackedRight<E> packed;
  void pack(float* dst, Index k0, Index depth, Index j0, Index columns) const {
    const E* src = packed.data + k0 * packed.width + j0 * depth;
    const Index count = depth * round_up(columns, kTileColumns<float>);
    for (Index i = 0; i < count; i += kLanes<float>) store(dst + i, load_as<float>(src + i));
  }
};

// The transpose of w (n, k) as it comes, as an operand whose blocks are floats. A row's 64 bytes
// are widened at once and then turned: to read a part of a cache line and come back for the rest
// would be to fetch it twice, for rows are often a power of two apart and push one another out.
template <class E>
struct WideningRows {
  Matrix<E> w;
  void pack(float* dst, Index k0, Index depth, Index j0, Index columns) const {
    constexpr Index nr = kTileColumns<float>, lanes = kLanes<float>, chunk = 64 / sizeof(E);
    float wide[nr * chunk];
    for (Index j = 0; j < columns; j += nr, dst += depth * nr) {
      const Index n = smaller(nr, columns - j);
      const E* src = w.data + (j0 + j) * w.row_stride + k0 * w.col_stride;
      if (n < nr) std::memset(dst, 0, static_cast<std::size_t>(depth * nr) * sizeof *dst);
      Index k = 0;
      for (; w.col_stride == 1 && k + chunk <= depth; k += chunk) {
        for (Index t = 0; t < n; ++t) {
          const E* row = src + t * w.row_stride + k;
          for (Index i = 0; i < chunk; i += lanes) {
            store(wide + t * chunk + i, load_as<float>(row + i));
          }
        }
        transpose(dst + k * nr, nr, wide, chunk, n, chunk);
      }
      for (; k < depth; ++k) {
        for (Index t = 0; t < n; t += lanes) {
          E narrow[lanes] = {};
          for (Index i = 0; i < smaller(lanes, n - t); ++i) {
            narrow[i] = src[(t + i) * w.row_stride + k * w.col_stride];
          }
          store(dst + k * nr + t, load_as<float>(narrow));
        }
      }
    }
  }
};

// A scale and a bias for each column; either may be null.
struct ScaleAndBias {
  using Result = float;
  const float *scale, *bias;
  void finish(Index, Index j, Index n, const float* sum, float* c) const {
    if (scale) {
      for (Index t = 0; t < n; ++t) c[t] = sum[t] * scale[j + t];
    } else if (c != sum) {
      for (Index t = 0; t < n; ++t) c[t] = sum[t];
    }
    if (bias) {
      for (Index t = 0; t < n; ++t) c[t] += bias[j + t];
    }
  }
};

template <class E>
void pack_weights(Index n, Index k, Matrix<E> w, E* packed) {
  constexpr Index nr = kTileColumns<float>;
  const Index depth = depth_of_block(k, 1), depths = divide_up(k, depth), panels = divide_up(n, nr);
  parallel_for(depths * panels, [&](Index job) {
    const Index k0 = job / panels * depth, kn = smaller(depth, k - k0), j = job % panels * nr;
    WeightsRight<E>{w}.pack(packed + k0 * panels * nr + j * kn, k0, kn, j, smaller(nr, n - j));
  });
}

template <class E>
void linear(Index m, Index n, Index k, Matrix<float> x, const E* packed, const float* scale,
            const float* bias, float* y) {
  const PackedRight<E> right{packed, round_up(n, kTileColumns<float>)};
  const MatrixLeft<float> left{x};
  const MatrixOut<float> out{y, n};
  const ScaleAndBias epilogue{scale, bias};
  if (m <= 2 * kTileRows || is_same<E, float>) {
    gemm<float>(m, n, k, 1, left, right, out, epilogue);
  } else {
    gemm<float>(m, n, k, 1, left, Widening<E>{right}, out, epilogue);
  }
}

// The same bits, of weights (n, k) that are not packed.
template <class E>
void linear_unpacked(Index m, Index n, Index k, Matrix<float> x, Matrix<E> w, const float* scale,
                     const float* bias, float* y) {
  gemm<float>(m, n, k, 1, MatrixLeft<float>{x}, WideningRows<E>{w}, MatrixOut<float>{y, n},
              ScaleAndBias{scale, bias});
}

}  // namespace minidl::MINIDL_ISA
