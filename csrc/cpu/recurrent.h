// RNN, LSTM and GRU over whole sequences, forwards and backwards (minidl/ops/rnn.py).
//
// What does not wait for the step before is one matrix product over all steps, made by the caller:
// the inputs' share of the gates, and the gradients of the weights. Here is the loop over time.
// A step multiplies the weights with the states, W (G H x H) times h (H x N), and passes the sums
// on to the gates at once, while they are in the cache. So that nothing has to be turned around
// between two steps, everything lies with the batch in the last dimension: the vectors run along
// it, and the new states are the right operand of the next product as they are written. The
// weights are packed once for the whole sequence.
//
// What the way back needs of a step (the gates, mostly) is kept on the way there, as it lies in the
// registers: nothing has to be multiplied again.
//
// A job is a block of units with all their gates, so a thread needs nothing from another within a
// step. Each element is a sum over k in order: the bits do not depend on the threads.
#pragma once

#include "gemm.h"
#include "vector_math.h"

namespace minidl::MINIDL_ISA {

// ---- The cells: one step for a vector of the batch ----------------------------------------------
//
// a: the gates' sums from the inputs, b: from the states, biases included. forward() turns the
// states before the step into those after it, and fills `kept`. d is what arrives at the states
// (dh and dc): backward() sets da and db, what goes back to a and to b, and turns d into what goes
// back to the states before, except through b.

template <class T, bool kRelu>
struct RnnCell {
  static constexpr int gates = 1, states = 1, kept = 1;  // h
  using V = Vec<T>;
  static MINIDL_INLINE void forward(const V* a, const V* b, V* state, V* kept) {
    const V z = a[0] + b[0];
    kept[0] = state[0] = kRelu ? (z < T(0) ? V{} : z) : vtanh<T>(z);
  }
  static MINIDL_INLINE void backward(const V* kept, V* d, V* da, V* db) {
    const V h = kept[0];
    da[0] = db[0] = kRelu ? d[0] * (h > T(0) ? broadcast(T(1)) : V{}) : d[0] * (T(1) - h * h);
    d[0] = V{};
  }
};

template <class T>
struct LstmCell {                                        // i, f, g, o; the states are h and c
  static constexpr int gates = 4, states = 2, kept = 6;  // the gates, c before, tanh c
  using V = Vec<T>;
  static MINIDL_INLINE void forward(const V* a, const V* b, V* state, V* kept) {
    const V i = vsigmoid<T>(a[0] + b[0]), f = vsigmoid<T>(a[1] + b[1]);
    const V g = vtanh<T>(a[2] + b[2]), o = vsigmoid<T>(a[3] + b[3]), before = state[1];
    state[1] = f * before + i * g;
    const V tanh_c = vtanh<T>(state[1]);
    state[0] = o * tanh_c;
    kept[0] = i, kept[1] = f, kept[2] = g, kept[3] = o, kept[4] = before, kept[5] = tanh_c;
  }
  static MINIDL_INLINE void backward(const V* kept, V* d, V* da, V* db) {
    const V i = kept[0], f = kept[1], g = kept[2], o = kept[3], before = kept[4], tanh_c = kept[5];
    const V dc = d[1] + d[0] * (o * (T(1) - tanh_c * tanh_c));
    da[0] = db[0] = dc * (g * i * (T(1) - i));
    da[1] = db[1] = dc * (before * f * (T(1) - f));
    da[2] = db[2] = dc * (i * (T(1) - g * g));
    da[3] = db[3] = d[0] * (tanh_c * o * (T(1) - o));
    d[0] = V{};
    d[1] = dc * f;
  }
};

template <class T>
struct GruCell {                                         // r, z, n
  static constexpr int gates = 3, states = 1, kept = 5;  // the gates, b of n, h before
  using V = Vec<T>;
  static MINIDL_INLINE void forward(const V* a, const V* b, V* state, V* kept) {
    const V r = vsigmoid<T>(a[0] + b[0]), z = vsigmoid<T>(a[1] + b[1]);
    const V n = vtanh<T>(a[2] + r * b[2]), before = state[0];
    state[0] = n + z * (before - n);
    kept[0] = r, kept[1] = z, kept[2] = n, kept[3] = b[2], kept[4] = before;
  }
  static MINIDL_INLINE void backward(const V* kept, V* d, V* da, V* db) {
    const V r = kept[0], z = kept[1], n = kept[2], b_n = kept[3], before = kept[4];
    const V to_n = (T(1) - z) * (T(1) - n * n);
    da[0] = db[0] = d[0] * (to_n * b_n * r * (T(1) - r));
    da[1] = db[1] = d[0] * ((before - n) * z * (T(1) - z));
    da[2] = d[0] * to_n;
    db[2] = da[2] * r;
    d[0] = d[0] * z;
  }
};

// ---- What both directions share -----------------------------------------------------------------

// Matrices (rows x batch) as right operands of the micro-kernel: a panel is `rows` rows of as many
// columns as a tile has; beyond the batch it is 0.
template <class T>
struct Panels {
  static constexpr Index nr = kTileColumns<T>;
  Scratch<T> data;
  Index rows;
  Panels(Index panels, Index rows_) : data(panels * rows_ * nr), rows(rows_) {
    std::memset(data.get(), 0, static_cast<std::size_t>(panels * rows * nr) * sizeof(T));
  }
  T* row(Index panel, Index i) const { return data.get() + (panel * rows + i) * nr; }
};

template <class T>
struct Sequence {
  static constexpr Index nr = kTileColumns<T>;
  const Recurrent& s;
  EvenParts blocks;    // of units
  Index panels;        // of the batch
  Scratch<T> lengths;  // of each sequence, as T; 0 beyond the batch

