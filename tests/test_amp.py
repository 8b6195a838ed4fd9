"""Mixed precision: what is rounded, what is not, and what float16 would lose."""

import threading

import numpy as np
import pytest

import minidl
from minidl import nn, optim
from minidl.amp import LOWER, UNTOUCHED, GradScaler, MasterWeights, autocast
from minidl.data import DataLoader, Digits, Subset
from minidl.nn import functional as F
from minidl.tensor import Tensor, bfloat16
from minidl.train import evaluate, train
from tests import registry as reg

EPSILON = {"float16": 2.0**-11, "bfloat16": 2.0**-8}  # the largest relative error of rounding
RECURRENT = ("rnn", "lstm", "gru")  # their gradients are computed from rounded states


def hook():
    return vars(__import__("sys").modules["minidl.op"])["before_call"]


def normal(*shape, scale=1.0, seed=0):
    rng = np.random.default_rng([seed, *shape])
    return minidl.tensor((scale * rng.normal(size=shape)).astype(np.float32), requires_grad=True)


def rounded(x, dtype="float16"):
    return x.astype(np.dtype(dtype)).astype(x.dtype)


def net(seed=0):
    minidl.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(256, 10),
    )  # fmt: skip


# Autocast ---------------------------------------------------------------------------------


def test_the_list_names_ops():
    assert set(reg.OPS) >= LOWER | UNTOUCHED


@reg.every_differentiable_case
def test_ops(case):
    """A product is that of rounded numbers, rounded; all else runs as it does without autocast."""
    for dtype in EPSILON:
        check_op(case.cast("float32"), dtype)


def check_op(case, dtype):
    with autocast(dtype=dtype):
        y = case.function(*reg.leaves(case), **case.kwargs)
        gradients = reg.outcome(case)[1:]
    assert all(g is None or g.dtype == np.float32 for g in gradients)
    if case.op.name not in LOWER:
        reg.assert_same_bits([y.array, *gradients], reg.outcome(case))
        return
    assert y.dtype.name == dtype
    low = case.map(lambda x: rounded(x, dtype) if reg.is_float(x) else x)
    exact = reg.outcome(low.cast("float64"), change_g=lambda g: rounded(g, dtype))
    reg.assert_close(y.array.astype(np.float64), exact[0], 2 * EPSILON[dtype])
    for g, right in zip(gradients, exact[1:], strict=True):
        reg.assert_close(g, right, (16 if case.op.name in RECURRENT else 4) * EPSILON[dtype])
        assert (g == rounded(g, dtype)).all()


def test_what_16_bits_meet_is_widened():
    """A product's result in every other op: as if it had been float32 with the same value."""
    x = normal(4, 6)
    with autocast():
        y = x @ normal(6, 3)
        assert y.dtype == np.float16
        for z in (y.exp(), y.softmax(dim=1), y + y, y.relu(), y.sum(), y * 2.0):
            assert z.dtype == np.float32
        wide = y.detach().float()
        np.testing.assert_array_equal(y.exp().numpy(), wide.exp().numpy())
        assert y.half().dtype == np.float16 and y.float().dtype == np.float32


def test_float64_and_bare_arrays_are_left_alone():
    a, b = np.ones((3, 3)), np.ones((3, 3), np.float32)
    with autocast():
        assert (Tensor(a) @ Tensor(b)).dtype == np.float64
        assert (Tensor(b) @ Tensor(b)).dtype == np.float16
        assert reg.OPS["matmul"](b, b).dtype == np.float32


def test_blocks_nest_and_end():
    x = normal(3, 3)

    def dtype():
        return (x @ x).dtype.name

    assert hook() is None and dtype() == "float32"
    with autocast(dtype="bfloat16"):
        with autocast():
            assert dtype() == "float16"
            with autocast(enabled=False):
                assert dtype() == "float32"
            with autocast("cuda"):
                assert dtype() == "float32"
            with autocast("cpu", minidl.bfloat16):
                assert dtype() == "bfloat16"
        assert dtype() == "bfloat16"
    with pytest.raises(RuntimeError, match="stop"), autocast():
        raise RuntimeError("stop")
    assert hook() is None and dtype() == "float32"
    with autocast(enabled=False):
        assert hook() is None

    @autocast()
    def within():
        return dtype()

    assert within() == "float16" and dtype() == "float32"


def test_threads_have_their_own():
    x, found, inside, done = normal(3, 3), {}, threading.Event(), threading.Event()

    def other():
        inside.wait(10)
        found["other"] = (x @ x).dtype.name
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with autocast():
        inside.set()
        done.wait(10)
        found["this"] = (x @ x).dtype.name
    thread.join()
    assert found == {"other": "float32", "this": "float16"} and hook() is None


