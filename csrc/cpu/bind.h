// What the Python faces of the kernels share: checks of arguments, with messages that say what was
// expected and what came. (One bind_*.cpp a family; module.cpp puts them together.)
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "dispatch.h"

namespace minidl {

namespace py = pybind11;

// Each family adds its functions to the module.
void bind_conv(py::module_& m);
void bind_ladder(py::module_& m);
void bind_matmul(py::module_& m);
void bind_narrow(py::module_& m);
void bind_pool(py::module_& m);
void bind_recurrent(py::module_& m);
void bind_training(py::module_& m);
void bind_warp(py::module_& m);

using Pair = std::pair<Index, Index>;

inline std::string text(const py::handle& object) { return py::str(object).cast<std::string>(); }

inline std::string shape_of(const py::array& a) { return text(a.attr("shape")); }

inline std::string text(Pair p) {
  return "(" + std::to_string(p.first) + ", " + std::to_string(p.second) + ")";
}

[[noreturn]] inline void bad_value(const std::string& message) { throw py::value_error(message); }

template <class T>
const KernelsFor<T>& kernels_of() {
  if constexpr (sizeof(T) == 4) {
    return kernels().f32;
  } else {
    return kernels().f64;
  }
}

template <class T>
const LadderFor<T>& ladder_of() {
  if constexpr (sizeof(T) == 4) {
    return kernels().ladder->f32;
  } else {
    return kernels().ladder->f64;
  }
}

template <class T>
const TrainingFor<T>& training_of() {
  if constexpr (sizeof(T) == 4) {
    return kernels().training->f32;
  } else {
    return kernels().training->f64;
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

// Calls f(B{}, the kernels of B) for the type of an array of bytes.
template <class F>
auto with_bytes(const char* op, const char* name, const py::dtype& dtype, F f) {
  if (dtype.equal(py::dtype::of<std::int8_t>())) {
    return f(std::int8_t{}, kernels().narrow->signed_bytes);
  }
  if (dtype.equal(py::dtype::of<std::uint8_t>())) {
    return f(std::uint8_t{}, kernels().narrow->unsigned_bytes);
  }
  throw py::type_error(std::string(op) + ": " + name + " must be int8 or uint8, got " +
                       text(dtype));
}

template <class T>
using Plain = py::array_t<T, py::array::c_style>;

// The array itself if it is C-contiguous and aligned, else a copy that is.
inline py::array plain(const py::array& a) {
  constexpr int wanted =
      py::detail::npy_api::NPY_ARRAY_C_CONTIGUOUS_ | py::detail::npy_api::NPY_ARRAY_ALIGNED_;
  if ((a.flags() & wanted) == wanted) return a;
  return py::module_::import("numpy").attr("require")(a, py::none(), "CA");
}

template <class T>
py::array_t<T, py::array::c_style> contiguous(const py::array& a) {
  auto out = py::array_t<T, py::array::c_style | py::array::forcecast>::ensure(plain(a));
  if (!out) throw py::error_already_set();
  return out;
}

// A view with strides in elements; `owner` keeps a copy alive where NumPy's strides do not fit.
template <class T>
Matrix<T> matrix(const py::array& a, py::array& owner) {
  constexpr Index size = sizeof(T);
  const bool fits = a.strides(0) % size == 0 && a.strides(1) % size == 0 &&
                    reinterpret_cast<std::uintptr_t>(a.data()) % alignof(T) == 0;
  owner = fits ? a : py::array(contiguous<T>(a));
  return {static_cast<const T*>(owner.data()), owner.strides(0) / size, owner.strides(1) / size};
}

// The array in the right type and layout, or null.
using Maybe = std::optional<py::array>;

template <class T>
std::optional<Plain<T>> maybe_plain(const char* op, const char* name, const Maybe& a) {
  if (!a) return std::nullopt;
  if (!py::isinstance<py::array_t<T>>(*a)) {
    throw py::type_error(std::string(op) + ": " + name + " must be " + text(py::dtype::of<T>()) +
                         ", got " + text(a->dtype()));
  }
  return contiguous<T>(*a);
}
template <class T>
const T* pointer(const std::optional<Plain<T>>& a) {
  return a ? a->data() : nullptr;
}

inline void expect_dimensions(const char* op, const char* name, const py::array& a, int dimensions,
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

inline void expect_range(const char* op, const char* name, Pair p, Index least) {
  if (p.first < least || p.second < least || p.first >= kLargest || p.second >= kLargest) {
    bad_value(std::string(op) + ": " + name + " must be at least " + std::to_string(least) +
              " and less than 2**31, got " + text(p));
  }
}

inline Index output_size(const char* op, const char* axis, Index in, Index pad, Index kernel,
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
inline void complete(const char* op, Conv2d& p, const Options& options) {
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

}  // namespace minidl
