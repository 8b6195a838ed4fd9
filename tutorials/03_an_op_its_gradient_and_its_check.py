# %% [markdown]
# # 3. An op, its gradient, and its check
#
# An op in minidl is a pair: a formula, and the rule for its gradient, one under the other. Here
# you add an op of your own, see what the engine gets out of the pair, and, most of all, make sure
# that the rule is right, and that a wrong one would be caught.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import minidl
from minidl.op import op, registry, sample
from minidl.ops.elementwise import tanh

FIGURES = Path("runs/tutorials")
FIGURES.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## The formula
#
# We take the log-cosh loss, $\log \cosh x$: near 0 it is $x^2/2$, far away $|x| - \log 2$, so that
# outliers pull less than with a square. Written as it stands it overflows: $\cosh 800$ is too
# large for a float64, and $\cosh 100$ for a float32. With $\cosh x = e^{|x|} (1 + e^{-2|x|}) / 2$
# nothing can.
#
# The parameters are the inputs. (Settings, had it any, would come after a `*`.)

# %%
LOG2 = 0.6931471805599453


@op
def logcosh(x):
    a = abs(x)
    return a + np.log1p(np.exp(-2 * a)) - LOG2


assert logcosh(np.float32(1000.0)) < np.inf
np.testing.assert_allclose(logcosh(np.array([0.0, 0.5, -2.0])), np.log(np.cosh([0, 0.5, 2])))

# %% [markdown]
# Called with arrays, an op is just its formula. Called with a Tensor it records as well, but it has
# no gradient rule yet, and the engine does not guess:

# %%
x = minidl.tensor(np.array([0.5, -2.0]), requires_grad=True)
try:
    logcosh(x).sum().backward()
except RuntimeError as error:
    print(error)
else:
    raise AssertionError("an op without a rule should be refused")

# %% [markdown]
# ## The rule
#
# $\frac{d}{dx} \log\cosh x = \tanh x$. The rule gets `g`, the gradient of the output, and whatever
# else its signature names; it returns one entry per input.
#
# One rule serves two purposes. In an ordinary backward pass it runs on bare arrays, which is fast.
# Under `create_graph=True` it runs on Tensors and is itself recorded, so the gradient can be
# differentiated again. Both work because the body uses nothing but operators and other ops
# (`tanh`, not `np.tanh`).


# %%
@logcosh.gradient
def rule(g, x):
    return (g * tanh(x),)


logcosh(x).sum().backward()
np.testing.assert_allclose(x.grad.numpy(), np.tanh(x.numpy()))

(dx,) = minidl.grad(logcosh(x).sum(), x, create_graph=True)
(ddx,) = minidl.grad(dx.sum(), x)
np.testing.assert_allclose(ddx.numpy(), 1 - np.tanh(x.numpy()) ** 2)  # second order, for free

# %%
at = minidl.linspace(-4, 4, 200, dtype=minidl.float64).requires_grad_()
(first,) = minidl.grad(logcosh(at).sum(), at, create_graph=True)
(second,) = minidl.grad(first.sum(), at)

figure, axes = plt.subplots(figsize=(6, 3.5), layout="constrained")
for curve, label in ((logcosh(at), "log cosh x"), (first, "first derivative"), (second, "second")):
    axes.plot(at.numpy(), curve.numpy(), label=label)
axes.legend()
figure.savefig(FIGURES / "03_logcosh.png", dpi=120)

# %% [markdown]
# ## The check
#
# A wrong gradient does not crash. The network still learns, somewhat worse, and nobody knows why.
# So no rule is believed until it is checked, against finite differences (tutorial 1), in float64,
# along random directions: for random $u$ and $v$,
#
# $$ \Big\langle u, \frac{f(x + \epsilon v) - f(x - \epsilon v)}{2 \epsilon} \Big\rangle
#    = \langle \nabla_x \langle u, f(x) \rangle, v \rangle $$
#
# One number like this tests every entry of the gradient at once.
#
# Each op comes with samples: calls worth checking. From them the test suite derives all its
# checks; an op without samples fails the suite.


