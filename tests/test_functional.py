"""The functional face: arguments, running statistics, masks, and what the registry cannot know."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

import minidl
import minidl.nn.functional as F
from minidl.backend.native import native
from minidl.ops.rnn import kept
from minidl.tensor import Tensor

rng = np.random.default_rng(0)


def t(*shape: int, requires_grad: bool = False) -> Tensor:
    """Random float64 numbers."""
    return Tensor(rng.normal(size=shape), requires_grad=requires_grad)


def close(actual: Any, expected: Any, bound: float = 1e-10) -> None:
    np.testing.assert_allclose(np.asarray(actual), np.asarray(expected), rtol=bound, atol=bound)


# Convolution ------------------------------------------------------------------------------

GEOMETRIES = [
    {},
    {"stride": 2, "padding": 1},
    {"stride": (1, 3), "padding": (2, 0), "dilation": (1, 2)},
    {"groups": 2, "padding": 1},
    {"groups": 4},
]


@pytest.mark.parametrize("how", GEOMETRIES)
def test_the_conv_ladder_agrees(how: dict[str, Any]) -> None:
    """Output and gradients of every implementation, in float64."""
    x, w, b = t(2, 4, 7, 8), t(4, 4 // how.get("groups", 1), 3, 2), t(4)
    found = {}
    for rung in ("loops", "im2col", "native", "formula"):
        ops = ("conv2d", "conv2d_input", "conv2d_weight")
        if rung == "native" and minidl.ops.conv.why_missing:
            continue
        switches = [minidl.use(name, rung) for name in ops]
        try:
            leaves = [Tensor(a.array, requires_grad=True) for a in (x, w, b)]
            y = F.conv2d(*leaves, **how)
            found[rung] = [y, *minidl.grad((y * y).sum(), leaves)]
        finally:
            for switch in reversed(switches):
                switch.__exit__(None, None, None)
    for rung, arrays in found.items():
        for a, b_ in zip(arrays, found["loops"], strict=True):
            np.testing.assert_allclose(a.numpy(), b_.numpy(), rtol=1e-11, atol=1e-11, err_msg=rung)


def test_im2col_is_the_formula() -> None:
    for op in (minidl.ops.conv.conv2d, minidl.ops.conv.conv2d_input, minidl.ops.conv.conv2d_weight):
        (kernel,) = [k for k in op.op.kernels if k.name == "im2col"]
        assert kernel.function is op.op.formula


@pytest.mark.parametrize(
    ("stride", "padding", "output_padding", "dilation", "groups"),
    [(1, 0, 0, 1, 1), (2, 1, 1, 1, 1), ((3, 2), (1, 0), (2, 0), (1, 2), 2)],
)
def test_transposed_conv_is_the_adjoint(
    stride: Any, padding: Any, output_padding: Any, dilation: Any, groups: int
) -> None:
    """<conv(x), y> = <x, conv_transpose(y)>, for all x and y."""
    y, w = t(2, 4, 3, 4), t(4, 3 // 1, 3, 2)
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    back = F.conv_transpose2d(y, w, output_padding=output_padding, **how)
    x = t(*back.shape)
    forth = F.conv2d(x, w, **how)
    assert forth.shape == y.shape
    close((forth * y).sum().item(), (x * back).sum().item())


def test_same_padding_keeps_the_size_and_centres() -> None:
    x = t(1, 1, 5, 6)
    for size, dilation in itertools.product((1, 2, 3, 4), (1, 2)):
        kernel = np.zeros((1, 1, size, size))
        centre = (size - 1) // 2 if dilation == 1 else None
        y = F.conv2d(x, t(1, 1, size, size), padding="same", dilation=dilation)
        assert y.shape == x.shape
        if centre is not None:  # a kernel of one 1 at its centre does nothing
            kernel[0, 0, centre, centre] = 1
            close(F.conv2d(x, Tensor(kernel), padding="same"), x)


def test_conv1d_and_unbatched() -> None:
    x, w = t(2, 3, 9), t(4, 3, 3)
    y = F.conv1d(x, w, stride=2, padding=1)
    assert y.shape == (2, 4, 5)
    close(F.conv1d(x[0], w, stride=2, padding=1), y[0])
    image, kernel = t(2, 3, 5, 5), t(4, 3, 3, 3)
    close(F.conv2d(image[1], kernel), F.conv2d(image, kernel)[1])
    close(F.max_pool2d(image[1], 2), F.max_pool2d(image, 2)[1])


# Pooling ----------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["formula", "native"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_max_pool_ties_go_to_the_first(implementation: str, dtype: str) -> None:
    if implementation == "native" and minidl.ops.pool.why_missing:
        pytest.skip(minidl.ops.pool.why_missing)
    x = Tensor(np.zeros((1, 1, 4, 6), dtype), requires_grad=True)
    with (
        minidl.use("max_pool2d", implementation),
        minidl.use("max_pool2d_index", implementation),
        minidl.use("max_pool2d_input", implementation),
    ):
        F.max_pool2d(x, 2).sum().backward()
    expected = np.zeros((4, 6))
    expected[::2, ::2] = 1
    assert np.array_equal(x.grad.numpy()[0, 0], expected)


@pytest.mark.parametrize("implementation", ["formula", "native"])
def test_max_pool_keeps_nan_and_infinities(implementation: str) -> None:
    if implementation == "native" and minidl.ops.pool.why_missing:
        pytest.skip(minidl.ops.pool.why_missing)
    x = np.full((1, 1, 4, 4), -np.inf)
    x[0, 0, 1, 1], x[0, 0, 3, 0] = np.nan, 2.0
    leaf = Tensor(x, requires_grad=True)
    with minidl.use("max_pool2d", implementation), minidl.use("max_pool2d_index", implementation):
        y = F.max_pool2d(leaf, 2)
        y.sum().backward()
    assert np.array_equal(y.numpy()[0, 0], [[np.nan, -np.inf], [2, -np.inf]], equal_nan=True)
    expected = [[0, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0]]
    assert np.array_equal(leaf.grad.numpy()[0, 0], expected)


def test_max_pool_indices() -> None:
    x = t(2, 3, 6, 7)
    y, index = F.max_pool2d(x, 3, stride=2, padding=1, return_indices=True)
    assert index.dtype == np.int64
    close(x.numpy().reshape(2, 3, -1)[np.arange(2)[:, None, None], np.arange(3)[:, None],
          index.numpy().reshape(2, 3, -1)].reshape(y.shape), y)  # fmt: skip
    z, index = F.adaptive_max_pool2d(x, (2, 3), return_indices=True)
    assert z.shape == index.shape == (2, 3, 2, 3)


def test_adaptive_pools_of_the_whole_image() -> None:
    x = t(2, 3, 5, 7)
    close(F.adaptive_avg_pool2d(x, 1), x.numpy().mean((2, 3), keepdims=True))
    close(F.adaptive_max_pool2d(x, 1), x.numpy().max((2, 3), keepdims=True))
    close(F.adaptive_avg_pool2d(x, (None, 7)), x)


# Normalisation ----------------------------------------------------------------------------


def test_batch_norm_running_statistics() -> None:
    """running ← (1 - m) running + m batch; the variance is the unbiased one."""
    x = t(8, 3, 4, 4)
    mean, var = Tensor(np.ones(3)), Tensor(np.full(3, 2.0))
    F.batch_norm(x, mean, var, training=True, momentum=0.25)
    flat = x.numpy().transpose(1, 0, 2, 3).reshape(3, -1)
    close(mean, 0.75 + 0.25 * flat.mean(1))
    close(var, 1.5 + 0.25 * flat.var(1, ddof=1))
    before = mean.numpy().copy(), var.numpy().copy()
    y = F.batch_norm(x, mean, var, training=False)
    assert np.array_equal(mean, before[0]) and np.array_equal(var, before[1])
    along = (3, 1, 1)
    close(y, (x.numpy() - before[0].reshape(along)) / np.sqrt(before[1].reshape(along) + 1e-5))


def test_batch_norm_on_the_tape_leaves_buffers_off_it() -> None:
    x, mean, var = t(4, 2, requires_grad=True), Tensor(np.zeros(2)), Tensor(np.ones(2))
    y = F.batch_norm(x, mean, var, training=True)
    F.batch_norm(x, mean, var, training=True)  # the statistics move on before backward
    y.sum().backward()
    assert mean.is_leaf and not mean.requires_grad
    close(x.grad, np.zeros((4, 2)))  # the sum of standardised numbers does not move


def test_batch_norm_second_order_at_scale() -> None:
    """Where a saved statistic would show: DeZero's batch norm is wrong here."""
    x = Tensor(rng.normal(size=(5, 2)) * 7.4, requires_grad=True)
    f = lambda x: (F.batch_norm(x, None, None, training=True) ** 3).sum()  # noqa: E731
    assert minidl.gradcheck(f, [x], order=2)


