"""Continue a batch of rows, each with its own strength, sampling and end, token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field

import torch
from torch import Tensor

from steerlab.inputs.tokens import Encoded, collate
from steerlab.steered.language import SteeredModel
from steerlab.steered.sampling import Sampling, choose, uniforms


@dataclass
class Row:
    """One prompt and its continuation so far."""

    prompt: Encoded
    strength: float
    max_new_tokens: int
    sampling: Sampling
    seed: int
    choice: int
    """Number of the answer among those of its request: with the same seed, each answer has different random numbers."""
    cancelled: bool = False
    """Set by another thread after a stop text, or when the client has disconnected."""
    ids: list[int] = field(default_factory=list)
    """Tokens that were generated so far."""


Told = list[tuple[Row, int, bool]]
"""Rows with their token of one step, and whether it was the row's last token."""


@torch.inference_mode()
def run(model: SteeredModel, rows: Sequence[Row], ends: Set[int], tell: Callable[[Told], None]) -> None:
    """Continue the rows of one batch until all have ended.

    Args:
        model: The model.
        rows: The rows (`SteeredModel.in_common` chooses rows that can share a batch).
        ends: Ids of the tokens that end a text.
        tell: Called after each step with the tokens of the rows that had not ended.
    """
    strength_B = torch.tensor([row.strength for row in rows])
    batch = collate([row.prompt for row in rows], model.encoder.pad_id, side="left").to(model.device)
    decoding = model.prefill(batch, strength_B)
    random_BT = [uniforms([row.choice], row.max_new_tokens, row.seed)[0] if row.sampling.temperature else None for row in rows]
    running = [True] * len(rows)
    for step in range(max(row.max_new_tokens for row in rows)):
        chosen_B = _chosen(decoding.logits_BV.float(), rows, random_BT, step)
        told: Told = []
        for number, (row, token) in enumerate(zip(rows, chosen_B.tolist(), strict=True)):
            # Rows that have ended stay in the batch, and their tokens are dropped, as in `SteeredModel.generate`.
            if not running[number]:
                continue
            row.ids.append(token)
            running[number] = token not in ends and len(row.ids) < row.max_new_tokens and not row.cancelled
            told.append((row, token, not running[number]))
        tell(told)
        if not any(running):
            return
        decoding.step(chosen_B)


def _chosen(logits_BV: Tensor, rows: Sequence[Row], random_BT: Sequence[Tensor | None], step: int) -> Tensor:
    """Return the next token of each row, (B,); rows with equal sampling settings are sampled together."""
    chosen_B = torch.zeros(len(rows), dtype=torch.long, device=logits_BV.device)
    alike: dict[Sampling, list[int]] = {}
    for number, row in enumerate(rows):
        alike.setdefault(row.sampling, []).append(number)
    for sampling, numbers in alike.items():
        seen_BV = _seen([rows[i] for i in numbers], logits_BV) if sampling.repetition_penalty != 1 else None
        drawn = [random_BT[i] for i in numbers]
        # A row that has ended has no random numbers left; it reuses its last one, and its token is dropped.
        uniform_B = torch.stack([d[min(step, len(d) - 1)] for d in drawn if d is not None]) if sampling.temperature else None
        index = torch.tensor(numbers, device=logits_BV.device)
        chosen_B[index], _ = choose(logits_BV[index], seen_BV, sampling, uniform_B)
    return chosen_B


def _seen(rows: Sequence[Row], logits_BV: Tensor) -> Tensor:
    """Return which tokens have occurred in each row, its prompt included, (B, V) bool."""
    seen_BV = torch.zeros(len(rows), logits_BV.shape[1], dtype=torch.bool, device=logits_BV.device)
    for number, row in enumerate(rows):
        seen_BV[number, torch.tensor([*row.prompt.input_ids, *row.ids], device=logits_BV.device)] = True
    return seen_BV
