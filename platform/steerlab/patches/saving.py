"""Patches on disk: the constructor's arguments as JSON, the tensors as safetensors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from steerlab import models
from steerlab.guards import saved
from steerlab.guards.json_values import Json, JsonObject
from steerlab.patches.activation import ActivationPatch
from steerlab.patches.attaching import Patch
from steerlab.patches.embedding import EmbeddingPatch
from steerlab.patches.logit import LogitPatch
from steerlab.patches.reward import RewardPatch
from steerlab.patches.second_model import SecondModelPatch
from steerlab.patches.weight import WeightPatch
from steerlab.storage.whole import is_intact, json_sum, xxh3

_SPEC, _TENSORS = "patch.json", "patch.safetensors"
_CHANGED = "has changed since it was written; copy or make the patch again"
_SMALL = 1 << 20
"""Largest size that a patch may name without a tensor of that size, such as the width of a model whose embeddings rotate."""
SavedPatch: TypeAlias = EmbeddingPatch | ActivationPatch | LogitPatch | WeightPatch | SecondModelPatch | RewardPatch
"""Any patch that can be saved and loaded."""
KINDS: dict[str, Callable[..., SavedPatch]] = {
    "embedding": EmbeddingPatch,
    "activation": ActivationPatch,
    "logit": LogitPatch,
    "weight": WeightPatch,
    "second_model": SecondModelPatch,
    "reward": RewardPatch,
}
"""Constructor by the kind that a patch's file names."""


def save(patch: Patch, directory: Path, model_fingerprint: str) -> None:
    """Write a patch as JSON and safetensors.

    Args:
        patch: the patch.
        directory: made if it does not exist.
        model_fingerprint: `models.fingerprint` of the model that the patch belongs to; `load` compares it.
    """
    # The tensors are copied to the CPU, so that a patch from a GPU loads on a machine without one; safetensors refuses strided
    # views.
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in patch.tensors().items()}, directory / _TENSORS)
    # The tensors are written before the spec that `exists` looks for, so that a partly written patch does not count as a patch.
    sums = {_TENSORS: xxh3(directory / _TENSORS)}
    spec = {"kind": patch.kind, "spec": patch.spec(), "model": model_fingerprint, "sums": sums, "schema": 2}
    # The spec goes through JSON before the sum is computed, because it may hold tuples.
    spec = json.loads(json.dumps(spec))
    (directory / _SPEC).write_text(json.dumps({**spec, "xxh3": json_sum(spec)}, indent=2))


class _Saved(BaseModel):
    kind: str
    spec: JsonObject
    model: str
    sums: dict[str, str] = {}
    """XXH3 sums of files beside it; empty in patches of schema 1."""


def load(directory: Path, model: nn.Module | None = None) -> SavedPatch:
    """Read a patch, in evaluation mode on the CPU.

    Args:
        directory: where `save` wrote it.
        model: the model that the patch must have been made for; None skips this check.

    Raises:
        ValueError: a file is damaged, the tensors do not match the JSON, or the patch belongs to another model.
    """
    # The JSON is checked before the tensors, because a patch of another model may be as large as a model.
    raw = saved.read_like(directory / _SPEC, _Saved)
    about = _Saved.model_validate(raw)
    if about.kind not in KINDS:
        raise ValueError(f"{directory / _SPEC}: unknown kind of patch {about.kind!r:.80}; known: {', '.join(KINDS)}")
    # Shapes are not enough: models of one family have the same ones, and a map of another model steers at random.
    if model is not None and models.fingerprint(model) != about.model:
        raise ValueError(f"the patch in {directory} was made for another model than this {type(model).__name__}")
    # The file may come from a stranger, so types and sizes are checked before a constructor allocates anything.
    saved.checked(about.spec, _arguments(about.kind), str(directory / _SPEC))
    _check_sizes(about.spec, directory)
    if not is_intact(raw):
        raise ValueError(f"the patch in {directory} is damaged: {_SPEC} {_CHANGED}")
    if _TENSORS in about.sums and xxh3(directory / _TENSORS) != about.sums[_TENSORS]:
        raise ValueError(f"the patch in {directory} is damaged: {_TENSORS} {_CHANGED}")
    try:
        patch = KINDS[about.kind](**about.spec)
        patch.load_state_dict(load_file(directory / _TENSORS))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, IndexError, SafetensorError) as error:
        # These are all errors that a constructor and `load_state_dict` raise for wrong values, or for tensors of other names or
        # shapes.
        raise ValueError(f"the patch in {directory} is damaged: {' '.join(str(error).split())[:300]}") from None
    return patch.eval()


@cache
def _arguments(kind: str) -> type[BaseModel]:
    """Return a strict pydantic model of the arguments of a kind's constructor, made from its annotations."""
    # The fields come from the annotations, so that a new argument of a patch is checked without a second list.
    constructor = KINDS[kind].__init__  # type: ignore[misc]
    types = get_type_hints(constructor)
    parameters = list(inspect.signature(constructor).parameters.values())[1:]  # without self
    fields: dict[str, Any] = {
        parameter.name: (types[parameter.name], ... if parameter.default is inspect.Parameter.empty else parameter.default)
        for parameter in parameters
    }
    return create_model(kind, __config__=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False), **fields)


def _check_sizes(spec: JsonObject, directory: Path) -> None:
    """Raise ValueError for a number among a patch's arguments that is larger than every axis of its tensors."""
    # The constructor allocates tensors of the sizes in the JSON before `load_state_dict` compares them with the file, so that a
    # few bytes of JSON could otherwise take all memory.
    try:
        with safe_open(directory / _TENSORS, "pt") as file:
            longest = max((max(file.get_slice(name).get_shape(), default=1) for name in file.keys()), default=0)  # noqa: SIM118
    except (SafetensorError, FileNotFoundError, OSError) as error:
        raise ValueError(f"the patch in {directory} is damaged: {_TENSORS}: {' '.join(str(error).split())[:200]}") from None
    for number in _whole_numbers(spec):
        if number > max(longest, _SMALL):
            raise ValueError(
                f"the patch in {directory} is damaged: no tensor has the size {str(number)[:20]} that {_SPEC} names"
            )


def _whole_numbers(value: Json) -> Iterator[int]:
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _whole_numbers(item)
    # bool is a subclass of int, but not a size.
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def inverse(patch: SavedPatch) -> SavedPatch:
    """Return the inverse of a patch, which induces what its maps remove.

    Raises:
        ValueError: the patch is not one of maps, or one of its maps has no inverse.
    """
    if not isinstance(patch, ActivationPatch):
        raise ValueError(f"a patch of kind {patch.kind} has no inverse: only maps of activations have one")
    return patch.inverse()


def exists(directory: Path) -> bool:
    """Return whether a directory holds a saved patch."""
    return (directory / _SPEC).is_file()
