"""Language models written out: folded where that is the patched model, model and patches side by side where it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from transformers import AutoModelForCausalLM, MixtralConfig

from steerlab import models, patches
from steerlab.job import Selection
from steerlab.patches import ActivationPatch, EmbeddingPatch, taps
from steerlab.patches.maps import AffineMap
from steerlab.steered import export, stacks
from steerlab.steered.stacks import BELOW
from steerlab.storage.bases import BASE, PROMPT


@pytest.fixture
def base(tiny_dir: Path, tmp_path: Path) -> Path:
    """A tiny Llama with a tokenizer."""
    zoo.write("llama", tmp_path / "base", tiny_dir)
    return tmp_path / "base"


def left(folder: Path, base: Path, *stack: Any) -> Path:
    """An artifact of a model with a stack of patches on it."""
    model = models.load_model(base)
    folder.mkdir()
    for number, patch in enumerate(stack[:-1]):
        patches.save(patch, folder / BELOW / str(number), models.fingerprint(model))
    patches.save(stack[-1], folder / "patch", models.fingerprint(model))
    (folder / BASE).write_text(json.dumps({"source": str(base)}))
    (folder / PROMPT).write_text(json.dumps({"prompt_style": "plain", "response_role": "data"}))
    return folder


def mapped(base: Path, modules: str, by: float) -> ActivationPatch:
    """A patch that scales what modules give by 1 + `by`."""
    model = models.load_model(base)
    names = [tap.name for tap in taps.select(model, Selection(modules=modules))]
    maps = {name: AffineMap(torch.full((32,), 1 + by), torch.zeros(32)) for name in names}
    return ActivationPatch.from_maps(maps, Selection(modules=modules))


def difference(one: Any, other: Any, strength: float = 1.0) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(one.probe(), other.probe(strength), strict=True))


def test_a_patch_that_folds_is_in_the_weights(base: Path, tmp_path: Path) -> None:
    artifact = left(tmp_path / "left", base, mapped(base, r".*down_proj", 0.5))
    assert export.write(artifact, tmp_path / "out", strength=0.7, loading={}).reason is None
    assert difference(stacks.load(tmp_path / "out"), stacks.load(artifact), 0.7) < 1e-3


def test_weights_that_lose_a_small_effect_are_not_exported(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that this patch does is less than what may be rounding: weights without it must not pass for it."""
    artifact = left(tmp_path / "left", base, mapped(base, r".*down_proj", 1e-4))
    monkeypatch.setattr(models, "fold_affine", lambda *_: None)
    written = export.write(artifact, tmp_path / "out", strength=1.0, loading={})
    assert written.reason is not None and "merged into the weights, the patch has an error of" in written.reason
    assert len(stacks.load(tmp_path / "out").patches) == 1


def test_a_stack_that_does_not_fold_lies_beside_its_model(base: Path, tmp_path: Path) -> None:
    stack = (EmbeddingPatch(32, 1.2), mapped(base, r".*down_proj", 0.5), mapped(base, r".*layers\.\d", 0.2))
    artifact = left(tmp_path / "left", base, *stack)
    written = export.write(artifact, tmp_path / "out", strength=0.5, loading={})
    assert "depends on token roles" in (written.reason or "")
    found, expected = stacks.load(tmp_path / "out"), stacks.load(artifact)
    assert [patch.kind for patch in found.patches] == ["embedding", "activation", "activation"]
    for strength in (0.0, 0.5, 1.0):
        assert all(torch.equal(a, b) for a, b in zip(found.probe(strength), expected.probe(strength), strict=True))


def test_texts_of_several_lengths_are_compared(base: Path, tmp_path: Path) -> None:
    artifact = left(tmp_path / "left", base, mapped(base, r".*down_proj", 0.5))
    lengths = {len(probe) for probe in stacks.load(artifact).probe()}
    assert len(lengths) >= 3


def test_a_map_that_is_refused_leaves_the_weights_as_they_were() -> None:
    """The config of Mixtral has no flag for the biases that a shift of its first norm would need."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "num_local_experts": 2}
    config = MixtralConfig(**small, num_attention_heads=2, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="has no bias"):
        models.fold_affine(model, "model.layers.0.input_layernorm", torch.full((32,), 2.0).double(), torch.ones(32).double())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
