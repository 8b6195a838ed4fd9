"""Tensor and the tape: what it promises beyond single ops (those are in test_ops)."""

from __future__ import annotations

import copy
import gc
import threading
import time
import weakref
from typing import Any

import numpy as np
import pytest

import minidl
from minidl import Tensor, autograd, creation
from minidl.autograd import Node
from minidl.op import op, registry


def leaf(*values: Any) -> Tensor:
    return minidl.tensor(list(values), dtype=minidl.float64, requires_grad=True)


def live(kind: type) -> int:
    gc.collect()
    return sum(isinstance(x, kind) for x in gc.get_objects())


# Making one -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "dtype"),
    [
        (1.5, "float32"),
        (2, "int64"),
        (True, "bool"),
        ([1.0, 2], "float32"),
        ([[1, 2], [3, 4]], "int64"),
        ([], "float32"),
        (np.float64(1), "float64"),
        ([np.float64(1)], "float64"),
        (np.zeros(3), "float64"),
        (np.zeros(3, np.float16), "float16"),
        (np.zeros(3, np.int8), "int8"),
    ],
)
def test_dtype_of_data(data: Any, dtype: str) -> None:
    assert minidl.tensor(data).dtype == dtype


def test_tensor_copies_and_from_numpy_shares() -> None:
    array = np.zeros(3)
    copied, shared = minidl.tensor(array), minidl.from_numpy(array)
    array[0] = 1
    assert copied[0].item() == 0
    assert shared[0].item() == 1
    assert minidl.as_tensor(array).array is array


def test_what_is_not_numbers_is_refused() -> None:
    with pytest.raises(TypeError, match="numbers"):
        minidl.tensor(["a"])
    with pytest.raises(TypeError, match=r"minidl\.tensor"):
        Tensor([1.0])  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="from_numpy"):
        minidl.from_numpy([1.0])  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="only floating"):
        minidl.tensor([1, 2], requires_grad=True)


def test_creation() -> None:
    assert minidl.zeros(2, 3).shape == minidl.zeros((2, 3)).shape == (2, 3)
    assert minidl.zeros(()).shape == ()
    for make in (minidl.zeros, minidl.ones, minidl.empty, minidl.rand, minidl.randn):
        assert make(2).dtype == minidl.float32
        assert make(2, dtype=minidl.float64).dtype == minidl.float64
        assert make(2, requires_grad=True).requires_grad
    assert minidl.full((2,), 3).dtype == minidl.int64
    assert minidl.full((2,), 3.0).dtype == minidl.float32
    assert minidl.full((2,), True).dtype == minidl.bool
    assert minidl.arange(3).tolist() == [0, 1, 2]
    assert minidl.arange(3).dtype == minidl.int64
    assert minidl.arange(1, 2, 0.25).tolist() == [1, 1.25, 1.5, 1.75]
    assert minidl.arange(3.0).dtype == minidl.float32
    assert minidl.linspace(0, 1, 5).tolist() == [0, 0.25, 0.5, 0.75, 1]
    assert minidl.eye(2, 3).tolist() == [[1, 0, 0], [0, 1, 0]]
    assert minidl.randint(5, (100,)).numpy().max() < 5
    assert minidl.randint(3, 5, (100,)).numpy().min() >= 3
    assert sorted(minidl.randperm(5).tolist()) == [0, 1, 2, 3, 4]
    x = minidl.zeros(2, 3, dtype=minidl.float64)
    for make in (creation.zeros_like, creation.ones_like, creation.randn_like, creation.rand_like):
        assert make(x).shape == x.shape
        assert make(x).dtype == x.dtype


def test_random_numbers_repeat() -> None:
    minidl.manual_seed(3)
    first = [minidl.rand(5), minidl.randn(5), minidl.zeros(5).normal_()]
    state = minidl.get_rng_state()
    later = minidl.rand(5)
    minidl.set_rng_state(state)
    assert minidl.equal(minidl.rand(5), later)
    minidl.manual_seed(3)
    again = [minidl.rand(5), minidl.randn(5), minidl.zeros(5).normal_()]
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a, b)
    assert minidl.initial_seed() == 3
    minidl.manual_seed(4)
    assert not minidl.equal(minidl.rand(5), first[0])


