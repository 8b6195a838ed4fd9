"""Staging: a GPU's array on its way through the host, for an MPI that sees the host's memory only.

    GPU --copy--> pinned memory --MPI--> pinned memory --copy--> GPU

The copies have a stream of their own: they wait for what the program has asked of the GPU so far,
and then go on beside what it asks next. (Pinned memory stays in its place, so the GPU can read and
write it by itself.)
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from minidl import backend


@functools.cache
def stream_for_copies(device: int) -> Any:
    with backend.gpu(device):
        return backend.cupy().cuda.Stream(non_blocking=True)


class Staged:
    """
    Args:
        array: CuPy's, contiguous.
        down: start to copy it to the host.

    Attributes:
        host: its place there.
    """

    def __init__(self, array: Any, down: bool) -> None:
        import cupyx

        self.array, self.device = array, array.device.id
        here = cupyx.empty_pinned if math.prod(array.shape) else np.empty
        self.host: np.ndarray = here(array.shape, array.dtype)
        self.stream = stream_for_copies(self.device)
        with backend.gpu(self.device):
            self.stream.wait_event(backend.cupy().cuda.get_current_stream().record())
            if down:
                array.get(stream=self.stream, out=self.host, blocking=False)
            self.event = self.stream.record()

    def is_copied(self) -> bool:
        return bool(self.event.done)

    def up(self) -> None:
        """Start to copy what came back into the array."""
        with backend.gpu(self.device):
            self.array.set(self.host, stream=self.stream)
            self.event = self.stream.record()

    def wait(self) -> None:
        """Until then the pinned memory must not go."""
        self.event.synchronize()