  explicit Sequence(const Recurrent& s_)
      : s(s_), blocks(s.hidden, kTileRows), panels(divide_up(s.batch, nr)), lengths(panels * nr) {
    for (Index n = 0; n < panels * nr; ++n) {
      const bool there = n < s.batch;
      lengths.get()[n] = static_cast<T>(!there ? 0 : s.lengths ? s.lengths[n] : s.steps);
    }
  }

  Index width(Index panel) const { return smaller(nr, s.batch - panel * nr); }

  // f(block, panel), each on some thread.
  template <class F>
  void for_jobs(const F& f) const {
    parallel_for(blocks.parts * panels, [&](Index job) { f(job / panels, job % panels); });
  }

  // Rows of a matrix, packed for every block of units: `gates` times as many rows of `k`.
  template <class Left>
  void pack(const Left& left, Index gates, Index k, T* dst) const {
    parallel_for(blocks.parts, [&](Index block) {
      const Index begin = blocks.begin(block), rows = blocks.size(block);
      for (Index gate = 0; gate < gates; ++gate) {
        left.pack(dst + (begin * gates + gate * rows) * k, gate * s.hidden + begin, rows, 0, k);
      }
    });
  }

  // A tile (rows of a block) x (a panel's columns) of packed weights times a panel.
  void multiply(const T* packed, Index block, Index k, const T* panel, Index columns,
                T* tile) const {
    const auto kernel = kernel_for<T>(panel, blocks.size(block), divide_up(columns, kLanes<T>));
    kernel(k, packed, panel, tile, nr, kLanes<T>, false);
  }

