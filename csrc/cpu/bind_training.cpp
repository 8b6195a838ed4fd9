// The Python face of what a training step does beside products and convolutions: normalisation,
// softmax and cross entropy, dropout, ReLU.
#include <vector>

#include "bind.h"

namespace minidl {
namespace {

std::vector<Index> shape_vector(const py::array& a) { return {a.shape(), a.shape() + a.ndim()}; }

void expect_shape(const char* op, const char* name, const py::array& a, const char* as,
                  const py::array& b) {
  if (!a.attr("shape").equal(b.attr("shape"))) {
    bad_value(std::string(op) + ": " + name + " must have the shape of " + as + ", " + shape_of(b) +
              ", got " + shape_of(a));
  }
}

// ---- Normalisation ----------------------------------------------------------------------------

Index product(const std::vector<Index>& shape, std::size_t first, std::size_t end) {
  Index n = 1;
  for (std::size_t i = first; i < end; ++i) n *= shape[i];
  return n;
}

// How the groups, and the weights of shape `w` (broadcast to x's), lie in memory; nothing if the
// kernel cannot read them so.
std::optional<Norm> norm_geometry(const std::vector<Index>& x, std::vector<std::size_t> dim,
                                  std::vector<Index> w) {
  const std::size_t n = x.size();
  std::sort(dim.begin(), dim.end());
  for (std::size_t d : dim) {
    if (d >= n) bad_value("standardize: x has no dimension " + std::to_string(d));
  }
  if (w.size() > n || product(x, 0, n) == 0) return std::nullopt;
  w.insert(w.begin(), n - w.size(), 1);
  for (std::size_t i = 0; i < n; ++i) {
    if (w[i] != 1 && w[i] != x[i]) return std::nullopt;
  }
  const bool trailing = !dim.empty() && dim.front() + dim.size() == n && dim.back() == n - 1;
  const std::size_t k = n - dim.size();  // where the group's own dimensions begin
  if (trailing) {
    // The weights must span the dimensions first ... end-1, with first <= k <= end.
    std::size_t first = k, end = k;
    bool any = false;
    for (std::size_t i = 0; i < n; ++i) {
      if (w[i] == 1) continue;
      first = any ? first : i;
      end = i + 1;
      any = true;
    }
    while (first > k && x[first - 1] == 1) --first;
    while (end < k && x[end] == 1) ++end;
    if (first > k || end < k) return std::nullopt;
    for (std::size_t i = first; i < end; ++i) {
      if (w[i] != x[i]) return std::nullopt;
    }
    Norm s{};
    s.groups = product(x, 0, k);
    s.group_stride = product(x, k, n);
    s.weight_period = product(x, first, k);
    s.along = any && product(x, end, n) == 1 && end > k;
    s.runs = s.along ? 1 : product(x, k, end);
    s.length = s.run_stride = s.group_stride / s.runs;
    s.weight_stride = product(x, k, end);
    s.weight_step = s.along || end == k ? 0 : 1;
    return s;
  }
  const bool channel = n >= 2 && dim.size() == n - 1 && dim.front() == 0 && (n == 2 || dim[1] == 2);
  if (!channel) return std::nullopt;
  for (std::size_t i = 0; i < n; ++i) {
    if (i != 1 && w[i] != 1) return std::nullopt;
  }
  const Index size = product(x, 2, n);
  const bool one_weight = w[1] == 1;  // shared by the channels, if there is more than one
  if (one_weight && x[1] > 1 && product(w, 0, n) == 1) {
    return Norm{x[1], x[0], size, size, x[1] * size, 1, 0, 0, false};
  }
  return Norm{x[1], x[0], size, size, x[1] * size, x[1], 1, 0, false};
}

Index count_weights(const Norm& s) {
  const Index own = s.along ? s.length : s.weight_step ? s.runs : 1;
  return (s.weight_period - 1) * s.weight_stride + own;
}

using Dims = std::vector<std::size_t>;

// (mean, variance), a number for each group; or None.
py::object statistics(const py::array& x, const Dims& dim) {
  const auto s = norm_geometry(shape_vector(x), dim, {});
  if (!s) return py::none();
  return with_type("statistics", "x", x, "x", x, [&](auto zero) -> py::object {
    using T = decltype(zero);
    const auto a = contiguous<T>(x);
    py::array_t<T> mean(s->groups), variance(s->groups);
    const T* in = a.data();
    T *m = mean.mutable_data(), *v = variance.mutable_data();
    {
      py::gil_scoped_release release;
      training_of<T>().statistics(*s, in, m, v);
    }
    return py::make_tuple(mean, variance);
  });
}

template <class T>
void expect_groups(const char* op, const Plain<T>& a, Index groups) {
  if (a.size() != groups) {
    bad_value(std::string(op) + ": mean and variance must have " + std::to_string(groups) +
              " elements, one a group, got " + std::to_string(a.size()));
  }
}

py::object standardize(const py::array& x, const Maybe& weight, const Maybe& bias, const Dims& dim,
                       double eps, const py::array& mean, const py::array& variance) {
  const char* op = "standardize";
  if (weight && bias && shape_vector(*weight) != shape_vector(*bias)) return py::none();
  const Maybe& w = weight ? weight : bias;
  const auto s = norm_geometry(shape_vector(x), dim, w ? shape_vector(*w) : std::vector<Index>{});
  if (!s) return py::none();
  return with_type(op, "x", x, "x", x, [&](auto zero) -> py::object {
    using T = decltype(zero);
    const auto a = contiguous<T>(x), mu = contiguous<T>(mean), var = contiguous<T>(variance);
    const auto scale = maybe_plain<T>(op, "weight", weight),
               shift = maybe_plain<T>(op, "bias", bias);
    expect_groups<T>(op, mu, s->groups);
    expect_groups<T>(op, var, s->groups);
    py::array_t<T> y(shape_vector(x));
    T* out = y.mutable_data();
    {
      py::gil_scoped_release release;
      training_of<T>().standardize(*s, static_cast<T>(eps), a.data(), pointer<T>(scale),
                                   pointer<T>(shift), mu.data(), var.data(), out);
    }
    return y;
  });
}

py::object standardize_gradient(const py::array& g, const py::array& x, const Maybe& weight,
                                const Dims& dim, double eps, const py::array& mean,
                                const py::array& variance) {
  const char* op = "standardize_gradient";
  expect_shape(op, "g", g, "x", x);
  const auto s =
      norm_geometry(shape_vector(x), dim, weight ? shape_vector(*weight) : std::vector<Index>{});
  if (!s) return py::none();
  return with_type(op, "x", x, "g", g, [&](auto zero) -> py::object {
    using T = decltype(zero);
    const auto a = contiguous<T>(x), ga = contiguous<T>(g);
    const auto mu = contiguous<T>(mean), var = contiguous<T>(variance);
    const auto scale = maybe_plain<T>(op, "weight", weight);
    expect_groups<T>(op, mu, s->groups);
    expect_groups<T>(op, var, s->groups);
    py::array_t<T> gx(shape_vector(x));
    const std::vector<Index> shape =
        weight ? shape_vector(*weight) : std::vector<Index>{count_weights(*s)};
    py::array_t<T> gw(shape), gb(shape);
    T *to_x = gx.mutable_data(), *to_w = gw.mutable_data(), *to_b = gb.mutable_data();
    {
      py::gil_scoped_release release;
      training_of<T>().standardize_gradient(*s, static_cast<T>(eps), ga.data(), a.data(),
                                            pointer<T>(scale), mu.data(), var.data(), to_x, to_w,
                                            to_b);
    }
    if (!weight) return py::make_tuple(gx, py::none(), py::none());
    return py::make_tuple(gx, gw, gb);
  });
}

py::array scale_shift(const py::array& x, const py::array& scale, const py::array& shift) {
  const char* op = "scale_shift";
  if (x.ndim() < 2 || scale.ndim() != 1 || shift.ndim() != 1 || scale.shape(0) != x.shape(1) ||
      shift.shape(0) != x.shape(1)) {
    bad_value(std::string(op) + ": expected x (N, C, ...), scale (C,) and shift (C,), got " +
              shape_of(x) + ", " + shape_of(scale) + " and " + shape_of(shift));
  }
  return with_type(op, "x", x, "scale", scale, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto a = contiguous<T>(x), b = contiguous<T>(scale), c = contiguous<T>(shift);
    py::array_t<T> y(shape_vector(x));
    if (y.size() == 0) return y;
    T* out = y.mutable_data();
    py::gil_scoped_release release;
    training_of<T>().scale_shift(x.shape(0) * x.shape(1), x.shape(1),
                                 y.size() / (x.shape(0) * x.shape(1)), a.data(), b.data(), c.data(),
                                 out);
    return y;
  });
}

// ---- Softmax ----------------------------------------------------------------------------------

Scores scores(const char* op, const py::array& x, Index dim) {
  if (dim < 0 || dim >= x.ndim()) {
    bad_value(std::string(op) + ": x of shape " + shape_of(x) + " has no dimension " +
              std::to_string(dim));
  }
  const auto shape = shape_vector(x);
  const auto d = static_cast<std::size_t>(dim);
  return {product(shape, 0, d), shape[d], product(shape, d + 1, shape.size())};
}

template <bool kLog>
py::array softmax(const py::array& x, Index dim) {
  const Scores s = scores(kLog ? "log_softmax" : "softmax", x, dim);
  return with_type("softmax", "x", x, "x", x, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto a = contiguous<T>(x);
    py::array_t<T> y(shape_vector(x));
    if (y.size() == 0) return y;
    const T* in = a.data();
    T* out = y.mutable_data();
    py::gil_scoped_release release;
    (kLog ? training_of<T>().log_softmax : training_of<T>().softmax)(s, in, out);
    return y;
  });
}