# What it is -------------------------------------------------------------------------------


def test_numpy_is_a_read_only_view() -> None:
    x = minidl.ones(3, requires_grad=True)
    view = x.numpy()
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 2
    assert np.shares_memory(view, x.array)
    assert np.asarray(x * 2).tolist() == [2, 2, 2]


def test_numpy_defers_to_tensor() -> None:
    x = leaf(1.0, 2.0)
    array = np.array([3.0, 4.0])
    for y in (array * x, array + x, array - x, array / x, array**x, array @ x, np.float64(2) * x):
        assert isinstance(y, Tensor)
        assert y.requires_grad
    assert (array - x).tolist() == [2, 2]
    assert isinstance(array < x, Tensor)


def test_scalars_keep_the_dtype() -> None:
    x = minidl.ones(3, requires_grad=True)
    for y in (x * 2.0, 2.0 * x, x / 3, 1 - x, x**2, np.float64(2) * x, x * np.float64(2), 2**x):
        assert y.dtype == minidl.float32
        (g,) = minidl.grad(y.sum(), x)
        assert g.dtype == minidl.float32


def test_integers_do_not_widen_float32() -> None:
    n = minidl.arange(3)
    assert (n * minidl.ones(3)).dtype == minidl.float32
    assert (n / 2).dtype == minidl.float32
    assert n.exp().dtype == minidl.float32
    assert n.double().dtype == minidl.float64
    assert (n * minidl.ones(3, dtype=minidl.float64)).dtype == minidl.float64


def test_conversions() -> None:
    x = minidl.ones(2, requires_grad=True)
    assert not x.long().requires_grad
    x.double().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == minidl.float32
    assert x.float() is x
    assert x.half().dtype == minidl.float16
    assert (x > 0).int().dtype == minidl.int32


def test_device() -> None:
    x = minidl.zeros(2)
    assert x.device == "cpu"
    assert x.device.type == "cpu"
    assert minidl.device("cuda:1").index == 1
    assert minidl.device("cuda", 1) == "cuda:1"
    assert minidl.device("cuda").index is None
    assert x.to(minidl.device("cpu")) is x
    assert x.to("cpu", dtype=minidl.float64).dtype == minidl.float64
    for name in ("gpu", "cpu:1", "cuda:x"):
        with pytest.raises(ValueError, match="expected 'cpu'"):
            x.to(name)


def test_comparing_is_elementwise_and_hashing_by_identity() -> None:
    x, y = minidl.ones(2), minidl.ones(2)
    assert (x == y).tolist() == [True, True]
    assert len({x, y, x}) == 2
    with pytest.raises(ValueError, match="ambiguous"):
        bool(x == y)
    assert minidl.equal(x, y)


def test_deepcopy_of_a_leaf() -> None:
    x = leaf(1.0, 2.0)
    x.sum().backward()
    y = copy.deepcopy(x)
    assert y.requires_grad
    assert y.tolist() == x.tolist()
    assert not np.shares_memory(y.array, x.array)


def test_iteration_and_indices() -> None:
    x = minidl.arange(6).reshape(2, 3)
    assert [row.tolist() for row in x] == [[0, 1, 2], [3, 4, 5]]
    assert x[minidl.tensor([1, 0]), minidl.tensor([2, 2])].tolist() == [5, 2]
    assert x[x > 2].tolist() == [3, 4, 5]
    assert x[..., None, -1].tolist() == [[2], [5]]
    assert list(range(5))[minidl.tensor(2)] == 2
    with pytest.raises(IndexError):
        x[2]
    with pytest.raises(IndexError):
        x[minidl.tensor([5])]
    with pytest.raises(TypeError, match="0-d"):
        len(minidl.zeros(()))


def test_index_kept_by_the_tape_is_not_the_users() -> None:
    """Changing an index array after it was used changes no gradient."""
    x, index = leaf(1.0, 2.0, 3.0), np.array([0, 0])
    y = x[index].sum()
    index[:] = 2
    y.backward()
    assert x.grad.tolist() == [2, 0, 0]


# In place ---------------------------------------------------------------------------------


