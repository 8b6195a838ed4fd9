"""A training step on several ranks, in minidl and in PyTorch (DistributedDataParallel over gloo).

    python benchmarks/distributed.py [--ranks 2] [--rounds 15] [--quick]

Starts itself under mpirun. Every rank holds both libraries, with the same networks and batches, one
thread each (or --threads), and they take turns: in each round each does some steps, all ranks
together. A time is the median over the rounds of rank 0's time for a step; a ratio is the median
of the rounds' ratios, PyTorch's time over minidl's: above 1, minidl is the faster. "alone" is the
same part of the batch on each rank, without exchanging gradients: what is left between the two
columns is what communication costs. Writes results/distributed.md beside this file.
"""

from __future__ import annotations

import argparse
import os
import shutil
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


def mlp(nn: ModuleType) -> Any:
    """24 million parameters and little to compute: as much communication as there can be."""
    layers = [nn.Flatten(), nn.Linear(784, 2048), nn.ReLU()]
    for _ in range(5):
        layers += [nn.Linear(2048, 2048), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(2048, 10))


# A row: the network, and the images of a step on all ranks together.
CASES: dict[str, tuple[Callable[[ModuleType], Any], int]] = {
    "default CNN, batch 64": (cnn, 64),
    "default CNN, batch 256": (cnn, 256),
    "MLP of 24 million, batch 64": (mlp, 64),
}


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


def contestants(case: str, rank: int, ranks: int) -> dict[str, Callable[[], None]]:
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
        for how in ("alone", ""):
            network = build(lib.nn)
            forward = network if how else wrap(network)
            steps[f"{name} {how}".strip()] = step_of(lib, network, forward, x, y)
    return steps


def work(rounds: int, seconds: float, threads: int) -> None:
    """A rank's life."""
    import torch

    import minidl
    from minidl import distributed as dist

    ranks = dist.init()
    minidl.set_num_threads(threads)
    torch.set_num_threads(threads)
    torch.distributed.init_process_group("gloo", rank=ranks.rank, world_size=ranks.world_size)
    lines = [
        "| step | minidl, ms | PyTorch, ms | PyTorch / minidl | alone: minidl, ms | PyTorch, ms |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for case in CASES:
        steps = contestants(case, ranks.rank, ranks.world_size)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for round_ in range(rounds):
            for name in list(steps) if round_ % 2 else list(steps)[::-1]:
                steps[name]()
                ranks.barrier()
                started, count = time.perf_counter(), 0
                going = np.ones(1)
                while going[0]:  # rank 0's clock decides for all
                    for _ in range(5):
                        steps[name]()
                    count += 5
                    going[0] = time.perf_counter() - started < seconds
                    ranks.broadcast(going)
                times[name].append((time.perf_counter() - started) / count)
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
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    rounds, seconds = (2, 0.1) if args.quick else (args.rounds, 0.5)
    if args.work:
        return work(rounds, seconds, args.threads)

    sys.path.insert(0, str(Path(__file__).parent))
    from turns import describe_machine, environment

    beside = Path(sys.executable).parent / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun")
    if mpirun is None:
        raise SystemExit("This needs MPI: pip install 'minidl[mpi]'")
    there = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "OMP_WAIT_POLICY": "passive",
    }  # fmt: skip
    if hasattr(os, "geteuid") and os.geteuid() == 0:
        there |= dict.fromkeys(
            ("OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"), "1"
        )  # Open MPI refuses otherwise
    done = subprocess.run(
        [mpirun, "--oversubscribe", "--bind-to", "none", "-n", str(args.ranks), sys.executable,
         *sys.argv, "--work"],
        env=environment(args.threads, there), text=True, stdout=subprocess.PIPE, check=True,
    )  # fmt: skip
    table = done.stdout.strip()
    print(table)
    if not args.quick:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "distributed.md").write_text(
            "# A training step on several ranks\n\n"
            "Written by `benchmarks/distributed.py`, which says how it measures. "
            f"{args.ranks} ranks; {describe_machine(args.threads)}\n\n{table}\n"
        )


if __name__ == "__main__":
    main()
