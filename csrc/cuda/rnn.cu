// rnn.cu: one step of a recurrent layer between two matrix products: everything that happens to the
// gates, in one pass. A thread computes one hidden unit of one sequence. The equations are those of
// minidl/ops/rnn.py.
//
// `lengths` (N) or null: a sequence that has ended keeps its state.
#include "ptx.cuh"

__device__ inline float sigmoid(float x) { return 1 / (1 + expf(-x)); }

// This thread's sequence and unit; `alive`, if there is one.
struct Unit {
  int n, j;
  bool alive, ended;
  __device__ Unit(int N, int H, int t, const long long* lengths) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    n = i / H;
    j = i % H;
    alive = n < N;
    ended = alive && lengths && t >= lengths[n];
  }
};

// a, b: the inputs' and the states' share of the gates, (N, 4 H) in the order i, f, g, o.
extern "C" __global__ void __launch_bounds__(256)
    lstm_forward(int N, int H, int t, const long long* lengths, const float* a, const float* b,
                 const float* h_before, const float* c_before, float* h, float* c) {
  Unit unit(N, H, t, lengths);
  if (!unit.alive) return;
  int at = unit.n * H + unit.j, gate = unit.n * 4 * H + unit.j;
  if (unit.ended) {
    h[at] = h_before[at];
    c[at] = c_before[at];
    return;
  }
  float i = sigmoid(a[gate] + b[gate]), f = sigmoid(a[gate + H] + b[gate + H]);
  float g = tanhf(a[gate + 2 * H] + b[gate + 2 * H]),
        o = sigmoid(a[gate + 3 * H] + b[gate + 3 * H]);
  float cell = f * c_before[at] + i * g;
  c[at] = cell;
  h[at] = o * tanhf(cell);
}

// a: what the gates were computed from. g_h, g_c: the gradients of this step's states. dh and dc
// come from the step after and go to the step before; to dh the caller then adds da w_hh.
extern "C" __global__ void __launch_bounds__(256)
    lstm_backward(int N, int H, int t, const long long* lengths, const float* a,
                  const float* c_before, const float* c, const float* g_h, const float* g_c,
                  float* dh, float* dc, float* da) {
  Unit unit(N, H, t, lengths);
  if (!unit.alive) return;
  int at = unit.n * H + unit.j, gate = unit.n * 4 * H + unit.j;
  float to_h = dh[at] + g_h[at], to_c = dc[at] + g_c[at];
  if (unit.ended) {
    dh[at] = to_h;
    dc[at] = to_c;
    for (int k = 0; k < 4; ++k) da[gate + k * H] = 0;
    return;
  }
  float i = sigmoid(a[gate]), f = sigmoid(a[gate + H]), g = tanhf(a[gate + 2 * H]),
        o = sigmoid(a[gate + 3 * H]), tanh_c = tanhf(c[at]);
  float through_c = to_c + to_h * o * (1 - tanh_c * tanh_c);
  da[gate] = through_c * g * i * (1 - i);
  da[gate + H] = through_c * c_before[at] * f * (1 - f);
  da[gate + 2 * H] = through_c * i * (1 - g * g);
  da[gate + 3 * H] = to_h * tanh_c * o * (1 - o);
  dh[at] = 0;
  dc[at] = through_c * f;
}

// a, b: the inputs' and the states' share, (N, 3 H) in the order r, z, n.
extern "C" __global__ void __launch_bounds__(256)
    gru_forward(int N, int H, int t, const long long* lengths, const float* a, const float* b,
                const float* h_before, float* h) {
  Unit unit(N, H, t, lengths);
  if (!unit.alive) return;
  int at = unit.n * H + unit.j, gate = unit.n * 3 * H + unit.j;
  if (unit.ended) {
    h[at] = h_before[at];
    return;
  }
  float r = sigmoid(a[gate] + b[gate]), z = sigmoid(a[gate + H] + b[gate + H]);
  float n = tanhf(a[gate + 2 * H] + r * b[gate + 2 * H]);
  h[at] = n + z * (h_before[at] - n);
}

// To dh the caller then adds db w_hh.
extern "C" __global__ void __launch_bounds__(256)
    gru_backward(int N, int H, int t, const long long* lengths, const float* a, const float* b,
                 const float* h_before, const float* g, float* dh, float* da, float* db) {
  Unit unit(N, H, t, lengths);
  if (!unit.alive) return;
  int at = unit.n * H + unit.j, gate = unit.n * 3 * H + unit.j;
  float to_h = dh[at] + g[at];
  if (unit.ended) {
    dh[at] = to_h;
    for (int k = 0; k < 3; ++k) da[gate + k * H] = db[gate + k * H] = 0;
    return;
  }
  float b_n = b[gate + 2 * H];
  float r = sigmoid(a[gate] + b[gate]), z = sigmoid(a[gate + H] + b[gate + H]);
  float n = tanhf(a[gate + 2 * H] + r * b_n), to_n = to_h * (1 - z) * (1 - n * n);
  da[gate] = db[gate] = to_n * b_n * r * (1 - r);
  da[gate + H] = db[gate + H] = to_h * (h_before[at] - n) * z * (1 - z);
  da[gate + 2 * H] = to_n;
  db[gate + 2 * H] = to_n * r;
  dh[at] = to_h * z;
}
