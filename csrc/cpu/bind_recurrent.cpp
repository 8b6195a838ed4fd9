// The Python face of recurrent layers and of attention.
#include "bind.h"

namespace minidl {
namespace {

template <class T>
const RecurrentFor<T>& recurrent_of() {
  if constexpr (sizeof(T) == 4) {
    return kernels().recurrent->f32;
  } else {
    return kernels().recurrent->f64;
  }
}

template <class T>
const AttentionFor<T>& attention_of() {
  if constexpr (sizeof(T) == 4) {
    return kernels().recurrent->attention_f32;
  } else {
    return kernels().recurrent->attention_f64;
  }
}

// The layer's sizes: w_hh (gates * H, H); T steps, N sequences.
struct Layer {
  Recurrent s;
  Index gates, states, kept;
  std::optional<Plain<Index>> lengths;
};

Layer layer(const std::string& cell, const py::array& w_hh, Index columns, Index batch,
            const Maybe& lengths) {
  Layer l{};
  if (cell == "lstm") {
    std::tie(l.s.cell, l.gates, l.states, l.kept) = std::tuple(RecurrentCell::lstm, 4, 2, 6);
  } else if (cell == "gru") {
    std::tie(l.s.cell, l.gates, l.states, l.kept) = std::tuple(RecurrentCell::gru, 3, 1, 5);
  } else if (cell == "relu" || cell == "tanh") {
    l.s.cell = cell == "relu" ? RecurrentCell::rnn_relu : RecurrentCell::rnn_tanh;
    l.gates = l.states = l.kept = 1;
  } else {
    bad_value("recurrent: cell is 'lstm', 'gru', 'tanh' or 'relu', got '" + cell + "'");
  }
  expect_dimensions("recurrent", "w_hh", w_hh, 2, "(gates * H, H)");
  l.s.hidden = w_hh.shape(1);
  l.s.batch = batch;
  if (w_hh.shape(0) != l.gates * l.s.hidden) {
    bad_value("recurrent: w_hh of " + cell + " is (" + std::to_string(l.gates) +
              " * H, H), got shape " + shape_of(w_hh));
  }
  if (batch < 1 || l.s.hidden < 1 || columns < 1 || columns % batch) {
    bad_value("recurrent: expected at least one step, sequence and unit, and T * N columns; got " +
              std::to_string(columns) + " columns, " + std::to_string(batch) + " sequences and " +
              std::to_string(l.s.hidden) + " units");
  }
  l.s.steps = columns / batch;
  if (lengths) {
    l.lengths = contiguous<Index>(*lengths);
    if (l.lengths->size() != batch) {
      bad_value("recurrent: " + std::to_string(batch) + " lengths, got shape " +
                shape_of(*lengths));
    }
  }
  l.s.lengths = pointer<Index>(l.lengths);
  return l;
}

py::tuple recurrent(const std::string& cell, const py::array& a, const py::array& w_hh,
                    const Maybe& b_ih, const Maybe& b_hh, const py::array& first,
                    const Maybe& lengths, bool keep) {
  const char* op = "recurrent";
  expect_dimensions(op, "a", a, 2, "(gates * H, T * N)");
  expect_dimensions(op, "first", first, 3, "(states, N, H)");
  const Layer l = layer(cell, w_hh, a.shape(1), first.shape(1), lengths);
  if (a.shape(0) != w_hh.shape(0) || first.shape(0) != l.states || first.shape(2) != l.s.hidden) {
    bad_value("recurrent: " + cell + " of " + std::to_string(l.s.hidden) + " units: a has shape " +
              shape_of(a) + ", first " + shape_of(first));
  }
  for (const Maybe* b : {&b_ih, &b_hh}) {
    if (*b && (**b).size() != a.shape(0)) {
      bad_value("recurrent: a bias has " + std::to_string(a.shape(0)) + " elements, got shape " +
                shape_of(**b));
    }
  }
  return with_type(op, "a", a, "w_hh", w_hh, [&](auto zero) -> py::tuple {
    using T = decltype(zero);
    const auto sums = contiguous<T>(a), weights = contiguous<T>(w_hh), start = contiguous<T>(first);
    const auto bias = maybe_plain<T>(op, "b_ih", b_ih), bias_h = maybe_plain<T>(op, "b_hh", b_hh);
    py::array_t<T> states({l.states, l.s.steps, l.s.batch, l.s.hidden});
    py::array_t<T> kept({keep ? l.kept * l.s.hidden : 0, a.shape(1)});
    T *out = states.mutable_data(), *to_keep = keep ? kept.mutable_data() : nullptr;
    {
      py::gil_scoped_release release;
      recurrent_of<T>().forward(l.s, sums.data(), weights.data(), pointer<T>(bias),
                                pointer<T>(bias_h), start.data(), out, to_keep);
    }
    return py::make_tuple(states, kept);
  });
}

py::tuple recurrent_gradient(const std::string& cell, const py::array& g, const py::array& kept,
                             const py::array& w_hh, const Maybe& lengths) {
  const char* op = "recurrent_gradient";
  expect_dimensions(op, "g", g, 4, "(states, T, N, H)");
  const Layer l = layer(cell, w_hh, g.shape(1) * g.shape(2), g.shape(2), lengths);
  const Index columns = l.s.steps * l.s.batch;
  expect_dimensions(op, "kept", kept, 2, "(kept * H, T * N)");
  if (g.shape(0) != l.states || g.shape(3) != l.s.hidden || kept.shape(0) != l.kept * l.s.hidden ||
      kept.shape(1) != columns) {
    bad_value(std::string(op) + ": " + cell + " of " + std::to_string(l.s.hidden) +
              " units: g has shape " + shape_of(g) + ", kept " + shape_of(kept));
  }
  return with_type(op, "g", g, "kept", kept, [&](auto zero) -> py::tuple {
    using T = decltype(zero);
    const auto from = contiguous<T>(g), keep = contiguous<T>(kept), weights = contiguous<T>(w_hh);
    py::array_t<T> da({w_hh.shape(0), columns}), d_first({l.states, l.s.batch, l.s.hidden});
    py::array_t<T> db = da;
    if (l.s.cell == RecurrentCell::gru) db = py::array_t<T>({w_hh.shape(0), columns});
    T *to_x = da.mutable_data(), *to_h = db.mutable_data(), *to_first = d_first.mutable_data();
    {
      py::gil_scoped_release release;
      recurrent_of<T>().backward(l.s, keep.data(), weights.data(), from.data(), to_x, to_h,
                                 to_first);
    }
    return py::make_tuple(da, db, d_first);
  });
}

Places places(const char* op, const py::array& u, const py::array& v, const py::array& w) {
  expect_dimensions(op, "u", u, 3, "(N, L, A)");
  const Places s{u.shape(0), u.shape(1), u.shape(2)};
  if (v.ndim() != 2 || v.shape(0) != s.n || v.shape(1) != s.size || w.size() != s.size) {
    bad_value(std::string(op) + ": u (N, L, A) needs v (N, A) and w (1, A), got " + shape_of(u) +
              ", " + shape_of(v) + " and " + shape_of(w));
  }
  if (!w.dtype().equal(u.dtype())) {
    throw py::type_error(std::string(op) + ": w must be " + text(u.dtype()) + " as u is, got " +
                         text(w.dtype()));
  }
  return s;
}

py::array additive_scores(const py::array& u, const py::array& v, const py::array& w) {
  const Places s = places("additive_scores", u, v, w);
  return with_type("additive_scores", "u", u, "v", v, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto from = contiguous<T>(u), beside = contiguous<T>(v), weight = contiguous<T>(w);
    py::array_t<T> e({s.n, s.places});
    T* out = e.mutable_data();
    {
      py::gil_scoped_release release;
      attention_of<T>().scores(s, from.data(), beside.data(), weight.data(), out);
    }
    return e;
  });
}

py::tuple additive_scores_gradient(const py::array& g, const py::array& u, const py::array& v,
                                   const py::array& w) {
  const Places s = places("additive_scores_gradient", u, v, w);
  if (g.ndim() != 2 || g.shape(0) != s.n || g.shape(1) != s.places) {
    bad_value("additive_scores_gradient: g must be (N, L) of u " + shape_of(u) + ", got " +
              shape_of(g));
  }
  return with_type("additive_scores_gradient", "g", g, "u", u, [&](auto zero) -> py::tuple {
    using T = decltype(zero);
    const auto ge = contiguous<T>(g), from = contiguous<T>(u), beside = contiguous<T>(v),
               weight = contiguous<T>(w);
    py::array_t<T> gu({s.n, s.places, s.size}), gv({s.n, s.size}), gw({s.n, s.size});
    T *to_u = gu.mutable_data(), *to_v = gv.mutable_data(), *to_w = gw.mutable_data();
    {
      py::gil_scoped_release release;
      attention_of<T>().scores_gradient(s, ge.data(), from.data(), beside.data(), weight.data(),
                                        to_u, to_v, to_w);
    }
    return py::make_tuple(gu, gv, gw);
  });
}

}  // namespace

