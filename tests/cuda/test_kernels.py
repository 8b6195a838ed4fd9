"""Every CUDA kernel against NumPy, on the CPU, in several orders of threads and blocks.

What is not written stays NaN or 77 (`poisoned`), and counts as wrong.
"""

import numpy as np
import pytest

import minidl.ops.conv  # noqa: F401
from minidl import optim
from minidl.backend import cuda_kernels
from minidl.backend import cuda_launch as cuda
from minidl.backend.random import Key
from minidl.backend.random import uniform as uniform_on_cpu
from minidl.op import registry
from minidl.tensor import Tensor

FILES = sorted(path.name for path in cuda_kernels.source_folder().glob("*.cu"))
launched = set()


@pytest.fixture(autouse=True)
def poisoned(monkeypatch):
    """Let fresh memory hold what no result should."""
    empty, empty_like = np.empty, np.empty_like

    def poison(array):
        array.fill(np.nan if array.dtype.kind == "f" else 77)
        return array

    monkeypatch.setattr(np, "empty", lambda *a, **k: poison(empty(*a, **k)))
    monkeypatch.setattr(np, "empty_like", lambda *a, **k: poison(empty_like(*a, **k)))


@pytest.fixture(autouse=True)
def noted(monkeypatch):
    """Remember which kernels were launched."""
    call = cuda_kernels.CpuKernel.__call__

    def noting(self, *args, **kwargs):
        launched.add(self.name)
        return call(self, *args, **kwargs)

    monkeypatch.setattr(cuda_kernels.CpuKernel, "__call__", noting)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def normal(rng, *shape, dtype=np.float32):
    return rng.normal(size=shape).astype(dtype)


def close(got, wanted, tolerance=1e-5):
    """Within a share of the largest number, each entry; NaN only where it is wanted."""
    wanted = np.asarray(wanted)
    assert got.shape == wanted.shape
    scale = np.abs(wanted[np.isfinite(wanted)]).max(initial=1e-30)
    np.testing.assert_allclose(np.asarray(got, np.float64), wanted, rtol=0, atol=tolerance * scale)


def formula(name, *inputs, **settings):
    """The op in float64."""
    wide = [x.astype(np.float64) if getattr(x, "dtype", 0) == np.float32 else x for x in inputs]
    return registry[name].op.formula(*wide, **settings)


def gradients(name, g, *inputs, **settings):
    """Of the op in float64, for each input that is a float array."""
    wide = [
        Tensor(x.astype(np.float64)).requires_grad_() if getattr(x, "dtype", 0) == np.float32 else x
        for x in inputs
    ]
    registry[name](*wide, **settings).backward(Tensor(g.astype(np.float64)))
    return [x.grad.numpy() for x in wide if isinstance(x, Tensor)]


def half(x):
    return x.astype(np.float16).astype(np.float64)


# Matrix products --------------------------------------------------------------------------

SIZES = [(1, 1, 1), (5, 3, 7), (70, 130, 33), (65, 64, 16)]


@pytest.mark.parametrize("m, n, k", SIZES)
@pytest.mark.parametrize("large", [False, True])
def test_matmul(m, n, k, large, order, rng, monkeypatch):
    monkeypatch.setattr(cuda, "BUSY", 0 if large else 100)
    a, a_turned = normal(rng, m, k), normal(rng, k, m).T
    b, b_turned = normal(rng, k, n), normal(rng, n, k).T
    for x in (a, a_turned):
        for y in (b, b_turned):
            close(cuda.matmul(x, y), x.astype(np.float64) @ y, 1e-6)


def test_matmul_of_batches(order, rng):
    for x, y in [((2, 3, 4, 5), (3, 5, 6)), ((3, 4, 5), (5, 2)), ((4, 5), (2, 5, 3))]:
        x, y = normal(rng, *x), normal(rng, *y)
        close(cuda.matmul(x, y), x.astype(np.float64) @ y, 1e-6)
    assert cuda.matmul(np.ones((2, 0), "f"), np.ones((0, 3), "f")).tolist() == [[0] * 3] * 2
    assert cuda.matmul(np.ones((0, 2), "f"), np.ones((2, 3), "f")).shape == (0, 3)


