// The Python face of pooling.
#include <limits>

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

py::tuple max_pool2d(const py::array& x, Pair kernel, Pair stride, Pair padding, Pair dilation) {
  const char* op = "max_pool2d";
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
  return with_type(op, "x", x, "x", x, [&](auto zero) -> py::tuple {
    using T = decltype(zero);
    const auto a = contiguous<T>(x);
    py::array_t<T> y({x.shape(0), x.shape(1), p.oh, p.ow});
    py::array_t<std::int32_t> index({x.shape(0), x.shape(1), p.oh, p.ow});
    if (y.size() > 0) {
      const T* in = a.data();
      T* out = y.mutable_data();
      std::int32_t* winners = index.mutable_data();
      py::gil_scoped_release release;
      kernels_of<T>().max_pool2d(p, in, out, winners);
    }
    return py::make_tuple(y, index);
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

}  // namespace

void bind_pool(py::module_& m) {
  const auto x = py::arg("x").noconvert(), g = py::arg("g").noconvert();
  const auto padding = py::arg("padding") = Pair(0, 0);
  const auto dilation = py::arg("dilation") = Pair(1, 1);
  m.def("max_pool2d", &max_pool2d, x, py::arg("kernel"), py::arg("stride"), padding, dilation,
        "x (N, C, H, W) -> (y, index): the maxima and their positions h * W + w.");
  m.def("max_pool2d_input", &max_pool2d_input, g, py::arg("index").noconvert(),
        py::arg("input_size"), "The gradient of max_pool2d with respect to its input.");
}

}  // namespace minidl