def test_writing_to_what_requires_a_gradient_is_refused() -> None:
    x = leaf(1.0, 2.0)
    with pytest.raises(RuntimeError, match="no_grad"):
        x.add_(1)
    with pytest.raises(RuntimeError, match="no_grad"):
        x += 1
    with pytest.raises(RuntimeError, match="where"):
        x[0] = 1
    with minidl.no_grad():
        x += 1
        x[0] = 5
        x.mul_(2)
    assert x.tolist() == [10, 6]
    assert x.is_leaf
    assert x.requires_grad


def test_augmented_assignment_of_a_result_is_recorded() -> None:
    x = leaf(1.0, 2.0)
    y = x * 1
    kept = y
    y += x
    y *= 3
    y.sum().backward()
    assert kept.tolist() == [1, 2]
    assert x.grad.tolist() == [6, 6]
    total = minidl.zeros(())
    total += x.sum()
    assert total.requires_grad


def test_augmented_assignment_of_constants_is_in_place() -> None:
    x = minidl.ones(2)
    array = x.array
    x += 1
    x -= minidl.tensor([0.5, 0.5])
    x *= 4
    x /= 3
    assert x.array is array
    assert x.tolist() == [2, 2]


def test_in_place_methods() -> None:
    x = minidl.zeros(2, 2)
    x.fill_(3).copy_(x + 1).clamp_(max=2).sub_(1, alpha=0.5).div_(3)
    assert x.tolist() == [[0.5] * 2] * 2
    x.masked_fill_(minidl.tensor([True, False]), -1)
    assert x.tolist() == [[-1, 0.5]] * 2
    x.uniform_(2, 3)
    assert 2 <= x.min() <= x.max() < 3
    assert x.zero_().sum().item() == 0
    assert x.dtype == minidl.float32


def test_changing_what_the_tape_needs_is_detected() -> None:
    x, w = leaf(1.0, 2.0), leaf(3.0, 4.0)
    y = (x * w).sum()
    with minidl.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()
    assert x.grad is None

    y = (x + w).sum()  # add needs neither
    with minidl.no_grad():
        w.add_(1)
    y.backward()

    y = x.exp()  # the output
    with minidl.no_grad():
        y.detach()[:1].zero_()  # through a view
    with pytest.raises(RuntimeError, match="changed in place"):
        y.sum().backward()

    y = (x * w).sum()  # a change before the call is none
    y.backward()


def test_a_leaf_with_new_data_is_detected_in_second_order() -> None:
    x = leaf(1.0, 2.0)
    y = (x**3).sum()
    x.data = minidl.tensor([5.0, 5.0], dtype=minidl.float64)
    with pytest.raises(RuntimeError, match="another array"):
        minidl.grad(y, x, create_graph=True)


# The walk ---------------------------------------------------------------------------------


def test_shared_results() -> None:
    a = leaf(1.0)
    b = a + a
    c = b + b
    (c * c).sum().backward()
    assert a.grad.tolist() == [32]


def test_gradients_accumulate_on_leaves_only() -> None:
    x = leaf(1.0, 2.0)
    y = x * 2
    for _ in range(2):
        (y * 1).sum().backward(retain_graph=True)
    assert x.grad.tolist() == [4, 4]
    assert y.grad is None
    y.retain_grad()
    y.sum().backward()
    assert y.grad.tolist() == [1, 1]


def test_a_freed_tape_is_an_error_before_anything_is_lost() -> None:
    x = leaf(1.0, 2.0)
    y = (x * x).sum()
    y.backward(retain_graph=True)
    y.backward()
    before = x.grad.tolist()
    with pytest.raises(RuntimeError, match="retain_graph"):
        y.backward()
    with pytest.raises(RuntimeError, match="retain_graph"):
        (x.sum() + y).backward()
    assert x.grad.tolist() == before == [4, 8]


def test_backward_errors() -> None:
    x = leaf(1.0, 2.0)
    with pytest.raises(RuntimeError, match="needs its gradient"):
        (x * 2).backward()
    with pytest.raises(RuntimeError, match="its gradient"):
        (x * 2).backward(minidl.ones(3))
    with pytest.raises(TypeError, match="array"):
        (x * 2).sum().backward(1.0)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="requires_grad"):
        minidl.ones(1).backward()
    with pytest.raises(RuntimeError, match="leaves only"):
        (x * 2).requires_grad = False


