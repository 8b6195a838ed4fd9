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

// With which kernel: `kernel_of(T{})` is a (const Conv2d&, const T* x, const T* w, T* y).
template <class KernelOf>
py::array conv2d_with(KernelOf kernel_of, const py::array& x, const py::array& w, Pair stride,
                      Pair padding, Pair dilation, Index groups) {
  const char* op = "conv2d";
  expect_dimensions(op, "x", x, 4, "(N, C, H, W)");
  expect_dimensions(op, "w", w, 4, "(O, C / groups, kH, kW)");
  Conv2d p{};
  std::tie(p.n, p.c, p.h, p.w) = std::tuple(x.shape(0), x.shape(1), x.shape(2), x.shape(3));
  std::tie(p.o, p.kh, p.kw) = std::tuple(w.shape(0), w.shape(2), w.shape(3));
  complete(op, p, {stride, padding, dilation, groups});
  if (w.shape(1) * groups != p.c) {
    bad_value(std::string(op) + ": x has " + std::to_string(p.c) + " channels, w expects " +
              std::to_string(w.shape(1)) + " in each of " + std::to_string(groups) + " groups (x " +
              shape_of(x) + ", w " + shape_of(w) + ")");
  }
  return with_type(op, "x", x, "w", w, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto a = contiguous<T>(x), b = contiguous<T>(w);
    py::array_t<T> y({p.n, p.o, p.oh, p.ow});
    if (fill_if_empty(y, p.c == 0)) return y;
    const T *px = a.data(), *pw = b.data();
    T* py_ = y.mutable_data();
    py::gil_scoped_release release;
    kernel_of(zero)(p, px, pw, py_);
    return y;
  });
}

py::array conv2d(const py::array& x, const py::array& w, Pair stride, Pair padding, Pair dilation,
                 Index groups) {
  return conv2d_with([](auto zero) { return kernels_of<decltype(zero)>().conv2d; }, x, w, stride,
                     padding, dilation, groups);
}

py::array conv2d_naive(const py::array& x, const py::array& w, Pair stride, Pair padding,
                       Pair dilation, Index groups) {
  return conv2d_with([](auto zero) { return ladder_of<decltype(zero)>().conv2d_naive; }, x, w,
                     stride, padding, dilation, groups);
}

py::array conv2d_input(const py::array& g, const py::array& w, Pair input_size, Pair stride,
                       Pair padding, Pair dilation, Index groups) {
  const char* op = "conv2d_input";
  expect_dimensions(op, "g", g, 4, "(N, O, OH, OW)");
  expect_dimensions(op, "w", w, 4, "(O, C / groups, kH, kW)");
  Conv2d p{};
  if (groups < 1) bad_value(std::string(op) + ": groups must be positive");
  std::tie(p.n, p.c) = std::tuple(g.shape(0), w.shape(1) * groups);
  std::tie(p.h, p.w) = input_size;
  std::tie(p.o, p.kh, p.kw) = std::tuple(w.shape(0), w.shape(2), w.shape(3));
  complete(op, p, {stride, padding, dilation, groups});
  expect_output(op, p, g);
  return with_type(op, "g", g, "w", w, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto a = contiguous<T>(g), b = contiguous<T>(w);
    py::array_t<T> gx({p.n, p.c, p.h, p.w});
    if (fill_if_empty(gx, p.o == 0)) return gx;
    const T *pg = a.data(), *pw = b.data();
    T* out = gx.mutable_data();
    py::gil_scoped_release release;
    kernels_of<T>().conv2d_input(p, pg, pw, out);
    return gx;
  });
}

py::array conv2d_weight(const py::array& g, const py::array& x, Pair kernel_size, Pair stride,
                        Pair padding, Pair dilation, Index groups) {
  const char* op = "conv2d_weight";
  expect_dimensions(op, "g", g, 4, "(N, O, OH, OW)");
  expect_dimensions(op, "x", x, 4, "(N, C, H, W)");
  Conv2d p{};
  std::tie(p.n, p.c, p.h, p.w) = std::tuple(x.shape(0), x.shape(1), x.shape(2), x.shape(3));
  p.o = g.shape(1);
  std::tie(p.kh, p.kw) = kernel_size;
  complete(op, p, {stride, padding, dilation, groups});
  expect_output(op, p, g);
  return with_type(op, "g", g, "x", x, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto a = contiguous<T>(g), b = contiguous<T>(x);
    py::array_t<T> gw({p.o, p.c / groups, p.kh, p.kw});
    if (fill_if_empty(gw, p.n == 0)) return gw;
    const T *pg = a.data(), *px = b.data();
    T* out = gw.mutable_data();
    py::gil_scoped_release release;
    kernels_of<T>().conv2d_weight(p, pg, px, out);
    return gw;
  });
}

}  // namespace

void bind_conv(py::module_& m) {
  const auto x = py::arg("x").noconvert(), w = py::arg("w").noconvert();
  const auto g = py::arg("g").noconvert();
  const auto stride = py::arg("stride") = Pair(1, 1);
  const auto padding = py::arg("padding") = Pair(0, 0);
  const auto dilation = py::arg("dilation") = Pair(1, 1);
  const auto groups = py::arg("groups") = 1;
  m.def("conv2d", &conv2d, x, w, stride, padding, dilation, groups,
        "x (N, C, H, W), w (O, C / groups, kH, kW) -> y (N, O, OH, OW): the cross-correlation.");
  m.def("conv2d_naive", &conv2d_naive, x, w, stride, padding, dilation, groups,
        "conv2d as seven plain loops: a rung of the ladder.");
  m.def("conv2d_input", &conv2d_input, g, w, py::arg("input_size"), stride, padding, dilation,
        groups, "The gradient of conv2d with respect to x, which is (H, W) = input_size large.");
  m.def("conv2d_weight", &conv2d_weight, g, x, py::arg("kernel_size"), stride, padding, dilation,
        groups, "The gradient of conv2d with respect to w, which is (kH, kW) = kernel_size large.");
}

}  // namespace minidl
