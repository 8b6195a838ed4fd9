// The Python face of recurrent layers.
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

// The layer's sizes, checked: a (gates * H, T * N), w_hh (gates * H, H), first (states, N, H).
struct Layer {
  Recurrent s;
  Index gates, states;
  std::optional<Plain<Index>> lengths;
};

Layer layer(const std::string& cell, const py::array& a, const py::array& w_hh, const Maybe& b_ih,
            const Maybe& b_hh, const py::array& first, const Maybe& lengths) {
  const char* op = "recurrent";
  Layer l{};
  if (cell == "lstm") {
    std::tie(l.s.cell, l.gates, l.states) = std::tuple(RecurrentCell::lstm, 4, 2);
  } else if (cell == "gru") {
    std::tie(l.s.cell, l.gates, l.states) = std::tuple(RecurrentCell::gru, 3, 1);
  } else if (cell == "relu" || cell == "tanh") {
    l.s.cell = cell == "relu" ? RecurrentCell::rnn_relu : RecurrentCell::rnn_tanh;
    l.gates = l.states = 1;
  } else {
    bad_value("recurrent: cell is 'lstm', 'gru', 'tanh' or 'relu', got '" + cell + "'");
  }
  expect_dimensions(op, "a", a, 2, "(gates * H, T * N)");
  expect_dimensions(op, "w_hh", w_hh, 2, "(gates * H, H)");
  expect_dimensions(op, "first", first, 3, "(states, N, H)");
  std::tie(l.s.batch, l.s.hidden) = std::tuple(first.shape(1), first.shape(2));
  const Index rows = l.gates * l.s.hidden;
  if (l.s.batch < 1 || l.s.hidden < 1 || a.shape(1) < 1 || a.shape(1) % l.s.batch) {
    bad_value("recurrent: at least one step, sequence and unit: a has shape " + shape_of(a) +
              ", first " + shape_of(first));
  }
  l.s.steps = a.shape(1) / l.s.batch;
  if (first.shape(0) != l.states || a.shape(0) != rows || w_hh.shape(0) != rows ||
      w_hh.shape(1) != l.s.hidden) {
    bad_value("recurrent: " + cell + " of " + std::to_string(l.s.hidden) + " units: a has shape " +
              shape_of(a) + ", w_hh " + shape_of(w_hh) + ", first " + shape_of(first));
  }
  for (const Maybe* b : {&b_ih, &b_hh}) {
    if (*b && (**b).size() != rows) {
      bad_value("recurrent: a bias has " + std::to_string(rows) + " elements, got shape " +
                shape_of(**b));
    }
  }
  if (lengths) {
    l.lengths = contiguous<Index>(*lengths);
    if (l.lengths->size() != l.s.batch) {
      bad_value("recurrent: " + std::to_string(l.s.batch) + " lengths, got shape " +
                shape_of(*lengths));
    }
  }
  l.s.lengths = pointer<Index>(l.lengths);
  return l;
}

py::array recurrent(const std::string& cell, const py::array& a, const py::array& w_hh,
                    const Maybe& b_ih, const Maybe& b_hh, const py::array& first,
                    const Maybe& lengths) {
  const Layer l = layer(cell, a, w_hh, b_ih, b_hh, first, lengths);
  return with_type("recurrent", "a", a, "w_hh", w_hh, [&](auto zero) -> py::array {
    using T = decltype(zero);
    const auto sums = contiguous<T>(a), weights = contiguous<T>(w_hh), start = contiguous<T>(first);
    const auto bias = maybe_plain<T>("recurrent", "b_ih", b_ih);
    const auto bias_h = maybe_plain<T>("recurrent", "b_hh", b_hh);
    py::array_t<T> states({l.states, l.s.steps, l.s.batch, l.s.hidden});
    T* out = states.mutable_data();
    py::gil_scoped_release release;
    recurrent_of<T>().forward(l.s, sums.data(), weights.data(), pointer<T>(bias),
                              pointer<T>(bias_h), start.data(), out);
    return states;
  });
}

py::tuple recurrent_gradient(const std::string& cell, const py::array& g, const py::array& states,
                             const py::array& a, const py::array& b, const py::array& w_hh,
                             const Maybe& b_ih, const Maybe& b_hh, const py::array& first,
                             const Maybe& lengths) {
  const char* op = "recurrent_gradient";
  const Layer l = layer(cell, a, w_hh, b_ih, b_hh, first, lengths);
  const Index all = l.states * l.s.steps * l.s.batch * l.s.hidden;
  if (g.size() != all || states.size() != all || !b.attr("shape").equal(a.attr("shape"))) {
    bad_value(std::string(op) + ": g and states have " + std::to_string(all) +
              " elements, b the shape of a; got " + shape_of(g) + ", " + shape_of(states) + ", " +
              shape_of(b) + " and " + shape_of(a));
  }
  return with_type(op, "a", a, "g", g, [&](auto zero) -> py::tuple {
    using T = decltype(zero);
    const auto from = contiguous<T>(g), out = contiguous<T>(states), from_x = contiguous<T>(a);
    const auto from_h = contiguous<T>(b), weights = contiguous<T>(w_hh);
    const auto start = contiguous<T>(first);
    const auto bias = maybe_plain<T>(op, "b_ih", b_ih), bias_h = maybe_plain<T>(op, "b_hh", b_hh);
    py::array_t<T> da({a.shape(0), a.shape(1)}), d_first({l.states, l.s.batch, l.s.hidden});
    py::array_t<T> db = da;
    if (l.s.cell == RecurrentCell::gru) db = py::array_t<T>({a.shape(0), a.shape(1)});
    T *to_x = da.mutable_data(), *to_h = db.mutable_data(), *to_first = d_first.mutable_data();
    {
      py::gil_scoped_release release;
      recurrent_of<T>().backward(l.s, from_x.data(), from_h.data(), weights.data(),
                                 pointer<T>(bias), pointer<T>(bias_h), start.data(), out.data(),
                                 from.data(), to_x, to_h, to_first);
    }
    return py::make_tuple(da, db, d_first);
  });
}

}  // namespace

void bind_recurrent(py::module_& m) {
  const auto a = py::arg("a").noconvert(), w_hh = py::arg("w_hh").noconvert();
  const auto first = py::arg("first").noconvert(), cell = py::arg("cell");
  const auto b_ih = py::arg("b_ih").noconvert().none(true);
  const auto b_hh = py::arg("b_hh").noconvert().none(true);
  const auto lengths = py::arg("lengths").none(true);
  m.def("recurrent", &recurrent, cell, a, w_hh, b_ih, b_hh, first, lengths,
        "A layer ('lstm', 'gru', 'tanh', 'relu') over time: a = w_ih x (gates * H, T * N), first "
        "(states, N, H) -> states (states, T, N, H).");
  m.def("recurrent_gradient", &recurrent_gradient, cell, py::arg("g").noconvert(),
        py::arg("states").noconvert(), a, py::arg("b").noconvert(), w_hh, b_ih, b_hh, first,
        lengths,
        "The gradients of a, of b = w_hh h (an h before each step), and of first; for 'tanh' and "
        "'relu' the numbers in a and b are no matter.");
}

}  // namespace minidl
