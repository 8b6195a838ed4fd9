// The Python face of pooling.
#include <limits>
#include <vector>

#include "bind.h"

namespace minidl {
namespace {

// ---- Pooling ----------------------------------------------------------------------------------

// Every window must see at least one element of the image.
void expect_no_empty_window(const char* op, const char* axis, Index in, Index pad, Index kernel,
                            Index dilation, Index stride, Index out) {
  for (Index q = 0; q < out; ++q) {
    const Index start = q * stride - pad;
    const Index first = start >= 0 ? start : start + (-start + dilation - 1) / dilation * dilation;
    if (first >= in || first > start + (kernel - 1) * dilation) {
      bad_value(std::string(op) + ": window " + std::to_string(q) + " of the " + axis +
                " lies in the padding alone; padding may be at most half the kernel");
    }
  }
}

Pool2d max_pool_geometry(const char* op, const py::array& x, Pair kernel, Pair stride, Pair padding,
                         Pair dilation) {
  expect_dimensions(op, "x", x, 4, "(N, C, H, W)");
  expect_range(op, "kernel", kernel, 1);
  expect_range(op, "stride", stride, 1);
  expect_range(op, "padding", padding, 0);
  expect_range(op, "dilation", dilation, 1);
  Pool2d p{};
  std::tie(p.planes, p.h, p.w) = std::tuple(x.shape(0) * x.shape(1), x.shape(2), x.shape(3));
  std::tie(p.kh, p.kw) = kernel;
  std::tie(p.stride_h, p.stride_w) = stride;
  std::tie(p.pad_h, p.pad_w) = padding;
  std::tie(p.dilation_h, p.dilation_w) = dilation;
  p.oh = output_size(op, "rows", p.h, p.pad_h, p.kh, p.dilation_h, p.stride_h);
  p.ow = output_size(op, "columns", p.w, p.pad_w, p.kw, p.dilation_w, p.stride_w);
  if (p.h >= kLargest || p.w >= kLargest || p.h * p.w > std::numeric_limits<std::int32_t>::max()) {
    bad_value(std::string(op) + ": a plane may have at most 2**31 - 1 elements, got shape " +
              shape_of(x));
  }
  expect_no_empty_window(op, "rows", p.h, p.pad_h, p.kh, p.dilation_h, p.stride_h, p.oh);
  expect_no_empty_window(op, "columns", p.w, p.pad_w, p.kw, p.dilation_w, p.stride_w, p.ow);
  return p;
}

py::object max_pool2d(const py::array& x, Pair kernel, Pair stride, Pair padding, Pair dilation,
                      bool return_index) {
  const Pool2d p = max_pool_geometry("max_pool2d", x, kernel, stride, padding, dilation);
  return with_type("max_pool2d", "x", x, "x", x, [&](auto zero) -> py::object {
    using T = decltype(zero);
    const auto a = contiguous<T>(x);
    py::array_t<T> y({x.shape(0), x.shape(1), p.oh, p.ow});
    py::array_t<std::int32_t> index;
    if (return_index) index = py::array_t<std::int32_t>({x.shape(0), x.shape(1), p.oh, p.ow});
    if (y.size() > 0) {
      const T* in = a.data();
      T* out = y.mutable_data();
      std::int32_t* winners = return_index ? index.mutable_data() : nullptr;
      py::gil_scoped_release release;
      kernels_of<T>().max_pool2d(p, in, out, winners);
    }
    if (!return_index) return y;
    return py::make_tuple(y, index);
  });
}

py::array max_pool2d_bytes(const py::array& x, Pair kernel, Pair stride, Pair padding,
                           Pair dilation) {
  const char* op = "max_pool2d_bytes";
  const Pool2d p = max_pool_geometry(op, x, kernel, stride, padding, dilation);
  return with_bytes(op, "x", x.dtype(), [&](auto zero, const auto& kernels) -> py::array {
    using B = decltype(zero);
    const auto a = contiguous<B>(x);
    py::array_t<B> y({x.shape(0), x.shape(1), p.oh, p.ow});
    if (y.size() == 0) return y;
    B* out = y.mutable_data();
    py::gil_scoped_release release;
    kernels.max_pool(p, a.data(), out);
    return y;
  });
}

py::array max_pool2d_gradient(const py::array& g, const py::array& x, Pair kernel, Pair stride,
                              Pair padding, Pair dilation) {
  const char* op = "max_pool2d_gradient";
  const Pool2d p = max_pool_geometry(op, x, kernel, stride, padding, dilation);
  if (g.ndim() != 4 || g.shape(0) != x.shape(0) || g.shape(1) != x.shape(1) || g.shape(2) != p.oh ||
      g.shape(3) != p.ow) {
    bad_value(std::string(op) + ": g must have shape " +
              text(py::make_tuple(x.shape(0), x.shape(1), p.oh, p.ow)) + ", got " + shape_of(g));
  }
  return with_type(op, "x", x, "g", g, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto a = contiguous<T>(x), from = contiguous<T>(g);
    py::array_t<T> gx({x.shape(0), x.shape(1), p.h, p.w});
    if (gx.size() == 0) return gx;
    T* out = gx.mutable_data();
    py::gil_scoped_release release;
    training_of<T>().max_pool2d_gradient(p, a.data(), from.data(), out);
    return gx;
  });
}

py::array max_pool2d_input(const py::array& g, const py::array& index, Pair input_size) {
  const char* op = "max_pool2d_input";
  expect_dimensions(op, "g", g, 4, "(N, C, OH, OW)");
  expect_range(op, "input size", input_size, 0);
  if (!py::isinstance<py::array_t<std::int32_t>>(index)) {
    throw py::type_error(std::string(op) + ": index must be int32, got " + text(index.dtype()));
  }
  if (!g.attr("shape").equal(index.attr("shape"))) {
    bad_value(std::string(op) + ": g has shape " + shape_of(g) + ", index " + shape_of(index));
  }
  Pool2d p{};
  p.planes = g.shape(0) * g.shape(1);
  std::tie(p.h, p.w) = input_size;
  std::tie(p.oh, p.ow) = std::tuple(g.shape(2), g.shape(3));
  return with_type(op, "g", g, "g", g, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto a = contiguous<T>(g);
    const auto i = contiguous<std::int32_t>(index);
    py::array_t<T> gx({g.shape(0), g.shape(1), p.h, p.w});
    bool inside = p.planes * p.oh * p.ow == 0 || p.h * p.w > 0;
    if (inside && !fill_if_empty(gx, false)) {
      const T* in = a.data();
      const std::int32_t* winners = i.data();
      T* out = gx.mutable_data();
      py::gil_scoped_release release;
      inside = kernels_of<T>().max_pool2d_input(p, in, winners, out);
    }
    if (!inside) {
      throw py::index_error(std::string(op) + ": an index lies outside the input of " +
                            text(input_size));
    }
    return gx;
  });
}

