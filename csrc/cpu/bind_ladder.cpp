// The Python face of the ladder's lower matrix products, and of the loops that measure the machine.
#include <chrono>
#include <vector>

#include "bind.h"

namespace minidl {
namespace {

// With which rung: `kernel_of(T{})` is one of the products of LadderFor<T>.
template <class KernelOf>
py::array matmul_with(const char* op, KernelOf kernel_of, const py::array& a, const py::array& b) {
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
    const auto ca = contiguous<T>(a), cb = contiguous<T>(b);
    const T *pa = ca.data(), *pb = cb.data();
    T* out = c.mutable_data();
    py::gil_scoped_release release;
    kernel_of(zero)(m, n, k, pa, pb, out);
    return c;
  });
}

py::array matmul_naive(const py::array& a, const py::array& b) {
  return matmul_with(
      "matmul_naive", [](auto zero) { return ladder_of<decltype(zero)>().matmul_naive; }, a, b);
}

py::array matmul_reordered(const py::array& a, const py::array& b) {
  return matmul_with(
      "matmul_reordered", [](auto zero) { return ladder_of<decltype(zero)>().matmul_reordered; }, a,
      b);
}

py::array matmul_tiled(const py::array& a, const py::array& b) {
  return matmul_with(
      "matmul_tiled", [](auto zero) { return ladder_of<decltype(zero)>().matmul_tiled; }, a, b);
}

// ---- The roofs --------------------------------------------------------------------------------

// Seconds that f() takes, the least of as many as fit in a quarter of a second: what disturbs it
// only ever makes it slower.
template <class F>
double least_seconds(F f) {
  using Clock = std::chrono::steady_clock;
  using Seconds = std::chrono::duration<double>;
  const auto begin = Clock::now();
  Seconds least(1e30);
  for (auto start = begin, end = begin; Seconds(end - begin).count() < 0.25; start = end) {
    f();
    end = Clock::now();
    least = std::min(least, Seconds(end - start));
  }
  return least.count();
}

double peak_flops(const py::object& dtype) {
  const py::array one(py::dtype::from_args(dtype), std::vector<Index>{1});
  if (py::isinstance<py::array_t<std::int8_t>>(one)) {
    py::gil_scoped_release release;
    std::vector<std::int32_t> out(static_cast<std::size_t>(kernels().ladder->f32.peak_chunks));
    double operations = 0;
    const double seconds = least_seconds([&] {
      operations = static_cast<double>(
          kernels().narrow->multiply_add_bytes_loop(4000, Word{0x01010101}, out.data()));
    });
    return operations / seconds;
  }
  return with_type("peak_flops", "dtype", one, "dtype", one, [](auto zero) {
    using T = decltype(zero);
    py::gil_scoped_release release;
    const LadderFor<T>& loops = ladder_of<T>();
    std::vector<T> out(static_cast<std::size_t>(loops.peak_chunks));
    double operations = 0;
    const double seconds = least_seconds([&] {
      operations = static_cast<double>(loops.multiply_add_loop(4000, T(0.5), T(1), out.data()));
    });
    return operations / seconds;
  });
}

double memory_bandwidth(Index bytes) {
  if (bytes < 3 * 4 || bytes > Index(1) << 40) {
    bad_value("memory_bandwidth: bytes must be between 12 and 2**40, got " + std::to_string(bytes));
  }
  py::gil_scoped_release release;
  const auto n = static_cast<std::size_t>(bytes) / (3 * sizeof(float));
  const std::vector<float> b(n, 1), c(n, 2);
  std::vector<float> a(n);
  const double seconds = least_seconds(
      [&] { kernels().ladder->f32.triad(static_cast<Index>(n), 3, b.data(), c.data(), a.data()); });
  return 3.0 * static_cast<double>(n * sizeof(float)) / seconds;
}

}  // namespace

void bind_ladder(py::module_& m) {
  const auto a = py::arg("a").noconvert(), b = py::arg("b").noconvert();
  m.def("matmul_naive", &matmul_naive, a, b, "matmul, its definition: a rung of the ladder.");
  m.def("matmul_reordered", &matmul_reordered, a, b, "matmul along rows: a rung of the ladder.");
  m.def("matmul_tiled", &matmul_tiled, a, b, "matmul by register tiles: a rung of the ladder.");
  m.def("peak_flops", &peak_flops, py::arg("dtype"),
        "Operations a second of multiply-adds on registers alone, on all threads (measured); int8: "
        "of "
        "bytes, added up in 32 bits.");
  m.def("memory_bandwidth", &memory_bandwidth, py::arg("bytes") = Index(192) << 20,
        "Bytes a second of a = b + s * c, three arrays of `bytes` together (measured).");
}

}  // namespace minidl
