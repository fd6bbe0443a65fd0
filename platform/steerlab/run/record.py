"""The record of a run: its summary (summary.json) and the environment in which it ran (environment.json)."""

from __future__ import annotations

import importlib.metadata
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NotRequired, TypeAlias, TypedDict

from steerlab.evaluation.statistics import generations, stored
from steerlab.guards import late, saved, texts
from steerlab.guards.json_values import JsonObject
from steerlab.job import UNPATCHED, Job
from steerlab.stages import Evaluation, Plan, choose, evaluate
from steerlab.stages.spread import alone, gpus, reserved
from steerlab.storage import plan
from steerlab.storage.store import Store

if TYPE_CHECKING:
    import ray
else:
    ray = late.module("ray")

SCHEMA = 2
"""Version of the format of summary.json; raised when a field moves that older readers look for."""
MetricNumbers: TypeAlias = Mapping[str, float | None]
"""Numbers of one metric: `value`, `stderr`, `low`, `high` (ends of the 95 % interval), `n` (items scored), and counts of the
items that were skipped. None where a number is unknown."""
_PACKAGES = ("torch", "transformers", "ray", "deepspeed", "datasets", "pyarrow", "pydantic", "numpy", "steerlab")


class ModelFacts(TypedDict):
    """The artifact that holds a run's model."""

    stage: str
    key: str
    snapshot: int | None
    inverse: NotRequired[bool]
    """True if the run evaluated the inverse of the patch; otherwise the key is missing."""


class RunSummary(TypedDict):
    """Content of summary.json of a run, with strengths as numbers."""

    metrics: dict[str, MetricNumbers]
    """Metrics of all tasks by name, each at the strength that its task reports."""
    reported: dict[str, float]
    """Strength that each task reports, by the task's label; empty when the run has no patch."""
    strengths: dict[float, dict[str, MetricNumbers]]
    """Metrics by name at every strength that was measured."""
    choice: JsonObject | None
    """How the strength was chosen (`choose.Choice`); None when the job sets it."""
    model: ModelFacts | None
    """The artifact of the trained model or patch; None if the job makes neither."""
    evaluations: dict[str, str]
    """Keys of the evaluations by the label of the task. Such an artifact's `generations.parquet` holds all generated texts."""
    unsteered: dict[str, str]
    """Keys of the evaluations of the model without the patch, by label. `strengths[0]` has their metrics. Empty when no
    strength was chosen."""
    measures: dict[str, JsonObject]
    """Description of each metric: which direction is better, unit, range."""
    asked: dict[str, dict[str, float | str]]
    """Calls to the API of a task's judge and their cost, from when the evaluation was computed; by the task's label."""
    schema: int
    """SCHEMA of the version that wrote the file."""


def _model_facts(model: plan.Stage, job: Job) -> ModelFacts:
    facts: ModelFacts = {"stage": model.name, "key": model.key, "snapshot": job.snapshot}
    # The key is missing where it would be false, so that summaries of other runs do not change.
    return {**facts, "inverse": True} if job.inverse else facts


def check_numbers(summary: RunSummary, folder: str) -> None:
    """Refuse a metric that is NaN or infinite. Raises plan.StageError, so that the run counts as failed."""
    for strength, metrics in summary["strengths"].items():
        for name, metric in metrics.items():
            if metric["value"] is not None and not math.isfinite(metric["value"]):
                raise plan.StageError(f"metric {name} at strength {strength} is {metric['value']}; run folder: {folder}")


def summarise(planned: Plan, store: Store) -> RunSummary:
    """Return the summary of a job whose stages are all in the store."""
    model = planned.model
    summary: RunSummary = {
        "metrics": {},
        "reported": {},
        "strengths": {},
        "choice": None,
        "model": None if model is None else _model_facts(model, planned.job),
        "evaluations": {},
        "unsteered": {},
        "measures": {},
        "asked": {},
        "schema": SCHEMA,
    }
    for evaluation in planned.evaluations:
        _add_evaluation(summary, evaluation, store, has_patch=planned.leaves_patch)
    return summary


def _add_evaluation(summary: RunSummary, evaluation: Evaluation, store: Store, *, has_patch: bool) -> None:
    """Add one task's metrics, and the choice of its strength, to a run's summary."""
    stage, baseline = evaluation.stage, evaluation.baseline
    if (chosen := stage.inputs.get(evaluate.CHOICE)) is not None:
        summary["choice"] = choose.read(store.local(chosen.name, chosen.key))
    summary["evaluations"][stage.label] = stage.key
    if baseline is not None:
        summary["unsteered"][stage.label] = baseline.key
    if asked := stored.asked(store.local("evaluate", stage.key)):
        summary["asked"][stage.label] = asked
    measures = stored.measures(store.local("evaluate", stage.key))
    summary["measures"] |= {labelled(name, stage.label): stored.dumped(measure) for name, measure in measures.items()}
    for number, (strength, metrics) in enumerate(_measured_strengths(store, evaluation).items()):
        named = {labelled(name, stage.label): metric for name, metric in metrics.items()}
        summary["strengths"].setdefault(strength, {}).update(named)
        if number == 0:  # the first strength of an evaluation is the one that it reports
            summary["metrics"].update(named)
        if number == 0 and has_patch:
            summary["reported"][stage.label] = strength


