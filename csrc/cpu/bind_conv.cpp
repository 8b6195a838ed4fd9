// The Python face of convolution.
#include "bind.h"

namespace minidl {
namespace {

void expect_output(const char* op, const Conv2d& p, const py::array& g) {
  if (g.shape(0) != p.n || g.shape(1) != p.o || g.shape(2) != p.oh || g.shape(3) != p.ow) {
    bad_value(std::string(op) + ": g must have the output's shape (" + std::to_string(p.n) + ", " +
              std::to_string(p.o) + ", " + std::to_string(p.oh) + ", " + std::to_string(p.ow) +
              "), got " + shape_of(g));
  }
}

// ---- Convolution ------------------------------------------------------------------------------

using Bias = std::optional<py::array>;

// With which kernel: call(p, x, w, bias or null, y), for arrays of one type.
template <class Call>
py::array conv2d_with(Call call, const py::array& x, const py::array& w, const Bias& bias,
                      const Options& options, bool relu = false) {
  const char* op = "conv2d";
  expect_dimensions(op, "x", x, 4, "(N, C, H, W)");
  expect_dimensions(op, "w", w, 4, "(O, C / groups, kH, kW)");
  Conv2d p{};
  std::tie(p.n, p.c, p.h, p.w) = std::tuple(x.shape(0), x.shape(1), x.shape(2), x.shape(3));
  std::tie(p.o, p.kh, p.kw) = std::tuple(w.shape(0), w.shape(2), w.shape(3));
  complete(op, p, options);
  p.relu = relu;
  if (w.shape(1) * p.groups != p.c) {
    bad_value(std::string(op) + ": x has " + std::to_string(p.c) + " channels, w expects " +
              std::to_string(w.shape(1)) + " in each of " + std::to_string(p.groups) +
              " groups (x " + shape_of(x) + ", w " + shape_of(w) + ")");
  }
  if (bias && (bias->ndim() != 1 || bias->shape(0) != p.o)) {
    bad_value(std::string(op) + ": b must have shape (" + std::to_string(p.o) +
              ",), one for each output channel, got " + shape_of(*bias));
  }
  return with_type(op, "x", x, "w", w, [&](auto zero) -> py::array {
    using T = decltype(zero);
    if (bias && !bias->dtype().equal(x.dtype())) {
      throw py::type_error(std::string(op) + ": b must be " + text(x.dtype()) + " as x is, got " +
                           text(bias->dtype()));
    }
    const auto a = contiguous<T>(x), b = contiguous<T>(w);
    py::array_t<T, py::array::c_style> of_output;
    if (bias) of_output = contiguous<T>(*bias);
    py::array_t<T> y({p.n, p.o, p.oh, p.ow});
    T* out = y.mutable_data();
    if (y.size() == 0) return y;
    if (p.c == 0) {
      for (Index i = 0; i < y.size(); ++i) {
        const T sum = bias ? of_output.data()[i / (p.oh * p.ow) % p.o] : T(0);
        out[i] = relu && sum < 0 ? T(0) : sum;
      }
      return y;
    }
    const T *px = a.data(), *pw = b.data(), *pbias = bias ? of_output.data() : nullptr;
    py::gil_scoped_release release;
    call(p, px, pw, pbias, out);
    return y;
  });
}

py::array conv2d(const py::array& x, const py::array& w, const Bias& b, Pair stride, Pair padding,
                 Pair dilation, Index groups, bool relu) {
  const auto call = [](const Conv2d& p, auto* x, auto* w, auto* bias, auto* y) {
    kernels_of<std::remove_pointer_t<decltype(y)>>().conv2d(p, x, w, bias, y);
  };
  return conv2d_with(call, x, w, b, {stride, padding, dilation, groups}, relu);
}

py::array conv2d_naive(const py::array& x, const py::array& w, Pair stride, Pair padding,
                       Pair dilation, Index groups) {
  const auto call = [](const Conv2d& p, auto* x, auto* w, auto*, auto* y) {
    ladder_of<std::remove_pointer_t<decltype(y)>>().conv2d_naive(p, x, w, y);
  };
  return conv2d_with(call, x, w, {}, {stride, padding, dilation, groups});
}

template <class Call>
py::array conv2d_input_with(Call call, const py::array& g, const py::array& w, Pair input_size,
                            const Options& options) {
  const char* op = "conv2d_input";
  const Index groups = options.groups;
  expect_dimensions(op, "g", g, 4, "(N, O, OH, OW)");
  expect_dimensions(op, "w", w, 4, "(O, C / groups, kH, kW)");
  Conv2d p{};
  if (groups < 1) bad_value(std::string(op) + ": groups must be positive");
  std::tie(p.n, p.c) = std::tuple(g.shape(0), w.shape(1) * groups);
  std::tie(p.h, p.w) = input_size;
  std::tie(p.o, p.kh, p.kw) = std::tuple(w.shape(0), w.shape(2), w.shape(3));
  complete(op, p, options);
  expect_output(op, p, g);
  return with_type(op, "g", g, "w", w, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto a = contiguous<T>(g), b = contiguous<T>(w);
    py::array_t<T> gx({p.n, p.c, p.h, p.w});
    if (fill_if_empty(gx, p.o == 0)) return gx;
    const T *pg = a.data(), *pw = b.data();
    T* out = gx.mutable_data();
    py::gil_scoped_release release;
    call(p, pg, pw, out);
    return gx;
  });
}

py::array conv2d_input(const py::array& g, const py::array& w, Pair input_size, Pair stride,
                       Pair padding, Pair dilation, Index groups) {
  const auto call = [](const Conv2d& p, auto* g, auto* w, auto* gx) {
    kernels_of<std::remove_pointer_t<decltype(gx)>>().conv2d_input(p, g, w, gx);
  };
  return conv2d_input_with(call, g, w, input_size, {stride, padding, dilation, groups});
}

template <class Call>
py::array conv2d_weight_with(Call call, const py::array& g, const py::array& x, Pair kernel_size,
                             const Options& options) {
  const char* op = "conv2d_weight";
  expect_dimensions(op, "g", g, 4, "(N, O, OH, OW)");
  expect_dimensions(op, "x", x, 4, "(N, C, H, W)");
  Conv2d p{};
  std::tie(p.n, p.c, p.h, p.w) = std::tuple(x.shape(0), x.shape(1), x.shape(2), x.shape(3));
  p.o = g.shape(1);
  std::tie(p.kh, p.kw) = kernel_size;
  complete(op, p, options);
  expect_output(op, p, g);
  return with_type(op, "g", g, "x", x, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto a = contiguous<T>(g), b = contiguous<T>(x);
    py::array_t<T> gw({p.o, p.c / p.groups, p.kh, p.kw});
    if (fill_if_empty(gw, p.n == 0)) return gw;
    const T *pg = a.data(), *px = b.data();
    T* out = gw.mutable_data();
    py::gil_scoped_release release;
    call(p, pg, px, out);
    return gw;
  });
}

