"""Execute a job: run its stages and write its run folder."""

from __future__ import annotations

import os
import time
import traceback
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from steerlab.evaluation.statistics import stored
from steerlab.guards import texts
from steerlab.guards.json_values import JsonObject
from steerlab.job import Job
from steerlab.run import job_files
from steerlab.run.record import (
    MetricNumbers,
    RunSummary,
    check_numbers,
    environment,
    generations_of,
    reported_strength,
    root_cause,
    samples_of,
    summarise,
)
from steerlab.stages import Plan
from steerlab.stages.spread import staying
from steerlab.storage import plan
from steerlab.storage.store import Store, StoreError
from steerlab.tracking import FINISH_WAIT_S, Place, Tracker, prometheus

_METRICS_EVERY_S = 5.0
"""Seconds between two objects with lines of metrics. If the process is killed, the lines since the last object are lost; they
are written again when the training continues, because it reports all of its steps again."""


@dataclass(frozen=True)
class Run:
    """A finished execution of a job: its folder, its summary and how long each stage took."""

    folder: str
    """The run folder, relative to ROOT."""
    summary: RunSummary
    records: list[plan.Record]
    """Status of each stage, in the order of execution."""


def default_root() -> str:
    """Return $STEERLAB_ROOT or ~/steerlab."""
    return os.environ.get("STEERLAB_ROOT") or str(Path("~/steerlab").expanduser())


def execute(
    planned: Plan,
    store: Store,
    listener: plan.Listener,
    command: str = "",
    run_id: str | None = None,
    place: Place = Place(),  # noqa: B008
) -> Run:
    """Run the stages of a job and write its run folder, even if a stage fails.

    Args:
        planned: the plan of the job.
        store: ROOT.
        listener: receives the events of the stages.
        command: the command line, for the record.
        run_id: id of the run; that of an earlier run continues in its folder. None for a new id.
        place: group, sweep and parameters of the run in W&B.

    Raises:
        plan.StageError: a stage failed; the message names the stage, the cause and the log file.
    """
    job, run_id = planned.job, run_id or new_id()
    folder = f"runs/{job.name}/{run_id}"
    _write_request(planned, store, folder, command)
    # A trial of a sweep need not wait for W&B: the process that sends its metrics outlives the trial.
    wait_s = FINISH_WAIT_S if place.group is None else 0
    tracker = _tracker(job, store, folder, run_id, place)
    # Each run removes old temporary files, since there is no service that would do so regularly.
    store.sweep_temporary()
    records: list[plan.Record] = []
    following = _following(planned, store, folder, tracker, listener)
    try:
        plan.run(planned.stages, store, job.scale, following, records)
    except BaseException as error:
        # Ctrl-C is caught too: the folder should record why the run ended, and W&B should not show it as running.
        log = _record_failure(store, folder, records, error)
        with suppress(OSError):  # a full disk, which `log` reports
            tracker.finish({}, 1, wait_s)
        if not isinstance(error, Exception):  # Ctrl-C, or `stops.Stopped`, which the caller handles
            raise
        name = f"{records[-1].stage.name} ({records[-1].stage.label})" if records else "(none)"
        raise plan.StageError(f"stage {name} failed: {root_cause(error)}; {log}") from error
    finally:
        staying.close()
    try:
        return _finish(planned, store, folder, records, tracker, place, wait_s)
    except StoreError as error:
        raise plan.StageError(f"all stages are done, but not the run folder: {error}; run the same command again") from error


def _finish(
    planned: Plan, store: Store, folder: str, records: list[plan.Record], tracker: Tracker, place: Place, wait_s: float
) -> Run:
    """Write the files of a run whose stages are done, and send what it measured to the services of the job."""
    store.merge_lines(f"{folder}/metrics.jsonl")
    # Readers take the presence of summary.json as the sign that a run has finished, so a failed run has none.
    summary = summarise(planned, store)
    store.write_json(f"{folder}/plan.json", {"stages": [record.as_dict() for record in records]})
    check_numbers(summary, store.where(folder))
    store.write_json(f"{folder}/summary.json", summary)
    samples = _keep_samples(planned, store, folder)
    # Images are sent by their paths, which those in an object store do not have.
    images = store.on_disk(folder, "samples", "images") if store.is_local else None
    _report(summary, samples, images, tracker, place, wait_s)
    return Run(folder, summary, records)


