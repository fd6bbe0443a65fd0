"""The model that a stage works on: what of it goes into the stage's key, and how a worker loads it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import ray

from steerlab.data import sources
from steerlab.inputs import encoding, prompt_sources
from steerlab.job import PROMPT_FIELDS, Frozen, Job, described, own_code
from steerlab.storage.plan import ModelRef, Stage, Work

MODEL = "model"
"""Name of the input that leaves the model which a stage works on."""


@dataclass(frozen=True)
class Subject:
    """The model that stages of a job work on: one for all of them, so that nothing about it is asked twice."""

    stage: Stage | None
    """The stage that leaves it, None when it is the job's source."""
    params: Mapping[str, Any]
    """What of it goes into the keys of the stages."""
    places: Mapping[str, str]
    """Where the files on disk lie that the job's own configs name, by their fingerprints."""

    @property
    def inputs(self) -> dict[str, Stage]:
        """The stage that leaves it, as an input of the stages that work on it."""
        return {} if self.stage is None else {MODEL: self.stage}


def on(job: Job, stage: Stage | None) -> Subject:
    """Return the model that a stage leaves, or that of the job's source, as the job loads it. Raises SourceError."""
    return Subject(stage, _params(job, stage), places(job))


def _params(job: Job, below: Stage | None) -> dict[str, Any]:
    model: dict[str, Any] = {"dtype": job.model.dtype, "attention": job.model.attention, **_drawing(job)}
    if job.model.trust_remote_code:
        model["trust_remote_code"] = True
    if below is not None:
        return {"model": model}
    assert isinstance(job.model.source, str)
    model |= {"source": identity(job.model.source), "fingerprint": sources.fingerprint(job.model.source)}
    elsewhere = {"tokenizer": job.model.tokenizer, "chat_template": job.model.chat_template}
    fingerprints = {name: prompt_sources.fingerprint(name, source) for name, source in elsewhere.items() if source is not None}
    return {
        "model": model,
        "prompt": dumped(job.data, include=set(PROMPT_FIELDS)) | dumped(job.model, include=set(elsewhere)),
        **({"prompt_fingerprints": fingerprints} if fingerprints else {}),
        **({"encoding": encoding.VERSION} if job.model.kind == "causal_lm" else {}),
    }


def identity(source: str) -> str:
    """Return how a source stands in a stage's parameters: a file on disk by its content, any other as it is written."""
    return sources.fingerprint(source) if sources.parse(source).kind == "path" else source


def dumped(config: Frozen, **options: Any) -> dict[str, Any]:
    """Return a config as it stands in a stage's parameters."""
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


def _drawing(job: Job) -> dict[str, Any]:
    """Return how a diffusion model draws; nothing for other kinds, whose keys have no such part."""
    if job.model.kind != "diffusion":
        return {}
    sampler = job.model.drawing
    weights = {} if sampler.denoiser is None else {"denoiser_fingerprint": sources.fingerprint(sampler.denoiser)}
    return {"kind": "diffusion", "sampler": dumped(sampler), **weights}


@dataclass(frozen=True)
class Loading:
    """All that a worker on any node needs to load the model of a stage."""

    ref: ModelRef
    dtype: str
    attention: str
    sampler: Mapping[str, Any] | None
    """How a diffusion model draws."""
    trust_remote_code: bool
    """Whether code that comes with the model runs."""
    prompt: Mapping[str, Any] | None
    """How the model of a source is asked; what a stage left says so itself."""
    snapshot: int | None
    """The training step whose patch is meant, of what a stage left."""


def of(work: Work) -> Loading:
    """Return how a worker loads the stage's model."""
    below, model = work.stage.inputs.get(MODEL), work.params["model"]
    return Loading(
        ModelRef(source=model["source"]) if below is None else ModelRef(artifact=(work.store.root, below.name, below.key)),
        model["dtype"],
        model["attention"],
        model.get("sampler"),
        model.get("trust_remote_code", False),
        work.params["prompt"] if below is None else None,
        work.params.get("snapshot") if below is not None else None,
    )


def load(loading: Loading) -> Any:
    """Load a model on this worker's device, with the patches that it carries."""
    import torch

    from steerlab.steered import language

    torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    return language.load(
        loading.ref.locate(),
        dtype=loading.dtype,
        attention=loading.attention,
        device="cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu",
        prompt=loading.prompt,
        snapshot=loading.snapshot,
        sampler=loading.sampler,
        trust_remote_code=loading.trust_remote_code,
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
