// Convolution with a 3x3 kernel and stride 1, with a quarter of the multiplications.
//
// Winograd's F(4x4, 3x3) (S. Winograd 1980; A. Lavin and S. Gray, "Fast Algorithms for
// Convolutional Neural Networks", 2016): a tile of 4x4 outputs sees 6x6 inputs. Kernel and tile are
// polynomials, and convolution is their product. So: evaluate both at six points in each
// direction, multiply point by point, and interpolate.
//
//   Y = A' [ (G g G') . (B' d B) ] A        d: 6x6 inputs, g: 3x3 kernel, Y: 4x4 outputs
//
// 36 multiplications take the place of 144. Summed over channels, each of the 36 points is a matrix
// product of its own, [tile][channel] * [channel][output channel]. The gradient with respect to the
// input is the same convolution with the kernel turned by 180 degrees. The one with respect to the
// kernel reads the equation the other way, the product summed over tiles:
//
//   gw = G' [ (B' d B) . (A gy A') ] G
//
// The points are 0, 3/4, -3/4, 3/2, -3/2 and infinity. They are powers of two times small numbers,
// exact in binary, and lie closer to 1 than the usual 0, 1, -1, 2, -2: less error, for the same
// work (B. Barabasz et al., "Error Analysis and Improving the Accuracy of Winograd Convolution for
// Deep Neural Networks", 2020).
//
// Error. With |.| taken of every matrix and operand, the equations above give the size S of each
// result. Its error is at most (K + 40) u S, to first order: u = 2^-24, K the number of channels
// (tiles, for gw) in the sum; each number passes fewer than 40 roundings in the four transforms,
// seven or fewer in each direction. S is up to 83 times the sum of |x w|, so the bound is that much
// looser than the direct one. What one sees is a relative error near 2e-6, direct 4e-7.
//
// Inside, an image lies channels last, so that a vector is always some channels of one pixel and
// every transform is plain arithmetic on vectors.
#pragma once

#include "conv_weight.h"

