"""AurA against a count over all pairs."""

from __future__ import annotations

import pytest
import torch

from steerlab.methods.aura import aura_map, auroc


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    """Small whole numbers, so that there are ties."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 5, (7, 6), generator=generator).float() + 1, torch.randint(
        0, 5, (9, 6), generator=generator
    ).float()


def test_auroc_counts_pairs_and_half_of_the_ties() -> None:
    source, target = samples()
    greater = (source[:, None] > target[None]).double() + 0.5 * (source[:, None] == target[None]).double()
    assert torch.allclose(auroc(source, target), greater.mean((0, 1)))
    assert torch.allclose(auroc(source, target) + auroc(target, source), torch.ones(6).double())


def test_experts_are_dampened_and_others_left_alone() -> None:
    source, target = samples()
    source[:, 0], target[:, 0] = source[:, 0] + 100, target[:, 0]  # a perfect expert
    source[:, 1] = source[:, 1] - 100  # an expert for the target: left alone
    source[:, 2], target[:, 2] = 3.0, 3.0  # constant
    scale, shift, *_ = aura_map(source, target)
    assert scale[:3].tolist() == [0, 1, 1]
    assert shift.tolist() == [0] * 6
    area = auroc(source, target)[3:]
    assert scale[3:].tolist() == pytest.approx([1 - 2 * max(0.0, a - 0.5) for a in area.tolist()])


def test_too_few_samples() -> None:
    source, target = samples()
    with pytest.raises(ValueError, match="the target has 2 samples"):
        aura_map(source, target[:2])
