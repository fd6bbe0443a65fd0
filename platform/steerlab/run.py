"""One execution of a job: what is checked before it starts, the run folder it leaves, and how two runs compare."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import math
import os
import socket
import subprocess
import sys
import time
import traceback
import uuid
import warnings
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import ray

from steerlab import meters, models, plan, rows, sources, taps
from steerlab.conditioning import check_data
from steerlab.evaluation import TASKS
from steerlab.evaluation.metrics import Difference, Observation, Transform, paired_difference
from steerlab.job import DataSet, Job, base_job, dump
from steerlab.methods import METHODS
from steerlab.methods.contract import check_masters
from steerlab.stages import (
    Evaluation,
    JobType,
    evaluate,
    evaluations,
    first_source,
    leaves_patch,
    model_stage,
    plan_of,
    trainings,
)
from steerlab.stages.choose import CHOICE
from steerlab.store import Store
from steerlab.tokens import Encoder
from steerlab.tracking import FINISH_WAIT_S, Place, Tracker

_PACKAGES = ("torch", "transformers", "ray", "deepspeed", "datasets", "pyarrow", "pydantic", "numpy", "steerlab")
_ABANDONED_S = 24 * 3600
"""Half-filled directories of killed processes are removed when nothing was written to them for so long."""
_CONNECT_S = 5.0
_IDLE_MS = 60_000


@dataclass(frozen=True)
class Run:
    """A finished execution and where its record lies."""

    folder: str
    """Path below ROOT."""
    summary: dict[str, Any]
    records: list[plan.Record]


def default_root() -> str:
    """Return $STEERLAB_ROOT or ~/steerlab."""
    return os.environ.get("STEERLAB_ROOT") or str(Path("~/steerlab").expanduser())


def check_address() -> None:
    """Refuse a $RAY_ADDRESS where nothing listens; Ray itself would try for many minutes.

    Raises:
        ValueError: nothing answers there.
    """
    host, _, port = os.environ.get("RAY_ADDRESS", "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ValueError(
            f"no Ray cluster answers at RAY_ADDRESS {host}:{port} ({error}); start it, or unset RAY_ADDRESS to use a cluster "
            "of this machine or one made for the command"
        ) from None


def connect() -> None:
    """Join the cluster that is there ($RAY_ADDRESS or one started on this machine), else start one for this process.

    Processes of a cluster that is started here stay a while after their task: the next one then pays for no imports. Ray's own
    second is shorter than the pauses between the stages of a job.

    Raises:
        ValueError: nothing answers at $RAY_ADDRESS.
    """
    check_address()
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", str(_IDLE_MS))
    ray.init(logging_level=logging.ERROR, log_to_driver=False, ignore_reinit_error=True)


def facts_of(job: Job) -> models.ModelFacts:
    """Return the sizes of a job's model; a job that builds on another has the architecture of that one's source."""
    return models.facts(sources.fetch(first_source(job)))


def check(job: Job) -> models.ModelFacts:
    """Refuse what cannot work, before anything starts.

    Raises:
        ValueError: with one message for people.
    """
    base = base_job(job, JobType)
    if base is not None:
        check(base)
        if model_stage(base) is None:
            raise ValueError(f"model.source: the job {base.name} leaves no model of its own, so there is none to start from")
    _check_method(job)
    for role, data in job.data.by_role.items():
        _check_rows(f"data.{role}", data)
    _check_tasks(job)
    found = facts_of(job)
    _check_kind(job, found)
    _check_template(job)
    _check_places(job)
    METHODS[job.method.name].check(job.method, found, job)
    _warn_of_strengths(job)
    if job.train is not None and found.max_positions and job.train.max_tokens > found.max_positions:
        raise ValueError(
            f"train.max_tokens {job.train.max_tokens}: the context of {found.architecture} holds {found.max_positions} tokens"
        )
    return found


def _check_method(job: Job) -> None:
    """Refuse sections that the method lacks or has no use for."""
    method, name = METHODS[job.method.name], job.method.name
    if job.train is not None:
        _check_training(job)
    elif method.module is not None and method.needs_training and (base_job(job, JobType) is None or not method.trains_model):
        raise ValueError(f"train: this key is required by method {name}")
    if method.reads(job.method):
        if job.extract is None:
            raise ValueError(f"extract: this key is required by method {name}: it says where the model is read, and how")
        if job.extract.keep != "rows":
            raise ValueError(f"extract.keep {job.extract.keep}: method {name} is fitted on the rows")
        wanted = method.pooling(job.method)
        if wanted not in job.extract.pooling:
            raise ValueError(f"method.pooling {wanted}: extract.pooling is {list(job.extract.pooling)}; add it there")
    if not (job.train or job.evaluate or job.extract or method.fit):
        raise ValueError("the job has neither a train nor an extract nor an evaluate section, so there is nothing to do")


def _check_training(job: Job) -> None:
    assert job.train is not None
    method, name = METHODS[job.method.name], job.method.name
    if method.module is None:
        raise ValueError(f"train: method {name} trains nothing; remove this section")
    if method.trains_on not in job.data.by_role:
        raise ValueError(f"data.{method.trains_on}: this key is required, because method {name} trains on it")
    trained, validation = job.data.by_role[method.trains_on], job.data.validation
    if validation is not None and (validation.format == "preference") != (trained.format == "preference"):
        raise ValueError(
            f"data.validation: rows of format {validation.format} have not the loss of method {name}, which trains on format "
            f"{trained.format}"
        )
    if job.train.keep == "best" and job.data.validation is None:
        raise ValueError("train.keep is best: that needs data.validation to measure the evaluation loss")
    if method.trains_model:
        check_masters(job)
    if method.trains_model and job.train.snapshots:
        raise ValueError(f"train.snapshots: method {name} trains the model itself, so a patch alone is no snapshot of it")


def _check_tasks(job: Job) -> None:
    """Refuse labels that occur twice, rows of tasks that are not as their format says, strengths without a patch, and
    a choice by a metric that is not measured."""
    development = job.choose.tasks if job.choose else ()
    for section, tasks in (("evaluate", job.evaluate), ("choose.tasks", development)):
        labels = [task.label or task.task for task in tasks]
        for number, task in enumerate(tasks):
            if labels.index(labels[number]) != number:
                raise ValueError(f"{section}.{number}: the job has {labels[number]} already; give one of them another `label`")
            for name, value in task:
                if isinstance(value, DataSet):
                    _check_rows(f"{section}.{number}.{name}", value)
            if any(strength != 1 for strength in task.strengths) and not leaves_patch(job):
                raise ValueError(
                    f"{section}.{number}.strengths {list(task.strengths)}: method {job.method.name} leaves no patch to scale"
                )
    if job.choose is not None:
        known = [task.label or task.task for task in development]
        for name in (job.choose.metric, *([job.choose.within.metric] if job.choose.within else [])):
            if name.partition("/")[0] not in known:
                raise ValueError(f"choose: {name} is measured by none of choose.tasks ({', '.join(known)})")


def _check_rows(key: str, data: DataSet) -> None:
    """Refuse rows that are not as the data set says, with the key in the job. Raises ValueError."""
    try:
        rows.check(data)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None


def _warn_of_strengths(job: Job) -> None:
    """Warn of strengths outside of the range that the method's maps are made for."""
    means = METHODS[job.method.name].strength_range
    asked = {*(job.choose.strengths if job.choose else ()), *(s for task in job.evaluate for s in task.strengths)}
    outside = sorted(strength for strength in asked if means and not means[0] <= strength <= means[1])
    if outside:
        warnings.warn(
            f"strengths {outside} lie outside of {list(means or ())}, where method {job.method.name} is meant", stacklevel=2
        )