@pytest.mark.parametrize("how", [{"device_type": "float16"}, {"dtype": "int8"}, {"dtype": float}])
def test_bad_blocks(how):
    with pytest.raises(ValueError, match="float16"):
        autocast(**how)


def test_gradients_underflow_and_overflow():
    """Below 6e-8 they are 0, above 65504 infinite; in bfloat16 neither."""
    w = normal(4, 4)
    for factor, dtype, kept in [(1e-9, "float16", False), (1e-9, "bfloat16", True)]:
        w.grad = None
        with autocast(dtype=dtype):
            y = Tensor(np.ones((2, 4), np.float32)) @ w
        (y.float().sum() * factor).backward()
        assert w.grad.array.any() == kept
    w.grad = None
    with autocast():
        y = Tensor(np.ones((2, 4), np.float32)) @ w
    (y.float().sum() * 1e6).backward()
    assert np.isinf(w.grad.array).all()


def test_a_sum_is_kept_in_float32():
    """4096 ones: float16 adds them up to 2048, where the next one is lost."""
    ones = Tensor(np.ones((1, 4096), np.float32), requires_grad=True)
    with autocast():
        y = F.linear(ones, ones)
    assert y.item() == 4096
    assert np.ones(4096, np.float16).cumsum(dtype=np.float16)[-1] == 2048
    bias = Tensor(np.zeros(1, np.float32), requires_grad=True)
    with autocast():
        F.linear(Tensor(np.ones((4096, 1), np.float32)), Tensor(np.ones((1, 1), np.float32)), bias)\
            .float().sum().backward()  # fmt: skip
    assert bias.grad.item() == 4096


def test_batch_norm_checkpoint_and_second_order():
    x = minidl.tensor(np.random.default_rng(0).normal(size=(8, 1, 8, 8)).astype(np.float32))
    y = minidl.tensor(np.arange(8))
    gradients = []
    for run in (lambda model: model(x), lambda model: minidl.checkpoint(model, x)):
        model = net()
        with autocast():
            loss = F.cross_entropy(run(model), y)
        loss.backward()
        gradients.append([p.grad.numpy() for p in model.parameters()])
        assert model[1].running_var.dtype == np.float32
    for a, b in zip(*gradients, strict=True):
        np.testing.assert_array_equal(a, b)
    w = normal(3, 3)
    with autocast():
        z = (w @ w).float().square().sum()
        (g,) = minidl.grad(z, w, create_graph=True)
    g.square().sum().backward()
    assert np.isfinite(w.grad.array).all() and w.grad.array.any()


def test_recurrent_layers():
    """(N, T, in) -> (N, T, hidden) in float16, with gradients for all weights."""
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        layer = kind(5, 4, batch_first=True)
        x = minidl.tensor(np.random.default_rng(1).normal(size=(2, 7, 5)).astype(np.float32))
        exact, _ = layer(x)
        with autocast():
            out, _ = layer(x)
        out.float().sum().backward()
        np.testing.assert_allclose(out.numpy(), exact.numpy(), atol=4e-3)
        assert all(p.grad.array.any() for p in layer.parameters())


# Loss scaling -----------------------------------------------------------------------------


def one_weight(value=1.0):
    p = nn.Parameter(minidl.tensor([value]))
    return p, optim.SGD([p], lr=1.0)


def give(p, value, scaler):
    p.grad = minidl.tensor([value * scaler.get_scale()])


def test_scaled_gradients_arrive():
    """The gradient that was flushed to 0 is right when the loss was scaled."""
    w = normal(4, 4)
    optimizer, scaler = optim.SGD([w], lr=1.0), GradScaler()
    before = w.numpy().copy()
    with autocast():
        loss = (Tensor(np.ones((2, 4), np.float32)) @ w).sum() * 1e-9
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    np.testing.assert_allclose(w.grad.numpy(), 2e-9, rtol=1e-3)
    scaler.step(optimizer)
    scaler.update()
    np.testing.assert_array_equal(w.numpy(), before - w.grad.numpy())


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_backoff_and_growth(bad):
    p, optimizer = one_weight()
    scaler = GradScaler(init_scale=8.0, growth_interval=3, growth_factor=4.0, backoff_factor=0.25)
    found = []
    for g in (0.5, 0.5, bad, 0.5, 0.5, 0.5, 0.5):
        give(p, g, scaler)
        scaler.step(optimizer)
        scaler.update()
        found.append((scaler.get_scale(), p.item()))
    scales = [8, 8, 2, 2, 2, 8, 8]  # the count of good steps begins anew after a bad one
    weights = [0.5, 0, 0, -0.5, -1, -1.5, -2]
    assert found == list(zip(scales, weights))