py::array conv2d_weight(const py::array& g, const py::array& x, Pair kernel_size, Pair stride,
                        Pair padding, Pair dilation, Index groups) {
  const auto call = [](const Conv2d& p, auto* g, auto* x, auto* gw) {
    kernels_of<std::remove_pointer_t<decltype(gw)>>().conv2d_weight(p, g, x, gw);
  };
  return conv2d_weight_with(call, g, x, kernel_size, {stride, padding, dilation, groups});
}

// ---- Winograd's kernels -----------------------------------------------------------------------

// Stride, dilation and groups are 1. What else these kernels need is checked here.
void expect_winograd(const char* op, const py::array& a, Pair kernel, Pair padding) {
  if (!py::isinstance<py::array_t<float>>(a)) {
    throw py::type_error(std::string(op) + ": Winograd's kernels are for float32, got " +
                         text(a.dtype()));
  }
  if (kernel != Pair(3, 3) || std::max(padding.first, padding.second) > 2) {
    bad_value(std::string(op) + ": Winograd's kernels are for 3x3 and a padding up to 2, got a " +
              "kernel of " + text(kernel) + " and a padding of " + text(padding));
  }
}

Pair kernel_of(const char* op, const py::array& w) {
  expect_dimensions(op, "w", w, 4, "(O, C, 3, 3)");
  return {w.shape(2), w.shape(3)};
}