namespace minidl::MINIDL_ISA::winograd {

using Vector = Vec<float>;
constexpr Index kWidth = kLanes<float>, kPanel = kTileColumns<float>;
constexpr Index kPoints = 36;

// Between the 36 planes of a buffer: else they would fall into the same sets of the cache.
constexpr Index kOffset = 16;

// ---- The transforms, in one direction ---------------------------------------------------------

constexpr float a = 0.75f, b = 1.5f, a2 = a * a, b2 = b * b;

struct Input {  // B'
  static constexpr int in = 6, out = 6;
  static MINIDL_INLINE void apply(const Vector* d, Vector* v) {
    const Vector even_a = d[4] - b2 * d[2], odd_a = a * (d[3] - b2 * d[1]);
    const Vector even_b = d[4] - a2 * d[2], odd_b = b * (d[3] - a2 * d[1]);
    v[0] = d[4] - (a2 + b2) * d[2] + a2 * b2 * d[0];
    v[1] = even_a + odd_a;
    v[2] = even_a - odd_a;
    v[3] = even_b + odd_b;
    v[4] = even_b - odd_b;
    v[5] = d[5] - (a2 + b2) * d[3] + a2 * b2 * d[1];
  }
};

struct Output {  // A'
  static constexpr int in = 6, out = 4;
  static MINIDL_INLINE void apply(const Vector* m, Vector* y) {
    const Vector sum_a = m[1] + m[2], difference_a = m[1] - m[2];
    const Vector sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    y[0] = m[0] + sum_a + sum_b;
    y[1] = a * difference_a + b * difference_b;
    y[2] = a2 * sum_a + b2 * sum_b;
    y[3] = a2 * a * difference_a + b2 * b * difference_b + m[5];
  }
};

struct OutputGradient {  // A
  static constexpr int in = 4, out = 6;
  static MINIDL_INLINE void apply(const Vector* y, Vector* m) {
    const Vector even_a = y[0] + a2 * y[2], odd_a = a * y[1] + a2 * a * y[3];
    const Vector even_b = y[0] + b2 * y[2], odd_b = b * y[1] + b2 * b * y[3];
    m[0] = y[0];
    m[1] = even_a + odd_a;
    m[2] = even_a - odd_a;
    m[3] = even_b + odd_b;
    m[4] = even_b - odd_b;
    m[5] = y[3];
  }
};

// Each point's row of G has the product of its distances to the others as a denominator.
constexpr float g0 = 1 / (a2 * b2), ga = 1 / (2 * a2 * (a2 - b2)), gb = 1 / (2 * b2 * (b2 - a2));

struct Kernel {  // G
  static constexpr int in = 3, out = 6;
  static MINIDL_INLINE void apply(const Vector* w, Vector* u) {
    const Vector even_a = ga * (w[0] + a2 * w[2]), odd_a = ga * a * w[1];
    const Vector even_b = gb * (w[0] + b2 * w[2]), odd_b = gb * b * w[1];
    u[0] = g0 * w[0];
    u[1] = even_a + odd_a;
    u[2] = even_a - odd_a;
    u[3] = even_b + odd_b;
    u[4] = even_b - odd_b;
    u[5] = w[2];
  }
};

struct KernelGradient {  // G'
  static constexpr int in = 6, out = 3;
  static MINIDL_INLINE void apply(const Vector* u, Vector* w) {
    const Vector sum_a = ga * (u[1] + u[2]), difference_a = ga * (u[1] - u[2]);
    const Vector sum_b = gb * (u[3] + u[4]), difference_b = gb * (u[3] - u[4]);
    w[0] = g0 * u[0] + sum_a + sum_b;
    w[1] = a * difference_a + b * difference_b;
    w[2] = a2 * sum_a + b2 * sum_b + u[5];
  }
};

// In both directions: get(i, j) gives the elements, put(i, j, v) takes the results.
template <class Transform, class Get, class Put>
MINIDL_INLINE void transform(const Get& get, const Put& put) {
  Vector half[Transform::out][Transform::in];
#pragma GCC unroll 6
  for (int j = 0; j < Transform::in; ++j) {
    Vector column[Transform::in], result[Transform::out];
#pragma GCC unroll 6
    for (int i = 0; i < Transform::in; ++i) column[i] = get(i, j);
    Transform::apply(column, result);
#pragma GCC unroll 6
    for (int i = 0; i < Transform::out; ++i) half[i][j] = result[i];
  }
#pragma GCC unroll 6
  for (int i = 0; i < Transform::out; ++i) {
    Vector result[Transform::out];
    Transform::apply(half[i], result);
#pragma GCC unroll 6
    for (int j = 0; j < Transform::out; ++j) put(i, j, result[j]);
  }
}

// ---- Tiles ------------------------------------------------------------------------------------

// Images, and how tiles of outputs lie over them. Rows of tiles are counted through all images.
struct Tiles {
  const float* data;
  Index n, channels, h, w;
  Index pad_h, pad_w;
  Index down, across;  // tiles in an image
  Index rows() const { return n * down; }
};

// dst[row][column][channel], `rows` rows from `top` on (which may be negative), with `left` zeros
// before each row and as many behind as make it `width` long; `step` floats for a pixel.
inline void channels_last(float* dst, const float* image, const Tiles& t, Index top, Index rows,
                          Index left, Index width, Index step) {
  if (step > t.channels) {
    std::memset(dst, 0, static_cast<std::size_t>(rows * width * step) * sizeof(float));
  }
  for (Index y = top; y < top + rows; ++y, dst += width * step) {
    const bool outside = y < 0 || y >= t.h;
    const Index before = outside ? width : left, behind = outside ? 0 : width - left - t.w;
    std::memset(dst, 0, static_cast<std::size_t>(before * step) * sizeof(float));
    std::memset(dst + (width - behind) * step, 0,
                static_cast<std::size_t>(behind * step) * sizeof(float));
    if (outside) continue;
    transpose(dst + left * step, step, image + y * t.w, t.h * t.w, t.channels, t.w);
  }
}

// Rows `first` to `last` - 1 of tiles, transformed: out(tile, channel) is where the first of the 36
// points goes, for a vector of channels; the next is `plane` on.
template <class Transform, class Out>
void transform_tiles(const Tiles& t, Index first, Index last, const Out& out, Index plane) {
  constexpr Index side = Transform::in;
  const Index step = round_up(t.channels, kWidth), width = 4 * t.across + side - 4;
  const Scratch<float> pixels((4 * smaller(last - first, t.down) + side - 4) * width * step);
  for (Index row = first, end; row < last; row = end) {  // image by image
    const Index image = row / t.down;
    end = smaller(last, (image + 1) * t.down);
    channels_last(pixels.get(), t.data + image * t.channels * t.h * t.w, t,
                  row % t.down * 4 - t.pad_h, 4 * (end - row) + side - 4, t.pad_w, width, step);
    for (Index tile = 0; tile < (end - row) * t.across; ++tile) {
      const float* corner =
          pixels.get() + (tile / t.across * 4 * width + tile % t.across * 4) * step;
      for (Index c = 0; c < t.channels; c += kWidth) {
        float* to = out((row - first) * t.across + tile, c);
        transform<Transform>(
            [&](int i, int j) { return load(corner + (i * width + j) * step + c); },
            [&](int i, int j, Vector v) { store(to + (i * 6 + j) * plane, v); });
      }
    }
  }
}

// Channels in panels of up to kPanel, as equal as whole vectors allow.
struct Panels {
  EvenParts vectors;
  explicit Panels(Index channels) : vectors(divide_up(channels, kWidth), kTileVectors) {}
  Index count() const { return vectors.parts; }
  Index begin(Index panel) const { return vectors.begin(panel) * kWidth; }
  Index of(Index channel) const {  // the panel that a channel is in
    Index panel = channel / kPanel;
    while (panel + 1 < count() && begin(panel + 1) <= channel) ++panel;
    return panel;
  }
};

// C[i][0..) = or += sum over k of A[i][k] * B[k][0..), as many rows as there are; the elements of A
// are row_step and k_step apart; C and B have rows of kPanel.
inline void multiply(Index rows, Index vectors, Index depth, const float* left, Index row_step,
                     Index k_step, const float* right, float* c, bool add) {
  const Walk walk{1, 1, depth, 0, 0, k_step};
  for (Index i = 0; i < rows; i += kTileRows) {
    const Index m = smaller(kTileRows, rows - i);
    const float* row[kTileRows];
    for (Index r = 0; r < m; ++r) row[r] = left + (i + r) * row_step;
    accumulate_table<float>.kernel[m - 1][vectors - 1](walk, row, right, c + i * kPanel, add);
  }
}

// ---- Convolution ------------------------------------------------------------------------------

// The element of output channel o, input channel c and tap t: data[o * out + c * in + t].
struct Filters {
  const float* data;
  Index out, in;
  bool turned;  // by 180 degrees
};

// y (n, outputs, h, w) = conv2d(x, filters) + bias, where bias is not null; then perhaps ReLU.
inline void convolve(const Tiles& x, const Filters& w, Index outputs, Index out_h, Index out_w,
                     const float* bias, bool relu, float* y) {
  const Index c = x.channels, step = round_up(c, kWidth);
  const Panels panels(outputs);
  const Index kernel_plane = panels.count() * c * kPanel + kOffset;
  const Scratch<float> kernels(kPoints * kernel_plane);  // [point][panel][channel][output]

  parallel_for(panels.vectors.parts * divide_up(c, 8), [&](Index job) {
    const Index panel = job / divide_up(c, 8), first = job % divide_up(c, 8) * 8;
    for (Index v = 0; v < panels.vectors.size(panel); ++v) {
      const Index o = panels.begin(panel) + v * kWidth;
      for (Index i = first; i < smaller(c, first + 8); ++i) {
        alignas(64) float taps[9 * kWidth] = {};
        transpose(taps, kWidth, w.data + o * w.out + i * w.in, w.out, smaller(kWidth, outputs - o),
                  9);
        float* to = kernels.get() + (panel * c + i) * kPanel + v * kWidth;
        transform<Kernel>(
            [&](int r, int s) {
              const int tap = w.turned ? 8 - 3 * r - s : 3 * r + s;
              return load(taps + tap * kWidth);
            },
            [&](int r, int s, Vector u) { store(to + (r * 6 + s) * kernel_plane, u); });
      }
    }
  });

  // A job is as many rows of tiles as its 36 matrices find room for in the L2 cache.
  constexpr Index kTiles = 64;
  const Index threads = get_num_threads();
  const Index jobs = divide_up(x.rows(), larger(1, kTiles / x.across));
  const EvenParts parts(x.rows(), divide_up(x.rows(), round_up(jobs, threads)));
  parallel_for(parts.parts, [&](Index job) {
    const Index first = parts.begin(job), last = first + parts.size(job);
    const Index tiles = (last - first) * x.across;
    const Index plane = tiles * step + kOffset, product_plane = tiles * kPanel + kOffset;
    const Scratch<float> inputs(kPoints * plane);            // [point][tile][channel]
    const Scratch<float> products(kPoints * product_plane);  // [point][tile][output]
    const Scratch<float> pixels(16 * x.across * kPanel);     // [row][column][output]
    transform_tiles<Input>(
        x, first, last, [&](Index tile, Index i) { return inputs.get() + tile * step + i; }, plane);

    for (Index panel = 0; panel < panels.count(); ++panel) {
      const Index vectors = panels.vectors.size(panel), o = panels.begin(panel);
      for (Index point = 0; point < kPoints; ++point) {
        multiply(tiles, vectors, c, inputs.get() + point * plane, step, 1,
                 kernels.get() + point * kernel_plane + panel * c * kPanel,
                 products.get() + point * product_plane, false);
      }
      const Index outputs_here = smaller(vectors * kWidth, outputs - o);
      alignas(64) float bias_here[kPanel] = {};
      for (Index k = 0; bias && k < outputs_here; ++k) bias_here[k] = bias[o + k];
      for (Index row = first; row < last; ++row) {
        for (Index q = 0; q < x.across; ++q) {
          for (Index v = 0; v < vectors; ++v) {
            const float* from =
                products.get() + ((row - first) * x.across + q) * kPanel + v * kWidth;
            const Vector offset = load(bias_here + v * kWidth);
            transform<Output>(
                [&](int i, int j) { return load(from + (i * 6 + j) * product_plane); },
                [&](int i, int j, Vector sum) {
                  sum += offset;
                  if (relu) sum = sum < 0 ? Vector{} : sum;  // NaN stays NaN
                  store(pixels.get() + ((i * x.across + q) * 4 + j) * kPanel + v * kWidth, sum);
                });
          }
        }
        const Index image = row / x.down, top = row % x.down * 4;
        float* to = y + ((image * outputs + o) * out_h + top) * out_w;
        for (Index i = 0; i < smaller(4, out_h - top); ++i) {
          transpose(to + i * out_w, out_h * out_w, pixels.get() + i * 4 * x.across * kPanel, kPanel,
                    out_w, outputs_here);
        }
      }
    }
  });
}

// ---- The gradient with respect to the kernel --------------------------------------------------

// gw (outputs, channels, 3, 3), from x and the gradient g of the outputs.
inline void correlate(const Tiles& x, const Tiles& g, float* gw) {
  const Index c = x.channels, outputs = g.channels, step = round_up(c, kWidth);
  const Panels panels(outputs);
  const Index sum_plane = panels.count() * step * kPanel + kOffset;
  const Scratch<float> sums(kPoints * sum_plane);  // [point][panel][channel][output]

  // The sum goes on from block to block of tiles, so that its order is that of the tiles.
  constexpr Index kFloats = 1 << 21;  // of a block, transformed
  const Index most_tiles = larger(128, kFloats / (kPoints * (step + panels.count() * kPanel)));
  const EvenParts blocks(x.rows(), larger(1, most_tiles / x.across));
  const Index tiles = blocks.size(0) * x.across;
  const Index x_plane = tiles * step + kOffset, g_plane = tiles * panels.count() * kPanel + kOffset;
  const Scratch<float> inputs(kPoints * x_plane);     // [point][tile][channel]
  const Scratch<float> gradients(kPoints * g_plane);  // [point][panel][tile][output]

  for (Index block = 0; block < blocks.parts; ++block) {
    const Index first = blocks.begin(block), rows = blocks.size(block);
    const Index tiles_here = rows * x.across;
    const EvenParts parts(rows, larger(1, 32 / x.across));
    parallel_for(2 * parts.parts, [&](Index job) {
      const Index from = parts.begin(job / 2), to = from + parts.size(job / 2);
      const Index tile0 = from * x.across;
      if (job % 2 == 0) {
        transform_tiles<Input>(
            x, first + from, first + to,
            [&](Index tile, Index i) { return inputs.get() + (tile0 + tile) * step + i; }, x_plane);
      } else {
        transform_tiles<OutputGradient>(
            g, first + from, first + to,
            [&](Index tile, Index o) {
              const Index panel = panels.of(o);
              return gradients.get() + (panel * tiles_here + tile0 + tile) * kPanel + o -
                     panels.begin(panel);
            },
            g_plane);
      }
    });
    const EvenParts channels(divide_up(c, kTileRows), 8);
    parallel_for(kPoints * panels.count() * channels.parts, [&](Index job) {
      const Index point = job / (panels.count() * channels.parts);
      const Index panel = job / channels.parts % panels.count(), part = job % channels.parts;
      const Index i = channels.begin(part) * kTileRows;
      multiply(smaller(channels.size(part) * kTileRows, c - i), panels.vectors.size(panel),
               tiles_here, inputs.get() + point * x_plane + i, 1, step,
               gradients.get() + point * g_plane + panel * tiles_here * kPanel,
               sums.get() + point * sum_plane + (panel * step + i) * kPanel, block > 0);
    });
  }

  parallel_for(panels.count() * c, [&](Index job) {
    const Index panel = job / c, i = job % c;
    for (Index v = 0; v < panels.vectors.size(panel); ++v) {
      const Index o = panels.begin(panel) + v * kWidth;
      const float* from = sums.get() + (panel * step + i) * kPanel + v * kWidth;
      alignas(64) float taps[9 * kWidth];
      transform<KernelGradient>(
          [&](int r, int s) { return load(from + (r * 6 + s) * sum_plane); },
          [&](int r, int s, Vector w) { store(taps + (3 * r + s) * kWidth, w); });
      transpose(gw + (o * c + i) * 9, c * 9, taps, kWidth, 9, smaller(kWidth, outputs - o));
    }
  });
}

}  // namespace minidl::MINIDL_ISA::winograd