template <bool kLog>
py::array softmax_gradient(const py::array& g, const py::array& y, Index dim) {
  const char* op = kLog ? "log_softmax_gradient" : "softmax_gradient";
  const Scores s = scores(op, y, dim);
  expect_shape(op, "g", g, "y", y);
  return with_type(op, "y", y, "g", g, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto a = contiguous<T>(g), b = contiguous<T>(y);
    py::array_t<T> gx(shape_vector(y));
    if (gx.size() == 0) return gx;
    T* out = gx.mutable_data();
    py::gil_scoped_release release;
    (kLog ? training_of<T>().log_softmax_gradient : training_of<T>().softmax_gradient)(
        s, a.data(), b.data(), out);
    return gx;
  });
}

// ---- Cross entropy ----------------------------------------------------------------------------

struct Labelled {
  Scores s;
  Plain<Index> label;
};

Labelled labelled(const char* op, const py::array& x, const py::array& label, const Maybe& weight) {
  if (x.ndim() < 2) bad_value(std::string(op) + ": x must be (N, C, ...), got " + shape_of(x));
  if (label.dtype().kind() != 'i' || label.itemsize() != sizeof(Index)) {
    throw py::type_error(std::string(op) + ": labels must be int64, got " + text(label.dtype()));
  }
  const Scores s = scores(op, x, 1);
  if (label.size() != s.outer * s.inner) {
    bad_value(std::string(op) + ": scores of shape " + shape_of(x) + " need " +
              std::to_string(s.outer * s.inner) + " labels, got shape " + shape_of(label));
  }
  if (weight && (weight->ndim() != 1 || weight->shape(0) != s.classes)) {
    bad_value(std::string(op) + ": weight must have shape (" + std::to_string(s.classes) +
              ",), got " + shape_of(*weight));
  }
  return {s, contiguous<Index>(label)};
}

