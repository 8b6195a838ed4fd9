"""Costs on paper: against the algorithms themselves, by hand, and against what was published."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import pytest

import minidl
from minidl import distributed as dist
from minidl import models, nn
from minidl.distributed import aggregation, costs
from minidl.distributed.costs import CLUSTERS, Layer, Link, predict
from minidl.distributed.timeline import play
from tests.test_distributed import mpirun, needs_mpi

LINK = Link(alpha=3e-5, beta=2e-9)


# All-reduce: the formulas against the algorithms, on a network with clocks ----------------------


class Timed:
    """A communicator on which a message takes α + Sβ, and each rank's link carries one message at a
    time in each direction. `clock` is this rank's time."""

    def __init__(self, c: dist.Communicator, link: Link, wires: dict[Any, Any]) -> None:
        self.c, self.link, self.wires = c, link, wires
        self.rank, self.world_size = c.rank, c.world_size
        self.clock = self.out_free = self.in_free = 0.0

    def send(self, x: np.ndarray, dest: int, async_op: bool = False) -> Any:
        starts = max(self.clock, self.out_free)
        self.out_free = starts + x.nbytes * self.link.beta
        self.wires.setdefault((self.rank, dest), []).append(starts + self.link.alpha)
        if not async_op:
            self.clock = self.out_free
        return self.c.send(x, dest, async_op=async_op)

    def recv(self, x: np.ndarray, source: int) -> np.ndarray:
        self.c.recv(x, source)
        arrives = self.wires[source, self.rank].pop(0)
        self.in_free = max(arrives, self.in_free) + x.nbytes * self.link.beta
        self.clock = max(self.clock, self.in_free)
        return x


def seconds(algorithm: str, p: int, floats: int, link: Link) -> float:
    wires: dict[Any, Any] = {}

    def run() -> float:
        c = Timed(dist.init(), link, wires)
        aggregation.ALGORITHMS[algorithm](c, np.ones(floats))  # type: ignore[arg-type]
        return max(c.clock, c.out_free)

    return max(dist.simulate(run, p))


