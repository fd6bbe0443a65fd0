"""Trials, and the units in which they run.

A trial is one point of a search space. Trials that differ in the strength of the patch alone are one unit: one job with one
trained patch and one evaluation, whose tasks run at all their strengths in one batch. Steps of one training (`snapshot`) are
units of their own that share the training, because each of them is another patch.
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
"""What a trial measured with one seed, as it stands in trials.parquet: `trial_id`, `seed`, `status`, `param.<path>`,
`metric.<name>` and so on (`results` has them all)."""


@dataclass(frozen=True)
class Trial:
    """One point of the space."""

    trial_id: str
    """Eight digits of the point's SHA-256: equal points are the same trial."""
    params: Point

    @property
    def strength(self) -> float | None:
        """The strength of the patch; None where the job says it."""
        return strength_of(self.params)


@dataclass(frozen=True)
class Unit:
    """Trials that one job answers, once a seed."""

    number: int
    trials: tuple[Trial, ...]
    seeds: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name within the sweep, and part of the names of its run folders."""
        return f"{self.number:04d}-{self.trials[0].trial_id}"

    @property
    def shared(self) -> Point:
        """The parameters of its job: those of its trials but the strength."""
        return {key: value for key, value in self.trials[0].params.items() if key != STRENGTH}

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths of its trials; empty where the job says them."""
        return tuple(trial.strength for trial in self.trials if trial.strength is not None)

    def as_dict(self) -> dict[str, object]:
        """Return the unit as JSON values."""
        return asdict(self)


UnitNumber = Annotated[int, Field(ge=0, lt=10**9)]


class _TrialRecord(saved.Shape):
    trial_id: Annotated[str, Field(pattern=r"^[0-9a-f]{8}$")]
    params: JsonObject


class UnitRecord(saved.Shape):
    """A unit as it stands in a file."""

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
    """Name a point by its values."""
    return hashlib.sha256(json.dumps(params, sort_keys=True).encode()).hexdigest()[:8]


def grouped(path: Path, points: Iterable[Point], seeds: Sequence[int], *, apart: bool, drawn: bool) -> list[Unit]:
    """Make units of points: those that differ in strength alone together, in the order in which they come.

    `path` is the search space's, for messages. `apart` makes a unit of each seed.
    Points that were `drawn` may repeat each other and count once.

    Raises:
        JobError: a grid names the same trial twice.
    """
    by_shared: dict[str, dict[str, Trial]] = {}
    for point in points:
        trial = Trial(trial_id(point), point)
        shared = {key: value for key, value in point.items() if key != STRENGTH}
        group = by_shared.setdefault(json.dumps(shared, sort_keys=True), {})
        if trial.trial_id in group and not drawn:
            raise JobError(f"{path}: SPACE gives the trial {trial.trial_id} twice: {point}")
        group[trial.trial_id] = trial
    choices = [(seed,) for seed in seeds] if apart else [tuple(seeds)]
    pairs = [(tuple(group.values()), chosen) for group in by_shared.values() for chosen in choices]
    return [Unit(number, trials, chosen) for number, (trials, chosen) in enumerate(pairs, 1)]
