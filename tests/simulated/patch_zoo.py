"""One patch of every kind for the tiny model, in all its forms, with weights that matter."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, GPT2Config

from steerlab import models, patches
from steerlab.job import Selection
from steerlab.patches.maps import AffineMap, LowRankMap

NORM = "model.layers.1.post_attention_layernorm"
LINEAR = "model.layers.0.mlp.up_proj"
Make = Callable[[Any, Path], Any]


def moved(patch: Any) -> Any:
    """Return the patch with other weights than those of its start."""
    generator = torch.Generator().manual_seed(3)
    for parameter in patch.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return patch.eval()


def _widths(model: Any) -> dict[str, int]:
    return {NORM: model.config.hidden_size, LINEAR: model.config.intermediate_size}


def _bounded(model: Any, _folder: Path) -> Any:
    generator = torch.Generator().manual_seed(4)
    maps = {}
    for place, width in _widths(model).items():
        scale, shift = torch.rand(2, width, generator=generator)
        maps[place] = AffineMap(1 + scale, shift, torch.full((width,), -1.0), torch.ones(width))
    return patches.ActivationPatch.from_maps(maps, Selection(roles=("data", "response"), exclude_positions=((0, 1),)))


def _low_rank(model: Any, _folder: Path) -> Any:
    direction = torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(5))
    return patches.ActivationPatch.from_maps({NORM: LowRankMap.without(direction)}, Selection(exclude_token_ids=(2,)))


def _weight(model: Any, rank: int = 0) -> Any:
    return moved(patches.WeightPatch({f"{LINEAR}.weight": list(model.get_parameter(f"{LINEAR}.weight").shape)}, rank))


def _logit(model: Any, *form: Any, **options: Any) -> Any:
    return moved(patches.LogitPatch(model.config.hidden_size, model.config.vocab_size, *form, **options))


def _second_model(model: Any, _folder: Path) -> Any:
    patch = moved(patches.SecondModelPatch(models.config_of(model)))
    # As the model of these tests: torch has other kernels for its own attention on other devices.
    patch.second.set_attn_implementation("eager")
    return patch


def _reward_head(model: Any, folder: Path) -> Any:
    file = folder / "head.safetensors"
    save_file({"weight": torch.randn(1, model.config.hidden_size, generator=torch.Generator().manual_seed(6))}, file)
    return patches.RewardPatch(None, str(file), 5.0, 4)


def _reward_model(model: Any, folder: Path) -> Any:
    sizes: dict[str, Any] = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 128, "vocab_size": model.config.vocab_size}
    torch.manual_seed(7)
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=1, num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / "reward")
    return patches.RewardPatch(str(folder / "reward"), None, 5.0, 4)


FORMS: dict[str, Make] = {
    "embedding": lambda model, _: moved(patches.EmbeddingPatch(model.config.hidden_size, 1.0, learned=True, shift=True)),
    "affine maps": lambda model, _: moved(patches.ActivationPatch(_widths(model))),
    "maps with bounds on some roles": _bounded,
    "maps of low rank on some tokens": _low_rank,
    "logit": lambda model, _: _logit(model),
    "logit of a layer": lambda model, _: _logit(model, "mlp", 4, layer=0),
    "weight": lambda model, _: _weight(model),
    "weight of low rank": lambda model, _: _weight(model, 2),
    "second model": _second_model,
    "reward model": _reward_model,
    "reward head": _reward_head,
}
"""Makers of patches by kind and form; the folder is for the files that a patch loads."""

ONE_OF_EACH = ("embedding", "maps with bounds on some roles", "logit of a layer", "weight", "second model", "reward model")
"""A form of every kind of patch."""
