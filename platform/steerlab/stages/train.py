"""The stage that trains a model, or a patch for it: its artifact has the weights or the patch, prompt settings and history."""

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
from steerlab.stages.spread import alone, subject
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
    """The data sets for training and validation, and the prompt format; other data sets of the job are omitted."""
    data_fingerprints: dict[str, str | list[str]]
    """Fingerprints of these data sets by role."""
    train: TrainConfig
    reads: tuple[str, ...]
    """Roles of the data sets whose extracted activations the method loads. Empty for most methods."""


def stage(job: Job, model: Subject, extractions: Mapping[str, Stage], prepared: Mapping[str, Stage]) -> Stage:
    """Return the training stage of a job.

    Args:
        job: A job with a `train` section.
        model: The model from which the training starts.
        extractions: Stages of the activations that the method loads, by the role of their data set.
        prepared: Stages of the preparations that the training loads, by name.
    """
    assert job.train is not None
    trains_on = trained(job.method).module.trains_on
    data = {role: job.data.by_role[role] for role in (trains_on, "validation") if role in job.data.by_role}
    params = Params(
        **model.fields,
        method=subject.dumped(job.method),
        data=job.data,
        data_fingerprints={role: rows.fingerprint(data_set) for role, data_set in data.items()},
        train=job.train,
        reads=tuple(sorted(extractions)),
    )
    # Data sets that this training does not read must not change its key.
    left_out = DataConfig.model_fields.keys() - {*PROMPT_FIELDS, *data}
    inputs = {**model.inputs, **extract.read_by(extractions), **prepared}
    label = f"{job.method.name} on {rows.describe(data[trains_on])}"
    return Stage("train", 3, subject.dumped(params, exclude={"data": left_out}), run, inputs, label, model.paths)


def run(work: Work) -> None:
    """Train under Ray Train and DeepSpeed.

    Checkpoints are in the stage's work directory, so a killed training continues from the newest one.

    Raises:
        ValueError: the method trains the model's own weights, but the model has a patch.
    """
    # Ray Train takes seconds to import; a driver that finds the artifact in the cache does not need it.
    from steerlab.stages.spread import launch, warm

    storage = work.store.work(work.stage.name, work.stage.key)
    params = Params.model_validate(work.params)
    method = trained(params.method)
    # The inputs of the stage are the model, the activations and the preparations; the method names the last.
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
    # A training in this process has one worker, like one in a warm process.
    if work.scale.warm or alone.here() is not None:
        warm.fit(request, work.scale, storage=storage, report=work.report)
    else:
        launch.fit(request, work.scale, storage=storage, report=work.report)
    work.store.move_from_work(work.stage.name, work.stage.key, "output", work.directory)
    assert (work.directory / "training.json").is_file(), "rank 0 writes training.json into the artifact"
    if not method.leaves_model:
        fit.write_base(work, params, json.loads((work.directory / "prompt.json").read_text()))


def starting_model(work: Work, *, as_it_is: bool) -> ModelRef:
    """Return a reference to the model from which the training starts.

    `as_it_is` retains the model's patches, which only methods with frozen weights support.

    Raises:
        ValueError: the model has a patch and `as_it_is` is False.
    """
    if (process := alone.here()) is not None and process.start is not None:
        return ModelRef(source=str(process.start))
    base = work.stage.inputs.get(subject.MODEL)
    if base is None:
        return ModelRef(source=subject.OnModel.model_validate(work.params).model.source)
    if as_it_is:
        return _located(work, base)
    if (work.inputs[subject.MODEL] / "patch").exists():
        raise ValueError(
            f"model.source: the model of '{base.label}' has a patch; only a model without a patch can be trained further"
        )
    # An artifact of trained weights holds the checkpoint in `model/`, beside history and prompt settings.
    return replace(_located(work, base), subfolder="model")


def _located(work: Work, stage: Stage) -> ModelRef:
    return ModelRef(artifact=(work.store.root, stage.name, stage.key))


def _model(params: Params) -> ModelConfig:
    """Return the model's config for the training loop, with the sources of a tokenizer or template outside its folder."""
    # Settings that the key omits have their defaults. "artifact" is never loaded, since `Request.start` names the model.
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
    """Estimate the memory of one worker and the disk of training with Adam.

    A method trains all weights of the model, a known number of parameters (`size`), or a patch that is small compared with the
    frozen weights.
    """
    assert job.train is not None
    method, is_float32 = trained(job.method), job.model.dtype == "float32"
    weight = _FLOAT_BYTES if is_float32 else 2
    sequences = 2 if job.data.by_role[method.module.trains_on].format == "preference" else 1
    tokens = sequences * job.train.micro_batch * job.train.max_tokens
    # A layer stores about 16 vectors of the width of the residual stream for its backward pass.
    layers = 16 * weight * tokens * facts.hidden_size * facts.num_layers
    # Logits, their log-softmax and their gradient are float32; for small models they exceed all other activations.
    logits = 3 * _FLOAT_BYTES * tokens * facts.vocab_size if method.module.holds_logits else 0
    own_size, whole = method.module.size(job.method, skeleton), facts.num_parameters * weight
    if method.leaves_model and own_size is None:
        # Adam's two moments are float32, 8 bytes a parameter; in bfloat16 it also keeps a float32 copy of the weights.
        own, state = weight, 8 if is_float32 else 12
        size = Size(facts.num_parameters)
    elif own_size is not None:
        own, state = _FLOAT_BYTES, 8
        size = Size(own_size.trained, own_size.more_bytes + whole)
    else:
        # Frozen weights need neither gradients nor moments; the patch is small compared with them.
        return Estimate(memory_bytes=int(whole + layers))
    sharded = _per_parameter(job, own, state)
    return Estimate(
        memory_bytes=int(size.trained * sharded + size.more_bytes + logits + layers),
        # Adapters are merged into the saved model.
        disk_bytes=max(size.trained * own, whole if method.leaves_model else 0),
        # Space for the newest checkpoint, the best one, and the one being written.
        work_bytes=3 * int(size.trained * (own + state)),
    )


def _per_parameter(job: Job, weight: int, state: int) -> float:
    """Return the bytes of one trained parameter on a worker: the parameter, its float32 gradient and the optimizer's state."""
    # ZeRO stage 1 divides the optimizer's state among the workers, stage 2 the gradients too, stage 3 also the parameters.
    workers, stage_number = job.scale.worker_range[0], job.scale.zero_stage
    return (
        weight / (workers if stage_number == 3 else 1)
        + _FLOAT_BYTES / (workers if stage_number >= 2 else 1)
        + state / (workers if stage_number >= 1 else 1)
    )