Options winograd_options(Pair padding) { return {{1, 1}, padding, {1, 1}, 1}; }

py::array conv2d_winograd(const py::array& x, const py::array& w, const Bias& b, Pair padding,
                          bool relu) {
  expect_winograd("conv2d", x, kernel_of("conv2d", w), padding);
  const auto call = [](const Conv2d& p, auto* x, auto* w, auto* bias, auto* y) {
    if constexpr (sizeof(*y) == sizeof(float)) kernels().winograd->conv2d(p, x, w, bias, y);
  };
  return conv2d_with(call, x, w, b, winograd_options(padding), relu);
}

py::array conv2d_input_winograd(const py::array& g, const py::array& w, Pair input_size,
                                Pair padding) {
  expect_winograd("conv2d_input", g, kernel_of("conv2d_input", w), padding);
  const auto call = [](const Conv2d& p, auto* g, auto* w, auto* gx) {
    if constexpr (sizeof(*gx) == sizeof(float)) kernels().winograd->conv2d_input(p, g, w, gx);
  };
  return conv2d_input_with(call, g, w, input_size, winograd_options(padding));
}

py::array conv2d_weight_winograd(const py::array& g, const py::array& x, Pair padding) {
  expect_winograd("conv2d_weight", g, {3, 3}, padding);
  const auto call = [](const Conv2d& p, auto* g, auto* x, auto* gw) {
    if constexpr (sizeof(*gw) == sizeof(float)) kernels().winograd->conv2d_weight(p, g, x, gw);
  };
  return conv2d_weight_with(call, g, x, {3, 3}, winograd_options(padding));
}

}  // namespace

void bind_conv(py::module_& m) {
  const auto x = py::arg("x").noconvert(), w = py::arg("w").noconvert();
  const auto g = py::arg("g").noconvert();
  const auto stride = py::arg("stride") = Pair(1, 1);
  const auto padding = py::arg("padding") = Pair(0, 0);
  const auto dilation = py::arg("dilation") = Pair(1, 1);
  const auto groups = py::arg("groups") = 1;
  const auto b = py::arg("b").noconvert() = py::none();
  const auto relu = py::arg("relu") = false;
  m.def("conv2d", &conv2d, x, w, b, stride, padding, dilation, groups, relu,
        "x (N, C, H, W), w (O, C / groups, kH, kW), b (O,) -> y (N, O, OH, OW): the "
        "cross-correlation, plus the bias b, then perhaps ReLU.");
  m.def("conv2d_naive", &conv2d_naive, x, w, stride, padding, dilation, groups,
        "conv2d as seven plain loops: a rung of the ladder.");
  m.def("conv2d_input", &conv2d_input, g, w, py::arg("input_size"), stride, padding, dilation,
        groups, "The gradient of conv2d with respect to x, which is (H, W) = input_size large.");
  m.def("conv2d_weight", &conv2d_weight, g, x, py::arg("kernel_size"), stride, padding, dilation,
        groups, "The gradient of conv2d with respect to w, which is (kH, kW) = kernel_size large.");
  m.def("conv2d_winograd", &conv2d_winograd, x, w, b, padding, relu,
        "conv2d by Winograd's F(4x4, 3x3): float32, 3x3, padding up to 2.");
  m.def("conv2d_input_winograd", &conv2d_input_winograd, g, w, py::arg("input_size"), padding,
        "conv2d_input by the same.");
  m.def("conv2d_weight_winograd", &conv2d_weight_winograd, g, x, padding,
        "conv2d_weight by the same.");
}

}  // namespace minidl