def test_gradient_of_another_dtype() -> None:
    x = minidl.ones(2, requires_grad=True)
    y = x * 2
    y.retain_grad()
    y.backward(minidl.tensor(np.array([1.0, 2.0])))
    assert y.grad.dtype == x.grad.dtype == minidl.float32


def test_op_without_a_rule() -> None:
    @op
    def test_only(x: Any) -> Any:
        return x * 2

    try:
        y = test_only(leaf(1.0)).sum()
        with pytest.raises(RuntimeError, match="no gradient rule"):
            y.backward()
    finally:
        del registry["test_only"]


def test_leaves_do_not_share_gradients() -> None:
    x, y = leaf(1.0, 2.0), leaf(3.0, 4.0)
    g = minidl.ones(2, dtype=minidl.float64)
    (x + y).backward(g)
    z = leaf(0.0, 0.0)
    z.backward(g)
    with minidl.no_grad():
        x.grad.zero_()
        z.grad.zero_()
    assert y.grad.tolist() == g.tolist() == [1, 1]
    x.sum().backward()
    assert x.grad.array.flags.writeable


def test_long_chain() -> None:
    """100,000 ops: no recursion, neither in the walk nor when the tape is dropped."""

    def seconds(n: int) -> float:
        x = minidl.ones(1, requires_grad=True)
        start = time.perf_counter()
        y = x
        for _ in range(n):
            y = y + 1
        y.backward()
        assert x.grad.item() == 1
        return time.perf_counter() - start

    assert seconds(100_000) < 40 * seconds(10_000)  # 100 times, if it were quadratic

    y = minidl.ones(1, requires_grad=True)
    for _ in range(100_000):
        y = y + 1
    del y  # without a backward


def test_doublings() -> None:
    x = minidl.ones(1, requires_grad=True)
    y = x
    for _ in range(18):
        y = y + y
    start = time.perf_counter()
    y.backward()
    assert time.perf_counter() - start < 0.1
    assert x.grad.item() == 2**18


def test_nothing_is_alive_after_backward() -> None:
    x = leaf(1.0, 2.0)
    hidden = (x * x).exp()
    refs = [weakref.ref(hidden), weakref.ref(hidden.node), weakref.ref(hidden.array)]
    loss = hidden.sum()
    del hidden
    assert refs[2]() is not None  # exp's rule needs its output
    loss.backward()
    gc.collect()
    assert [r() for r in refs] == [None] * 3
    assert loss.node.saved is None


def test_training_does_not_grow() -> None:
    w = minidl.ones(4, 4, requires_grad=True)
    counts = []
    for _ in range(10):
        y = (minidl.ones(2, 4) @ w).relu().sum()
        y.backward()
        with minidl.no_grad():
            w.sub_(0.1 * w.grad)
        w.grad = None
        counts.append((live(Node), live(Tensor), len(autograd.writes)))
    assert counts[2][:2] == counts[-1][:2]


def test_no_cycles() -> None:
    gc.collect()
    gc.disable()
    try:
        x = leaf(1.0, 2.0)
        y = (x * x).sum()
        ref = weakref.ref(y.node)
        del y
        assert ref() is None
    finally:
        gc.enable()


# grad() -----------------------------------------------------------------------------------


def test_grad_of_interior_tensors() -> None:
    x = leaf(1.0, 2.0)
    y = x * 3
    z = (y * y).sum()
    gy, gx = minidl.grad(z, [y, x])
    assert gy.tolist() == [6, 12]
    assert gx.tolist() == [18, 36]
    assert x.grad is None
    (g,) = minidl.grad(x.sum() * 2, x)
    assert g.tolist() == [2, 2]
    one = x.sum()
    assert minidl.grad(one, one)[0].item() == 1


def test_grad_of_several_outputs() -> None:
    x = leaf(1.0, 2.0)
    y, z = x * 2, x * x
    (g,) = minidl.grad([y, z.sum()], x, [minidl.tensor([1.0, 10.0]), None])
    assert g.tolist() == [4, 24]


