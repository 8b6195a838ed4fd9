# %% [markdown]
# # 14. One gradient from many ranks
#
# A gradient over a batch is a sum over its samples. Nobody says that one machine must add it up.
# Here four *ranks* (processes that know their number) each take a part of the batch, and must then
# agree on the sum. You see four ways to do it, message by message, what each costs, and how a
# training loop uses the sum.

# %%
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import minidl
import minidl.nn.functional as F
from minidl import distributed as dist
from minidl import nn, optim
from minidl.data import Digits
from minidl.distributed import aggregation, costs
from minidl.distributed.drawing import draw_messages, steps

FIGURES = Path("runs/tutorials")
FIGURES.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## Sums and counts, not means of means
#
# Training's loss is a mean over the batch, so each rank's gradient $g_r$ is that of a mean over its
# $n_r$ samples. The gradient of the whole batch of $N$ samples is
#
# $$ \nabla = \frac{1}{N} \sum_r n_r \, g_r
#    \qquad\text{and not}\qquad \frac{1}{R} \sum_r g_r . $$
#
# The two are equal only if all parts are equally large, and sooner or later one is not: the last
# batch of an epoch rarely divides by the number of ranks.

# %%
digits = Digits()
order = np.random.default_rng(0).permutation(len(digits))
images = np.stack([digits[i][0] for i in order]).reshape(-1, 64).astype(np.float64)
labels = np.array([digits[i][1] for i in order])


def network():
    minidl.manual_seed(0)
    layers = nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)
    return nn.Sequential(*layers).to(minidl.float64)


def gradient(x, y):
    """Of the mean loss over some samples: all parameters', one after the other."""
    model = network()
    F.cross_entropy(model(minidl.tensor(x)), minidl.tensor(y)).backward()
    return np.concatenate([p.grad.numpy().ravel() for p in model.parameters()])


x, y = images[:64], labels[:64]
whole = gradient(x, y)
cuts = [30, 50, 60]  # parts of 30, 20, 10 and 4 samples
parts = list(zip(np.split(x, cuts), np.split(y, cuts)))
sums = sum(len(b) * gradient(a, b) for a, b in parts) / sum(len(b) for _, b in parts)
means = sum(gradient(a, b) for a, b in parts) / len(parts)
print(f"the largest error of a number: sums and counts {abs(sums - whole).max():.0e}, "
      f"mean of means {abs(means - whole).max():.0e} (the gradient's largest: "
      f"{abs(whole).max():.0e})")  # fmt: skip
assert abs(sums - whole).max() < 1e-12 < 1e-3 < abs(means - whole).max()

# %% [markdown]
# ## Ranks that you can watch
#
# `dist.simulate` runs a function as four ranks, which are threads of this process. Exactly one runs
# at a time, so everything happens in the same order every time, and a breakpoint stops them all.
# (With `mpirun -n 4 python script.py` the same function runs in four processes.) A rank knows its
# number, and can send and receive. All else is made of that.


# %%
def hello():
    ranks = dist.init()
    word = np.array([10 * ranks.rank])
    right, left = (ranks.rank + 1) % ranks.world_size, (ranks.rank - 1) % ranks.world_size
    ranks.send(word, right)
    heard = ranks.recv(np.empty_like(word), left)
    return f"rank {ranks.rank} heard {heard} from rank {left}"


print("\n".join(dist.simulate(hello, world_size=4)))

# %% [markdown]
# ## The parameter server
#
# The first idea that everybody has: one rank collects, adds up, and sends the sum back.

# %%
print(minidl.source(aggregation.parameter_server))

# %% [markdown]
# It is right, and slow: everything goes through one rank's link, and the more ranks there are, the
# more there is. A *tree* shares the adding: half of the ranks give theirs to a neighbour, half of
# the rest to the next but one, and so on.

# %%
print(minidl.source(aggregation.tree))

# %% [markdown]
# There are few steps, but still all of the gradient travels in each, and most ranks wait.
#
# ## The ring
#
# Cut the gradient into as many pieces as there are ranks, and let all ranks send at once, each to
# its right neighbour, each another piece.

# %%
print(minidl.source(aggregation.ring))

# %% [markdown]
# To see it, let rank $r$ have the number $2^r$ in each place: then a sum tells who is in it already
# (5 = 1 + 4: ranks 0 and 2), and times 16 to the power of its place it also tells which piece it
# is. `simulate` writes down each message.


