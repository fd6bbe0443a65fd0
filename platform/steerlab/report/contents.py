"""Read the folder of a run into the values that the page shows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
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
    """Numbers about the modules of a model that the stages of a run have stored."""

    by_module: dict[str, dict[str, float]] = field(default_factory=dict)
    """`STAGE: NAME` -> module -> number."""
    curves: dict[str, dict[str, list[tuple[float, float]]]] = field(default_factory=dict)
    """`STAGE: NAME` -> module -> points (x, y)."""


@dataclass(frozen=True)
class Entry:
    """The content of one run on the page."""

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
    """Store that holds the images; None if there are none."""
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


def read(store: Store, folder: str) -> Entry:
    """Read the folder of a finished run into an entry.

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
        raise ValueError(f"{folder} is not a finished run folder (runs/NAME/ID) of {store.root}") from None
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


def kept(store: Store, stages: Sequence[Document]) -> Kept:
    """Return the numbers by module in the artifacts of some stages; artifacts that are missing in the store are skipped."""
    # Only these small files are read, since the whole artifact may be large: a basis of a large model has gigabytes.
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
    # fit.json holds the seconds of the fit alone; the time in the manifest includes reading data and loading the model.
    if (directory / "fit.json").is_file():
        return saved.read(directory / "fit.json", _Fitted).seconds
    return plan.made(store, model["stage"], model["key"]).seconds


def curves(store: Store, folder: str) -> dict[str, list[tuple[float, float]]]:
    """Return training metric -> (step, value), of the job's last training if several build on each other."""
    try:
        lines = folders.lines(store, folder)
    except FileNotFoundError:
        return {}
    # Every line has the key of its training stage. The steps of each training begin at 0, so only one can be drawn.
    last = lines[-1]["key"] if lines else None
    by_step: dict[str, dict[float, float]] = {}
    for line in lines:
        # A training that was resumed from a checkpoint reports some steps twice; by step, the later line replaces the earlier.
        for name, value in line.items():
            if line["key"] == last and "/" in name and is_number(value):
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


def is_number(value: object) -> bool:
    """Return whether a value of a saved file is a number that can be shown and sorted."""
    # bool is a subclass of int, and NaN, which does not equal itself, would break the order of a sort.
    return isinstance(value, int | float) and not isinstance(value, bool) and value == value
