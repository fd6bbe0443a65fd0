"""Count the rows that the actors of a pool have finished, in an actor on the driver's node."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from steerlab.guards import late

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle
else:
    ray = late.module("ray")

_POLL_S = 0.5


class Tally:
    """Progress of the shards, as the actors of a pool report it."""

    def __init__(self) -> None:
        self._rows: dict[int, int] = {}
        self._deaths = 0
        # Time of the first report; 0 before it.
        self._first_s = 0.0

    def died(self) -> int:
        """Count one more actor that died; return the number of all that died."""
        self._deaths += 1
        return self._deaths

    def tell(self, number: int, num_rows: int) -> None:
        """Record the number of rows done of one shard."""
        # The first report starts the clock: before it, the actors load their model, which takes no time for further rows.
        self._first_s = self._first_s or time.monotonic()
        # An actor that replaces a killed one begins the shard again; the displayed progress should not go backwards.
        self._rows[number] = max(num_rows, self._rows.get(number, 0))

    def total(self) -> tuple[int, float]:
        """Return the number of rows done of all shards and the seconds since the first report."""
        return sum(self._rows.values()), time.monotonic() - self._first_s


@contextmanager
def following(tally: ActorHandle, report: Callable[[int, float], None], total: int) -> Iterator[None]:
    """Report the rows done and the seconds left while the block runs, and once more at its end.

    Args:
        tally: The actor that counts; it is stopped with the block.
        report: Called with the number of rows done and the estimated seconds for the rest, whenever more rows are done.
        total: Number of all rows.
    """
    stop = threading.Event()
    failure: list[Exception] = []
    newest = 0

    def tell() -> None:
        nonlocal newest
        now, seconds = ray.get(tally.total.remote())
        if now > newest:
            newest = now
            # The estimate is the mean time per row so far, times the number of remaining rows.
            report(now, seconds * (total - now) / now)

    def follow() -> None:
        try:
            while not stop.wait(_POLL_S):
                tell()
        except Exception as error:  # a thread's exception is only printed; the main thread raises it below
            failure.append(error)

    # A thread, because the main one waits in Ray Data's iterator, which returns once for each finished shard.
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
