"""The model that a stage works on: the settings that are part of the stage's key, and how a worker loads the model."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from steerlab.data import sources
from steerlab.guards import late
from steerlab.guards.json_values import JsonObject
from steerlab.inputs import encoding, prompt_sources
from steerlab.job import Frozen, Job, ModelConfig, SamplerConfig, Source, Template, described, own_code, prompt_settings
from steerlab.job.data_config import PromptStyle, ResponseRole
from steerlab.stages.spread import alone, reserved
from steerlab.storage.plan import ModelRef, Stage, Work

if TYPE_CHECKING:
    import ray
else:
    ray = late.module("ray")

MODEL = "model"
"""Name of the input whose artifact is the model that a stage works on."""


# Fields with a default are omitted from the key (`exclude_if`), not written as null: an artifact keeps its key when a later
# version of this file adds a setting that the artifact does not use.
class LoadedModel(Frozen):
    """Settings with which a stage's model is loaded and, if the model is the job's source, that source."""

    dtype: Literal["float32", "bfloat16"]
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    kind: Literal["diffusion"] | None = Field(default=None, exclude_if=lambda kind: kind is None)
    """Family of the model; None for language models."""
    sampler: SamplerConfig | None = Field(default=None, exclude_if=lambda sampler: sampler is None)
    """Sampler settings of a diffusion model."""
    denoiser_fingerprint: str | None = Field(default=None, exclude_if=lambda fingerprint: fingerprint is None)
    """Fingerprint of the sampler's own weights of the denoiser; None where the pipeline's are used."""
    trust_remote_code: bool = Field(default=False, exclude_if=lambda trusts: not trusts)
    """Whether Python code in the model's folder may run."""
    source: Source | None = Field(default=None, exclude_if=lambda source: source is None)
    """Source of the model; None if the model is the artifact of another stage."""
    fingerprint: str | None = Field(default=None, exclude_if=lambda fingerprint: fingerprint is None)
    """Fingerprint of the source; None if the model is the artifact of another stage."""


class Prompting(Frozen):
    """Prompt settings of a model that is loaded from a source."""

    prompt_style: PromptStyle
    response_role: ResponseRole
    thinking: bool = Field(default=False, exclude_if=lambda thinks: not thinks)
    tokenizer: Source | None = Field(default=None, exclude_if=lambda source: source is None)
    """Source of the tokenizer; None if it is in the model's folder."""
    chat_template: Template | None = Field(default=None, exclude_if=lambda source: source is None)
    """The chat template or its source; None if it is in the model's folder."""


class OnModel(Frozen, extra="ignore"):
    """Parameters of every stage that works on a model. Each stage derives its own; parsing as `OnModel` ignores the rest."""

    model: LoadedModel
    prompt: Prompting | None = Field(default=None, exclude_if=lambda prompt: prompt is None)
    """None if the model is the artifact of another stage: its `prompt.json` has the settings."""
    prompt_fingerprints: dict[str, str] = Field(default={}, exclude_if=lambda fingerprints: not fingerprints)
    """Fingerprints of a tokenizer and a chat template outside the model's folder."""
    encoding: int | None = Field(default=None, exclude_if=lambda version: version is None)
    """Version of the code that turns rows into tokens; None for models that take no tokens."""
    snapshot: int | None = Field(default=None, exclude_if=lambda step: step is None)
    """Training step after which the model's patch was saved; None for the patch at the end of its training."""
    inverse: bool = Field(default=False, exclude_if=lambda inverse: not inverse)
    """Whether the inverse of the model's newest patch acts."""


@dataclass(frozen=True)
class Subject:
    """The model that several stages of a job work on, made once for all stages, since fingerprints take time."""

    stage: Stage | None
    """The stage whose artifact is the model; None if the model is the job's source."""
    params: OnModel
    """The settings of the model that are part of the stages' keys."""
    paths: Mapping[str, str]
    """Fingerprints of files on disk that the job's own configs name -> their paths."""

    @property
    def inputs(self) -> dict[str, Stage]:
        """The stage whose artifact is the model, as an input of the stages that work on it."""
        return {} if self.stage is None else {MODEL: self.stage}

    @property
    def fields(self) -> dict[str, Any]:
        """The fields of `params` as keyword arguments for a class derived from `OnModel`."""
        return dict(self.params)


def on(job: Job, stage: Stage | None) -> Subject:
    """Return the model that the job's stages work on: the artifact of `stage`, or the job's source if that is None.

    Raises:
        SourceError: a source of the job cannot be read.
    """
    return Subject(stage, _params(job, stage), paths(job))


