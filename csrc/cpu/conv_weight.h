// The gradient of a convolution with respect to its weights.
//
//   gw[o][(c,r,s)] = sum over images and output pixels of  g[o][pixel] * x[c][pixel moved by (r,s)]
//
// A matrix product with a short, wide result and a very long sum. Here not even a part of im2col is
// packed: the micro-kernel takes its left elements, one at a time, straight from the (padded)
// image, one row pointer for each (c,r,s); its right vectors are g turned to [pixel][o].
//
//   for each unit of the sum (a few rows of an image, or a few small images):
//     turn g, pad x            -> both stay in the L2 cache
//     for each panel of o, for each panel of (c,r,s):  tile += the unit's part
//
// The sum is cut into a fixed number of chunks, each with its own partial result; they are added
// in order. Chunks depend on the shape alone, so the bits do not depend on the threads.
#pragma once

#include "depthwise.h"
#include "gemm.h"

namespace minidl::MINIDL_ISA {

// How one unit is walked: `images` times `rows` times `columns` pixels, and what to add to the row
// pointers from one to the next.
struct Walk {
  Index images, rows, columns;
  Index image_step, row_step, column_step;
};

// C (M rows of kTileColumns) = or += sum over the walk's pixels of left[i][..] * right[pixel][0..)
template <class T, int M, int V>
void accumulate_tile(const Walk& walk, const T* const* left, const T* right, T* c, bool add) {
  constexpr Index nr = kTileColumns<T>;
  Vec<T> sum[M][V];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      sum[i][v] = add ? load(c + i * nr + v * kLanes<T>) : Vec<T>{};
    }
  }
  const Index step = walk.column_step;
  for (Index image = 0; image < walk.images; ++image) {
    const T* p[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) p[i] = left[i] + image * walk.image_step;
    for (Index row = 0; row < walk.rows; ++row) {
      for (Index q = 0, at = 0; q < walk.columns; ++q, at += step, right += nr) {
        Vec<T> b[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) b[v] = load(right + v * kLanes<T>);
#pragma GCC unroll 8
        for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
          for (int v = 0; v < V; ++v) sum[i][v] += p[i][at] * b[v];
        }
      }
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) p[i] += walk.row_step;
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(c + i * nr + v * kLanes<T>, sum[i][v]);
  }
}

template <class T>
struct AccumulateTable {
  void (*kernel[kTileRows][kTileVectors])(const Walk&, const T* const*, const T*, T*, bool);
  constexpr AccumulateTable() : kernel{} { fill<1, 1>(); }

 private:
  template <int M, int V>
  constexpr void fill() {
    kernel[M - 1][V - 1] = &accumulate_tile<T, M, V>;
    if constexpr (V < kTileVectors) {
      fill<M, V + 1>();
    } else if constexpr (M < kTileRows) {
      fill<M + 1, 1>();
    }
  }
};
template <class T>
constexpr AccumulateTable<T> accumulate_table{};

// `channels` planes of h x w; of each the lines from `top` (which may be negative) on, with
// `left` zeros before each line and as many behind as make it `width` long.
template <class T>
void copy_padded(T* dst, const T* src, Index channels, Index h, Index w, Index top, Index lines,
                 Index left, Index width) {
  const Index before = smaller(left, width), copied = smaller(w, width - before);
  for (Index c = 0; c < channels; ++c, src += h * w) {
    for (Index y = top; y < top + lines; ++y, dst += width) {
      if (y < 0 || y >= h) {
        std::memset(dst, 0, static_cast<std::size_t>(width) * sizeof(T));
        continue;
      }
      const T* in = src + y * w;
      for (Index q = 0; q < before; ++q) dst[q] = 0;
      for (Index q = 0; q < copied; ++q) dst[before + q] = in[q];
      for (Index q = before + copied; q < width; ++q) dst[q] = 0;
    }
  }
}

