"""Estimate what a sweep would cost before it starts: its distinct stages, how many are cached, seconds and bytes."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TypeAlias, TypedDict

from steerlab import run
from steerlab.run import capacity
from steerlab.stages import Plan
from steerlab.storage import plan
from steerlab.storage.store import Store, StoreError
from steerlab.sweeps import search, trials, units
from steerlab.sweeps.sweep_request import SweepRequest

_MOST_COMPARED = 200
"""Largest number of artifacts of one stage that an estimate reads: each is a file of the store."""


_Scalar: TypeAlias = int | float | str | None
"""Value of a parameter of a stage; a list is written as JSON text."""


class StageCost(TypedDict):
    """Estimated cost of all stages with one name."""

    distinct: int
    """Number of stages with different keys."""
    cached: int
    """Number of these stages that are in the store."""
    to_run: int
    """Number of these stages that are not in the store."""
    seconds: float | None
    """Estimated seconds of the stages to run, one after another: each takes as long as the stored artifact whose parameters
    differ least. None when the store has no artifact of this stage."""
    bytes: int
    """Estimated disk space of the stages to run."""


class SweepCost(TypedDict):
    """Estimated cost of a sweep."""

    trials: int
    """Number of trials, counting each seed."""
    units: int
    stages: dict[str, StageCost]
    """Cost by stage name."""
    words: str
    """The cost as a sentence."""


def of(request: SweepRequest, store: Store, say: trials.Say = lambda line: None) -> SweepCost:
    """Estimate the cost of a sweep: the number of trials, and the stages to run with their seconds and bytes."""
    # A searcher's points are not known in advance; random points of the same space share stages about as often.
    runs = request.units or _stand_ins(request)
    stages: dict[str, plan.Stage] = {}
    needs: dict[str, plan.Estimate] = {}
    for unit in trials.counted(runs, "looking for stages", say):
        for seed in unit.seeds:
            planned = Plan.of(request.plan.job_of(unit.shared, seed, unit.strengths))
            new = [stage for stage in planned.stages if stage.key not in stages]
            stages |= {stage.key: stage for stage in new}
            # An estimate may tokenise the rows, so stages that an earlier unit already has are not estimated again.
            if new:
                needs |= capacity.estimates(planned, run.facts_of(planned), plan.status(new, store))
    records = plan.status(list(stages.values()), store)
    lines: dict[str, StageCost] = {}
    for record in records:
        line = lines.setdefault(record.stage.name, {"distinct": 0, "cached": 0, "to_run": 0, "seconds": 0.0, "bytes": 0})
        line["distinct"] += 1
        line["cached" if record.status == "cached" else "to_run"] += 1
    for name, line in lines.items():
        # Cached stages cost nothing, so seconds and bytes are those of the other stages.
        left = [record.stage for record in records if record.stage.name == name and record.status != "cached"]
        line["bytes"] = sum(needs[stage.key].disk_bytes for stage in left if stage.key in needs)
        line["seconds"] = _seconds(left, store)
    num_trials = sum(len(unit.trials) * len(unit.seeds) for unit in runs)
    return {"trials": num_trials, "units": len(runs), "stages": lines, "words": _words(request, num_trials, lines)}


def _words(request: SweepRequest, num_trials: int, lines: Mapping[str, StageCost]) -> str:
    known_s = sum(line["seconds"] for line in lines.values() if line["seconds"] is not None)
    unknown = sum(line["to_run"] for line in lines.values() if line["seconds"] is None)
    drawn = "" if request.units else ", at points drawn at random instead of those that the searcher will choose"
    more = f", and {unknown} stages of unknown duration, since no such stage has run in this ROOT" if unknown else ""
    return f"{num_trials} trials{drawn}; about {known_s:.0f} s of stages one after another{more}"


def _stand_ins(request: SweepRequest) -> list[units.Unit]:
    points = search.drawn_points(request.plan.space, request.plan.strengths, request.num_samples, 0)
    return units.grouped(request.plan.space.path, points, request.seeds, apart=False, drawn=True)


def _seconds(stages: list[plan.Stage], store: Store) -> float | None:
    """Estimate the seconds of stages with one name from the stored artifacts with the most similar parameters."""
    if not stages:
        return 0.0
    name = stages[0].name
    artifacts = []
    for key in store.list(f"artifacts/{name}")[:_MOST_COMPARED]:
        with suppress(ValueError, StoreError):  # an artifact that is damaged or just being removed is skipped
            artifacts.append(plan.made(store, name, key))
    if not artifacts:
        return None
    flat = [(dict(_flat(artifact.params)), artifact.seconds) for artifact in artifacts]
    total = 0.0
    for stage in stages:
        own = dict(_flat(stage.params))
        # The distance is the number of differing parameters, regardless of their difference; a rough estimate suffices.
        near, seconds = min(flat, key=lambda entry: _distance(own, entry[0]))
        total += seconds * math.prod(_ratio(own.get(name), near.get(name)) for name in ("train.steps", "train.epochs"))
    return total


def _ratio(steps: _Scalar, near_steps: _Scalar) -> float:
    # The duration of a training is proportional to its steps; other stages have no such parameter.
    if isinstance(steps, int | float) and isinstance(near_steps, int | float) and steps and near_steps:
        return steps / near_steps
    return 1.0


def _flat(params: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, _Scalar]]:
    for name, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value if isinstance(value, int | float | str | None) else json.dumps(value)


def _distance(a: Mapping[str, _Scalar], b: Mapping[str, _Scalar]) -> int:
    """Count the parameters in which two stages differ."""
    return sum(a.get(name) != b.get(name) for name in a.keys() | b.keys())