def _params(job: Job, below: Stage | None) -> OnModel:
    """Return the model's part of a stage's parameters: settings, and fingerprints if the model is a source."""
    model = LoadedModel(
        dtype=job.model.dtype,
        attention=job.model.attention,
        trust_remote_code=job.model.trust_remote_code,
        **_drawing(job.model),
    )
    # The key of this stage includes the key of the stage that makes the model, which covers everything else.
    if below is not None:
        return OnModel(model=model)
    source = job.model.source
    assert isinstance(source, str)
    # The model's own fingerprint covers a tokenizer or template in its folder.
    prompt_files = {"tokenizer": job.model.tokenizer, "chat_template": job.model.chat_template}
    return OnModel(
        model=model.model_copy(update={"source": source, "fingerprint": sources.fingerprint(source)}),
        prompt=Prompting.model_validate(prompt_settings(job.model, job.data)),
        prompt_fingerprints={
            name: prompt_sources.fingerprint(name, origin) for name, origin in prompt_files.items() if origin is not None
        },
        encoding=encoding.VERSION if job.model.kind == "causal_lm" else None,
    )


def identity(source: str) -> str:
    """Return the form of a source in a stage's parameters: the fingerprint of a file on disk, otherwise the source itself."""
    # A path would not do: the same file elsewhere is the same data, and another file at the same path is not.
    return sources.fingerprint(source) if sources.parse(source).kind == "path" else source


def dumped(config: Frozen, **options: object) -> JsonObject:
    """Return a config or a stage's parameters in the form that is hashed; `options` are those of pydantic's `model_dump`."""
    return described(config, identity, **options)


def paths(job: Job) -> dict[str, str]:
    """Return the paths of the files on disk that a job's own configs name, by their fingerprints."""
    path_of: dict[str, str] = {}

    def note(source: str) -> str:
        if sources.parse(source).kind == "path":
            # A file that does not exist has no fingerprint. Stages that read it have no key either, and the checks before the
            # start report it with the key of the job that names it.
            with suppress(sources.SourceError):
                path_of[sources.fingerprint(source)] = source
        return source

    tree = described(job, note)
    return path_of | {code.sha256: code.path for code in own_code.codes_in(tree)}


def _drawing(model: ModelConfig) -> dict[str, Any]:
    """Return the fields of `LoadedModel` for the sampler of a diffusion model; empty for other models."""
    if model.kind != "diffusion":
        return {}
    sampler = model.drawing
    weights = None if sampler.denoiser is None else sources.fingerprint(sampler.denoiser)
    return {"kind": "diffusion", "sampler": sampler, "denoiser_fingerprint": weights}


@dataclass(frozen=True)
class Loading:
    """Data with which a worker on any node can load the model of a stage."""

    ref: ModelRef
    model: LoadedModel
    prompt: Prompting | None
    """Prompt settings of the model; None for an artifact, whose `prompt.json` has them."""
    snapshot: int | None
    """Training step after which the artifact's patch was saved; None for the patch at the end."""
    inverse: bool = False
    """Whether the inverse of the newest patch acts."""

    @property
    def prompt_settings(self) -> JsonObject | None:
        """`prompt` as the settings that `steered.stacks.load` takes."""
        return None if self.prompt is None else self.prompt.model_dump(mode="json")


def of(work: Work) -> Loading:
    """Return the data with which a worker can load the stage's model."""
    below, params = work.stage.inputs.get(MODEL), OnModel.model_validate(work.params)
    # A snapshot is a file of an artifact; a source has none.
    if below is None:
        return Loading(ModelRef(source=params.model.source), params.model, params.prompt, None)
    ref = ModelRef(artifact=(work.store.root, below.name, below.key))
    return Loading(ref, params.model, None, params.snapshot, params.inverse)


def load(loading: Loading) -> Any:
    """Load a model with its patches on this worker's device.

    Returns:
        A `SteeredModel` for a language model, a `SteeredPipeline` for a diffusion model.
    """
    # PyTorch is imported by workers only; the driver imports this file for every plan.
    import torch

    from steerlab.steered import stacks

    model = loading.model
    # PyTorch starts a thread for every core of the node; several workers on one node would then slow one another down.
    torch.set_num_threads(reserved.threads())
    process, source = alone.here(), loading.ref.source
    if process is not None and source is not None and source in process.models:
        # The session has already loaded this model.
        return process.models[source]
    return stacks.load(
        loading.ref.locate(),
        dtype=model.dtype,
        attention=model.attention,
        # Ray sets CUDA_VISIBLE_DEVICES to the GPUs that this worker reserved; without one it must not use another worker's.
        device="cuda" if reserved.has_gpu() else "cpu",
        prompt=loading.prompt_settings,
        snapshot=loading.snapshot,
        inverse=loading.inverse,
        sampler=None if model.sampler is None else model.sampler.model_dump(mode="json"),
        trust_remote_code=model.trust_remote_code,
    )


_last: tuple[str, Any] | None = None
"""Owner and model of the last call of `loaded_once` in this process."""


def loaded_once(owner: str, loading: Loading) -> Any:
    """Return the model of `owner`, loaded by this call unless the previous call in this process had the same owner."""
    # The model belongs to the process, since a warm task has no object that remains between two calls.
    global _last
    if _last is None or _last[0] != owner:
        _last = None  # the old model is dropped before the new one is loaded: both may not fit into memory
        _last = (owner, load(loading))
    return _last[1]


def forget() -> None:
    """Drop the model that `loaded_once` holds in this process."""
    global _last
    _last = None
