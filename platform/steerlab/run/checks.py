"""Check the settings, the data and the model of a job before anything starts.

Each error names the key of the job that is wrong and explains how to correct it. No weights are loaded: sizes and modules come
from a model on the meta device (`models.skeleton`).
"""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from steerlab import evaluation, models
from steerlab.data import sources
from steerlab.guards.faults import is_for_people
from steerlab.inputs.drawings import check_data
from steerlab.job import Job, JobError
from steerlab.methods import TABLE
from steerlab.methods.contract import Trained, check_masters
from steerlab.methods.preparations import Prepare
from steerlab.patches import axes, taps
from steerlab.run import length
from steerlab.run.prompt_checks import check_ids, check_template, state_of
from steerlab.run.task_checks import check_named, check_reach, check_rows, check_tasks, tasks_of
from steerlab.stages import Plan

if TYPE_CHECKING:
    from steerlab.models.kinds import Model


def facts_of(planned: Plan) -> models.ModelFacts:
    """Return the sizes of a job's model."""
    # A job that starts from the model of another job has the same architecture as the source at the end of that chain.
    directory = sources.fetch(planned.source)
    return _facts(directory, state_of(directory), planned.job.model.trust_remote_code)


def check(planned: Plan, path: Path | None = None) -> models.ModelFacts:
    """Refuse a job that cannot work, before anything starts.

    Args:
        planned: the plan of the job.
        path: the job's file, with which messages begin; None for a job without a file.

    Returns:
        Sizes of the job's model.

    Raises:
        ValueError: the message names the wrong key, and explains how to correct it.
    """
    try:
        return _checked(planned)
    except ValueError as error:
        # An internal error (`int("x")`) keeps its own type and traceback, so that the command line reports it as one.
        if path is None or not is_for_people(error) or str(error).startswith(f"{path}:"):
            raise
        kind = JobError if isinstance(error, JobError) else ValueError
        raise kind(f"{path}: {error}") from error


def _checked(planned: Plan) -> models.ModelFacts:
    """Run all checks in turn, the cheap ones first; return the sizes of the job's model."""
    job, below = planned.job, planned.below
    if below is not None:
        check(below)
        if below.model is None:
            raise ValueError(f"model.source: the job {below.job.name} trains no model that this job could start from")
        _check_start(below.job)
    # In order of cost: settings, then rows, then the model's config, then its tokenizer and a forward pass without weights.
    _check_method(planned)
    for role, data in job.data.by_role.items():
        check_rows(f"data.{role}", data)
    if job.train is not None and job.train.epochs is not None:
        length.of(job)
    check_tasks(planned)
    facts = facts_of(planned)
    _check_kind(planned, facts)
    models.check_checkpoint(sources.fetch(planned.source), job.model.attention, job.model.trust_remote_code)
    check_named(job, facts)
    check_reach(planned)
    check_template(planned, facts)
    check_ids(planned, facts)
    _check_settings(job, facts)
    _check_places(planned)
    _warn_of_strengths(job)
    if job.train is not None and facts.max_positions and job.train.max_tokens > facts.max_positions:
        raise ValueError(
            f"train.max_tokens {job.train.max_tokens}: the context of {facts.architecture} holds {facts.max_positions} tokens"
        )
    return facts


def _check_settings(job: Job, facts: models.ModelFacts) -> None:
    """Refuse settings that the method refuses. Raises ValueError."""
    try:
        TABLE.of(job.method).check(job.method, facts, job)
    except ValueError as error:
        # Raised again from this package: an error of the user's own method file would otherwise count as an internal error
        # (`faults.is_for_people`).
        raise ValueError(str(error)) from error


def _check_start(below: Job) -> None:
    """Refuse evaluation settings in a job that another job starts from: they would have no effect there."""
    if below.inverse:
        raise ValueError(
            f"model.source: the job {below.name} sets inverse, which concerns its own evaluation only; set method.inverse there"
        )
    for name in ("snapshot", "strength"):
        if (value := getattr(below, name)) is not None and (name, value) != ("strength", 1):
            raise ValueError(
                f"model.source: the job {below.name} sets {name} {value:g}, which concerns its own evaluation only; a job that "
                f"builds on it starts from the end of its training, with its patch at strength 1: remove {name} there"
            )


