"""Fit or train a method in Python: the stages of a job's plan, run in this process on rows that Python holds."""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from steerlab import run as runs
from steerlab.cli.running import progress as bars
from steerlab.guards.json_values import Json, JsonObject
from steerlab.interactive.given import Rows, data_set
from steerlab.interactive.model_loading import load
from steerlab.interactive.model_origin import Origin
from steerlab.interactive.opened_model import Model
from steerlab.interactive.patch import Patch
from steerlab.job import PROMPT_FIELDS, Job, JobError, TrainConfig, validate
from steerlab.methods import METHODS, TABLE
from steerlab.methods.contract import SteeringConfig
from steerlab.stages import JobType, Plan
from steerlab.stages.spread import alone, subject
from steerlab.steered.drawing import SteeredPipeline
from steerlab.steered.language import SteeredModel
from steerlab.storage import plan
from steerlab.storage.store import Store

_WHERE = Path("fit")
"""Beginning of messages about settings. Messages about a job file begin with the file's name."""


def fit(
    method: str | Mapping[str, object],
    model: Model | str | Path,
    *,
    source: Rows | None = None,
    target: Rows | None = None,
    train: Rows | None = None,
    preference: Rows | None = None,
    safety: Rows | None = None,
    data: Mapping[str, Rows] | None = None,
    modules: str | list[str] | None = None,
    extract: Mapping[str, object] | None = None,
    training: Mapping[str, object] | None = None,
    gpu: bool = True,
    threads: int | None = None,
    progress: bool = False,
    **settings: object,
) -> Patch:
    """Fit or train a method. The result is bit-identical to that of a job with the same settings.

    Args:
        method: Name of a method (`steerlab describe` lists them), or its config: {"name": "caa", ...}.
        model: The model, from `load`; or what `load` takes.
        source: Texts with the behaviour to steer away from.
        target: Texts with the behaviour to steer to.
        train: Rows to train on.
        preference: Pairs of a preferred and a rejected answer.
        safety: Rows that show behaviour to preserve.
        data: Rows of other uses by name, such as `validation`.
        modules: Modules to extract from and to steer: one or several regular expressions of whole paths of modules.
        extract: The job's section `extract`: `pooling`, `max_tokens`, ...
        training: The job's section `train`: `steps`, `lr`, `micro_batch`, ...
        gpu: Whether a GPU may be used.
        threads: Threads of the computation; None for those of PyTorch in this process.
        progress: Whether to show the progress as a bar or as lines.
        **settings: Settings of the method: keep_ratio=0.1.

    Returns:
        The patch; for a method that trains the model's own weights, also these (`Patch.model`).

    Raises:
        ValueError: the message names the wrong setting or row, and explains how to correct it.
    """
    loaded = model if isinstance(model, Model) else load(model)
    given = {"source": source, "target": target, "train": train, "preference": preference, "safety": safety, **(data or {})}
    folder = _Folder()
    rows = {role: data_set(some, role, folder.path) for role, some in given.items() if some is not None}
    tree = _tree(method, settings, loaded, rows, modules, extract, training, threads or torch.get_num_threads())
    planned = Plan.of(validate(tree, JobType, _WHERE))
    start = _start(planned.job, loaded)
    runs.check(planned, _WHERE)
    return _made(planned, loaded, start, folder, gpu=gpu, progress=progress)


class _Folder:
    """A temporary folder that is removed with the last patch stored in it, or at the end of the process."""

    # `tempfile.TemporaryDirectory` is not used, because it warns if it was not closed.
    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="steerlab-fit-"))
        weakref.finalize(self, shutil.rmtree, self.path, ignore_errors=True)