@pytest.mark.parametrize("link", [LINK, Link(1.0, 0.0), Link(0.0, 1.0)])
@pytest.mark.parametrize("p", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("algorithm", aggregation.ALGORITHMS)
def test_formulas_are_those_of_the_algorithms(algorithm, p, link):
    floats = 2400  # so that all pieces are of one length
    found = seconds(algorithm, p, floats, link)
    formula = costs.ALLREDUCE[algorithm](p, 8 * floats, link)
    if algorithm == "tree" and p & (p - 1):  # the last round has fewer messages
        assert 0.5 * formula <= found <= formula
    elif algorithm == "parameter_server" and link.alpha and link.beta:
        assert found == pytest.approx(formula, rel=0.05)  # a worker's α may come on top
    else:
        assert found == pytest.approx(formula, rel=1e-12, abs=1e-15)


def test_what_adding_costs_and_small_messages():
    gamma = Link(0.0, 0.0, 1.0)
    assert costs.ring(4, 100, gamma) == costs.halving_doubling(4, 100, gamma) == 75
    assert costs.tree(8, 100, gamma) == costs.recursive_doubling(8, 100, gamma) == 300
    assert costs.parameter_server(5, 100, gamma) == 400
    assert costs.recursive_doubling(8, 100, LINK) == pytest.approx(3 * (3e-5 + 100 * 2e-9))
    best = {
        n: min(costs.ALLREDUCE, key=lambda a: costs.ALLREDUCE[a](64, n, LINK)) for n in (8, 1e8)
    }
    assert best == {8: "parameter_server", 1e8: "halving_doubling"}
    for size in (1e3, 1e8):  # two levels cost more than one machine, less than all on the slow link
        all_on_one = costs.ring(8, size, CLUSTERS["p100"].inside)
        assert costs.allreduce_seconds(CLUSTERS["p100"], 8, size) == all_on_one
        two = costs.allreduce_seconds(CLUSTERS["p100"], 64, size)
        assert all_on_one < two < all_on_one + costs.ring(64, size, CLUSTERS["p100"].between)


# Calibration ------------------------------------------------------------------------------------


def test_fit():
    sizes = [8, 1024, 65536, 1 << 20, 8 << 20]
    noise = 1 + 0.02 * np.random.default_rng(0).normal(size=5)
    for factors, tolerance in ((np.ones(5), 1e-9), (noise, 0.05)):
        found = costs.fit_link(sizes, [(2e-5 + 8e-9 * s) * f for s, f in zip(sizes, factors)])
        assert found.alpha == pytest.approx(2e-5, rel=tolerance)
        assert found.beta == pytest.approx(8e-9, rel=tolerance)
    for wrong in (([8], [1.0]), ([8, 8], [1.0, 1.0]), ([8, 16], [1.0, 0.0])):
        with pytest.raises(ValueError, match="two sizes and positive times"):
            costs.fit_link(*wrong)


def test_measure():
    def run():
        return costs.measure_link(dist.init(), sizes=(8, 1 << 20), repeats=2)

    found = dist.simulate(run, 3)
    assert len(set(found)) == 1 and found[0].gamma > 0  # all ranks hear of what two measured
    assert 0 <= found[0].alpha < 1 and 0 <= found[0].beta < 1e-6
    with pytest.raises(ValueError, match="mpirun -n 2"):
        costs.measure_link(dist.init())


@needs_mpi
@pytest.mark.mpi
def test_measured_under_mpirun(tmp_path):
    code = f"""
        import sys
        from minidl.cli import main
        sys.argv = ["minidl", "scale", "--measure", "--model", "resnet20", "--gpus", "8",
                    "--out", {str(tmp_path / "scale.png")!r}]
        main()
        """
    done = mpirun(2, code, timeout=90)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("8 GPUs are bound by") == 1 and (tmp_path / "scale.png").exists()


# A network --------------------------------------------------------------------------------------


def test_profile_counts_what_the_definitions_say():
    layers = costs.profile(models.get("cnn"), minidl.zeros(3, 1, 28, 28))
    counted = {x.name: x for x in layers}
    assert sum(x.parameters for x in layers) == 421642
    for name, parameters, operations in [
        ("conv1", 320, 2 * 9 * 1 * 32 * 28 * 28), ("conv2", 18496, 2 * 9 * 32 * 64 * 14 * 14),
        ("fc1", 401536, 2 * 3136 * 128), ("fc2", 1290, 2 * 128 * 10),
    ]:  # fmt: skip
        assert counted[name] == (name, parameters, operations)
    assert list(counted).index("conv1") < list(counted).index("fc2")

    model = nn.Sequential(nn.Sequential(nn.Linear(4, 6), nn.Tanh()), nn.Dropout(), nn.Linear(6, 2))
    assert costs.layer_costs(model, minidl.zeros(2, 4)) == [2 * 4 * 6 + 6, 0, 2 * 6 * 2]
    assert model.training and model[1].training and model[0]._hooks is None


@functools.cache
def resnets() -> dict[str, list[Layer]]:
    """ResNet-101 is ResNet-50 with 17 blocks more like the last of its third stage."""
    fifty = costs.profile(models.get("resnet50"), minidl.zeros(1, 3, 224, 224))
    block = [x for x in fifty if x.name.startswith("layer3.5")]
    after = next(i for i, x in enumerate(fifty) if x.name.startswith("layer4"))
    return {"resnet50": fifty, "resnet101": fifty[:after] + 17 * block + fifty[after:]}


def vgg16() -> list[Layer]:
    """Simonyan & Zisserman 2015, table 1, column D."""
    layers, channels, side = [], 3, 224
    for i, width in enumerate([64, 64, 128, 128, 256, 256, 256, 512, 512, 512, 512, 512, 512]):
        side //= 2 if i in (2, 4, 7, 10) else 1
        operations = 2.0 * 9 * channels * width * side * side
        layers.append(Layer(f"conv{i}", 9 * channels * width + width, operations))
        channels = width
    sizes = [512 * 7 * 7, 4096, 4096, 1000]
    return layers + [Layer("fc", a * b + b, 2.0 * a * b) for a, b in itertools.pairwise(sizes)]


# A step -----------------------------------------------------------------------------------------


def test_a_step_by_hand():
    """Forward 4 s, then backward 2 s, 5 s and 1 s; buckets of 100 bytes; 0.02 s a byte."""
    layers = [Layer("a", 5, 1.0), Layer("b", 30, 5.0), Layer("c", 10, 2.0)]
    step = costs.step_timeline(layers, 12.0, lambda size: 0.02 * size, bucket=100)
    # c has 40 bytes, not enough; b makes it 160 at 4 + 2 + 5 = 11 s; a has 20 at 12 s.
    assert step.buckets == [(160, 11.0, 11.0, pytest.approx(14.2)), (20, 12.0, *approx(14.2, 14.6))]
    assert step.compute == 12 and step.total == pytest.approx(14.6)
    late = costs.step_timeline(layers, 12.0, lambda size: 0.02 * size, 100, overlap=False)
    assert late.total == pytest.approx(12 + 0.02 * 180)
    whole = costs.step_timeline(layers, 12.0, lambda size: 0.02 * size, bucket=1e9)
    assert whole.buckets == [(180, 12.0, 12.0, pytest.approx(15.6))]
    assert costs.step_timeline(layers, 12.0, lambda size: 0.0, 0).total == 12


def approx(*numbers: float) -> list[Any]:
    return [pytest.approx(n) for n in numbers]


def test_the_slowest_of_many():
    rng = np.random.default_rng(0)
    assert costs.slowest(1, 0.1) == pytest.approx(1)
    for p in (2, 8, 64, 512):
        drawn = 1 + 0.1 * rng.normal(size=(4000, p)).max(axis=1)
        assert costs.slowest(p, 0.1) == pytest.approx(drawn.mean(), abs=5e-3)


def test_what_is_lost_is_what_would_be_saved():
    layers = vgg16()
    slow = CLUSTERS["p100"]._replace(between=Link(1e-4, 8e-9))
    p = predict(layers, slow, [64], 32, 150)[0]
    assert p.batch == 64 * 32 and p.images_per_second == pytest.approx(p.batch / p.seconds)
    assert p.efficiency == pytest.approx(p.images_per_second / (64 * 150))
    assert p.bound == "bandwidth" and "faster links" in costs.advice(p)
    fast = slow._replace(between=Link(1e-4, 0.0), inside=slow.inside._replace(beta=0.0))
    better = predict(layers, fast, [64], 32, 150)[0]
    assert p.lost["bandwidth"] == pytest.approx(1 - better.seconds / p.seconds)
    assert predict(layers, slow, [64], 32, 150, jitter=0.0)[0].lost["stragglers"] == 0
    assert predict(layers, slow, [1], 32, 150)[0] == (1, 32, *approx(32 / 150, 150, 1),
        {"latency": 0, "bandwidth": 0, "stragglers": 0}, "computing", predict(
            layers, slow, [1], 32, 150)[0].step)  # fmt: skip
    for error in ({"gpus": [0]}, {"batch": 0}, {"images_per_second": 0.0}):
        with pytest.raises(ValueError, match="are positive"):
            predict(**{"layers": layers, "cluster": slow, "gpus": [8], **error})


# Published --------------------------------------------------------------------------------------
#
# Images a second of one P100: tensorflow.org/performance/benchmarks (2017): Inception-V3 142,
# ResNet-50 219 and 195 (batch 32), VGG-16 154, ResNet-152 91.8; ResNet-101 lies on the line between
# ResNet-50 and -152. Inception-V3: 23.9 M parameters, taken as 48 equal layers.


def published() -> dict[str, tuple[float, float]]:
    """(what was published, what is predicted): scaling efficiency."""
    layers = {**resnets(), "vgg16": vgg16()}
    layers["inception"] = [Layer("", 497_000, 1.0)] * 48
    horovod = {
        name: predict(layers[name], CLUSTERS["p100-pcie"], [512], 64, speed)[0].efficiency
        for name, speed in [("inception", 142), ("resnet101", 129), ("vgg16", 154)]
    }
    one, many = predict(layers["resnet50"], CLUSTERS["p100"], [8, 256], 32, 195, "halving_doubling")
    chainer = predict(layers["resnet50"], CLUSTERS["titanx"], [128], 32)[0].efficiency
    return {
        "Goyal et al. 2017, ResNet-50, 8 to 256": (0.90, many.efficiency / one.efficiency),
        "Horovod, Inception-V3, 512": (0.90, horovod["inception"]),
        "Horovod, ResNet-101, 512": (0.90, horovod["resnet101"]),
        "Horovod, VGG-16, 512": (0.68, horovod["vgg16"]),
        "ChainerMN, ResNet-50, 128": (0.90, chainer),
    }


def test_published_scaling_is_predicted(monkeypatch):
    found = published()
    for said, predicted in found.values():
        assert predicted == pytest.approx(said, abs=0.03), found

    def off() -> bool:
        return any(abs(predicted - said) > 0.03 for said, predicted in published().values())

    timeline, slowest = costs.step_timeline, costs.slowest
    monkeypatch.setattr(costs, "step_timeline", lambda *a: timeline(*a[:-1], False))
    assert off()  # without overlap
    monkeypatch.setattr(costs, "step_timeline", timeline)
    monkeypatch.setattr(costs, "slowest", lambda p, jitter: slowest(p, 0.0))
    assert off()  # as if all GPUs took the same time
    monkeypatch.setattr(costs, "slowest", slowest)
    monkeypatch.setattr(costs, "ring", costs.tree)
    monkeypatch.setitem(costs.ALLREDUCE, "ring", costs.tree)
    assert off()  # all bytes in each of lg p rounds


def test_profiles_are_those_of_the_papers():
    layers = resnets()
    total = {k: [sum(x[i] for x in v) for i in (1, 2)] for k, v in layers.items()}
    assert [total["resnet50"][0], total["resnet101"][0]] == [25557032, 44549160]
    assert total["resnet50"][1] == pytest.approx(2 * 4.09e9, rel=0.01)
    assert total["resnet101"][1] == pytest.approx(2 * 7.80e9, rel=0.01)
    assert sum(x.parameters for x in vgg16()) == 138357544


def test_goyals_bandwidth():
    """Section 4: ResNet-50's 100 MB, an all-reduce of twice that beside a backward pass of 120 ms:
    12.8 Gbit/s of 125 ms, "peak bandwidth"."""
    seconds = costs.ring(1 << 20, 100e6, costs.gigabits(12.8, 0.0))
    assert seconds == pytest.approx(0.125, rel=1e-3)


def test_gpipes_speedup():
    """Huang et al. 2019, table 2, M = 32, against K = 2 and M = 1 (the same as no pipeline): the
    Transformer's equal layers as predicted; AmoebaNet's, which are not equal, cannot reach it."""
    alone = max(e.end for e in play("gpipe", 2, 1, 0.5, 1.0))
    for stages, transformer, amoeba in [(2, 1.8, 1.21), (4, 3.4, 1.84), (8, 6.3, 3.48)]:
        each = 1 / stages / 32
        found = alone / max(e.end for e in play("gpipe", stages, 32, each, 2 * each))
        assert found == pytest.approx(stages * 32 / (32 + stages - 1))
        assert found == pytest.approx(transformer, rel=0.1)
        assert found > amoeba
        # the largest stage that explains AmoebaNet's speed, as a share of the network
        worst = 1 / amoeba
        rest = (1 - worst) / (stages - 1)
        unequal = [rest / 32] * (stages - 1) + [worst / 32]
        slower = play("gpipe", stages, 32, unequal, [2 * t for t in unequal])
        assert alone / max(e.end for e in slower) == pytest.approx(amoeba, rel=0.1)


def test_doubling():
    assert costs.doubling("8:1024") == [8 << i for i in range(8)]
    assert costs.doubling("3:20") == [3, 6, 12] and costs.doubling("1,64,8") == [1, 8, 64]
    for wrong in ("", "8:", "x", "0", "8:4", "-8:8"):
        with pytest.raises(ValueError, match="given as 8:1024"):
            costs.doubling(wrong)
