"""What a page shows of a run and of a sweep: their folders, read once."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from steerlab.evaluation.statistics.measures import LOSSES, Measure
from steerlab.guards import saved
from steerlab.run import folder as folders
from steerlab.storage import plan
from steerlab.storage.store import Store

MAX_POINTS = 400
"""Points of one training curve; longer ones are thinned, their ends kept."""
MAX_CURVES = 8
"""Trials of a sweep whose runs are read whole: the best ones."""
Document: TypeAlias = Mapping[str, Any]
"""A JSON object of a run's or a sweep's folder, or a row of its trials; `run.folder` checked the keys that are read here."""


@dataclass(frozen=True)
class Entry:
    """What the page shows of one run."""

    name: str
    folder: str
    job: Document
    summary: Document
    stages: Sequence[Document]
    environment: Document
    samples: Mapping[str, Sequence[Document]]
    fit_s: float | None
    """Seconds that fitting or training took when it was done."""
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Training metric -> (step, value)."""
    images: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    sheets: dict[str, str] = field(default_factory=dict)
    """Contact sheets: guidance -> path."""
    """`strength_guidance` -> (image id, path below ROOT)."""
    store: Store | None = None
    measures: dict[str, Measure] = field(default_factory=dict)
    """Metric -> what it measures, as far as the run says it."""

    @property
    def strength(self) -> float:
        """The strength of the headline metrics."""
        return next(iter(self.summary["strengths"]), math.nan)

    @property
    def choice(self) -> Document | None:
        """How the strength was chosen, if it was."""
        return self.summary.get("choice")

    @property
    def root(self) -> str:
        """ROOT, or its usual name where it is not known."""
        return self.store.root if self.store else "ROOT"


def measure_in(runs: Iterable[Entry], metric: str) -> Measure:
    """Return what a metric of some runs measures: which way is better and its unit, where a run says it."""
    said = (run.measures[metric] for run in runs if metric in run.measures)
    return next(said, None) or LOSSES.get(metric) or Measure(metric, None)


@dataclass(frozen=True)
class Sweep:
    """What the page shows of one sweep."""

    name: str
    folder: str
    job: Document
    space: Document
    trials: Sequence[Document]
    """Rows of trials.parquet: one a trial and seed."""
    summary: Document
    """Empty while the sweep goes on."""
    root: str = "ROOT"
    runs: tuple[Entry, ...] = ()
    """The runs of its best trials."""

    @property
    def metric(self) -> str | None:
        """What the sweep makes best."""
        return self.summary.get("metric") or self.space.get("metric") or next(iter(self.metrics), None)

    @property
    def maximises(self) -> bool:
        """Whether more of the metric is better."""
        return (self.summary.get("mode") or self.space.get("mode") or "max") == "max"

    @property
    def parameters(self) -> list[str]:
        """What varies, by path; what has one value in all trials comes last."""
        names = _named(self.trials, "param.")
        return sorted(names, key=lambda name: len({str(trial.get(f"param.{name}")) for trial in self.trials}) < 2)

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics, the sweep's own first."""
        own = self.summary.get("metric") or self.space.get("metric")
        return sorted(_named(self.trials, "metric."), key=lambda name: name != own)

    @property
    def finished(self) -> list[Document]:
        """The rows that have a value of the sweep's metric, the best first."""
        key = f"metric.{self.metric}"
        scored = [trial for trial in self.trials if _is_number(trial.get(key))]
        return sorted(scored, key=lambda trial: trial[key], reverse=self.maximises)

    @property
    def paid(self) -> list[bool]:
        """Whether a row is the one that its run's seconds count for: trials that only differ in strength share a run."""
        seen: set[str] = set()
        return [trial.get("run") is None or not (trial["run"] in seen or seen.add(trial["run"])) for trial in self.trials]

    @property
    def best(self) -> str | None:
        """The id of the best trial: what the sweep says, else the best row."""
        said = (self.summary.get("best") or {}).get("trial_id")
        return said or (self.finished[0]["trial_id"] if self.finished else None)


def read(store: Store, folder: str) -> Entry:
    """Read a run folder (a path below ROOT).

    Raises:
        ValueError: it is no finished run.
    """
    try:
        summary = folders.summary(store, folder)
    except FileNotFoundError:
        raise ValueError(f"{folder} is no finished run folder (runs/NAME/ID) of {store.root}") from None
    job = folders.job(store, folder)
    return Entry(
        name=job["name"] if job["method"]["name"] in job["name"] else f"{job['method']['name']} ({job['name']})",
        folder=folder,
        job=job,
        summary=summary,
        stages=folders.stages(store, folder),
        environment=folders.environment(store, folder),
        samples=folders.samples(store, folder),
        fit_s=fit_seconds(store, summary.get("model")),
        curves=curves(store, folder),
        images=images(store, folder),
        sheets=sheets(store, folder),
        store=store,
        measures=folders.measures(summary),
    )


