"""A training step on several ranks, in minidl and in PyTorch (DistributedDataParallel over gloo).

    python benchmarks/distributed.py [--ranks 2] [--rounds 15] [--quick]
    python benchmarks/distributed.py --emulated-link [MBIT] [--quick]        (as root)

Starts itself under mpirun. Every rank holds both libraries, with the same networks and batches, one
thread each (or --threads), and they take turns: in each round each does some steps, all ranks
together. A time is the median over the rounds of rank 0's time for a step; a ratio is the median
of the rounds' ratios, PyTorch's time over minidl's: above 1, minidl is the faster. "alone" is the
same part of the batch on each rank, without exchanging gradients: what is left between the two
columns is what communication costs.

With --emulated-link each rank is on a host of its own (a network namespace), and the links carry so
many 10⁶ bits a second (1000). "forward" is a step without the backward pass, "sums" the exchange of
all gradients, in minidl's buckets, and nothing else; "in turn" is a step whose gradients are all in
one bucket, so that the sums come after the backward pass. What can be hidden is the smaller of the
sums and what follows the forward pass; "hidden" is the part of it that is: "in turn" - the step.
A host's one core cannot compute while it copies and adds up what comes over the link. So there is
also a network that is computed elsewhere, as by a GPU: each weight's gradient takes 40 ms of sleep.

Writes results/distributed.md and .json beside this file.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"


def cnn(nn: ModuleType) -> Any:
    """The default CNN of `minidl train`."""
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(3136, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, 10),
    )  # fmt: skip


def mlp(nn: ModuleType, width: int = 2048, depth: int = 5) -> Any:
    """24 million parameters and little to compute: as much communication as there can be."""
    layers = [nn.Flatten(), nn.Linear(784, width), nn.ReLU()]
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 10))


def deep(nn: ModuleType) -> Any:
    """As many in more layers: the gradient of the first, which nothing can hide, is small."""
    return mlp(nn, 1024, 22)


# A row: the network, and the images of a step on all ranks together.
CASES: dict[str, tuple[Callable[[ModuleType], Any], int]] = {
    "default CNN, batch 64": (cnn, 64),
    "default CNN, batch 256": (cnn, 256),
    "MLP of 24 million, batch 64": (mlp, 64),
    "MLP of 24 layers, batch 2048": (deep, 2048),
    "MLP of 24 layers, computed elsewhere": (deep, 2),
}
FOR_LINKS = "MLP of 24 layers"  # as much to compute as to send, there
ELSEWHERE = 0.04  # seconds for a weight's gradient


def step_of(lib: ModuleType, network: Any, forward: Any, x: np.ndarray, y: np.ndarray) -> Any:
    """One training step: the same lines for both libraries."""
    optimizer = lib.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    images, labels = lib.from_numpy(x), lib.from_numpy(y)
    loss_of = lib.nn.CrossEntropyLoss()

    def step() -> None:
        optimizer.zero_grad()
        loss_of(forward(images), labels).backward()
        optimizer.step()

    return step


def contestants(
    case: str, rank: int, ranks: int, in_turn: bool = False
) -> dict[str, Callable[[], None]]:
    import torch

    import minidl
    from minidl import distributed as dist

    build, batch = CASES[case]
    rng = np.random.default_rng(0)
    x = rng.random((batch, 1, 28, 28), dtype=np.float32)[rank::ranks].copy()
    y = rng.integers(0, 10, batch)[rank::ranks].copy()
    steps = {}
    for name, lib, wrap in (
        ("minidl", minidl, dist.DataParallel),
        ("PyTorch", torch, torch.nn.parallel.DistributedDataParallel),
    ):
        for how in ("alone", "", *["in turn"] * in_turn):
            network = build(lib.nn)
            for p in network.parameters():
                if "elsewhere" in case and p.ndim > 1:
                    p.register_hook(lambda g: time.sleep(ELSEWHERE))
            options = {"bucket_cap_mb": 1e6} if how == "in turn" else {}
            forward = network if how == "alone" else wrap(network, **options)
            steps[f"{name} {how}".strip()] = step_of(lib, network, forward, x, y)
    return steps


def add_parts(case: str, steps: dict[str, Callable[[], None]], ranks: Any) -> None:
    """Beside whole steps, their parts: the forward pass, and the sums of gradients alone."""
    import torch

    import minidl
    from minidl import distributed as dist

    build, batch = CASES[case]
    sizes = [b.flat.size for b in dist.DataParallel(build(minidl.nn)).buckets]
    x = np.zeros((batch, 1, 28, 28), np.float32)[ranks.rank :: ranks.world_size].copy()
    y = np.zeros(batch, np.int64)[ranks.rank :: ranks.world_size].copy()
    for name, lib in (("minidl", minidl), ("PyTorch", torch)):
        network, loss_of = build(lib.nn), lib.nn.CrossEntropyLoss()
        images, labels = lib.from_numpy(x), lib.from_numpy(y)
        steps[f"{name} forward"] = lambda n=network, f=loss_of, i=images, t=labels: f(n(i), t)
    arrays = [np.zeros(size, np.float32) for size in sizes]

    def ours() -> None:
        for sums in [ranks.allreduce(a, async_op=True) for a in arrays]:
            sums.wait()

    def theirs() -> None:
        for sums in [torch.distributed.all_reduce(torch.from_numpy(a), async_op=True)
                     for a in arrays]:  # fmt: skip
            sums.wait()

    steps["minidl sums"], steps["PyTorch sums"] = ours, theirs


def measure(
    steps: dict[str, Callable[[], None]], rounds: int, seconds: float, ranks: Any, block: int = 5
) -> dict[str, list[float]]:
    """Seconds of each step in each round."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for round_ in range(rounds):
        for name in list(steps) if round_ % 2 else list(steps)[::-1]:
            for _ in range(2):  # the others have given memory back to the system
                steps[name]()
            ranks.barrier()
            started, count = time.perf_counter(), 0
            going = np.ones(1)
            while going[0]:  # rank 0's clock decides for all
                for _ in range(block):
                    steps[name]()
                count += block
                going[0] = time.perf_counter() - started < seconds
                ranks.broadcast(going)
            times[name].append((time.perf_counter() - started) / count)
    return times


