"""The stage that trains: from a model and rows to an artifact with weights, patch, prompt settings and history."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from steerlab import sources
from steerlab.job import Job
from steerlab.models import ModelFacts
from steerlab.plan import Estimate, ModelRef, Stage, Work

_FLOAT_BYTES = 4


def stage(job: Job, base: Stage | None) -> Stage:
    """Return the training stage of a job; `base` is the stage that leaves its starting model, if a job does."""
    assert job.train is not None and job.data.train is not None
    params: dict[str, Any] = {
        "model": {"dtype": job.model.dtype, "attention": job.model.attention},
        "method": job.method.model_dump(mode="json"),
        "data": job.data.model_dump(mode="json"),
        "data_fingerprints": {
            role: sources.fingerprint(data.source)
            for role, data in (("train", job.data.train), ("validation", job.data.validation))
            if data is not None
        },
        "train": job.train.model_dump(mode="json"),
    }
    if base is None:
        assert isinstance(job.model.source, str)
        params["model"] |= {"source": job.model.source, "fingerprint": sources.fingerprint(job.model.source)}
    return Stage(
        "train", 1, params, run, () if base is None else (base,), label=f"{job.method.name} on {job.data.train.source}"
    )


def run(work: Work) -> None:
    """Train under Ray Train and DeepSpeed; checkpoints lie in the stage's work directory and survive any kill."""
    from steerlab.training import launch

    storage = work.store.work(work.stage.name, work.stage.key)
    request = {
        "model_ref": asdict(starting_model(work)),
        "model": {"source": work.params["model"].get("source", "artifact"), **_loading(work)},
        "method": work.params["method"],
        "data": work.params["data"],
        "train": work.params["train"],
    }
    launch.fit(request, work.scale, storage=storage, name="checkpoints", report=work.report)
    # A training of days may find its empty directory swept away.
    work.directory.mkdir(parents=True, exist_ok=True)
    work.store.move_from_work(work.stage.name, work.stage.key, "output", work.directory)
    assert (work.directory / "training.json").is_file(), "the workers left no artifact"


def starting_model(work: Work) -> ModelRef:
    """Return the model that the stage starts from."""
    if not work.stage.inputs:
        return ModelRef(source=work.params["model"]["source"])
    base = work.stage.inputs[0]
    if (work.inputs[0] / "patch").exists():
        raise ValueError(
            f"model.source: the model of '{base.label}' carries a patch; only a model without one can be trained further"
        )
    return ModelRef(artifact=(work.store.root, base.name, base.key), subfolder="model")


def _loading(work: Work) -> dict[str, str]:
    return {name: work.params["model"][name] for name in ("dtype", "attention")}


def estimate(job: Job, facts: ModelFacts) -> Estimate:
    """Estimate memory and disk of training all weights with Adam.

    A worker holds weights, gradients and two moments (float32: 16 bytes a parameter; bfloat16 adds a float32 master copy), less
    what ZeRO shards, and the logits of one micro-batch, which dwarf other activations for small models.
    """
    assert job.train is not None
    workers, stage_number = job.scale.worker_range[0], job.scale.zero_stage
    weight = _FLOAT_BYTES if job.model.dtype == "float32" else 2
    state = 8 if job.model.dtype == "float32" else 12
    per_parameter = (
        weight / (workers if stage_number == 3 else 1)
        + _FLOAT_BYTES / (workers if stage_number >= 2 else 1)
        + state / (workers if stage_number >= 1 else 1)
    )
    logits = 3 * _FLOAT_BYTES * job.train.micro_batch * job.train.max_tokens * facts.vocab_size
    layers = 16 * weight * job.train.micro_batch * job.train.max_tokens * facts.hidden_size * facts.num_layers
    model_bytes = facts.num_parameters * weight
    return Estimate(
        memory_bytes=int(facts.num_parameters * per_parameter + logits + layers),
        disk_bytes=model_bytes,
        work_bytes=3 * int(facts.num_parameters * (weight + state)),
    )
