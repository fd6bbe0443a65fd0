"""What a sweep would cost, before it starts: distinct stages, what of them is there, seconds and bytes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TypeAlias, TypedDict

from steerlab import run
from steerlab.run import capacity
from steerlab.stages import Plan
from steerlab.storage import plan
from steerlab.storage.store import Store
from steerlab.sweeps import search, trials, units
from steerlab.sweeps.sweep_request import SweepRequest

_MOST_COMPARED = 200
"""Artifacts of a kind that an estimate looks at."""


_Scalar: TypeAlias = int | float | str | None
"""A parameter of a stage; one of several values is written as a text."""


class StageCost(TypedDict):
    """What the stages of one kind would cost."""

    distinct: int
    cached: int
    to_run: int
    seconds: float | None
    """Seconds of the artifacts of the same kind whose parameters differ least; None where there is no such artifact."""
    bytes: int


class SweepCost(TypedDict):
    """What a sweep would cost."""

    trials: int
    units: int
    stages: dict[str, StageCost]
    """By the name of the stage."""
    words: str
    """For people."""


def of(request: SweepRequest, store: Store, say: trials.Say = lambda line: None) -> SweepCost:
    """Return trials, and of each kind of stage how many are distinct, cached and to run, with seconds and bytes."""
    runs = request.units or _stand_ins(request)
    found: dict[str, plan.Stage] = {}
    needs: dict[str, plan.Estimate] = {}
    for unit in trials.counted(runs, "looking for stages", say):
        for seed in unit.seeds:
            planned = Plan.of(request.plan.job_of(unit.shared, seed, unit.strengths))
            new = [stage for stage in planned.stages if stage.key not in found]
            found |= {stage.key: stage for stage in new}
            if new:
                needs |= capacity.estimates(planned, run.facts_of(planned), plan.status(new, store))
    records = plan.status(list(found.values()), store)
    lines: dict[str, StageCost] = {}
    for record in records:
        line = lines.setdefault(record.stage.name, {"distinct": 0, "cached": 0, "to_run": 0, "seconds": 0.0, "bytes": 0})
        line["distinct"] += 1
        line["cached" if record.status == "cached" else "to_run"] += 1
    for name, line in lines.items():
        left = [record.stage for record in records if record.stage.name == name and record.status != "cached"]
        line["bytes"] = sum(needs[stage.key].disk_bytes for stage in left if stage.key in needs)
        line["seconds"] = _seconds(left, store)
    num_trials = sum(len(unit.trials) * len(unit.seeds) for unit in runs)
    return {"trials": num_trials, "units": len(runs), "stages": lines, "words": _words(request, num_trials, lines)}


def _words(request: SweepRequest, num_trials: int, lines: Mapping[str, StageCost]) -> str:
    known = sum(line["seconds"] for line in lines.values() if line["seconds"] is not None)
    unknown = sum(line["to_run"] for line in lines.values() if line["seconds"] is None)
    drawn = "" if request.units else ", at points drawn at random in place of those that the searcher will choose"
    more = f", and {unknown} of which nothing like them has run here" if unknown else ""
    return f"{num_trials} trials{drawn}; about {known:.0f} s of stages one after another{more}"


def _stand_ins(request: SweepRequest) -> list[units.Unit]:
    points = search.drawn_points(request.plan.space, request.plan.strengths, request.num_samples, 0)
    return units.grouped(request.plan.space.path, points, request.seeds, apart=False, drawn=True)


def _seconds(stages: list[plan.Stage], store: Store) -> float | None:
    """Return the seconds of stages of one kind by what their nearest relatives took."""
    if not stages:
        return 0.0
    name = stages[0].name
    known = []
    for key in store.list(f"artifacts/{name}")[:_MOST_COMPARED]:
        with suppress(ValueError):  # half removed, or damaged: an estimate can do without
            known.append(plan.made(store, name, key))
    if not known:
        return None
    flat = [(dict(_flat(made.params)), made.seconds) for made in known]
    total = 0.0
    for stage in stages:
        own = dict(_flat(stage.params))
        near, seconds = min(flat, key=lambda entry: _distance(own, entry[0]))
        total += seconds * _ratio(own.get("train.steps"), near.get("train.steps"))
    return total


def _ratio(steps: _Scalar, near_steps: _Scalar) -> float:
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
    return sum(a.get(name) != b.get(name) for name in a.keys() | b.keys())
