"""Translate a search space of Ray Tune into the configuration of a Weights & Biases sweep.

W&B then draws values from the same ranges and lists. An entry that W&B cannot draw (a function, values that depend on each
other) is refused with its name. An entry that sets several fields becomes one parameter with lists as values; its name joins
the paths, `method.name--method.pooling`, because W&B allows no commas in names.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from ray.tune.search.sample import Categorical, Domain, Float, Integer, LogUniform, Normal, Quantized

Method = Literal["grid", "random", "bayes"]


def metric_name(metric: str) -> str:
    """Return the name of a metric in W&B: `eval/loss` is `train/eval/loss`, since it shares the step axis of the training."""
    return f"train/{metric}" if metric == "eval/loss" else metric


def sweep_config(
    name: str,
    space: Mapping[str, object],
    metric: str,
    mode: Literal["min", "max"],
    method: Method | None = None,
    min_reports: int | None = None,
) -> dict[str, object]:
    """Return W&B's configuration of a sweep.

    Args:
        name: name of the sweep.
        space: entries of the search space by key.
        metric: the metric to optimise.
        mode: "min" or "max".
        method: None for grid if every entry is a list of values, otherwise random.
        min_reports: number of reports after which W&B's hyperband may stop bad trials; None for no early stopping.

    Raises:
        ValueError: W&B has no counterpart for an entry, or `method` is grid and an entry is a range.
    """
    parameters = {parameter_name(key): parameter(key, entry) for key, entry in space.items()}
    ranges = [key for key in space if "distribution" in parameters[parameter_name(key)]]
    if method == "grid" and ranges:
        raise ValueError(f"SPACE[{ranges[0]!r}] is a range; W&B's grid needs lists of values: use random or bayes")
    # W&B's grid needs finite lists; `tune.choice` means a random draw, so it is not turned into a grid.
    chosen = method or ("random" if ranges or any(isinstance(entry, Domain) for entry in space.values()) else "grid")
    goal = {"min": "minimize", "max": "maximize"}[mode]
    config: dict[str, object] = {
        "name": name,
        "method": chosen,
        "metric": {"name": metric_name(metric), "goal": goal},
        "parameters": parameters,
    }
    if min_reports is not None:
        config["early_terminate"] = {"type": "hyperband", "min_iter": min_reports}
    return config


def parameter_name(entry: str) -> str:
    """Return the name of an entry in W&B."""
    return "--".join(key.strip() for key in entry.split(","))


def parameter(key: str, entry: object) -> dict[str, object]:
    """Return W&B's configuration of one entry.

    Raises:
        ValueError: W&B has no counterpart for the entry.
    """
    if isinstance(entry, dict) and set(entry) == {"grid_search"}:
        return {"values": [_plain(value) for value in entry["grid_search"]]}
    if isinstance(entry, Categorical):
        return {"values": [_plain(value) for value in entry.categories]}
    if isinstance(entry, Float | Integer):
        return _range(key, entry)
    if isinstance(entry, Domain) or callable(entry):
        raise ValueError(f"SPACE[{key!r}]: W&B cannot draw values from a function (tune.sample_from)")
    if isinstance(entry, dict):
        raise ValueError(f"SPACE[{key!r}]: a nested space; name the whole path, as in {key + '.field'!r}")
    return {"value": _plain(entry)}


def _range(key: str, entry: Float | Integer) -> dict[str, object]:
    """Return W&B's distribution for a range of Ray Tune, with its steps."""
    sampler = entry.get_sampler()
    step = sampler.q if isinstance(sampler, Quantized) else None
    inner = sampler.sampler if isinstance(sampler, Quantized) else sampler
    if isinstance(inner, Normal):
        shape = {"mu": inner.mean, "sigma": inner.sd}
        return {"distribution": "q_normal", **shape, "q": step} if step else {"distribution": "normal", **shape}
    low, high = entry.lower, entry.upper
    if low is None or high is None or math.isinf(low) or math.isinf(high):
        raise ValueError(f"SPACE[{key!r}]: W&B needs a range with two ends")
    if isinstance(entry, Integer):
        # Ray Tune excludes the upper end of an integer range, and W&B includes it. With steps, both include it.
        step, high = step if step and step > 1 else None, high if step and step > 1 else high - 1
    if isinstance(inner, LogUniform):
        whole = isinstance(entry, Integer)
        # W&B has no logarithmic distribution of integers, so one that rounds to multiples of q is used.
        if step or whole:
            return {"distribution": "q_log_uniform_values", "min": low, "max": high, "q": step or 1}
        return {"distribution": "log_uniform_values", "min": low, "max": high}
    if step:
        return {"distribution": "q_uniform", "min": low, "max": high, "q": step}
    return {"distribution": "int_uniform" if isinstance(entry, Integer) else "uniform", "min": low, "max": high}


def _plain(value: object) -> object:
    """Convert tuples to lists, which YAML can write."""
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value
