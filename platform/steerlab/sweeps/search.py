"""Give units to Ray Tune: first the pending units of the history, then those that a searcher suggests.

A sweep can resume after any crash because the history is its whole state: Optuna's study is rebuilt from the settled units for
each suggestion, and the random state of suggestion n depends only on (seed, n). Ray Tune's own experiment state is never read.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, Literal, Protocol

import optuna
from optuna.distributions import BaseDistribution
from ray.tune.schedulers import TrialScheduler
from ray.tune.search import Searcher
from ray.tune.search.optuna import OptunaSearch
from ray.tune.search.sample import Categorical, Domain

from steerlab.guards import private_parts
from steerlab.guards.json_values import Json, JsonObject
from steerlab.sweeps.history import Course, History
from steerlab.sweeps.space import STRENGTH, Point, Space, draw
from steerlab.sweeps.space_entries import Entry, finite
from steerlab.sweeps.trial import UnitConfig
from steerlab.sweeps.units import Trial, Unit, trial_id


class Suggests(Protocol):
    """Source of units that are chosen during the sweep: Optuna (`Suggester`) or a sweep of W&B (`agent.Agent`)."""

    @property
    def waiting(self) -> bool:
        """Whether units may come later although `next` returns None now."""
        ...

    def next(self, history: History) -> Unit | None:
        """Return the next unit; None if none is available now."""
        ...


class Feed(Searcher):
    """Ray Tune's searcher in every sweep, also for grid and random search."""

    def __init__(self, history: History, request: Callable[[Unit], UnitConfig], suggester: Suggests | None) -> None:
        """Take units from the history, then from `suggester`.

        Args:
            history: has the pending units, and receives suggested ones.
            request: writes a unit's request to a file, and returns the configuration for its process.
            suggester: None for grid and random search, whose units are all in the history.
        """
        super().__init__()
        self._history, self._request, self._suggester = history, request, suggester
        self._pending = list(history.pending)
        self.units: dict[str, Unit] = {}
        """Unit by Ray Tune's id of the trial."""

    def suggest(self, trial_id: str) -> UnitConfig | str | None:  # type: ignore[override]
        """Return the configuration of the next trial; None if none is available now; FINISHED if no more will come."""
        if self._pending:
            # Pending units come first: after a restart, these are the units that were running.
            unit = self._pending.pop(0)
        elif self._suggester is not None and (suggested := self._suggester.next(self._history)) is not None:
            unit = suggested
            self._history.suggest(unit)
        else:
            return None if self._suggester is not None and self._suggester.waiting else Searcher.FINISHED
        self.units[trial_id] = unit
        return self._request(unit)

    def on_trial_complete(self, trial_id: str, result: dict[str, object] | None = None, error: bool = False) -> None:
        """Do nothing: the callback (`Clerk`) has written the result into the history, from which the suggester takes it."""

    def __getstate__(self) -> dict[str, object]:
        """Return nothing to pickle: Ray Tune's experiment state is never read."""
        return {}

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: a sweep resumes from its history."""

    def restore(self, checkpoint_path: str) -> None:
        """Raise NotImplementedError; Ray Tune never calls this, because no experiment is restored."""
        raise NotImplementedError


class Suggester:
    """Optuna's search over a space. Its suggestions are a function of the history."""

    def __init__(self, space: Space, mode: str, strengths: tuple[float, ...], seeds: tuple[int, ...], num_trials: int) -> None:
        """Set up the search.

        Args:
            space: the search space; it has a SEARCH_ALG.
            mode: "min" or "max" of the metric.
            strengths: strengths at which every unit evaluates its patch; they are not searched.
            seeds: training seeds of every unit.
            num_trials: largest number of units.
        """
        assert space.search_alg is not None
        # A strength with a list of values is not searched: one unit evaluates all of them at the cost of one training.
        self._space, self._strengths, self._seeds, self._num_trials = space, strengths, seeds, num_trials
        entries = {k: _as_domain(v) for k, v in space.entries.items() if not (k == STRENGTH and finite(v) is not None)}
        # Optuna takes no constants, so they are added to each of its points (`_point`).
        self._constants = {key: value for key, value in entries.items() if not isinstance(value, Domain)}
        searched = {key: value for key, value in entries.items() if isinstance(value, Domain)}
        self._seed, self._own_sampler = private_parts.optuna_settings(space.search_alg)
        self._distributions: dict[str, BaseDistribution] = OptunaSearch.convert_search_space(searched)
        self._direction: Literal["minimize", "maximize"] = "minimize" if mode == "min" else "maximize"

    @property
    def waiting(self) -> bool:
        """False: Optuna suggests its next point at once."""
        return False

    def next(self, history: History) -> Unit | None:
        """Return the next unit; None if the sweep has enough units, or if 20 attempts gave only points that already ran."""
        earlier_ids = {trial.trial_id for course in history.courses.values() for trial in course.unit.trials}
        number = len(history.courses) + 1
        # Units are counted in the history, so that a resumed sweep ends at the same number.
        if number > self._num_trials:
            return None
        study = self._study(history)
        for attempt in range(20):
            # The seed depends on the number of the unit: after a restart, suggestion n is the same. A new attempt needs
            # another seed, otherwise the sampler would repeat the point. The prime 100_003 separates pairs (seed, n).
            study.sampler = self._own_sampler or optuna.samplers.TPESampler(seed=(self._seed * 100_003 + number) * 31 + attempt)
            optuna_trial = study.ask(self._distributions)
            point = self._point(optuna_trial.params)
            trials = [Trial(trial_id(p), p) for p in with_strengths(point, self._strengths)]
            if not any(trial.trial_id in earlier_ids for trial in trials):
                return Unit(number, tuple(trials), self._seeds)
            # The Optuna trial is closed as failed, so that the sampler of the next attempt ignores it.
            study.tell(optuna_trial, state=optuna.trial.TrialState.FAIL)
        return None  # every point of a small space has run

    def _study(self, history: History) -> optuna.Study:
        """Return a study with the units settled so far, in the order in which they settled."""
        # The study is rebuilt for each suggestion, so that only the history has to survive a crash.
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(direction=self._direction)
        for number in history.settled:
            course = history.courses[number]
            params = self._params(course.unit.shared | _lone_strength(course.unit, self._distributions))
            # Failed, pruned and stopped units have no score; as failed trials they retain their number, and TPE ignores them.
            has_value = course.status == "finished" and course.score is not None
            study.add_trial(
                optuna.trial.create_trial(
                    params=params,
                    distributions=self._distributions,
                    value=course.score if has_value else None,
                    state=optuna.trial.TrialState.COMPLETE if has_value else optuna.trial.TrialState.FAIL,
                )
            )
        return study

    def _point(self, params: Mapping[str, Json]) -> Point:
        point: Point = {}
        for entry in self._space.entries:
            if entry in params:
                value = params[entry]
                point |= self._space.spread(entry, json.loads(value) if "," in entry and isinstance(value, str) else value)
            elif entry in self._constants:
                point |= self._space.spread(entry, self._constants[entry])
        return point

    def _params(self, point: Point) -> JsonObject:
        """Return Optuna's parameters of a point: the reverse of `_point`."""
        params: JsonObject = {}
        for entry in self._distributions:
            keys = [key.strip() for key in entry.split(",")]
            params[entry] = json.dumps([point[key] for key in keys]) if len(keys) > 1 else point[entry]
        return params


