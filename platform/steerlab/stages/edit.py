"""The stage that changes a trained model's weights by a closed form (methods/edited.py); its artifact is a patch on it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from steerlab import models, patches
from steerlab.activations.moments import Moments
from steerlab.data import sources
from steerlab.guards.json_values import JsonObject
from steerlab.job import Job, Source, own_code
from steerlab.job.own_code import Code
from steerlab.methods import edited
from steerlab.methods.edited import EditConfig, Weight
from steerlab.methods.preparations import MOMENTS
from steerlab.methods.preparations import Source as Given
from steerlab.models import ModelFacts, WeightPlace
from steerlab.stages import fit
from steerlab.stages.spread import named_parts, subject
from steerlab.stages.spread.subject import Subject
from steerlab.steered.stacks import load_stack
from steerlab.storage.plan import Estimate, Stage, Work
from steerlab.storage.tensors import Parts, write

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from steerlab.inputs.encoding import Encoder

_CHANGE = "change"
"""Name of the only part of the stage."""
EDIT = "edit.json"
AFTER, BEFORE, UNALIGNED = "after", "before", "unaligned"
"""Names of the inputs that hold the three models."""


class Params(subject.OnModel):
    """Parameters of the stage."""

    method: JsonObject
    """The method's config."""
    before: Source | None = Field(default=None, exclude_if=lambda source: source is None)
    """Source of the model before the training; None if it is an artifact."""
    unaligned: Source | None = Field(default=None, exclude_if=lambda source: source is None)
    """Source of the model before its alignment; None if it is an artifact or not needed."""
    unaligned_fingerprint: str | None = Field(default=None, exclude_if=lambda fingerprint: fingerprint is None)


def stage(job: Job, after: Subject, before: Subject, unaligned: Subject | None, prepared: Mapping[str, Stage]) -> Stage:
    """Return the stage that edits the weights of a trained model.

    Args:
        job: The job.
        after: The trained model, the artifact of another job's stage.
        before: The model from which that training started.
        unaligned: The model before its alignment, if it is in the chain of jobs; None if the method's config names it or the
            method does not need it.
        prepared: Stages of the preparations that the method loads, by name.
    """
    assert after.stage is not None, "an edit changes the result of another job"
    config = job.method
    named = config.unaligned if isinstance(config, EditConfig) else None
    params = Params(
        **after.fields,
        method=subject.dumped(config),
        before=_source(before),
        unaligned=named or _source(unaligned),
        # The sources of the chain are covered by the keys of its stages; a source in the config needs a fingerprint.
        unaligned_fingerprint=None if named is None else sources.fingerprint(named),
    )
    others = {BEFORE: before, UNALIGNED: None if named is not None else unaligned}
    artifacts = {name: other.stage for name, other in others.items() if other is not None and other.stage is not None}
    paths = {**before.paths, **(unaligned.paths if unaligned is not None else {}), **after.paths}
    # The trained model is an input twice: as the patch's model, and as a model that the task loads itself.
    inputs = {**after.inputs, AFTER: after.stage, **artifacts, **prepared}
    return Stage("edit", 1, subject.dumped(params), run, inputs, config.name, paths)


def _source(model: Subject | None) -> str | None:
    return None if model is None or model.stage is not None else model.params.model.source


def run(work: Work) -> None:
    """Compute the change in one Ray task, and write it as a patch with prompt settings and the method's numbers."""
    start_s, params = time.monotonic(), Params.model_validate(work.params)
    named_parts.make_parts(partial(_change, own_code.codes_in(params.method)), (_CHANGE,), False, work)
    parts = Parts.open(work.directory)
    facts: Any = parts.facts[_CHANGE]
    patch = patches.WeightPatch.of({name: parts.tensor(name) for name in facts["changed"]})
    patches.save(patch, work.directory / "patch", facts["fingerprint"])
    # The patch contains the parts' tensors, so their files are removed.
    named_parts.remove_parts(work.directory)
    fit.write_base(work, params, facts["prompt"])
    about = {
        "seconds": time.monotonic() - start_s,
        "changed": len(facts["changed"]),
        "by_module": _by_module(facts["weights"]),
    }
    (work.directory / EDIT).write_text(json.dumps(about, indent=1))


