"""Read the folders of runs and sweeps into the values that the page shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, TypeAlias

from pydantic import Field

from steerlab.evaluation.statistics.measures import LOSSES, Measure
from steerlab.guards import saved
from steerlab.run import folder as folders
from steerlab.storage import plan
from steerlab.storage.store import Store
from steerlab.storage.tensors import INDEX

MAX_POINTS = 400
"""Largest number of points of a training curve; longer curves are thinned."""
MAX_CURVES = 8
"""Number of a sweep's best trials whose runs are read."""
Document: TypeAlias = Mapping[str, Any]
"""A JSON object from the folder of a run or sweep, or a row of its trials. `run.folder` validates the keys used here."""


_ARTIFACT_FILES = (INDEX, "edit.json")
"""Small files of artifacts that may hold numbers by module."""


_Point = Annotated[list[float], Field(min_length=2, max_length=2)]
"""(x, y), which JSON writes as a list."""


class _ByModule(saved.Shape):
    by_module: dict[str, dict[str, float]] = {}
    curves: dict[str, dict[str, list[_Point]]] = {}


class _Kept(_ByModule):
    parts: dict[str, _ByModule] = {}


@dataclass(frozen=True)
class Kept:
    """Numbers about the modules of a model that the stages of a run have kept."""

    by_module: dict[str, dict[str, float]] = field(default_factory=dict)
    """`STAGE: NAME` -> module -> number."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    """`STAGE: NAME` -> module -> points (x, y)."""


@dataclass(frozen=True)
class Entry:
    """What the page shows of one run."""

    name: str
    folder: str
    """Path of the run folder below ROOT."""
    job: Document
    summary: Document
    stages: Sequence[Document]
    environment: Document
    samples: Mapping[str, Sequence[Document]]
    fit_s: float | None
    """Seconds that fitting or training took when it ran, even if this run took its result from the store; None if unknown."""
    curves: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    """Training metric -> (step, value)."""
    images: dict[str, list[tuple[str, str]]] = field(default_factory=dict)
    """`strength_guidance` -> (image id, path below ROOT)."""
    sheets: dict[str, str] = field(default_factory=dict)
    """Contact sheets: guidance -> path below ROOT."""
    store: Store | None = None
    """Where the images are read from; None if there are none."""
    kept: Kept = field(default_factory=Kept)
    """Spectra, shares and other numbers by module."""
    measures: dict[str, Measure] = field(default_factory=dict)
    """Metric -> its measure; metrics of runs of earlier versions may be missing."""

    @property
    def strength(self) -> float:
        """The strength whose metrics the run reports; NaN if it evaluated none."""
        # A summary lists the reported strength first.
        return next(iter(self.summary["strengths"]), math.nan)

    @property
    def choice(self) -> Document | None:
        """How the strength was chosen on development rows; None if the job fixed it."""
        return self.summary.get("choice")

    @property
    def root(self) -> str:
        """The store's root, or the word ROOT if there is no store."""
        return self.store.root if self.store else "ROOT"


def measure_in(runs: Iterable[Entry], metric: str) -> Measure:
    """Return the measure of a metric from the first run that has it; without one, a measure without direction and unit."""
    declared = (run.measures[metric] for run in runs if metric in run.measures)
    return next(declared, None) or LOSSES.get(metric) or Measure(metric, None)


