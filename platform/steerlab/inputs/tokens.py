"""Rows and batches of tokens with roles and labels (made by encoding.py), padding, and the legend of tensor axes.

Axes, as suffixes of tensor names: B rows, T tokens, D width, L layers, V vocabulary, P pairs of coordinates (D/2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION, DATA, RESPONSE, PADDING = 0, 1, 2, 3
ROLES = {"instruction": INSTRUCTION, "data": DATA, "response": RESPONSE, "padding": PADDING}
PROMPT, GENERATION = 0, 1
PHASES = {"prompt": PROMPT, "generation": GENERATION}
# torch's `cross_entropy` skips this label by default.
IGNORED = -100
"""Label of a token that is not in the loss (transformers' convention)."""


class Part(NamedTuple):
    """A part of a message's text that has one role."""

    text: str
    role: int


class Message(NamedTuple):
    """One turn of a conversation. The speaker `text` marks a plain text without a chat template, which is its only turn."""

    speaker: Literal["system", "user", "assistant", "tool", "text"]
    parts: tuple[Part, ...]


Conversation = tuple[Message, ...]


@dataclass(frozen=True)
class Encoded:
    """One tokenised row; every list has one entry per token."""

    input_ids: list[int]
    roles: list[int]
    """Ids of roles, as in `ROLES`."""
    in_response: list[bool]
    """True for the tokens of the last answer, including the token that ends its turn."""
    parts: list[int]
    """Number of the message part that the token comes from, counted over the conversation; -1 for template text."""
    in_answers: list[bool] = field(default_factory=list)
    """True for the tokens of all answers, including earlier ones; if empty, the same as `in_response`."""

    def __post_init__(self) -> None:
        if not self.in_answers:
            object.__setattr__(self, "in_answers", self.in_response)

    def __len__(self) -> int:
        return len(self.input_ids)

    def targets(self, loss_on: str) -> list[bool]:
        """Return for each token whether its prediction is in the loss.

        `loss_on` is `DataSet.loss_on`: `all`, `response` (all answers of the row) or `last_response`.
        """
        # Nothing precedes the first token, so it is never predicted. An unknown name means every token, as `all` does; configs
        # allow no other names.
        chosen = {"response": self.in_answers, "last_response": self.in_response}.get(loss_on) or [True] * len(self)
        return [False, *chosen[1:]]

    def cut(self, length: int) -> Encoded:
        """Return the row of the first `length` tokens."""
        lists = (self.input_ids, self.roles, self.in_response, self.parts, self.in_answers)
        return Encoded(*(values[:length] for values in lists))  # type: ignore[arg-type]

    @property
    def sequences(self) -> tuple[Encoded, ...]:
        """Token sequences of this row: one, the row itself."""
        return (self,)


@dataclass(frozen=True)
class Pair:
    """One prompt with a preferred and a rejected response: a row of two sequences, each with the prompt."""

    chosen: Encoded
    rejected: Encoded

    def __len__(self) -> int:
        return max(len(self.chosen), len(self.rejected))

    def targets(self, loss_on: str) -> list[bool]:
        """Return for each token whether its prediction is in the loss, those of the preferred sequence first."""
        # Preference losses compare the last responses, because earlier answers are the same in both sequences.
        loss_on = "last_response" if loss_on == "response" else loss_on
        return [*self.chosen.targets(loss_on), *self.rejected.targets(loss_on)]

    @property
    def sequences(self) -> tuple[Encoded, ...]:
        """Token sequences of this row: two, the preferred one first."""
        return (self.chosen, self.rejected)


Row = Encoded | Pair


@dataclass(frozen=True)
class Batch:
    """Padded sequences; all tensors but `numbers` have shape (B, T). The two sequences of a pair follow each other."""

    input_ids: Tensor
    roles: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    labels: Tensor
    phases: Tensor
    """`GENERATION` for the tokens of the response, `PROMPT` for all others."""
    numbers: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.long))
    """Number of each sequence's row in its data set, (B,); empty if the caller does not need it."""

    @cached_property
    def predicting(self) -> tuple[Tensor, Tensor]:
        """Rows and positions, (N,) each, that predict the tokens with labels, row by row: position t predicts token t + 1."""
        row_N, position_N = (self.labels[:, 1:] != IGNORED).nonzero(as_tuple=True)
        return row_N, position_N

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with all tensors on a device."""
        device = torch.device(device)
        if device.type == self.labels.device.type == "cpu":
            return self
        # All tensors and the places of the labels go in one asynchronous copy, because finding the number of labels on a GPU
        # would wait for it.
        tensors = [*(getattr(self, name) for name in self.__dataclass_fields__), *self.predicting]
        is_up = self.labels.device.type == "cpu"  # an asynchronous copy to the CPU would be read too early
        flat = torch.cat([tensor.flatten() for tensor in tensors]).to(device, non_blocking=is_up)
        parts = flat.split([tensor.numel() for tensor in tensors])
        *fields, row_N, position_N = (part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True))
        moved = Batch(*fields)
        moved.__dict__["predicting"] = (row_N, position_N)
        return moved

    @property
    def model_inputs(self) -> dict[str, Tensor]:
        """Arguments for the forward of a model of transformers."""
        # Positions are explicit, because most models would count padding on the left (transformers 5).
        return {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "position_ids": self.position_ids,
        }

    @property
    def patched_inputs(self) -> dict[str, Tensor]:
        """Arguments for the forward of a model with patches."""
        return {**self.model_inputs, "roles": self.roles, "phases": self.phases}

    @property
    def read_inputs(self) -> dict[str, object]:
        """Arguments for a forward whose activations are read, without a cache of keys and values."""
        return {**self.patched_inputs, "use_cache": False}


def collate(
    rows: Sequence[Row],
    pad_id: int,
    side: Literal["left", "right"] = "right",
    loss_on: str = "all",
    numbers: Sequence[int] = (),
) -> Batch:
    """Return a batch of rows, padded to the longest sequence.

    Args:
        rows: Rows; a pair gives two sequences, the preferred one first.
        pad_id: Id of padding tokens.
        side: Side of the padding: right for training, left for generation.
        loss_on: Tokens whose labels are not `IGNORED`, as `DataSet.loss_on`.
        numbers: Numbers of the rows in their data set; may be empty.
    """
    # Each sequence has a number, so a pair has two.
    counted = [number for row, number in zip(rows, numbers, strict=bool(numbers)) for _ in row.sequences]
    sequences = [sequence for row in rows for sequence in row.sequences]
    longest = max(len(row) for row in sequences)

    def pad(values: Sequence[int], fill: int) -> list[int]:
        padding = [fill] * (longest - len(values))
        return [*padding, *values] if side == "left" else [*values, *padding]

    # As in `Pair.targets`, preference losses compare the last responses only.
    targets = [loss_on if isinstance(row, Encoded) else "last_response" if loss_on == "response" else loss_on for row in rows]
    labels = [
        [token if chosen else IGNORED for token, chosen in zip(sequence.input_ids, sequence.targets(target), strict=True)]
        for row, target in zip(rows, targets, strict=True)
        for sequence in row.sequences
    ]
    return Batch(
        input_ids=torch.tensor([pad(row.input_ids, pad_id) for row in sequences]),
        roles=torch.tensor([pad(row.roles, PADDING) for row in sequences]),
        attention_mask=torch.tensor([pad([1] * len(row), 0) for row in sequences]),
        position_ids=torch.tensor([pad(range(len(row)), 0) for row in sequences]),
        labels=torch.tensor([pad(row, IGNORED) for row in labels]),
        # Padding counts as prompt; its role and mask exclude it.
        phases=torch.tensor([pad([int(inside) for inside in row.in_response], PROMPT) for row in sequences]),
        numbers=torch.tensor(counted, dtype=torch.long),
    )


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id of padding tokens: the tokenizer's, or that of its end-of-sequence token, or 0.

    Any id will do, because attention masks and labels are always explicit.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((candidate for candidate in candidates if isinstance(candidate, int)), 0)