def _measured_strengths(store: Store, evaluation: Evaluation) -> Mapping[float, Mapping[str, MetricNumbers]]:
    """Return a task's metrics by strength, the reported one first; strength 0 is the model without the patch."""
    measured = stored.strengths(store.local("evaluate", evaluation.stage.key))
    if evaluation.baseline is not None:
        # The evaluation without the patch has a single strength, stored under the strength of its own job.
        plain = stored.strengths(store.local("evaluate", evaluation.baseline.key))
        measured.setdefault(UNPATCHED, next(iter(plain.values())))
    return measured


class Reported(NamedTuple):
    """The strength that a run reported."""

    strength: float
    reason: str
    """Where the strength comes from, as a clause for messages; empty when the run has no patch."""


class _Reporting(saved.Shape):
    """Fields of a summary that give the reported strength."""

    choice: choose.Choice | None = None
    reported: dict[str, float] | None = None


def reported_strength(summary: Mapping[str, object]) -> Reported:
    """Return the strength at which a run's metrics were measured: the chosen one, or that of its first task, or 1."""
    reporting = _Reporting.model_validate(summary)
    if (choice := reporting.choice) is not None:
        return Reported(choice.strength, f"chosen by {choice.rule.metric} on development rows")
    # A run without a patch, or one of a version that did not record strengths.
    if not reporting.reported:
        return Reported(1.0, "")
    (task, strength), *others = reporting.reported.items()
    different = [f"{other} at {value:g}" for other, value in others if value != strength]
    more = f"; the run reports {', '.join(different)}" if different else ""
    return Reported(strength, f"the one that {task} reports{more}")


def samples_of(store: Store, evaluation: Evaluation) -> list[JsonObject]:
    """Return a task's sample texts; those of the model without the patch have strength 0."""
    samples = stored.samples(store.local("evaluate", evaluation.stage.key))
    if evaluation.baseline is None:
        return samples
    plain = stored.samples(store.local("evaluate", evaluation.baseline.key))
    return [*samples, *({**sample, "strength": UNPATCHED} for sample in plain)]


def generations_of(store: Store, evaluation: Evaluation) -> bytes:
    """Return the Parquet file of all texts generated for a task; those of the model without the patch have strength 0."""
    written = stored.written(store.local("evaluate", evaluation.stage.key))
    if evaluation.baseline is not None:
        plain = stored.written(store.local("evaluate", evaluation.baseline.key))
        written = generations.joined(written, plain, UNPATCHED)
    return generations.dumped(written)


def labelled(metric: str, label: str) -> str:
    """Replace the task in a metric's name by the task's label: `perplexity/value` becomes `LABEL/value`."""
    return f"{label}/{metric.partition('/')[2]}"


def environment(command: str, trusted: str | None = None, own_code: Sequence[str] = ()) -> dict[str, object]:
    """Return the content of environment.json: what a result depends on besides its job.

    Args:
        command: the command line.
        trusted: names of the model sources whose own code ran; None if there are none; the key is then missing.
        own_code: the user's own files of methods and tasks; if empty, the key is missing.
    """
    # A package that is not installed is recorded as None: its absence may explain a difference.
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "command": texts.without_secrets(command),
        "python": sys.version.split()[0],
        "versions": versions,
        # An uploaded working directory has no repository; `steerlab submit` sends the commit along.
        "git": _git("rev-parse", "HEAD") or os.environ.get("STEERLAB_GIT_COMMIT"),
        "git_changes": _git("status", "--porcelain"),
        **_cluster(),
        **({} if trusted is None else {"own_code_of": texts.without_secrets(trusted)}),
        **({"own_code": list(own_code)} if own_code else {}),
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _cluster() -> JsonObject:
    """Return the size of the cluster, or of this machine where the stages ran in this process, and its GPUs.

    Empty for a run that found all of its artifacts and joined no cluster.
    """
    if alone.here() is not None:
        here: JsonObject = {**reserved.present()}
        return {"cluster": here, "nodes": 1, "gpus": gpus.in_words()}
    if "ray" not in sys.modules or not ray.is_initialized():
        return {}
    # Ray's other resources, such as node:IP, do not describe the size of the cluster.
    resources: JsonObject = {name: value for name, value in ray.cluster_resources().items() if name in ("CPU", "GPU", "memory")}
    nodes = len([node for node in ray.nodes() if node["Alive"]])
    return {"cluster": resources, "nodes": nodes, "gpus": gpus.in_words()}


@cache
def _git(*arguments: str) -> str | None:
    """Return the output of a git command in this repository; None if it fails."""
    # Cached for the life of the process, which runs the code that it imported, even if later commits change it.
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), *arguments], capture_output=True, text=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


_END = 400
"""Characters at the beginning and at the end of a long message that are shown."""


def root_cause(error: BaseException) -> str:
    """Return the message of the error that Ray wrapped in another one, as one line."""
    # Ray Train V2 raises a WorkerGroupError with one error for each worker, or a ControllerError; Ray Core raises a
    # RayTaskError with a `cause`.
    failures = getattr(error, "worker_failures", None)
    if failures:
        return root_cause(next(iter(failures.values())))
    for name in ("cause", "controller_failure", "_base_exc"):
        inner = getattr(error, name, None)
        if isinstance(inner, BaseException) and inner is not error:
            return root_cause(inner)
    text = str(error).strip()
    # An error that Ray could not pickle arrives as the text of its traceback, whose last line is the error itself.
    if "Traceback" in text or "ray::" in text:
        return _shortened(text.splitlines()[-1].strip())
    return f"{type(error).__name__}: {_shortened(' '.join(text.split()))}"


def _shortened(text: str) -> str:
    # The middle is cut: the end explains what to do, often with a long path.
    return text if len(text) <= 2 * _END else f"{text[:_END]} ... {text[-_END:]}"