def read_sweep(store: Store, folder: str) -> Sweep:
    """Read a sweep folder (a path below ROOT), finished or not, and the runs of its best trials.

    Raises:
        ValueError: it is no sweep.
    """
    try:
        job = folders.job(store, folder)
        trials = folders.trials(store, folder)
    except FileNotFoundError:
        raise ValueError(f"{folder} is no sweep folder (sweeps/NAME/ID) of {store.root}, or none of its trials began") from None
    found = Sweep(
        name=job["name"],
        folder=folder,
        job=job,
        space=_or_nothing(folders.space, store, folder),
        trials=trials,
        summary=_or_nothing(folders.sweep_summary, store, folder),
        root=store.root,
    )
    return replace(found, runs=tuple(_best_runs(store, found)))


def _best_runs(store: Store, sweep: Sweep) -> list[Entry]:
    """Read the runs of a sweep's best trials, one a trial, named by what they vary."""
    varied = [name for name in sweep.parameters if len({str(trial.get(f"param.{name}")) for trial in sweep.trials}) > 1]
    first: dict[str, Document] = {}
    for trial in sorted(sweep.finished, key=lambda trial: trial["trial_id"] != sweep.best):
        if trial.get("run") and trial["run"] not in (other["run"] for other in first.values()):
            first.setdefault(trial["trial_id"], trial)
    runs = []
    for trial in list(first.values())[:MAX_CURVES]:
        if "summary.json" in store.list(trial["run"]):
            values = ", ".join(f"{name.rpartition('.')[2]} {_short(trial.get(f'param.{name}'))}" for name in varied[:2])
            runs.append(
                replace(read(store, trial["run"]), name=f"{trial['trial_id']} ({values})" if values else trial["trial_id"])
            )
    return runs


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class _Fitted(saved.Shape):
    seconds: float


def fit_seconds(store: Store, model: Document | None) -> float | None:
    """Return how long the fit or the training of a run's model took, None where there was none."""
    if model is None or not store.has(model["stage"], model["key"]):
        return None
    directory = store.local(model["stage"], model["key"])
    if (directory / "fit.json").is_file():
        return saved.read(directory / "fit.json", _Fitted).seconds
    return plan.made(store, model["stage"], model["key"]).seconds


def curves(store: Store, folder: str) -> dict[str, list[tuple[float, float]]]:
    """Return the training metrics of a run over its steps; those of the last training where a job stands on others."""
    try:
        lines = folders.lines(store, folder)
    except FileNotFoundError:
        return {}
    last = lines[-1]["key"] if lines else None
    found: dict[str, dict[float, float]] = {}
    for line in lines:
        for name, value in line.items():
            if line["key"] == last and "/" in name and _is_number(value):
                found.setdefault(name, {})[line["step"]] = value
    return {name: thinned(sorted(points.items())) for name, points in found.items()}


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep at most MAX_POINTS points, evenly, with both ends."""
    if len(points) <= MAX_POINTS:
        return list(points)
    return [points[round(i * (len(points) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def images(store: Store, folder: str) -> dict[str, list[tuple[str, str]]]:
    """Find a run's images: samples/images/{strength}_{guidance}/{id}.png; contact sheets lie beside these folders."""
    below = f"{folder}/samples/images"
    found = {}
    for setting in sorted(name for name in store.list(below) if not name.endswith((".png", ".gif"))):
        names = [name for name in store.list(f"{below}/{setting}") if name.endswith(".png")]
        found[setting] = [(name.removesuffix(".png"), f"{below}/{setting}/{name}") for name in sorted(names, key=_natural)]
    return {setting: pictures for setting, pictures in found.items() if pictures}


def sheets(store: Store, folder: str) -> dict[str, str]:
    """Find a run's contact sheets: samples/images/sheet_{guidance}.png."""
    below = f"{folder}/samples/images"
    names = sorted(name for name in store.list(below) if name.startswith("sheet_") and name.endswith(".png"))
    return {f"{float(name[6:-4]):g}": f"{below}/{name}" for name in names}


def _natural(name: str) -> tuple[int, str]:
    digits = "".join(letter for letter in name if letter.isdigit())
    return (int(digits) if digits else -1, name)


def _named(trials: Sequence[Document], prefix: str) -> list[str]:
    return list(dict.fromkeys(name.removeprefix(prefix) for trial in trials for name in trial if name.startswith(prefix)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _or_nothing(read: Callable[[Store, str], Document], store: Store, folder: str) -> Document:
    """Read a file of a sweep that may not be there yet."""
    try:
        return read(store, folder)
    except FileNotFoundError:
        return {}
