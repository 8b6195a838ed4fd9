"""``torch.backends``, as PyTorch scripts ask it: no Apple GPU here, and no cuDNN to tune."""

from __future__ import annotations

__all__ = ["cudnn", "mps"]


class mps:
    @staticmethod
    def is_available() -> bool:
        return False


class cudnn:
    """Settable, to no effect: minidl's own kernels are deterministic as they are."""

    benchmark = False
    deterministic = True
    enabled = False
