"""What a sweep remembers: one line an event, appended and never changed; from it the sweep goes on after any crash.

    begin     the sweep starts                       suggest   a unit: its trials, their parameters, its seeds
    resume    it goes on after a crash or a stop     start     a process runs the unit (again after that process died)
    report    a value that the scheduler saw         finish    the unit's rows: parameters, metrics, seconds, keys
    stop      it was interrupted                     fail      the unit failed, and why
    end       every unit is settled                  prune     the scheduler stopped the unit
                                                     stop      W&B stopped the unit, and when

Only the sweep's own process writes. What was trained and measured is in the artifacts: a unit whose line is missing runs
again and finds them there.
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
    """What became of a unit so far."""

    unit: Unit
    status: Status = "pending"
    rows: list[TrialRow] = field(default_factory=list)
    """What it measured, a row a trial and seed."""
    reason: str = ""
    reports: list[tuple[int, float]] = field(default_factory=list)
    """(step, value) that the scheduler saw."""
    score: float | None = None
    """What the searcher was told."""

    @property
    def settled(self) -> bool:
        """Say whether nothing is left to do."""
        return self.status in _SETTLES.values()


class History:
    """The events of one sweep."""

    def __init__(self, store: Store, folder: str) -> None:
        """Read what there is; units that ran when the sweep died are pending again.

        Raises:
            ValueError: a line is none of a sweep's, or a trial's name is not that of its parameters.
        """
        self.folder = folder
        self._store, self._path = store, f"{folder}/history.jsonl"
        self.courses: dict[int, Course] = {}
        self.settled: list[int] = []
        """Numbers of the settled units, in the order in which they were."""
        self.started = self.ended = False
        for number, line in enumerate(store.read_lines(self._path), 1):
            self._read(line, f"{store.root}/{self._path} line {number}")
        for course in self.courses.values():
            if course.status == "running":
                course.status = "pending"

    def add(self, event: str, **facts: object) -> None:
        """Append an event."""
        line = {"event": event, "time": round(time.time(), 3), **facts}
        self._store.append_line(self._path, line)
        self._apply(_Line.model_validate(line))

    def suggest(self, unit: Unit) -> None:
        """Append a unit. Raises ValueError if there is one with a trial and seed of the same name."""
        taken = {(trial.trial_id, seed) for c in self.courses.values() for trial in c.unit.trials for seed in c.unit.seeds}
        for trial in unit.trials:
            if any((trial.trial_id, seed) in taken for seed in unit.seeds):
                raise ValueError(f"trial {trial.trial_id} is in the sweep already: {trial.params}")
        self.add("suggest", **unit.as_dict())
        self.courses[unit.number] = Course(unit)

    def _read(self, tree: object, where: str) -> None:
        """Take a line of the file, which another's ROOT may hold. Raises ValueError where it is none of a sweep's."""
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
        self.ended = line.event == "end"
        if line.unit is None:
            return
        course = self.courses.get(line.unit)
        if course is None:
            raise saved.SavedError(f"{self._store.root}/{self._path} is damaged: nobody suggested unit {line.unit}")
        if line.event == "start":
            course.status = "running"
        elif line.event == "report":
            course.reports.append((line.step, line.value))
        elif line.event in _SETTLES and not course.settled:
            course.status = _SETTLES[line.event]
            course.rows, course.reason, course.score = line.rows, line.reason, line.score
            self.settled.append(line.unit)

    @property
    def pending(self) -> list[Unit]:
        """Units that are not settled, in order."""
        return [course.unit for course in self.courses.values() if not course.settled]
