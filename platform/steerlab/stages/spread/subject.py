"""The model that a stage works on: what of it goes into the stage's key, and how a worker loads it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

import ray
from pydantic import Field

from steerlab.data import sources
from steerlab.guards.json_values import JsonObject
from steerlab.inputs import encoding, prompt_sources
from steerlab.job import Frozen, Job, ModelConfig, SamplerConfig, Source, Template, described, own_code, prompt_settings
from steerlab.job.data_set import PromptStyle, ResponseRole
from steerlab.storage.plan import ModelRef, Stage, Work

MODEL = "model"
"""Name of the input that leaves the model which a stage works on."""


# A key holds no null where a setting is absent: the keys of artifacts stay what they were before there was such a setting.
class LoadedModel(Frozen):
    """How a stage's model is loaded and, where it is the job's source, which one it is."""

    dtype: Literal["float32", "bfloat16"]
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    kind: Literal["diffusion"] | None = Field(default=None, exclude_if=lambda kind: kind is None)
    """Family of the model; None for language models."""
    sampler: SamplerConfig | None = Field(default=None, exclude_if=lambda sampler: sampler is None)
    """How a diffusion model draws."""
    denoiser_fingerprint: str | None = Field(default=None, exclude_if=lambda fingerprint: fingerprint is None)
    trust_remote_code: bool = Field(default=False, exclude_if=lambda trusts: not trusts)
    """Whether code that comes with the model runs."""
    source: Source | None = Field(default=None, exclude_if=lambda source: source is None)
    """None where another stage leaves the model."""
    fingerprint: str | None = Field(default=None, exclude_if=lambda fingerprint: fingerprint is None)
    """Of the source."""


class Prompting(Frozen):
    """How the model of a source is prompted."""

    prompt_style: PromptStyle
    response_role: ResponseRole
    thinking: bool = Field(default=False, exclude_if=lambda thinks: not thinks)
    tokenizer: Source | None = Field(default=None, exclude_if=lambda source: source is None)
    """Source of the tokenizer, where it does not lie beside the model."""
    chat_template: Template | None = Field(default=None, exclude_if=lambda source: source is None)
    """The template or its source, where it does not lie beside the model."""


class OnModel(Frozen, extra="ignore"):
    """Parameters of every stage that works on a model; stages derive theirs from it, and what is their own is skipped here."""

    model: LoadedModel
    prompt: Prompting | None = Field(default=None, exclude_if=lambda prompt: prompt is None)
    """None where another stage leaves the model, whose artifact says how it is prompted."""
    prompt_fingerprints: dict[str, str] = Field(default={}, exclude_if=lambda fingerprints: not fingerprints)
    """Of tokenizer and chat template, where they do not lie beside the model."""
    encoding: int | None = Field(default=None, exclude_if=lambda version: version is None)
    """Version of the code that makes tokens of rows."""
    snapshot: int | None = Field(default=None, exclude_if=lambda step: step is None)
    """The step of the training below whose patch is meant; None takes its end."""


@dataclass(frozen=True)
class Subject:
    """The model that stages of a job work on: one for all of them, so that nothing about it is asked twice."""

    stage: Stage | None
    """The stage that leaves it, None when it is the job's source."""
    params: OnModel
    """What of it goes into the keys of the stages."""
    places: Mapping[str, str]
    """Where the files on disk lie that the job's own configs name, by their fingerprints."""

    @property
    def inputs(self) -> dict[str, Stage]:
        """The stage that leaves it, as an input of the stages that work on it."""
        return {} if self.stage is None else {MODEL: self.stage}

    @property
    def fields(self) -> dict[str, Any]:
        """The parameters as arguments for a stage's own, which are derived from `OnModel`."""
        return dict(self.params)


def on(job: Job, stage: Stage | None) -> Subject:
    """Return the model that a stage leaves, or that of the job's source, as the job loads it. Raises SourceError."""
    return Subject(stage, _params(job, stage), places(job))