template <class T>
void conv2d_weight_of_group(const Conv2d& p, Index c, Index o, const T* g, const T* x, T* gw) {
  constexpr Index nr = kTileColumns<T>;
  constexpr Index kUnitPixels = 256;        // a turned panel of g: 16 KiB of L1
  constexpr Index kAccumulators = 1 << 16;  // elements of the partial result that a job works on
  constexpr Index kJobs = 32;               // enough for the threads of a workstation

  const Index taps = p.kh * p.kw, pixels = p.oh * p.ow;
  const Index g_image = p.o * pixels, x_image = p.c * p.h * p.w;

  // The units of the sum: `rows` rows of one image, or `images` whole small images.
  const Index rows = smaller(p.oh, larger(1, kUnitPixels / p.ow));
  const Index images = rows < p.oh ? 1 : smaller(p.n, larger(1, kUnitPixels / pixels));
  const Index units_an_image = divide_up(p.oh, rows);
  const Index units = divide_up(p.n, images) * units_an_image;

  // The parts of the result: blocks of o and of channels; and the chunks of the sum.
  const EvenParts o_parts(o, 8 * nr);
  const Index o_width = round_up(o_parts.size(0), nr);
  const EvenParts c_parts(c, larger(1, kAccumulators / (taps * o_width)));
  const Index blocks = o_parts.parts * c_parts.parts;
  const Index chunks = smaller(units, divide_up(kJobs, blocks));
  const EvenParts chunk(units, divide_up(units, chunks));
  const Index block_size = round_up(c_parts.size(0) * taps, 4) * o_width;
  const Scratch<T> partial(chunk.parts * blocks * block_size);

  const bool padded = p.pad_h > 0 || p.pad_w > 0;
  const Index reach_h = (p.kh - 1) * p.dilation_h + 1, reach_w = (p.kw - 1) * p.dilation_w + 1;
  const Index line = padded ? (p.ow - 1) * p.stride_w + reach_w : p.w;
  const Index most_lines = (rows - 1) * p.stride_h + reach_h;

  parallel_for(chunk.parts * blocks, [&](Index job) {
    const Index this_chunk = job / blocks, block = job % blocks;
    const Index o0 = o_parts.begin(block / c_parts.parts), on = o_parts.size(block / c_parts.parts);
    const Index c0 = c_parts.begin(block % c_parts.parts), cn = c_parts.size(block % c_parts.parts);
    const EvenParts panels(cn * taps, kTileRows);
    T* sum = partial.get() + job * block_size;
    std::memset(sum, 0, static_cast<std::size_t>(block_size) * sizeof(T));

    const Scratch<T> turned(divide_up(on, nr) * nr * images * rows * p.ow);
    const Scratch<T> pad(padded ? images * cn * most_lines * line : 0);
    const Scratch<const T*> left(cn * taps);

    for (Index u = chunk.begin(this_chunk); u < chunk.begin(this_chunk) + chunk.size(this_chunk);
         ++u) {
      const Index image0 = u / units_an_image * images, y0 = u % units_an_image * rows;
      Walk walk{smaller(images, p.n - image0),
                smaller(rows, p.oh - y0),
                p.ow,
                x_image,
                p.stride_h * p.w,
                p.stride_w};
      const Index unit_pixels = walk.rows * walk.columns, all_pixels = walk.images * unit_pixels;

      // g turned: [panel of o][pixel][nr]
      for (Index j = 0; j < on; j += nr) {
        const Index width = smaller(nr, on - j);
        T* dst = turned.get() + j * all_pixels;
        if (width < nr) {
          std::memset(dst, 0, static_cast<std::size_t>(all_pixels * nr) * sizeof(T));
        }
        for (Index i = 0; i < walk.images; ++i) {
          const T* src = g + (image0 + i) * g_image + (o0 + j) * pixels + y0 * p.ow;
          transpose(dst + i * unit_pixels * nr, nr, src, pixels, width, unit_pixels);
        }
      }

      // Where (c, r, s) begins: in the image itself, or in a padded copy of the lines in question.
      const T* source = x + image0 * x_image + c0 * p.h * p.w + y0 * p.stride_h * p.w;
      Index channel = p.h * p.w;
      if (padded) {
        const Index lines = (walk.rows - 1) * p.stride_h + reach_h;
        channel = lines * line;
        walk.image_step = cn * channel;
        walk.row_step = p.stride_h * line;
        source = pad.get();
        for (Index i = 0; i < walk.images; ++i) {
          const T* image = x + (image0 + i) * x_image + c0 * p.h * p.w;
          copy_padded(pad.get() + i * walk.image_step, image, cn, p.h, p.w,
                      y0 * p.stride_h - p.pad_h, lines, p.pad_w, line);
        }
      }
      for (Index k = 0; k < cn * taps; ++k) {
        const Index r = k % taps / p.kw, s = k % p.kw;
        left.get()[k] = source + k / taps * channel + r * p.dilation_h * line + s * p.dilation_w;
      }

      for (Index j = 0; j < on; j += nr) {
        const Index vectors = divide_up(smaller(nr, on - j), kLanes<T>);
        for (Index i = 0; i < panels.parts; ++i) {
          const Index row = panels.begin(i);
          accumulate_table<T>.kernel[panels.size(i) - 1][vectors - 1](
              walk, left.get() + row, turned.get() + j * all_pixels, sum + j * cn * taps + row * nr,
              true);
        }
      }
    }
  });

  // Add the chunks in order, and turn [panel of o][(c,r,s)][nr] to gw[o][(c,r,s)].
  constexpr Index kSlice = 64;
  const Index slices = divide_up(c_parts.size(0) * taps, kSlice);
  parallel_for(blocks * (o_width / nr) * slices, [&](Index job) {
    const Index block = job / (o_width / nr * slices), j = job / slices % (o_width / nr) * nr;
    const Index o0 = o_parts.begin(block / c_parts.parts), on = o_parts.size(block / c_parts.parts);
    const Index c0 = c_parts.begin(block % c_parts.parts), cn = c_parts.size(block % c_parts.parts);
    const Index row = job % slices * kSlice, count = smaller(kSlice, cn * taps - row);
    if (j >= on || count <= 0) return;
    alignas(64) T total[kSlice * nr];
    for (Index i = 0; i < chunk.parts; ++i) {
      const T* part = partial.get() + (i * blocks + block) * block_size + j * cn * taps + row * nr;
      for (Index e = 0; e < count * nr; ++e) total[e] = i == 0 ? part[e] : total[e] + part[e];
    }
    transpose(gw + (o0 + j) * c * taps + c0 * taps + row, c * taps, total, nr, count,
              smaller(nr, on - j));
  });
}

template <class T>
void conv2d_weight(const Conv2d& p, const T* g, const T* x, T* gw) {
  if (depthwise(p)) return depthwise_conv2d_weight(p, g, x, gw);
  const Index c = p.c / p.groups, o = p.o / p.groups;
  for (Index group = 0; group < p.groups; ++group) {
    conv2d_weight_of_group(p, c, o, g + group * o * p.oh * p.ow, x + group * c * p.h * p.w,
                           gw + group * o * c * p.kh * p.kw);
  }
}

}  // namespace minidl::MINIDL_ISA