def test_scale_stays_finite():
    scaler = GradScaler(init_scale=2.0**127, growth_interval=1)
    p, optimizer = one_weight()
    give(p, 2.0**-100, scaler)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**127


def test_one_bad_optimizer_of_two():
    """It skips; the other steps; the scale is lowered."""
    (p, one), (q, two), scaler = one_weight(), one_weight(), GradScaler(init_scale=4.0)
    give(p, np.inf, scaler)
    give(q, 1.0, scaler)
    for optimizer in (one, two):
        scaler.step(optimizer)
    scaler.update()
    assert (p.item(), q.item(), scaler.get_scale()) == (1.0, 0.0, 2.0)
    scaler.update(16.0)
    assert scaler.get_scale() == 16.0


def test_state_goes_on():
    def run(scaler, gradients):
        p, optimizer = one_weight()
        scales = []
        for g in gradients:
            give(p, g, scaler)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
        return scales

    gradients = [1, 1, np.nan, 1, 1, 1, np.inf, 1, 1, 1, 1]
    whole = run(GradScaler(growth_interval=2), gradients)
    for stop in range(1, len(gradients)):
        first = GradScaler(growth_interval=2)
        run(first, gradients[:stop])
        second = GradScaler()
        second.load_state_dict(first.state_dict())
        assert run(second, gradients[stop:]) == whole[stop:]


def test_not_enabled_is_not_there():
    p, optimizer = one_weight()
    scaler = GradScaler(enabled=False)
    loss = p.sum()
    assert scaler.scale(loss) is loss and scaler.get_scale() == 1 and not scaler.is_enabled()
    loss.backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert p.item() == 0 and scaler.state_dict() == {}
    scaler.load_state_dict({})


def test_scaler_in_a_wrong_order():
    p, optimizer = one_weight()
    scaler = GradScaler()
    with pytest.raises(RuntimeError, match="comes after step"):
        scaler.update()
    with pytest.raises(RuntimeError, match="no gradients"):
        scaler.step(optimizer)
    give(p, 1.0, scaler)
    with pytest.raises(RuntimeError, match="closure"):
        scaler.step(optimizer, lambda: None)
    scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="already"):
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="already"):
        scaler.step(optimizer)
    with pytest.raises(RuntimeError, match="after it update"):
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="not enabled"):
        scaler.load_state_dict({})
    half = nn.Parameter(Tensor(np.ones(1, np.float16)))
    half.grad = Tensor(np.ones(1, np.float16))
    with pytest.raises(ValueError, match="MasterWeights"):
        GradScaler().step(optim.SGD([half]))
    for how in ({"growth_factor": 1.0}, {"backoff_factor": 1.0}):
        with pytest.raises(ValueError, match="must be"):
            GradScaler(**how)


# Master weights ---------------------------------------------------------------------------


def test_updates_that_float16_loses():
    """1 - 0.0001 is 1 in float16; 100 times 0.0001 is 0.01, if somebody keeps count."""
    found = []
    for wrap in (lambda optimizer: optimizer, MasterWeights):
        p = nn.Parameter(Tensor(np.ones(1, np.float16)))
        optimizer = wrap(optim.SGD([p], lr=1e-4))
        for _ in range(100):
            p.grad = Tensor(np.ones(1, np.float16))
            optimizer.step()
            optimizer.zero_grad()
        assert p.dtype == np.float16 and p.grad is None
        found.append(p.item())
    assert found == [1.0, float(np.float16(0.99))]


def test_masters_are_float32_training():
    """The same numbers as an optimizer on float32 weights gets from the same gradients."""
    rng = np.random.default_rng(0)
    low = [nn.Parameter(Tensor(rng.normal(size=s).astype(np.float16))) for s in [(3, 2), (4,)]]
    low.append(nn.Parameter(Tensor(rng.normal(size=5).astype(np.float32))))  # stays as it is
    high = [nn.Parameter(Tensor(p.array.astype(np.float32))) for p in low]
    optimizer, exact = MasterWeights(optim.Adam(low, 0.01)), optim.Adam(high, 0.01)
    schedules = [optim.lr_scheduler.StepLR(o, 2, 0.5) for o in (optimizer, exact)]
    for t in range(5):
        if t == 3:  # resumed
            state = optimizer.state_dict()
            optimizer = MasterWeights(optim.Adam(low, 0.5))
            optimizer.load_state_dict(state)
            schedules.pop(0)
        for p, q in zip(low, high):
            g = rng.normal(size=p.shape).astype(np.float16)
            p.grad, q.grad = Tensor(g.astype(p.dtype)), Tensor(g.astype(np.float32))
        optimizer.step()
        exact.step()
        for schedule in schedules:
            schedule.step()
        optimizer.param_groups[0]["lr"] = exact.param_groups[0]["lr"]
        optimizer.zero_grad()
        for p, q in zip(low, high):
            np.testing.assert_array_equal(p.numpy(), q.numpy().astype(p.dtype))