@dataclass(frozen=True)
class Sweep:
    """What the page shows of one sweep."""

    name: str
    folder: str
    job: Document
    space: Document
    trials: Sequence[Document]
    """Rows of trials.parquet, one for each trial and seed."""
    summary: Document
    """Empty while the sweep is running."""
    root: str = "ROOT"
    runs: tuple[Entry, ...] = ()
    """The runs of its best trials."""

    @property
    def metric(self) -> str | None:
        """The metric that the sweep optimises; None if nothing was measured yet."""
        return self.summary.get("metric") or self.space.get("metric") or next(iter(self.metrics), None)

    @property
    def maximises(self) -> bool:
        """Whether more of the metric is better."""
        return (self.summary.get("mode") or self.space.get("mode") or "max") == "max"

    @property
    def parameters(self) -> list[str]:
        """Paths of the parameters; those with the same value in all trials come last."""
        # Compared as texts: values of a parameter may be lists, which cannot be members of a set.
        names = _named(self.trials, "param.")
        return sorted(names, key=lambda name: len({str(trial.get(f"param.{name}")) for trial in self.trials}) < 2)

    @property
    def varied(self) -> list[str]:
        """Paths of the parameters that vary; of those that only ever change together, the first."""
        # A space may set the rows that are evaluated with those that are trained on: one of the two says all.
        patterns: dict[tuple[int, ...], str] = {}
        for name in self.parameters:
            texts = [str(trial.get(f"param.{name}")) for trial in self.trials]
            pattern = tuple(texts.index(text) for text in texts)
            if any(pattern):
                patterns.setdefault(pattern, name)
        return list(patterns.values())

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics, the optimised one first."""
        own = self.summary.get("metric") or self.space.get("metric")
        return sorted(_named(self.trials, "metric."), key=lambda name: name != own)

    @property
    def finished(self) -> list[Document]:
        """The rows with a value of the optimised metric, the best first."""
        key = f"metric.{self.metric}"
        scored = [trial for trial in self.trials if _is_number(trial.get(key))]
        return sorted(scored, key=lambda trial: trial[key], reverse=self.maximises)

    @property
    def paid(self) -> list[bool]:
        """For each row, whether the seconds of its run are counted there."""
        # Trials that differ in strength only share a run; its seconds are counted for the first of them.
        seen: set[str] = set()
        return [trial.get("run") is None or not (trial["run"] in seen or seen.add(trial["run"])) for trial in self.trials]

    @property
    def best(self) -> str | None:
        """The id of the best trial: the one in the sweep's summary; while the sweep runs, that of the best row so far."""
        # A summary without a best trial says that none keeps the bounds.
        if "best" in self.summary:
            return (self.summary["best"] or {}).get("trial_id")
        return self.finished[0]["trial_id"] if self.finished else None


