"""Several seeds of one task: an item's value is its mean over the seeds, and the spread between seeds is reported separately.

An interval describes how much a number would change with other items, but all seeds have the same items: treating three seeds
as independent would shorten the interval by sqrt(3) without reason. So each item becomes one observation first. The effect of
another seed is reported as a second number, the standard deviation of the metric between seeds.

Axis legend: K seeds.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from steerlab.evaluation.statistics import item_means
from steerlab.evaluation.statistics.metrics import Result, Task
from steerlab.evaluation.statistics.summaries import Metric, summarise_all
from steerlab.job import TaskConfig


def run(task: Task[Any, Any], model: object, config: TaskConfig) -> list[Result]:
    """Run a task with each of its seeds; only with `seed` if the config has no `seeds`."""
    if not config.seeds:
        return [task.run(model, config)]
    results = []
    for seed in config.seeds:
        result = task.run(model, config.model_copy(update={"seed": seed}))
        # The texts of an item differ by seed, so the seed is added to distinguish the rows of an item in the file of all texts.
        results.append(replace(result, samples=[{**sample, "task_seed": seed} for sample in result.samples]))
    return results


def pooled(results: Sequence[Result]) -> Result:
    """Return the result of all seeds, with one observation for each item, metric and strength.

    The samples are those of the seeds in turn, each with its `task_seed`; files are those of the first seed that wrote them.
    """
    first = results[0]
    if len(results) == 1:
        return first
    observations = [observation for result in results for observation in result.observations]
    files = {path: content for result in reversed(results) for path, content in result.files.items()}
    samples = [sample for result in results for sample in result.samples]
    return Result(item_means.merged(observations), samples, first.measures, files, first.num_shown)


def summarise(results: Sequence[Result]) -> dict[float, dict[str, Metric]]:
    """Summarise every metric over all seeds, with its standard deviation between them: strength -> metric -> numbers."""
    whole = summarise_all(pooled(results))
    if len(results) == 1:
        return whole
    of_seed_K = [summarise_all(result) for result in results]

    def with_deviation(strength: float, name: str, metric: Metric) -> Metric:
        numbers = [of_seed.get(strength, {}).get(name) for of_seed in of_seed_K]
        values = [number.value for number in numbers if number is not None and number.value is not None]
        # A single value has no spread: the other seeds have scored no item of this metric.
        return metric._replace(seed_deviation=statistics.stdev(values)) if len(values) > 1 else metric

    return {
        strength: {name: with_deviation(strength, name, metric) for name, metric in metrics.items()}
        for strength, metrics in whole.items()
    }


def between_seeds(metric: Mapping[str, object]) -> str:
    """Describe the spread of a metric (as JSON) over the seeds of its task: `seeds ±0.012`; empty if it has one seed."""
    deviation = metric.get("seed_deviation")
    return f"seeds \N{PLUS-MINUS SIGN}{deviation:.3g}" if isinstance(deviation, float | int) else ""
