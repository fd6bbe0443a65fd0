"""The stage that chooses the strength of a patch on development rows; the evaluation on other rows then reports it."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

from steerlab.evaluation.statistics import stored
from steerlab.evaluation.statistics.stored import StrengthKey
from steerlab.guards import saved
from steerlab.guards.json_values import JsonObject
from steerlab.job import UNPATCHED, UNPATCHED_NAME, ChooseConfig, Frozen, Job, Limit
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


class Params(Frozen):
    """Parameters of the stage: the rule, and the development tasks whose metrics the rule compares."""

    metric: str
    mode: Literal["min", "max"]
    within: Limit | None
    labels: tuple[str, ...]


class Choice(saved.Shape):
    """The chosen strength, the rule that chose it, and the metrics that the rule compared."""

    strength: float
    rule: _Rule
    table: dict[StrengthKey, dict[str, float | None]] = {}
    """Development metrics by strength; None where a metric could not be scored."""
    unmoved: list[str] = []
    """Metrics of the rule that have the same value at every strength, because the patch does not affect them."""


def read(directory: Path) -> JsonObject:
    """Read `choice.json` of an artifact. Raises ValueError if the file is damaged."""
    return saved.read_like(directory / _CHOICE, Choice)


def strength(directory: Path) -> float:
    """Return the chosen strength of an artifact. Raises ValueError if the file is damaged."""
    return saved.read(directory / _CHOICE, Choice).strength


def stage(job: Job, development: Sequence[Stage], baselines: Sequence[Stage]) -> Stage:
    """Return the stage that chooses the strength.

    Args:
        job: A job with a `choose` section.
        development: For each task of `choose`, its evaluation at the candidate strengths.
        baselines: For each task of `choose`, its evaluation on the model without the patch.
    """
    assert job.choose is not None
    labels = tuple(task.label or task.task for task in job.choose.tasks)
    params = Params(metric=job.choose.metric, mode=job.choose.mode, within=job.choose.within, labels=labels)
    # All evaluations of the patched model come first, then all of the plain one. The order of the inputs is the order in which
    # the plan runs them, and a process keeps its model until a stage needs another one, so each model is loaded once.
    inputs = dict(zip([*map(_steered, labels), *map(_plain, labels)], [*development, *baselines], strict=True))
    return Stage("choose", 1, params.model_dump(mode="json"), run, inputs, label=job.choose.metric)


def _steered(label: str) -> str:
    """Return the name of the input that holds a task's development metrics at the candidates."""
    return f"{label}, development"


def _plain(label: str) -> str:
    """Return the name of the input that holds a task's development metrics without a patch."""
    return f"{label}, {UNPATCHED_NAME}"


def candidates(choose: ChooseConfig) -> tuple[float, ...]:
    """Return the strengths at which the development tasks run; strength 0 is skipped."""
    # Strength 0 is the model without a patch. Its evaluation is a separate stage, which all patches of the model share.
    return tuple(strength for strength in sorted(set(choose.strengths)) if strength != UNPATCHED)


def run(work: Work) -> None:
    """Read the development metrics and write the best strength within the bound to `choice.json`."""
    params = Params.model_validate(work.params)
    table: dict[float, dict[str, float | None]] = {}
    for label in params.labels:
        steered = stored.strengths(work.inputs[_steered(label)])
        # The baseline has a single strength without effect, since its model has no patch of this job.
        (plain,) = stored.strengths(work.inputs[_plain(label)]).values()
        for strength, metrics in {UNPATCHED: plain, **steered}.items():
            # A metric is stored under its task's name; the rule names it by the task's label, so that a task can occur twice.
            values = {f"{label}/{name.partition('/')[2]}": metric["value"] for name, metric in metrics.items()}
            table.setdefault(strength, {}).update(values)
    chosen = best(table, params.metric, params.mode, params.within)
    unmoved = _unmoved(table, [params.metric, *([params.within.metric] if params.within else [])])
    rule = params.model_dump(mode="json", exclude={"labels"})
    choice = {"strength": chosen, "rule": rule, "table": table, "unmoved": unmoved}
    (work.directory / _CHOICE).write_text(json.dumps(choice, indent=1))
    for line in _remarks(params.metric, unmoved):
        warnings.warn(line, stacklevel=2)


def _unmoved(table: Mapping[float, Mapping[str, float | None]], metrics: Sequence[str]) -> list[str]:
    """Return the metrics that have the same value at every strength."""
    # Values are compared exactly: if the patch affects a metric at all, rounding alone makes values differ.
    return [name for name in metrics if len(table) > 1 and len({values.get(name) for values in table.values()}) == 1]


def said_of(choice: Mapping[str, object]) -> list[str]:
    """Return warnings about the content of a `choice.json`: a metric that is the same at every strength has no influence."""
    checked = Choice.model_validate(choice)
    return _remarks(checked.rule.metric, checked.unmoved)


def _remarks(metric: str, unmoved: Sequence[str]) -> list[str]:
    lines = []
    for name in unmoved:
        effect = "the weakest strength was chosen" if name == metric else "the bound on it has no effect"
        lines.append(f"choose: {name} is the same at every strength, so {effect}; look where the patch acts")
    return lines


def best(table: dict[float, dict[str, float | None]], metric: str, mode: str, within: Limit | None) -> float:
    """Return the strength whose metric is the best; among equal ones the weakest.

    Args:
        table: Metrics by strength, with those of strength 0; None where a metric could not be scored.
        metric: Name of the metric to optimise.
        mode: "min" or "max".
        within: Bound on another metric, relative to its value at strength 0; None for no bound.

    Raises:
        ValueError: a metric of the rule does not exist, or could not be scored at strength 0.
    """
    for name in (metric, *([within.metric] if within else [])):
        if name not in table[UNPATCHED]:
            raise ValueError(f"choose: the development tasks have no metric {name!r}; they have {', '.join(table[UNPATCHED])}")
        if table[UNPATCHED][name] is None:
            raise ValueError(f"choose: {name} could not be scored at {UNPATCHED_NAME}")
    sign = 1 if mode == "min" else -1

    # Strength 0 satisfies a bound that is relative to its own value (with `factor` only if that value is not negative), so at
    # least one strength remains.
    def allowed(values: dict[str, float | None]) -> bool:
        if within is None:
            return True
        value, start = values[within.metric], table[UNPATCHED][within.metric]
        return value is not None and start is not None and value <= within.highest(start)

    scored = {s: sign * value for s, values in table.items() if (value := values[metric]) is not None and allowed(values)}
    # The strength itself breaks ties: of two equal strengths, the weaker has fewer side effects.
    return min(scored, key=lambda strength: (scored[strength], strength))