def _check_places(job: Job) -> None:
    """Refuse a selection of modules that the model does not have; no weight is loaded for that."""
    skeleton = models.skeleton(sources.fetch(first_source(job)))
    try:
        METHODS[job.method.name].prepares(job.method, skeleton)
    except ValueError as error:
        raise ValueError(f"method: {error}") from None
    named = {
        "extract.select": job.extract.select if job.extract else None,
        "method.steer": METHODS[job.method.name].steers(job.method),
    }
    for key, selection in named.items():
        if selection is not None:
            try:
                taps.select(skeleton, selection)
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None


def _check_kind(job: Job, found: models.ModelFacts) -> None:
    """Refuse a method, data or tasks that are not for the kind of model that there is."""
    kind = job.model.kind
    if found.kind != kind:
        raise ValueError(f"model.kind {kind}: the source holds a {found.architecture}; set kind: {found.kind}")
    method = METHODS[job.method.name]
    if kind not in method.kinds:
        raise ValueError(f"method {job.method.name} works on models of kind {', '.join(method.kinds)}; this one is {kind}")
    development = job.choose.tasks if job.choose else ()
    for section, tasks in (("evaluate", job.evaluate), ("choose.tasks", development)):
        for number, task in enumerate(tasks):
            if kind not in TASKS[task.task].kinds:
                fitting = ", ".join(name for name, other in TASKS.items() if kind in other.kinds)
                raise ValueError(
                    f"{section}.{number}: task {task.task} is none for a model of kind {kind}; there are {fitting}"
                )
    if kind == "diffusion":
        _check_drawing(job)