def read(store: Store, folder: str) -> Entry:
    """Read the folder of a finished run.

    Args:
        store: the store.
        folder: path below ROOT, `runs/NAME/ID`.

    Raises:
        ValueError: the folder is not that of a finished run, or a file in it is damaged.
    """
    # The summary is written last, so a folder that has one is that of a finished run.
    try:
        summary = folders.summary(store, folder)
    except FileNotFoundError:
        raise ValueError(f"{folder} is no finished run folder (runs/NAME/ID) of {store.root}") from None
    job, stages = folders.job(store, folder), folders.stages(store, folder)
    return Entry(
        # Runs of one page are often one job with different methods, so the method's name is always part of the run's.
        name=job["name"] if job["method"]["name"] in job["name"] else f"{job['method']['name']} ({job['name']})",
        folder=folder,
        job=job,
        summary=summary,
        stages=stages,
        kept=kept(store, stages),
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
    """Read the folder of a sweep, finished or running, and the runs of its best trials.

    Args:
        store: the store.
        folder: path below ROOT, `sweeps/NAME/ID`.

    Raises:
        ValueError: the folder is not that of a sweep with at least one trial, or a file in it is damaged.
    """
    try:
        job = folders.job(store, folder)
        trials = folders.trials(store, folder)
    except FileNotFoundError:
        raise ValueError(f"{folder} is no sweep folder (sweeps/NAME/ID) of {store.root}, or none of its trials began") from None
    sweep = Sweep(
        name=job["name"],
        folder=folder,
        job=job,
        space=_or_nothing(folders.space, store, folder),
        trials=trials,
        summary=_or_nothing(folders.sweep_summary, store, folder),
        root=store.root,
    )
    return replace(sweep, runs=tuple(_best_runs(store, sweep)))


def _best_runs(store: Store, sweep: Sweep) -> list[Entry]:
    """Read the runs of a sweep's best trials, one for each trial, named by the parameters that vary."""
    varied = sweep.varied
    first: dict[str, Document] = {}
    # The sort is stable: the trial that the sweep calls best first, the others by their metric.
    for trial in sorted(sweep.finished, key=lambda trial: trial["trial_id"] != sweep.best):
        # Trials that differ in strength only share a run, which is shown once; of several seeds the best is shown.
        if trial.get("run") and trial["run"] not in (other["run"] for other in first.values()):
            first.setdefault(trial["trial_id"], trial)
    runs = []
    for trial in list(first.values())[:MAX_CURVES]:
        if "summary.json" in store.list(trial["run"]):  # the run of a trial may still be going on
            values = ", ".join(f"{name.rpartition('.')[2]} {_short(trial.get(f'param.{name}'))}" for name in varied[:2])
            runs.append(
                replace(read(store, trial["run"]), name=f"{trial['trial_id']} ({values})" if values else trial["trial_id"])
            )
    return runs


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def kept(store: Store, stages: Sequence[Document]) -> Kept:
    """Return what the artifacts of some stages keep about modules; nothing for artifacts that are not in the store."""
    # Only these small files are read, not the artifact: a basis of a large model has gigabytes.
    found = Kept()
    for stage in stages:
        for file in _ARTIFACT_FILES:
            path = f"artifacts/{stage['name']}/{stage['key']}/{file}"
            try:
                tree = store.read_json(path)
            except FileNotFoundError:
                continue
            record = saved.checked(tree, _Kept, store.where(path))
            for part in (record, *record.parts.values()):
                for name, numbers in part.by_module.items():
                    found.by_module.setdefault(f"{stage['name']}: {name}", {}).update(numbers)
                for name, curves in part.curves.items():
                    points = {module: [(x, y) for x, y in curve] for module, curve in curves.items()}
                    found.curves.setdefault(f"{stage['name']}: {name}", {}).update(points)
    return found


class _Fitted(saved.Shape):
    seconds: float


def fit_seconds(store: Store, model: Document | None) -> float | None:
    """Return the seconds that fitting or training a run's model took; None if there is no model or it is not in the store."""
    if model is None or not store.has(model["stage"], model["key"]):
        return None
    directory = store.local(model["stage"], model["key"])
    # fit.json holds the seconds of the fit alone; the artifact's own time includes reading data and loading the model.
    if (directory / "fit.json").is_file():
        return saved.read(directory / "fit.json", _Fitted).seconds
    return plan.made(store, model["stage"], model["key"]).seconds


def curves(store: Store, folder: str) -> dict[str, list[tuple[float, float]]]:
    """Return training metric -> (step, value), of the job's last training if several build on each other."""
    try:
        lines = folders.lines(store, folder)
    except FileNotFoundError:
        return {}
    # Every line has the key of its training stage. Steps begin at 0 in each, so only one training can be drawn.
    last = lines[-1]["key"] if lines else None
    by_step: dict[str, dict[float, float]] = {}
    for line in lines:
        # Keyed by step: a training that was resumed from a checkpoint reports some steps twice, and the later line counts.
        for name, value in line.items():
            if line["key"] == last and "/" in name and _is_number(value):
                by_step.setdefault(name, {})[line["step"]] = value
    return {name: thinned(sorted(points.items())) for name, points in by_step.items()}


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most MAX_POINTS points, evenly spaced, with both ends."""
    if len(points) <= MAX_POINTS:
        return list(points)
    return [points[round(i * (len(points) - 1) / (MAX_POINTS - 1))] for i in range(MAX_POINTS)]


def images(store: Store, folder: str) -> dict[str, list[tuple[str, str]]]:
    """List a run's images, samples/images/{strength}_{guidance}/{id}.png, as `strength_guidance` -> (id, path below ROOT)."""
    below = f"{folder}/samples/images"
    by_setting = {}
    # Contact sheets (.png) and animations (.gif) are in the same folder as the settings' folders.
    for setting in sorted(name for name in store.list(below) if not name.endswith((".png", ".gif"))):
        names = [name for name in store.list(f"{below}/{setting}") if name.endswith(".png")]
        by_setting[setting] = [(name.removesuffix(".png"), f"{below}/{setting}/{name}") for name in sorted(names, key=_natural)]
    return {setting: pictures for setting, pictures in by_setting.items() if pictures}


def sheets(store: Store, folder: str) -> dict[str, str]:
    """List a run's contact sheets, samples/images/sheet_{guidance}.png, as guidance -> path below ROOT."""
    below = f"{folder}/samples/images"
    names = sorted(name for name in store.list(below) if name.startswith("sheet_") and name.endswith(".png"))
    return {f"{float(name[6:-4]):g}": f"{below}/{name}" for name in names}


def _natural(name: str) -> tuple[int, str]:
    """Return a sort key by the number in a name, so that 10 comes after 9."""
    digits = "".join(letter for letter in name if letter.isdigit())
    return (int(digits) if digits else -1, name)


def _named(trials: Sequence[Document], prefix: str) -> list[str]:
    # A dict keeps the order of the columns, which a set would not.
    return list(dict.fromkeys(name.removeprefix(prefix) for trial in trials for name in trial if name.startswith(prefix)))


def _is_number(value: object) -> bool:
    # bool is a subclass of int, and NaN, which does not equal itself, would break the order of a sort.
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value


def _or_nothing(read: Callable[[Store, str], Document], store: Store, folder: str) -> Document:
    """Read a file of a sweep; return {} if it is not written yet."""
    try:
        return read(store, folder)
    except FileNotFoundError:
        return {}
