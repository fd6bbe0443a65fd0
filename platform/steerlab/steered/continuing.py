"""Continuous batching: rows that have ended leave the batch, and waiting ones enter it.

A batch costs nearly as much for one row as for many, and the texts of a task end at different lengths. So the batch is as large
as the memory for keys and values allows, and is kept full. Each row draws from its own random numbers, by its own count of
tokens: its text depends on the batch by rounding alone.

A decoding step waits for the device once, for the chosen tokens (`sampling.choose`). transformers waits once more for what its
attention mask says about padding, and again in a patch that is a model of its own. Models whose caches cannot be taken apart
keep the rows of a batch together to the end of the last one.

Axes besides those of tokens.py: N new tokens of a row at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from steerlab.inputs.tokens import Encoded
from steerlab.steered.prefilled import Decoding
from steerlab.steered.sampling import Sampling, choose

_HOST_BYTES = 2**30
"""Memory for keys and values on a CPU, where larger batches are hardly faster."""
_SHARE = 0.5
"""Share of a device's free memory that keys and values may take; joining two batches copies them."""
_LOGITS = 6
"""Arrays of the size of the logits that choosing a token needs at once: float32 logits, probabilities, their order and sums."""
_WORTH_MOVING = 8
"""The cache is copied, to let rows leave or enter, when an eighth of the batch has ended."""


class Waiting(NamedTuple):
    """A prompt that is to be continued."""

    job: tuple[int, int]
    """Number of the strength and of the prompt."""
    row: Encoded
    strength: float
    uniforms_N: Tensor | None
    """Random number of each new token; None for greedy decoding."""