# %%
@logcosh.samples
def samples(rng):
    yield sample(rng.normal(size=(3, 4)))
    yield sample(rng.normal(size=(2, 0, 3)))  # an empty batch is a batch


def check(function, order):
    for inputs, settings in function.op.draw_samples(np.random.default_rng(0)):
        tensors = [minidl.tensor(x, requires_grad=True) for x in inputs]
        minidl.gradcheck(lambda *xs: function(*xs, **settings), tensors, order=order)  # noqa: B023


check(logcosh, order=1)
check(logcosh, order=2)
print("logcosh: gradient right, to first and second order")

# %% [markdown]
# ## Checking the check
#
# A check that passes is worth nothing unless a wrong rule fails it. So break the rule on purpose,
# by a tenth of a percent, and by forgetting `g`. (The second is nasty: it is right whenever `g`
# happens to be 1, as in `logcosh(x).sum()`.)

# %%
mutants = {
    "scaled by 1.001": lambda g, x: (g * tanh(x) * 1.001,),
    "forgets g": lambda g, x: (tanh(x) + 0 * g,),
    "wrong sign": lambda g, x: (-g * tanh(x),),
    "zero": lambda g, x: (0 * g,),
}
for name, mutant in mutants.items():
    logcosh.op.rule = mutant
    try:
        check(logcosh, order=1)
    except RuntimeError as error:
        print(f"{name}: caught. {error}"[:150])
    else:
        raise AssertionError(f"the mutant {name!r} was not caught")
    finally:
        logcosh.op.rule = rule
check(logcosh, order=1)

# %% [markdown]
# The suite does this to *every* op of minidl, in `tests/test_ops.py`: scaled by 1.001, each
# gradient must fail its check.
#
# ## What the engine makes of the pair
#
# All of it is in one file. This is what happens when an op is called:

# %%
import minidl.op

source = minidl.source(minidl.op.make_op)
print(source[source.index("    def call(") : source.index("    def gradient(")])

# %% [markdown]
# And this is your rule at work, in a walk:

# %%
t = minidl.tensor(np.array([0.0, 0.0]))
loss = logcosh(x - t).mean()
loss.explain()

# %% [markdown]
# A kernel (C++, CUDA, or just another formula) is an *override* of the formula, never another op:
# same name, same signature, same gradient, and it has to agree with the formula. You choose
# inside a running program:


# %%
@logcosh.kernel("blunt")
def _(x):
    return np.log(np.cosh(x))  # fewer steps, and it overflows


big = np.full(3, 800.0)
with np.errstate(over="ignore"):
    assert np.isinf(logcosh(minidl.tensor(big)).numpy()).all()
with minidl.use("logcosh", "formula"):
    assert np.isfinite(logcosh(minidl.tensor(big)).numpy()).all()
print([row for row in minidl.kernels() if row[0] == "logcosh"])

# %% [markdown]
# To leave no trace in this session, we take the op out of the registry again.

# %%
del registry["logcosh"]

# %% [markdown]
# ## Try this
#
# 1. Write `hypot(x, y)` $= \sqrt{x^2 + y^2}$. Return two thunks
#    (`return lambda: ..., lambda: ...`): each is called only if that input wants its gradient.
#    Use `out` in the rule. What happens at (0, 0)?
# 2. Let `y` broadcast against `x` in your samples. The rule need not know: who undoes the
#    broadcast? (`unbroadcast` in `minidl/autograd.py`.)
# 3. In `rule`, use `np.tanh` in place of `tanh`. What does `check(logcosh, order=2)` say?
# 4. Lower the precision of `check` to float32. `gradcheck` refuses; find out why it is right.
#
# You have read `minidl/op.py`; many more pairs are in `minidl/ops/`. Next:
# `04_training_a_line_a_curve_digits.py`.