@pytest.mark.parametrize("m, n, k", SIZES)
def test_half_products(m, n, k, order, rng):
    x, w = normal(rng, m, k, dtype=np.float16), normal(rng, n, k, dtype=np.float16)
    bias = normal(rng, n)
    product = x.astype(np.float64) @ w.T
    close(cuda.linear_f16(x, w, bias), product + bias, 1e-6)
    close(cuda.linear_f16(x, w), product, 1e-6)
    close(cuda.matmul_f16(x, w.T), product, 1e-3)
    close(cuda.matmul_f16_tn(np.ascontiguousarray(x.T), w.T), product, 1e-6)


@pytest.mark.parametrize("m, n, k", SIZES)
def test_int8_products(m, n, k, order, rng):
    x = rng.integers(-127, 128, (m, k)).astype(np.int8)
    w = rng.integers(-127, 128, (n, k)).astype(np.int8)
    product = x.astype(np.int64) @ w.T.astype(np.int64)
    assert (cuda.matmul_s8(x, w) == product).all()
    w_scale, bias = rng.random(n, np.float32), normal(rng, n)
    for x_scale in (rng.random(m, np.float32), rng.random(1, np.float32)):
        wanted = product * x_scale.astype(np.float64)[:, None] * w_scale
        close(cuda.linear_s8(x, w, x_scale, w_scale), wanted, 1e-6)
        close(cuda.linear_s8(x, w, x_scale, w_scale, bias), wanted + bias, 1e-6)


@pytest.mark.parametrize("rung", cuda.LADDER)
def test_ladder(rung, order, rng):
    dtype, tolerance = (np.float16, 1e-3) if rung == "tensor" else (np.float32, 1e-6)
    for m, n, k in [*SIZES, (3, 2, 0)]:
        a, b = normal(rng, m, k, dtype=dtype), normal(rng, k, n, dtype=dtype)
        close(cuda.ladder(rung, a, b), a.astype(np.float64) @ b, tolerance)


# Convolution ------------------------------------------------------------------------------

