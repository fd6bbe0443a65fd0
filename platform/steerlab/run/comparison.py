"""Compare two runs item by item, each at the strength that it reported or at a given one."""

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
    """One of the two runs of a comparison."""

    store: Store
    folder: str
    """The run's folder, relative to the store's ROOT."""
    strength: float | None = None
    """Strength of the patch; None for the one that each task of the run reported."""


class Named(NamedTuple):
    """Name, id and method of a run, for messages and tables."""

    name: str
    run_id: str
    method: str
    is_steered: bool
    """False if the run has no patch and therefore no strength."""

    def __str__(self) -> str:
        return f"{self.name}/{self.run_id} (method {self.method})"


class Compared(NamedTuple):
    """Difference between two runs in one metric."""

    difference: Difference
    """Second run minus first run."""
    strengths: tuple[float, float]
    """Strength of the first run's patch, and of the second's."""


class Comparison(NamedTuple):
    """Two runs, and their differences in the metrics that both measured on the same items."""

    first: Named
    second: Named
    metrics: dict[str, Compared]


def compare(first: Side, second: Side) -> Comparison:
    """Return the paired difference (second minus first) and its 95 % interval for every metric that both runs measured.

    Raises:
        ValueError: a folder is not that of a finished run, a strength was not measured, the runs share no metric, or a task
            used other data or settings in the two runs, so its items cannot be paired.
    """
    a, b = (_Run.read(side) for side in (first, second))
    ours, theirs = a.measured(first.strength), b.measured(second.strength)
    metrics = {}
    for name in (name for name in ours if name in theirs):
        own, other = ours[name], theirs[name]
        # Equal ids in different data name different items, so a paired test would be wrong.
        if own.task != other.task:
            raise ValueError(f"{name} was measured on other data or with other settings in the two runs, so items do not pair")
        if _pairs(own.observations, other.observations):
            difference = paired_difference(other.observations, own.observations, transform=own.transform)
            metrics[name] = Compared(difference, (own.strength, other.strength))
    if not metrics:
        raise ValueError(f"{a.name} and {b.name} share no metric with judged items: {_some(ours)} and {_some(theirs)}")
    return Comparison(a.name, b.name, metrics)


def _pairs(a: Sequence[Observation], b: Sequence[Observation]) -> bool:
    """Return whether to compute the paired difference of two metrics, which may still refuse them with an error.

    True when items with a weight were scored in both runs. False if one run scored nothing (such as SEP when no probe
    was executed), so the metric is skipped. True also when the runs share no item id at all: they used other
    data, for which `paired_difference` raises an error.
    """
    # An item with weight 0 was scored, but does not count in the mean.
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
    """Task settings, task version and fingerprints of the data. Items of two runs are pairs only if these are equal."""
    strength: float


class _Params(saved.Shape):
    """The parameters of an evaluation in its manifest that a comparison needs."""

    task: JsonObject
    task_version: int
    fingerprints: JsonObject


class _Run(NamedTuple):
    """A run that was read from its folder."""

    store: Store
    folder: str
    name: Named
    summary: folders.Summary

    @classmethod
    def read(cls, side: Side) -> _Run:
        """Read a run. Raises ValueError if the folder is not that of a finished run."""
        store, folder = side.store, side.folder
        files = store.list(folder)
        where = folder if Path(folder).is_absolute() else store.where(folder)
        if folder.startswith("sweeps/") or "space.json" in files:
            raise ValueError(
                f"{where} is a sweep, but only runs can be compared: give a trial's run folder (column `run` of trials.parquet)"
            )
        if "job.yaml" not in files:
            raise ValueError(f"{where} is not a run folder (ROOT/runs/NAME/ID)")
        if "summary.json" not in files:
            raise ValueError(f"{where} is a run that did not finish{_reason(store, folder, files)}")
        summary = folders.read_summary(store, folder)
        # Another version is refused, not filled with defaults: a field that moved would look like a missing metric.
        if summary.version != SCHEMA:
            raise ValueError(
                f"{where} was written by another version of steerlab (summary {summary.version}, not {SCHEMA}): run its "
                "job again; unchanged stages are taken from the store"
            )
        job = folders.job(store, folder)
        name = Named(job["name"], folder.rpartition("/")[2], job["method"]["name"], bool(summary.reported))
        return cls(store, folder, name, summary)

    def measured(self, strength: float | None) -> dict[str, _Measured]:
        """Return the metrics by name at a strength, or at the reported strength of each task for None.

        Raises:
            ValueError: no task was measured at this strength.
        """
        metrics: dict[str, _Measured] = {}
        # A dict as an ordered set: the message below lists the strengths in their order.
        measured: dict[float, None] = {}
        for label, key in self.summary.evaluations.items():
            strengths = self._strengths(key)
            measured |= dict.fromkeys(strengths)
            plain = self.summary.unsteered.get(label)
            if strength in (None, *strengths):
                metrics |= self._metrics(label, key, strengths[0] if strength is None else strength, strength)
            elif strength == UNPATCHED and plain is not None:
                # If the strength was chosen, a separate evaluation measured the model without the patch.
                metrics |= self._metrics(label, plain, self._strengths(plain)[0], strength)
        if not metrics and strength is not None:
            available = ", ".join(f"{value:g}" for value in measured) or "none"
            raise ValueError(f"{self.name} was not measured at strength {strength:g}; there are {available}")
        return metrics

    def _strengths(self, key: str) -> list[float]:
        """Return the strengths of an evaluation; the first one is the one that it reports."""
        return list(stored.strengths(self.store.local("evaluate", key)))

    def _metrics(self, label: str, key: str, measured: float, strength: float | None) -> dict[str, _Measured]:
        """Read the metrics of an evaluation.

        Args:
            label: label of the task.
            key: key of the evaluation.
            measured: strength under which the observations are stored.
            strength: strength to show for them; None for `measured`. They differ for the model without a patch, which is
                stored at the strength of its own job and shown as 0.
        """
        stored_params = plan.made(self.store, "evaluate", key).params
        params = saved.checked(stored_params, _Params, f"the manifest of evaluate/{key} in {self.store.root}")
        # The strengths are ignored: a run at more strengths still measured the same items.
        task = [{**params.task, "strengths": None}, params.task_version, params.fingerprints]
        directory = self.store.local("evaluate", key)
        measures = stored.measures(directory)
        by_metric: dict[str, _Measured] = {}
        for item in stored.observations(directory, measured):
            transform = measures[item.metric].transform if item.metric in measures else "identity"
            empty = _Measured([], transform, task, measured if strength is None else strength)
            by_metric.setdefault(labelled(item.metric, label), empty).observations.append(item)
        return by_metric


def _reason(store: Store, folder: str, files: Sequence[str]) -> str:
    """Return why a run did not finish, as an addition to a message: the last line of its error.txt."""
    if "error.txt" not in files:
        return ": it is still running, or was killed"
    lines = [line for line in store.read_text(f"{folder}/error.txt").splitlines() if line.strip()]
    return f": {lines[-1].strip()[:300]}" if lines else ""
