"""CAA and ITI against their authors' formulas, derived again: one token, pairs of answers, heads of 128 numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Encoded, collate
from steerlab.job import Selection
from steerlab.methods import METHODS
from steerlab.patches import taps, token_masks

HEADS, HEAD_SIZE = 4, 128


def fit(name: str, source: dict[str, torch.Tensor], target: dict[str, torch.Tensor], **settings: object) -> dict[str, Any]:
    method = METHODS[name]
    return dict(method.fit(method.Config.model_validate(settings), source, target))  # type: ignore[attr-defined]


def test_caa_is_the_mean_difference_of_pairs_at_the_middle_layer() -> None:
    """v = mean over pairs of a(answer with the behaviour) - a(answer without), in the residual stream of one layer."""
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}" for i in range(32)]
    positive, negative = ({name: torch.randn(50, 256, generator=generator) for name in names} for _ in range(2))
    (name,), (found,) = zip(*fit("caa", negative, positive).items(), strict=True)
    pairs = [p - n for p, n in zip(positive["model.layers.16"].double(), negative["model.layers.16"].double(), strict=True)]
    assert name == "model.layers.16"
    torch.testing.assert_close(found.shift_D.double(), sum(pairs) / len(pairs), rtol=1e-5, atol=1e-6)
    assert (found.scale_D == 1).all()


@pytest.mark.parametrize(("texts_end_in", "settings"), [(1, {}), (2, {"positions": ((-2, -1),)})], ids=["A", "(A)"])
def test_caa_reads_the_letter_of_the_answer(
    tiny_model: PreTrainedModel, encoder: Encoder, texts_end_in: int, settings: dict[str, Any]
) -> None:
    """The hidden state of one token: the last one, or the last but one where a bracket follows the letter."""
    rows = [
        Encoded(input_ids=ids, roles=[0] * len(ids), in_response=[False] * len(ids), parts=[0] * len(ids))
        for ids in ([5, 6, 7, 8], [9, 10, 11])
    ]
    batch = collate(rows, encoder.pad_id)
    select = Selection(modules=r"model\.layers\.1", **settings)
    reader = taps.Reader(tiny_model, taps.select(tiny_model, select))
    with torch.no_grad():
        (z_BTD,) = reader(**batch.model_inputs).values()
        states = [tiny_model(input_ids=torch.tensor([row.input_ids]), output_hidden_states=True) for row in rows]
    reader.close()
    pooling = METHODS["caa"].Config().pooling  # type: ignore[attr-defined]
    found = token_masks.pool(z_BTD, token_masks.selected(batch, select), pooling)
    expected = torch.stack([state.hidden_states[2][0, -texts_end_in] for state in states])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("direction", ["mean", "probe"])
def test_iti_shifts_the_chosen_heads_by_sigma_times_the_direction(direction: str) -> None:
    """Centre-of-mass direction of unit length, times the standard deviation of all projections on it, times alpha."""
    generator = torch.Generator().manual_seed(0)
    width = HEADS * HEAD_SIZE
    source, target = ({f"o_proj.{i}": torch.randn(40, width, generator=generator) for i in range(2)} for _ in range(2))
    for name, head in (("o_proj.0", 3), ("o_proj.1", 0), ("o_proj.1", 2)):
        target[name][:, head * HEAD_SIZE : (head + 1) * HEAD_SIZE] += 0.8
    maps = fit("iti_heads", source, target, heads=HEADS, top_k=3, alpha=15.0, direction=direction)
    shifted = {
        (name, head)
        for name, found in maps.items()
        for head in range(HEADS)
        if found.shift_D[head * HEAD_SIZE : (head + 1) * HEAD_SIZE].any()
    }
    assert shifted == {("o_proj.0", 3), ("o_proj.1", 0), ("o_proj.1", 2)}
    for name, head in shifted:
        span = slice(head * HEAD_SIZE, (head + 1) * HEAD_SIZE)
        a, b = source[name][:, span].double().numpy(), target[name][:, span].double().numpy()
        shift = maps[name].shift_D[span].double().numpy()
        theta = b.mean(0) - a.mean(0) if direction == "mean" else shift
        theta = theta / np.linalg.norm(theta)
        sigma = np.std(np.concatenate([a, b]) @ theta)
        np.testing.assert_allclose(shift, 15.0 * sigma * theta, rtol=1e-4, atol=1e-5)
        # The probe's direction is not that of the means, but points the same way.
        assert (b.mean(0) - a.mean(0)) @ shift > 0


def test_iti_reads_the_last_token_and_can_steer_the_last_of_every_pass() -> None:
    """The authors' code adds to position -1 of each forward pass: the end of the prompt, then each generated token."""
    assert METHODS["iti_heads"].Config().pooling == "last"  # type: ignore[attr-defined]
    chosen = Selection(phases=("prompt_end", "generation"))
    steps = [[0, 1, 2, 3], [4], [5]]  # positions of the tokens of each pass; the prompt has four
    for step, positions in enumerate(steps):
        phases = torch.full((1, len(positions)), int(step > 0))
        roles = torch.zeros_like(phases)
        mask = token_masks.token_mask(
            chosen, roles, phases, torch.tensor([positions]), token_masks.prompt_lengths(roles, phases)
        )
        assert mask[0].tolist() == [False] * (len(positions) - 1) + [True]