GEOMETRIES = [  # n, c, size, o, kernel, stride, padding, dilation, groups
    (2, 3, (5, 5), 4, (3, 3), (1, 1), (0, 0), (1, 1), 1),
    (2, 2, (7, 6), 3, (3, 2), (2, 1), (1, 0), (1, 1), 1),
    (1, 4, (6, 7), 6, (2, 3), (1, 2), (2, 1), (2, 1), 2),
    (2, 4, (6, 5), 4, (3, 3), (2, 2), (1, 1), (1, 1), 4),
    (2, 3, (4, 4), 5, (1, 1), (3, 3), (0, 0), (1, 1), 1),
    (0, 2, (4, 5), 3, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 10, (9, 8), 70, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    (2, 24, (9, 9), 18, (3, 3), (3, 2), (1, 1), (2, 3), 2),
    (3, 3, (16, 16), 5, (3, 3), (1, 1), (0, 0), (1, 1), 1),  # enough pixels to cut their sum
]


@pytest.fixture(params=GEOMETRIES, ids=str)
def problem(request, rng):
    n, c, size, o, kernel, stride, padding, dilation, groups = request.param
    how = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    x, w = normal(rng, n, c, *size), normal(rng, o, c // groups, *kernel)
    y = normal(rng, *formula("conv2d", x, w, None, **how).shape)
    return x, w, y, how


def check_convolutions(problem, ops, rounded, tolerance):
    x, w, y, how = problem
    (conv2d, conv2d_input, conv2d_weight) = ops
    rx, rw, ry = rounded(x), rounded(w), rounded(y)
    close(conv2d(x, w, **how), formula("conv2d", rx, rw, None, **how), tolerance)
    size, kernel = {"input_size": x.shape[2:]}, {"kernel_size": w.shape[2:]}
    wanted = formula("conv2d_input", ry, rw, **size, **how)
    close(conv2d_input(y, w, **size, **how), wanted, tolerance)
    wanted = formula("conv2d_weight", ry, rx, **kernel, **how)
    close(conv2d_weight(y, x, **kernel, **how), wanted, tolerance)


@pytest.mark.parametrize("large", [False, True])
def test_convolution(problem, large, order, monkeypatch):
    if large:
        monkeypatch.setattr(cuda, "BUSY", 0)  # large tiles, and no splits
    ops = cuda.conv2d, cuda.conv2d_input, cuda.conv2d_weight
    check_convolutions(problem, ops, lambda x: x, 2e-6)


def test_convolution_in_half(problem, order):
    ops = cuda.conv2d_f16, cuda.conv2d_input_f16, cuda.conv2d_weight_f16
    check_convolutions(problem, ops, half, 2e-6)


def test_convolution_in_int8(problem, order, rng):
    x, w, _, how = problem
    x_scale, w_scale = np.array([0.02], np.float32), rng.random(len(w), np.float32) / 20 + 0.01
    bias = normal(rng, len(w))
    wanted = formula(
        "conv2d", rounded(x, x_scale), rounded(w, w_scale[:, None, None, None]), None, **how
    )
    wanted = wanted * (x_scale * w_scale)[:, None, None] + bias[:, None, None]
    close(cuda.conv2d_s8(x, w, x_scale, w_scale, bias=bias, **how), wanted, 1e-6)


def test_bias_of_a_convolution(order, rng):
    x, w, bias = normal(rng, 2, 3, 6, 6), normal(rng, 4, 3, 3, 3), normal(rng, 4)
    wanted = formula("conv2d", x, w, None) + bias[:, None, None]
    close(cuda.conv2d(x, w, bias), wanted)
    close(
        cuda.conv2d_f16(x, w, bias=bias),
        formula("conv2d", half(x), half(w), None) + bias[:, None, None],
    )


# Quantization -----------------------------------------------------------------------------


def rounded(x, scale):
    return np.clip(np.rint(x / scale), -127, 127).astype(np.float64)


def test_quantization(order, rng):
    x = normal(rng, 5, 300)
    x[2] = 0
    most = cuda.absmax(x)
    assert (most == np.abs(x).max(axis=1)).all()
    scale = most / np.float32(127)
    q = cuda.quantize_s8(x, scale)
    assert (q == rounded(x, np.where(scale, scale, 1)[:, None])).all()
    assert (cuda.quantize_s8(x, scale[:1]) == rounded(x, scale[0])).all()
    assert (cuda.to_f16(x) == x.astype(np.float16)).all()
    assert (q.base[:, 300:] == 0).all() and q.base.shape == (5, 304)
    x[1, 7], x[3, 299] = np.nan, np.inf
    assert np.array_equal(cuda.absmax(x), np.abs(x).max(axis=1), equal_nan=True)


# Sums and softmax -------------------------------------------------------------------------


def test_sums(order, rng):
    x = normal(rng, 19, 77)
    close(cuda.sum_rows(x), x.astype(np.float64).sum(axis=1))


@pytest.mark.parametrize("name", ["softmax", "log_softmax"])
def test_softmax(name, order, rng):
    for shape, dim in [((3, 4), 1), ((3, 70, 2), 1), ((5, 3), 0), ((0, 4), 1)]:
        x, g = normal(rng, *shape) * 3, normal(rng, *shape)
        out = getattr(cuda, name)(x, dim=dim)
        close(out, formula(name, x, dim=dim), 1e-6)
        dx = getattr(cuda, f"{name}_gradient")(g, out, dim=dim)
        close(dx, gradients(name, g, x, dim=dim)[0], 1e-6)
    x = np.array([[1e4, -1e4, 0], [-np.inf, 0, 0], [np.nan, 1, 2]], np.float32)
    with np.errstate(all="ignore"):
        wanted = formula(name, x, dim=1)
    np.testing.assert_allclose(getattr(cuda, name)(x, dim=1), wanted, rtol=1e-6)


# Element by element -----------------------------------------------------------------------


@pytest.mark.parametrize("activation", cuda.ACTIVATIONS)
def test_bias_and_activation(activation, order, rng):
    x, bias, g = normal(rng, 3, 5, 7), normal(rng, 5), normal(rng, 3, 5, 7)
    z = (x + bias[:, None]).astype(np.float64)
    y, slope = {
        "linear": (z, np.ones_like(z)),
        "relu": (np.maximum(z, 0), z > 0),
        "tanh": (np.tanh(z), 1 - np.tanh(z) ** 2),
        "sigmoid": (1 / (1 + np.exp(-z)), np.exp(-z) / (1 + np.exp(-z)) ** 2),
    }[activation]
    got = cuda.bias_activation(x, bias, activation)
    close(got, y)
    close(cuda.activation_gradient(g, got, activation), g * slope)


@pytest.mark.parametrize(
    "dim, parameters",
    [((0, 2, 3), (1, 6, 1, 1)), ((-2, -1), (4, 5)), ((2, 3), None), ((1, 2, 3), (6, 4, 5))],
)
def test_normalisation(dim, parameters, order, rng):
    x, g = normal(rng, 7, 6, 4, 5) * 2 + 1, normal(rng, 7, 6, 4, 5)
    weight, bias = (None if parameters is None else normal(rng, *parameters) for _ in range(2))
    assert cuda.can_standardize(x, weight, bias, dim)
    close(
        cuda.standardize(x, weight, bias, dim=dim), formula("standardize", x, weight, bias, dim=dim)
    )
    wanted = gradients("standardize", g, x, weight, bias, dim=dim)
    dx, dweight, dbias = cuda.standardize_gradient(g, x, weight, dim=dim)
    close(dx, wanted[0])
    if dim == (0, 2, 3):
        close(dweight, wanted[1].ravel())
        close(dbias, wanted[2].ravel())


def test_normalisation_refuses_what_it_has_no_kernel_for(rng):
    x = normal(rng, 3, 4, 5)
    assert not cuda.can_standardize(x, None, None, (1,))
    assert not cuda.can_standardize(x, normal(rng, 3, 4, 5), None, (1, 2))


@pytest.mark.parametrize("size", [1, 8, 9, 2051])
def test_random_numbers_have_the_bits_of_numpy(size, order, rng):
    for key in (Key(0, 0), Key(7, 3), Key(2**63 + 5, 2**40), Key(2**100 + 1, 1)):
        wanted = uniform_on_cpu(key, size)
        assert (cuda.uniform(key, size, wanted) == wanted).all()
        x = normal(rng, size)
        for p in (0.0, 0.3, 1.0):
            assert (cuda.dropout(x, p=p, key=key) == registry["dropout"](x, p=p, key=key)).all()


SGD = [{}, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
       {"momentum": 0.5, "dampening": 0.2}]  # fmt: skip


@pytest.mark.parametrize("settings", SGD, ids=str)
def test_sgd(settings, order, rng):
    p, velocity = normal(rng, 300), np.empty(300, np.float32)
    parameter = Tensor(p.copy()).requires_grad_()
    optimizer = optim.SGD([parameter], lr=0.1, **settings)
    for step in range(3):
        g = normal(rng, 300)
        parameter.grad = Tensor(g)
        optimizer.step()
        cuda.sgd(p, g, velocity, lr=0.1, first=step == 0, **settings)
        close(p, parameter.numpy(), 1e-6)


@pytest.mark.parametrize("kind", [optim.Adam, optim.AdamW])
def test_adam(kind, order, rng):
    p, m, v = normal(rng, 300), np.zeros(300, np.float32), np.zeros(300, np.float32)
    parameter = Tensor(p.copy()).requires_grad_()
    optimizer = kind([parameter], lr=0.1, weight_decay=0.1)
    for step in range(1, 4):
        g = normal(rng, 300)
        parameter.grad = Tensor(g)
        optimizer.step()
        cuda.adam(
            p, g, m, v, step=step, lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1,
            decoupled=kind.decoupled,
        )  # fmt: skip
        close(p, parameter.numpy(), 1e-5)


def test_affine_warps(order, rng):
    x = normal(rng, 2, 3, 5, 6)
    flip = np.array([[-1, 0, 5], [0, 1, 0]], np.float32)
    shift = np.array([[1, 0, 0.25], [0, 1, -1.5]], np.float32)
    got = cuda.warp_affine(x, np.stack([flip, shift]), fill=0.5)
    assert (got[0] == x[0, :, :, ::-1]).all()
    padded = np.pad(x[1], ((0, 0), (2, 0), (0, 1)), constant_values=0.5)
    across = 0.75 * padded[:, :, :-1] + 0.25 * padded[:, :, 1:]
    close(got[1], (across[:, :5] + across[:, 1:6]) / 2)
    half_size = cuda.warp_affine(x, np.stack([[[2, 0, 0], [0, 2, 0]]] * 2).astype("f"), (2, 3))
    assert (half_size == x[:, :, :4:2, ::2]).all()


# Recurrent layers -------------------------------------------------------------------------


@pytest.mark.parametrize("name, gates, states", [("lstm", 4, 2), ("gru", 3, 1)])
@pytest.mark.parametrize("lengths", [None, [2, 4, 1]])
def test_recurrent_layers(name, gates, states, lengths, order, rng):
    t, n, i, h = 4, 3, 5, 6
    lengths = None if lengths is None else np.array(lengths)
    shapes = (gates * h, i), (gates * h, h), (gates * h,), (gates * h,)
    inputs = [normal(rng, *shape) for shape in ((t, n, i), *[(n, h)] * states, *shapes)]
    out = getattr(cuda, name)(*inputs, lengths)
    close(out, formula(name, *inputs, lengths))
    g = normal(rng, *out.shape)
    wanted = gradients(name, g, *inputs, lengths)
    got = getattr(cuda, f"{name}_gradient")(g, out, *inputs, lengths)
    for mine, theirs in zip(got[:-1], wanted, strict=True):
        close(mine() if callable(mine) else mine, theirs)


# Launching --------------------------------------------------------------------------------


def test_arguments_must_fit_exactly():
    kernel = cuda_kernels.load_on_cpu("reduce.cu").get_function("sum_rows")
    x, y, one = np.ones((1, 3), np.float32), np.ones(1, np.float32), np.int32(1)
    for args, what in [
        ((one, one, x), "takes 4 arguments, got 3"),
        ((one, 3, x, y), "argument 1 is int32, got int"),
        ((one, np.int64(3), x, y), "argument 1 is int32, got int64"),
        ((one, one, x.astype(np.float64), y), "argument 2 is float32\\*, got an array of float64"),
    ]:
        with pytest.raises(TypeError, match=what):
            kernel((1,), (256,), args)
    with pytest.raises(ValueError, match="no kernel is called 'sum_columns'; there are sum_parts"):
        cuda_kernels.load_on_cpu("reduce.cu").get_function("sum_columns")


def test_a_launch_that_no_gpu_would_take():
    kernel = cuda_kernels.load_on_cpu("reduce.cu").get_function("sum_rows")
    x, y = np.ones((1, 3), np.float32), np.ones(1, np.float32)
    args = np.int32(1), np.int32(3), x, y
    for grid, block, shared, what in [
        ((1,), (2048,), 0, "1 to 1024 threads, not 2048"),
        ((0,), (256,), 0, "at least one block"),
        ((1, 70000), (256,), 0, "at most 65535 blocks in y"),
        ((1,), (256,), 250 << 10, "at most 227 KB"),
    ]:
        with pytest.raises(RuntimeError, match=what):
            kernel(grid, block, args, shared_mem=shared)
    x, y = np.ones((4, 4), np.float32), np.ones((4, 4), np.float32)
    product = cuda_kernels.load_on_cpu("matmul.cu").get_function("matmul_f32_small")
    four, zero = np.int32(4), np.int64(0)
    args = four, four, four, x, four, np.int32(1), zero, x, four, np.int32(1), zero, y
    with pytest.raises(RuntimeError, match="expects 64 and 26112"):
        product((1,), (64,), args, shared_mem=1024)


def test_a_mistake_is_shown_with_its_line():
    code = cuda_kernels.inlined("reduce.cu").replace("float sum = 0;", "flaot sum = 0;")
    with pytest.raises(cuda_kernels.CompileError, match=r"reduce.cu:\d+.*error.*flaot") as caught:
        cuda_kernels.CpuModule(code)
    assert " | " in str(caught.value)


def test_includes_are_written_out_once():
    code = cuda_kernels.inlined("conv.cu")
    assert code.count("struct Divisor {") == 1 and '#include "gemm' not in code


@pytest.mark.parametrize("file", FILES)
def test_every_kernel_was_launched(file):
    """Runs last: a kernel without a test fails here. (With pytest -k, launch what you select.)"""
    names = set(cuda_kernels.kernel_names(cuda_kernels.inlined(file)))
    assert names
    if launched:
        assert names <= launched, f"no test launches {', '.join(sorted(names - launched))}"