  // A block of units of a (batch x hidden) matrix, turned into a tile; and back.
  void read_turned(const T* matrix, Index block, Index panel, T* tile) const {
    transpose(tile, nr, matrix + panel * nr * s.hidden + blocks.begin(block), s.hidden,
              width(panel), blocks.size(block));
  }
  void write_turned(const T* tile, Index block, Index panel, T* matrix) const {
    transpose(matrix + panel * nr * s.hidden + blocks.begin(block), s.hidden, tile, nr,
              blocks.size(block), width(panel));
  }
};

template <class T>
MINIDL_INLINE T bias_of(const T* bias, Index i) {
  return bias ? bias[i] : T(0);
}

// ---- Forwards -----------------------------------------------------------------------------------

// a (G H x T N), the states before the first step `first` (S, N, H) -> `states` (S, T, N, H), and,
// unless null, `kept` (K H x T N).
template <class T, class Cell>
void run_forward(const Recurrent& s, const T* a, const T* w_hh, const T* b_ih, const T* b_hh,
                 const T* first, T* states, T* kept) {
  constexpr Index nr = kTileColumns<T>, lanes = kLanes<T>;
  constexpr Index G = Cell::gates, S = Cell::states, K = Cell::kept;
  const Sequence<T> q(s);
  const Index H = s.hidden, N = s.batch, all = s.steps * N;
  const Scratch<T> weights(G * H * H);
  q.pack(MatrixLeft<T>{{w_hh, H, 1}}, G, H, weights.get());

  // The states, turned. Only h is read by other jobs, so only h has a copy for the next step.
  const Panels<T> h0(q.panels, H), h1(q.panels, H), c(S > 1 ? q.panels : 0, H);
  q.for_jobs([&](Index block, Index panel) {
    T tile[kTileRows * nr] = {};
    for (Index k = 0; k < S; ++k) {
      q.read_turned(first + k * N * H, block, panel, tile);
      T* const to = (k ? c : h0).row(panel, q.blocks.begin(block));
      std::memcpy(to, tile, static_cast<std::size_t>(q.blocks.size(block) * nr) * sizeof(T));
    }
  });

  for (Index t = 0; t < s.steps; ++t) {
    const Panels<T>&now = t % 2 ? h1 : h0, &next = t % 2 ? h0 : h1;
    q.for_jobs([&](Index block, Index panel) {
      const Index begin = q.blocks.begin(block), rows = q.blocks.size(block);
      const Index columns = q.width(panel);
      T sums[G][kTileRows * nr], out[S][kTileRows * nr];
      for (Index gate = 0; gate < G; ++gate) {
        q.multiply(weights.get() + (begin * G + gate * rows) * H, block, H, now.row(panel, 0),
                   columns, sums[gate]);
      }
      for (Index r = 0; r < rows; ++r) {
        const Index unit = begin + r;
        for (Index v = 0; v < columns; v += lanes) {
          const Index n = panel * nr + v, left = N - n;
          Vec<T> from_x[G], from_h[G], state[S], old[S], keep[K];
          for (Index gate = 0; gate < G; ++gate) {
            const Index row = gate * H + unit;
            from_x[gate] = load_up_to(a + row * all + t * N + n, left, T(0)) + bias_of(b_ih, row);
            from_h[gate] = load(sums[gate] + r * nr + v) + bias_of(b_hh, row);
          }
          old[0] = state[0] = load(now.row(panel, unit) + v);
          if (S > 1) old[S - 1] = state[S - 1] = load(c.row(panel, unit) + v);
          Cell::forward(from_x, from_h, state, keep);
          for (Index k = 0; kept && k < K; ++k) {
            store_up_to(kept + (k * H + unit) * all + t * N + n, keep[k], left);
          }
          const auto running = load(q.lengths.get() + n) > static_cast<T>(t);
          for (Index k = 0; k < S; ++k) {
            state[k] = running ? state[k] : old[k];
            store(out[k] + r * nr + v, state[k]);
          }
          store(next.row(panel, unit) + v, state[0]);
          if (S > 1) store(c.row(panel, unit) + v, state[S - 1]);
        }
      }
      for (Index k = 0; k < S; ++k) {
        q.write_turned(out[k], block, panel, states + (k * s.steps + t) * N * H);
      }
    });
  }
}

// ---- Backwards ----------------------------------------------------------------------------------

// kept (K H x T N) by run_forward; g (S, T, N, H). da and db (G H x T N), which may be the same;
// d_first (S, N, H).
template <class T, class Cell>
void run_backward(const Recurrent& s, const T* kept, const T* w_hh, const T* g, T* da, T* db,
                  T* d_first) {
  constexpr Index nr = kTileColumns<T>, lanes = kLanes<T>;
  constexpr Index G = Cell::gates, S = Cell::states, K = Cell::kept;
  const Sequence<T> q(s);
  const Index H = s.hidden, N = s.batch, all = s.steps * N;
  const Scratch<T> weights(G * H * H);
  q.pack(MatrixLeft<T>{{w_hh, 1, H}}, 1, G * H, weights.get());

  const Panels<T> d0(q.panels, G * H), d1(q.panels, G * H);      // db of a step, turned
  const Panels<T> dh(q.panels, H), dc(S > 1 ? q.panels : 0, H);  // what bypasses the product

  for (Index t = s.steps - 1; t >= -1; --t) {
    const Panels<T>&now = t % 2 ? d1 : d0, &next = t % 2 ? d0 : d1;
    q.for_jobs([&](Index block, Index panel) {
      const Index begin = q.blocks.begin(block), rows = q.blocks.size(block);
      const Index columns = q.width(panel);
      T arrived[S][kTileRows * nr] = {};
      q.multiply(weights.get() + begin * G * H, block, G * H, now.row(panel, 0), columns,
                 arrived[0]);
      for (Index r = 0; r < rows; ++r) {  // what the later steps want of the states
        for (Index v = 0; v < columns; v += lanes) {
          T* const sum = arrived[0] + r * nr + v;
          store(sum, load(sum) + load(dh.row(panel, begin + r) + v));
          if (S > 1) store(arrived[S - 1] + r * nr + v, load(dc.row(panel, begin + r) + v));
        }
      }
      if (t < 0) {
        for (Index k = 0; k < S; ++k) {
          q.write_turned(arrived[k], block, panel, d_first + k * N * H);
        }
        return;
      }
      T given[S][kTileRows * nr] = {};
      for (Index k = 0; k < S; ++k) {
        q.read_turned(g + (k * s.steps + t) * N * H, block, panel, given[k]);
      }
      for (Index r = 0; r < rows; ++r) {
        const Index unit = begin + r;
        for (Index v = 0; v < columns; v += lanes) {
          const Index n = panel * nr + v, left = N - n;
          Vec<T> keep[K], d[S], total[S], to_x[G], to_h[G];
          for (Index k = 0; k < K; ++k) {
            keep[k] = load_up_to(kept + (k * H + unit) * all + t * N + n, left, T(0));
          }
          for (Index k = 0; k < S; ++k) {
            total[k] = d[k] = load(arrived[k] + r * nr + v) + load(given[k] + r * nr + v);
          }
          Cell::backward(keep, d, to_x, to_h);
          const auto running = load(q.lengths.get() + n) > static_cast<T>(t);
          for (Index gate = 0; gate < G; ++gate) {
            const Index row = gate * H + unit, at = row * all + t * N + n;
            const Vec<T> in = running ? to_x[gate] : Vec<T>{}, on = running ? to_h[gate] : Vec<T>{};
            store(next.row(panel, row) + v, on);
            store_up_to(da + at, in, left);
            if (db != da) store_up_to(db + at, on, left);
          }
          store(dh.row(panel, unit) + v, running ? d[0] : total[0]);
          if (S > 1) store(dc.row(panel, unit) + v, running ? d[S - 1] : total[S - 1]);
        }
      }
    });
  }
}

template <class T>
void recurrent(const Recurrent& s, const T* a, const T* w_hh, const T* b_ih, const T* b_hh,
               const T* first, T* states, T* kept) {
  const auto run = s.cell == RecurrentCell::lstm       ? run_forward<T, LstmCell<T>>
                   : s.cell == RecurrentCell::gru      ? run_forward<T, GruCell<T>>
                   : s.cell == RecurrentCell::rnn_relu ? run_forward<T, RnnCell<T, true>>
                                                       : run_forward<T, RnnCell<T, false>>;
  run(s, a, w_hh, b_ih, b_hh, first, states, kept);
}

template <class T>
void recurrent_gradient(const Recurrent& s, const T* kept, const T* w_hh, const T* g, T* da, T* db,
                        T* d_first) {
  const auto run = s.cell == RecurrentCell::lstm       ? run_backward<T, LstmCell<T>>
                   : s.cell == RecurrentCell::gru      ? run_backward<T, GruCell<T>>
                   : s.cell == RecurrentCell::rnn_relu ? run_backward<T, RnnCell<T, true>>
                                                       : run_backward<T, RnnCell<T, false>>;
  run(s, kept, w_hh, g, da, db, d_first);
}

}  // namespace minidl::MINIDL_ISA