namespace minidl::MINIDL_ISA {

// ---- The kernels ------------------------------------------------------------------------------

// `image` seen by tiles of 4x4 outputs of an out_h x out_w plane.
inline winograd::Tiles tiles_of(const float* image, Index n, Index channels, Index h, Index w,
                                Index pad_h, Index pad_w, Index out_h, Index out_w) {
  return {image, n, channels, h, w, pad_h, pad_w, divide_up(out_h, 4), divide_up(out_w, 4)};
}

inline void conv2d_winograd(const Conv2d& p, const float* x, const float* w, const float* bias,
                            float* y) {
  winograd::convolve(tiles_of(x, p.n, p.c, p.h, p.w, p.pad_h, p.pad_w, p.oh, p.ow),
                     {w, p.c * 9, 9, false}, p.o, p.oh, p.ow, bias, p.relu, y);
}

inline void conv2d_input_winograd(const Conv2d& p, const float* g, const float* w, float* gx) {
  winograd::convolve(tiles_of(g, p.n, p.o, p.oh, p.ow, 2 - p.pad_h, 2 - p.pad_w, p.h, p.w),
                     {w, 9, p.c * 9, true}, p.c, p.h, p.w, nullptr, false, gx);
}

inline void conv2d_weight_winograd(const Conv2d& p, const float* g, const float* x, float* gw) {
  winograd::correlate(tiles_of(x, p.n, p.c, p.h, p.w, p.pad_h, p.pad_w, p.oh, p.ow),
                      tiles_of(g, p.n, p.o, p.oh, p.ow, 0, 0, p.oh, p.ow), gw);
}

}  // namespace minidl::MINIDL_ISA
