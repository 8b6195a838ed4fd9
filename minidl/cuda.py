"""What PyTorch calls torch.cuda: is there a GPU, and how many."""

from __future__ import annotations

__all__ = ["device_count", "get_device_name", "is_available", "synchronize"]


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