def _check_drawing(job: Job) -> None:
    for role, data in job.data.by_role.items():
        check_data(role, data)
    if job.extract is not None and "none" in job.extract.pooling:
        raise ValueError("extract.pooling none keeps tokens; an image has none: pool over its pixels")
    models.check_sampler(sources.fetch(first_source(job)), job.model.drawing)
    base = base_job(job, JobType)
    while job.model.drawing.denoiser is not None and base is not None:
        if base.train is not None and METHODS[base.method.name].trains_model:
            raise ValueError(f"model.sampler.denoiser: the job {base.name} trains its denoiser; other weights belong there")
        base = base_job(base, JobType)
    method = METHODS[job.method.name]
    if method.walks(job.method) and len(job.model.drawing.read) > 1:
        raise ValueError(
            f"model.sampler.read {list(job.model.drawing.read)}: method.incremental fits along one step; read one, or set "
            "method.incremental: false"
        )


def _check_template(job: Job) -> None:
    """Refuse a chat template that cannot hold an instruction, data and a response."""
    if isinstance(job.model.source, str) and job.model.kind == "causal_lm":
        tokenizer = models.load_tokenizer(sources.fetch(job.model.source))
        encoder = Encoder(tokenizer, job.data.prompt_style, job.data.response_role)
        encoder.encode(encoder.conversation("instruction", "data", "response"))


def execute(
    job: Job,
    store: Store,
    listener: plan.Listener,
    command: str = "",
    run_id: str | None = None,
    place: Place = Place(),  # noqa: B008
) -> Run:
    """Run a job's plan and leave a run folder, also when a stage fails; with the id of an earlier run, go on in its folder.

    `place` is where W&B shows the run.

    Raises:
        plan.StageError: a stage failed; the message names it, the cause and the log.
    """
    run_id = run_id or new_id()
    folder = f"runs/{job.name}/{run_id}"
    store.write_text(f"{folder}/job.yaml", dump(job))
    store.write_json(f"{folder}/environment.json", environment(command))
    local = Path(store.root.removeprefix("file://")) / folder
    scratch = local if store.is_local else Path.home() / ".cache/steerlab/wandb" / run_id
    # A sweep's trial waits for nothing: its writer outlives it.
    wait_s = FINISH_WAIT_S if place.group is None else 0
    place = replace(place, tags=(*place.tags, job.method.name))
    tracker = Tracker(job.track, run_id, job.name, job.model_dump(mode="json"), scratch, place)
    store.sweep_temporary(_ABANDONED_S)
    records: list[plan.Record] = []
    following = _following(job, store, folder, tracker, listener)
    try:
        plan.run(plan_of(job), store, job.scale, following, records)
    except BaseException as error:
        store.write_text(f"{folder}/error.txt", "".join(traceback.format_exception(error)))
        store.write_json(f"{folder}/plan.json", {"stages": [record.as_dict() for record in records]})
        tracker.finish({}, 1, wait_s)
        if not isinstance(error, Exception):
            raise
        name = f"{records[-1].stage.name} ({records[-1].stage.label})" if records else "(none)"
        raise plan.StageError(f"stage {name} failed: {root_cause(error)}; log: {store.root}/{folder}/error.txt") from error
    finally:
        evaluate.close()
    summary = summarise(job, store)
    store.write_json(f"{folder}/plan.json", {"stages": [record.as_dict() for record in records]})
    _check_numbers(summary, f"{store.root}/{folder}")
    store.write_json(f"{folder}/summary.json", summary)
    for found in evaluations(job):
        samples = _samples(store, found)
        store.write_json(f"{folder}/samples/{found.stage.label}.json", samples)
        tracker.table(f"samples/{found.stage.label}", samples)
    _keep_images(job, store, folder)
    tracker.images_below(local / "samples" / "images")
    tracker.finish({name: metric["value"] for name, metric in summary["metrics"].items()}, 0, wait_s)
    return Run(folder, summary, records)