py::array cross_entropy(const py::array& x, const py::array& label, const Maybe& weight,
                        double label_smoothing) {
  const char* op = "cross_entropy";
  const Labelled a = labelled(op, x, label, weight);
  return with_type(op, "x", x, "x", x, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto in = contiguous<T>(x);
    const auto w = maybe_plain<T>(op, "weight", weight);
    py::array_t<T> loss(shape_vector(label));
    if (fill_if_empty(loss, a.s.classes == 0)) return loss;
    T* out = loss.mutable_data();
    py::gil_scoped_release release;
    training_of<T>().cross_entropy(a.s, in.data(), a.label.data(), pointer<T>(w),
                                   static_cast<T>(label_smoothing), out);
    return loss;
  });
}

py::array cross_entropy_gradient(const py::array& g, const py::array& x, const py::array& label,
                                 const Maybe& weight, double label_smoothing) {
  const char* op = "cross_entropy_gradient";
  const Labelled a = labelled(op, x, label, weight);
  if (g.size() != 1 && g.size() != a.s.outer * a.s.inner) {
    bad_value(std::string(op) + ": g must have one element or one a label, got shape " +
              shape_of(g));
  }
  return with_type(op, "x", x, "g", g, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto in = contiguous<T>(x), from = contiguous<T>(g);
    const auto w = maybe_plain<T>(op, "weight", weight);
    py::array_t<T> gx(shape_vector(x));
    if (gx.size() == 0) return gx;
    T* out = gx.mutable_data();
    py::gil_scoped_release release;
    training_of<T>().cross_entropy_gradient(a.s, from.data(), from.size() == 1, in.data(),
                                            a.label.data(), pointer<T>(w),
                                            static_cast<T>(label_smoothing), out);
    return gx;
  });
}

