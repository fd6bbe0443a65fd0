"""Stop a unit early: the sweep's process writes a note beside the unit's request, which the unit's process checks.

The process looks for the note whenever it reports progress, so it can stop without dying and run the next unit warm. A process
that does not report in time, or whose training runs in other processes, is killed (`processes.end`). Notes are never deleted:
if the sweep's process dies after it wrote one, the unit stops after the restart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from steerlab.storage.plan import Stage
from steerlab.storage.store import Store

GRACE_S = 15.0
"""Seconds after which a process that does not stop is killed."""
_READ_EVERY_S = 1.0
"""Shortest time between two checks for the note: if ROOT is an object store, each check is a request."""


class Stopped(BaseException):
    """Raised to stop the unit. It is a BaseException, so that no handler of ordinary errors in the stages catches it."""


def ask(store: Store, folder: str, unit: str, why: str) -> None:
    """Write the note that asks the process of a unit to stop, with the reason `why`."""
    store.write_json(_path(f"{folder}/units/{unit}.json"), {"why": why})


class Obedience:
    """Raise Stopped if a note asks the unit to stop; called between stages and at each report of progress."""

    def __init__(self, store: Store, request: str) -> None:
        """Check for the note beside the file `request` of a unit."""
        # Checked only in this thread. Reports of a training in other processes arrive in another thread, where an
        # exception would not end the training.
        self._store, self._note = store, _path(request)
        self._thread, self._read_s = threading.get_ident(), float("-inf")

    def before(self, stage: Stage) -> None:
        """Check for the note before a stage starts. Raises Stopped."""
        self._read(f"before {stage.name}")

    def during(self, stage: Stage, metrics: Mapping[str, float]) -> None:
        """Check for the note, at most once per second, when a stage reports progress. Raises Stopped."""
        if threading.get_ident() == self._thread and time.monotonic() - self._read_s > _READ_EVERY_S:
            self._read(f"after step {metrics['step']} of {stage.name}" if "step" in metrics else f"during {stage.name}")

    def _read(self, when: str) -> None:
        self._read_s = time.monotonic()
        try:
            note = self._store.read_json(self._note)
        except FileNotFoundError:
            return
        raise Stopped(f"{note['why']} {when}")


def _path(request: str) -> str:
    return f"{request.removesuffix('.json')}.stop.json"