def _check_numbers(summary: dict[str, Any], folder: str) -> None:
    """Refuse a metric that is not a number: a table with one in it would be read as if it were. Raises plan.StageError."""
    for strength, metrics in summary["strengths"].items():
        for name, metric in metrics.items():
            if metric["value"] is not None and not math.isfinite(metric["value"]):
                raise plan.StageError(f"metric {name} at strength {strength} is {metric['value']}; run folder: {folder}")


def new_id() -> str:
    """Return the name of a folder that nobody else makes: the time, to be read, and a random end."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"


def _keep_images(job: Job, store: Store, folder: str) -> None:
    """Put the images that tasks have kept into the run's folder: those of the first such task as `images`, where pages look."""
    folders = {found.stage.label: store.local("evaluate", found.stage.key) / evaluate.FILES for found in evaluations(job)}
    drawing = {label: kept for label, kept in folders.items() if kept.is_dir()}
    for number, (label, kept) in enumerate(drawing.items()):
        name = label if number else "images"
        for file in sorted(path for path in kept.rglob("*") if path.is_file()):
            store.write_bytes(f"{folder}/samples/{name}/{file.relative_to(kept).as_posix()}", file.read_bytes())


def _following(job: Job, store: Store, folder: str, tracker: Tracker, listener: plan.Listener) -> plan.Listener:
    """Pass events on, and keep every line of metrics once: a run that goes on repeats steps of the one that was killed."""
    kept: dict[str, int] = {}
    for line in store.read_lines(f"{folder}/metrics.jsonl"):
        kept[line["key"]] = max(kept.get(line["key"], 0), line["step"])
    keys = list(trainings(job))
    own = model_stage(job)

    def reported(stage: plan.Stage, metrics: dict[str, Any]) -> None:
        if "step" in metrics and metrics["step"] > kept.get(stage.key[:12], 0):
            line = {"stage": stage.name, "key": stage.key[:12], **metrics}
            store.append_line(f"{folder}/metrics.jsonl", line)
        if "step" in metrics:
            shown = {name: value for name, value in metrics.items() if name not in ("steps", "left_s")}
            # The trainings below a job's own have axes of their own: base/train, base/base/train.
            depth = 0 if stage.key not in keys else len(keys) - keys.index(stage.key) - (own is not None and own.key in keys)
            tracker.log(shown, "base/" * depth + stage.name)
        meters.reported(stage, metrics)
        listener.reported(stage, metrics)

    def ended(record: plan.Record) -> None:
        stage = record.stage
        inputs = [(needed.name, needed.key, _uri(store, needed)) for needed in stage.inputs]
        tracker.stage(stage.name, stage.key, stage.label, record.status, record.seconds, _uri(store, stage), inputs)
        meters.ended(record)
        listener.ended(record)

    return plan.Listener(listener.started, ended, reported)


def _uri(store: Store, stage: plan.Stage) -> str:
    path = f"{store.root}/artifacts/{stage.name}/{stage.key}"
    return path if "://" in path else f"file://{path}"


def summarise(job: Job, store: Store) -> dict[str, Any]:
    """Collect the metrics of a job whose stages are all in the store."""
    headline: dict[str, Any] = {}
    strengths: dict[str, dict[str, Any]] = {}
    choice: dict[str, Any] | None = None
    measured: dict[str, str] = {}
    for found in evaluations(job):
        stage = found.stage
        for needed in stage.inputs:
            if needed.name == "choose":
                choice = json.loads((store.local(needed.name, needed.key) / CHOICE).read_text())
        measured[stage.label] = stage.key
        for number, (strength, metrics) in enumerate(_measured_strengths(store, found).items()):
            named = {_named(name, stage.label): metric for name, metric in metrics.items()}
            strengths.setdefault(strength, {}).update(named)
            if number == 0:
                headline.update(named)
    left = model_stage(job)
    model = None if left is None else {"stage": left.name, "key": left.key, "snapshot": job.snapshot}
    return {
        "metrics": headline,
        "strengths": strengths,
        "choice": choice,
        "model": model,
        "evaluations": measured,
        "schema": 1,
    }


