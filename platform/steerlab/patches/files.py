"""Patches on disk: the constructor's arguments as JSON, the tensors as safetensors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from steerlab import models
from steerlab.patches.activation import ActivationPatch
from steerlab.patches.embedding import EmbeddingPatch
from steerlab.patches.logit import LogitPatch
from steerlab.patches.second_model import SecondModelPatch
from steerlab.patches.weight import WeightPatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPEC, _TENSORS = "patch.json", "patch.safetensors"
KINDS: dict[str, Callable[..., Any]] = {
    "embedding": EmbeddingPatch,
    "activation": ActivationPatch,
    "logit": LogitPatch,
    "weight": WeightPatch,
    "second_model": SecondModelPatch,
}


def save(patch: Any, directory: Path, model_fingerprint: str) -> None:
    """Write a patch as JSON and safetensors; the fingerprint names the model it belongs to."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in patch.tensors().items()}, directory / _TENSORS)
    spec = {"kind": patch.kind, "spec": patch.spec(), "model": model_fingerprint, "schema": 1}
    (directory / _SPEC).write_text(json.dumps(spec, indent=2))


def load(directory: Path, model: PreTrainedModel | None = None) -> Any:
    """Read a patch; with a model given, refuse a patch that was made for another one."""
    saved = json.loads((directory / _SPEC).read_text())
    if saved["kind"] not in KINDS:
        raise ValueError(f"{directory / _SPEC}: unknown kind of patch {saved['kind']!r}; known: {', '.join(KINDS)}")
    if model is not None and models.fingerprint(model) != saved["model"]:
        raise ValueError(f"the patch in {directory} was made for another model than this {type(model).__name__}")
    patch = KINDS[saved["kind"]](**saved["spec"])
    patch.load_state_dict(load_file(directory / _TENSORS))
    return patch.eval()


def exists(directory: Path) -> bool:
    """Say whether a directory holds a saved patch."""
    return (directory / _SPEC).is_file()
