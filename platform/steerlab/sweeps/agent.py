"""Sweeps whose values Weights & Biases chooses (`--backend wandb`): what its server asks for becomes units like any others.

So stages are shared, a restart goes on with the units that the history has, and a run that W&B stops is a unit that stops.
"""

from __future__ import annotations

import warnings

from steerlab.guards import saved
from steerlab.guards.json_values import Json, JsonObject
from steerlab.job import JobError
from steerlab.storage.store import Store
from steerlab.sweeps.history import History
from steerlab.sweeps.search import with_strengths
from steerlab.sweeps.space import STRENGTH, Point, Space, strength_of
from steerlab.sweeps.trials import SweepPlan
from steerlab.sweeps.units import Trial, Unit, trial_id
from steerlab.tracking import NO_KEY, has_key
from steerlab.tracking.wandb_client import agents
from steerlab.tracking.wandb_client.parameters import metric_name, parameter_name

RUNS = "wandb_runs.json"
WHY = "W&B stopped it"


def check(path: str, found: SweepPlan) -> None:
    """Refuse a job whose runs would not be runs of the sweep: W&B chooses by what it is sent. Nothing is asked of a server.

    Raises:
        ValueError: the job is not tracked online, or in another project, or there is no key.
    """
    track = found.job.track
    if track.wandb is None or track.wandb.mode != "online":
        raise JobError(f"{found.path}: --backend wandb needs track.wandb with mode: online; W&B chooses by what it is sent")
    *before, _ = path.strip("/").split("/")
    asked = dict(zip(("project", "entity"), reversed(before), strict=False))
    for name, own in (("project", track.wandb.project), ("entity", track.wandb.entity)):
        if name in asked and own is not None and own != asked[name]:
            raise JobError(f"{found.path}: track.wandb.{name} is {own}, and the sweep {path} lies in another one")
    if not has_key():
        raise ValueError(NO_KEY)


class Agent:
    """Makes units of what a W&B sweep asks for; stands where Optuna would."""

    def __init__(self, path: str, found: SweepPlan, seeds: tuple[int, ...], num_at_once: int) -> None:
        """Register with the sweep at `path` for so many trials at a time.

        Raises:
            ValueError: W&B refuses, would never hear of the trials, or varies what the space does not.
        """
        check(path, found)
        self._agents = agents.Agents(path, num_at_once)
        _check_config(self._agents.config, found)
        self._plan, self._seeds = found, seeds
        self.sweep_id = path.rpartition("/")[2]
        self.runs: dict[str, str] = {}
        """The ids of the units' W&B runs."""

    def start(self, store: Store, folder: str, history: History) -> None:
        """Begin to ask, with the runs of the units that are left."""
        self._store, self._file = store, f"{folder}/{RUNS}"
        try:
            self.runs = saved.checked(store.read_json(self._file), dict[str, str], f"{store.root}/{self._file}")
        except FileNotFoundError:
            self.runs = {}
        self._agents.start([self.runs[unit.name] for unit in history.pending if unit.name in self.runs])

    def close(self) -> None:
        """Ask no more."""
        self._agents.close()

    @property
    def waiting(self) -> bool:
        """Whether more may come."""
        return not self._agents.ended

    @property
    def stopped(self) -> set[str]:
        """Names of the units that W&B wants stopped."""
        wanted = self._agents.stopped.copy()
        return {name for name, run in self.runs.items() if run in wanted} if wanted else set()

    def settled(self, unit: Unit) -> None:
        """Say that a unit is over."""
        if unit.name in self.runs:
            self._agents.release(self.runs[unit.name])

    def next(self, history: History) -> Unit | None:
        """Return the next unit; None where W&B has none now.

        Values that make no job fail as a trial, with the reason; values that were there are not run again.
        """
        while (suggestion := self._agents.take()) is not None:
            if suggestion.run_id in self.runs.values():  # `resume`: the history has it, settled or to be gone on with
                continue
            unit = unit_of(self._plan, suggestion.parameters, len(history.courses) + 1, self._seeds)
            if _is_known(unit, history):
                warnings.warn(f"W&B asks for {suggestion.parameters} again, which is not run twice", stacklevel=2)
                self._agents.release(suggestion.run_id)
                continue
            self.runs[unit.name] = suggestion.run_id
            self._store.write_json(self._file, self.runs)
            reason = self._refusal(unit)
            if reason is None:
                return unit
            history.suggest(unit)
            history.add("fail", unit=unit.number, reason=reason)
            self.settled(unit)
        return None

    def _refusal(self, unit: Unit) -> str | None:
        """Return why a unit's values make no job, if so: W&B's ranges may have been changed in its page."""
        try:
            self._plan.job_of(unit.shared, unit.seeds[0], unit.strengths)
        except JobError as error:
            return " ".join(str(error).split())[:1000]
        return None


def _is_known(unit: Unit, history: History) -> bool:
    known = {trial.trial_id for course in history.courses.values() for trial in course.unit.trials}
    return any(trial.trial_id in known for trial in unit.trials)


class _Metric(saved.Shape):
    name: str | None = None


class _Config(saved.Shape):
    """What W&B's server says of a sweep."""

    parameters: dict[str, JsonObject] = {}
    metric: _Metric = _Metric()


def _check_config(tree: JsonObject, found: SweepPlan) -> None:
    """Compare a sweep with the space before anything starts."""
    config = saved.checked(tree, _Config, "W&B's sweep")
    point_of(found.space, {name: _value_of(entry) for name, entry in config.parameters.items()})
    wanted, metric = config.metric.name, metric_name(found.metric)
    if wanted not in (None, metric):
        warnings.warn(f"W&B's sweep goes by {wanted}, {found.space.path} by {metric}", stacklevel=2)


def _value_of(entry: JsonObject) -> Json:
    """Return one of the values that W&B's form of an entry can have; any number for a range."""
    values = entry.get("values")
    return entry["value"] if "value" in entry else values[0] if isinstance(values, list) and values else 0


def unit_of(found: SweepPlan, parameters: JsonObject, number: int, seeds: tuple[int, ...]) -> Unit:
    """Return the unit of what W&B asks for: one trial where W&B chooses the strength too, since its run has one result.

    Raises:
        JobError: W&B's sweep has a parameter that the space lacks.
    """
    point = point_of(found.space, parameters)
    strength = strength_of(point)
    points = with_strengths(point, found.strengths) if strength is None else [{**point, STRENGTH: float(strength)}]
    return Unit(number, tuple(Trial(trial_id(one), one) for one in points), seeds)


def point_of(space: Space, parameters: JsonObject) -> Point:
    """Return the fields that W&B's values set.

    Raises:
        JobError: W&B's sweep has a parameter that the space lacks: they were not made of the same file.
    """
    point: Point = {}
    entries = {parameter_name(entry): entry for entry in space.entries}
    for name, value in parameters.items():
        if name not in entries:
            raise JobError(f"W&B's sweep varies {name}, which {space.path} does not: {', '.join(sorted(entries))}")
        point |= space.spread(entries[name], value)
    space.check(point, "W&B's sweep")
    return point