def test_group_norm_contains_layer_and_instance_norm() -> None:
    x, w, b = t(2, 6, 3, 4), t(6), t(6)
    close(F.group_norm(x, 6, w, b), F.instance_norm(x, weight=w, bias=b))
    close(F.group_norm(x, 1), F.layer_norm(x, (6, 3, 4)))


def test_instance_norm_running_statistics() -> None:
    x, mean, var = t(4, 3, 5), Tensor(np.zeros(3)), Tensor(np.ones(3))
    F.instance_norm(x, mean, var, momentum=0.5)
    close(mean, 0.5 * x.numpy().mean((0, 2)))
    close(var, 0.5 + 0.5 * x.numpy().var(2, ddof=1).mean(0))


# Dropout ----------------------------------------------------------------------------------


def test_dropout_keeps_the_mean_and_drops_a_share() -> None:
    n, p = 200_000, 0.3
    y = F.dropout(minidl.ones(n), p).numpy()
    kept = y != 0
    assert set(np.unique(y)) == {np.float32(0), np.float32(1 / (1 - p))}
    sigma = np.sqrt(p * (1 - p) / n)
    assert abs(kept.mean() - (1 - p)) < 5 * sigma
    assert abs(np.corrcoef(kept[1:], kept[:-1])[0, 1]) < 5 / np.sqrt(n)


