"""The command line: ``minidl`` or ``python -m minidl``. One file for each group of commands.

What a command needs is imported inside it, so that ``minidl --help`` answers at once.
"""

# isort: off
from minidl.cli import training, quantize, captions, ranks, machine  # --help has this order

# isort: on
from minidl.cli.base import (
    FAILED,
    MISUSED,
    app,
    kernels_in_words,
    main,
    open_data,
    share_of_batches,
)

__all__ = [
    "FAILED",
    "MISUSED",
    "app",
    "captions",
    "kernels_in_words",
    "machine",
    "main",
    "open_data",
    "quantize",
    "ranks",
    "share_of_batches",
    "training",
]
