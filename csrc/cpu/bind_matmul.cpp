// The Python face of matrix products.
#include "bind.h"

namespace minidl {
namespace {

py::array matmul(const py::array& a, const py::array& b, const std::optional<py::array>& bias) {
  const char* op = "matmul";
  expect_dimensions(op, "a", a, 2, "(M, K)");
  expect_dimensions(op, "b", b, 2, "(K, N)");
  if (a.shape(1) != b.shape(0)) {
    bad_value(std::string(op) + ": a has " + std::to_string(a.shape(1)) + " columns, b has " +
              std::to_string(b.shape(0)) + " rows (a " + shape_of(a) + ", b " + shape_of(b) + ")");
  }
  const Index m = a.shape(0), n = b.shape(1), k = a.shape(1);
  if (bias && (bias->ndim() != 1 || bias->shape(0) != n)) {
    bad_value(std::string(op) + ": bias must have shape (" + std::to_string(n) +
              ",), one for each column of b, got " + shape_of(*bias));
  }
  return with_type(op, "a", a, "b", b, [&](auto zero) -> py::array {
    using T = decltype(zero);
    if (bias && !bias->dtype().equal(a.dtype())) {
      throw py::type_error(std::string(op) + ": bias must be " + text(a.dtype()) +
                           " as a is, got " + text(bias->dtype()));
    }
    py::array_t<T> c({m, n});
    py::array_t<T, py::array::c_style> of_column;
    if (bias) of_column = contiguous<T>(*bias);
    if (fill_if_empty(c, k == 0)) {
      for (Index i = 0; bias && i < m; ++i) {
        std::copy_n(of_column.data(), n, c.mutable_data() + i * n);
      }
      return c;
    }
    py::array keep_a, keep_b;
    const Matrix<T> ma = matrix<T>(a, keep_a), mb = matrix<T>(b, keep_b);
    const T* pbias = bias ? of_column.data() : nullptr;
    T* out = c.mutable_data();
    py::gil_scoped_release release;
    kernels_of<T>().matmul(m, n, k, ma, mb, pbias, out);
    return c;
  });
}

}  // namespace

void bind_matmul(py::module_& m) {
  m.def("matmul", &matmul, py::arg("a").noconvert(), py::arg("b").noconvert(),
        py::arg("bias").noconvert() = py::none(),
        "a (M, K), b (K, N), bias (N,) -> a b + bias (M, N); views of any strides are read in "
        "place.");
}

}  // namespace minidl
