# %% [markdown]
# # 2. The tape
#
# Backpropagation is the chain rule plus bookkeeping. The chain rule is easy; the bookkeeping is
# where home-made engines go wrong. Here you write the obvious version, watch it give a wrong
# answer, mend it, watch it take forever, and then read how minidl walks.

# %%
import gc
import time
import weakref
from pathlib import Path

import numpy as np

import minidl

FIGURES = Path("runs/tutorials")
FIGURES.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## What is on the tape
#
# Whenever an op computes something from a tensor that wants a gradient, it leaves a *node*: which
# op it was, and for each input an *edge* that says where that input's gradient has to go.

# %%
a = minidl.tensor(np.array([1.0, 2.0]), requires_grad=True)
b = a * 3.0
c = b.exp()
d = b + c

for name, tensor in {"b": b, "c": c, "d": d}.items():
    print(f"{name}: {tensor.node}, edges {tensor.node.edges}")
assert d.node.edges == [b.node, c.node]  # two edges back, to the steps that made b and c
assert b.node.edges[0] is a  # here the tape ends: a is a leaf

# %%
drawing = minidl.draw(d)
drawing.save(FIGURES / "02_tape.svg")
drawing

# %% [markdown]
# ## The obvious walk
#
# "To go backward from a node: add what arrives to its gradient, then send each input its share."
# That is a recursive function of five lines. We try it on addition, whose rule is the simplest of
# all: both inputs get what arrives.


# %%
class Number:
    def __init__(self, value, inputs=()):
        self.value, self.inputs, self.grad = value, inputs, 0.0

    def __add__(self, other):
        return Number(self.value + other.value, (self, other))


def naive_backward(node, g=1.0):
    node.grad += g
    for x in node.inputs:
        naive_backward(x, node.grad)


p, q = Number(1.0), Number(2.0)
r = p + q
naive_backward(r)
assert p.grad == q.grad == 1.0  # right

# %% [markdown]
# It works, so it ships. Now use a number twice: `b = a + a; c = b + b`. So `c` is `4 a`, and the
# derivative is 4.

# %%
a = Number(1.0)
b = a + a
c = b + b
naive_backward(c)
print(f"dc/da should be 4, the naive walk says {a.grad}")
assert a.grad == 6.0, "the naive walk was wrong in another way before"

# %% [markdown]
# Six! `b` is visited twice, once for each of its uses in `c`. At the first visit its gradient is
# 1, and it sends 1 + 1 to `a`. At the second visit its gradient has grown to 2, and it sends
# 2 + 2: the first visit's share is sent *again*. (Well-known small engines had this very bug.)
#
# One can mend it by sending on only what is new, `g` in place of `node.grad`:


# %%
visits = 0


def patient_backward(node, g=1.0):
    global visits
    visits += 1
    node.grad += g
    for x in node.inputs:
        patient_backward(x, g)


a = Number(1.0)
b = a + a
c = b + b
patient_backward(c)
assert a.grad == 4.0  # right

# %% [markdown]
# Right, but now every *path* is walked on its own, and paths multiply. Each further doubling
# doubles the time:

# %%
for doublings in (4, 8, 12, 16):
    a = x = Number(1.0)
    for _ in range(doublings):
        x = x + x
    visits = 0
    patient_backward(x)
    assert a.grad == 2.0**doublings
    print(f"{doublings:2} doublings, {doublings:2} ops: {visits:7,} visits")
assert visits == 2**17 - 1

# %% [markdown]
# 50 doublings would take a month. And there is a third trouble: recursion goes as deep as the
# computation, and Python stops at about a thousand calls.

# %%
x = Number(1.0)
for _ in range(10_000):
    x = x + Number(0.0)
try:
    patient_backward(x)
except RecursionError:
    print("10,000 ops in a row: RecursionError")
else:
    raise AssertionError("this Python recurses deeper than expected")

# %% [markdown]
# ## The walk that is right
#
# All three troubles have one cause: a node passes its gradient on *before it is complete*. So:
# **a node's turn comes when all of its users have had theirs.** Then its gradient is the full sum,
# and it is passed on once. Which order is that? The nodes are numbered in the order of their
# making, and whatever uses a node was made after it: **the youngest first** will do.

# %%
from minidl import autograd

print(minidl.source(autograd.explore))
print()
print(minidl.source(autograd.walk))
assert "for node in nodes" in minidl.source(autograd.walk)

# %% [markdown]
# `explore` finds the nodes and sorts them by number. `walk` takes one after the other, calls its
# rule, and adds what comes back to each input's `total`. No recursion, and each node exactly once.
# (The leaves have no number; their uses are counted, so that a leaf is known to be complete while
# the walk goes on.)

# %%
a = minidl.tensor(np.float64(1.0), requires_grad=True)
b = a + a
c = b + b
c.backward()
assert a.grad.item() == 4.0

a = x = minidl.tensor(np.float64(1.0), requires_grad=True)
for _ in range(50):
    x = x + x
start = time.perf_counter()
x.backward()
print(f"50 doublings: gradient {a.grad.item():.3g} in {time.perf_counter() - start:.1e} s")
assert a.grad.item() == 2.0**50

a = x = minidl.tensor(np.float64(1.0), requires_grad=True)
for _ in range(100_000):
    x = x + 1.0
start = time.perf_counter()
x.backward()
print(f"100,000 ops in a row: {time.perf_counter() - start:.2f} s")
assert a.grad.item() == 1.0

# %% [markdown]
# Look at it in slow motion. The node of `b` comes once, with the gradient 2 complete:

# %%
a = minidl.tensor(np.float64(1.0), requires_grad=True)
b = a + a
c = b + b
c.explain()
c.explain(FIGURES / "02_walk.html")
assert a.grad is None  # explain() only looks

# %% [markdown]
# ## What the tape keeps
#
# A rule sees only what its signature names, and the tape keeps only what the rule names. Addition
# needs nothing but `g`. Multiplication needs its inputs, `exp` its output:

# %%
x = minidl.tensor(np.array([1.0, 2.0]), requires_grad=True)
for y in (x + 1.0, x * x, x.exp()):
    print(f"{y.node}: {minidl.source(y.node.op.rule).splitlines()[1]:28} keeps {y.node.saved}")
assert not (x + 1.0).node.saved
assert len(x.exp().node.saved) == 1

# %% [markdown]
# Nodes point backward only. Drop the last tensor, or call `backward()`, and everything behind it
# is gone; this is why training does not fill the memory. (A second `backward()` over the same
# tape is an error that says so.)

# %%
loss = (x * x).exp().sum()
node = weakref.ref(loss.node.edges[0])
assert node() is not None
loss.backward()
gc.collect()
assert node() is None, "the tape should be gone after backward()"
try:
    loss.backward()
except RuntimeError as error:
    print(error)
else:
    raise AssertionError("a second backward() should be refused")

# %% [markdown]
# ## Try this
#
# 1. Mend the naive walk in another way: sort the numbers so that users come before what they use
#    (depth-first, reversed), then let each pass on its gradient once. Is depth still a problem?
# 2. Instead of sorting, count how often each node is used, and take a node once its count is down
#    to none (Kahn 1962). Is the result the same? Which of the two finds a loop in the graph?
# 3. `x.exp()` keeps its output, `x * x` its inputs. Which of the two would you choose for
#    `sqrt`? Look into `minidl/ops/elementwise.py`.
# 4. Draw something larger, such as five steps of `h = (h @ w).tanh()`, and find the shared leaf.
#
# What you have read is `minidl/autograd.py`. Next: `03_an_op_its_gradient_and_its_check.py`.