def test_masters_with_a_scaler_and_a_closure():
    p = nn.Parameter(Tensor(np.ones(1, np.float16)))
    optimizer, scaler = MasterWeights(optim.SGD([p], lr=1.0)), GradScaler(init_scale=1024.0)
    scaler.scale(p.float().sum() * 2**-20).backward()  # 2⁻²⁰ is subnormal in float16
    scaler.step(optimizer)
    scaler.update()
    (master,) = optimizer.masters.values()
    assert master.item() == 1 - 2**-20 and p.item() == 1

    def closure():
        optimizer.zero_grad()
        loss = p.float().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1
    assert master.item() == -(2**-20)


def test_bad_masters():
    p, optimizer = one_weight()
    with pytest.raises(ValueError, match="their own master"):
        MasterWeights(optimizer)
    p = nn.Parameter(Tensor(np.ones(1, np.float16)))
    p.grad = Tensor(np.ones(1, np.float16))
    optimizer = optim.SGD([p], momentum=0.9)
    optimizer.step()
    with pytest.raises(ValueError, match="before"):
        MasterWeights(optimizer)
    other = MasterWeights(optim.SGD([nn.Parameter(Tensor(np.ones(2, np.float16)))]))
    with pytest.raises(ValueError, match="master weights of"):
        MasterWeights(optim.SGD([p])).load_state_dict(other.state_dict())


# Training ---------------------------------------------------------------------------------


def parts():
    model = net(3)
    loaders = (
        DataLoader(Subset(Digits(), range(480)), 32, shuffle=True),
        DataLoader(Digits(train=False), 120),
    )
    return model, *loaders, optim.Adam(model.parameters(), 0.003)


def test_training_is_as_good():
    accuracy = {}
    for dtype in (None, "float16", "bfloat16"):
        model, loader, test_loader, optimizer = parts()
        scaler = GradScaler(enabled=dtype == "float16")
        for _ in range(5):
            for x, y in loader:
                optimizer.zero_grad()
                with autocast(dtype=dtype or "float16", enabled=dtype is not None):
                    loss = F.cross_entropy(model(x), y)
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
        assert all(p.dtype == np.float32 for p in model.parameters())
        accuracy[dtype] = evaluate(model, test_loader).accuracy
    assert accuracy[None] > 0.85
    assert max(accuracy.values()) - min(accuracy.values()) <= 4 / 360


def digits(amp, out, **how):
    model, *rest = parts()
    train(model, *rest, epochs=2, amp=amp, out=out, max_grad_norm=1.0, **how)


def test_a_stopped_run_goes_on(tmp_path):
    """To the same bits, the scale and its counter among them."""

    class Stop(Exception):
        pass

    def stop(progress, lr):
        if (progress.epoch, progress.step) == (2, 5):
            raise Stop

    digits("float16", tmp_path / "whole")
    with pytest.raises(Stop):
        digits("float16", tmp_path / "cut", on_step=stop, checkpoint_seconds=0.0)
    with pytest.raises(ValueError, match="amp was 'float16', now it is None"):
        digits(None, tmp_path / "cut", resume=True)
    digits("float16", tmp_path / "cut", resume=True)
    whole, cut = (minidl.load(tmp_path / n / "last.safetensors") for n in ("whole", "cut"))
    assert whole["scaler"] == cut["scaler"] and whole["scaler"]["_growth_tracker"] == 30
    for name, value in whole["model"].items():
        np.testing.assert_array_equal(value.numpy(), cut["model"][name].numpy())


def test_bfloat16_leaves():
    """bfloat16 is a floating dtype for the tape too, though NumPy calls its kind "V"."""
    x = Tensor(np.ones(3, bfloat16), requires_grad=True)
    (x.float() * 3.0).sum().backward()
    assert x.is_floating_point() and x.grad.dtype == bfloat16 and (x.grad.float() == 3).all()


def test_evaluation_within_autocast():
    model, loader = net(), DataLoader(Digits(train=False), 120)
    exact = evaluate(model, loader)
    with autocast():
        assert evaluate(model, loader).loss == pytest.approx(exact.loss, rel=1e-3)
