// minidl._native: the Python face of the kernels. Everything that a kernel takes for granted is
// checked here: types, shapes, sizes. The kernels run without the GIL.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "dispatch.h"
#include "threads.h"

namespace py = pybind11;

namespace minidl {
namespace {

using Pair = std::pair<Index, Index>;

std::string text(const py::handle& object) { return py::str(object).cast<std::string>(); }

std::string shape_of(const py::array& a) { return text(a.attr("shape")); }

std::string text(Pair p) {
  return "(" + std::to_string(p.first) + ", " + std::to_string(p.second) + ")";
}

[[noreturn]] void bad_value(const std::string& message) { throw py::value_error(message); }

template <class T>
const KernelsFor<T>& kernels_of() {
  if constexpr (sizeof(T) == 4) {
    return kernels().f32;
  } else {
    return kernels().f64;
  }
}

// ---- Arrays -----------------------------------------------------------------------------------

// Calls f(T{}) for the element type of `a`; `b` must have the same.
template <class F>
auto with_type(const char* op, const char* a_name, const py::array& a, const char* b_name,
               const py::array& b, F f) {
  if (!py::isinstance<py::array_t<float>>(a) && !py::isinstance<py::array_t<double>>(a)) {
    throw py::type_error(std::string(op) + ": " + a_name + " must be float32 or float64, got " +
                         text(a.dtype()));
  }
  if (!a.dtype().equal(b.dtype())) {
    throw py::type_error(std::string(op) + ": " + b_name + " must be " + text(a.dtype()) + " as " +
                         a_name + " is, got " + text(b.dtype()));
  }
  return py::isinstance<py::array_t<float>>(a) ? f(float{}) : f(double{});
}

// The array itself if it is C-contiguous and aligned, else a copy that is.
template <class T>
py::array_t<T, py::array::c_style> contiguous(const py::array& a) {
  auto out = py::array_t<T, py::array::c_style | py::array::forcecast>::ensure(
      py::module_::import("numpy").attr("require")(a, py::none(), "CA"));
  if (!out) throw py::error_already_set();
  return out;
}

void expect_dimensions(const char* op, const char* name, const py::array& a, int dimensions,
                       const char* meaning) {
  if (a.ndim() != dimensions) {
    bad_value(std::string(op) + ": " + name + " must have " + std::to_string(dimensions) +
              " dimensions " + meaning + ", got shape " + shape_of(a));
  }
}

template <class T>
bool fill_if_empty(py::array_t<T>& out, bool empty_sum) {
  if (out.size() == 0) return true;
  if (empty_sum) std::fill_n(out.mutable_data(), out.size(), T(0));
  return empty_sum;
}

// ---- Geometry ---------------------------------------------------------------------------------

// So large that no array has it, so small that sums and products of two do not overflow.
constexpr Index kLargest = Index(1) << 31;

void expect_range(const char* op, const char* name, Pair p, Index least) {
  if (p.first < least || p.second < least || p.first >= kLargest || p.second >= kLargest) {
    bad_value(std::string(op) + ": " + name + " must be at least " + std::to_string(least) +
              " and less than 2**31, got " + text(p));
  }
}

Index output_size(const char* op, const char* axis, Index in, Index pad, Index kernel,
                  Index dilation, Index stride) {
  const Index reach = dilation * (kernel - 1) + 1;
  if (reach > in + 2 * pad) {
    bad_value(std::string(op) + ": the kernel reaches over " + std::to_string(reach) + " " + axis +
              " (dilation included), more than the " + std::to_string(in + 2 * pad) +
              " of the padded input");
  }
  return (in + 2 * pad - reach) / stride + 1;
}

struct Options {
  Pair stride, padding, dilation;
  Index groups;
};

// Checks the options and completes the geometry with the size of the output.
void complete(const char* op, Conv2d& p, const Options& options) {
  expect_range(op, "kernel size", {p.kh, p.kw}, 1);
  expect_range(op, "input size", {p.h, p.w}, 0);
  expect_range(op, "stride", options.stride, 1);
  expect_range(op, "padding", options.padding, 0);
  expect_range(op, "dilation", options.dilation, 1);
  std::tie(p.stride_h, p.stride_w) = options.stride;
  std::tie(p.pad_h, p.pad_w) = options.padding;
  std::tie(p.dilation_h, p.dilation_w) = options.dilation;
  p.groups = options.groups;
  if (p.groups < 1 || p.c % p.groups != 0 || p.o % p.groups != 0) {
    bad_value(std::string(op) + ": groups = " + std::to_string(p.groups) +
              " must be positive and divide the " + std::to_string(p.c) + " input and the " +
              std::to_string(p.o) + " output channels");
  }
  p.oh = output_size(op, "rows", p.h, p.pad_h, p.kh, p.dilation_h, p.stride_h);
  p.ow = output_size(op, "columns", p.w, p.pad_w, p.kw, p.dilation_w, p.stride_w);
}

void expect_output(const char* op, const Conv2d& p, const py::array& g) {
  if (g.shape(0) != p.n || g.shape(1) != p.o || g.shape(2) != p.oh || g.shape(3) != p.ow) {
    bad_value(std::string(op) + ": g must have the output's shape (" + std::to_string(p.n) + ", " +
              std::to_string(p.o) + ", " + std::to_string(p.oh) + ", " + std::to_string(p.ow) +
              "), got " + shape_of(g));
  }
}

// ---- Convolution ------------------------------------------------------------------------------

py::array conv2d(const py::array& x, const py::array& w, Pair stride, Pair padding, Pair dilation,
                 Index groups) {
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
    kernels_of<T>().conv2d(p, px, pw, py_);
    return y;
  });
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

// ---- Matrices ---------------------------------------------------------------------------------

// A view with strides in elements; `owner` keeps a copy alive where NumPy's strides do not fit.
template <class T>
Matrix<T> matrix(const py::array& a, py::array& owner) {
  constexpr Index size = sizeof(T);
  const bool fits = a.strides(0) % size == 0 && a.strides(1) % size == 0 &&
                    reinterpret_cast<std::uintptr_t>(a.data()) % alignof(T) == 0;
  owner = fits ? a : py::array(contiguous<T>(a));
  return {static_cast<const T*>(owner.data()), owner.strides(0) / size, owner.strides(1) / size};
}

py::array matmul(const py::array& a, const py::array& b) {
  const char* op = "matmul";
  expect_dimensions(op, "a", a, 2, "(M, K)");
  expect_dimensions(op, "b", b, 2, "(K, N)");
  if (a.shape(1) != b.shape(0)) {
    bad_value(std::string(op) + ": a has " + std::to_string(a.shape(1)) + " columns, b has " +
              std::to_string(b.shape(0)) + " rows (a " + shape_of(a) + ", b " + shape_of(b) + ")");
  }
  return with_type(op, "a", a, "b", b, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const Index m = a.shape(0), n = b.shape(1), k = a.shape(1);
    py::array_t<T> c({m, n});
    if (fill_if_empty(c, k == 0)) return c;
    py::array keep_a, keep_b;
    const Matrix<T> ma = matrix<T>(a, keep_a), mb = matrix<T>(b, keep_b);
    T* out = c.mutable_data();
    py::gil_scoped_release release;
    kernels_of<T>().matmul(m, n, k, ma, mb, out);
    return c;
  });
}

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

