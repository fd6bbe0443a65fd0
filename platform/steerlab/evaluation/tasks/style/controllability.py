"""Whether a metric of another task rises steadily with the strength of the patch.

Runs the other task once, at a grid of strengths, and analyses one of its metrics:

    controllability/<metric>   the metric at each strength
    controllability/tau        Kendall's tau between strength and an item's score, mean over items
    controllability/slope      least-squares slope of an item's score over strength, mean over items

tau of an item is (C - D) / P (tau-a; Kendall, Biometrika 30, 1938): of the P pairs of different strengths, C have the higher
score at the higher strength and D at the lower one; pairs with equal scores count in P only. A tau of 1 means that every step
up raises the score of every item, -1 that it lowers it, 0 that the strength has no consistent effect. An item whose score never
changes has a tau of 0; a metric that few items change therefore has a tau near 0, even if its curve is smooth. The slope is the
slope of that curve: if every item has the same weight at all strengths, it is the least-squares slope of the metric over the
strength (for a perplexity: of its logarithm in nats). Both intervals are bootstrapped over items.

An item scored at fewer than two strengths is counted as unparsable. tau and slope describe the whole grid; they are stored with
the metrics of its first strength. With a single strength, they are not reported.

Axis legend: K strengths.

    {task: controllability, strengths: [1, 0, 0.5, 1.5, 2], metric: toxicity/score, of: {task: toxicity, limit: 100}}
"""

from __future__ import annotations

import difflib
from collections import defaultdict
from collections.abc import Sequence
from functools import partial
from itertools import combinations
from typing import Literal, NamedTuple

import numpy as np
from pydantic import Field, SerializeAsAny, create_model, model_validator

from steerlab.evaluation.statistics import seeds
from steerlab.evaluation.statistics.measures import Measure, find, likeness
from steerlab.evaluation.statistics.metrics import TOO_LONG, Observation, Result, Task, TokenKinds, observed
from steerlab.job import Table, TaskConfig
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel

_TAU, _SLOPE = "controllability/tau", "controllability/slope"


class Config(TaskConfig):
    """How a metric of another task changes with the strength."""

    task: Literal["controllability"] = "controllability"
    """This task."""
    strengths: tuple[float, ...] = Field((1.0, 0.0, 0.25, 0.5, 0.75), min_length=1)
    """The grid, in any order, evaluated in one batch. Tables report the metric at the first strength; if it is 0, at 1 or else
    at the first strength that is not 0."""
    of: SerializeAsAny[TaskConfig]
    """The other task, with its own rows and seed."""
    metric: str
    """Full name of the other task's metric to analyse: `toxicity/score`."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.of.strengths != (1.0,):
            raise ValueError(f"of.strengths {list(self.of.strengths)}: set the grid as strengths of this task, outside of `of`")
        if self.of.label is not None:
            raise ValueError(f"of.label {self.of.label}: set the label of this task, outside of `of`")
        if self.limit is not None or self.seed != 0 or self.seeds:
            raise ValueError("limit, seed and seeds belong to the task in `of`: set of.limit, of.seed, of.seeds")
        if not self.metric.startswith(f"{self.of.task}/"):
            raise ValueError(f"metric {self.metric!r} is not one of the task in `of`: its metrics are {self.of.task}/...")
        return self


class Point(NamedTuple):
    """An item's score at one strength."""

    strength: float
    score: float
    weight: float


def over(tasks: Table[Task]) -> Task:
    """Return the task `controllability` over a table of tasks, whose configs the field `of` accepts."""
    of = (tasks.field(), Field(description=Config.model_fields["of"].description))
    config = create_model("Config", __base__=Config, __doc__=Config.__doc__, __module__=__name__, of=of)
    return Task(
        config,
        partial(run, tasks),
        partial(measures, tasks),
        # A new version of any task in the table makes stored results of this task outdated.
        1 + sum(task.version - 1 for task in tasks.entries.values()),
        check=partial(check, tasks),
        runs_over=partial(runs_over, tasks),
        chats=lambda config: tasks.of(config.of).chats(config.of),
        example={"of": {"task": "perplexity"}, "metric": "perplexity/value"},
    )