def test_dropout_is_a_matter_of_the_seed() -> None:
    x = minidl.ones(1000)
    minidl.manual_seed(7)
    first, second = F.dropout(x), F.dropout(x)
    minidl.manual_seed(7)
    assert np.array_equal(F.dropout(x), first) and np.array_equal(F.dropout(x), second)
    assert not np.array_equal(first, second)
    wide = Tensor(np.ones(1000))
    minidl.manual_seed(7)
    assert np.array_equal(F.dropout(wide), first)  # the same numbers in float64


def test_dropout_gradient_has_the_same_mask() -> None:
    x = Tensor(np.ones((30, 20)), requires_grad=True)
    y = F.dropout(x, 0.4)
    y.sum().backward()
    assert np.array_equal(x.grad, y)


@pytest.mark.parametrize("rung", ["loops", "im2col", None])
def test_masks_do_not_depend_on_kernels(rung: str | None) -> None:
    """The same bits, whichever convolution ran before."""
    minidl.manual_seed(3)
    expected = F.dropout(minidl.ones(64)).numpy()
    minidl.manual_seed(3)
    with minidl.use("conv2d", rung):
        F.conv2d(t(1, 1, 4, 4), t(1, 1, 3, 3))
        assert np.array_equal(F.dropout(minidl.ones(64)), expected)


