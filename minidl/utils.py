"""Where PyTorch scripts look for data: ``torch.utils.data`` is `minidl.data`."""

from minidl import data

__all__ = ["data"]