def _tree(
    method: str | Mapping[str, Any],
    settings: Mapping[str, Any],
    model: Model,
    rows: Mapping[str, JsonObject],
    modules: str | list[str] | None,
    extract: Mapping[str, Any] | None,
    training: Mapping[str, Any] | None,
    threads: int,
) -> JsonObject:
    """Return the tree of the job. Raises JobError for settings that are wrong by themselves."""
    config = {**({"name": method} if isinstance(method, str) else method), **settings}
    # Unknown methods and unknown settings are refused later, when the job is validated.
    known = METHODS.get(str(config.get("name")))
    reads = None if extract is None else dict(extract)
    if known is not None and issubclass(known.Config, SteeringConfig):
        # A job file sets the pooling twice, for the extraction and for the method; here the method's setting is used for both.
        reads = {"pooling": [config.get("pooling", known.Config.model_fields["pooling"].default)], **(reads or {})}
    if modules is not None and reads is not None:
        reads = {**reads, "select": {**reads.get("select", {}), "modules": modules}}
    elif modules is not None:
        config["modules"] = modules
    asks = model.steered.encoder.spec
    prompt = {name: asks[name] for name in PROMPT_FIELDS if name in asks}
    tree: JsonObject = {
        "name": "fit",
        "model": _model(model, asks),
        "data": {**({} if isinstance(model.steered, SteeredPipeline) else prompt), **rows},
        "method": config,
        "scale": {"cpus_per_worker": threads},
    }
    # The default of `max_tokens` would be refused for a model with a shorter context.
    most = {} if isinstance(model.steered, SteeredPipeline) else _longest(model.steered)
    if reads is not None:
        tree["extract"] = {**most, **reads}
    if training is not None:
        tree["train"] = {**most, **training}
    return tree


def _longest(model: SteeredModel) -> JsonObject:
    """Return `max_tokens` for a model whose context is shorter than the default, otherwise an empty mapping."""
    context, default = model.max_tokens, TrainConfig.model_fields["max_tokens"].default
    return {"max_tokens": int(context)} if context < default else {}


def _model(model: Model, asks: Mapping[str, Json]) -> JsonObject:
    loading, steered = model.origin.loading, model.steered
    about: JsonObject = {"source": str(model.origin.checkpoint)}
    if isinstance(steered, SteeredPipeline):
        return {**about, "kind": "diffusion", "sampler": steered.model.sampler.model_dump(mode="json", exclude_defaults=True)}
    about["dtype"] = str(next(steered.model.parameters()).dtype).removeprefix("torch.")
    about |= {name: loading[name] for name in ("attention", "trust_remote_code") if loading.get(name)}
    return {**about, **{name: asks[name] for name in ("tokenizer", "chat_template") if name in asks}}


def _start(job: Job, model: Model) -> Path | None:
    """Return the folder of the model and patches from which a training starts; None for the plain checkpoint.

    Raises:
            ValueError: a patch of the model does not act at strength 1, the method trains the weights below a patch, or the
                training would lose the patches of a `with` block.
    """
    method, stack = TABLE.of(job.method), model.steered.patches
    if not stack:
        return None
    if any(strength != 1 for strength in (model.strength, *model.steered.settled)):
        raise ValueError("the model's patches must act at strength 1, because a new patch is fitted on them at strength 1")
    if job.train is None:
        return None
    if method.leaves_model:
        raise ValueError(f"method {job.method.name} trains the model's own weights, but the model has a patch: fold it first")
    if len(stack) > model.num_own:
        raise ValueError(
            "a training loads the model again, without the patches of a `with` block: save the patch, then load that folder"
        )
    return model.origin.path


def _made(planned: Plan, model: Model, start: Path | None, folder: _Folder, *, gpu: bool, progress: bool) -> Patch:
    """Run the stages that make the job's model, and return the resulting patch."""
    stage = planned.model
    if stage is None or not planned.makes_model:
        raise JobError(f"{_WHERE}: method {planned.job.method.name} makes nothing: give a method that fits or trains")
    store, curve = Store.open(str(folder.path / "root")), []
    given = {planned.source: model.steered}
    # A fit of one layer after another attaches patches to this model, so its own stack is restored below, also on errors.
    stack = model.steered.patches
    with bars(quiet=not progress) as listener, alone.stages(gpu=gpu, models=given, start=start):
        shown = listener.reported

        def reported(of: plan.Stage, metrics: dict[str, float]) -> None:
            if "step" in metrics and of.key == stage.key:
                curve.append(dict(metrics))
            if progress:
                shown(of, metrics)

        listener.reported = reported
        try:
            plan.run(plan.ordered([stage]), store, planned.job.scale, listener, [])
        finally:
            subject.forget()
            # Stages detach and attach patches, and may have failed in between.
            model.steered.detach()
            model.steered.patches = stack
            model.steered.attach()
    below = stack[model.num_own :]
    config = planned.job.method.model_dump(mode="json", exclude_unset=True)
    origin = Origin(model.origin.path, model.origin.loading, model.origin.keeps)
    return Patch(store.local(stage.name, stage.key), origin, config, below, curve, folder)
