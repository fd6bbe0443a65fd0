"""The event log of a sweep (history.jsonl): append-only, one JSON line per event. A sweep resumes from it after any crash.

    events of the sweep                              events of a unit
    begin     the sweep starts                       suggest   the unit: its trials, their parameters, its seeds
    resume    it continues after a crash or a stop   start     a process runs the unit (again after a process died)
    stop      it was interrupted                     report    a value that the scheduler saw
    end       every unit is settled                  finish    the unit's rows: parameters, metrics, seconds, keys
                                                     fail      the unit failed, and why
                                                     prune     the scheduler stopped the unit
                                                     stop      W&B stopped the unit, and when

Only the sweep's own process writes. Trained weights and measurements are artifacts: a unit whose `finish` is missing runs
again and takes its stages from the store.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Literal

from steerlab.guards import saved
from steerlab.storage.store import Store
from steerlab.sweeps.units import TrialRow, Unit, UnitNumber, UnitRecord, trial_id

Status = Literal["pending", "running", "finished", "failed", "pruned", "stopped"]
_SETTLES: dict[str, Status] = {"finish": "finished", "fail": "failed", "prune": "pruned", "stop": "stopped"}


class _Line(saved.Shape):
    event: str
    unit: UnitNumber | None = None
    step: int = 0
    value: float = 0.0
    rows: list[TrialRow] = []
    reason: str = ""
    score: float | None = None


@dataclass
class Course:
    """State of a unit, from the events so far: pending, then running, then one of the settled states."""

    unit: Unit
    status: Status = "pending"
    rows: list[TrialRow] = field(default_factory=list)
    """Measurements: one row for each trial and seed. Empty until the unit has finished."""
    reason: str = ""
    """Why the unit failed or stopped; otherwise empty."""
    reports: list[tuple[int, float]] = field(default_factory=list)
    """(step, value) pairs that the scheduler saw."""
    score: float | None = None
    """Metric of the unit's best trial, for the searcher; None if no trial has a value."""

    @property
    def settled(self) -> bool:
        """Whether the unit finished, failed, was pruned or was stopped."""
        return self.status in _SETTLES.values()


class History:
    """The events of one sweep, and the state of its units that follows from them."""

    def __init__(self, store: Store, folder: str) -> None:
        """Read the events so far; units that were running when the sweep's process died become pending.

        Raises:
            ValueError: a line is not an event of a sweep, or a trial's name is not the hash of its parameters.
        """
        self.folder = folder
        self._store, self._path = store, f"{folder}/history.jsonl"
        self.courses: dict[int, Course] = {}
        self.settled: list[int] = []
        """Numbers of the settled units, in the order in which they settled: Optuna's study is rebuilt in this order."""
        self.started = self.ended = False
        for number, line in enumerate(store.read_lines(self._path), 1):
            self._read(line, f"{store.where(self._path)} line {number}")
        for course in self.courses.values():
            # The unit's process died with the sweep. The unit runs again; finished stages and checkpoints are in the store.
            if course.status == "running":
                course.status = "pending"

    def add(self, event: str, **facts: object) -> None:
        """Append an event."""
        line = {"event": event, "time": round(time.time(), 3), **facts}
        # The file is written first: if the process dies in between, the event is not lost.
        self._store.append_line(self._path, line)
        self._apply(_Line.model_validate(line))

    def suggest(self, unit: Unit) -> None:
        """Append a unit. Raises ValueError if the history already has one of its trials with one of its seeds."""
        # One trial may occur in several units, one for each seed.
        taken = {(trial.trial_id, seed) for c in self.courses.values() for trial in c.unit.trials for seed in c.unit.seeds}
        for trial in unit.trials:
            if any((trial.trial_id, seed) in taken for seed in unit.seeds):
                raise ValueError(f"trial {trial.trial_id} is in the sweep already: {trial.params}")
        self.add("suggest", **unit.as_dict())
        self.courses[unit.number] = Course(unit)

    def _read(self, tree: object, where: str) -> None:
        """Apply a line of the file. Raises ValueError if it is not an event of a sweep."""
        # The file may come from another person, so its content is checked before it is used.
        line = saved.checked(tree, _Line, where)
        if line.event == "suggest":
            unit = saved.checked(tree, UnitRecord, where).unit
            for trial in unit.trials:
                if trial.trial_id != trial_id(trial.params):
                    raise saved.SavedError(f"{where} is damaged: {trial.trial_id} is not the name of the trial {trial.params}")
            self.courses[unit.number] = Course(unit)
        self._apply(line)

    def _apply(self, line: _Line) -> None:
        if line.event == "begin":
            self.started = True
        # Only the last event counts: a sweep that is resumed after its end has further events.
        self.ended = line.event == "end"
        if line.unit is None:
            return
        course = self.courses.get(line.unit)
        if course is None:
            raise saved.SavedError(f"{self._store.where(self._path)} is damaged: unit {line.unit} was never suggested")
        if line.event == "start":
            course.status = "running"
        elif line.event == "report":
            course.reports.append((line.step, line.value))
        elif line.event in _SETTLES and not course.settled:
            # The first event that settles a unit counts: a process may report its outcome after W&B stopped the unit.
            course.status = _SETTLES[line.event]
            course.rows, course.reason, course.score = line.rows, line.reason, line.score
            self.settled.append(line.unit)

    @property
    def pending(self) -> list[Unit]:
        """Units that are not settled, in the order in which they were suggested."""
        return [course.unit for course in self.courses.values() if not course.settled]
