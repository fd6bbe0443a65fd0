"""Continuous batching: rows that have ended leave the batch, and waiting prompts enter it.

A decoding step costs nearly as much for one row as for many, and the texts of a task end at different lengths. So the batch has
as many rows as the memory for keys and values allows, and new prompts enter when enough rows have left. The n-th token of a row
is drawn with the row's own n-th random number, so other rows of the batch affect its text only by rounding.

The CPU waits for the GPU once in each decoding step, for the chosen tokens (`sampling.choose`), and once more for each further
way of sampling among the rows. Code of transformers makes it
wait once more, to look for padding in the attention mask; a patch that runs a model of its own adds another such wait. If a
model's cache cannot be split into rows, all rows stay in the batch until the last one has ended.

Axes besides those of tokens.py: N the maximum number of new tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Generic, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from steerlab.steered.prefilled import Decoding
from steerlab.steered.prompt_queue import Capacity, Key, Queue, Waiting
from steerlab.steered.sampling import Sampling, choose

_WORTH_MOVING = 8
"""Rows leave when more than an eighth of the batch has ended, and prompts enter when more than an eighth of the places is free.
Each time the cache is copied, which would cost too much for every single row."""


class Step(NamedTuple, Generic[Key]):
    """A row after a decoding step."""

    row: Waiting[Key]
    written: list[int]
    """Its new tokens so far; the list grows with the next step."""
    ended: bool


@dataclass
class _Running(Generic[Key]):
    """The batch that is being continued; all lists and tensors have the same order of rows."""

    decoding: Decoding
    rows: list[Waiting[Key]]
    written: list[list[int]] = field(init=False)
    """New tokens of each row."""
    ended: list[bool] = field(init=False)
    """Whether each row has ended; such rows stay until enough of them have ended to copy the cache."""
    num_steps: list[int] = field(init=False)
    """Number of tokens that were chosen for each row, including those after its end."""
    num_steps_B: Tensor = field(init=False)
    """`num_steps` on the device."""
    seen_BV: Tensor | None = field(init=False)
    """Whether each token of the vocabulary has occurred in a row; None if no row has a repetition penalty."""
    uniforms_BN: Tensor | None = field(init=False)
    """Random numbers, N the largest number of new tokens; None if all rows are decoded greedily."""
    groups: list[tuple[Sampling, Tensor | None]] = field(init=False)
    """The rows that are sampled in the same way; None if these are all rows."""

    def __post_init__(self) -> None:
        num, device = len(self.rows), self.decoding.logits_BV.device
        self.written, self.ended, self.num_steps = [[] for _ in self.rows], [False] * num, [0] * num
        self.num_steps_B = torch.zeros(num, dtype=torch.long, device=device)
        self.seen_BV, self.uniforms_BN = self._seen(), self._uniforms()
        self._group()

    def _uniforms(self) -> Tensor | None:
        if all(row.uniforms_N is None for row in self.rows):
            return None
        numbers = [torch.zeros(row.max_new_tokens) if row.uniforms_N is None else row.uniforms_N for row in self.rows]
        return pad_sequence(numbers, batch_first=True).to(self.decoding.logits_BV.device)

    def _seen(self) -> Tensor | None:
        if all(row.sampling.repetition_penalty == 1 for row in self.rows):
            return None
        # A table (B, V) is faster to look up and update than a search in each row's tokens.
        seen_BV = torch.zeros_like(self.decoding.logits_BV, dtype=torch.bool)
        for number, (row, written) in enumerate(zip(self.rows, self.written, strict=True)):
            seen_BV[number, torch.tensor([*row.row.input_ids, *written], device=seen_BV.device)] = True
        return seen_BV

    def _group(self) -> None:
        numbers: dict[Sampling, list[int]] = {}
        for number, row in enumerate(self.rows):
            numbers.setdefault(row.sampling, []).append(number)
        device = self.decoding.logits_BV.device
        alone = len(numbers) == 1
        self.groups = [(how, None if alone else torch.tensor(own, device=device)) for how, own in numbers.items()]

    def choose(self) -> tuple[Tensor, list[int]]:
        """Return the next token of every row, on the device and as a list."""
        uniform_B = None
        if self.uniforms_BN is not None:
            # Indexed by each row's own number of tokens, so that rows which entered at different times draw as if alone, (B,).
            uniform_B = self.uniforms_BN.gather(1, self.num_steps_B[:, None])[:, 0]
        logits_BV = self.decoding.logits_BV.float()
        if self.groups[0][1] is None:
            token_B, tokens = _chosen(logits_BV, self.seen_BV, self.groups[0][0], uniform_B)
        else:
            token_B = torch.zeros_like(self.num_steps_B)
            for how, index in self.groups:
                seen = None if self.seen_BV is None else self.seen_BV[index]
                token_B[index], _ = _chosen(logits_BV[index], seen, how, None if uniform_B is None else uniform_B[index])
            tokens = token_B.tolist()
        if self.seen_BV is not None:
            self.seen_BV.scatter_(1, token_B[:, None], True)
        self.num_steps_B = self.num_steps_B + 1
        self.num_steps = [num + 1 for num in self.num_steps]
        return token_B, tokens

    def is_worth_moving(self) -> bool:
        """Return whether the rows that have ended should leave the batch now."""
        num_ended = sum(self.ended)
        if not num_ended or not self.decoding.rows_can_leave:
            return False
        # A row that has ended still gets a token in every step. It must leave before it exceeds the model's context or has no
        # random number left.
        ended = [n for n, has_ended in enumerate(self.ended) if has_ended]
        is_full = any(self.num_steps[n] >= self.rows[n].max_new_tokens for n in ended)
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
        self._group()
        # One less than the length of a row, because the model has not processed the newest token yet.
        num_read = max(len(row.row) + num - 1 for row, num in zip(self.rows, self.num_steps, strict=True))
        num_padding = self.decoding.num_columns - num_read
        if num_padding > 0 and self.decoding.rows_can_join:
            self.decoding.drop_columns(num_padding)

    def join(self, other: _Running[Key]) -> None:
        """Append the rows of another batch."""
        self.decoding.join(other.decoding)
        self.rows, self.written = self.rows + other.rows, self.written + other.written
        self.ended, self.num_steps = self.ended + other.ended, self.num_steps + other.num_steps
        self.num_steps_B = torch.cat([self.num_steps_B, other.num_steps_B])
        self.uniforms_BN = self._uniforms()
        both = self.seen_BV is not None and other.seen_BV is not None
        # Made anew only if one of the two batches had none, since it looks at every token so far.
        self.seen_BV = torch.cat([self.seen_BV, other.seen_BV]) if both else self._seen()  # type: ignore[list-item]
        self._group()


def _chosen(
    logits_BV: Tensor, seen_BV: Tensor | None, sampling: Sampling, uniform_B: Tensor | None
) -> tuple[Tensor, list[int]]:
    # Other rows of the batch may need the tokens or random numbers that these rows do not use.
    seen_BV = seen_BV if sampling.repetition_penalty != 1 else None
    return choose(logits_BV, seen_BV, sampling, uniform_B if sampling.temperature else None)


def continue_prompts(
    queue: Queue[Key],
    prefill: Callable[[list[Waiting[Key]]], Decoding | None],
    capacity: Capacity,
    ends: Callable[[Waiting[Key], list[int]], bool],
    watch: Callable[[list[Step[Key]]], None] | None = None,
) -> Iterator[tuple[Waiting[Key], list[int]]]:
    """Continue prompts; yield each as soon as it has ended, with its new tokens, the one that ends it included.

    Args:
        queue: The prompts.
        prefill: Runs the model on prompts as one batch, padded on the left. None leaves these prompts out.
        capacity: Limits on the number of rows.
        ends: Returns whether the last of a row's new tokens ends its text; their maximum number is checked here.
        watch: Called after every step with the rows that had not ended before.
    """
    running: _Running[Key] | None = None
    num_rows = new = 0
    while True:
        if running is None:
            if not (rows := queue.first()):
                return
            yield from ((row, []) for row in rows if not row.max_new_tokens)
            if not (rows := [row for row in rows if row.max_new_tokens]):
                continue
            if (decoding := prefill(rows)) is None:
                continue
            running = _Running(decoding, rows)
            new = max(row.max_new_tokens for row in rows)
            joinable = capacity.mixes and running.decoding.rows_can_join
            num_rows = capacity.num_rows(running.decoding, new) if joinable else 0
        while (num_free := num_rows - len(running.rows)) > num_rows // _WORTH_MOVING:
            if not (rows := queue.more(running.rows, num_free)):
                break
            if (decoding := prefill(rows)) is None:
                continue
            running.join(_Running(decoding, rows))
            if (longest := max(row.max_new_tokens for row in rows)) > new:
                # Longer rows than those by which the number was computed take more memory each.
                new, num_rows = longest, capacity.num_rows(running.decoding, longest)
        token_B, tokens = running.choose()
        active = [number for number, ended in enumerate(running.ended) if not ended]
        for number in active:
            row, written = running.rows[number], running.written[number]
            written.append(tokens[number])
            running.ended[number] = ends(row, written) or len(written) == row.max_new_tokens
        if watch is not None:
            watch([Step(running.rows[n], running.written[n], running.ended[n]) for n in active])
        yield from ((running.rows[n], running.written[n]) for n in active if running.ended[n])
        unfinished = [number for number in active if not running.ended[number]]
        if not unfinished:
            running = None
            continue
        # Rows leave before the step, because a row needs no forward pass after the token that ends it.
        if running.is_worth_moving():
            running.keep(unfinished)
            token_B = token_B[torch.tensor(unfinished, device=token_B.device)]
        # Every row of the batch gets a new column, including those that have ended but have not left.
        running.decoding.step(token_B)