def _check_method(planned: Plan) -> None:
    """Refuse a job that lacks a section which its method needs, or has a `train` section although its method trains nothing."""
    job, method, name = planned.job, planned.method, planned.job.method.name
    if job.train is not None:
        _check_training(job)
    elif method.needs_training and (planned.below is None or not method.leaves_model):
        raise ValueError(f"train: this key is required by method {name}")
    if method.reads_model(job.method):
        if job.extract is None:
            raise ValueError(f"extract: this key is required by method {name}: it sets where and how activations are extracted")
        if job.extract.keep != "rows":
            raise ValueError(f"extract.keep {job.extract.keep}: method {name} is fitted on the rows; set keep: rows")
        wanted = method.pools(job.method)
        # A method that fits one layer after another extracts and pools its own activations, so it uses no stored ones.
        if method.reads(job.method) and wanted not in job.extract.pooling:
            raise ValueError(f"method.pooling {wanted}: extract.pooling is {list(job.extract.pooling)}; add it there")
    if method.changes_trained:
        # Both raise if the chain of jobs lacks a model that the method compares.
        _ = planned.before, planned.unaligned
    if job.inverse and not planned.leaves_maps:
        raise ValueError("inverse: the job's model has no maps of activations, and only these have an inverse; remove this key")
    if not (job.train or job.evaluate or job.extract or method.closed_form):
        raise ValueError("the job has neither a train nor an extract nor an evaluate section, so there is nothing to do")


def _check_training(job: Job) -> None:
    """Refuse a `train` section that does not go with the method, or data that it cannot train on."""
    assert job.train is not None
    method, name = TABLE.of(job.method), job.method.name
    if not isinstance(method, Trained):
        raise ValueError(f"train: method {name} trains nothing; remove this section")
    trains_on = method.module.trains_on
    if trains_on not in job.data.by_role:
        raise ValueError(f"data.{trains_on}: this key is required, because method {name} trains on it")
    trained, validation = job.data.by_role[trains_on], job.data.validation
    # A preference loss needs pairs of answers, while the losses of all other methods need a single answer.
    if validation is not None and (validation.format == "preference") != (trained.format == "preference"):
        raise ValueError(
            f"data.validation: method {name} trains on rows of format {trained.format}, and its loss cannot be computed for "
            f"rows of format {validation.format}; give rows of format {trained.format}"
        )
    if job.train.keep == "best" and job.data.validation is None:
        raise ValueError("train.keep is best: that needs data.validation to measure the evaluation loss")
    if job.train.patience is not None and job.data.validation is None:
        raise ValueError(f"train.patience {job.train.patience}: that needs data.validation to measure the evaluation loss")
    if method.leaves_model:
        check_masters(job)
    # Snapshots hold the weights of a patch. A method that trains the model itself would store whole models.
    if method.leaves_model and job.train.snapshots:
        raise ValueError(f"train.snapshots: method {name} trains the model itself, so a snapshot of a patch does not exist")


def _warn_of_strengths(job: Job) -> None:
    """Warn of strengths outside the range for which the method is meant (0 to 1 for an interpolation, for example)."""
    strength_range = TABLE.of(job.method).strength_range
    strengths = {*(job.choose.strengths if job.choose else ()), *(s for task in job.tasks for s in task.strengths)}
    outside = sorted(
        strength for strength in strengths if strength_range and not strength_range[0] <= strength <= strength_range[1]
    )
    if outside:
        warnings.warn(
            f"strengths {outside} lie outside of {list(strength_range or ())}, the range of method {job.method.name}",
            stacklevel=2,
        )


def _check_places(planned: Plan) -> None:
    """Refuse preparations that cannot be made on the model, and selected modules that it lacks or that have no value per token.

    The skeleton of the model, which has no weights, is enough for this.
    """
    job = planned.job
    skeleton = models.skeleton(sources.fetch(planned.source), job.model.trust_remote_code)
    try:
        TABLE.of(job.method).prepares(job.method, skeleton, Prepare(job.data.by_role))
    except ValueError as error:
        raise ValueError(f"method: {error}") from None
    named = {
        "extract.select": job.extract.select if job.extract else None,
        "method.steer": TABLE.of(job.method).steers(job.method),
    }
    # A job may extract activations at one place and change them at another, so both selections are checked.
    for key, selection in named.items():
        if selection is not None:
            try:
                _check_runs(taps.select(skeleton, selection), skeleton, selection.side == "output")
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None