def _record_failure(store: Store, folder: str, records: list[plan.Record], error: BaseException) -> str:
    """Write error.txt and plan.json of a run that failed; return where the log is, or why there is none."""
    try:
        store.write_text(f"{folder}/error.txt", texts.without_secrets("".join(traceback.format_exception(error))))
        store.write_json(f"{folder}/plan.json", {"stages": [record.as_dict() for record in records]})
    except OSError as full:  # often the full disk that ended the stage; the stage's own error must still be reported
        return f"no log could be written ({' '.join(str(full).split())})"
    return f"log: {store.where(folder, 'error.txt')}"


def new_id() -> str:
    """Return a unique id that sorts by time: the local time and six random hexadecimal digits."""
    return f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"


def _write_request(planned: Plan, store: Store, folder: str, command: str) -> None:
    """Write job.yaml and environment.json, which hold all that a result depends on, and the stages of the plan."""
    # Written before anything else: from here on the run names its artifacts, so that `steerlab gc` does not remove them.
    left = [plan.Record(stage, "to run").as_dict() for stage in planned.stages]
    store.write_json(f"{folder}/plan.json", {"stages": left})
    job_files.write(store, f"{folder}/job.yaml", planned.job)
    trusted = [planned.source] if any(below.job.model.trust_remote_code for below in planned.chain) else []
    trusted += [task.trusted_source for task in planned.job.evaluate if task.trusted_source is not None]
    store.write_json(f"{folder}/environment.json", environment(command, ", ".join(trusted) or None, planned.own_code))


def _tracker(job: Job, store: Store, folder: str, run_id: str, place: Place) -> Tracker:
    """Open the run in W&B."""
    # The spool is a local file that grows line by line, which an object store cannot hold.
    scratch = store.on_disk(folder) if store.is_local else Path.home() / ".cache/steerlab/wandb" / run_id
    tagged = replace(place, tags=(*place.tags, job.method.name))
    return Tracker(job.track, run_id, job.name, job.model_dump(mode="json"), scratch, tagged)


def _keep_samples(planned: Plan, store: Store, folder: str) -> dict[str, list[JsonObject]]:
    """Copy the texts and images of all tasks into the run folder; return the sample texts by the label of the task."""
    kept: dict[str, list[JsonObject]] = {}
    for evaluation in planned.evaluations:
        samples = kept[evaluation.stage.label] = samples_of(store, evaluation)
        store.write_json(f"{folder}/samples/{evaluation.stage.label}.json", samples)
        # The file is copied, not linked: verdicts are written beside it, and an artifact must not change.
        store.write_bytes(f"{folder}/samples/{evaluation.stage.label}.parquet", generations_of(store, evaluation))
    _keep_images(planned, store, folder)
    return kept


def _report(
    summary: RunSummary,
    samples: Mapping[str, list[JsonObject]],
    images: Path | None,
    tracker: Tracker,
    place: Place,
    wait_s: float,
) -> None:
    """Send what was measured to the services of the job: the run at its reported strength, and each further strength.

    Each further strength is sent as its own run, with its metrics and samples, so that plots over parameters show it.
    """
    for label, rows in samples.items():
        tracker.table(f"samples/{label}", rows)
    if images is not None:
        tracker.gallery(images)
    own = reported_strength({**summary}).strength if summary["reported"] else None
    points = [] if own is None else [s for s in summary["strengths"] if s != own and _is_point(s, place)]
    for strength in points if own is None else [own, *points]:
        tracker.point(strength, _values(summary["strengths"].get(strength, {})))
    for strength in points:
        other = tracker.beside(strength)
        for label, rows in samples.items():
            other.table(f"samples/{label}", [row for row in rows if row.get("strength") == strength])
        if images is not None:
            other.gallery(images, strength)
        # No wait here: the wait for the run's own writer, which sends these too, comes last.
        other.finish({**_values(summary["strengths"][strength])}, 0, 0, strength)
    tracker.finish({name: metric["value"] for name, metric in summary["metrics"].items()}, 0, wait_s, own)


