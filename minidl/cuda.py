"""What PyTorch calls torch.cuda: is there a GPU, how many, and which one computes."""

from __future__ import annotations

from minidl import backend
from minidl.backend.random import manual_seed
from minidl.backend.threads import local_rank

__all__ = [
    "current_device", "device_count", "empty_cache", "get_device_name", "is_available",
    "manual_seed", "manual_seed_all", "memory_allocated", "set_device", "set_device_by_rank",
    "synchronize",
]  # fmt: skip

manual_seed_all = manual_seed  # all devices draw the same numbers from one seed


def device_count() -> int:
    """How many GPUs CuPy can use; 0 without CuPy or a driver."""
    try:
        import cupy

        return cupy.cuda.runtime.getDeviceCount()
    except Exception:  # no CuPy, no driver, a driver too old: each has an exception of its own
        return 0


def is_available() -> bool:
    """Whether ``x.to("cuda")`` works here; `minidl doctor` says why not."""
    return device_count() > 0


def get_device_name(device: int = 0) -> str:
    """The name of a GPU: "NVIDIA H100 80GB HBM3"."""
    import cupy

    return cupy.cuda.runtime.getDeviceProperties(device)["name"].decode()


def synchronize() -> None:
    """Wait until the GPU has done all that was asked of it (kernels run in the background)."""
    if is_available():
        import cupy

        cupy.cuda.Device().synchronize()


def current_device() -> int:
    """The number of the GPU that "cuda" means.

    Raises:
        RuntimeError: no CuPy, or no GPU.
    """
    backend.gpu(0)
    return backend.current_gpu()


def set_device(device: int | str) -> None:
    """Make "cuda" mean this GPU from here on: 1 or "cuda:1". One process, one GPU: at its start.

    Raises:
        RuntimeError: no CuPy, or no such GPU.
    """
    index = device if isinstance(device, int) else backend.parse_device(device)[1]
    backend.gpu(index).use()


def set_device_by_rank() -> int:
    """Make "cuda" a GPU of this rank's own: rank i of a machine takes GPU i, in turn.

    Returns:
        Its number.

    Raises:
        RuntimeError: no CuPy, or no GPU.
    """
    backend.gpu(0)
    index = local_rank() % device_count()
    set_device(index)
    return index


def memory_allocated() -> int:
    """Bytes of the GPU's memory in use by arrays. (CuPy keeps what they give back for the next.)"""
    return backend.cupy().get_default_memory_pool().used_bytes()


def empty_cache() -> None:
    """Give the memory that is kept for later arrays back to the GPU."""
    backend.cupy().get_default_memory_pool().free_all_blocks()
