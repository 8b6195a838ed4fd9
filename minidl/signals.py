"""Ctrl-C and SIGTERM, put by until a step is done."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class Interrupted(KeyboardInterrupt):
    """Training was stopped by Ctrl-C (or SIGTERM), after its checkpoint was written."""

    def __init__(self, signum: int, checkpoint: Path) -> None:
        super().__init__(f"by {signal.Signals(signum).name}; {checkpoint} is written")
        self.signum, self.checkpoint = signum, checkpoint


@contextmanager
def signals_noted() -> Iterator[list[int]]:
    """Within it, Ctrl-C and SIGTERM are put on a list: a step that has begun is finished.

    A second Ctrl-C ends the program at once. (Only the main thread can have this.)
    """
    stopped: list[int] = []

    def note(signum: int, frame: Any) -> None:
        if stopped:
            raise KeyboardInterrupt
        stopped.append(signum)

    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return
    before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
