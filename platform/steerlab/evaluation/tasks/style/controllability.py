"""Does a stronger patch give more of what a task measures, step by step?

Runs another task once, at a grid of strengths, and looks at one of its metrics:

    controllability/<metric>   the metric at each strength
    controllability/tau        Kendall's tau between strength and an item's score, mean over items
    controllability/slope      least-squares slope of an item's score over strength, mean over items

tau of an item is (C - D) / P (tau-a; Kendall, Biometrika 30, 1938): of the P pairs of different strengths, C have the higher
score at the higher strength and D at the lower; equal scores count among P alone. 1 says that every step up raises every
item's score, -1 that it lowers it, 0 that strength dials nothing: an item whose score never changes has 0, so that a share
which most items never move has a tau near 0 however smooth its curve is. The slope is that curve's: where every item has the
same weight at all strengths it is the least-squares slope of the metric at each strength, of a perplexity that of its logarithm
in nats. Both intervals are bootstrapped over items.

An item scored at fewer than two strengths is counted as unparsable. tau and slope belong to the grid and stand beside the
metric of its first strength; with one strength there are none.

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

from steerlab.evaluation.statistics.measures import Measure, find, likeness
from steerlab.evaluation.statistics.metrics import TOO_LONG, Observation, Result, Task, TokenKinds, observed
from steerlab.job import Table, TaskConfig
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel

_TAU, _SLOPE = "controllability/tau", "controllability/slope"


class Config(TaskConfig):
    """How a metric of another task follows the strength."""

    task: Literal["controllability"] = "controllability"
    """This task."""
    strengths: tuple[float, ...] = Field((1.0, 0.0, 0.25, 0.5, 0.75), min_length=1)
    """The grid, in any order, evaluated in one batch; the first one, unless it is 0, gives the headline metric."""
    of: SerializeAsAny[TaskConfig]
    """The task within; its rows and its seed are its own."""
    metric: str
    """The metric that is looked at, by the name that the task within gives it: `toxicity/score`."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if self.of.strengths != (1.0,):
            raise ValueError(f"of.strengths {list(self.of.strengths)}: the grid is set by strengths, beside `of`")
        if self.of.label is not None:
            raise ValueError(f"of.label {self.of.label}: the label is set beside `of`")
        if self.limit is not None or self.seed != 0:
            raise ValueError("limit and seed are those of the task within: set of.limit, of.seed")
        if not self.metric.startswith(f"{self.of.task}/"):
            raise ValueError(f"metric {self.metric!r} is none of the task within: its metrics are called {self.of.task}/...")
        return self


class Point(NamedTuple):
    """An item's score at one strength."""

    strength: float
    score: float
    weight: float


def over(tasks: Table[Task]) -> Task:
    """Make the task over a table of tasks: `of` holds a config of theirs, and their versions are its own."""
    of = (tasks.field(), Field(description=Config.model_fields["of"].description))
    config = create_model("Config", __base__=Config, __doc__=Config.__doc__, __module__=__name__, of=of)
    return Task(
        config,
        partial(run, tasks),
        partial(measures, tasks),
        1 + sum(task.version - 1 for task in tasks.entries.values()),
        check=partial(check, tasks),
        runs_over=partial(runs_over, tasks),
        chats=lambda config: tasks.of(config.of).chats(config.of),
    )


def measures(tasks: Table[Task], config: Config, found: Sequence[Measure] = ()) -> tuple[Measure, ...]:
    """Return what is measured: the metric of the task within, and how it follows the strength; `found` is what it found."""
    name = config.metric.partition("/")[2]
    within = find([*found, *tasks.of(config.of).measures(config.of)], name) or Measure(name, None)
    tau = likeness(_TAU.partition("/")[2], within.better, "bootstrap")
    slope = Measure(_SLOPE.partition("/")[2], within.better, within.unit, transform="bootstrap")
    return (within._replace(name=name), *((tau, slope) if len(set(config.strengths)) > 1 else ()))


def check(tasks: Table[Task], config: Config, facts: ModelFacts) -> None:
    """Refuse what the task within refuses, and a metric that it does not have. Raises ValueError with the field."""
    within = tasks.of(config.of).measures(config.of)
    if find(within, config.metric.partition("/")[2]) is None:
        known = [f"{config.of.task}/{measure.name}" for measure in within]
        near = difflib.get_close_matches(config.metric, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"metric: task {config.of.task} has no {config.metric}{hint}; it has {', '.join(known)}")
    try:
        tasks.of(config.of).check(config.of, facts)
    except ValueError as error:
        raise ValueError(f"of.{error}") from None


def runs_over(tasks: Table[Task], config: Config, metric: str | None) -> TokenKinds:
    """Return the tokens of the task within: tau and slope are those of its metric."""
    return tasks.of(config.of).runs_over(config.of, config.metric)


def run(tasks: Table[Task], model: SteeredModel, config: Config) -> Result:
    """Run the task within at every strength and see how its metric follows."""
    found = tasks.of(config.of).run(model, config.of.model_copy(update={"strengths": config.strengths}))
    measured = [o for o in found.observations if o.metric == config.metric]
    if not measured:
        known = dict.fromkeys(o.metric for o in found.observations)
        near = difflib.get_close_matches(config.metric, known, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"task {config.of.task} has no metric {config.metric}{hint}; it has {', '.join(known)}")
    name = f"controllability/{config.metric.partition('/')[2]}"
    observations = [o._replace(metric=name) for o in measured]
    if len(set(config.strengths)) > 1:
        observations += judge(measured, config.strengths[0])
    return Result(observations, found.samples, measures(tasks, config, found.measures))


def judge(measured: Sequence[Observation], headline: float) -> list[Observation]:
    """Say of every item how its score follows the strength; the observations stand at the strength `headline`."""
    items: dict[str, list[Point]] = defaultdict(list)
    long = {o.id for o in measured if o.reason == TOO_LONG}
    for o in measured:
        scored = items[o.id]
        if o.value is not None and o.weight > 0:
            scored.append(Point(o.strength, o.value, o.weight))
    found = []
    for item_id, points in items.items():
        weight = float(np.mean([point.weight for point in points])) if points else 1.0
        tau, steepness = (TOO_LONG, TOO_LONG) if item_id in long else (kendall(points), slope(points))
        found.append(observed(_TAU, item_id, tau, headline))
        found.append(observed(_SLOPE, item_id, steepness, headline, weight))
    return found


def kendall(points: Sequence[Point]) -> float | None:
    """Return Kendall's tau-a between strength and score; None with fewer than two strengths."""
    pairs = [(a, b) for a, b in combinations(sorted(points), 2) if a.strength < b.strength]
    return sum((b.score > a.score) - (b.score < a.score) for a, b in pairs) / len(pairs) if pairs else None


def slope(points: Sequence[Point]) -> float | None:
    """Return the least-squares slope of score over strength; None with fewer than two strengths."""
    if len({point.strength for point in points}) < 2:
        return None
    strength_K = np.array([point.strength for point in points])
    strength_K -= strength_K.mean()
    return float(strength_K @ np.array([point.score for point in points]) / (strength_K @ strength_K))
