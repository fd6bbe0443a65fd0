"""Sweeps whose points Weights & Biases chooses (`--backend wandb`): each suggestion of its server becomes a unit.

Such units run like those of any other sweep: trials share stages, a restart continues with the units in the history, and
when W&B stops a run, the unit of that run stops.
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
from steerlab.tracking.wandb_client import agents
from steerlab.tracking.wandb_client.parameters import metric_name, parameter_name
from steerlab.tracking.wandb_mode import NO_KEY, has_key

RUNS = "wandb_runs.json"
"""File in the sweep's folder: the id of the W&B run of each unit, by the unit's name."""
WHY = "W&B stopped it"
"""Reason that the history gives for a unit that W&B stopped."""


def check(path: str, sweep_plan: SweepPlan) -> None:
    """Refuse a job whose runs would not be part of the W&B sweep. This check contacts no server.

    Args:
        path: the W&B sweep: ENTITY/PROJECT/ID, PROJECT/ID or ID.
        sweep_plan: the job and the search space.

    Raises:
        ValueError: the job is not tracked online, is tracked in another project, or no API key is set.
    """
    # W&B chooses the next point by the metrics that it received, so it must receive those of all runs.
    track = sweep_plan.job.track
    if track.wandb is None or track.wandb.mode != "online":
        raise JobError(
            f"{sweep_plan.path}: --backend wandb needs track.wandb with mode: online; W&B chooses by the metrics it receives"
        )
    *before, _ = path.strip("/").split("/")
    location = dict(zip(("project", "entity"), reversed(before), strict=False))
    for name, own in (("project", track.wandb.project), ("entity", track.wandb.entity)):
        if name in location and own is not None and own != location[name]:
            raise JobError(f"{sweep_plan.path}: track.wandb.{name} is {own}, but the sweep {path} is in another one")
    if not has_key():
        raise ValueError(NO_KEY)


class Agent:
    """Turn the suggestions of a W&B sweep into units. Implements `search.Suggests`, as `search.Suggester` does with Optuna."""

    def __init__(self, path: str, sweep_plan: SweepPlan, seeds: tuple[int, ...], num_at_once: int) -> None:
        """Register `num_at_once` agents with the W&B sweep at `path`.

        Raises:
            ValueError: W&B refuses, the job's runs would not reach it (see `check`), or its sweep varies a parameter that
                the search space lacks.
        """
        # Checked before the registration, so that no agent of a refused request remains at W&B.
        check(path, sweep_plan)
        self._agents = agents.Agents(path, num_at_once)
        _check_config(self._agents.config, sweep_plan)
        self._plan, self._seeds = sweep_plan, seeds
        self.sweep_id = path.rpartition("/")[2]
        self.runs: dict[str, str] = {}
        """Id of each unit's W&B run, by the unit's name."""

    def start(self, store: Store, folder: str, history: History) -> None:
        """Start asking W&B for runs; the runs of pending units are reported as running."""
        self._store, self._file = store, f"{folder}/{RUNS}"
        try:
            self.runs = saved.checked(store.read_json(self._file), dict[str, str], store.where(self._file))
        except FileNotFoundError:
            self.runs = {}
        self._agents.start([self.runs[unit.name] for unit in history.pending if unit.name in self.runs])

    def close(self) -> None:
        """Stop asking W&B for runs."""
        self._agents.close()

    @property
    def waiting(self) -> bool:
        """Whether W&B may still suggest points."""
        return not self._agents.ended

    @property
    def stopped(self) -> set[str]:
        """Names of the units that W&B wants to stop."""
        # The set is copied, since the thread that sends heartbeats may change it at any time.
        wanted = self._agents.stopped.copy()
        return {name for name, run in self.runs.items() if run in wanted} if wanted else set()

    def settled(self, unit: Unit) -> None:
        """Tell W&B that a unit has ended, so that the agent asks for the next run."""
        if unit.name in self.runs:
            self._agents.release(self.runs[unit.name])

    def next(self, history: History) -> Unit | None:
        """Return the next unit, or None when W&B suggests none now.

        A suggestion that makes an invalid job is recorded as a failed trial with the reason. A suggestion whose values already
        ran is skipped with a warning.
        """
        while (suggestion := self._agents.take()) is not None:
            # W&B's `resume` command repeats a run that it handed out before a restart; the history already has its unit.
            if suggestion.run_id in self.runs.values():
                continue
            unit = unit_of(self._plan, suggestion.parameters, len(history.courses) + 1, self._seeds)
            if _is_known(unit, history):
                warnings.warn(f"W&B suggests {suggestion.parameters} again; this point is not run twice", stacklevel=2)
                # Without this, the agent would report the run as running forever and never receive another one.
                self._agents.release(suggestion.run_id)
                continue
            self.runs[unit.name] = suggestion.run_id
            # Written before the unit is in the history, so that after a crash no unit lacks the id of its run.
            self._store.write_json(self._file, self.runs)
            reason = self._refusal(unit)
            if reason is None:
                return unit
            # The unit is recorded as failed instead of raising an error, since one bad suggestion should not end the sweep.
            history.suggest(unit)
            history.add("fail", unit=unit.number, reason=reason)
            self.settled(unit)
        return None

    def _refusal(self, unit: Unit) -> str | None:
        """Return why a unit's values do not make a valid job; None if they do."""
        # Somebody may have widened the ranges on W&B's page after the space was checked.
        try:
            self._plan.job_of(unit.shared, unit.seeds[0], unit.strengths)
        except JobError as error:
            return " ".join(str(error).split())[:1000]
        return None


