"""The queue of requests, and the thread that continues them together.

A request joins the batch that runs and leaves it at its end (steered/continuing.py), so that a short answer does not wait
for a long one. A request that cannot join (the batch is full, or a patch of weights has another strength) waits until there
is room, and later ones wait behind it. The thread only runs the model: the server's own thread tokenises texts and decodes
tokens, since a tokenizer serves one thread at a time.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steerlab.inputs.tokens import Encoded
from steerlab.serving.asked import RefusedError
from steerlab.steered.batching import Size
from steerlab.steered.continuing import Step, continue_prompts
from steerlab.steered.language import SteeredModel
from steerlab.steered.prefilled import Decoding
from steerlab.steered.prompt_queue import Capacity, Waiting
from steerlab.steered.sampling import Sampling, uniforms

MOST_ROWS = 32
"""Largest number of rows of a batch."""
MOST_WAITING = 256
"""Largest number of waiting rows; further ones are refused."""
_WAKE_S = 1.0


@dataclass(eq=False)
class Row:
    """One prompt of a request, to be continued."""

    prompt: Encoded
    strength: float
    max_new_tokens: int
    sampling: Sampling
    seed: int
    choice: int
    """Number of the answer among those of its request: with the same seed, each answer has different random numbers."""
    cancelled: bool = False
    """Set by another thread after a stop text, or when the client has disconnected."""

    @property
    def size(self) -> Size:
        """What decides with which other rows this one can share a batch."""
        return Size(len(self.prompt), self.max_new_tokens, self.strength)

    @property
    def waiting(self) -> Waiting[Row]:
        """The row as a prompt that waits to be continued."""
        drawn_N = uniforms([self.choice], self.max_new_tokens, self.seed)[0] if self.sampling.temperature else None
        return Waiting(self, self.prompt, self.strength, drawn_N, self.sampling, self.max_new_tokens)


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
    """The waiting rows, and the thread that continues them. It is the queue of `continue_prompts`."""

    def __init__(self, model: SteeredModel, most_rows: int = MOST_ROWS) -> None:
        self._model, self._most_rows = model, most_rows
        # Read here, not in the thread, because this uses the tokenizer.
        self._ends = model.end_ids
        self._waiting: deque[tuple[Row, Ticket]] = deque()
        self._running: dict[Row, Ticket] = {}
        """Rows that were handed to the model and have not ended."""
        self._changed = threading.Condition()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._serve, daemon=True, name="steerlab-batches")
        self.num_rows = 0
        """Number of rows that were handed to the model so far."""
        self.most_at_once = 0
        """Largest number of rows that were continued at once so far."""

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
        capacity = Capacity(self._model.batch_tokens, mixes=True)
        while True:
            try:
                with torch.inference_mode():
                    for _ in continue_prompts(self, self._read, capacity, self._has_ended, self._tell):
                        pass
                return  # `first` has returned no rows: the server ends
            except Exception as error:  # an error of the model ends the rows that ran; the server continues
                self._post([(ticket, error) for ticket in dict.fromkeys(self._running.values())])
                self._running.clear()

    def _read(self, rows: Sequence[Waiting[Row]]) -> Decoding | None:
        """Read prompts; None if the model fails on them, which is reported to their requests alone."""
        try:
            return self._model.read_prompts(rows)
        except Exception as error:
            self._post([(ticket, error) for ticket in dict.fromkeys(self._running.pop(one.key) for one in rows)])
            return None

    def first(self) -> list[Waiting[Row]]:
        """Wait for a row; return the oldest one with others that can share its batch, nothing after `close`."""
        with self._changed:
            while not self._closed:
                if rows := self._take([], self._most_rows):
                    return rows
                self._changed.wait(_WAKE_S)
            error = RefusedError("the server is shutting down", status=503, code="unavailable")
            self._post([(ticket, error) for ticket in dict.fromkeys(ticket for _, ticket in self._waiting)])
            return []

    def more(self, running: Sequence[Waiting[Row]], num: int) -> list[Waiting[Row]]:
        """Return at most `num` waiting rows that can join the running ones."""
        with self._changed:
            return self._take([one.key.size for one in running], min(self._most_rows, len(running) + num))

    def _take(self, running: Sequence[Size], limit: int) -> list[Waiting[Row]]:
        """Remove and return the waiting rows that can join a batch, which then has at most `limit` rows."""
        waiting = [(row, ticket) for row, ticket in self._waiting if not row.cancelled]
        chosen = self._model.joining(running, [row.size for row, _ in waiting], limit) if waiting else []
        taken = {waiting[number][0] for number in chosen}
        self._waiting = deque((row, ticket) for row, ticket in waiting if row not in taken)
        self._running |= {row: ticket for row, ticket in waiting if row in taken}
        self.num_rows += len(taken)
        self.most_at_once = max(self.most_at_once, len(self._running))
        return [waiting[number][0].waiting for number in chosen]

    def _has_ended(self, one: Waiting[Row], written: list[int]) -> bool:
        return written[-1] in self._ends or one.key.cancelled

    def _tell(self, steps: Sequence[Step[Row]]) -> None:
        """Report the tokens of a step to the requests that they belong to."""
        if self._closed:
            raise RefusedError("the server is shutting down", status=503, code="unavailable")
        self._post([(self._running[one.row.key], (one.row.key, one.written[-1], one.ended)) for one in steps])
        for step in steps:
            if step.ended:
                del self._running[step.row.key]

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