def test_dropout_at_its_ends_and_off() -> None:
    x = Tensor(np.array([1.0, np.inf, np.nan]), requires_grad=True)
    assert F.dropout(x, 0.0) is x and F.dropout(x, 0.5, training=False) is x
    assert np.array_equal(F.dropout(x, 1.0), np.zeros(3))
    for p in (-0.1, 1.5):
        with pytest.raises(ValueError, match=r"in \[0, 1\]"):
            F.dropout(x, p)


@pytest.mark.parametrize("batch_first", [False, True])
def test_locked_dropout_drops_a_feature_at_all_steps(batch_first: bool) -> None:
    y = F.locked_dropout(minidl.ones(20, 30, 40), 0.25, batch_first=batch_first).numpy()
    steps = 1 if batch_first else 0
    assert (y == y.take([0], axis=steps)).all()
    assert set(np.unique(y)) == {0, np.float32(1 / 0.75)}
    assert abs((y == 0).mean() - 0.25) < 0.06
    with pytest.raises(ValueError, match=r"\(N, T, f" if batch_first else r"\(T, N, f"):
        F.locked_dropout(minidl.ones(3, 4), batch_first=batch_first)


def test_dropout2d_drops_whole_channels() -> None:
    y = F.dropout2d(minidl.ones(40, 50, 3, 2), 0.25).numpy().reshape(2000, 6)
    assert np.all((y == 0).all(1) | (y == np.float32(1 / 0.75)).all(1))
    assert abs((y[:, 0] == 0).mean() - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 2000)


# Embedding --------------------------------------------------------------------------------


def test_padding_row_gets_no_gradient_but_counts() -> None:
    weight, indices = t(4, 3, requires_grad=True), Tensor(np.array([[0, 2], [2, 1]]))
    y = F.embedding(indices, weight, padding_idx=2)
    close(y, weight.numpy()[indices.numpy()])
    y.sum().backward()
    close(weight.grad, [[1] * 3, [1] * 3, [0] * 3, [0] * 3])


def test_repeated_indices_add_up_to_the_same_bits() -> None:
    indices = Tensor(rng.integers(0, 5, size=5000))
    gradients = []
    for _ in range(3):
        weight = minidl.zeros(5, 8, requires_grad=True)
        y = F.embedding(indices, weight)
        (g,) = minidl.grad(y, [weight], Tensor(np.random.default_rng(1).normal(size=y.shape)
                                               .astype("float32")))  # fmt: skip
        gradients.append(g.numpy())
    assert np.array_equal(gradients[0], gradients[1])
    assert np.array_equal(gradients[0], gradients[2])


@pytest.mark.parametrize("wrong", [-1, 4])
def test_an_index_out_of_range_is_named(wrong: int) -> None:
    with pytest.raises(IndexError, match=rf"index {wrong} at \[1, 0\] is outside \[0, 4\)"):
        F.embedding(Tensor(np.array([[0, 3], [wrong, 1]])), t(4, 3))
    with pytest.raises(TypeError, match="integer"):
        F.embedding(t(2), t(4, 3))


def test_one_hot() -> None:
    labels = Tensor(np.array([[0, 2], [1, 2]]))
    assert np.array_equal(F.one_hot(labels), np.eye(3, dtype=np.int64)[labels.numpy()])
    assert F.one_hot(labels, 5).shape == (2, 2, 5)
    assert F.one_hot(Tensor(np.zeros((0, 2), np.int64)), 3).shape == (0, 2, 3)
    for tensor, classes in (
        (labels, 2),
        (Tensor(np.array([-1])), -1),
        (Tensor(np.zeros(0, int)), -1),
    ):
        with pytest.raises(ValueError, match="one_hot"):
            F.one_hot(tensor, classes)


# Sequences --------------------------------------------------------------------------------

LENGTHS = [5, 2, 0, 3]


