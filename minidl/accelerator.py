"""What PyTorch scripts ask before they choose a device: ``torch.accelerator``. Here it is CUDA."""

from __future__ import annotations

from minidl.backend import device
from minidl.cuda import device_count, is_available, synchronize

__all__ = ["current_accelerator", "device_count", "is_available", "synchronize"]


def current_accelerator(check_available: bool = False) -> device | None:
    """The device "cuda", or None where there is none."""
    return device("cuda") if is_available() else None