@dataclass
class Room:
    """How many rows may be read and continued at once."""

    max_new_tokens: int
    batch_tokens: int
    """Tokens, padding included, of the prompts that are read in one call, and of a batch that cannot grow."""
    mixes: bool
    """Whether rows of different lengths may share a batch."""

    def together(self, waiting: Sequence[Waiting]) -> int:
        """Return how many of the first prompts, the longest of which comes first, are read in one call; at least one."""
        longest = len(waiting[0].row) + self.max_new_tokens
        return max(1, min(len(waiting), self.batch_tokens // longest))

    def rows(self, decoding: Decoding) -> int:
        """Return how many rows the memory has room for, measured by the keys and values of a batch that was read."""
        if not decoding.num_bytes:
            # Without a cache every step reads all tokens again, which takes as much memory as reading the prompts.
            return max(1, self.batch_tokens // (decoding.num_columns + self.max_new_tokens))
        # Measured on a batch that was read: architectures keep different numbers of heads, and some keep states of fixed size.
        per_token = decoding.num_bytes / (len(decoding.strength_B) * decoding.num_columns)
        longest = decoding.num_columns + self.max_new_tokens
        bytes_per_row = per_token * longest + _LOGITS * 4 * decoding.logits_BV.shape[1]
        return int(_memory(decoding.logits_BV.device) // bytes_per_row)


def _memory(device: torch.device) -> float:
    """Return the number of bytes that a batch may take."""
    if device.type != "cuda":
        return _HOST_BYTES
    # PyTorch's cache holds blocks that the driver counts as taken, and that a batch can have.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _SHARE * (torch.cuda.mem_get_info(device)[0] + unused)


@dataclass
class _Running:
    """The rows of a batch in the order of its tensors."""

    decoding: Decoding
    sampling: Sampling
    rows: list[Waiting]
    written: list[list[int]] = field(init=False)
    """New tokens of each row."""
    ended: list[bool] = field(init=False)
    """Rows that have ended and stay until it is worth moving the others."""
    num_steps: list[int] = field(init=False)
    """Tokens that were chosen for each row, those after its end included."""
    num_B: Tensor = field(init=False)
    """`num_steps` on the device."""
    seen_BV: Tensor | None = field(init=False, default=None)
    """Tokens that occurred in each row, for the repetition penalty; None without one."""
    uniforms_BN: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        num, device = len(self.rows), self.decoding.logits_BV.device
        self.written, self.ended, self.num_steps = [[] for _ in self.rows], [False] * num, [0] * num
        self.num_B = torch.zeros(num, dtype=torch.long, device=device)
        numbers = [row.uniforms_N for row in self.rows if row.uniforms_N is not None]
        if numbers:
            self.uniforms_BN = torch.stack(numbers).to(device)
        if self.sampling.repetition_penalty != 1:
            # (B, V) bool: repetition is looked up by token and not searched in texts.
            self.seen_BV = torch.zeros_like(self.decoding.logits_BV, dtype=torch.bool)
            for number, row in enumerate(self.rows):
                self.seen_BV[number, torch.tensor(row.row.input_ids, device=device)] = True

    def choose(self) -> tuple[Tensor, list[int]]:
        """Return the next token of every row, on the device and as a list."""
        # By the row's own count of tokens, (B,): rows that entered at different times draw as if each were alone.
        uniform_B = None if self.uniforms_BN is None else self.uniforms_BN.gather(1, self.num_B[:, None])[:, 0]
        token_B, tokens = choose(self.decoding.logits_BV.float(), self.seen_BV, self.sampling, uniform_B)
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, token_B[:, None], True)
        self.num_B = self.num_B + 1
        self.num_steps = [num + 1 for num in self.num_steps]
        return token_B, tokens

    def is_worth_moving(self, max_new_tokens: int) -> bool:
        """Return whether the rows that have ended should leave."""
        gone = sum(self.ended)
        if not gone or not self.decoding.rows_can_leave:
            return False
        # A row that has ended must not grow beyond the context, nor beyond its random numbers.
        full = any(num >= max_new_tokens for num, ended in zip(self.num_steps, self.ended, strict=True) if ended)
        return full or gone > len(self.rows) // _WORTH_MOVING

    def keep(self, rows: list[int]) -> None:
        """Let all other rows leave; columns that are padding in the rows that stay leave with them."""
        self.decoding.keep(rows)
        self.rows, self.written = [self.rows[i] for i in rows], [self.written[i] for i in rows]
        self.ended, self.num_steps = [self.ended[i] for i in rows], [self.num_steps[i] for i in rows]
        index = torch.tensor(rows, device=self.num_B.device)
        self.num_B = self.num_B[index]
        self.seen_BV = None if self.seen_BV is None else self.seen_BV[index]
        self.uniforms_BN = None if self.uniforms_BN is None else self.uniforms_BN[index]
        # The newest token of a row has been chosen and not been read.
        read = max(len(row.row) + num - 1 for row, num in zip(self.rows, self.num_steps, strict=True))
        unused = self.decoding.num_columns - read
        if unused > 0 and self.decoding.rows_can_join:
            self.decoding.drop_columns(unused)

    def join(self, other: _Running) -> None:
        """Append the rows of another batch."""
        self.decoding.join(other.decoding)
        self.rows, self.written = self.rows + other.rows, self.written + other.written
        self.ended, self.num_steps = self.ended + other.ended, self.num_steps + other.num_steps
        self.num_B = torch.cat([self.num_B, other.num_B])
        if self.seen_BV is not None and other.seen_BV is not None:
            self.seen_BV = torch.cat([self.seen_BV, other.seen_BV])
        if self.uniforms_BN is not None and other.uniforms_BN is not None:
            self.uniforms_BN = torch.cat([self.uniforms_BN, other.uniforms_BN])


def continued(
    waiting: Sequence[Waiting],
    read: Callable[[list[Waiting]], Decoding],
    room: Room,
    sampling: Sampling,
    ends: Callable[[list[int]], bool],
    tell: Callable[[dict[tuple[int, int], list[int]]], None] | None = None,
) -> Iterator[tuple[Waiting, list[int]]]:
    """Continue prompts, and yield each with its new tokens, the one that ends it included, when it has ended.

    Args:
        waiting: Prompts that may share a batch.
        read: Reads prompts as a batch, padded on the left.
        room: How many at once.
        sampling: How the next token is chosen.
        ends: Whether the last of a row's new tokens ends its text; it need not look at their number.
        tell: Called after every step with the new tokens so far of the rows in the batch.
    """
    # The longest first: a batch that is too large for the memory fails at the start and not after an hour.
    queue = deque(sorted(waiting, key=lambda one: len(one.row), reverse=True))
    if not room.max_new_tokens:
        yield from ((one, []) for one in queue)
        return
    running: _Running | None = None
    num_rows = 0
    while queue or running is not None:
        if running is None:
            running = _entered(queue, read, sampling, room.together(queue))
            num_rows = room.rows(running.decoding) if room.mixes and running.decoding.rows_can_join else 0
        while queue and (free := num_rows - len(running.rows)) > num_rows // _WORTH_MOVING:
            running.join(_entered(queue, read, sampling, min(free, room.together(queue))))
        token_B, tokens = running.choose()
        in_batch = [number for number, ended in enumerate(running.ended) if not ended]
        for number in in_batch:
            written = running.written[number]
            written.append(tokens[number])
            running.ended[number] = ends(written) or len(written) == room.max_new_tokens
        if tell is not None:
            tell({running.rows[number].job: running.written[number] for number in in_batch})
        yield from ((running.rows[n], running.written[n]) for n in in_batch if running.ended[n])
        left = [number for number in in_batch if not running.ended[number]]
        if not left:
            running = None
            continue
        # Before the step: the token that ends a row needs no forward pass after it.
        if running.is_worth_moving(room.max_new_tokens):
            running.keep(left)
            token_B = token_B[torch.tensor(left, device=token_B.device)]
        # One column for every row in the batch, also for those that have ended and wait to leave.
        running.decoding.step(token_B)


def _entered(queue: deque[Waiting], read: Callable[[list[Waiting]], Decoding], sampling: Sampling, num: int) -> _Running:
    rows = [queue.popleft() for _ in range(num)]
    return _Running(read(rows), sampling, rows)