def test_grad_of_what_was_not_used() -> None:
    x, other = leaf(1.0), leaf(2.0)
    with pytest.raises(RuntimeError, match="allow_unused"):
        minidl.grad(x.sum(), [x, other])
    assert minidl.grad(x.sum(), [x, other], allow_unused=True)[1] is None
    with pytest.raises(RuntimeError, match="does not require"):
        minidl.grad(x.sum(), minidl.ones(1))


def test_grad_computes_only_what_it_needs() -> None:
    calls: list[str] = []

    @op
    def test_watched(x: Any, y: Any) -> Any:
        return x * y

    @test_watched.gradient
    def _(g: Any, x: Any, y: Any) -> Any:
        calls.append("rule")
        return lambda: calls.append("x") or g * y, lambda: calls.append("y") or g * x

    try:
        x, y = leaf(2.0), leaf(3.0)
        h = test_watched(x, y)
        z = test_watched(h, y).sum()
        minidl.grad(z, x, retain_graph=True)
        assert calls == ["rule", "x", "rule", "x"]
        calls.clear()
        minidl.grad(z, h, retain_graph=True)  # stops at h
        assert calls == ["rule", "x"]
        calls.clear()
        y.requires_grad = False
        test_watched(x, y).sum().backward()
        assert calls == ["rule", "x"]
    finally:
        del registry["test_watched"]


def test_create_graph() -> None:
    x = leaf(1.0, 2.0)
    y = (x**4).sum()
    for expected in ([4, 32], [12, 48], [24, 48], [24, 24]):
        (g,) = minidl.grad(y, x, create_graph=True)
        assert g.tolist() == expected
        y = g.sum()

    x.grad = None
    (x**3).sum().backward(create_graph=True)
    assert x.grad.requires_grad
    (g,) = minidl.grad(x.grad.sum(), x)
    assert g.tolist() == [6, 12]
    x.grad = None


def test_gradient_penalty() -> None:
    """A training step through the norm of a gradient (as WGAN-GP takes it)."""
    rng = np.random.default_rng(0)
    w = minidl.tensor(rng.normal(size=(4, 3)), requires_grad=True)
    x = minidl.tensor(rng.normal(size=(5, 4)), requires_grad=True)

    def penalty(x: Tensor, w: Tensor) -> Tensor:
        with minidl.enable_grad():
            y = ((x @ w).tanh() ** 2).sum()
            (g,) = minidl.grad(y, x, create_graph=True)
            return ((g.norm(dim=1) - 1) ** 2).mean()

    assert minidl.gradcheck(penalty, [x, w], order=2)


def test_gradcheck_sees_a_wrong_rule() -> None:
    @op
    def test_wrong(x: Any) -> Any:
        return x * x

    @test_wrong.gradient
    def _(g: Any, x: Any) -> Any:
        return (g * x * 2.002,)

    try:
        x = leaf(1.0, 2.0)
        with pytest.raises(RuntimeError, match="gradcheck"):
            minidl.gradcheck(test_wrong, x)
        assert not minidl.gradcheck(test_wrong, x, raise_exception=False)
        with pytest.raises(TypeError, match="float64"):
            minidl.gradcheck(test_wrong, x.float().detach().requires_grad_())
    finally:
        del registry["test_wrong"]


# Recording --------------------------------------------------------------------------------


def test_no_grad() -> None:
    x = leaf(1.0)

    @minidl.no_grad()
    def quiet(x: Tensor) -> Tensor:
        with minidl.enable_grad():
            assert (x * 2).requires_grad
        assert not minidl.is_grad_enabled()
        return x * 2

    @minidl.no_grad
    def quiet_too(x: Tensor) -> Tensor:
        return x * 2

    assert not quiet(x).requires_grad
    assert not quiet_too(x).requires_grad
    assert minidl.is_grad_enabled()
    with pytest.raises(ZeroDivisionError), minidl.no_grad():
        1 / 0  # noqa: B018
    assert minidl.is_grad_enabled()
    minidl.set_grad_enabled(False)
    assert not (x * 2).requires_grad
    minidl.set_grad_enabled(True)
    with minidl.set_grad_enabled(False):
        assert not (x * 2).requires_grad
    assert (x * 2).requires_grad
    assert not x.detach().requires_grad
    assert np.shares_memory(x.detach().array, x.array)