// ---- Dropout and ReLU -------------------------------------------------------------------------

py::array dropout(const py::array& x, std::uint64_t seed_low, std::uint64_t seed_high,
                  std::uint64_t call, std::uint32_t threshold, double scale, Index repeat) {
  if (repeat < 1 || x.size() % repeat) {
    bad_value("dropout: repeat must divide the number of elements, " + std::to_string(x.size()) +
              ", got " + std::to_string(repeat));
  }
  const Mask mask{{seed_low, seed_high}, call, threshold, x.size() / repeat, repeat};
  return with_type("dropout", "x", x, "x", x, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto a = contiguous<T>(x);
    py::array_t<T> y(shape_vector(x));
    if (y.size() == 0) return y;
    const T* in = a.data();
    T* out = y.mutable_data();
    py::gil_scoped_release release;
    training_of<T>().dropout(mask, in, static_cast<T>(scale), out);
    return y;
  });
}

// A copy of x in row-major order; nothing if x does not lie crosswise, and a plain copy is as good.
std::optional<py::array> in_order(const py::array& x) {
  return with_type("in_order", "x", x, "x", x, [&](auto zero) -> std::optional<py::array> {
    using T = decltype(zero);
    constexpr Index size = sizeof(T);
    const int dims = static_cast<int>(x.ndim());
    if (dims < 2 || dims > Layout::kMost || x.size() == 0 ||
        reinterpret_cast<std::uintptr_t>(x.data()) % alignof(T) != 0) {
      return std::nullopt;
    }
    Layout s{dims, -1, {}, {}};
    for (int d = 0; d < dims; ++d) {
      if (x.strides(d) % size != 0) return std::nullopt;
      s.size[d] = x.shape(d);
      s.stride[d] = x.strides(d) / size;
      if (s.stride[d] == 1 && s.size[d] > 1) s.near = d;
    }
    if (s.near < 0 || s.near == dims - 1) return std::nullopt;
    py::array_t<T> y(shape_vector(x));
    const T* in = static_cast<const T*>(x.data());
    T* out = y.mutable_data();
    py::gil_scoped_release release;
    training_of<T>().in_order(s, in, out);
    return y;
  });
}

py::array relu(const py::array& x) {
  return with_type("relu", "x", x, "x", x, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto a = contiguous<T>(x);
    py::array_t<T> y(shape_vector(x));
    const Index n = y.size();
    const T* in = a.data();
    T* out = y.mutable_data();
    py::gil_scoped_release release;
    training_of<T>().relu(n, in, out);
    return y;
  });
}

py::array relu_gradient(const py::array& g, const py::array& y) {
  expect_shape("relu_gradient", "g", g, "y", y);
  return with_type("relu_gradient", "y", y, "g", g, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto a = contiguous<T>(g), b = contiguous<T>(y);
    py::array_t<T> gx(shape_vector(y));
    const Index n = gx.size();
    T* out = gx.mutable_data();
    py::gil_scoped_release release;
    training_of<T>().relu_gradient(n, a.data(), b.data(), out);
    return gx;
  });
}

// ---- Optimizers -------------------------------------------------------------------------------

// Lists of arrays, one entry a parameter; a missing state is an empty list.
using Arrays = std::vector<py::array>;