// ---- The system -------------------------------------------------------------------------------

void set_threads(int n) {
  if (n < 1) bad_value("set_num_threads: expected at least 1, got " + std::to_string(n));
  py::gil_scoped_release release;
  set_num_threads(n);
}

// glibc gives large blocks back to the system at every free(), and gets them again as zeroed pages,
// one page fault each: for the temporaries of a training step that costs more than the arithmetic.
bool keep_memory() {
#if defined(__GLIBC__)
  return mallopt(M_MMAP_MAX, 0) && mallopt(M_TRIM_THRESHOLD, std::numeric_limits<int>::max()) &&
         mallopt(M_TOP_PAD, 64 << 20);
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "minidl's kernels in C++; csrc/README.md tells how they work.";
  m.attr("version") = MINIDL_VERSION;
  m.attr("sanitizer") = MINIDL_SANITIZE;  // the one it was built with, or ""

  const auto x = py::arg("x").noconvert(), w = py::arg("w").noconvert();
  const auto g = py::arg("g").noconvert();
  const auto stride = py::arg("stride") = Pair(1, 1);
  const auto padding = py::arg("padding") = Pair(0, 0);
  const auto dilation = py::arg("dilation") = Pair(1, 1);
  const auto groups = py::arg("groups") = 1;

  m.def("conv2d", &conv2d, x, w, stride, padding, dilation, groups,
        "x (N, C, H, W), w (O, C / groups, kH, kW) -> y (N, O, OH, OW): the cross-correlation.");
  m.def("conv2d_input", &conv2d_input, g, w, py::arg("input_size"), stride, padding, dilation,
        groups, "The gradient of conv2d with respect to x, which is (H, W) = input_size large.");
  m.def("conv2d_weight", &conv2d_weight, g, x, py::arg("kernel_size"), stride, padding, dilation,
        groups, "The gradient of conv2d with respect to w, which is (kH, kW) = kernel_size large.");
  m.def("matmul", &matmul, py::arg("a").noconvert(), py::arg("b").noconvert(),
        "a (M, K), b (K, N) -> (M, N); views of any strides are read in place.");
  m.def("max_pool2d", &max_pool2d, x, py::arg("kernel"), py::arg("stride"), padding, dilation,
        "x (N, C, H, W) -> (y, index): the maxima and their positions h * W + w.");
  m.def("max_pool2d_input", &max_pool2d_input, g, py::arg("index").noconvert(),
        py::arg("input_size"), "The gradient of max_pool2d with respect to its input.");

  m.def("isa", [] { return std::string(kernels().isa); }, "The instruction set in use.");
  m.def("supported_isas", &supported_isas, "Those that this machine can run, the best first.");
  m.def("get_num_threads", &get_num_threads);
  m.def("set_num_threads", &set_threads, py::arg("n"));
  m.def("keep_memory", &keep_memory,
        "Let malloc keep large blocks instead of returning them; True where glibc can.");

  py::module_::import("atexit").attr("register")(py::cpp_function([] {
    py::gil_scoped_release release;
    stop_threads();
  }));
}

}  // namespace minidl