def test_no_grad_is_per_thread() -> None:
    seen: dict[str, bool] = {}
    entered, leave = threading.Event(), threading.Event()

    @minidl.no_grad()
    def wait() -> None:
        entered.set()
        leave.wait(10)

    def work() -> None:
        wait()
        seen["after"] = minidl.is_grad_enabled()

    thread = threading.Thread(target=work)
    thread.start()
    entered.wait(10)
    seen["beside"] = minidl.is_grad_enabled()
    with minidl.no_grad():
        leave.set()
        thread.join(10)
    assert seen == {"beside": True, "after": True}
    assert minidl.is_grad_enabled()


def test_threads_share_nothing() -> None:
    gradients = {}

    def work(i: int) -> None:
        x = leaf(float(i))
        for _ in range(50):
            x.grad = None
            (x * x).sum().backward()
        gradients[i] = x.grad.item()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert gradients == {i: 2.0 * i for i in range(8)}


# Hooks ------------------------------------------------------------------------------------


def test_hooks() -> None:
    x = leaf(1.0, 2.0)
    y = x * 2
    seen: list[Any] = []
    handles = [
        y.register_hook(lambda g: seen.append(("y", g.tolist()))),
        y.register_hook(lambda g: g * 10),
        x.register_hook(lambda g: seen.append(("x", g.tolist()))),
        x.register_post_accumulate_grad_hook(lambda x: seen.append(("done", x.grad.tolist()))),
    ]
    (y + y).sum().backward()
    expected = [("y", [2, 2]), ("x", [40, 40]), ("done", [40, 40])]
    assert seen == expected  # once each, when complete
    for handle in handles:
        handle.remove()
    (x * 1).sum().backward()
    assert seen == expected
    with pytest.raises(RuntimeError, match="requires a gradient"):
        minidl.ones(1).register_hook(print)
    y = x * 2
    y.register_hook(lambda g: g.sum())
    with pytest.raises(RuntimeError, match="shape"):
        y.sum().backward()


def test_leaf_hook_fires_within_the_walk() -> None:
    """A leaf near the output is complete before the walk reaches the others."""
    first, last = leaf(1.0), leaf(2.0)
    order: list[str] = []
    h = first * 3
    h.register_hook(lambda g: order.append("h"))
    last.register_post_accumulate_grad_hook(lambda x: order.append("last"))
    first.register_post_accumulate_grad_hook(lambda x: order.append("first"))
    (h * last).sum().backward()
    assert order.index("first") > order.index("h")
    assert sorted(order) == ["first", "h", "last"]


# Checkpoint -------------------------------------------------------------------------------


def block(x: Tensor, w: Tensor) -> Tensor:
    noise = minidl.randn(*x.shape, dtype=minidl.float64)
    return ((x @ w) + noise).tanh() * x


def test_checkpoint_is_the_same_to_the_bit() -> None:
    def run(wrap: bool, create_graph: bool = False) -> list[np.ndarray]:
        minidl.manual_seed(0)
        w = minidl.randn(4, 4, dtype=minidl.float64, requires_grad=True)
        x = minidl.randn(3, 4, dtype=minidl.float64, requires_grad=True)
        h = x
        for _ in range(3):
            h = minidl.checkpoint(block, h, w) if wrap else block(h, w)
        after = minidl.rand(2)
        gs = minidl.grad((h * h).sum(), [x, w], create_graph=create_graph)
        if create_graph:
            gs = (*gs, *minidl.grad((gs[0] * gs[0]).sum(), [x, w]))
        return [h.numpy(), after.numpy(), minidl.rand(2).numpy(), *(g.numpy() for g in gs)]

    for create_graph in (False, True):
        for a, b in zip(run(False, create_graph), run(True, create_graph), strict=True):
            np.testing.assert_array_equal(a, b)


def test_checkpoint_keeps_nothing_between() -> None:
    inner: list[weakref.ref[Any]] = []

    def function(x: Tensor) -> Tensor:
        h = x.exp()
        inner.append(weakref.ref(h.array))
        return h.tanh()

    x = leaf(1.0, 2.0)
    y = minidl.checkpoint(function, x)
    gc.collect()
    assert inner[0]() is None
    y.sum().backward()
    expected = leaf(1.0, 2.0)
    expected.exp().tanh().sum().backward()
    assert x.grad.tolist() == expected.grad.tolist()
    assert len(inner) == 2