// ---- The mean ---------------------------------------------------------------------------------

using Edges = std::vector<Index>;  // begin and end of each window, one after the other

// The windows of an image, which they must not leave.
struct CheckedWindows {
  Plain<double> divisors;
  Windows s;
};

CheckedWindows windows(const char* op, const py::array& a, Pair input_size, const Edges& rows,
                       const Edges& columns, const py::array& divisors) {
  expect_dimensions(op, "the image", a, 4, "(N, C, H, W)");
  const auto check = [&](const char* axis, const Edges& edges, Index size) {
    for (std::size_t i = 0; i + 1 < edges.size(); i += 2) {
      if (edges[i] < 0 || edges[i + 1] > size) {
        bad_value(std::string(op) + ": a window of the " + axis + " ends at " +
                  std::to_string(edges[i + 1]) + " of " + std::to_string(size));
      }
    }
  };
  check("rows", rows, input_size.first);
  check("columns", columns, input_size.second);
  CheckedWindows w{contiguous<double>(divisors), {}};
  w.s = {a.shape(0) * a.shape(1),
         input_size.first,
         input_size.second,
         static_cast<Index>(rows.size() / 2),
         static_cast<Index>(columns.size() / 2),
         rows.data(),
         columns.data(),
         w.divisors.data()};
  if (w.divisors.size() != w.s.oh * w.s.ow) {
    bad_value(std::string(op) + ": a divisor for each of " + std::to_string(w.s.oh * w.s.ow) +
              " windows, got " + std::to_string(w.divisors.size()));
  }
  return w;
}