def measures(tasks: Table[Task], config: Config, reported: Sequence[Measure] = ()) -> tuple[Measure, ...]:
    """Return the measures: the metric of the other task, its tau and its slope.

    Args:
        tasks: table of tasks.
        config: the config.
        reported: measures that the other task reported when it ran, which may be more precise than those declared before.
    """
    name = config.metric.partition("/")[2]
    within = find([*reported, *tasks.of(config.of).measures(config.of)], name) or Measure(name, None)
    tau = likeness(_TAU.partition("/")[2], within.better, "bootstrap")
    slope = Measure(_SLOPE.partition("/")[2], within.better, within.unit, transform="bootstrap")
    return (within._replace(name=name), *((tau, slope) if len(set(config.strengths)) > 1 else ()))


def check(tasks: Table[Task], config: Config, facts: ModelFacts) -> None:
    """Refuse a metric that the other task does not have, and configs that it refuses. Raises ValueError with the field."""
    within = tasks.of(config.of).measures(config.of)
    if find(within, config.metric.partition("/")[2]) is None:
        names = [f"{config.of.task}/{measure.name}" for measure in within]
        near = difflib.get_close_matches(config.metric, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"metric: task {config.of.task} has no {config.metric}{hint}; its metrics are {', '.join(names)}")
    try:
        tasks.of(config.of).check(config.of, facts)
    except ValueError as error:
        raise ValueError(f"of.{error}") from None


def runs_over(tasks: Table[Task], config: Config, metric: str | None) -> TokenKinds:
    """Return the kinds of tokens that the other task's metric depends on, as tau and slope depend on the same ones."""
    return tasks.of(config.of).runs_over(config.of, config.metric)


def run(tasks: Table[Task], model: SteeredModel, config: Config) -> Result:
    """Run the other task at every strength and relate its metric to the strength."""
    inner = config.of.model_copy(update={"strengths": config.strengths})
    within = seeds.pooled(seeds.run(tasks.of(config.of), model, inner))
    measured = [o for o in within.observations if o.metric == config.metric]
    # `check` accepts a pattern such as lm_eval's `*`; whether the metric exists is known only after the run.
    if not measured:
        names = dict.fromkeys(o.metric for o in within.observations)
        near = difflib.get_close_matches(config.metric, names, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"task {config.of.task} has no metric {config.metric}{hint}; its metrics are {', '.join(names)}")
    name = f"controllability/{config.metric.partition('/')[2]}"
    # The metric is reported again under this task's name, since the other task is not in the job's list of tasks.
    observations = [o._replace(metric=name) for o in measured]
    if len(set(config.strengths)) > 1:
        observations += judge(measured, config.strengths[0])
    return Result(observations, within.samples, measures(tasks, config, within.measures))


def judge(measured: Sequence[Observation], headline: float) -> list[Observation]:
    """Return tau and slope of every item over the strength, as observations at the strength `headline`.

    Args:
        measured: observations of the other task's metric at all strengths.
        headline: the strength under which tau and slope are stored.
    """
    items: dict[str, list[Point]] = defaultdict(list)
    long = {o.id for o in measured if o.reason == TOO_LONG}
    for o in measured:
        scored = items[o.id]
        if o.value is not None and o.weight > 0:
            scored.append(Point(o.strength, o.value, o.weight))
    observations = []
    for item_id, points in items.items():
        # The weight is the item's mean weight over the grid, so that the mean slope is the slope of the metric's curve.
        weight = float(np.mean([point.weight for point in points])) if points else 1.0
        tau, steepness = (TOO_LONG, TOO_LONG) if item_id in long else (kendall(points), slope(points))
        observations.append(observed(_TAU, item_id, tau, headline))
        observations.append(observed(_SLOPE, item_id, steepness, headline, weight))
    return observations


def kendall(points: Sequence[Point]) -> float | None:
    """Return Kendall's tau-a between strength and score, -1 to 1; None with fewer than two strengths."""
    # Sorted, so that the first of a pair has the lower strength; pairs of equal strengths are skipped.
    pairs = [(a, b) for a, b in combinations(sorted(points), 2) if a.strength < b.strength]
    return sum((b.score > a.score) - (b.score < a.score) for a, b in pairs) / len(pairs) if pairs else None


def slope(points: Sequence[Point]) -> float | None:
    """Return the least-squares slope of score over strength, per unit of strength; None with fewer than two strengths."""
    if len({point.strength for point in points}) < 2:
        return None
    strength_K = np.array([point.strength for point in points])
    # With centred strengths the intercept vanishes: slope = sum (s - mean s) y / sum (s - mean s)^2.
    strength_K -= strength_K.mean()
    return float(strength_K @ np.array([point.score for point in points]) / (strength_K @ strength_K))