template <class T>
T* writable(const char* op, const char* name, py::array& a, Index size) {
  if (!py::isinstance<py::array_t<T>>(a) || !(a.flags() & py::array::c_style) || !a.writeable() ||
      a.size() != size || reinterpret_cast<std::uintptr_t>(a.data()) % alignof(T)) {
    bad_value(std::string(op) + ": " + name + " must be a writable C-contiguous array of " +
              std::to_string(size) + " " + text(py::dtype::of<T>()) + ", got " + text(a.dtype()) +
              " of shape " + shape_of(a));
  }
  return static_cast<T*>(a.mutable_data());
}

template <class T>
std::vector<Slice<T>> slices(const char* op, Arrays& p, Arrays& g, std::vector<Arrays> states) {
  if (g.size() != p.size()) bad_value(std::string(op) + ": as many gradients as parameters");
  std::vector<Slice<T>> all(p.size());
  for (std::size_t i = 0; i < p.size(); ++i) {
    Slice<T>& s = all[i];
    s.size = p[i].size();
    s.p = writable<T>(op, "p", p[i], s.size);
    if (!py::isinstance<py::array_t<T>>(g[i]) || !(g[i].flags() & py::array::c_style) ||
        g[i].size() != s.size || reinterpret_cast<std::uintptr_t>(g[i].data()) % alignof(T)) {
      bad_value(std::string(op) +
                ": a gradient must be C-contiguous and shaped as its parameter, " + shape_of(p[i]) +
                ", got " + text(g[i].dtype()) + " of shape " + shape_of(g[i]));
    }
    s.g = static_cast<const T*>(g[i].data());
    for (std::size_t k = 0; k < states.size(); ++k) {
      if (states[k].empty()) continue;
      if (states[k].size() != p.size()) bad_value(std::string(op) + ": a state for each parameter");
      s.state[k] = writable<T>(op, "a state", states[k][i], s.size);
    }
  }
  return all;
}

void sgd(Arrays p, Arrays g, Arrays momentum_buffer, const std::vector<bool>& first, double lr,
         double momentum, double dampening, double weight_decay, bool nesterov, bool maximize) {
  if (p.empty()) return;
  with_type("sgd", "p", p[0], "p", p[0], [&](auto zero) {
    using T = decltype(zero);
    auto all = slices<T>("sgd", p, g, {momentum_buffer});
    for (std::size_t i = 0; i < all.size() && i < first.size(); ++i) all[i].first = first[i];
    const Sgd<T> s{T(lr), T(momentum), T(1 - dampening), T(weight_decay), nesterov, maximize};
    py::gil_scoped_release release;
    training_of<T>().sgd(s, static_cast<Index>(all.size()), all.data());
  });
}

void adam(Arrays p, Arrays g, Arrays exp_avg, Arrays exp_avg_sq, Arrays max_exp_avg_sq,
          const std::vector<double>& step_size, const std::vector<double>& correction, double beta1,
          double beta2, double eps, double weight_decay, double shrink, bool maximize) {
  if (p.empty()) return;
  if (step_size.size() != p.size() || correction.size() != p.size()) {
    bad_value("adam: a step size and a correction for each parameter");
  }
  with_type("adam", "p", p[0], "p", p[0], [&](auto zero) {
    using T = decltype(zero);
    if (exp_avg.empty() || exp_avg_sq.empty()) bad_value("adam: no moments");
    auto all = slices<T>("adam", p, g, {exp_avg, exp_avg_sq, max_exp_avg_sq});
    for (std::size_t i = 0; i < all.size(); ++i) {
      all[i].step_size = T(step_size[i]);
      all[i].correction = T(correction[i]);
    }
    const Adam<T> s{T(beta1), T(beta2),        T(1 - beta1), T(1 - beta2),
                    T(eps),   T(weight_decay), T(shrink),    maximize};
    py::gil_scoped_release release;
    training_of<T>().adam(s, static_cast<Index>(all.size()), all.data());
  });
}