# %%
def what(number):
    """(piece, the ranks that are in it)"""
    piece = next(i for i in range(4) if number < 16 ** (i + 1))
    return piece, "".join(str(r) for r in range(4) if int(number) // 16**piece & 1 << r)


def marked():
    ranks = dist.init()
    x = 2.0**ranks.rank * 16.0 ** np.arange(4)
    aggregation.ring(ranks, x)
    return x


trace = []
results = dist.simulate(marked, 4, trace)
holds = [[str(r)] * 4 for r in range(4)]  # whose numbers are in which rank's pieces
for number, step in enumerate(steps(trace), 1):
    for m in step:
        piece, who = what(m.array.item())
        holds[m.dest][piece] = "".join(sorted({*who} | {*holds[m.dest][piece]}))
    print(f"after step {number}:", "   ".join(f"{r}: {' '.join(f'{p:4}' for p in row)}"
                                             for r, row in enumerate(holds)))  # fmt: skip
draw_messages({"ring": trace}, FIGURES / "14_ring.png", columns=3,
              label=lambda m: "piece {}:\n{}".format(*what(m.array.item())))  # fmt: skip
assert all((x == 15 * 16.0 ** np.arange(4)).all() for x in results)  # 1 + 2 + 4 + 8 everywhere
assert all(row == ["0123"] * 4 for row in holds)

# %% [markdown]
# ![the ring, step by step](../runs/tutorials/14_ring.png)
#
# After three steps each rank has one finished piece (rank 0 piece 1), after three more all have
# all. Every rank sends $2 \cdot \frac{3}{4}$ of the gradient. With a thousand ranks it is
# $2 \cdot \frac{999}{1000}$: *no link ever carries more than twice the gradient.* The price is the
# number of steps.
#
# ## Halves and doubles
#
# The fourth way has the ring's bytes and the tree's steps: exchange half with a rank far away, then
# a quarter with one nearer, adding, and the same way back.

# %%
print(minidl.source(aggregation.halving_doubling))

# %% [markdown]
# ## What they cost
#
# We count: in how many steps, one after the other, and how many numbers the busiest rank sends or
# receives. A gradient has 960 numbers here.


# %%
def sum_up(algorithm):
    x = np.full(960, 1.0 + dist.init().rank)
    algorithm(dist.communicator(), x)
    return x


def busiest(trace):
    """The most numbers that one rank has to send, or to receive."""
    ends = [[getattr(m, end) for m in trace] for end in ("source", "dest")]
    sizes = [m.array.size for m in trace]
    return int(max(np.bincount(ranks, sizes).max() for ranks in ends))


counted, traces = {}, {}
for p in (4, 8):
    for name, algorithm in aggregation.ALGORITHMS.items():
        traces[name] = trace = []
        results = dist.simulate(lambda f=algorithm: sum_up(f), p, trace)
        assert all((x == p * (p + 1) / 2).all() for x in results)
        counted[name, p] = len(steps(trace)), busiest(trace)
        print(f"{p} ranks, {name:17} {counted[name, p][0]:3} steps, {counted[name, p][1]:6,} "
              "numbers at the busiest rank")  # fmt: skip
    if p == 4:
        draw_messages(traces, FIGURES / "14_messages.png")
assert counted["ring", 8] == (14, 2 * 7 * 960 // 8)  # 2 (p - 1) steps, 2 (p - 1) / p numbers
assert counted["halving_doubling", 8] == (6, 2 * 7 * 960 // 8)  # 2 lg p steps
assert counted["tree", 8] == (6, 3 * 960) and counted["parameter_server", 8] == (2, 7 * 960)

# %% [markdown]
# ![all four ways, step by step](../runs/tutorials/14_messages.png)
#
# A step costs the *latency* α, however short the message; a byte costs β. On a network of 25 Gbit/s
# with a latency of 20 µs, 64 ranks:

# %%
print(minidl.source(costs.halving_doubling))
link, p = costs.gigabits(25, alpha=20e-6), 64
sizes = np.logspace(2, 9, 50)
figure, axes = plt.subplots(figsize=(5.4, 3.4), layout="constrained")
for name in aggregation.ALGORITHMS:
    axes.plot(sizes, [costs.ALLREDUCE[name](p, size, link) for size in sizes], label=name)
axes.set(xscale="log", yscale="log", xlabel="bytes of the gradient", ylabel="seconds", title=(
    f"{p} ranks, 25 Gbit/s, 20 µs"))  # fmt: skip
axes.legend(frameon=False)
figure.savefig(FIGURES / "14_costs.png", dpi=120)


def seconds(name, size):
    return costs.ALLREDUCE[name](p, size, link)


resnet50 = 4 * 25.6e6  # bytes
for name in aggregation.ALGORITHMS:
    print(f"{name:17} 1 kB: {1e3 * seconds(name, 1e3):7.2f} ms    "
          f"ResNet-50: {1e3 * seconds(name, resnet50):8.1f} ms")  # fmt: skip
assert seconds("ring", 1e3) > 5 * seconds("tree", 1e3)  # short: steps count
assert seconds("parameter_server", resnet50) > 30 * seconds("ring", resnet50)  # long: bytes do

# %% [markdown]
# ![seconds against bytes](../runs/tutorials/14_costs.png)
#
# MPI and NCCL have all of these inside and choose by size and number of ranks. For real work call
# `communicator.allreduce`; what you have read is what it does.
#
# ## DataParallel
#
# Now training. `DataParallel` wraps a network: after `backward()` each parameter's `.grad` is that
# of all ranks' samples together. The loss stays the ordinary mean over the rank's own part. This is
# where a rank's gradient, as soon as it is made, becomes a part of the sum:

# %%
print(minidl.source(dist.DataParallel._take))


# %%
def train(net, steps, rank=0, ranks=1):
    """Batches of 64, of which each rank takes its share; the weights at the end."""
    optimizer = optim.SGD(net.parameters(), 0.3, momentum=0.9)
    for step in range(steps):
        i = 64 * step % 1400
        batch = slice(i + rank, min(i + 64, 1437), ranks)  # the last one has fewer than 64
        optimizer.zero_grad()
        F.cross_entropy(net(minidl.tensor(images[batch])), minidl.tensor(labels[batch])).backward()
        optimizer.step()
    return np.concatenate([p.numpy().ravel() for p in net.parameters()])


def train_as_a_rank():
    ranks = dist.init()
    return train(dist.DataParallel(network()), 60, ranks.rank, ranks.world_size)


model = network()
alone = train(model, 60)
together = dist.simulate(train_as_a_rank, 4)
print(f"weights after 60 steps, four ranks against one: {abs(together[0] - alone).max():.0e} apart")
assert abs(together[0] - alone).max() < 1e-9
assert all((w == together[0]).all() for w in together)  # among ranks: to the bit
right = (model(minidl.tensor(images)).numpy().argmax(axis=1) == labels).mean()
print(f"{right:.1%} of the digits are right")
assert right > 0.9

# %% [markdown]
# All ranks have the same weights to the bit, though each has seen a quarter of the data. That is
# the whole trick: *the same start, the same gradient, the same step*. Nothing but gradients is ever
# exchanged.
#
# Two things make it fast. Gradients lie in *buckets* of some megabytes (few messages, all of them
# long), and a bucket is sent as soon as it is full, while the backward pass goes on with the layers
# before. Communication hides behind computation. On paper, ResNet-50 on 64 GPUs of 2017:

# %%
layers = costs.profile(minidl.models.get("resnet50"), minidl.zeros(1, 3, 224, 224))
cluster = costs.CLUSTERS["p100"]
(hidden,) = costs.predict(layers, cluster, [64])
(exposed,) = costs.predict(layers, cluster, [64], overlap=False)
print(f"{cluster.about}: a step takes {1e3 * hidden.seconds:.0f} ms, and if it first computes and "
      f"then sends {1e3 * exposed.seconds:.0f} ms; {len(hidden.step.buckets)} buckets")  # fmt: skip
assert hidden.seconds < exposed.seconds

# %% [markdown]
# ## Try this
#
# 1. Draw six ranks instead of four. What does `halving_doubling` do with the two too many?
# 2. Break it: let `train_as_a_rank` divide its loss by the number of ranks. Which assert notices?
#    And if rank 2 forgets to call `backward()` once?
# 3. Let rank 3 have a NaN among its images. What does the error say?
# 4. Send less: `aggregation.TopK(0.01)` says only the largest hundredth of the numbers and keeps
#    the rest for the next time. Does training still arrive? And without `error_feedback`?
# 5. `mpirun -n 2 minidl train --data digits` is this tutorial's last part, on two processes. What
#    does `minidl scale --model resnet50 --gpus 8:1024` say bounds it?
#
# The four ways are in `minidl/distributed/aggregation.py`, their costs in
# `minidl/distributed/costs.py`, buckets and counts in `minidl/distributed/data_parallel.py`.
# Next: `15_data_model_or_mapreduce.py`.
