"""Trials, and the units in which they run.

A trial is one point of a search space. Trials that differ only in the strength of the patch form one unit: one job, which
trains one patch and evaluates it at all their strengths. Points that differ in `snapshot` (the step of one training) are
separate units, because each has another patch, but these units share the training.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import Field

from steerlab.guards import saved
from steerlab.guards.json_values import JsonObject
from steerlab.job import JobError
from steerlab.sweeps.space import STRENGTH, Point, strength_of

TrialRow: TypeAlias = JsonObject
"""Measurements of one trial with one seed, a row of trials.parquet: `trial_id`, `seed`, `status`, `param.<path>`,
`metric.<name>` and so on (`results` has all prefixes)."""


@dataclass(frozen=True)
class Trial:
    """One point of the space."""

    trial_id: str
    """First eight hexadecimal digits of the point's SHA-256, so equal points are the same trial."""
    params: Point

    @property
    def strength(self) -> float | None:
        """The strength of the patch; None if the point sets none; then the job's own strengths apply."""
        return strength_of(self.params)


@dataclass(frozen=True)
class Unit:
    """Trials that differ only in strength: one job measures all of them, and runs once for each seed."""

    number: int
    """Position in the sweep, from 1."""
    trials: tuple[Trial, ...]
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name within the sweep; run folders of the unit contain it."""
        # The number is padded with zeros, so that folders sort in the order of the units.
        return f"{self.number:04d}-{self.trials[0].trial_id}"

    @property
    def shared(self) -> Point:
        """The parameters of the unit's job: those of its trials, without the strength."""
        return {key: value for key, value in self.trials[0].params.items() if key != STRENGTH}

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths of the trials; empty if the job's own strengths apply."""
        return tuple(trial.strength for trial in self.trials if trial.strength is not None)

    def as_dict(self) -> dict[str, object]:
        """Return the unit as a dict."""
        return asdict(self)


UnitNumber = Annotated[int, Field(ge=0, lt=10**9)]


class _TrialRecord(saved.Shape):
    trial_id: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    params: JsonObject


class UnitRecord(saved.Shape):
    """A unit in a file: its content is validated when it is read."""

    number: UnitNumber
    trials: Annotated[list[_TrialRecord], Field(min_length=1)]
    seeds: Annotated[list[UnitNumber], Field(min_length=1)]

    @classmethod
    def of(cls, unit: Unit) -> UnitRecord:
        """Return the record of a unit."""
        trials = [_TrialRecord(trial_id=trial.trial_id, params=trial.params) for trial in unit.trials]
        return cls(number=unit.number, trials=trials, seeds=list(unit.seeds))

    @property
    def unit(self) -> Unit:
        """The unit."""
        trials = tuple(Trial(trial.trial_id, trial.params) for trial in self.trials)
        return Unit(self.number, trials, tuple(self.seeds))


def trial_id(params: Point) -> str:
    """Return the id of a point: eight hexadecimal digits of its SHA-256."""
    # The keys are sorted, so that the order of the entries in the space's file does not change an id.
    return hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:8]


def grouped(path: Path, points: Iterable[Point], seeds: Sequence[int], *, apart: bool, drawn: bool) -> list[Unit]:
    """Group points that differ only in strength into units, in the order of the points.

    Args:
        path: file of the search space, for messages.
        points: the points.
        seeds: training seeds.
        apart: make a separate unit for each seed (True) or one unit that runs all seeds one after another (False).
        drawn: the points were drawn at random, so repeated ones are accepted and count once.

    Raises:
        JobError: a grid gives the same point twice.
    """
    by_shared: dict[str, dict[str, Trial]] = {}
    for point in points:
        trial = Trial(trial_id(point), point)
        shared = {key: value for key, value in point.items() if key != STRENGTH}
        # The key is JSON, because values may be lists, and sorted, because points may list their fields in any order.
        group = by_shared.setdefault(json.dumps(shared, sort_keys=True), {})
        # In a grid, a repeated point is a mistake of the user; in a random search over a choice, it is chance.
        if trial.trial_id in group and not drawn:
            raise JobError(f"{path}: SPACE gives the trial {trial.trial_id} twice: {point}")
        group[trial.trial_id] = trial
    choices = [(seed,) for seed in seeds] if apart else [tuple(seeds)]
    pairs = [(tuple(group.values()), chosen) for group in by_shared.values() for chosen in choices]
    return [Unit(number, trials, chosen) for number, (trials, chosen) in enumerate(pairs, 1)]