def recurrent(kind: str) -> tuple[Any, list[Tensor]]:
    """F.<kind>, and arguments for 5 steps of 4 sequences with 3 features, H = 2."""
    gates = {"rnn": 1, "lstm": 4, "gru": 3}[kind]
    states = [t(4, 2) for _ in range(2 if kind == "lstm" else 1)]
    weights = [t(gates * 2, 3), t(gates * 2, 2), t(gates * 2), t(gates * 2)]
    return getattr(F, kind), [t(5, 4, 3), *states, *weights]


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_lengths_equal_each_sequence_alone(kind: str) -> None:
    f, (x, *rest) = recurrent(kind)
    states = rest[:-4]
    out, *last = f(x, *rest, lengths=LENGTHS)
    for n, length in enumerate(LENGTHS):
        close(out.numpy()[length:, n], np.zeros((5 - length, 2)))
        if length == 0:
            for state, start in zip(last, states, strict=True):
                close(state[n], start[n])
            continue
        alone = f(x[:length, n : n + 1], *(s[n : n + 1] for s in states), *rest[-4:])
        close(out[:length, n], alone[0][:, 0])
        for state, expected in zip(last, alone[1:], strict=True):
            close(state[n], expected[0])


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_what_is_in_the_padding_does_not_matter(kind: str) -> None:
    """Not even NaN: not for the output, not for any gradient."""
    f, arguments = recurrent(kind)
    found = []
    for garbage in (0.0, 1e9, np.nan):
        leaves = [Tensor(a.array.copy(), requires_grad=True) for a in arguments]
        for n, length in enumerate(LENGTHS):
            leaves[0].array[length:, n] = garbage
        results = f(*leaves, lengths=LENGTHS)
        loss = sum(((r * r).sum() for r in results), Tensor(np.zeros(())))
        found.append([*results, *minidl.grad(loss, leaves)])
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert np.array_equal(a, b)
    x_grad = found[0][len(found[0]) - len(arguments)].numpy()
    assert all((x_grad[length:, n] == 0).all() for n, length in enumerate(LENGTHS))


@pytest.mark.parametrize("kind", ["rnn", "lstm", "gru"])
def test_recurrent_second_order_with_lengths(kind: str) -> None:
    f, arguments = recurrent(kind)
    leaves = [Tensor(a.array, requires_grad=True) for a in arguments]
    assert minidl.gradcheck(
        lambda *a: sum(r.sum() for r in f(*a, lengths=LENGTHS)), leaves, order=2
    )


def test_full_lengths_change_no_bit() -> None:
    f, arguments = recurrent("lstm")
    for a, b in zip(f(*arguments), f(*arguments, lengths=[5] * 4), strict=True):
        assert np.array_equal(a, b)


@pytest.mark.parametrize("kind", ["lstm", "gru"])
def test_what_the_kernel_keeps_goes_with_its_output(kind: str) -> None:
    f, arguments = recurrent(kind)
    before = set(kept)  # of other tests' outputs, if they live
    with minidl.no_grad():
        results = f(*arguments)
    assert set(kept) <= before
    results = f(*(Tensor(a.array, requires_grad=True) for a in arguments))
    assert native is None or len(set(kept) - before) == 1
    results[0].sum().backward()
    del results
    assert set(kept) <= before


def test_recurrent_arguments() -> None:
    f, (x, h, w_ih, w_hh, b_ih, b_hh) = recurrent("rnn")
    rest = (w_ih, w_hh, b_ih, b_hh)
    for lengths in ([5, 2, 6, 1], [1, 2, 3], [-1, 1, 1, 1], [1.0, 2.0, 3.0, 4.0]):
        with pytest.raises(ValueError, match="lengths"):
            f(x, h, *rest, lengths=lengths)
    with pytest.raises(ValueError, match="at least one step"):
        f(x[:0], h, *rest)
    with pytest.raises(ValueError, match=r"w_hh has shape \(2, 3\), expected \(2, 2\)"):
        f(x, h, w_ih, w_ih, b_ih, b_hh)
    with pytest.raises(ValueError, match="h0"):
        f(x, h[:2], *rest)
    with pytest.raises(ValueError, match="nonlinearity"):
        f(x, h, *rest, nonlinearity="sin")


