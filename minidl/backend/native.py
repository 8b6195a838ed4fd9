"""The C++ kernels, if this installation has them.

`native` is the module `minidl._native`, or None; then `why_missing` says, in one line, what is
missing and how to get it. Nobody is told at import: `report_missing()` does so, once and in full,
for whoever looks for a kernel.
The environment variable MINIDL_NO_NATIVE=1 makes minidl run without them, on NumPy;
MINIDL_KEEP_MEMORY=0 leaves malloc as it is (csrc/README.md says what it does otherwise).
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from types import ModuleType

__all__ = ["native", "report_missing", "why_missing"]

native: ModuleType | None = None
why_missing: str | None = None
_in_full = ""  # what the compiler said, if it failed

if os.environ.get("MINIDL_NO_NATIVE", "0") not in ("", "0"):
    why_missing = "the C++ kernels are switched off by MINIDL_NO_NATIVE; unset it to use them"
else:
    try:
        from minidl import _native
    except ImportError as error:
        # What setup.py wrote down when it could not build the module.
        record = Path(__file__).parents[1] / "_native_missing.txt"
        if record.exists():
            why_missing, _, _in_full = record.read_text(encoding="utf-8").strip().partition("\n")
        else:
            why_missing = (
                f"the C++ kernels are not built ({error}); with a C++ compiler at hand, "
                "`pip install -e .` in minidl's folder builds them"
            )
    else:
        _native.isa()  # a MINIDL_ISA that this machine cannot run is an error here and now
        native = _native
        if os.environ.get("MINIDL_KEEP_MEMORY", "1") not in ("", "0"):
            native.keep_memory()

_reported = False


def report_missing() -> None:
    """Warn that minidl runs without its C++ kernels, and why; the first time only."""
    global _reported
    if why_missing is not None and not _reported:
        _reported = True
        message = f"minidl runs on NumPy alone: {why_missing}\n{_in_full}".strip()
        warnings.warn(message, RuntimeWarning, stacklevel=2)
