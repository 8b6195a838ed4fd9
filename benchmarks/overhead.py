"""What an op costs beside its arithmetic: minidl's tape against PyTorch eager, on 8×8 float32.

Two chains of small ops, forward and backward, both libraries in turn on one thread; the median
of several runs, in CPU time (so that a busy machine does not decide). A ratio below 1 means that
minidl is faster.

    python benchmarks/overhead.py            # needs torch
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import minidl

CHAINS: dict[str, tuple[int, Callable[..., Any]]] = {
    "x * c + b": (2, lambda x, c, b: x * c + b),
    "tanh(x @ c + b) * c": (4, lambda x, c, b: (x @ c + b).tanh() * c),
    "relu(x - b) / c": (3, lambda x, c, b: (x - b).relu() / c),
}
LIBRARIES: dict[str, Callable[[np.ndarray], Any]] = {
    "minidl": lambda a: minidl.tensor(a, requires_grad=True),
    "torch": lambda a: torch.tensor(a, requires_grad=True),
}


def microseconds_per_op(library: str, chain: str, repeats: int = 60) -> np.ndarray:
    """(2,): forward and backward, of one chain of ops."""
    ops, step = CHAINS[chain]
    leaf = LIBRARIES[library]
    x, c, b = (leaf(np.full((8, 8), v, np.float32)) for v in (0.5, 0.9, 0.01))
    start = time.thread_time()
    for _ in range(repeats):
        x = step(x, c, b)
    loss = x.sum()
    middle = time.thread_time()
    loss.backward()
    end = time.thread_time()
    return np.array([middle - start, end - middle]) * 1e6 / (repeats * ops)


def frozen_ratio(runs: int) -> float:
    """Backward of a 10×512 MLP: to the input only, over to everything (ratio of medians)."""
    from minidl import nn

    model = nn.Sequential(*[m for _ in range(10) for m in (nn.Linear(512, 512), nn.Tanh())])
    times: dict[bool, list[float]] = {True: [], False: []}
    for i in range(2 * runs + 2):
        frozen = bool(i % 2)
        for p in model.parameters():
            p.requires_grad_(not frozen)
        x = minidl.randn(256, 512, requires_grad=True)
        loss = model(x).sum()
        start = time.thread_time()
        loss.backward()
        if i >= 2:
            times[frozen].append(time.thread_time() - start)
    return float(np.median(times[True]) / np.median(times[False]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--runs", type=int, default=200)
    runs = parser.parse_args().runs
    torch.set_num_threads(1)
    print(f"{'chain':22}{'library':9}{'forward':>9}{'backward':>10}   µs per op (median)")
    ratios = []
    for chain in CHAINS:
        samples: dict[str, list[np.ndarray]] = {library: [] for library in LIBRARIES}
        for _ in range(runs):
            for library in LIBRARIES:
                samples[library].append(microseconds_per_op(library, chain))
        medians = {library: np.median(rows, axis=0) for library, rows in samples.items()}
        for library, (forward, backward) in medians.items():
            print(f"{chain:22}{library:9}{forward:9.2f}{backward:10.2f}")
        ratios.append(medians["minidl"].sum() / medians["torch"].sum())
        print(f"{chain:22}minidl / torch: {ratios[-1]:.2f}")
    print(f"geometric mean of minidl / torch: {np.exp(np.mean(np.log(ratios))):.2f}")
    print(f"10×512 MLP, backward with everything frozen / full: {frozen_ratio(runs // 10):.2f}")


if __name__ == "__main__":
    main()