# Losses -----------------------------------------------------------------------------------


def test_ignored_samples_count_for_nothing() -> None:
    scores, labels = t(5, 3, requires_grad=True), np.array([0, 2, -100, 1, -100])
    kept = labels != -100
    loss = F.cross_entropy(scores, Tensor(labels), label_smoothing=0.1)
    alone = F.cross_entropy(Tensor(scores.array[kept]), Tensor(labels[kept]), label_smoothing=0.1)
    close(loss, alone)
    loss.backward()
    assert (scores.grad.numpy()[~kept] == 0).all() and (scores.grad.numpy()[kept] != 0).all()


def test_smoothing_is_a_mixture_of_probabilities() -> None:
    scores, labels = t(6, 4), Tensor(rng.integers(0, 4, size=6))
    one_hot = F.one_hot(labels, 4).numpy()
    mixed = Tensor(0.7 * one_hot + 0.3 / 4)
    for reduction in ("mean", "sum", "none"):
        smooth = F.cross_entropy(scores, labels, label_smoothing=0.3, reduction=reduction)
        close(smooth, F.cross_entropy(scores, mixed, reduction=reduction))
        sure = F.cross_entropy(scores, Tensor(one_hot.astype(float)), reduction=reduction)
        close(sure, F.cross_entropy(scores, labels, reduction=reduction))


def test_class_weights() -> None:
    scores, labels, weight = (
        t(6, 3),
        np.array([0, 1, 2, 0, 1, 1]),
        Tensor(np.array([1.0, 2.0, 0.5])),
    )
    each = F.cross_entropy(scores, Tensor(labels), reduction="none").numpy()
    w = weight.numpy()[labels]
    close(F.cross_entropy(scores, Tensor(labels), weight), (each * w).sum() / w.sum())
    logp = F.log_softmax(scores, dim=1)
    close(F.nll_loss(logp, Tensor(labels), weight), (each * w).sum() / w.sum())


@pytest.mark.parametrize("loss", [F.cross_entropy, F.nll_loss])
def test_labels_that_do_not_fit(loss: Any) -> None:
    scores = t(3, 4)
    with pytest.raises(ValueError, match=r"label 4 at \[1\] is outside \[0, 4\)"):
        loss(scores, Tensor(np.array([0, 4, 1])))
    with pytest.raises(ValueError, match="shape"):
        loss(scores, Tensor(np.array([0, 1])))
    with pytest.raises(TypeError, match="integer"):
        loss(scores, Tensor(np.array([0.0, 1.0, 2.0])))
    with pytest.raises(ValueError, match="reduction"):
        loss(scores, Tensor(np.array([0, 1, 2])), reduction="average")


def test_binary_cross_entropy_of_sure_answers() -> None:
    p = Tensor(np.array([0.0, 0.0, 1.0, 1.0]), requires_grad=True)
    y = Tensor(np.array([0.0, 1.0, 0.0, 1.0]))
    losses = F.binary_cross_entropy(p, y, reduction="none")
    close(losses, [0, 100, 100, 0])
    losses.sum().backward()
    assert np.isfinite(p.grad.numpy()).all()
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        F.binary_cross_entropy(Tensor(np.array([1.5])), Tensor(np.array([1.0])))
    x = t(7)
    q = Tensor(rng.random(7))
    close(F.binary_cross_entropy(x.sigmoid(), q), F.binary_cross_entropy_with_logits(x, q))


def test_large_scores_do_not_overflow() -> None:
    x = Tensor(np.array([[1e4, -1e4]], "float32"), requires_grad=True)
    loss = F.cross_entropy(x, Tensor(np.array([1])))
    loss.backward()
    close(loss.item(), 2e4)
    close(x.grad, [[1, -1]])
    z = Tensor(np.array([-1e4, 1e4]), requires_grad=True)
    close(F.binary_cross_entropy_with_logits(z, Tensor(np.array([0.0, 1.0]))), 0)
    assert np.array_equal(F.sigmoid(z), [0, 1]) and np.array_equal(F.softplus(z), [0, 1e4])