def test_checkpoint_refuses_what_it_cannot_repeat() -> None:
    calls: list[int] = []

    def moody(x: Tensor) -> Tensor:
        calls.append(1)
        return x.exp() if len(calls) == 1 else x.tanh()

    x = leaf(1.0)
    y = minidl.checkpoint(moody, x).sum()
    with pytest.raises(RuntimeError, match="other ops"):
        y.backward()
    w = leaf(2.0)
    y = minidl.checkpoint(lambda x: x * w, x).sum()
    with minidl.no_grad():
        w.add_(1)
    with pytest.raises(RuntimeError, match="changed in place"):
        y.backward()


# Methods ----------------------------------------------------------------------------------


def test_axis_is_dim() -> None:
    x = minidl.tensor(np.random.default_rng(0).normal(size=(2, 3, 4)))
    for name in ("sum", "mean", "amax", "amin", "var", "std", "any", "all", "argmax", "argmin"):
        method = getattr(x, name)
        np.testing.assert_array_equal(
            method(axis=1, keepdims=True).numpy(), method(dim=1, keepdim=True).numpy()
        )
    assert x.sum(dim=[0, 2]).shape == (3,)
    assert x.sum((0, 2), keepdim=True).shape == (1, 3, 1)


def test_functions_are_methods() -> None:
    x = minidl.arange(6.0).reshape(2, 3)
    assert minidl.sum(x, 1).tolist() == x.sum(1).tolist()
    assert minidl.flatten(x[None], 1).shape == (1, 6)
    assert minidl.max(x, 1).indices.tolist() == [2, 2]
    assert minidl.cat((x, x), 1).shape == (2, 6)
    assert minidl.stack([x, x], dim=-1).shape == (2, 3, 2)
    assert [p.shape for p in minidl.split(x, 2, dim=1)] == [(2, 2), (2, 1)]
    assert minidl.where(x > 2, x, 0.0).tolist() == [[0, 0, 0], [3, 4, 5]]
    assert all(hasattr(minidl, name) for name in minidl.__all__)
    with pytest.raises(AttributeError, match="nonsense"):
        minidl.nonsense  # noqa: B018


def test_shapes() -> None:
    x = minidl.zeros(2, 1, 3)
    assert x.squeeze().shape == (2, 3)
    assert x.squeeze(0).shape == (2, 1, 3)
    assert x.squeeze(-2).shape == (2, 3)
    assert x.unsqueeze(-1).shape == (2, 1, 3, 1)
    assert x.unsqueeze(0).shape == (1, 2, 1, 3)
    assert x.flatten(1).shape == (2, 3)
    assert minidl.zeros(()).flatten().shape == (1,)
    assert x.transpose(0, 2).shape == x.T.shape == (3, 1, 2)
    assert x.mT.shape == (2, 3, 1)
    assert x.permute(2, 0, 1).shape == (3, 2, 1)
    assert x.expand(-1, 4, -1).shape == (2, 4, 3)
    assert x.expand(5, -1, 4, 3).shape == (5, 2, 4, 3)
    assert x.repeat(2, 1, 1, 2).shape == (2, 2, 1, 6)
    assert x.movedim(0, -1).shape == (1, 3, 2)
    assert [c.shape for c in minidl.zeros(5).chunk(3)] == [(2,), (2,), (1,)]
    assert [c.shape for c in minidl.zeros(5).split([1, 4])] == [(1,), (4,)]
    assert len(x.unbind(2)) == 3
    with pytest.raises(ValueError, match="add up"):
        minidl.zeros(5).split([1, 1])
    with pytest.raises(IndexError, match="narrow"):
        x.narrow(0, 1, 2)
    with pytest.raises(ValueError, match="mm takes"):
        minidl.zeros(2).mm(minidl.zeros(2, 2))


