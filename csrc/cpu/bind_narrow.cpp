// The Python face of integer products and of weights that are packed once and kept.
#include <limits>
#include <memory>
#include <new>
#include <variant>
#include <vector>

#include "bind.h"

namespace minidl {
namespace {

// ---- Weights, packed --------------------------------------------------------------------------

// What pack_linear and its like return, to be passed where the weights would be. It belongs to the
// instruction set that packed it, which is that of the process, and it is never written to again.
struct PackedWeight {
  enum Use { kLinear, kMatmulInteger, kConvInteger };
  Use use;
  std::string dtype;
  std::vector<Index> shape;
  Index groups = 1;
  Index bytes = 0;
  std::vector<std::int32_t> sum, zero;  // of integers
  int farthest = 0;                     // the largest |w - zero| that there can be

  // 64-byte lines, so that no vector of a panel lies across two.
  void* allocate(Index size) {
    bytes = size;
    data_.reset(::operator new(static_cast<std::size_t>(size), std::align_val_t(64)));
    return data_.get();
  }
  template <class E>
  E* data() const {
    return static_cast<E*>(data_.get());
  }
  PackedBytes packed_bytes() { return {data<Word>(), sum.data(), zero.data()}; }

 private:
  struct Free {
    void operator()(void* p) const { ::operator delete(p, std::align_val_t(64)); }
  };
  std::unique_ptr<void, Free> data_;
};

using Packed = std::shared_ptr<PackedWeight>;

const char* maker(PackedWeight::Use use) {
  const char* const makers[] = {"pack_linear", "pack_matmul_integer", "pack_conv_integer"};
  return makers[use];
}

void expect_use(const char* op, const PackedWeight& w, PackedWeight::Use use) {
  if (w.use != use) {
    throw py::type_error(std::string(op) + ": w must come from " + maker(use) + ", got one from " +
                         maker(w.use));
  }
}

using minidl::shape_of;
std::string shape_of(const PackedWeight& w) { return text(py::tuple(py::cast(w.shape))); }

void expect_elements(const char* op, const py::array& w) {
  if (w.size() == 0) bad_value(std::string(op) + ": w has no elements, shape " + shape_of(w));
}

// ---- Arguments --------------------------------------------------------------------------------

bool is_signed_byte(const char* op, const char* name, const py::array& a) {
  if (py::isinstance<py::array_t<std::int8_t>>(a)) return true;
  if (py::isinstance<py::array_t<std::uint8_t>>(a)) return false;
  throw py::type_error(std::string(op) + ": " + name + " must be int8 or uint8, got " +
                       text(a.dtype()));
}

using Maybe = std::optional<py::array>;

template <class T>
using Vector = std::optional<py::array_t<T, py::array::c_style>>;

// One number for each of n output channels, or none.
template <class T>
Vector<T> vector(const char* op, const char* name, const Maybe& a, Index n) {
  if (!a) return {};
  if (!py::isinstance<py::array_t<T>>(*a)) {
    throw py::type_error(std::string(op) + ": " + name + " must be " + text(py::dtype::of<T>()) +
                         ", got " + text(a->dtype()));
  }
  if (a->ndim() != 1 || a->shape(0) != n) {
    bad_value(std::string(op) + ": " + name + " must have shape (" + std::to_string(n) +
              ",), one for each output channel, got " + shape_of(*a));
  }
  return contiguous<T>(*a);
}

template <class T>
const T* data_of(const Vector<T>& a) {
  return a ? a->data() : nullptr;
}

using Zeros = py::array_t<std::int32_t, py::array::c_style>;

// One zero point for each of n, and how far a number can be from its zero point.
std::vector<std::int32_t> zeros(const char* op, const char* name, const Zeros& zero, Index n,
                                bool is_signed, int& farthest) {
  if (zero.ndim() > 1 || (zero.ndim() == 1 && zero.shape(0) != n && zero.shape(0) != 1)) {
    bad_value(std::string(op) + ": " + name + " must be one number or have shape (" +
              std::to_string(n) + ",), got shape " + shape_of(zero));
  }
  const int least = is_signed ? -128 : 0, most = least + 255;
  std::vector<std::int32_t> all(static_cast<std::size_t>(n));
  farthest = 0;
  for (Index i = 0; i < n; ++i) {
    const std::int32_t z = zero.data()[zero.size() == 1 ? 0 : i];
    if (z < least || z > most) {
      bad_value(std::string(op) + ": " + name + " must lie between " + std::to_string(least) +
                " and " + std::to_string(most) + ", got " + std::to_string(z));
    }
    farthest = std::max({farthest, most - z, z - least});
    all[static_cast<std::size_t>(i)] = z;
  }
  return all;
}

void expect_sum_fits(const char* op, Index k, int farthest_a, int farthest_w) {
  const Index most = std::numeric_limits<std::int32_t>::max() /
                     std::max(Index(farthest_a) * Index(farthest_w), Index(1));
  if (k > most) {
    bad_value(std::string(op) + ": a sum of " + std::to_string(k) +
              " products may not fit in 32 bits; with these types and zero points at most " +
              std::to_string(most) + " can be added up");
  }
}

// How a sum is finished, and an array for the result.
struct Finishing {
  Maybe bias, scale, offset;
  std::optional<std::string> dtype;  // "int8", "uint8"
  int zero;
  bool relu;
  Vector<std::int32_t> bias_of{};  // what `finish` points to
  Vector<float> scale_of{}, offset_of{};
  Finish finish{};

