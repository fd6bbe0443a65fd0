"""Continuous batching: rows that have ended leave the batch, and waiting prompts enter it.

A decoding step costs nearly as much for one row as for many, and the texts of a task end at different lengths. So the batch has
as many rows as the memory for keys and values allows, and new prompts enter when enough rows have left. The n-th token of a row
is drawn with the row's own n-th random number, so other rows of the batch affect its text only by rounding.

The CPU waits for the GPU once in each decoding step, for the chosen tokens (`sampling.choose`). Code of transformers makes it
wait once more, to look for padding in the attention mask; a patch that runs a model of its own adds another such wait. If a
model's cache cannot be split into rows, all rows stay in the batch until the last one has ended.

Axes besides those of tokens.py: N the maximum number of new tokens.
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
"""Memory for a batch on a CPU, where larger batches are hardly faster."""
_SHARE = 0.5
"""Share of a GPU's free memory that a batch may take; the rest is for the copies that are made when rows leave or enter."""
_LOGITS = 6
"""Arrays of the size of the float32 logits that choosing a token needs at once: logits, probabilities, their sorted copy, its
order (int64, which counts twice) and sums."""
_WORTH_MOVING = 8
"""Rows leave when more than an eighth of the batch has ended, and prompts enter when more than an eighth of the places is free.
Each time the cache is copied, which would cost too much for every single row."""


class Waiting(NamedTuple):
    """A prompt that waits to be continued."""

    key: tuple[int, int]
    """Number of the strength, and number of the prompt."""
    row: Encoded
    strength: float
    uniforms_N: Tensor | None
    """One random number for each new token; None for greedy decoding."""


