// The Python face of warps.
#include "bind.h"

namespace minidl {
namespace {

template <class T>
const WarpFor<T>& warp_of() {
  if constexpr (sizeof(T) == 4) {
    return kernels().warp->f32;
  } else {
    return kernels().warp->f64;
  }
}

struct CheckedWarp {
  Plain<double> matrices;
  Warp s;
};

// The geometry of a warp from (n, c, *size) to (n, c, *out_size).
CheckedWarp checked(const char* op, const py::array& a, const py::array& m, Pair size,
                    Pair out_size, const std::string& mode, const std::string& padding) {
  if (!py::isinstance<py::array_t<double>>(m)) {
    throw py::type_error(std::string(op) + ": m must be float64, got " + text(m.dtype()));
  }
  if (m.ndim() != 3 || m.shape(0) != a.shape(0) || m.shape(1) != 2 || m.shape(2) != 3) {
    bad_value(std::string(op) + ": m must have shape " + text(py::make_tuple(a.shape(0), 2, 3)) +
              ", got " + shape_of(m));
  }
  expect_range(op, "size of the image", size, 1);
  expect_range(op, "size of the result", out_size, 0);
  if ((size.first + 2) * (size.second + 2) >= kLargest) {  // positions are kept as int32
    bad_value(std::string(op) + ": a plane may have at most 2**31 elements with its outline, got " +
              text(size));
  }
  CheckedWarp w{contiguous<double>(m), {}};
  w.s = {a.shape(0),      a.shape(1),        size.first,        size.second, out_size.first,
         out_size.second, w.matrices.data(), mode == "nearest", Warp::kZeros};
  if (mode != "nearest" && mode != "bilinear") {
    bad_value(std::string(op) + ": mode is 'bilinear' or 'nearest', got '" + mode + "'");
  }
  if (padding == "border") {
    w.s.padding = Warp::kBorder;
  } else if (padding == "reflection") {
    w.s.padding = Warp::kReflection;
  } else if (padding != "zeros") {
    bad_value(std::string(op) + ": padding is 'zeros', 'border' or 'reflection', got '" + padding +
              "'");
  }
  return w;
}

py::array warp_affine(const py::array& x, const py::array& m, Pair size, const std::string& mode,
                      const std::string& padding, double fill) {
  const char* op = "warp_affine";
  expect_dimensions(op, "x", x, 4, "(N, C, H, W)");
  const auto w = checked(op, x, m, {x.shape(2), x.shape(3)}, size, mode, padding);
  return with_type(op, "x", x, "x", x, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto a = contiguous<T>(x);
    py::array_t<T> y({w.s.n, w.s.c, w.s.oh, w.s.ow});
    if (y.size() == 0) return y;
    T* out = y.mutable_data();
    py::gil_scoped_release release;
    warp_of<T>().affine(w.s, a.data(), static_cast<T>(fill), out);
    return y;
  });
}

py::array warp_affine_input(const py::array& y, const py::array& m, Pair input_size,
                            const std::string& mode, const std::string& padding) {
  const char* op = "warp_affine_input";
  expect_dimensions(op, "y", y, 4, "(N, C, OH, OW)");
  const auto w = checked(op, y, m, input_size, {y.shape(2), y.shape(3)}, mode, padding);
  return with_type(op, "y", y, "y", y, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto a = contiguous<T>(y);
    py::array_t<T> x({w.s.n, w.s.c, w.s.h, w.s.w});
    if (x.size() == 0) return x;
    T* out = x.mutable_data();
    py::gil_scoped_release release;
    warp_of<T>().affine_input(w.s, a.data(), out);
    return x;
  });
}

}  // namespace

void bind_warp(py::module_& m) {
  const auto matrices = py::arg("m").noconvert();
  const auto mode = py::arg("mode"), padding = py::arg("padding");
  m.def("warp_affine", &warp_affine, py::arg("x").noconvert(), matrices, py::arg("size"), mode,
        padding, py::arg("fill"), "x (N, C, H, W), fetched through m (N, 2, 3): (N, C, *size).");
  m.def("warp_affine_input", &warp_affine_input, py::arg("y").noconvert(), matrices,
        py::arg("input_size"), mode, padding, "Its transpose.");
}

}  // namespace minidl
