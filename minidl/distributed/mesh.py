"""A mesh: ranks in rows and columns, for data × pipeline × tensor parallel together.

    mesh = dist.init_mesh(pipeline=2, data=2, tensor=2)       # 8 ranks
    mesh["tensor"]       # the ranks that share this rank's layers: with ColumnParallelLinear, ...
    mesh["pipeline"]     # those that have the other stages for the same samples: Pipeline
    mesh["data"]         # those that have the same parameters, and other samples
    pipeline = dist.Pipeline(stages, "1f1b", 8, mesh["pipeline"], data=mesh["data"])

Name what talks most last: neighbours in it are neighbours in rank, on one machine as a rule.
(Narayanan et al. 2021, "Efficient large-scale language model training on GPU clusters".)
"""

from __future__ import annotations

import math

import numpy as np

from minidl import distributed as dist
from minidl.distributed.communicator import Communicator


class Mesh:
    """A communicator along each axis; ``mesh["data"].rank`` is this rank's place on it.

    Attributes:
        shape: how many ranks each axis has, by name.
    """

    def __init__(self, shape: dict[str, int], communicators: dict[str, Communicator]) -> None:
        self.shape, self._communicators = shape, communicators

    def __getitem__(self, axis: str) -> Communicator:
        if axis not in self._communicators:
            names = ", ".join(self._communicators)
            raise KeyError(f"this mesh has no axis {axis!r}: it has {names}")
        return self._communicators[axis]

    def __repr__(self) -> str:
        places = ", ".join(
            f"{k}={c.rank} of {c.world_size}" for k, c in self._communicators.items()
        )
        return f"Mesh({places})"


def init_mesh(communicator: Communicator | None = None, **shape: int) -> Mesh:
    """Put all ranks into a mesh (PyTorch's `init_device_mesh`). All ranks call it together.

    Args:
        communicator: of the ranks; None: all there are.
        shape: the number of ranks along each axis, the slowest first: rank 1 is next to rank 0 on
            the last. One of them may be -1: as many as there are.

    Raises:
        ValueError: the sizes do not multiply to the number of ranks.
    """
    c = communicator or dist.communicator()
    known = math.prod(n for n in shape.values() if n != -1)
    free = [axis for axis, n in shape.items() if n == -1]
    if len(free) == 1 and known > 0 and c.world_size % known == 0:
        shape[free[0]] = c.world_size // known
    if not shape or any(n < 1 for n in shape.values()) or math.prod(shape.values()) != c.world_size:
        sizes = " × ".join(f"{axis} {n}" for axis, n in shape.items())
        raise ValueError(f"the mesh {sizes or '()'} has not {c.world_size} ranks, as there are")
    place = np.unravel_index(c.rank, tuple(shape.values()))
    communicators = {}
    for i, axis in enumerate(shape):
        first = [0 if j == i else int(k) for j, k in enumerate(place)]  # of this rank's line
        color = int(np.ravel_multi_index(first, tuple(shape.values())))
        communicators[axis] = c.split(color, key=int(place[i]))
    return Mesh(shape, communicators)
