"""Stop a unit before its end: somebody leaves a note beside the unit's request, and the process that runs it obeys.

It reads the note where it reports progress, so that it stays warm for the next unit. One that does not come to that in time, or
whose training runs in other processes, is ended (`processes.end`). A note stays: a unit that was to stop when the sweep's own
process died stops after the restart.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping

from steerlab.storage.plan import Stage
from steerlab.storage.store import Store

GRACE_S = 15.0
"""How long a process may take to obey."""
_READ_EVERY_S = 1.0


class Stopped(BaseException):
    """The unit is to stop; no handler of errors on its way may keep it."""


def ask(store: Store, folder: str, unit: str, why: str) -> None:
    """Leave a note for the process that runs a unit."""
    store.write_json(_path(f"{folder}/units/{unit}.json"), {"why": why})


class Obedience:
    """Raises Stopped where the unit of a request is to stop; asked between stages and with every progress."""

    def __init__(self, store: Store, request: str) -> None:
        """Watch in the calling thread: elsewhere (where a training in other processes is followed) nothing would be stopped."""
        self._store, self._note = store, _path(request)
        self._thread, self._read_s = threading.get_ident(), float("-inf")

    def before(self, stage: Stage) -> None:
        """Look before a stage. Raises Stopped."""
        self._read(f"before {stage.name}")

    def during(self, stage: Stage, metrics: Mapping[str, float]) -> None:
        """Look, once in a while, as a stage reports. Raises Stopped."""
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
