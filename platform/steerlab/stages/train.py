"""The stage that trains: from a model and rows to an artifact with weights, patch, prompt settings and history."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from steerlab.data import rows
from steerlab.guards.json_values import JsonObject
from steerlab.job import PROMPT_FIELDS, DataConfig, Job, ModelConfig, TrainConfig, own_code
from steerlab.methods import trained
from steerlab.methods.contract import Size
from steerlab.models import ModelFacts
from steerlab.stages import extract, fit
from steerlab.stages.spread import subject
from steerlab.stages.spread.subject import Subject
from steerlab.storage.plan import Estimate, ModelRef, Stage, Work
from steerlab.training.request import Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_FLOAT_BYTES = 4


class Params(subject.OnModel):
    """Parameters of the stage."""

    method: JsonObject
    """The method's config."""
    data: DataConfig
    """The data sets that are trained on and validated with, and the prompt format."""
    data_fingerprints: dict[str, str | list[str]]
    """By role."""
    train: TrainConfig
    reads: tuple[str, ...]
    """Roles of the extracted activations that the method reads."""


def stage(job: Job, model: Subject, extractions: Mapping[str, Stage], prepared: Mapping[str, Stage]) -> Stage:
    """Return the training stage of a job, from its starting model.

    `extractions` leave the activations that its method reads, by data role; `prepared` are the preparations that it trains
    with.
    """
    assert job.train is not None
    trains_on = trained(job.method).module.trains_on
    data = {role: job.data.by_role[role] for role in (trains_on, "validation") if role in job.data.by_role}
    params = Params(
        **model.fields,
        method=subject.dumped(job.method),
        data=job.data,
        data_fingerprints={role: rows.fingerprint(found) for role, found in data.items()},
        train=job.train,
        reads=tuple(sorted(extractions)),
    )
    left_out = DataConfig.model_fields.keys() - {*PROMPT_FIELDS, *data}
    inputs = {**model.inputs, **extract.read_by(extractions), **prepared}
    label = f"{job.method.name} on {rows.describe(data[trains_on])}"
    return Stage("train", 3, subject.dumped(params, exclude={"data": left_out}), run, inputs, label, model.places)


def run(work: Work) -> None:
    """Train under Ray Train and DeepSpeed; checkpoints lie in the stage's work directory and survive any kill."""
    from steerlab.stages.spread import launch, warm

    storage = work.store.work(work.stage.name, work.stage.key)
    params = Params.model_validate(work.params)
    method = trained(params.method)
    others = {subject.MODEL, *map(extract.read_as, params.reads)}
    request = Request(
        start=starting_model(work, as_it_is=not method.leaves_model),
        model=_model(params),
        method=params.method,
        data=params.data,
        train=params.train,
        activations={role: _located(work, work.stage.inputs[extract.read_as(role)]) for role in params.reads},
        prepared={name: _located(work, stage) for name, stage in work.stage.inputs.items() if name not in others},
        code=own_code.codes_in(params.method),
    )
    if work.scale.warm:
        warm.fit(request, work.scale, storage=storage, report=work.report)
    else:
        launch.fit(request, work.scale, storage=storage, name="checkpoints", report=work.report)
    # A training of days may find its empty directory swept away.
    work.directory.mkdir(parents=True, exist_ok=True)
    work.store.move_from_work(work.stage.name, work.stage.key, "output", work.directory)
    assert (work.directory / "training.json").is_file(), "the workers left no artifact"
    if not method.leaves_model:
        fit.write_base(work, params, json.loads((work.directory / "prompt.json").read_text()))


def starting_model(work: Work, *, as_it_is: bool) -> ModelRef:
    """Return the model that the stage starts from; `as_it_is` takes it with its patches, which frozen weights allow."""
    base = work.stage.inputs.get(subject.MODEL)
    if base is None:
        return ModelRef(source=subject.OnModel.model_validate(work.params).model.source)
    if as_it_is:
        return _located(work, base)
    if (work.inputs[subject.MODEL] / "patch").exists():
        raise ValueError(
            f"model.source: the model of '{base.label}' carries a patch; only a model without one can be trained further"
        )
    return replace(_located(work, base), subfolder="model")


def _located(work: Work, made: Stage) -> ModelRef:
    return ModelRef(artifact=(work.store.root, made.name, made.key))


def _model(params: Params) -> ModelConfig:
    """Return how the model is loaded, with the sources of what does not lie beside it."""
    model, prompt = params.model, params.prompt
    return ModelConfig(
        source=model.source or "artifact",
        kind=model.kind or "causal_lm",
        dtype=model.dtype,
        attention=model.attention,
        tokenizer=None if prompt is None else prompt.tokenizer,
        chat_template=None if prompt is None else prompt.chat_template,
        trust_remote_code=model.trust_remote_code,
        sampler=model.sampler,
    )


def estimate(job: Job, facts: ModelFacts, skeleton: PreTrainedModel) -> Estimate:
    """Estimate memory and disk of training with Adam: of all weights, of some that their method counts, or of a small patch.

    A worker holds weights, gradients and two moments (float32: 16 bytes a parameter; bfloat16 adds a float32 master copy), less
    what ZeRO shards, and the logits of one micro-batch, which dwarf other activations for small models.
    """
    assert job.train is not None
    method, is_float32 = trained(job.method), job.model.dtype == "float32"
    weight = _FLOAT_BYTES if is_float32 else 2
    sequences = 2 if job.data.by_role[method.module.trains_on].format == "preference" else 1
    tokens = sequences * job.train.micro_batch * job.train.max_tokens
    layers = 16 * weight * tokens * facts.hidden_size * facts.num_layers
    logits = 3 * _FLOAT_BYTES * tokens * facts.vocab_size if method.module.holds_logits else 0
    if method.leaves_model:
        own, state = weight, 8 if is_float32 else 12
        size = Size(facts.num_parameters)
    elif (found := method.module.size(job.method, skeleton)) is not None:
        own, state = _FLOAT_BYTES, 8
        size = Size(found.trained, found.more_bytes + facts.num_parameters * weight)
    else:
        # Frozen weights need no gradients and no moments; the patch is small beside them.
        return Estimate(memory_bytes=int(facts.num_parameters * weight + layers))
    sharded = _per_parameter(job, own, state)
    return Estimate(
        memory_bytes=int(size.trained * sharded + size.more_bytes + logits + layers),
        disk_bytes=size.trained * own,
        work_bytes=3 * int(size.trained * (own + state)),
    )


def _per_parameter(job: Job, weight: int, state: int) -> float:
    """Return the bytes of a trained parameter on a worker: itself, its gradient and what the optimizer keeps of it."""
    workers, stage_number = job.scale.worker_range[0], job.scale.zero_stage
    return (
        weight / (workers if stage_number == 3 else 1)
        + _FLOAT_BYTES / (workers if stage_number >= 2 else 1)
        + state / (workers if stage_number >= 1 else 1)
    )