def _as_domain(entry: Entry) -> Entry:
    """Return a choice between lists as a choice between JSON strings: Optuna stores only scalars as categories."""
    if isinstance(entry, Categorical) and any(isinstance(value, list) for value in entry.categories):
        changed = copy.copy(entry)
        changed.categories = [json.dumps(list(value)) for value in entry.categories]
        return changed
    return entry


def _lone_strength(unit: Unit, distributions: Mapping[str, BaseDistribution]) -> Point:
    # If Optuna searches the strength, each unit has a single trial, so its strength is a parameter of the unit.
    return {STRENGTH: unit.strengths[0]} if STRENGTH in distributions else {}


def with_strengths(point: Point, strengths: tuple[float, ...]) -> list[Point]:
    """Return the point once for each strength, or the point alone if there are no strengths."""
    return [{**point, STRENGTH: strength} for strength in strengths] or [point]


def drawn_points(space: Space, strengths: tuple[float, ...], num_samples: int, seed: int) -> list[Point]:
    """Return the points of grid and random search, each combined with all strengths."""
    # The strengths are not drawn: every unit evaluates all of them, so that its trials share one training.
    entries = {k: v for k, v in space.entries.items() if not (k == STRENGTH and strengths)}
    points = list(draw(space, entries, num_samples, seed)) if entries else [{}]
    return [whole for point in points for whole in with_strengths(point, strengths)]


def replay(scheduler: TrialScheduler, history: History) -> None:
    """Replay the reports of settled units to a scheduler, so that it continues with its state from before a restart."""
    for course in history.courses.values():
        if course.settled and course.reports:
            _show(scheduler, course)


def _show(scheduler: TrialScheduler, course: Course) -> None:
    time_attr, metric = private_parts.time_attribute(scheduler), private_parts.metric_of(scheduler)
    controller: Any = None
    stand_in: Any = SimpleNamespace(trial_id=course.unit.name)  # these schedulers use only the trial's id
    scheduler.on_trial_add(controller, stand_in)
    for step, value in course.reports:
        scheduler.on_trial_result(controller, stand_in, {time_attr: step, metric: value})