py::array avg_pool2d(const py::array& x, const Edges& rows, const Edges& columns,
                     const py::array& divisors) {
  const char* op = "avg_pool2d";
  expect_dimensions(op, "x", x, 4, "(N, C, H, W)");
  const auto w = windows(op, x, {x.shape(2), x.shape(3)}, rows, columns, divisors);
  return with_type(op, "x", x, "x", x, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto a = contiguous<T>(x);
    py::array_t<T> y({x.shape(0), x.shape(1), w.s.oh, w.s.ow});
    if (y.size() == 0) return y;
    T* out = y.mutable_data();
    py::gil_scoped_release release;
    training_of<T>().avg_pool2d(w.s, a.data(), out);
    return y;
  });
}

py::array avg_pool2d_input(const py::array& y, Pair input_size, const Edges& rows,
                           const Edges& columns, const py::array& divisors) {
  const char* op = "avg_pool2d_input";
  expect_range(op, "input size", input_size, 0);
  const auto w = windows(op, y, input_size, rows, columns, divisors);
  if (y.shape(2) != w.s.oh || y.shape(3) != w.s.ow) {
    bad_value(std::string(op) + ": windows for an output of " + text(Pair(w.s.oh, w.s.ow)) +
              ", got y of shape " + shape_of(y));
  }
  return with_type(op, "y", y, "y", y, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto a = contiguous<T>(y);
    py::array_t<T> x({y.shape(0), y.shape(1), w.s.h, w.s.w});
    if (x.size() == 0) return x;
    T* out = x.mutable_data();
    py::gil_scoped_release release;
    training_of<T>().avg_pool2d_input(w.s, a.data(), out);
    return x;
  });
}

}  // namespace

void bind_pool(py::module_& m) {
  const auto x = py::arg("x").noconvert(), g = py::arg("g").noconvert();
  const auto padding = py::arg("padding") = Pair(0, 0);
  const auto dilation = py::arg("dilation") = Pair(1, 1);
  m.def("max_pool2d", &max_pool2d, x, py::arg("kernel"), py::arg("stride"), padding, dilation,
        py::arg("return_index") = true,
        "x (N, C, H, W) -> (y, index): the maxima and their positions h * W + w; or only y.");
  m.def("max_pool2d_bytes", &max_pool2d_bytes, py::arg("x").noconvert(), py::arg("kernel"),
        py::arg("stride"), py::arg("padding") = Pair(0, 0), py::arg("dilation") = Pair(1, 1),
        "max_pool2d of int8 or uint8.");
  m.def("max_pool2d_gradient", &max_pool2d_gradient, g, x, py::arg("kernel"), py::arg("stride"),
        padding, dilation, "The same as max_pool2d_input, where no index was kept.");
  m.def("max_pool2d_input", &max_pool2d_input, g, py::arg("index").noconvert(),
        py::arg("input_size"), "The gradient of max_pool2d with respect to its input.");
  const auto rows = py::arg("rows"), columns = py::arg("columns");
  const auto divisors = py::arg("divisors");
  m.def("avg_pool2d", &avg_pool2d, x, rows, columns, divisors,
        "Sums over windows, divided: rows and columns hold begin and end of each.");
  m.def("avg_pool2d_input", &avg_pool2d_input, py::arg("y").noconvert(), py::arg("input_size"),
        rows, columns, divisors, "Its transpose.");
}

}  // namespace minidl