def test_kl_divergence() -> None:
    logits, other = t(4, 5), t(4, 5)
    logp, q = F.log_softmax(logits, dim=1), F.softmax(other, dim=1)
    expected = (q.numpy() * (np.log(q.numpy()) - logp.numpy())).sum() / 4
    close(F.kl_div(logp, q, reduction="batchmean"), expected)
    close(F.kl_div(logp, q.log(), reduction="batchmean", log_target=True), expected)
    close(F.kl_div(logp, logp, reduction="sum", log_target=True), 0)
    sure = F.one_hot(Tensor(np.array([0, 1, 2, 3])), 5).double()  # 0 log 0 = 0
    close(
        F.kl_div(logp, sure, reduction="sum"),
        F.nll_loss(logp, Tensor(np.arange(4)), reduction="sum"),
    )


# Vectors and images -----------------------------------------------------------------------


def test_normalize_and_cosine_similarity() -> None:
    x, y = t(4, 5), t(4, 5)
    close((F.normalize(x) ** 2).sum(1), np.ones(4))
    close(F.cosine_similarity(x, x * 3), np.ones(4))
    close(F.cosine_similarity(x, y), (F.normalize(x) * F.normalize(y)).sum(1))
    zero = Tensor(np.zeros((1, 3)), requires_grad=True)
    F.normalize(zero).sum().backward()
    assert np.isfinite(zero.grad.numpy()).all()


@pytest.mark.parametrize(
    ("mode", "numpy_mode"),
    [("constant", "constant"), ("reflect", "reflect"), ("replicate", "edge"), ("circular", "wrap")],
)
def test_pad_counts_from_the_last_dimension(mode: str, numpy_mode: Any) -> None:
    x = t(1, 2, 4, 5)
    expected = np.pad(x.numpy(), ((0, 0), (0, 0), (3, 0), (1, 2)), numpy_mode)
    close(F.pad(x, (1, 2, 3, 0), mode), expected)


def test_pad_refuses() -> None:
    x = t(1, 2, 4, 5)
    with pytest.raises(ValueError, match="at most 4"):
        F.pad(x, (5, 0), "reflect")
    with pytest.raises(ValueError, match="mode"):
        F.pad(x, (1, 1), "mirror")
    with pytest.raises(ValueError, match="two each"):
        F.pad(x, (1, 1, 1), "reflect")
    with pytest.raises(ValueError, match="value"):
        F.pad(x, (1, 1), "reflect", value=1.0)


def test_interpolate() -> None:
    x = t(2, 3, 4, 5)
    close(F.interpolate(x, scale_factor=2), x.numpy().repeat(2, 2).repeat(2, 3))
    close(F.interpolate(x, size=(4, 5), mode="bilinear"), x)
    ramp = Tensor(np.linspace(0, 1, 5).reshape(1, 1, 1, 5).repeat(2, 2))
    wide = F.interpolate(ramp, size=(2, 9), mode="bilinear", align_corners=True)
    close(wide.numpy()[0, 0, 0], np.linspace(0, 1, 9))
    for wrong in ({}, {"size": 3, "scale_factor": 2}, {"size": 3, "mode": "bicubic"}):
        with pytest.raises(ValueError, match="interpolate"):
            F.interpolate(x, **wrong)


# Clear errors -----------------------------------------------------------------------------

image, kernel = t(2, 3, 5, 5), t(4, 3, 3, 3)