def _is_known(unit: Unit, history: History) -> bool:
    earlier_ids = {trial.trial_id for course in history.courses.values() for trial in course.unit.trials}
    return any(trial.trial_id in earlier_ids for trial in unit.trials)


class _Metric(saved.Shape):
    name: str | None = None


class _Config(saved.Shape):
    """Configuration of a sweep as W&B's server returns it, reduced to the fields that are used here."""

    parameters: dict[str, JsonObject] = {}
    metric: _Metric = _Metric()


def _check_config(tree: JsonObject, sweep_plan: SweepPlan) -> None:
    """Refuse a W&B sweep with parameters that the space lacks; warn when it optimises another metric."""
    config = saved.checked(tree, _Config, "W&B's sweep")
    point_of(sweep_plan.space, {name: _value_of(entry) for name, entry in config.parameters.items()})
    # This is only a warning: W&B then optimises one metric, and the table ranks trials by the other.
    wanted, metric = config.metric.name, metric_name(sweep_plan.metric)
    if wanted not in (None, metric):
        warnings.warn(f"W&B's sweep optimises {wanted}, but {sweep_plan.space.path} optimises {metric}", stacklevel=2)


def _value_of(entry: JsonObject) -> Json:
    """Return a value of an entry of W&B's configuration: the constant, the first of a list, or 0 for a range."""
    values = entry.get("values")
    return entry["value"] if "value" in entry else values[0] if isinstance(values, list) and values else 0


def unit_of(sweep_plan: SweepPlan, parameters: JsonObject, number: int, seeds: tuple[int, ...]) -> Unit:
    """Return the unit of a suggestion of W&B.

    Raises:
        JobError: W&B's sweep has a parameter that the space lacks.
    """
    point = point_of(sweep_plan.space, parameters)
    strength = strength_of(point)
    # When W&B chooses the strength too, the unit has a single trial, because a W&B run reports a single result.
    points = with_strengths(point, sweep_plan.strengths) if strength is None else [{**point, STRENGTH: float(strength)}]
    return Unit(number, tuple(Trial(trial_id(values), values) for values in points), seeds)


def point_of(space: Space, parameters: JsonObject) -> Point:
    """Return the point of the space for W&B's parameter values.

    Raises:
        JobError: W&B's sweep has a parameter that the space lacks, so it was not created from the same file.
    """
    point: Point = {}
    entries = {parameter_name(entry): entry for entry in space.entries}
    for name, value in parameters.items():
        if name not in entries:
            raise JobError(f"W&B's sweep varies {name}, which {space.path} does not: {', '.join(sorted(entries))}")
        point |= space.spread(entries[name], value)
    # The values come from a server; `Space.check` says why strings among them are compared with the file.
    space.check(point, "W&B's sweep")
    return point