def join(threads: int) -> Any:
    """Both libraries' ranks."""
    import torch

    import minidl
    from minidl import distributed as dist

    ranks = dist.init()
    minidl.set_num_threads(threads)
    torch.set_num_threads(threads)
    torch.distributed.init_process_group("gloo", rank=ranks.rank, world_size=ranks.world_size)
    return ranks


def work_on_link(rounds: int, seconds: float, cases: list[str]) -> None:
    """A rank's life on an emulated host."""
    import torch

    os.environ |= {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29500", "GLOO_SOCKET_IFNAME": "eth0"}
    ranks = join(threads=1)
    lines = [
        "| step | library | ms | alone | in turn | forward | sums | hidden | PyTorch / minidl |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for case in cases:
        steps = contestants(case, ranks.rank, ranks.world_size, in_turn=True)
        add_parts(case, steps, ranks)
        times = measure(steps, rounds, seconds, ranks, block=2)
        for name in ("minidl", "PyTorch"):
            parts = "", "alone", "in turn", "forward", "sums"
            medians = [float(np.median(times[f"{name} {p}".strip()])) for p in parts]
            step, alone, in_turn, forward, sums = medians
            hidden = (in_turn - step) / min(sums, alone - forward)
            ratio = float(np.median(np.divide(times["PyTorch"], times[name])))
            cells = " | ".join(f"{1e3 * t:.1f}" for t in medians)
            lines.append(f"| {case} | {name} | {cells} | {100 * hidden:.0f} % | {ratio:.2f} |")
    torch.distributed.destroy_process_group()
    if ranks.rank == 0:
        print("\n".join(lines))


def on_emulated_link(megabits: int, hosts: int, rounds: int, quick: bool) -> str:
    """The table of `work_on_link`, each rank on a host of its own."""
    import tempfile

    root = Path(__file__).parents[1]
    sys.path.insert(0, str(root))
    from tests.emulated_cluster import cluster, missing

    if why := missing():
        raise SystemExit(f"No hosts can be emulated here: {why}")
    cases = list(CASES)[-1:] if quick else list(CASES)
    arguments = f"{rounds}, {0.1 if quick else 1.0}, {cases}"
    code = f"from benchmarks.distributed import work_on_link; work_on_link({arguments})"
    with tempfile.TemporaryDirectory() as folder, cluster(hosts, megabits, Path(folder)) as there:
        said = there.mpirun(code, timeout=1800).splitlines()
    return "\n".join(line for line in said if line.startswith("|"))


def work(rounds: int, seconds: float, threads: int) -> None:
    """A rank's life."""
    import torch

    ranks = join(threads)
    lines = [
        "| step | minidl, ms | PyTorch, ms | PyTorch / minidl | alone: minidl, ms | PyTorch, ms |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case in [case for case in CASES if not case.startswith(FOR_LINKS)]:
        steps = contestants(case, ranks.rank, ranks.world_size)
        times = measure(steps, rounds, seconds, ranks)
        ratio = np.median(np.divide(times["PyTorch"], times["minidl"]))
        ms = {name: f"{1e3 * np.median(t):.2f}" for name, t in times.items()}
        lines.append(
            f"| {case} | {ms['minidl']} | {ms['PyTorch']} | **{ratio:.2f}** | "
            f"{ms['minidl alone']} | {ms['PyTorch alone']} |"
        )
    torch.distributed.destroy_process_group()
    if ranks.rank == 0:
        print("\n".join(lines))


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1, help="of each rank")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="few rounds, nothing is written")
    parser.add_argument(
        "--emulated-link", type=int, nargs="?", const=1000, metavar="MBIT",
        help="each rank on a host of its own, joined by links of so many 10⁶ bits a second (root)",
    )  # fmt: skip
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    rounds, seconds = (2, 0.1) if args.quick else (args.rounds, 0.5)
    if args.work:
        return work(rounds, seconds, args.threads)

    sys.path.insert(0, str(Path(__file__).parent))
    from turns import describe_machine, environment

    if args.emulated_link:
        part = f"Hosts of one core, links of {args.emulated_link} Mbit/s"
        table = on_emulated_link(args.emulated_link, args.ranks, rounds, args.quick)
    else:
        part = "In one machine's memory"
        table = in_shared_memory(args.ranks, args.threads, environment)
    print(table)
    if args.quick:
        return
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / "distributed.json"
    record = json.loads(file.read_text()) if file.exists() else {}
    machine = f"{args.ranks} ranks; {describe_machine(args.threads, ['torch'])}"
    record[part] = {"machine": machine, "table": table}
    file.write_text(json.dumps(record, indent=1) + "\n")
    lines = ["# A training step on several ranks", "", "Written by `benchmarks/distributed.py`, "
             "which says how it measures."]  # fmt: skip
    for part, found in record.items():
        lines += ["", f"## {part}", "", found["machine"], "", found["table"]]
    (RESULTS / "distributed.md").write_text("\n".join(lines) + "\n")


def in_shared_memory(ranks: int, threads: int, environment: Any) -> str:
    """The table of `work`."""
    from minidl.distributed.launch import find_mpirun

    there = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_WAIT_POLICY": "passive",
    }  # fmt: skip
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        there |= dict.fromkeys(
            ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1"
        )  # Open MPI refuses otherwise
    done = subprocess.run(
        [find_mpirun()[0], "--oversubscribe", "--bind-to", "none", "-n", str(ranks), sys.executable,
         *sys.argv, "--work"],
        env=environment(threads, there), text=True, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    return done.stdout.strip()


if __name__ == "__main__":
    main()
