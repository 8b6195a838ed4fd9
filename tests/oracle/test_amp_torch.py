"""Mixed precision against PyTorch's autocast on the CPU, and its GradScaler."""

import numpy as np
import pytest
import torch

import minidl
import minidl.nn.functional as F
from minidl import nn, optim
from minidl.amp import GradScaler, autocast

pytestmark = pytest.mark.torch
DTYPES = {"float16": (torch.float16, 2.0**-11), "bfloat16": (torch.bfloat16, 2.0**-8)}


def pair(*shape, seed=0):
    x = np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)
    return minidl.tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)


CALLS = {
    "matmul": (lambda x, w: x @ w, lambda x, w: x @ w, [(7, 5), (5, 3)]),
    "batched matmul": (lambda x, w: x @ w, lambda x, w: x @ w, [(2, 7, 5), (2, 5, 3)]),
    "linear": (F.linear, torch.nn.functional.linear, [(7, 5), (4, 5), (4,)]),
    "conv2d": (F.conv2d, torch.nn.functional.conv2d, [(2, 3, 8, 8), (4, 3, 3, 3), (4,)]),
    "conv_transpose2d": (
        F.conv_transpose2d, torch.nn.functional.conv_transpose2d, [(2, 3, 5, 5), (3, 4, 3, 3)],
    ),
    "softmax": (lambda x: x.softmax(1), lambda x: x.softmax(1), [(7, 5)]),
    "layer_norm": (
        lambda x: F.layer_norm(x, (5,)), lambda x: torch.nn.functional.layer_norm(x, (5,)),
        [(7, 5)],
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CALLS)
def test_ops(name, dtype):
    """The same dtypes; values and gradients that differ by roundings of 16 bits."""
    ours, theirs, shapes = CALLS[name]
    torch_dtype, epsilon = DTYPES[dtype]
    pairs = [pair(*shape, seed=i) for i, shape in enumerate(shapes)]
    with autocast(dtype=dtype), torch.autocast("cpu", torch_dtype):
        y, z = ours(*(a for a, _ in pairs)), theirs(*(b for _, b in pairs))
    assert y.dtype.name == str(z.dtype).removeprefix("torch.")
    g = np.random.default_rng(9).normal(size=y.shape).astype(np.float32)
    y.float().backward(minidl.tensor(g))
    z.float().backward(torch.tensor(g))

    def close(a, b):
        a, b = a.numpy().astype(np.float32), b.detach().float().numpy()
        np.testing.assert_allclose(a, b, rtol=0, atol=4 * epsilon * np.abs(b).max())

    close(y, z)
    for a, b in pairs:
        assert (a.grad.dtype, b.grad.dtype) == (np.float32, torch.float32)
        close(a.grad, b.grad)


@pytest.mark.parametrize("dtype", DTYPES)
def test_network(dtype):
    """Ten steps with a GradScaler: the same losses, scales and weights, but for rounding."""
    torch_dtype, epsilon = DTYPES[dtype]

    def layers(nn):
        return nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 8, 3),
            nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(32, 10),
        )  # fmt: skip

    minidl.manual_seed(0)
    ours, theirs = layers(nn), layers(torch.nn)
    theirs.load_state_dict({k: torch.tensor(v.numpy()) for k, v in ours.state_dict().items()})
    how = {"init_scale": 2.0**16, "growth_interval": 3}
    pairs = [
        (ours, optim.SGD(ours.parameters(), 0.01, 0.9), GradScaler("cpu", **how)),
        (theirs, torch.optim.SGD(theirs.parameters(), 0.01, 0.9),
         torch.amp.GradScaler("cpu", **how)),
    ]  # fmt: skip
    rng = np.random.default_rng(0)
    for step in range(10):
        x = rng.normal(size=(16, 1, 8, 8)).astype(np.float32)
        y = rng.integers(0, 10, 16)
        if step == 4:
            x[0, 0, 0, 0] = np.inf  # a batch whose gradients are not finite
        found = []
        for (model, optimizer, scaler), library, f in zip(
            pairs, (minidl, torch), (F, torch.nn.functional), strict=True
        ):
            optimizer.zero_grad()
            block = (
                autocast(dtype=dtype) if library is minidl else torch.autocast("cpu", torch_dtype)
            )
            model.eval() if step == 4 else model.train()  # the running statistics stay finite
            with block, np.errstate(invalid="ignore"):
                loss = f.cross_entropy(model(library.tensor(x)), library.tensor(y))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            found.append((loss.item(), scaler.get_scale()))
        (loss, scale), (their_loss, their_scale) = found
        assert scale == their_scale
        if step != 4:
            assert loss == pytest.approx(their_loss, rel=20 * epsilon)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        q = q.detach().numpy()
        np.testing.assert_allclose(p.numpy(), q, rtol=0, atol=50 * epsilon * np.abs(q).max())


def test_state_dict_is_theirs():
    """One resumes what the other saved."""
    ours, theirs = GradScaler("cpu", growth_interval=7), torch.amp.GradScaler("cpu", 4.0)
    theirs.load_state_dict(ours.state_dict())
    assert theirs.state_dict() == ours.state_dict()
    ours.load_state_dict(torch.amp.GradScaler("cpu", 4.0).state_dict())
    assert ours.get_scale() == 4.0
