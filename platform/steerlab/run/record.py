"""What a finished run leaves behind: its summary, the environment it ran in."""

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
from typing import NamedTuple, TypeAlias, TypedDict

import ray

from steerlab.evaluation.statistics import stored
from steerlab.guards import saved, texts
from steerlab.guards.json_values import JsonObject
from steerlab.job import UNPATCHED
from steerlab.stages import Evaluation, Plan, choose, evaluate
from steerlab.storage import plan
from steerlab.storage.store import Store

SCHEMA = 2
"""Version of summary.json; raised when what older readers look for is elsewhere."""
MetricNumbers: TypeAlias = Mapping[str, float | None]
"""A metric as it stands in files: `value`, `stderr`, `low`, `high`, `n` and counts of what was left out."""
_PACKAGES = ("torch", "transformers", "ray", "deepspeed", "datasets", "pyarrow", "pydantic", "numpy", "steerlab")


class ModelFacts(TypedDict):
    """The artifact that holds a run's model."""

    stage: str
    key: str
    snapshot: int | None


class RunSummary(TypedDict):
    """What summary.json of a run holds, strengths as numbers."""

    metrics: dict[str, MetricNumbers]
    """Those of each task's headline, whose strength is in `reported` where there is a patch."""
    reported: dict[str, float]
    strengths: dict[float, dict[str, MetricNumbers]]
    choice: JsonObject | None
    """How the strength was chosen (`choose.Choice`)."""
    model: ModelFacts | None
    evaluations: dict[str, str]
    """Keys of the evaluations, by the label of the task."""
    unsteered: dict[str, str]
    """Keys of those of the model without the patch, where the strength was chosen; strength 0 has their numbers."""
    measures: dict[str, JsonObject]
    """What each metric is: which way is better, its unit, its range."""
    schema: int


def check_numbers(summary: RunSummary, folder: str) -> None:
    """Refuse a metric that is not a number: a table with one in it would be read as if it were. Raises plan.StageError."""
    for strength, metrics in summary["strengths"].items():
        for name, metric in metrics.items():
            if metric["value"] is not None and not math.isfinite(metric["value"]):
                raise plan.StageError(f"metric {name} at strength {strength} is {metric['value']}; run folder: {folder}")


def summarise(planned: Plan, store: Store) -> RunSummary:
    """Collect the metrics of a job whose stages are all in the store."""
    left = planned.model
    summary: RunSummary = {
        "metrics": {},
        "reported": {},
        "strengths": {},
        "choice": None,
        "model": None if left is None else {"stage": left.name, "key": left.key, "snapshot": planned.job.snapshot},
        "evaluations": {},
        "unsteered": {},
        "measures": {},
        "schema": SCHEMA,
    }
    for evaluation in planned.evaluations:
        _add_evaluation(summary, evaluation, store, has_patch=planned.leaves_patch)
    return summary


def _add_evaluation(summary: RunSummary, evaluation: Evaluation, store: Store, *, has_patch: bool) -> None:
    """Put one task's metrics, and how its strength was chosen, into a run's summary."""
    stage, baseline = evaluation.stage, evaluation.baseline
    if (chosen := stage.inputs.get(evaluate.CHOICE)) is not None:
        summary["choice"] = choose.read(store.local(chosen.name, chosen.key))
    summary["evaluations"][stage.label] = stage.key
    if baseline is not None:
        summary["unsteered"][stage.label] = baseline.key
    measures = stored.measures(store.local("evaluate", stage.key))
    summary["measures"] |= {labelled(name, stage.label): stored.dumped(measure) for name, measure in measures.items()}
    for number, (strength, metrics) in enumerate(_measured_strengths(store, evaluation).items()):
        named = {labelled(name, stage.label): metric for name, metric in metrics.items()}
        summary["strengths"].setdefault(strength, {}).update(named)
        if number == 0:
            summary["metrics"].update(named)
        if number == 0 and has_patch:
            summary["reported"][stage.label] = strength


def _measured_strengths(store: Store, evaluation: Evaluation) -> Mapping[float, Mapping[str, MetricNumbers]]:
    """Return a task's metrics by strength, the headline's first; the model without the patch is strength 0."""
    measured = stored.strengths(store.local("evaluate", evaluation.stage.key))
    if evaluation.baseline is not None:
        plain = stored.strengths(store.local("evaluate", evaluation.baseline.key))
        measured.setdefault(UNPATCHED, next(iter(plain.values())))
    return measured


class Reported(NamedTuple):
    """The strength that a run reported."""

    strength: float
    reason: str
    """Where it is from; empty where the run has none to report."""


class _Reporting(saved.Shape):
    """What a summary says of the strength of its numbers."""

    choice: choose.Choice | None = None
    reported: dict[str, float] | None = None


def reported_strength(summary: Mapping[str, object]) -> Reported:
    """Return the strength that a run's numbers are of: the chosen one, else that of its tasks, else 1."""
    reporting = _Reporting.model_validate(summary)
    if (choice := reporting.choice) is not None:
        return Reported(choice.strength, f"chosen by {choice.rule.metric} on development rows")
    if not reporting.reported:
        return Reported(1.0, "")
    (task, strength), *others = reporting.reported.items()
    different = [f"{other} at {value:g}" for other, value in others if value != strength]
    more = f"; the run reports {', '.join(different)}" if different else ""
    return Reported(strength, f"the one that {task} reports{more}")


def samples_of(store: Store, found: Evaluation) -> list[JsonObject]:
    """Return a task's readable samples, those of the model without the patch as strength 0."""
    kept = stored.samples(store.local("evaluate", found.stage.key))
    if found.baseline is None:
        return kept
    plain = stored.samples(store.local("evaluate", found.baseline.key))
    return [*kept, *({**sample, "strength": UNPATCHED} for sample in plain)]


def labelled(metric: str, label: str) -> str:
    """Return a metric's name under the label of its task."""
    return f"{label}/{metric.partition('/')[2]}"


def environment(command: str, trusted: str | None = None, own_code: Sequence[str] = ()) -> dict[str, object]:
    """Return what a result depends on besides its job: versions, git commit, hardware.

    `trusted` names the sources whose own code ran, `own_code` the methods and tasks that are not the platform's; their keys are
    left out where there are none.
    """
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
        "cluster": {name: value for name, value in ray.cluster_resources().items() if name in ("CPU", "GPU", "memory")},
        "nodes": len([node for node in ray.nodes() if node["Alive"]]),
        **({} if trusted is None else {"own_code_of": texts.without_secrets(trusted)}),
        **({"own_code": list(own_code)} if own_code else {}),
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
