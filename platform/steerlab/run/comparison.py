"""Two runs, item by item: each at the strength that it reported, or at one that is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from steerlab.evaluation.statistics import stored
from steerlab.evaluation.statistics.measures import Transform
from steerlab.evaluation.statistics.metrics import Observation
from steerlab.evaluation.statistics.paired import Difference, paired_difference
from steerlab.guards import saved
from steerlab.guards.json_values import JsonObject
from steerlab.job import UNPATCHED
from steerlab.run import folder as folders
from steerlab.run.record import SCHEMA, labelled
from steerlab.storage import plan
from steerlab.storage.store import Store


class Side(NamedTuple):
    """A run to compare."""

    store: Store
    folder: str
    """Path below the store's ROOT."""
    strength: float | None = None
    """None takes what each task of the run reported."""


class Named(NamedTuple):
    """A run as people know it."""

    name: str
    run_id: str
    method: str
    is_steered: bool
    """False when the run has no patch, so that there is no strength to speak of."""

    def __str__(self) -> str:
        return f"{self.name}/{self.run_id} (method {self.method})"


class Compared(NamedTuple):
    """One metric of two runs."""

    difference: Difference
    """Second minus first."""
    strengths: tuple[float, float]
    """Of the first run and of the second."""


class Comparison(NamedTuple):
    """Two runs and the metrics that both measured on the same items."""

    first: Named
    second: Named
    metrics: dict[str, Compared]


def compare(first: Side, second: Side) -> Comparison:
    """Return second minus first for every metric that both runs measured on the same items, with a 95 % interval.

    Raises:
        ValueError: a folder is no finished run, a strength was not measured, or a task of the two runs has other data or
            settings, so its items are not pairs.
    """
    a, b = (_Run.read(side) for side in (first, second))
    ours, theirs = a.measured(first.strength), b.measured(second.strength)
    found = {}
    for name in (name for name in ours if name in theirs):
        own, other = ours[name], theirs[name]
        if own.task != other.task:
            raise ValueError(f"{name} was measured on other data or with other settings in the two runs, so items do not pair")
        if _pairs(own.observations, other.observations):
            difference = paired_difference(other.observations, own.observations, transform=own.transform)
            found[name] = Compared(difference, (own.strength, other.strength))
    if not found:
        raise ValueError(f"{a.name} and {b.name} share no metric with judged items: {_some(ours)} and {_some(theirs)}")
    return Comparison(a.name, b.name, found)


def _pairs(a: Sequence[Observation], b: Sequence[Observation]) -> bool:
    """Say whether there is a difference to speak of: items that count on both sides, or none that both know at all.

    Nothing counts on a side where nothing was scored (SEP where no probe was executed) or fits; ids that differ throughout are
    other data, which `paired_difference` refuses.
    """
    judged_a, judged_b = ({o.id: o.weight for o in side if o.value is not None} for side in (a, b))
    shared = judged_a.keys() & judged_b.keys()
    counts = all(any(weights[i] for i in shared) for weights in (judged_a, judged_b))
    return counts or not {o.id for o in a} & {o.id for o in b}


def _some(names: Iterable[str]) -> str:
    return ", ".join(list(names)[:5]) or "none"


class _Measured(NamedTuple):
    """One metric of a run at one strength."""

    observations: list[Observation]
    transform: Transform
    task: object
    """What was asked and of which data: equal for runs whose items are the same."""
    strength: float


class _Params(saved.Shape):
    """What an evaluation's manifest says of its task and data."""

    task: JsonObject
    task_version: int
    fingerprints: JsonObject


class _Run(NamedTuple):
    """What is read of a run's folder."""

    store: Store
    folder: str
    name: Named
    summary: folders.Summary

    @classmethod
    def read(cls, side: Side) -> _Run:
        """Read a run. Raises ValueError when the folder is none, or not that of a finished run."""
        store, folder = side.store, side.folder
        files = store.list(folder)
        where = folder if Path(folder).is_absolute() else f"{store.root}/{folder}"
        if folder.startswith("sweeps/") or "space.json" in files:
            raise ValueError(
                f"{where} is a sweep, and runs are compared: give the folder of a trial's run (column `run` of trials.parquet)"
            )
        if "job.yaml" not in files:
            raise ValueError(f"{where} is no run folder (ROOT/runs/NAME/ID)")
        if "summary.json" not in files:
            raise ValueError(f"{where} is a run that did not finish{_reason(store, folder, files)}")
        summary = folders.read_summary(store, folder)
        if summary.version != SCHEMA:
            raise ValueError(
                f"{where} was written by another version of steerlab (summary {summary.version}, not {SCHEMA}): run its "
                "job again, what has not changed is taken from the store"
            )
        job = folders.job(store, folder)
        name = Named(job["name"], folder.rpartition("/")[2], job["method"]["name"], bool(summary.reported))
        return cls(store, folder, name, summary)

    def measured(self, strength: float | None) -> dict[str, _Measured]:
        """Return the metrics at a strength, None: those reported. Raises ValueError when no task was measured at it."""
        found: dict[str, _Measured] = {}
        measured: dict[float, None] = {}
        for label, key in self.summary.evaluations.items():
            given = self._strengths(key)
            measured |= dict.fromkeys(given)
            plain = self.summary.unsteered.get(label)
            if strength in (None, *given):
                found |= self._metrics(label, key, given[0] if strength is None else strength, strength)
            elif strength == UNPATCHED and plain is not None:
                found |= self._metrics(label, plain, self._strengths(plain)[0], strength)
        if not found and strength is not None:
            known = ", ".join(f"{value:g}" for value in measured) or "none"
            raise ValueError(f"{self.name} was not measured at strength {strength:g}; there are {known}")
        return found

    def _strengths(self, key: str) -> list[float]:
        """Return the strengths of an evaluation, that of its headline first."""
        return list(stored.strengths(self.store.local("evaluate", key)))

    def _metrics(self, label: str, key: str, measured: float, strength: float | None) -> dict[str, _Measured]:
        """Read the observations that an evaluation stored under one strength, which people may call by another."""
        made = plan.made(self.store, "evaluate", key).params
        params = saved.checked(made, _Params, f"the manifest of evaluate/{key} in {self.store.root}")
        task = [{**params.task, "strengths": None}, params.task_version, params.fingerprints]
        directory = self.store.local("evaluate", key)
        measures = stored.measures(directory)
        found: dict[str, _Measured] = {}
        for item in stored.observations(directory, measured):
            transform = measures[item.metric].transform if item.metric in measures else "identity"
            empty = _Measured([], transform, task, measured if strength is None else strength)
            found.setdefault(labelled(item.metric, label), empty).observations.append(item)
        return found


def _reason(store: Store, folder: str, files: Sequence[str]) -> str:
    """Say why a run did not finish, where it left a reason."""
    if "error.txt" not in files:
        return ": it goes on, or was killed"
    lines = [line for line in store.read_text(f"{folder}/error.txt").splitlines() if line.strip()]
    return f": {lines[-1].strip()[:300]}" if lines else ""
