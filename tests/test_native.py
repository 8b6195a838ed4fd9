"""The C++ kernels against plain formulas in float64.

The bound. A sum of K products in floating point, in any order and cut in any way, differs from the
true one by at most K·u/(1 − K·u) · Σ|aᵢ·bᵢ| (N. Higham, *Accuracy and Stability of Numerical
Algorithms*, section 3.1), u = 2⁻²⁴ for float32 and 2⁻⁵³ for float64. So the oracle computes the sum
and, from the absolute values, the bound of every single element; the tests add nothing to it but
one rounding of the result.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("minidl._native", reason="the C++ kernels are not built")
from minidl import _native

Array = np.ndarray[Any, Any]
checked = settings(deadline=None, max_examples=150, derandomize=True)


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    before = _native.get_num_threads()
    yield
    _native.set_num_threads(before)


# ---- Oracles --------------------------------------------------------------------------------


class Conv(NamedTuple):
    """A convolution's geometry; `x`, `w` and `y` are shapes."""

    x: tuple[int, int, int, int]
    w: tuple[int, int, int, int]
    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int

    @property
    def y(self) -> tuple[int, int, int, int]:
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(
                self.x[2:], self.w[2:], self.stride, self.padding, self.dilation
            )
        ]
        return (self.x[0], self.w[0], size[0], size[1])

    @property
    def options(self) -> tuple[Any, ...]:
        return self.stride, self.padding, self.dilation, self.groups


def taps(conv: Conv, padded: Array) -> Iterator[tuple[int, int, Array]]:
    """For each tap of the kernel: the view of the padded image that it is multiplied with."""
    (kh, kw), (sh, sw), (dh, dw) = conv.w[2:], conv.stride, conv.dilation
    oh, ow = conv.y[2:]
    for r in range(kh):
        for s in range(kw):
            rows = slice(r * dh, r * dh + (oh - 1) * sh + 1, sh)
            yield r, s, padded[:, :, rows, s * dw : s * dw + (ow - 1) * sw + 1 : sw]


def pad(conv: Conv, x: Array) -> Array:
    (ph, pw) = conv.padding
    return np.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))


def split(a: Array, axis: int, groups: int) -> Array:
    """Axis `axis` as (groups, the rest)."""
    return a.reshape(*a.shape[:axis], groups, a.shape[axis] // groups, *a.shape[axis + 1 :])


def conv2d(conv: Conv, x: Array, w: Array) -> Array:
    y = np.zeros(split(np.empty(conv.y), 1, conv.groups).shape)
    w = split(w, 0, conv.groups)
    for r, s, part in taps(conv, pad(conv, x)):
        y += np.einsum("ngchw,goc->ngohw", split(part, 1, conv.groups), w[..., r, s])
    return y.reshape(conv.y)


def conv2d_input(conv: Conv, g: Array, w: Array) -> Array:
    padded = pad(conv, np.zeros(conv.x))
    w, g = split(w, 0, conv.groups), split(g, 1, conv.groups)
    for r, s, part in taps(conv, padded):
        part += np.einsum("ngohw,goc->ngchw", g, w[..., r, s]).reshape(part.shape)
    (ph, pw), (h, wd) = conv.padding, conv.x[2:]
    return padded[:, :, ph : ph + h, pw : pw + wd]


def conv2d_weight(conv: Conv, g: Array, x: Array) -> Array:
    gw = np.zeros(split(np.empty(conv.w), 0, conv.groups).shape)
    g = split(g, 1, conv.groups)
    for r, s, part in taps(conv, pad(conv, x)):
        gw[..., r, s] = np.einsum("ngohw,ngchw->goc", g, split(part, 1, conv.groups))
    return gw.reshape(conv.w)


def check(
    result: Array,
    formula: Callable[[Array, Array], Array],
    a: Array,
    b: Array,
    k: int,
    bias: Array | None = None,
) -> None:
    """`result` is `formula(a, b)`, sums of at most `k` products, within their error bound.

    A `bias` was added to each channel of `result`.
    """
    u = np.finfo(a.dtype).eps / 2
    exact = formula(a.astype(np.float64), b.astype(np.float64))
    size = formula(abs(a).astype(np.float64), abs(b).astype(np.float64))
    if bias is not None:
        exact, size, k = exact + bias[:, None, None], size + abs(bias[:, None, None]), k + 1
    bound = k * u / (1 - k * u) * size + u * abs(exact)
    if a.dtype == np.float64:
        bound *= 2  # the oracle rounds as well
    assert result.shape == exact.shape
    assert result.dtype == a.dtype
    assert (abs(result - exact) <= bound).all()


# ---- Random cases ---------------------------------------------------------------------------

pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))