def _check_runs(chosen: Sequence[taps.Tap], skeleton: Model, outputs: bool) -> None:
    """Refuse selected modules that the forward pass never calls, and outputs without a value for each token.

    Args:
        chosen: the selected modules.
        skeleton: the model without weights.
        outputs: whether the selection reads outputs (True) or inputs (False).

    Raises:
        ValueError: the message names the modules.
    """
    # An attention kernel applies dropout itself, for example, so the model's dropout module exists but never runs.
    running = models.modules_that_run(skeleton)
    if running is None:  # a diffusion pipeline, or a forward pass that fails on the meta device: unknown before the run
        return
    never = [tap.module for tap in chosen if tap.module not in running]
    if never:
        raise ValueError(f"{taps.did_not_run(never, len(chosen))}; exclude them with exclude_modules")
    for tap in chosen if outputs else ():
        # Outputs such as an auxiliary loss or a cache have no axis of tokens, and a patch adds a value at each token.
        value = taps.value_at(running[tap.module], tap.element, f"the value of {tap.module}")
        if not tap.element and axes.per_token(value, models.DRY_SHAPE_BT).shape[:2] != models.DRY_SHAPE_BT:
            raise ValueError(
                f"the value of {tap.module} has the axes {tuple(value.shape)} for {models.DRY_SHAPE_BT[0]} rows of "
                f"{models.DRY_SHAPE_BT[1]} tokens: it has no vector for each token that could be extracted or steered"
            )


def _check_kind(planned: Plan, facts: models.ModelFacts) -> None:
    """Refuse a method, data or tasks that do not fit the kind of the model (causal language model or diffusion)."""
    job, kind = planned.job, planned.job.model.kind
    if facts.kind != kind:
        raise ValueError(f"model.kind {kind}: the source holds a {facts.architecture}; set kind: {facts.kind}")
    method = planned.method
    if kind not in method.kinds:
        raise ValueError(f"method {job.method.name} works on models of kind {', '.join(method.kinds)}; this one is {kind}")
    for key, task in tasks_of(job):
        if kind not in evaluation.TABLE.of(task).kinds:
            fitting = ", ".join(name for name, other in evaluation.TASKS.items() if kind in other.kinds)
            raise ValueError(f"{key}: task {task.task} does not work on models of kind {kind}; tasks that do: {fitting}")
    if kind == "diffusion":
        _check_drawing(planned)


def _check_drawing(planned: Plan) -> None:
    """Refuse data, poolings and sampler settings that do not go with a diffusion pipeline."""
    job = planned.job
    for role, data in job.data.by_role.items():
        check_data(role, data)
    if job.extract is not None and "none" in job.extract.pooling:
        raise ValueError(
            "extract.pooling none stores one vector for each token, but an image has no tokens: pool over its pixels (mean)"
        )
    if planned.method.pools(job.method) == "last":
        raise ValueError("method.pooling last takes the last token, but an image has no tokens: pool over its pixels (mean)")
    models.check_sampler(sources.fetch(planned.source), job.model.drawing)
    for below in planned.chain[1:] if job.model.drawing.denoiser is not None else ():
        if below.job.train is not None and below.method.leaves_model:
            raise ValueError(
                f"model.sampler.denoiser: the job {below.job.name} trains its denoiser, which this key would replace: remove it"
            )
    method = planned.method
    if method.walks(job.method) and len(job.model.drawing.read) > 1:
        raise ValueError(
            f"model.sampler.read {list(job.model.drawing.read)}: method.incremental fits along one step; read one, or set "
            "method.incremental: false"
        )


# `state` is part of the cache key only: it changes with the files of the folder.
@lru_cache(maxsize=16)
def _facts(directory: Path, state: Hashable, trust_remote_code: bool) -> models.ModelFacts:
    return models.facts(directory, trust_remote_code)