def test_composed_methods_have_gradients() -> None:
    rng = np.random.default_rng(0)
    x = minidl.tensor(rng.normal(size=(3, 4)) + 3, requires_grad=True)
    v = minidl.tensor(rng.normal(size=4), requires_grad=True)
    mask = minidl.tensor(rng.random((3, 4)) < 0.5)
    index = minidl.tensor([[0], [2], [1]])
    for function in (
        lambda x: x.prod(), lambda x: x.prod(1), lambda x: x.prod(0, keepdim=True),
        lambda x: x.std(), lambda x: x.std(1, keepdim=True), lambda x: x.var(unbiased=False),
        lambda x: x.norm(), lambda x: x.norm(3, 1), lambda x: x.norm(1), lambda x: x.norm(0.5),
        lambda x: x.sort(1).values, lambda x: x.topk(2).values, lambda x: x.max(0).values,
        lambda x: x.min(1, keepdim=True).values, lambda x: x.masked_fill(mask, 0.0),
        lambda x: x.masked_select(mask), lambda x: x.repeat(2, 1, 3), lambda x: x.flip(0),
        lambda x: x.take_along_dim(index, 1), lambda x: x.index_select(1, index.reshape(-1)),
        lambda x: x.rsqrt() + x.reciprocal() + x.square(), lambda x: x % 2.5,
        lambda x: x.logsumexp(0), lambda x: 2.0**x, lambda x: 1 / x, lambda x: x[:, 1:].T,
        lambda x: x.clamp(min=minidl.tensor([3.1])), lambda x: x.gather(1, index),
    ):  # fmt: skip
        assert minidl.gradcheck(function, x, order=2)
    for function in (
        lambda x, v: x.mv(v), lambda x, v: v.dot(v) * x, lambda x, v: v.outer(v),
        lambda x, v: minidl.einsum("ij,j->i", x, v), lambda x, v: minidl.einsum("ij,j", x, v),
        lambda x, v: minidl.einsum("...j,j->...", x, v), lambda x, v: x @ v, lambda x, v: x**v,
        lambda x, v: minidl.einsum("ii->i", v.outer(v)) + minidl.einsum("ii", x.T @ x),
        lambda x, v: minidl.cat([x, v[None]]), lambda x, v: minidl.stack([x[0], v], 1),
    ):  # fmt: skip
        assert minidl.gradcheck(function, [x, v], order=2)


def test_einsum_says_what_does_not_fit() -> None:
    x = minidl.zeros(2, 3)
    with pytest.raises(ValueError, match="names 2 inputs"):
        minidl.einsum("ij,jk->ik", x)
    with pytest.raises(ValueError, match="does not fit shape"):
        minidl.einsum("ijk->i", x)
    with pytest.raises(ValueError, match="two lengths"):
        minidl.einsum("ii->i", x)


def test_op_errors_name_the_op_and_its_arguments() -> None:
    with pytest.raises(ValueError) as info:
        minidl.zeros(2, 3) @ minidl.zeros(2, 3)
    assert any("matmul(float32(2, 3), float32(2, 3))" in note for note in info.value.__notes__)


def test_a_write_between_a_cast_and_its_backward():
    """The tape keeps the dtype that was cast from, which no write can change."""
    x = minidl.tensor(np.ones(3), requires_grad=True)
    y = x.to(minidl.float32)
    minidl.zeros(2).add_(1)
    y.sum().backward()
    assert x.grad.dtype == np.float64 and x.grad.numpy().tolist() == [1, 1, 1]


def test_after_backward():
    from minidl.autograd import after_backward

    x = minidl.tensor([1.0, 2.0], requires_grad=True)
    order = []

    def hook(name):
        def note(g):
            order.append(name)
            after_backward(lambda: order.append(f"after {name}"))
            if name == "z" and fails:
                raise ZeroDivisionError

        return note

    for fails in (False, True):
        y = x * 2
        z = y.exp()
        y.register_hook(hook("y"))
        z.register_hook(hook("z"))
        order.clear()
        if fails:
            with pytest.raises(ZeroDivisionError):
                z.sum().backward()
            assert order == ["z"]
        else:
            z.sum().backward()
            assert order == ["z", "y", "after z", "after y"]
    with pytest.raises(RuntimeError, match="no backward pass"):
        after_backward(print)
