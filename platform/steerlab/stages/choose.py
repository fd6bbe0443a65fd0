"""The stage that chooses the strength on development rows; the evaluation on other rows then reports it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from steerlab.evaluation.statistics import stored
from steerlab.evaluation.statistics.stored import StrengthKey
from steerlab.guards import saved
from steerlab.job import UNPATCHED, UNPATCHED_NAME, ChooseConfig, Job, Limit
from steerlab.storage.plan import Stage, Work

_CHOICE = "choice.json"


class _Bound(saved.Shape):
    metric: str
    rise: float | None = None
    factor: float | None = None


class _Rule(saved.Shape):
    metric: str
    mode: str = "min"
    within: _Bound | None = None


class Choice(saved.Shape):
    """The chosen strength, and what it was chosen by."""

    strength: float
    rule: _Rule
    table: dict[StrengthKey, dict[str, float | None]] = {}


def read(directory: Path) -> dict[str, Any]:
    """Return what was chosen. Raises ValueError where the file is damaged."""
    return saved.read_like(directory / _CHOICE, Choice)


def stage(job: Job, development: Sequence[Stage], baselines: Sequence[Stage]) -> Stage:
    """Return the choosing stage, behind the evaluations of its tasks at the candidates and without a patch."""
    assert job.choose is not None
    rule = job.choose.model_dump(mode="json", include={"metric", "mode", "within"})
    labels = [task.label or task.task for task in job.choose.tasks]
    # The two models one after the other: each is loaded once.
    inputs = dict(zip([*map(_steered, labels), *map(_plain, labels)], [*development, *baselines], strict=True))
    return Stage("choose", 1, {**rule, "labels": labels}, run, inputs, label=job.choose.metric)


def _steered(label: str) -> str:
    """Return the name of the input that holds a task's development metrics at the candidates."""
    return f"{label}, development"


def _plain(label: str) -> str:
    """Return the name of the input that holds a task's development metrics without a patch."""
    return f"{label}, {UNPATCHED_NAME}"


def candidates(choose: ChooseConfig) -> tuple[float, ...]:
    """Return the strengths that the development tasks are run at; 0 is the model without a patch, evaluated apart."""
    return tuple(strength for strength in sorted(set(choose.strengths)) if strength != UNPATCHED)


def run(work: Work) -> None:
    """Read the development metrics and keep the best strength that stays within the bound."""
    table: dict[float, dict[str, float | None]] = {}
    for label in work.params["labels"]:
        found = stored.strengths(work.inputs[_steered(label)])
        (plain,) = stored.strengths(work.inputs[_plain(label)]).values()
        for strength, metrics in {UNPATCHED: plain, **found}.items():
            named = {f"{label}/{name.partition('/')[2]}": metric["value"] for name, metric in metrics.items()}
            table.setdefault(strength, {}).update(named)
    within = work.params["within"]
    bound = None if within is None else Limit.model_validate(within)
    chosen = best(table, work.params["metric"], work.params["mode"], bound)
    rule = {name: work.params[name] for name in ("metric", "mode", "within")}
    unmoved = _unmoved(table, [work.params["metric"], *([bound.metric] if bound else [])])
    choice = {"strength": chosen, "rule": rule, "table": table, "unmoved": unmoved}
    (work.directory / _CHOICE).write_text(json.dumps(choice, indent=1))
    for line in said_of(choice):
        warnings.warn(line, stacklevel=2)


def _unmoved(table: Mapping[float, Mapping[str, float | None]], metrics: Sequence[str]) -> list[str]:
    """Return the metrics that have the same value at every strength, to the last bit: the patch does not reach them."""
    return [name for name in metrics if len(table) > 1 and len({values.get(name) for values in table.values()}) == 1]


def said_of(choice: Mapping[str, Any]) -> list[str]:
    """Return what is to be said of a choice: a rule by a metric that no strength moves decides nothing."""
    rule, found = choice["rule"], []
    for name in choice.get("unmoved", ()):
        effect = "the weakest strength was chosen" if name == rule["metric"] else "the bound on it binds nothing"
        found.append(f"choose: {name} is the same at every strength, so {effect}; look where the patch acts")
    return found


def best(table: dict[float, dict[str, float | None]], metric: str, mode: str, within: Limit | None) -> float:
    """Return the strength with the best metric, 0 among them; of equals the weakest.

    Raises:
        ValueError: the development tasks have no such metric, or could not score it at strength 0.
    """
    for name in (metric, *([within.metric] if within else [])):
        if name not in table[UNPATCHED]:
            raise ValueError(f"choose: the development tasks have no metric {name!r}; they have {', '.join(table[UNPATCHED])}")
        if table[UNPATCHED][name] is None:
            raise ValueError(f"choose: {name} could not be scored at {UNPATCHED_NAME}")
    sign = 1 if mode == "min" else -1

    def allowed(values: dict[str, float | None]) -> bool:
        if within is None:
            return True
        value, start = values[within.metric], table[UNPATCHED][within.metric]
        return value is not None and start is not None and value <= within.highest(start)

    scored = {s: sign * value for s, values in table.items() if (value := values[metric]) is not None and allowed(values)}
    return min(scored, key=lambda strength: (scored[strength], strength))
