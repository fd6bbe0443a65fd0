"""Rows for the training and the test of linear probes, with the hidden states of their tokens."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from steerlab.evaluation.asking.items import Numbered, choose, instruction_rows
from steerlab.evaluation.tasks.roles.linear_probe import Tokens
from steerlab.evaluation.tasks.roles.marked_prompts import of_row
from steerlab.steered.language import SteeredModel

if TYPE_CHECKING:
    from steerlab.evaluation.tasks.roles.probing import Config


def train_rows(num_rows: int, config: Config) -> list[int]:
    """Choose the indices of the training rows; at least one row is for training and at least one for the test."""
    num_train = min(max(1, round(config.train_share * num_rows)), num_rows - 1)
    # The seed differs from that of the choice of rows, since equal random numbers would correlate both choices.
    return choose(range(num_rows), num_train, config.rows_seed + 1)


def usable_rows(model: SteeredModel, config: Config) -> tuple[list[Numbered], list[Numbered]]:
    """Choose rows with an input; return those that fit into the context in both of their forms, and those that do not.

    Raises:
        ValueError: there are fewer than two rows, one to train on and one to test.
    """
    rows = instruction_rows(config.source, needs_input=True, offset=config.offset, limit=config.num_rows, seed=config.rows_seed)
    if len(rows) < 2:
        raise ValueError(f"{config.source} has {len(rows)} usable rows; a probe needs two")
    forms = [model.fits([of_row(model.encoder, item, e) for item in rows], config.max_tokens) for e in (False, True)]
    fits = [plain and exchanged for plain, exchanged in zip(*forms, strict=True)]
    halves = [[item for item, fit in zip(rows, fits, strict=True) if fit == wanted] for wanted in (True, False)]
    return halves[0], halves[1]


def collect(model: SteeredModel, rows: Sequence[Numbered], config: Config, strength: float) -> Tokens:
    """Collect hidden states of equally many instruction and data tokens of every row, in both of its forms."""
    forms = [(i, exchanged) for i in range(len(rows)) for exchanged in (False, True)]
    prompts = [of_row(model.encoder, rows[i], exchanged) for i, exchanged in forms]
    h, is_instruction, row, exchange = [], [], [], []
    for (i, exchanged), (h_LTD, encoded) in zip(forms, model.hidden_states(prompts, strength=strength), strict=True):
        # Each form has its own generator, so that the choice does not depend on the order or number of rows.
        draw = random.Random(f"{config.seed} {rows[i].id} {exchanged}")
        chosen = balanced(encoded.parts, max(encoded.parts), config.tokens_per_role, draw)
        h.append(h_LTD[:, chosen].transpose(0, 1))
        # `of_row` makes the instruction part 1 and the data the last part.
        is_instruction += [encoded.parts[t] == 1 for t in chosen]
        row += [i] * len(chosen)
        exchange += [exchanged] * len(chosen)
    return Tokens(torch.cat(h), torch.tensor(is_instruction), torch.tensor(row), torch.tensor(exchange))


def balanced(parts: Sequence[int], data_part: int, most: int, draw: random.Random) -> list[int]:
    """Choose at most `most` positions of instruction tokens (part 1) and equally many of data tokens (part `data_part`)."""
    of_role = [[t for t, part in enumerate(parts) if part == wanted] for wanted in (1, data_part)]
    count = min(most, *map(len, of_role))
    # Shuffled by sorting with random keys: Python guarantees the same numbers in every version only for `random()`.
    return [t for positions in of_role for t in sorted(positions, key=lambda _: draw.random())[:count]]
