"""The four kinds of patch: strength 0 is the model itself, stacks, folding, saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from steerlab import models, patches
from steerlab.patches import ActivationPatch, CannotFold, EmbeddingPatch, LogitPatch, WeightPatch

IDS = torch.tensor([[1, 3, 20, 4, 30, 5], [1, 3, 40, 4, 50, 5]])
ROLES = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
NORM = "model.layers.1.post_attention_layernorm"
LINEAR = "model.layers.0.mlp.up_proj"


def randomised(patch: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for parameter in patch.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return patch.eval()


def embedding(model: PreTrainedModel) -> EmbeddingPatch:
    return randomised(EmbeddingPatch(model.config.hidden_size, 1.0, learned=True, shift=True))


def activation(model: PreTrainedModel) -> ActivationPatch:
    sizes = {NORM: model.config.hidden_size, LINEAR: model.config.intermediate_size, "model.layers.1": model.config.hidden_size}
    return randomised(ActivationPatch(sizes))


def logit(model: PreTrainedModel) -> LogitPatch:
    return randomised(LogitPatch(model.config.hidden_size, model.config.vocab_size, rank=4))


def weight(model: PreTrainedModel) -> WeightPatch:
    return randomised(WeightPatch({f"{LINEAR}.weight": list(model.get_parameter(f"{LINEAR}.weight").shape)}))


MAKERS: list[Callable[[PreTrainedModel], Any]] = [embedding, activation, logit, weight]
each_kind = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def logits(model: PreTrainedModel, strengths: list[float] | None = None, **kwargs: Any) -> torch.Tensor:
    if strengths is not None:
        kwargs["strengths"] = torch.tensor(strengths)
    with torch.no_grad():
        return model(IDS, **kwargs).logits


@each_kind
def test_strength_0_is_the_model_bit_for_bit_and_detach_restores_it(make: Any, tiny_model: PreTrainedModel) -> None:
    before = logits(tiny_model)
    attached = patches.attach(tiny_model, [make(tiny_model)])
    assert not torch.equal(logits(tiny_model, roles=ROLES), before)
    assert torch.equal(logits(tiny_model, [0.0, 0.0], roles=ROLES), before)
    attached.detach()
    assert torch.equal(logits(tiny_model), before)


@each_kind
def test_strength_1_is_no_strength_at_all(make: Any, tiny_model: PreTrainedModel) -> None:
    patches.attach(tiny_model, [make(tiny_model)])
    torch.testing.assert_close(logits(tiny_model, [1.0, 1.0], roles=ROLES), logits(tiny_model, roles=ROLES), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", MAKERS[:3], ids=lambda make: make.__name__)
def test_a_strength_for_each_row_equals_separate_calls(make: Any, tiny_model: PreTrainedModel) -> None:
    patches.attach(tiny_model, [make(tiny_model)])
    mixed = logits(tiny_model, [0.3, 1.4], roles=ROLES)
    for row, strength in enumerate([0.3, 1.4]):
        alone = logits(tiny_model, [strength] * 2, roles=ROLES)
        torch.testing.assert_close(mixed[row], alone[row], atol=1e-5, rtol=0)


def test_a_weight_patch_refuses_a_mixed_batch(tiny_model: PreTrainedModel) -> None:
    patches.attach(tiny_model, [weight(tiny_model)])
    with pytest.raises(ValueError, match=r"one strength for all rows of a call, got \[0.5, 1.0\]"):
        logits(tiny_model, [0.5, 1.0])


def test_a_stack_gives_each_patch_its_own_strength(tiny_model: PreTrainedModel) -> None:
    stack = [make(tiny_model) for make in MAKERS]
    base = logits(tiny_model)
    attached = patches.attach(tiny_model, stack)
    for number, make in enumerate(MAKERS):
        strengths = torch.zeros(4, 2)
        strengths[number] = 1.0
        with torch.no_grad():
            chosen = tiny_model(IDS, roles=ROLES, strengths=strengths).logits
        assert not torch.equal(chosen, base), make.__name__
    with pytest.raises(ValueError, match="3 rows of strengths for 4 patches"):
        tiny_model(IDS, roles=ROLES, strengths=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="already carries patches"):
        patches.attach(tiny_model, [])
    attached.detach()
    assert torch.equal(logits(tiny_model), base)


@each_kind
def test_save_and_load_and_refuse_another_model(make: Any, tiny_model: PreTrainedModel, tiny_dir: Path, tmp_path: Path) -> None:
    patch = make(tiny_model)
    patches.save(patch, tmp_path, models.fingerprint(tiny_model))
    assert patches.exists(tmp_path)
    loaded = patches.load(tmp_path, tiny_model)
    patches.attach(tiny_model, [patch])
    expected = logits(tiny_model, roles=ROLES)
    other = models.load_model(tiny_dir, seed=0)
    patches.attach(other, [loaded])
    assert torch.equal(logits(other, roles=ROLES), expected)
    with pytest.raises(ValueError, match="was made for another model"):
        patches.load(tmp_path, models.load_model(tiny_dir, seed=1))


@pytest.mark.parametrize("make", [logit, weight], ids=lambda make: make.__name__)
def test_folding_equals_hooks(make: Any, tiny_model: PreTrainedModel, tiny_dir: Path) -> None:
    patch = make(tiny_model)
    patches.attach(tiny_model, [patch])
    folded = models.load_model(tiny_dir, seed=0)
    patch.fold(folded, 0.6)
    torch.testing.assert_close(logits(folded), logits(tiny_model, [0.6, 0.6]), atol=1e-5, rtol=0)


def test_folding_an_affine_map_into_a_linear(tiny_model: PreTrainedModel, tiny_dir: Path) -> None:
    patch = randomised(ActivationPatch({LINEAR: tiny_model.config.intermediate_size}))
    patches.attach(tiny_model, [patch])
    folded = models.load_model(tiny_dir, seed=0)
    patch.fold(folded, 0.6)
    torch.testing.assert_close(logits(folded), logits(tiny_model, [0.6, 0.6]), atol=1e-5, rtol=0)


def test_what_cannot_fold_says_why(tiny_model: PreTrainedModel) -> None:
    with pytest.raises(CannotFold, match="depends on token roles"):
        embedding(tiny_model).fold(tiny_model, 1.0)
    EmbeddingPatch(tiny_model.config.hidden_size).fold(tiny_model, 1.0)
    with pytest.raises(CannotFold, match="only the map of a Linear"):
        ActivationPatch({NORM: tiny_model.config.hidden_size}).fold(tiny_model, 1.0)