void rmsprop(Arrays p, Arrays g, Arrays square_avg, Arrays grad_avg, Arrays momentum_buffer,
             double lr, double alpha, double eps, double weight_decay, double momentum,
             bool maximize) {
  if (p.empty()) return;
  with_type("rmsprop", "p", p[0], "p", p[0], [&](auto zero) {
    using T = decltype(zero);
    if (square_avg.empty()) bad_value("rmsprop: no square_avg");
    auto all = slices<T>("rmsprop", p, g, {square_avg, grad_avg, momentum_buffer});
    const RmsProp<T> s{T(lr),           T(alpha),    T(1 - alpha), T(eps),
                       T(weight_decay), T(momentum), maximize};
    py::gil_scoped_release release;
    training_of<T>().rmsprop(s, static_cast<Index>(all.size()), all.data());
  });
}

}  // namespace

void bind_training(py::module_& m) {
  const auto x = py::arg("x").noconvert(), g = py::arg("g").noconvert();
  const auto y = py::arg("y").noconvert(), label = py::arg("label").noconvert();
  const auto mean = py::arg("mean").noconvert(), variance = py::arg("variance").noconvert();
  const auto weight = py::arg("weight").noconvert().none(true);
  const auto bias = py::arg("bias").noconvert().none(true);
  m.def("statistics", &statistics, x, py::arg("dim"),
        "(mean, variance) of each group; None if the groups lie otherwise than the kernel reads.");
  m.def("standardize", &standardize, x, weight, bias, py::arg("dim"), py::arg("eps"), mean,
        variance, "(x - mean) / sqrt(variance + eps) * weight + bias, or None as `statistics`.");
  m.def("standardize_gradient", &standardize_gradient, g, x, weight, py::arg("dim"), py::arg("eps"),
        mean, variance, "Its gradients with respect to x, weight and bias, or None.");
  m.def("scale_shift", &scale_shift, x, py::arg("scale").noconvert(), py::arg("shift").noconvert(),
        "x (N, C, ...) * scale (C,) + shift (C,).");
  m.def("softmax", &softmax<false>, x, py::arg("dim"));
  m.def("softmax_gradient", &softmax_gradient<false>, g, y, py::arg("dim"));
  m.def("log_softmax", &softmax<true>, x, py::arg("dim"));
  m.def("log_softmax_gradient", &softmax_gradient<true>, g, y, py::arg("dim"));
  m.def("cross_entropy", &cross_entropy, x, label, weight, py::arg("label_smoothing"),
        "The loss of each sample; one whose label is outside [0, C) does not count.");
  m.def("cross_entropy_gradient", &cross_entropy_gradient, g, x, label, weight,
        py::arg("label_smoothing"));
  m.def("dropout", &dropout, x, py::arg("seed_low"), py::arg("seed_high"), py::arg("call"),
        py::arg("threshold"), py::arg("scale"), py::arg("repeat"),
        "x * scale where number i of the Philox stream is at least `threshold` (of 2**24), else 0; "
        "a number holds for `repeat` elements.");
  m.def("in_order", &in_order, x,
        "A row-major copy of an array that lies crosswise, or None where a plain copy is as good.");
  m.def("relu", &relu, x);
  m.def("relu_gradient", &relu_gradient, g, y);
  const auto p = py::arg("p").noconvert(), lr = py::arg("lr");
  const auto weight_decay = py::arg("weight_decay"), maximize = py::arg("maximize");
  m.def("sgd", &sgd, p, g, py::arg("momentum_buffer").noconvert(), py::arg("first"), lr,
        py::arg("momentum"), py::arg("dampening"), weight_decay, py::arg("nesterov"), maximize);
  m.def("adam", &adam, p, g, py::arg("exp_avg").noconvert(), py::arg("exp_avg_sq").noconvert(),
        py::arg("max_exp_avg_sq").noconvert(), py::arg("step_size"), py::arg("correction"),
        py::arg("beta1"), py::arg("beta2"), py::arg("eps"), weight_decay, py::arg("shrink"),
        maximize);
  m.def("rmsprop", &rmsprop, p, g, py::arg("square_avg").noconvert(),
        py::arg("grad_avg").noconvert(), py::arg("momentum_buffer").noconvert(), lr,
        py::arg("alpha"), py::arg("eps"), weight_decay, py::arg("momentum"), maximize);
}

}  // namespace minidl