def _params(job: Job, below: Stage | None) -> OnModel:
    model = LoadedModel(
        dtype=job.model.dtype,
        attention=job.model.attention,
        trust_remote_code=job.model.trust_remote_code,
        **_drawing(job.model),
    )
    if below is not None:
        return OnModel(model=model)
    source = job.model.source
    assert isinstance(source, str)
    elsewhere = {"tokenizer": job.model.tokenizer, "chat_template": job.model.chat_template}
    return OnModel(
        model=model.model_copy(update={"source": source, "fingerprint": sources.fingerprint(source)}),
        prompt=Prompting.model_validate(prompt_settings(job.model, job.data)),
        prompt_fingerprints={name: prompt_sources.fingerprint(name, one) for name, one in elsewhere.items() if one is not None},
        encoding=encoding.VERSION if job.model.kind == "causal_lm" else None,
    )


def identity(source: str) -> str:
    """Return how a source stands in a stage's parameters: a file on disk by its content, any other as it is written."""
    return sources.fingerprint(source) if sources.parse(source).kind == "path" else source


def dumped(config: Frozen, **options: Any) -> JsonObject:
    """Return a config, or a stage's parameters, as they stand in a key; the options are those of pydantic's `model_dump`."""
    return described(config, identity, **options)


def places(job: Job) -> dict[str, str]:
    """Return where the files on disk lie that a job's own configs name, by their fingerprints."""
    found: dict[str, str] = {}

    def note(source: str) -> str:
        if sources.parse(source).kind == "path":
            # What is not there is no part of a stage whose key could be made.
            with suppress(sources.SourceError):
                found[sources.fingerprint(source)] = source
        return source

    tree = described(job, note)
    return found | {code.sha256: code.path for code in own_code.codes_in(tree)}


def _drawing(model: ModelConfig) -> dict[str, Any]:
    """Return how a diffusion model draws, as fields of `LoadedModel`; nothing for other kinds, whose keys have no such part."""
    if model.kind != "diffusion":
        return {}
    sampler = model.drawing
    weights = None if sampler.denoiser is None else sources.fingerprint(sampler.denoiser)
    return {"kind": "diffusion", "sampler": sampler, "denoiser_fingerprint": weights}


@dataclass(frozen=True)
class Loading:
    """All that a worker on any node needs to load the model of a stage."""

    ref: ModelRef
    model: LoadedModel
    prompt: Prompting | None
    """How the model of a source is asked; what a stage left says so itself."""
    snapshot: int | None
    """The training step whose patch is meant, of what a stage left."""

    @property
    def prompt_settings(self) -> JsonObject | None:
        """How the model of a source is asked, as encoders take it."""
        return None if self.prompt is None else self.prompt.model_dump(mode="json")


def of(work: Work) -> Loading:
    """Return how a worker loads the stage's model."""
    below, params = work.stage.inputs.get(MODEL), OnModel.model_validate(work.params)
    if below is None:
        return Loading(ModelRef(source=params.model.source), params.model, params.prompt, None)
    return Loading(ModelRef(artifact=(work.store.root, below.name, below.key)), params.model, None, params.snapshot)


def load(loading: Loading) -> Any:
    """Load a model on this worker's device, with the patches that it carries: a `SteeredModel` or a `SteeredPipeline`."""
    import torch

    from steerlab.steered import language

    model = loading.model
    torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    return language.load(
        loading.ref.locate(),
        dtype=model.dtype,
        attention=model.attention,
        device="cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu",
        prompt=loading.prompt_settings,
        snapshot=loading.snapshot,
        sampler=None if model.sampler is None else model.sampler.model_dump(mode="json"),
        trust_remote_code=model.trust_remote_code,
    )


_kept: tuple[str, Any] | None = None
"""Who used a model last in this process, and the model."""


def kept(owner: str, loading: Loading) -> Any:
    """Return the model that `owner` used last in this process, or load it; what another one used is let go of first."""
    global _kept
    if _kept is None or _kept[0] != owner:
        _kept = None  # two models at once may not fit
        _kept = (owner, load(loading))
    return _kept[1]
