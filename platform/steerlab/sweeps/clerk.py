"""Ray Tune's callback: record the events of units in the sweep's history, and rewrite the table of trials as units end.

The word trial has two meanings here. A `Trial`, the argument `trial` of the methods, is Ray Tune's: it runs one unit
(units.py). A unit holds one or several trials of the sweep, which are points of its search space.
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from steerlab import run
from steerlab.storage.store import Store
from steerlab.sweeps import processes, results, search, stops
from steerlab.sweeps.agent import WHY, Agent
from steerlab.sweeps.history import History
from steerlab.sweeps.trial import UnitOutcome
from steerlab.sweeps.trials import Say
from steerlab.sweeps.units import Unit
from steerlab.tracking import prometheus

MAX_DEATHS = 3
"""How often Ray Tune restarts a unit whose process died; after one more death the unit has failed."""
_TABLE_EVERY_S = 5.0


class Clerk(tune.Callback):
    """The callback; Ray Tune calls its methods in the process that drives the sweep."""

    def __init__(
        self,
        history: History,
        feed: search.Feed,
        metric: str,
        mode: str,
        write: Callable[[], None],
        say: Say,
        store: Store,
        agent: Agent | None = None,
        satisfies_bounds: Callable[[results.Scored], bool] = lambda trial: True,
    ) -> None:
        """Set up the callback.

        Args:
            history: receives the events.
            feed: maps Ray Tune's trials to units.
            metric, mode: the metric that the sweep optimises, and "min" or "max".
            write: writes the table of trials.
            say: prints a line on the terminal.
            store: holds the notes that ask a unit to stop.
            agent: knows which units W&B wants to stop; None if W&B does not choose the points.
            satisfies_bounds: returns whether a trial satisfies the bounds of the search space (`WITHIN`).
        """
        self._satisfies_bounds = satisfies_bounds
        self._store, self._agent = store, agent
        self._stopping: dict[int, float] = {}
        """Number of each unit that was asked to stop -> time of the request (seconds of `time.monotonic`)."""
        self._history, self._feed, self._metric, self._mode = history, feed, metric, mode
        self._write, self._say = write, say
        self._written_s = 0.0

    def __getstate__(self) -> dict[str, object]:
        """Return an empty state."""
        # Ray Tune pickles its callbacks into its experiment state. A sweep resumes from its history instead and never loads
        # that state, so it needs no copy of the store and the history.
        return {}

    def on_step_begin(self, iteration: int, trials: list[Trial], **info: object) -> None:
        """Ask the units that W&B has chosen to stop, and kill the process of a unit that does not end in time."""
        wanted = self._agent.stopped if self._agent is not None else set()
        for tune_id, unit in self._feed.units.items() if wanted else ():
            if unit.name not in wanted or self._history.courses[unit.number].settled:
                continue
            if unit.number not in self._stopping:
                self._stopping[unit.number] = time.monotonic()
                stops.ask(self._store, self._history.folder, unit.name, WHY)
            elif time.monotonic() - self._stopping[unit.number] > stops.GRACE_S:
                # The process is busy and has not read the note, or its training runs in workers, which do not read it.
                processes.end(tune_id)

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """Record that a process starts a unit."""
        # Starts after a death are recorded, too, so that the history shows how often a unit was tried.
        self._history.add("start", unit=self._unit(trial).number)
        self._count_states()

    def on_trial_result(
        self, iteration: int, trials: list[Trial], trial: Trial, result: dict[str, Any], **info: object
    ) -> None:
        """Record a report of a unit: its final outcome, or a loss for the scheduler."""
        unit = self._unit(trial)
        # A report may still arrive after the unit was stopped; a settled unit never changes.
        if self._history.courses[unit.number].settled:
            return
        if "outcome" in result:
            self._settle(unit, json.loads(result["outcome"]))
        # A training that continues from a checkpoint after its process died reports some steps again.
        elif "step" in result and result["step"] > self._last_step(unit):
            # A unit with a scheduler reports exactly one of the two losses (`trial.TrialRequest.watched`).
            (value,) = (result[name] for name in ("eval/loss", "train/loss") if name in result)
            self._history.add("report", unit=unit.number, step=result["step"], value=value)

    def on_trial_complete(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """Record the end of a unit that reported no outcome: the scheduler or W&B stopped it."""
        unit = self._unit(trial)
        # A unit that reported its outcome was settled in `on_trial_result`.
        if self._history.courses[unit.number].settled:
            return
        # A killed process (`on_step_begin`) is recorded as stopped by W&B, not by the scheduler.
        if unit.number in self._stopping:
            self._history.add("stop", unit=unit.number, reason=f"{WHY}; its process was ended")
        else:
            reason = f"stopped by the scheduler after step {self._last_step(unit)}"
            self._history.add("prune", unit=unit.number, reason=reason)
        self._report_settled(unit)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **info: object) -> None:
        """Record that a unit failed because its process died more than MAX_DEATHS times."""
        unit = self._unit(trial)
        if not self._history.courses[unit.number].settled:
            error = trial.get_error()
            cause = "" if error is None else f", the last time with {run.root_cause(error)}"
            self._history.add("fail", unit=unit.number, reason=f"its process died {MAX_DEATHS + 1} times{cause}")
            self._report_settled(unit)

    def _last_step(self, unit: Unit) -> int:
        reports = self._history.courses[unit.number].reports
        return reports[-1][0] if reports else 0

    def _unit(self, trial: Trial) -> Unit:
        return self._feed.units[trial.trial_id]

    def _settle(self, unit: Unit, outcome: UnitOutcome) -> None:
        """Record the final outcome of a unit: stopped, finished (with the score of its best valid trial), or failed."""
        if "stopped" in outcome:
            self._history.add("stop", unit=unit.number, reason=outcome["stopped"])
            return self._report_settled(unit)
        rows = outcome.get("rows", [])
        scored = results.scored(rows, self._metric)
        # The searcher learns from the score, so a trial that violates a bound must not give one.
        best = results.best_of([trial for trial in scored if self._satisfies_bounds(trial)], self._mode)
        if best is not None:
            self._history.add("finish", unit=unit.number, score=best.value, rows=rows)
        else:
            # Without a best trial, the unit has finished if trials were scored, none of which satisfies the bounds; else it has
            # failed.
            reason = next((row["reason"] for row in rows if row["reason"]), "none of its trials satisfies the bounds")
            event = "finish" if scored else "fail"
            self._history.add(event, unit=unit.number, rows=rows, reason=outcome.get("reason", reason))
        self._report_settled(unit)

    def _count_states(self) -> None:
        prometheus.trials(self._history.folder, Counter(course.status for course in self._history.courses.values()))

    def _report_settled(self, unit: Unit) -> None:
        """Report that a unit has settled to W&B, Prometheus and the terminal; rewrite the table of trials if it is old."""
        course, all_courses = self._history.courses[unit.number], self._history.courses
        if self._agent is not None:
            self._agent.settled(unit)
        self._count_states()
        params = ", ".join(f"{key}={value}" for key, value in unit.shared.items())
        measured = "" if course.score is None else f", {self._metric} {course.score:.4g}"
        self._say(
            f"{len(self._history.settled)}/{len(all_courses)} {unit.name} {course.status}{measured} ({params}) {course.reason}"
        )
        # The table is written as a whole, so writing it after each of thousands of short units would take longer than they do.
        if time.monotonic() - self._written_s > _TABLE_EVERY_S:
            self._written_s = time.monotonic()
            self._write()
