"""The queue of requests, and the thread that runs them in batches.

Requests that arrive while a batch runs wait for its end, and are then batched as far as the model allows. The thread only runs
the model: the server's own thread tokenises texts and decodes tokens, since a tokenizer serves one thread at a time.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence

from steerlab.serving import served_rows
from steerlab.serving.asked import RefusedError
from steerlab.serving.served_rows import Row, Told
from steerlab.steered.language import SteeredModel

MOST_ROWS = 32
"""Largest number of rows of a batch."""
MOST_WAITING = 256
"""Largest number of waiting rows; further ones are refused."""
_WAKE_S = 1.0


class Ticket:
    """The rows of one request. Its events are read in the server's thread."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.events: asyncio.Queue[tuple[Row, int, bool] | Exception] = asyncio.Queue()

    def cancel(self) -> None:
        """End the rows at their next token, since the client no longer waits for them."""
        for row in self.rows:
            row.cancelled = True


class Batches:
    """The waiting rows, and the thread that continues them."""

    def __init__(self, model: SteeredModel, most_rows: int = MOST_ROWS) -> None:
        self._model, self._most_rows = model, most_rows
        # Read here, not in the thread, because this uses the tokenizer.
        self._ends = model.end_ids
        self._waiting: deque[tuple[Row, Ticket]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True, name="steerlab-batches")
        self.sizes: list[int] = []
        """Number of rows of each batch so far, for the server's log; the last 1,000."""

    def start(self) -> None:
        """Start the thread. Called in the running event loop, to which it reports."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """End the thread after its current token; waiting rows are refused."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def join(self, wait_s: float) -> None:
        """Wait for the thread's end, at most `wait_s` seconds."""
        self._thread.join(wait_s)

    def put(self, ticket: Ticket) -> None:
        """Append the rows of a request to the queue. Raises RefusedError if too many wait already."""
        with self._changed:
            if self._closed:
                raise RefusedError("the server is shutting down", status=503, code="unavailable")
            if len(self._waiting) + len(ticket.rows) > MOST_WAITING:
                raise RefusedError(
                    f"{len(self._waiting)} prompts are waiting, of at most {MOST_WAITING}: send fewer at once",
                    status=429,
                    code="rate_limit_exceeded",
                )
            self._waiting.extend((row, ticket) for row in ticket.rows)
            self._changed.notify()

    def _serve(self) -> None:
        while (batch := self._next()) is not None:
            owner = {id(row): ticket for row, ticket in batch}
            try:
                served_rows.run(self._model, [row for row, _ in batch], self._ends, lambda told, to=owner: self._tell(told, to))
            except Exception as error:  # an error of the model ends one batch; the server continues
                self._post([(ticket, error) for ticket in {id(t): t for _, t in batch}.values()])

    def _next(self) -> list[tuple[Row, Ticket]] | None:
        """Return the oldest row with others that can share its batch; None after `close`."""
        with self._changed:
            while not self._closed:
                gone = [(row, ticket) for row, ticket in self._waiting if row.cancelled]
                for pair in gone:
                    self._waiting.remove(pair)
                if self._waiting:
                    break
                self._changed.wait(_WAKE_S)
            if self._closed:
                error = RefusedError("the server is shutting down", status=503, code="unavailable")
                self._post([(ticket, error) for ticket in {id(t): t for _, t in self._waiting}.values()])
                return None
            waiting = list(self._waiting)
            rows = [row for row, _ in waiting]
            chosen = self._model.in_common(
                [len(row.prompt) for row in rows],
                [row.max_new_tokens for row in rows],
                [row.strength for row in rows],
                self._most_rows,
            )
            taken = set(chosen)
            self._waiting = deque(pair for number, pair in enumerate(waiting) if number not in taken)
        self.sizes = [*self.sizes[-999:], len(chosen)]
        return [waiting[number] for number in chosen]

    def _tell(self, told: Told, owner: dict[int, Ticket]) -> None:
        if self._closed:
            raise RefusedError("the server is shutting down", status=503, code="unavailable")
        self._post([(owner[id(row)], (row, token, last)) for row, token, last in told])

    def _post(self, events: Sequence[tuple[Ticket, tuple[Row, int, bool] | Exception]]) -> None:
        """Hand events over to the server's thread."""
        assert self._loop is not None, "`start` comes first"

        def put() -> None:
            for ticket, event in events:
                ticket.events.put_nowait(event)

        try:
            self._loop.call_soon_threadsafe(put)
        except RuntimeError:  # the server has ended meanwhile, and its event loop is closed
            return
