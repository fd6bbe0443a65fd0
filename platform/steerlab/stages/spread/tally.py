"""How many rows of a data set the actors of a pool have read, counted in an actor beside the driver."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import ray

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_POLL_S = 0.5


@ray.remote(num_cpus=0)
class Tally:
    """How far the shards are, as the actors tell it."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._deaths = 0
        self._first_s = 0.0

    def died(self) -> int:
        """Count one more actor that died; return how many did."""
        self._deaths += 1
        return self._deaths

    def tell(self, number: int, num_rows: int) -> None:
        """Take the rows done of one shard; those of a killed actor are not taken back."""
        self._first_s = self._first_s or time.monotonic()
        self._rows[number] = max(num_rows, self._rows.get(number, 0))

    def total(self) -> tuple[int, float]:
        """Return the rows done of all shards and the seconds since the first actor began."""
        return sum(self._rows.values()), time.monotonic() - self._first_s


@contextmanager
def following(tally: ActorHandle, report: Callable[[int, float], None], total: int) -> Iterator[None]:
    """Report the tally and the seconds left while the block runs, and once more at its end."""
    stop = threading.Event()
    failure: list[Exception] = []
    told = 0

    def tell() -> None:
        nonlocal told
        now, seconds = ray.get(tally.total.remote())
        if now > told:
            told = now
            report(now, seconds * (total - now) / now)

    def follow() -> None:
        try:
            while not stop.wait(_POLL_S):
                tell()
        except Exception as error:  # whatever `report` raised: the main thread has to hear of it
            failure.append(error)

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    tell()
    ray.kill(tally)
    if failure:
        raise failure[0]
