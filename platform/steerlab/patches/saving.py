"""Patches on disk: the constructor's arguments as JSON, the tensors as safetensors."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, get_type_hints

from pydantic import BaseModel, ConfigDict, create_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from steerlab import models
from steerlab.guards import saved
from steerlab.guards.json_values import Json, JsonObject
from steerlab.patches.activation import ActivationPatch
from steerlab.patches.attaching import Patch
from steerlab.patches.embedding import EmbeddingPatch
from steerlab.patches.logit import LogitPatch
from steerlab.patches.second_model import SecondModelPatch
from steerlab.patches.weight import WeightPatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_SPEC, _TENSORS = "patch.json", "patch.safetensors"
_SMALL = 1 << 20
"""Sizes that may stand in a patch without a tensor of them: the width of a model whose embeddings are rotated, a context."""
SavedPatch: TypeAlias = EmbeddingPatch | ActivationPatch | LogitPatch | WeightPatch | SecondModelPatch
KINDS: dict[str, Callable[..., SavedPatch]] = {
    "embedding": EmbeddingPatch,
    "activation": ActivationPatch,
    "logit": LogitPatch,
    "weight": WeightPatch,
    "second_model": SecondModelPatch,
}


def save(patch: Patch, directory: Path, model_fingerprint: str) -> None:
    """Write a patch as JSON and safetensors; the fingerprint names the model it belongs to."""
    directory.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in patch.tensors().items()}, directory / _TENSORS)
    spec = {"kind": patch.kind, "spec": patch.spec(), "model": model_fingerprint, "schema": 1}
    (directory / _SPEC).write_text(json.dumps(spec, indent=2))


class _Saved(BaseModel):
    kind: str
    spec: JsonObject
    model: str


def load(directory: Path, model: PreTrainedModel | None = None) -> SavedPatch:
    """Read a patch; with a model given, refuse a patch that was made for another one.

    Raises:
        ValueError: a file of the patch is damaged, its tensors are not those that it announces, or the model is another one.
    """
    about = saved.read(directory / _SPEC, _Saved)
    if about.kind not in KINDS:
        raise ValueError(f"{directory / _SPEC}: unknown kind of patch {about.kind!r:.80}; known: {', '.join(KINDS)}")
    if model is not None and models.fingerprint(model) != about.model:
        raise ValueError(f"the patch in {directory} was made for another model than this {type(model).__name__}")
    saved.checked(about.spec, _arguments(about.kind), str(directory / _SPEC))
    _check_sizes(about.spec, directory)
    try:
        patch = KINDS[about.kind](**about.spec)
        patch.load_state_dict(load_file(directory / _TENSORS))
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, IndexError, SafetensorError) as error:
        # What a stranger's file gives to a constructor: wrong types, tensors of other names or shapes.
        raise ValueError(f"the patch in {directory} is damaged: {' '.join(str(error).split())[:300]}") from None
    return patch.eval()


@cache
def _arguments(kind: str) -> type[BaseModel]:
    """Return the arguments of a kind's constructor, by its annotations, as JSON has to hold them."""
    constructor = KINDS[kind].__init__  # type: ignore[misc]
    types = get_type_hints(constructor)
    given = list(inspect.signature(constructor).parameters.values())[1:]
    fields: dict[str, Any] = {
        one.name: (types[one.name], ... if one.default is inspect.Parameter.empty else one.default) for one in given
    }
    return create_model(kind, __config__=ConfigDict(strict=True, extra="forbid", allow_inf_nan=False), **fields)


def _check_sizes(spec: JsonObject, directory: Path) -> None:
    """Refuse numbers in a patch's arguments for which there are no tensors: they would take memory before it is compared."""
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
        for one in value.values() if isinstance(value, dict) else value:
            yield from _whole_numbers(one)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def exists(directory: Path) -> bool:
    """Say whether a directory holds a saved patch."""
    return (directory / _SPEC).is_file()