@dataclass
class Capacity:
    """Limits on the number of rows that are prefilled in one call, and that one batch continues."""

    max_new_tokens: int
    batch_tokens: int
    """Maximum number of tokens, with padding and new tokens, of one prefill, and of a batch of a model without a cache."""
    mixes: bool
    """Whether rows of different lengths may share a batch."""

    def num_prefilled(self, waiting: Sequence[Waiting]) -> int:
        """Return the number of prompts, from the first and longest one on, that are prefilled in one call; at least 1."""
        longest = len(waiting[0].row) + self.max_new_tokens
        return max(1, min(len(waiting), self.batch_tokens // longest))

    def num_rows(self, decoding: Decoding) -> int:
        """Return the number of rows that fit into the memory, judged by the size of a prefilled batch's cache."""
        if not decoding.num_bytes:
            # Without a cache every step computes all tokens again, which takes as much memory as the prefill.
            return max(1, self.batch_tokens // (decoding.num_columns + self.max_new_tokens))
        # Measured instead of computed from the config: architectures differ in heads, and some have states of fixed size.
        per_token = decoding.num_bytes / (len(decoding.strength_B) * decoding.num_columns)
        longest = decoding.num_columns + self.max_new_tokens
        bytes_per_row = per_token * longest + _LOGITS * 4 * decoding.logits_BV.shape[1]
        return int(_memory(decoding.logits_BV.device) // bytes_per_row)


def _memory(device: torch.device) -> float:
    """Return the number of bytes that a batch may take."""
    if device.type != "cuda":
        return _HOST_BYTES
    # PyTorch's allocator has unused blocks that the driver counts as taken, and that a batch can use.
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return _SHARE * (torch.cuda.mem_get_info(device)[0] + unused)


@dataclass
class _Running:
    """The batch that is being continued; all lists and tensors have the same order of rows."""

    decoding: Decoding
    sampling: Sampling
    rows: list[Waiting]
    written: list[list[int]] = field(init=False)
    """New tokens of each row."""
    ended: list[bool] = field(init=False)
    """Whether each row has ended; such rows stay until enough of them have ended to copy the cache."""
    num_steps: list[int] = field(init=False)
    """Number of tokens that were chosen for each row, including those after its end."""
    num_steps_B: Tensor = field(init=False)
    """`num_steps` on the device."""
    seen_BV: Tensor | None = field(init=False, default=None)
    """Whether each token of the vocabulary has occurred in a row, for the repetition penalty; None without a penalty."""
    uniforms_BN: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        num, device = len(self.rows), self.decoding.logits_BV.device
        self.written, self.ended, self.num_steps = [[] for _ in self.rows], [False] * num, [0] * num
        self.num_steps_B = torch.zeros(num, dtype=torch.long, device=device)
        numbers = [row.uniforms_N for row in self.rows if row.uniforms_N is not None]
        if numbers:
            self.uniforms_BN = torch.stack(numbers).to(device)
        if self.sampling.repetition_penalty != 1:
            # A table (B, V) is faster to look up and update than a search in each row's tokens.
            self.seen_BV = torch.zeros_like(self.decoding.logits_BV, dtype=torch.bool)
            for number, row in enumerate(self.rows):
                self.seen_BV[number, torch.tensor(row.row.input_ids, device=device)] = True

    def choose(self) -> tuple[Tensor, list[int]]:
        """Return the next token of every row, on the device and as a list."""
        # Indexed by each row's own number of tokens, so that rows which entered at different times draw as if alone, (B,).
        uniform_B = None if self.uniforms_BN is None else self.uniforms_BN.gather(1, self.num_steps_B[:, None])[:, 0]
        token_B, tokens = choose(self.decoding.logits_BV.float(), self.seen_BV, self.sampling, uniform_B)
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, token_B[:, None], True)
        self.num_steps_B = self.num_steps_B + 1
        self.num_steps = [num + 1 for num in self.num_steps]
        return token_B, tokens

    def is_worth_moving(self, max_new_tokens: int) -> bool:
        """Return whether the rows that have ended should leave the batch now."""
        num_ended = sum(self.ended)
        if not num_ended or not self.decoding.rows_can_leave:
            return False
        # A row that has ended still gets a token in every step. It must leave before it exceeds the model's context or has no
        # random number left.
        is_full = any(num >= max_new_tokens for num, ended in zip(self.num_steps, self.ended, strict=True) if ended)
        return is_full or num_ended > len(self.rows) // _WORTH_MOVING

    def keep(self, rows: list[int]) -> None:
        """Remove all other rows from the batch, and the first columns if they are padding in each row that stays."""
        self.decoding.keep(rows)
        self.rows, self.written = [self.rows[i] for i in rows], [self.written[i] for i in rows]
        self.ended, self.num_steps = [self.ended[i] for i in rows], [self.num_steps[i] for i in rows]
        index = torch.tensor(rows, device=self.num_steps_B.device)
        self.num_steps_B = self.num_steps_B[index]
        self.seen_BV = None if self.seen_BV is None else self.seen_BV[index]
        self.uniforms_BN = None if self.uniforms_BN is None else self.uniforms_BN[index]
        # One less than the length of a row, because the model has not processed the newest token yet.
        num_read = max(len(row.row) + num - 1 for row, num in zip(self.rows, self.num_steps, strict=True))
        num_padding = self.decoding.num_columns - num_read
        if num_padding > 0 and self.decoding.rows_can_join:
            self.decoding.drop_columns(num_padding)

    def join(self, other: _Running) -> None:
        """Append the rows of another batch."""
        self.decoding.join(other.decoding)
        self.rows, self.written = self.rows + other.rows, self.written + other.written
        self.ended, self.num_steps = self.ended + other.ended, self.num_steps + other.num_steps
        self.num_steps_B = torch.cat([self.num_steps_B, other.num_steps_B])
        if self.seen_BV is not None and other.seen_BV is not None:
            self.seen_BV = torch.cat([self.seen_BV, other.seen_BV])
        if self.uniforms_BN is not None and other.uniforms_BN is not None:
            self.uniforms_BN = torch.cat([self.uniforms_BN, other.uniforms_BN])


def continue_prompts(
    waiting: Sequence[Waiting],
    prefill: Callable[[list[Waiting]], Decoding],
    capacity: Capacity,
    sampling: Sampling,
    ends: Callable[[list[int]], bool],
    watch: Callable[[dict[tuple[int, int], list[int]]], None] | None = None,
) -> Iterator[tuple[Waiting, list[int]]]:
    """Continue prompts; yield each as soon as it has ended, with its new tokens, the one that ends it included.

    Args:
        waiting: Prompts that may share a batch.
        prefill: Runs the model on prompts as one batch, padded on the left.
        capacity: Limits on the number of rows.
        sampling: How the next token is chosen.
        ends: Returns whether the last of a row's new tokens ends its text; their maximum number is checked here.
        watch: Called after every step with the new tokens so far of each row that has not ended before, by `Waiting.key`.
    """
    # The longest prompts come first, so that a batch that is too large for the memory fails at the start, not after an hour.
    queue = deque(sorted(waiting, key=lambda one: len(one.row), reverse=True))
    if not capacity.max_new_tokens:
        yield from ((one, []) for one in queue)
        return
    running: _Running | None = None
    num_rows = 0
    while queue or running is not None:
        if running is None:
            running = _take_prompts(queue, prefill, sampling, capacity.num_prefilled(queue))
            num_rows = capacity.num_rows(running.decoding) if capacity.mixes and running.decoding.rows_can_join else 0
        while queue and (num_free := num_rows - len(running.rows)) > num_rows // _WORTH_MOVING:
            running.join(_take_prompts(queue, prefill, sampling, min(num_free, capacity.num_prefilled(queue))))
        token_B, tokens = running.choose()
        active = [number for number, ended in enumerate(running.ended) if not ended]
        for number in active:
            written = running.written[number]
            written.append(tokens[number])
            running.ended[number] = ends(written) or len(written) == capacity.max_new_tokens
        if watch is not None:
            watch({running.rows[number].key: running.written[number] for number in active})
        yield from ((running.rows[n], running.written[n]) for n in active if running.ended[n])
        unfinished = [number for number in active if not running.ended[number]]
        if not unfinished:
            running = None
            continue
        # Rows leave before the step, because a row needs no forward pass after the token that ends it.
        if running.is_worth_moving(capacity.max_new_tokens):
            running.keep(unfinished)
            token_B = token_B[torch.tensor(unfinished, device=token_B.device)]
        # Every row of the batch gets a new column, including those that have ended but have not left.
        running.decoding.step(token_B)


def _take_prompts(
    queue: deque[Waiting], prefill: Callable[[list[Waiting]], Decoding], sampling: Sampling, num: int
) -> _Running:
    """Take prompts from the front of the queue and prefill them as a batch."""
    rows = [queue.popleft() for _ in range(num)]
    return _Running(prefill(rows), sampling, rows)