def _by_module(facts: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the method's numbers, {weight: {name: number}}, in the form of the report: {name: {module: number}}."""
    names = dict.fromkeys(name for numbers in facts.values() for name in numbers)
    return {
        name: {weight.removesuffix(".weight"): numbers[name] for weight, numbers in facts.items() if name in numbers}
        for name in names
    }


def _change(codes: tuple[Code, ...], given: Given, part: str, path: Path) -> dict[str, object]:
    """Write W - W_after for every weight that the method changes, and return facts about them."""
    # Received before the config is read, because the method may be one of the files sent with this task.
    own_code.receive(codes)
    params = Params.model_validate(given.params)
    method = edited(params.method)
    config = method.Config.model_validate(params.method)
    after, encoder, fingerprint = _merged(given.needed[AFTER], params)
    before, _, _ = _merged(given.needed.get(BEFORE) or _fetched(params.before), params)
    unaligned = None
    if method.needs_unaligned:
        unaligned, _, _ = _merged(given.needed.get(UNALIGNED) or _fetched(params.unaligned), params)
    places = {f"{place.module}.weight": place for place in method.places(config, after)}
    moments = Moments.open(given.needed[MOMENTS]) if MOMENTS in given.needed else None
    changes: dict[str, Tensor] = {}
    facts: dict[str, Mapping[str, float]] = {}
    for weight, whole in _weights(after, before, unaligned, places, moments):
        edit = method.edit(config, weight)
        if edit is None:
            continue
        if edit.facts:
            facts[weight.name] = dict(edit.facts)
        difference = edit.weight - weight.after
        if bool(difference.any()):
            changes[weight.name] = _stored(after, weight, difference, whole)
    if not changes:
        raise ValueError(
            f"method {config.name} changes no weight: the model is the same before and after, or the method leaves it unchanged"
        )
    write(path, changes)
    return {"changed": list(changes), "weights": facts, "fingerprint": fingerprint, "prompt": dict(encoder.spec)}


def _fetched(source: str | None) -> Path:
    assert source is not None, "the stage declares the source of a model that is not an artifact"
    return sources.fetch(source)


def _merged(directory: Path, params: Params) -> tuple[PreTrainedModel, Encoder, str]:
    """Load a model in float32 with its patches merged; return also its encoder, and its fingerprint without patches."""
    model, encoder, below = load_stack(directory, dtype="float32", trust_remote_code=params.model.trust_remote_code)
    fingerprint = models.fingerprint(model)
    for patch in below:
        patch.fold(model, 1.0)
    return model.requires_grad_(False), encoder, fingerprint


def _weights(
    after: PreTrainedModel,
    before: PreTrainedModel,
    unaligned: PreTrainedModel | None,
    places: Mapping[str, WeightPlace],
    moments: Moments | None,
) -> Iterator[tuple[Weight, Tensor]]:
    """Yield each parameter in the three models, and the whole trained parameter; tied parameters are yielded once.

    If only some outputs of a fused layer are selected, only their rows are yielded.
    """
    chosen = [model for model in (after, before, unaligned) if model is not None]
    named = [dict(model.named_parameters(remove_duplicate=False)) for model in chosen]
    for name, parameter in after.named_parameters():
        place = places.get(name)
        sides = [_side(after, name, place, parameter, by_name.get(name)) for by_name in named]

        def second_moment(place: WeightPlace | None = place) -> Tensor:
            assert place is not None and moments is not None, "the method requests moments of a linear layer's inputs"
            return moments.second_moment(place.input_of)

        yield Weight(name, place, sides[1], sides[0], sides[2] if len(sides) > 2 else None, second_moment), parameter


def _side(after: PreTrainedModel, name: str, place: WeightPlace | None, like: Tensor, value: Tensor | None) -> Tensor:
    """Return a parameter of one model for the method. Raises ValueError if it is missing or has another shape."""
    if value is None or value.shape != like.shape:
        other = "no such parameter" if value is None else f"shape {tuple(value.shape)}"
        raise ValueError(
            f"{name}: the trained model has shape {tuple(like.shape)}, but the other model {other}; both must be "
            "of one architecture and size"
        )
    if place is None:
        return value.detach()
    weight_MN = models.linear_weight(after.get_submodule(place.module), value).detach()
    return weight_MN if place.outputs is None else weight_MN[_rows(place)]


def _rows(place: WeightPlace) -> list[int]:
    return [row for start, end in place.outputs or () for row in range(start, end)]


def _stored(model: PreTrainedModel, weight: Weight, difference: Tensor, whole: Tensor) -> Tensor:
    """Return a difference in the layout in which the model stores the parameter, zero in rows that are not selected."""
    if weight.place is None:
        return difference.contiguous()
    module = model.get_submodule(weight.place.module)
    if weight.place.outputs is not None:
        rows, difference = difference, whole.new_zeros(weight.place.shape)
        difference[_rows(weight.place)] = rows
    return models.linear_weight(module, difference).contiguous()


def estimate(facts: ModelFacts) -> Estimate:
    """Estimate the memory and disk of the stage: three models and their difference in float32, and the patch."""
    size = 4 * facts.num_parameters
    return Estimate(memory_bytes=4 * size, disk_bytes=size, work_bytes=size)
