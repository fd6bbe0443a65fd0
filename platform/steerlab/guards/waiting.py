"""Warn about long waits."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

FIRST_S, NEXT_S = 10.0, 60.0
"""Seconds of silence before the first line about a wait, and between two lines."""


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Warn after `FIRST_S` seconds of the block, and every `NEXT_S` seconds from then on, that `what` is waited for."""
    ended = threading.Event()

    def watch() -> None:
        waited_s = FIRST_S
        while not ended.wait(FIRST_S if waited_s == FIRST_S else NEXT_S):
            warnings.warn(f"waits for {what}, {waited_s:.0f} s so far", stacklevel=2)
            waited_s += NEXT_S

    # A thread is needed, because the block is in a library's call. It is a daemon, so that it cannot keep a process alive that
    # is ending.
    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