def _is_point(strength: float, place: Place) -> bool:
    return place.strengths is None or strength in place.strengths


def _values(metrics: Mapping[str, MetricNumbers]) -> dict[str, float]:
    return {name: metric["value"] for name, metric in metrics.items() if metric["value"] is not None}


def _keep_images(planned: Plan, store: Store, folder: str) -> None:
    """Copy the images of all tasks into the run folder: those of the first task with images to `samples/images`."""
    # The report and W&B look in `samples/images`; images of further tasks lie beside it under the label of their task.
    folders = {
        evaluation.stage.label: store.local("evaluate", evaluation.stage.key) / stored.FILES
        for evaluation in planned.evaluations
    }
    drawing = {label: images for label, images in folders.items() if images.is_dir()}
    for number, (label, images) in enumerate(drawing.items()):
        name = label if number else "images"
        for file in sorted(path for path in images.rglob("*") if path.is_file()):
            store.write_bytes(f"{folder}/samples/{name}/{file.relative_to(images).as_posix()}", file.read_bytes())


def _following(planned: Plan, store: Store, folder: str, tracker: Tracker, listener: plan.Listener) -> plan.Listener:
    """Return a listener that writes metrics.jsonl, logs to W&B and Prometheus, and passes each event on to `listener`."""
    # A run that continues after a kill starts at its last checkpoint and repeats some steps; each is written once.
    last_steps: dict[str, int] = {}
    for line in store.read_lines(f"{folder}/metrics.jsonl"):
        last_steps[line["key"]] = max(last_steps.get(line["key"], 0), line["step"])
    keys, own = list(planned.trainings), planned.model
    lines: list[JsonObject] = []
    written_s = float("-inf")

    def write(*, now: bool) -> None:
        """Write the lines of metrics so far; on an object store not every step, but every few seconds."""
        nonlocal written_s
        if lines and (now or store.is_local or time.monotonic() - written_s > _METRICS_EVERY_S):
            store.append_lines(f"{folder}/metrics.jsonl", lines)
            lines.clear()
            written_s = time.monotonic()

    def reported(stage: plan.Stage, metrics: dict[str, float]) -> None:
        if "step" in metrics and metrics["step"] > last_steps.get(stage.key[:12], 0):
            lines.append({"stage": stage.name, "key": stage.key[:12], **metrics})
            write(now=False)
        if "step" in metrics:
            shown = {name: value for name, value in metrics.items() if name not in ("steps", "left_s")}
            # Trainings of the jobs that this one builds on have separate axes: base/train, base/base/train.
            depth = 0 if stage.key not in keys else len(keys) - keys.index(stage.key) - (own is not None and own.key in keys)
            tracker.log(shown, "base/" * depth + stage.name)
        prometheus.reported(stage, metrics)
        listener.reported(stage, metrics)

    def ended(record: plan.Record) -> None:
        stage = record.stage
        write(now=True)
        inputs = [(needed.name, needed.key, _uri(store, needed)) for needed in stage.inputs.values()]
        tracker.stage(stage.name, stage.key, stage.label, record.status, record.seconds, _uri(store, stage), inputs)
        prometheus.ended(record)
        listener.ended(record)

    def waiting(stage: plan.Stage, line: str) -> None:
        # The process that computes the stage may be waiting for the GPU that this run's own process still holds.
        staying.close()
        listener.waiting(stage, line)

    return plan.Listener(listener.started, ended, reported, waiting)


def _uri(store: Store, stage: plan.Stage) -> str:
    """Return the URI of an artifact without credentials."""
    # W&B shows the URI to everybody in the project, and ROOT may be a URI with a user and a password.
    path = store.where("artifacts", stage.name, stage.key)
    return texts.without_user(path) if "://" in path else f"file://{path}"