  py::array result(const char* op, const std::vector<Index>& shape, Index channels) {
    bias_of = vector<std::int32_t>(op, "bias", bias, channels);
    scale_of = vector<float>(op, "scale", scale, channels);
    offset_of = vector<float>(op, "offset", offset, channels);
    finish = {Finish::kInt32, data_of(bias_of), data_of(scale_of), data_of(offset_of), zero, relu};
    if (!scale) {
      if (offset || dtype) bad_value(std::string(op) + ": offset and dtype need a scale");
      return py::array_t<std::int32_t>(shape);
    }
    if (!dtype) {
      finish.type = Finish::kFloat32;
      return py::array_t<float>(shape);
    }
    if (offset) bad_value(std::string(op) + ": offset is for float32 results, bias for " + *dtype);
    const bool is_signed = *dtype == "int8";
    const int least = is_signed ? -128 : 0;
    if ((!is_signed && *dtype != "uint8") || zero < least || zero > least + 255) {
      bad_value(std::string(op) + ": expected dtype int8 or uint8 and a zero point in its range, " +
                "got " + *dtype + " and " + std::to_string(zero));
    }
    finish.type = is_signed ? Finish::kInt8 : Finish::kUint8;
    if (is_signed) return py::array_t<std::int8_t>(shape);
    return py::array_t<std::uint8_t>(shape);
  }
};

Bytes bytes(const py::array& a, bool is_signed) {
  return {static_cast<const std::uint8_t*>(a.data()), a.strides(0), a.strides(1), is_signed};
}

// ---- Integers ---------------------------------------------------------------------------------

Packed pack_matmul_integer(const py::array& w, const Zeros& zero) {
  const char* op = "pack_matmul_integer";
  expect_dimensions(op, "w", w, 2, "(N, K)");
  expect_elements(op, w);
  const bool is_signed = is_signed_byte(op, "w", w);
  const Index n = w.shape(0), k = w.shape(1);
  auto packed = std::make_shared<PackedWeight>();
  packed->use = PackedWeight::kMatmulInteger;
  packed->dtype = text(w.dtype());
  packed->shape = {n, k};
  packed->zero = zeros(op, "zero_point", zero, n, is_signed, packed->farthest);
  packed->sum.resize(static_cast<std::size_t>(n));
  const Narrow& narrow = *kernels().narrow;
  packed->allocate((k + 3) / 4 * narrow.packed_width(n) * Index(sizeof(Word)));
  const Bytes b = bytes(w, is_signed);
  py::gil_scoped_release release;
  narrow.pack_bytes(n, k, b, packed->packed_bytes());
  return packed;
}

py::array matmul_integer(const py::array& a, const Packed& w, const Zeros& a_zero,
                         const Maybe& bias, const Maybe& scale, const Maybe& offset,
                         const std::optional<std::string>& dtype, int zero, bool relu) {
  const char* op = "matmul_integer";
  expect_use(op, *w, PackedWeight::kMatmulInteger);
  expect_dimensions(op, "a", a, 2, "(M, K)");
  const bool is_signed = is_signed_byte(op, "a", a);
  const Index m = a.shape(0), n = w->shape[0], k = w->shape[1];
  if (a.shape(1) != k) {
    bad_value(std::string(op) + ": a has " + std::to_string(a.shape(1)) +
              " columns, w (N, K) = " + shape_of(*w) + " expects " + std::to_string(k));
  }
  int farthest = 0;
  const auto zero_of_row = zeros(op, "a_zero_point", a_zero, m, is_signed, farthest);
  expect_sum_fits(op, k, farthest, w->farthest);
  Finishing how{bias, scale, offset, dtype, zero, relu};
  py::array c = how.result(op, {m, n}, n);
  if (m == 0) return c;
  const Bytes left = bytes(a, is_signed);
  void* out = c.mutable_data();
  py::gil_scoped_release release;
  kernels().narrow->matmul_integer(m, n, k, left, zero_of_row.data(), w->packed_bytes(), how.finish,
                                   out);
  return c;
}

Packed pack_conv_integer(const py::array& w, const Zeros& zero, Index groups) {
  const char* op = "pack_conv_integer";
  expect_dimensions(op, "w", w, 4, "(O, C / groups, kH, kW)");
  expect_elements(op, w);
  const bool is_signed = is_signed_byte(op, "w", w);
  Conv2d p{};
  std::tie(p.o, p.kh, p.kw) = std::tuple(w.shape(0), w.shape(2), w.shape(3));
  if (groups < 1 || p.o % groups != 0) {
    bad_value(std::string(op) + ": groups = " + std::to_string(groups) +
              " must be positive and divide the " + std::to_string(p.o) + " output channels");
  }
  p.groups = groups;
  p.c = w.shape(1) * groups;
  auto packed = std::make_shared<PackedWeight>();
  packed->use = PackedWeight::kConvInteger;
  packed->dtype = text(w.dtype());
  packed->shape = {p.o, w.shape(1), p.kh, p.kw};
  packed->groups = groups;
  packed->zero = zeros(op, "zero_point", zero, p.o, is_signed, packed->farthest);
  packed->sum.resize(static_cast<std::size_t>(p.o));
  packed->allocate(p.o * ((w.shape(1) + 3) / 4) * p.kh * p.kw * Index(sizeof(Word)));
  const py::array plain =
      is_signed ? py::array(contiguous<std::int8_t>(w)) : py::array(contiguous<std::uint8_t>(w));
  const Bytes b = bytes(plain, is_signed);
  py::gil_scoped_release release;
  kernels().narrow->pack_conv(p, b, packed->packed_bytes());
  return packed;
}

py::array conv_integer(const py::array& x, const Packed& w, int x_zero, Pair stride, Pair padding,
                       Pair dilation, const Maybe& bias, const Maybe& scale, const Maybe& offset,
                       const std::optional<std::string>& dtype, int zero, bool relu) {
  const char* op = "conv_integer";
  expect_use(op, *w, PackedWeight::kConvInteger);
  expect_dimensions(op, "x", x, 4, "(N, C, H, W)");
  const bool is_signed = is_signed_byte(op, "x", x);
  Conv2d p{};
  std::tie(p.n, p.c, p.h, p.w) = std::tuple(x.shape(0), x.shape(1), x.shape(2), x.shape(3));
  std::tie(p.o, p.kh, p.kw) = std::tuple(w->shape[0], w->shape[2], w->shape[3]);
  complete(op, p, {stride, padding, dilation, w->groups});
  if (w->shape[1] * w->groups != p.c) {
    bad_value(std::string(op) + ": x has " + std::to_string(p.c) + " channels, w expects " +
              std::to_string(w->shape[1]) + " in each of " + std::to_string(w->groups) +
              " groups (x " + shape_of(x) + ", w " + shape_of(*w) + ")");
  }
  int farthest = 0;
  Zeros one(1);
  one.mutable_data()[0] = x_zero;
  zeros(op, "x_zero_point", one, 1, is_signed, farthest);
  expect_sum_fits(op, w->shape[1] * p.kh * p.kw, farthest, w->farthest);
  Finishing how{bias, scale, offset, dtype, zero, relu};
  py::array y = how.result(op, {p.n, p.o, p.oh, p.ow}, p.o);
  if (y.size() == 0) return y;
  const py::array plain =
      is_signed ? py::array(contiguous<std::int8_t>(x)) : py::array(contiguous<std::uint8_t>(x));
  const Bytes image = bytes(plain, is_signed);
  void* out = y.mutable_data();
  py::gil_scoped_release release;
  kernels().narrow->conv_integer(p, image, x_zero, w->packed_bytes(), how.finish, out);
  return y;
}

// ---- Between the products ---------------------------------------------------------------------

// The lowest number of the type, if `zero` is one of it.
template <class B>
void expect_byte(const char* op, const char* name, int zero) {
  const int least = std::numeric_limits<B>::min(), most = std::numeric_limits<B>::max();
  if (zero < least || zero > most) {
    bad_value(std::string(op) + ": " + name + " must lie between " + std::to_string(least) +
              " and " + std::to_string(most) + ", got " + std::to_string(zero));
  }
}

py::array quantize_linear(const py::array_t<float>& x, float scale, int zero,
                          const std::string& dtype) {
  const char* op = "quantize_linear";
  return with_bytes(op, "dtype", py::dtype(dtype), [&](auto type, const auto& kernels) {
    using B = decltype(type);
    expect_byte<B>(op, "zero_point", zero);
    const auto a = contiguous<float>(x);
    py::array_t<B> q(std::vector<Index>(x.shape(), x.shape() + x.ndim()));
    B* out = q.mutable_data();
    py::gil_scoped_release release;
    kernels.quantize(a.size(), a.data(), scale, zero, out);
    return py::array(q);
  });
}

py::array add_integer(const py::array& a, const py::array& b, float a_scale, float b_scale,
                      int a_zero, int b_zero, int zero, bool relu) {
  const char* op = "add_integer";
  if (!a.dtype().equal(b.dtype()) || !a.attr("shape").equal(b.attr("shape"))) {
    bad_value(std::string(op) + ": a and b must have one shape and type, got " + shape_of(a) + " " +
              text(a.dtype()) + " and " + shape_of(b) + " " + text(b.dtype()));
  }
  return with_bytes(op, "a", a.dtype(), [&](auto type, const auto& kernels) {
    using B = decltype(type);
    for (const int z : {a_zero, b_zero, zero}) expect_byte<B>(op, "a zero point", z);
    const auto left = contiguous<B>(a), right = contiguous<B>(b);
    py::array_t<B> y(std::vector<Index>(a.shape(), a.shape() + a.ndim()));
    B* out = y.mutable_data();
    py::gil_scoped_release release;
    kernels.add(left.size(), left.data(), right.data(),
                {a_scale, b_scale, a_zero, b_zero, zero, relu}, out);
    return py::array(y);
  });
}

py::array mean_integer(const py::array& x, float scale, int x_zero, int zero) {
  const char* op = "mean_integer";
  expect_dimensions(op, "x", x, 4, "(N, C, H, W)");
  return with_bytes(op, "x", x.dtype(), [&](auto type, const auto& kernels) {
    using B = decltype(type);
    for (const int z : {x_zero, zero}) expect_byte<B>(op, "a zero point", z);
    const auto a = contiguous<B>(x);
    const Index planes = x.shape(0) * x.shape(1), n = x.shape(2) * x.shape(3);
    if (n == 0) bad_value(std::string(op) + ": no mean of nothing, got x of shape " + shape_of(x));
    py::array_t<B> y({x.shape(0), x.shape(1), Index(1), Index(1)});
    B* out = y.mutable_data();
    py::gil_scoped_release release;
    kernels.mean(planes, n, a.data(), scale, x_zero, zero, out);
    return py::array(y);
  });
}

// ---- Weights of 32, 16 and 8 bits -------------------------------------------------------------

// Calls f(E{}, the kernels of E) for the type that weights are stored in.
template <class F>
auto with_stored_type(const std::string& dtype, F f) {
  const Narrow& narrow = *kernels().narrow;
  if (dtype == "float32") return f(float{}, narrow.f32);
  if (dtype == "float16") return f(Half{}, narrow.f16);
  if (dtype == "bfloat16") return f(BFloat16{}, narrow.bf16);
  if (dtype == "int8") return f(std::int8_t{}, narrow.s8);
  throw py::type_error("linear: w must be float32, float16, bfloat16 or int8, got " + dtype);
}

// Weights as they come; `keep` keeps a copy alive where NumPy's strides do not fit.
template <class E>
Matrix<E> stored(const py::array& w, py::array& keep) {
  constexpr Index size = sizeof(E);
  const bool fits = w.strides(0) % size == 0 && w.strides(1) % size == 0 &&
                    reinterpret_cast<std::uintptr_t>(w.data()) % alignof(E) == 0;
  keep = fits ? w : plain(w);
  return {static_cast<const E*>(keep.data()), keep.strides(0) / size, keep.strides(1) / size};
}

Packed pack_linear(const py::array& w) {
  const char* op = "pack_linear";
  expect_dimensions(op, "w", w, 2, "(N, K)");
  expect_elements(op, w);
  return with_stored_type(text(w.dtype()), [&](auto zero, const auto& kernels_of_type) {
    using E = decltype(zero);
    const Index n = w.shape(0), k = w.shape(1), size = sizeof(E);
    auto packed = std::make_shared<PackedWeight>();
    packed->use = PackedWeight::kLinear;
    packed->dtype = text(w.dtype());
    packed->shape = {n, k};
    packed->allocate(k * kernels().narrow->packed_width(n) * size);
    py::array keep;
    const Matrix<E> b = stored<E>(w, keep);
    py::gil_scoped_release release;
    kernels_of_type.pack(n, k, b, packed->template data<E>());
    return packed;
  });
}

py::array linear(const py::array& x, const std::variant<Packed, py::array>& weights,
                 const Maybe& scale, const Maybe& bias) {
  const char* op = "linear";
  const Packed* packed = std::get_if<Packed>(&weights);
  const py::array* plain = std::get_if<py::array>(&weights);
  if (packed) expect_use(op, **packed, PackedWeight::kLinear);
  if (plain) expect_dimensions(op, "w", *plain, 2, "(N, K)");
  if (plain) expect_elements(op, *plain);
  expect_dimensions(op, "x", x, 2, "(M, K)");
  if (!py::isinstance<py::array_t<float>>(x)) {
    throw py::type_error(std::string(op) + ": x must be float32, got " + text(x.dtype()));
  }
  const Index m = x.shape(0), n = packed ? (*packed)->shape[0] : plain->shape(0);
  const Index k = packed ? (*packed)->shape[1] : plain->shape(1);
  if (x.shape(1) != k) {
    bad_value(std::string(op) + ": x has " + std::to_string(x.shape(1)) + " columns, w (N, K) = " +
              (packed ? shape_of(**packed) : shape_of(*plain)) + " expects " + std::to_string(k));
  }
  const auto scale_of = vector<float>(op, "scale", scale, n);
  const auto bias_of = vector<float>(op, "bias", bias, n);
  const std::string dtype = packed ? (*packed)->dtype : text(plain->dtype());
  return with_stored_type(dtype, [&](auto zero, const auto& kernels_of_type) -> py::array {
    using E = decltype(zero);
    py::array_t<float> y({m, n});
    if (m == 0) return y;
    py::array keep_x, keep_w;
    const Matrix<float> left = matrix<float>(x, keep_x);
    const Matrix<E> w = plain ? stored<E>(*plain, keep_w) : Matrix<E>{};
    const float *times = data_of(scale_of), *plus = data_of(bias_of);
    float* out = y.mutable_data();
    py::gil_scoped_release release;
    if (packed) {
      kernels_of_type.linear(m, n, k, left, (*packed)->template data<const E>(), times, plus, out);
    } else {
      kernels_of_type.linear_unpacked(m, n, k, left, w, times, plus, out);
    }
    return y;
  });
}

py::array linear_int4(const py::array& x, const py::array& w, const py::array& scale, Index group,
                      const Maybe& bias) {
  const char* op = "linear_int4";
  expect_dimensions(op, "x", x, 2, "(M, K)");
  expect_dimensions(op, "w", w, 2, "(N, K / 2)");
  expect_dimensions(op, "scale", scale, 2, "(N, groups)");
  const Index m = x.shape(0), k = x.shape(1), n = w.shape(0), bytes = (k + 1) / 2;
  if (group < 1 || w.shape(1) != bytes || scale.shape(0) != n ||
      scale.shape(1) != (k + group - 1) / group) {
    bad_value(std::string(op) + ": x " + shape_of(x) + " and groups of " + std::to_string(group) +
              " need w (N, " + std::to_string(bytes) + ") and a scale for each group, got " +
              shape_of(w) + " and " + shape_of(scale));
  }
  if (group % 32 && group < k) {
    bad_value(std::string(op) + ": a group is a multiple of 32 or a whole row, got " +
              std::to_string(group));
  }
  const auto from = *maybe_plain<float>(op, "x", x),
             scales = *maybe_plain<float>(op, "scale", scale);
  const auto weights = *maybe_plain<std::uint8_t>(op, "w", w);
  const auto offset = maybe_plain<float>(op, "bias", bias);
  if (offset && offset->size() != n) {
    bad_value(std::string(op) + ": bias must have " + std::to_string(n) + " elements, got " +
              shape_of(*offset));
  }
  const Index padded = (bytes + 15) / 16 * 16;  // whole vectors, on any processor
  std::vector<float> even(static_cast<std::size_t>(m * padded)), odd(even.size());
  const float* in = from.data();
  for (Index i = 0; i < m; ++i) {
    for (Index j = 0; j < k; ++j) {
      (j % 2 ? odd : even)[static_cast<std::size_t>(i * padded + j / 2)] = in[i * k + j];
    }
  }
  py::array_t<float> y({m, n});
  float* out = y.mutable_data();
  const Int4 s{n, k, group, padded, weights.data(), scales.data()};
  const float* add = pointer<float>(offset);
  {
    py::gil_scoped_release release;
    kernels().narrow->linear_int4(s, m, even.data(), odd.data(), add, out);
  }
  return y;
}

}  // namespace

void bind_narrow(py::module_& m) {
  py::class_<PackedWeight, Packed>(m, "PackedWeight",
                                   "Weights in the order in which a kernel reads them.")
      .def_property_readonly("shape",
                             [](const PackedWeight& w) { return py::tuple(py::cast(w.shape)); })
      .def_readonly("dtype", &PackedWeight::dtype)
      .def_readonly("groups", &PackedWeight::groups)
      .def_readonly("nbytes", &PackedWeight::bytes)
      .def_property_readonly("maker", [](const PackedWeight& w) { return maker(w.use); })
      .def("__reduce__",
           [](const PackedWeight& w) -> py::object {
             throw py::type_error(std::string("a PackedWeight is for this processor and cannot be "
                                              "saved: save the weights and call ") +
                                  maker(w.use) + " again");
           })
      .def("__repr__", [](const PackedWeight& w) {
        return "<PackedWeight " + w.dtype + shape_of(w) + " by " + maker(w.use) + ">";
      });
  const auto none = py::none();
  const auto w = py::arg("w"), plain = py::arg("w").noconvert();
  const auto bias = py::arg("bias") = none, scale = py::arg("scale") = none;
  const auto offset = py::arg("offset") = none;
  const auto dtype = py::arg("dtype") = none;
  const auto zero = py::arg("zero_point") = 0;
  const auto relu = py::arg("relu") = false;
  m.def("pack_matmul_integer", &pack_matmul_integer, plain, zero,
        "w (N, K), int8 or uint8; one zero point or N of them.");
  m.def("matmul_integer", &matmul_integer, py::arg("a").noconvert(), w, py::arg("a_zero_point") = 0,
        bias, scale, offset, dtype, zero, relu,
        "sum over k of (a[m, k] - a_zero)(w[n, k] - zero) + bias[n] as int32; times scale[n] plus "
        "offset[n] as float32; times scale[n], rounded, plus zero_point as `dtype`.");
  m.def("pack_conv_integer", &pack_conv_integer, plain, zero, py::arg("groups") = 1,
        "w (O, C / groups, kH, kW), int8 or uint8; one zero point or O of them.");
  m.def("conv_integer", &conv_integer, py::arg("x").noconvert(), w, py::arg("x_zero_point") = 0,
        py::arg("stride") = Pair(1, 1), py::arg("padding") = Pair(0, 0),
        py::arg("dilation") = Pair(1, 1), bias, scale, offset, dtype, zero, relu,
        "Convolution of bytes; what becomes of the sums: as in matmul_integer.");
  m.def("quantize_linear", &quantize_linear, py::arg("x").noconvert(), py::arg("scale"),
        py::arg("zero_point"), py::arg("dtype"),
        "round(x / scale) + zero_point as `dtype`, half to even, saturated; x is float32.");
  m.def("add_integer", &add_integer, py::arg("a").noconvert(), py::arg("b").noconvert(),
        py::arg("a_scale"), py::arg("b_scale"), py::arg("a_zero_point"), py::arg("b_zero_point"),
        py::arg("zero_point"), relu,
        "(a - a_zero) a_scale + (b - b_zero) b_scale, rounded, plus zero_point, of a's type.");
  m.def("mean_integer", &mean_integer, py::arg("x").noconvert(), py::arg("scale"),
        py::arg("x_zero_point"), py::arg("zero_point"),
        "The mean of each plane of (x - x_zero), times scale, rounded, plus zero_point: "
        "(N, C, H, W) -> (N, C, 1, 1), of x's type.");
  m.def("pack_linear", &pack_linear, plain, "w (N, K), float32, float16, bfloat16 or int8.");
  m.def(
      "linear_int4", &linear_int4, py::arg("x").noconvert(), plain, py::arg("scale").noconvert(),
      py::arg("group_size"), bias,
      "x (M, K) times the transpose of w (N, K / 2), two weights a byte; a scale for each group.");
  m.def("linear", &linear, py::arg("x").noconvert(), w, scale, bias,
        "x (M, K) times the transpose of w (N, K), packed or not, times scale[n], plus bias[n], in "
        "float32: the same bits.");
}

}  // namespace minidl