@st.composite
def convs(draw: st.DrawFn) -> Conv:
    groups = draw(st.sampled_from([1, 1, 1, 2, 3]))
    n = draw(st.integers(0, 3))
    c, o = groups * draw(st.integers(1, 9)), groups * draw(st.sampled_from([1, 2, 5, 7, 17, 33]))
    stride, dilation = draw(pairs), draw(pairs)
    padding = draw(st.tuples(st.integers(0, 3), st.integers(0, 3)))
    kernel = draw(st.tuples(st.integers(1, 4), st.integers(1, 4)))
    h, w = (
        draw(st.integers(max(1, d * (k - 1) + 1 - 2 * p), 20))
        for k, d, p in zip(kernel, dilation, padding)
    )
    return Conv((n, c, h, w), (o, c // groups, *kernel), stride, padding, dilation, groups)


def strided(rng: np.random.Generator, shape: tuple[int, ...], dtype: type, layout: str) -> Array:
    """Random numbers of that shape, in memory as `layout` says."""
    a = rng.standard_normal(shape).astype(dtype)
    if layout == "reversed axes":
        return np.asfortranarray(a)
    if layout == "every second":
        wide = np.zeros((*shape[:-1], 2 * shape[-1]), dtype)
        wide[..., ::2] = a
        return wide[..., ::2]
    if layout == "negative":
        return np.ascontiguousarray(a[..., ::-1])[..., ::-1]
    if layout == "unaligned":
        buffer = np.zeros(a.nbytes + 1, np.uint8)
        out = buffer[1:].view(dtype).reshape(shape)
        out[...] = a
        return out
    a.flags.writeable = False
    return a


layouts = st.sampled_from(["plain", "reversed axes", "every second", "negative", "unaligned"])
dtypes = st.sampled_from([np.float32, np.float64])


@checked
@given(convs(), dtypes, layouts, layouts, st.integers(0, 2**32))
def test_conv2d_and_its_adjoints(conv: Conv, dtype: type, one: str, two: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    x, w = strided(rng, conv.x, dtype, one), strided(rng, conv.w, dtype, two)
    g = strided(rng, conv.y, dtype, one)
    c, o = conv.w[1], conv.w[0] // conv.groups
    kernel, pixels = conv.w[2] * conv.w[3], conv.y[2] * conv.y[3]
    bias = strided(rng, conv.w[:1], dtype, two) if seed % 2 else None
    check(
        _native.conv2d(x, w, bias, *conv.options),
        lambda a, b: conv2d(conv, a, b),
        x,
        w,
        c * kernel,
        bias,
    )
    check(
        _native.conv2d_input(g, w, conv.x[2:], *conv.options),
        lambda a, b: conv2d_input(conv, a, b), g, w, o * kernel,
    )  # fmt: skip
    check(
        _native.conv2d_weight(g, x, conv.w[2:], *conv.options),
        lambda a, b: conv2d_weight(conv, a, b), g, x, max(1, conv.x[0] * pixels),
    )  # fmt: skip


@checked
@given(convs(), st.integers(0, 2**32))
def test_adjointness(conv: Conv, seed: int) -> None:
    """<conv(x, w), g> == <x, conv_input(g, w)> == <w, conv_weight(g, x)>."""
    rng = np.random.default_rng(seed)
    x, w, g = (rng.standard_normal(shape) for shape in (conv.x, conv.w, conv.y))
    y = _native.conv2d(x, w, None, *conv.options)
    gx = _native.conv2d_input(g, w, conv.x[2:], *conv.options)
    gw = _native.conv2d_weight(g, x, conv.w[2:], *conv.options)
    size = conv2d(conv, abs(x), abs(w))
    bound = 2e-16 * (size * abs(g)).sum() * (g.size + w.size + x.size + 100)
    assert abs((y * g).sum() - (x * gx).sum()) <= bound
    assert abs((y * g).sum() - (w * gw).sum()) <= bound


# Shapes that fill whole blocks: several depths of the sum, many panels, several chunks, images
# that share a panel, one image alone, large steps between taps.
LAYERS = [
    Conv((5, 40, 9, 11), (70, 40, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    Conv((17, 130, 4, 4), (130, 130, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    Conv((3, 300, 8, 9), (50, 300, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    Conv((2, 20, 30, 33), (24, 20, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    Conv((1, 3, 60, 61), (16, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1),
    Conv((2, 8, 40, 40), (8, 8, 3, 3), (1, 1), (12, 12), (12, 12), 1),
    Conv((2, 6, 70, 70), (30, 6, 1, 1), (3, 3), (0, 0), (1, 1), 1),
    Conv((4, 48, 17, 17), (48, 1, 3, 3), (1, 1), (1, 1), (1, 1), 48),
    Conv((3, 7, 18, 41), (14, 1, 3, 5), (2, 3), (4, 1), (2, 1), 7),
    Conv((2, 1, 19, 19), (2, 1, 20, 20), (1, 1), (2, 2), (1, 1), 1),
]


@pytest.mark.parametrize("conv", LAYERS, ids=lambda c: f"{c.x}*{c.w}/{c.stride[0]}")
def test_layers_and_threads(conv: Conv) -> None:
    """Layers of some size; and the same bits with one, two and three threads."""
    rng = np.random.default_rng(0)
    x, w, g = (rng.standard_normal(s).astype(np.float32) for s in (conv.x, conv.w, conv.y))
    runs = []
    for n in (1, 2, 3):
        _native.set_num_threads(n)
        assert _native.get_num_threads() == n
        y = _native.conv2d(x, w, None, *conv.options)
        gx = _native.conv2d_input(g, w, conv.x[2:], *conv.options)
        gw = _native.conv2d_weight(g, x, conv.w[2:], *conv.options)
        runs.append((y.tobytes(), gx.tobytes(), gw.tobytes()))
    assert runs[0] == runs[1] == runs[2]
    k, (n, _, oh, ow) = conv.w[2] * conv.w[3], conv.y
    check(y, lambda a, b: conv2d(conv, a, b), x, w, conv.w[1] * k)
    check(gx, lambda a, b: conv2d_input(conv, a, b), g, w, conv.w[0] // conv.groups * k)
    check(gw, lambda a, b: conv2d_weight(conv, a, b), g, x, n * oh * ow)


def test_a_wrong_kernel_would_be_noticed() -> None:
    """The bound is tight enough to see an error of one part in a thousand."""
    conv = LAYERS[0]
    rng = np.random.default_rng(0)
    x, w = (rng.standard_normal(s).astype(np.float32) for s in (conv.x, conv.w))
    y = _native.conv2d(x, w, None, *conv.options)
    with pytest.raises(AssertionError):
        check(y * np.float32(1.001), lambda a, b: conv2d(conv, a, b), x, w, 360)


# ---- matmul ---------------------------------------------------------------------------------


@checked
@given(
    st.tuples(*[st.sampled_from([0, 1, 2, 5, 16, 33, 97, 300])] * 3), dtypes, layouts, layouts,
    st.integers(0, 2**32),
)  # fmt: skip
def test_matmul(mnk: tuple[int, int, int], dtype: type, one: str, two: str, seed: int) -> None:
    m, n, k = mnk
    rng = np.random.default_rng(seed)
    a, b = strided(rng, (m, k), dtype, one), strided(rng, (k, n), dtype, two)
    check(_native.matmul(a, b), np.matmul, a, b, max(1, k))


@pytest.mark.parametrize("k", [0, 7, 700])
def test_matmul_with_bias(k: int) -> None:
    """To the bit what adding the bias afterwards gives."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((33, k), np.float32), rng.standard_normal((k, 50), np.float32)
    bias = strided(rng, (50,), np.float32, "every second")
    np.testing.assert_array_equal(_native.matmul(a, b, bias), _native.matmul(a, b) + bias)


@pytest.mark.parametrize("shape", [(64, 3136, 128), (1, 4096, 300), (200, 700, 1), (500, 513, 514)])
def test_matmul_and_threads(shape: tuple[int, int, int]) -> None:
    m, k, n = shape
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((m, k), np.float32), rng.standard_normal((n, k), np.float32).T
    runs = []
    for count in (1, 2, 3):
        _native.set_num_threads(count)
        runs.append(_native.matmul(a, b))
    assert runs[0].tobytes() == runs[1].tobytes() == runs[2].tobytes()
    check(runs[0], np.matmul, a, b, k)


# ---- Pooling --------------------------------------------------------------------------------


def max_pool2d(
    x: Array, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int],
    dilation: tuple[int, int],
) -> tuple[Array, Array]:  # fmt: skip
    """PyTorch's rule, loop by loop: larger wins, NaN wins, the first of equals stays."""
    h, w = x.shape[2:]
    oh, ow = (
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip((h, w), kernel, stride, padding, dilation)
    )
    y = np.full((*x.shape[:2], oh, ow), -np.inf, x.dtype)
    index = np.full(y.shape, -1, np.int32)
    for at in np.ndindex(*y.shape):
        for r, s in np.ndindex(*kernel):
            row = at[2] * stride[0] - padding[0] + r * dilation[0]
            col = at[3] * stride[1] - padding[1] + s * dilation[1]
            if 0 <= row < h and 0 <= col < w:
                v = x[at[0], at[1], row, col]
                if index[at] < 0 or v > y[at] or np.isnan(v):
                    y[at], index[at] = v, row * w + col
    return y, index


@st.composite
def pools(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[Any, ...]]:
    if draw(st.booleans()):  # the common case has a path of its own
        size = draw(st.tuples(st.integers(2, 21), st.integers(2, 21)))
        return (draw(st.integers(0, 2)), 3, *size), ((2, 2), (2, 2), (0, 0), (1, 1))
    kernel, stride = draw(pairs), draw(pairs)
    padding = (draw(st.integers(0, kernel[0] // 2)), draw(st.integers(0, kernel[1] // 2)))
    size = (draw(st.integers(5, 9)), draw(st.integers(5, 9)))
    return (2, 2, *size), (kernel, stride, padding, draw(pairs.filter(lambda p: max(p) < 3)))


@checked
@given(pools(), dtypes, st.integers(0, 2**32))
def test_max_pool2d(pool: tuple[tuple[int, ...], tuple[Any, ...]], dtype: type, seed: int) -> None:
    shape, options = pool
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 4, shape).astype(dtype)  # many ties
    x[rng.random(shape) < 0.05] = np.nan
    x[rng.random(shape) < 0.3] = -np.inf
    y, index = _native.max_pool2d(x, *options)
    want_y, want_index = max_pool2d(x, *options)
    np.testing.assert_array_equal(y, want_y)
    np.testing.assert_array_equal(index, want_index)
    assert y.dtype == dtype and index.dtype == np.int32

    g = rng.integers(-8, 8, y.shape).astype(dtype)  # sums of small integers are exact
    gx = _native.max_pool2d_input(g, index, shape[2:])
    want = np.zeros((shape[0] * shape[1], shape[2] * shape[3]), dtype)
    planes = (len(want), y.shape[2] * y.shape[3])
    for plane, (i, v) in enumerate(zip(index.reshape(planes), g.reshape(planes))):
        np.add.at(want[plane], i, v)
    np.testing.assert_array_equal(gx, want.reshape(shape))


def test_max_pool2d_input_refuses_an_index_outside() -> None:
    g = np.ones((1, 1, 1, 2), np.float32)
    for wrong in (-1, 16, 2**31 - 1):
        with pytest.raises(IndexError, match="outside"):
            _native.max_pool2d_input(g, np.array([[[[0, wrong]]]], np.int32), (4, 4))


# ---- Threads --------------------------------------------------------------------------------


def test_concurrent_calls() -> None:
    """Python threads that call kernels at once get what they would get alone."""
    _native.set_num_threads(2)
    rng = np.random.default_rng(0)
    conv = Conv((4, 16, 14, 14), (32, 16, 3, 3), (1, 1), (1, 1), (1, 1), 1)
    xs = rng.standard_normal((4, *conv.x)).astype(np.float32)
    w = rng.standard_normal(conv.w).astype(np.float32)
    alone = [_native.conv2d(x, w, None, *conv.options) for x in xs]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(30):
            if not np.array_equal(_native.conv2d(xs[i], w, None, *conv.options), alone[i]):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in workers:
        t.start()
    for n in (1, 3, 2):  # changing the number of threads meanwhile is allowed
        _native.set_num_threads(n)
    for t in workers:
        t.join()
    assert not wrong


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, text=True,
        capture_output=True, timeout=60,
    )  # fmt: skip


PRODUCT = """
import numpy as np
from minidl import _native
a = np.random.default_rng(0).standard_normal((300, 300), np.float32)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork()")
@pytest.mark.skipif(
    "libtsan" in os.environ.get("LD_PRELOAD", ""),
    reason="ThreadSanitizer does not support new threads after fork()",
)
def test_fork() -> None:
    """A forked child has no worker threads; it makes its own, also in the middle of other work."""
    code = (
        PRODUCT
        + """
import os, threading
_native.set_num_threads(3)
want = _native.matmul(a, a)
stop = False
def busy():
    while not stop:
        _native.matmul(a, a)
t = threading.Thread(target=busy); t.start()
for _ in range(10):
    pid = os.fork()
    if pid == 0:
        ok = all((_native.matmul(a, a) == want).all() for _ in range(3))
        os._exit(0 if ok and _native.get_num_threads() == 3 else 1)
    assert os.waitpid(pid, 0)[1] == 0
stop = True; t.join()
"""
    )
    done = run(code)
    assert done.returncode == 0, done.stderr


def test_number_of_threads_from_the_environment() -> None:
    done = run(PRODUCT + "print(_native.get_num_threads())", MINIDL_NUM_THREADS="3")
    assert done.stdout == "3\n", done.stderr
    if hasattr(os, "sched_getaffinity"):
        environment = {k: v for k, v in os.environ.items() if k != "MINIDL_NUM_THREADS"}
        code = (
            "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
            "from minidl import _native; print(_native.get_num_threads())"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], env=environment, text=True, capture_output=True
        )
        assert done.stdout == "1\n", done.stderr


# ---- Instruction sets -----------------------------------------------------------------------


def test_every_instruction_set() -> None:
    """Each that this machine has gives the right product; another one is refused."""
    a = np.random.default_rng(0).standard_normal((300, 300), np.float32)
    for isa in _native.supported_isas():
        done = run(
            PRODUCT + "print(_native.isa(), _native.matmul(a, a).tobytes().hex())", MINIDL_ISA=isa
        )
        used, product = done.stdout.split()
        assert used == isa
        result = np.frombuffer(bytes.fromhex(product), np.float32).reshape(300, 300)
        check(result, np.matmul, a, a, 300)
    done = run("from minidl.backend import native", MINIDL_ISA="mmx")
    assert done.returncode != 0
    assert "MINIDL_ISA=mmx: this machine can run" in done.stderr


def test_switched_off() -> None:
    code = """
import warnings
from minidl.backend import native
assert native.native is None and "MINIDL_NO_NATIVE" in native.why_missing
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    native.report_missing(); native.report_missing()
assert len(said) == 1, said
"""
    done = run(code, MINIDL_NO_NATIVE="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's malloc alone is told")
@pytest.mark.skipif(bool(_native.sanitizer), reason="a sanitizer has a malloc of its own")
def test_keep_memory() -> None:
    """Large arrays cause page faults when they are made the first time, and then no more."""
    code = """
import resource, numpy as np, minidl
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10): [np.ones(2**19, np.float32) for _ in range(16)]
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""
    kept, given_back = (int(run(code, MINIDL_KEEP_MEMORY=keep).stdout) for keep in "10")
    assert 10 * kept < given_back


@pytest.mark.skipif("MINIDL_SANITIZE" not in os.environ, reason="for tools/sanitize.sh")
def test_the_sanitizer_is_on() -> None:
    assert _native.sanitizer == os.environ["MINIDL_SANITIZE"]


# ---- Bad arguments --------------------------------------------------------------------------

X, W = np.zeros((2, 4, 8, 8), np.float32), np.zeros((6, 4, 3, 3), np.float32)
G = np.zeros((2, 6, 6, 6), np.float32)


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, "x must be float32 or float64, got int64",
         lambda: _native.conv2d(X.astype(np.int64), W)),
        (TypeError, "w must be float32 as x is, got float64",
         lambda: _native.conv2d(X, W.astype(np.float64))),
        (TypeError, "incompatible function arguments", lambda: _native.conv2d(X.tolist(), W)),
        (ValueError, r"x must have 4 dimensions \(N, C, H, W\), got shape \(4, 8, 8\)",
         lambda: _native.conv2d(X[0], W)),
        (ValueError, "x has 4 channels, w expects 3 in each of 1 groups",
         lambda: _native.conv2d(X, W[:, :3])),
        (ValueError, "groups = 4 must be positive and divide the 4 input and the 6 output",
         lambda: _native.conv2d(X, W, groups=4)),
        (ValueError, "groups = 0", lambda: _native.conv2d(X, W, groups=0)),
        (ValueError, r"stride must be at least 1 and less than 2\*\*31, got \(0, 1\)",
         lambda: _native.conv2d(X, W, stride=(0, 1))),
        (ValueError, "padding", lambda: _native.conv2d(X, W, padding=(-1, 0))),
        (ValueError, "dilation", lambda: _native.conv2d(X, W, dilation=(1, 2**31))),
        (ValueError, "the kernel reaches over 9 rows .* more than the 8 of the padded input",
         lambda: _native.conv2d(X, W, dilation=(4, 1))),
        (ValueError, r"g must have the output's shape \(2, 6, 7, 7\), got \(2, 6, 6, 6\)",
         lambda: _native.conv2d_input(G, W, (9, 9))),
        (ValueError, "g must have the output's shape",
         lambda: _native.conv2d_weight(G, X, (2, 2))),
        (ValueError, "groups must be positive",
         lambda: _native.conv2d_input(G, W, (8, 8), groups=-1)),
        (ValueError, "a has 3 columns, b has 2 rows",
         lambda: _native.matmul(np.zeros((2, 3)), np.zeros((2, 3)))),
        (ValueError, r"bias must have shape \(3,\), .* got \(2,\)",
         lambda: _native.matmul(np.zeros((2, 2)), np.zeros((2, 3)), np.zeros(2))),
        (TypeError, "bias must be float64 as a is, got float32",
         lambda: _native.matmul(np.zeros((2, 2)), np.zeros((2, 3)), np.zeros(3, np.float32))),
        (ValueError, "2 dimensions", lambda: _native.matmul(np.zeros(2), np.zeros((2, 3)))),
        (TypeError, "must be float32 or float64, got float16",
         lambda: _native.matmul(np.zeros((2, 2), np.float16), np.zeros((2, 2), np.float16))),
        (ValueError, "lies in the padding alone",
         lambda: _native.max_pool2d(X, (2, 2), (2, 2), (2, 0))),
        (TypeError, "index must be int32, got int64",
         lambda: _native.max_pool2d_input(G, np.zeros(G.shape, np.int64), (8, 8))),
        (ValueError, "g has shape .* index",
         lambda: _native.max_pool2d_input(G, np.zeros((2, 6, 6, 5), np.int32), (8, 8))),
        (ValueError, "expected at least 1, got 0", lambda: _native.set_num_threads(0)),
    ],
)  # fmt: skip
def test_bad_arguments(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()


def test_bytes_of_the_other_order_are_refused() -> None:
    with pytest.raises(TypeError, match="float32"):
        _native.matmul(np.zeros((2, 2), ">f4"), np.zeros((2, 2), ">f4"))


def test_empty_sums_are_zero() -> None:
    x, w = np.zeros((2, 0, 5, 5), np.float32), np.zeros((3, 0, 3, 3), np.float32)
    y = _native.conv2d(x, w)
    assert y.shape == (2, 3, 3, 3) and not y.any()
    assert _native.conv2d_weight(y, x, (3, 3)).shape == (3, 0, 3, 3)
    assert _native.conv2d_input(y, w, (5, 5)).shape == (2, 0, 5, 5)
    gx = _native.conv2d_input(np.zeros((2, 0, 3, 3)), np.zeros((0, 4, 3, 3)), (5, 5))
    assert gx.shape == (2, 4, 5, 5) and not gx.any()
    gw = _native.conv2d_weight(np.zeros((0, 2, 3, 3)), np.zeros((0, 4, 5, 5)), (3, 3))
    assert gw.shape == (2, 4, 3, 3) and not gw.any()