void bind_recurrent(py::module_& m) {
  const auto a = py::arg("a").noconvert(), w_hh = py::arg("w_hh").noconvert();
  const auto first = py::arg("first").noconvert(), cell = py::arg("cell");
  const auto b_ih = py::arg("b_ih").noconvert().none(true);
  const auto b_hh = py::arg("b_hh").noconvert().none(true);
  const auto lengths = py::arg("lengths").none(true);
  m.def("recurrent", &recurrent, cell, a, w_hh, b_ih, b_hh, first, lengths, py::arg("keep"),
        "A layer ('lstm', 'gru', 'tanh', 'relu') over time: a = w_ih x (gates * H, T * N), first "
        "(states, N, H) -> states (states, T, N, H), and what recurrent_gradient needs, with "
        "`keep`, else an empty array.");
  m.def("recurrent_gradient", &recurrent_gradient, cell, py::arg("g").noconvert(),
        py::arg("kept").noconvert(), w_hh, lengths,
        "The gradients of a, of b = w_hh h (an h before each step), and of first.");
  const auto u = py::arg("u").noconvert(), v = py::arg("v").noconvert();
  const auto w = py::arg("w").noconvert();
  m.def("additive_scores", &additive_scores, u, v, w,
        "tanh(u + v) w: (N, L, A), (N, A), (1, A) -> (N, L).");
  m.def("additive_scores_gradient", &additive_scores_gradient, py::arg("g").noconvert(), u, v, w,
        "The gradients of u and v, and of w (N, A): the share of each n.");
}

}  // namespace minidl