REFUSED = {
    "channels": (lambda: F.conv2d(image, t(4, 2, 3, 3)), ValueError, "input has 3 channels"),
    "groups": (lambda: F.conv2d(image, t(4, 1, 3, 3), groups=3), ValueError, "multiples of groups"),
    "kernel": (lambda: F.conv2d(image, t(4, 3, 7, 7)), ValueError, "does not fit|reaches over"),
    "conv dims": (lambda: F.conv2d(t(5, 5), kernel), ValueError, r"\(N, C, H, W\)"),
    "weight dims": (lambda: F.conv2d(image, t(4, 3)), ValueError, "weight is"),
    "bias": (lambda: F.conv2d(image, kernel, t(3)), ValueError, r"bias .* expected \(4,\)"),
    "stride": (lambda: F.conv2d(image, kernel, stride=0), ValueError, "at least 1"),
    "padding": (lambda: F.conv2d(image, kernel, padding="full"), ValueError, "'same' or 'valid'"),
    "same": (lambda: F.conv2d(image, kernel, stride=2, padding="same"), ValueError, "stride 1"),
    "dtype": (lambda: F.conv2d(image, kernel.float()), TypeError, r"input.to\(weight.dtype\)"),
    "linear": (lambda: F.linear(t(2, 3), t(4, 5)), ValueError, "do not fit"),
    "linear dtype": (lambda: F.linear(t(2, 3).float(), t(4, 3)), TypeError, "float64"),
    "output_padding": (
        lambda: F.conv_transpose2d(image, t(3, 4, 3, 3), output_padding=1),
        ValueError,
        "below the stride",
    ),
    "transposed": (lambda: F.conv_transpose2d(image, t(4, 3, 3, 3)), ValueError, "weight"),
    "pool": (lambda: F.max_pool2d(image, 6), ValueError, "does not fit|reaches over"),
    "pool padding": (lambda: F.max_pool2d(image, 2, padding=2), ValueError, "half"),
    "pool dims": (lambda: F.avg_pool2d(t(5, 5), 2), ValueError, "shape"),
    "no pixels": (lambda: F.avg_pool2d(t(2, 3, 0, 5), 2, ceil_mode=True), ValueError, "no pixels"),
    "divisor": (lambda: F.avg_pool2d(image, 2, divisor_override=0), ValueError, "divisor"),
    "adaptive": (lambda: F.adaptive_avg_pool2d(image, 0), ValueError, "output_size"),
    "softmax": (lambda: F.softmax(t(2, 3)), TypeError, "dim"),
    "one value": (
        lambda: F.batch_norm(t(1, 3), None, None, training=True),
        ValueError,
        "larger batch",
    ),
    "no statistics": (lambda: F.batch_norm(t(4, 3), None, None), ValueError, "running_mean"),
    "bn weight": (
        lambda: F.batch_norm(t(4, 3), None, None, t(4), training=True),
        ValueError,
        r"weight has shape \(4,\), expected \(3,\)",
    ),
    "layer norm": (lambda: F.layer_norm(t(2, 3), 4), ValueError, "normalized_shape"),
    "group norm": (lambda: F.group_norm(image, 2), ValueError, "divide"),
    "instance": (lambda: F.instance_norm(t(2, 3, 1, 1)), ValueError, "more than one value"),
    "hardtanh": (lambda: F.hardtanh(t(3), 1.0, 1.0), ValueError, "below"),
    "padding_idx": (
        lambda: F.embedding(Tensor(np.array([0])), t(4, 2), padding_idx=4),
        ValueError,
        "4 rows",
    ),
    "mse": (lambda: F.mse_loss(t(3, 1), t(3)), ValueError, "equal"),
}


@pytest.mark.parametrize("name", list(REFUSED))
def test_refused(name: str) -> None:
    call, error, message = REFUSED[name]
    with pytest.raises(error, match=message):
        call()


def test_inplace_changes_nothing() -> None:
    x = t(5)
    before = x.numpy().copy()
    for f in (F.relu, F.leaky_relu, F.elu, F.silu, F.hardtanh, F.relu6, F.dropout):
        f(x, inplace=True)
    assert np.array_equal(x, before)