def _measured_strengths(store: Store, found: Evaluation) -> dict[str, dict[str, Any]]:
    """Return a task's metrics by strength, the headline's first; the model without the patch is strength 0."""
    saved = json.loads((store.local("evaluate", found.stage.key) / "metrics.json").read_text())["strengths"]
    if found.baseline is not None:
        plain = json.loads((store.local("evaluate", found.baseline.key) / "metrics.json").read_text())["strengths"]
        saved.setdefault("0.0", next(iter(plain.values())))
    return saved


def _samples(store: Store, found: Evaluation) -> list[dict[str, Any]]:
    """Return a task's readable samples, those of the model without the patch as strength 0."""
    kept = json.loads((store.local("evaluate", found.stage.key) / "samples.json").read_text())
    if found.baseline is None:
        return kept
    plain = json.loads((store.local("evaluate", found.baseline.key) / "samples.json").read_text())
    return [*kept, *({**sample, "strength": 0.0} for sample in plain)]


def _named(metric: str, label: str) -> str:
    """Return a metric's name under the label of its task."""
    return f"{label}/{metric.partition('/')[2]}"


def compare(store: Store, first: str, second: str) -> dict[str, Difference]:
    """Return second minus first for every metric that both runs measured on the same items, with a 95 % interval.

    Raises:
        ValueError: a task of the two runs has other data or settings, so its items are not pairs.
    """
    a, b = (_measured(store, folder) for folder in (first, second))
    differences = {}
    for name in a:
        if name not in b:
            continue
        if a[name].task != b[name].task:
            raise ValueError(f"{name} was measured on other data or with other settings in the two runs, so items do not pair")
        if not all(any(o.weight for o in side[name].observations if o.value is not None) for side in (a, b)):
            continue  # nothing scored on one side (SEP where no probe was executed): there is no difference to speak of
        differences[name] = paired_difference(b[name].observations, a[name].observations, transform=a[name].transform)
    return differences


class _Measured(NamedTuple):
    """One metric of a run at its first strength."""

    observations: list[Observation]
    transform: Transform
    task: Any
    """What was asked and of which data: equal for runs whose items are the same."""


def _measured(store: Store, folder: str) -> dict[str, _Measured]:
    found: dict[str, _Measured] = {}
    for label, key in store.read_json(f"{folder}/summary.json")["evaluations"].items():
        directory = store.local("evaluate", key)
        params = store.manifest("evaluate", key)["meta"]["params"]
        task = [{**params["task"], "strengths": None}, params["task_version"], params["fingerprints"]]
        saved = json.loads((directory / "metrics.json").read_text())
        first = float(next(iter(saved["strengths"])))
        for row in pq.read_table(directory / "observations.parquet").to_pylist():
            if row["strength"] == first:
                name = _named(row["metric"], label)
                transform = saved["transforms"].get(row["metric"], "identity")
                found.setdefault(name, _Measured([], transform, task)).observations.append(Observation(**row))
    return found


def environment(command: str) -> dict[str, Any]:
    """Return what a result depends on besides its job: versions, git commit, hardware."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": command,
        "python": sys.version.split()[0],
        "versions": versions,
        # An uploaded working directory has no repository; `steerlab submit` sends the commit along.
        "git": _git("rev-parse", "HEAD") or os.environ.get("STEERLAB_GIT_COMMIT"),
        "git_changes": _git("status", "--porcelain"),
        "cluster": {name: value for name, value in ray.cluster_resources().items() if name in ("CPU", "GPU", "memory")},
        "nodes": len([node for node in ray.nodes() if node["Alive"]]),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


@cache
def _git(*arguments: str) -> str | None:
    """Ask git once a process: what runs is what was imported, whatever is committed since."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def root_cause(error: BaseException) -> str:
    """Return the innermost message of an error that came through Ray, in one line."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return root_cause(next(iter(failures.values())))
    for name in ("cause", "controller_failure", "_base_exc"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException) and inner is not error:
            return root_cause(inner)
    text = str(error).strip()
    if "Traceback" in text or "ray::" in text:  # an error that Ray could only quote: its last line says what happened
        return text.splitlines()[-1].strip()[:500]
    return f"{type(error).__name__}: {' '.join(text.split())[:500]}"
