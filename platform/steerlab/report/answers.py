"""The answer of a sweep in a sentence: the chosen setting, what it reaches, and what that costs.

Names of runs on one page, and values of parameters, as people say them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from steerlab.evaluation.statistics.measures import Measure
from steerlab.report.contents import Document, Entry, Sweep, measure_in
from steerlab.report.sweep_figures import measured

_MOST_PRICES = 3
"""Metrics besides the sweep's own that the sentence names."""
_MOST_DIFFERENCES = 3
_WORDS = {"higher": "↑ more is better", "lower": "↓ less is better", None: ""}


class _Setting(NamedTuple):
    """A trial with the means over its seeds."""

    trial_id: str
    rows: list[Document]
    values: dict[str, float]
    """Metrics by name."""


def sentence(sweep: Sweep) -> str:
    """Return what a sweep has found, in one or two sentences; empty while nothing is measured."""
    settings = [_setting(sweep, rows) for rows in _by_trial(sweep).values()]
    scored = [setting for setting in settings if sweep.metric in setting.values]
    best = next((setting for setting in scored if setting.trial_id == sweep.best), None)
    if sweep.metric is None or not scored:
        return ""
    if best is None:
        bounds = ", ".join(sweep.summary.get("bounds") or ())
        return f"No trial keeps the bounds ({bounds})." if bounds else ""
    begun = "" if sweep.summary.get("best") else "So far: "
    parts = [f"{begun}{_named(sweep, best)}: {sweep.metric} {_with_interval(sweep, best)}"]
    parts += [_price(sweep, name, best, scored) for name in _prices(sweep) if name in best.values]
    return "; ".join(parts) + "." + _others(sweep, best, scored)


def _by_trial(sweep: Sweep) -> dict[str, list[Document]]:
    by_trial: dict[str, list[Document]] = {}
    for row in sweep.trials:
        by_trial.setdefault(row["trial_id"], []).append(row)
    return by_trial


def _setting(sweep: Sweep, rows: list[Document]) -> _Setting:
    found = {name: [metric["value"] for row in rows if (metric := measured(row, name))] for name in sweep.metrics}
    return _Setting(rows[0]["trial_id"], rows, {name: sum(all_) / len(all_) for name, all_ in found.items() if all_})


def _named(sweep: Sweep, setting: _Setting) -> str:
    values = [(name, setting.rows[0].get(f"param.{name}")) for name in sweep.varied]
    return ", ".join(f"{name.rpartition('.')[2]} {said(name, value)}" for name, value in values) or setting.trial_id


def said(name: str, value: object) -> str:
    """Return the value of a parameter as people say it: an angle in radians as a multiple of π."""
    if isinstance(value, float) and name.endswith("_rad") and value:
        for denominator in (1, 2, 3, 4, 6, 8):
            numerator = value * denominator / math.pi
            if abs(numerator - round(numerator)) < 1e-4:
                whole = round(numerator)
                return f"{'' if whole == 1 else '-' if whole == -1 else whole}π{'' if denominator == 1 else f'/{denominator}'}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def within(measure: Measure, value: float) -> float:
    """Return a number cut off at the ends of what a metric can be: an interval of a share ends at 0 and 1."""
    low = -math.inf if measure.low is None else measure.low
    return min(max(value, low), math.inf if measure.high is None else measure.high)


def _with_interval(sweep: Sweep, setting: _Setting) -> str:
    """Return the sweep's metric of a setting with its interval: over items for one seed, over seeds for several."""
    assert sweep.metric is not None
    measure, value = measure_in(sweep.runs, sweep.metric), setting.values[sweep.metric]
    best: Mapping[str, Any] = sweep.summary.get("best") or {}
    ends = (best.get("low"), best.get("high"))
    if None in ends and len(setting.rows) == 1:
        metric = measured(setting.rows[0], sweep.metric) or {}
        ends = (metric.get("low"), metric.get("high"))
    low, high = ends
    shown = f"{value:.3g}{f' {measure.unit}' if measure.unit and not measure.is_share else ''}"
    if low is None or high is None:
        return shown
    return f"{shown} [{within(measure, low):.3g}, {within(measure, high):.3g}]"


def _prices(sweep: Sweep) -> list[str]:
    """Return the metrics that say what the choice costs: those that the space declares, else others with a better direction."""
    declared = [*(sweep.summary.get("prices") or ()), *(bound.split()[0] for bound in sweep.summary.get("bounds") or ())]
    others = [name for name in sweep.metrics if measure_in(sweep.runs, name).better is not None]
    names = [name for name in dict.fromkeys(declared or others) if name in sweep.metrics and name != sweep.metric]
    return names[:_MOST_PRICES]


def _price(sweep: Sweep, name: str, best: _Setting, scored: Sequence[_Setting]) -> str:
    """Return a metric of the best trial beside the best that any trial reaches."""
    measure, value = measure_in(sweep.runs, name), best.values[name]
    of_all = [setting for setting in scored if name in setting.values]
    if measure.better is None:
        return f"{name} {value:.3g}"
    top = (max if measure.better == "higher" else min)(of_all, key=lambda setting: setting.values[name])
    reached = top.values[name]
    metric = measured(best.rows[0], name) or {}
    low, high = metric.get("low"), metric.get("high")
    if value == reached or (low is not None and high is not None and low <= reached <= high):
        return f"{name} {value:.3g}, as good as any"
    word = "below" if measure.better == "higher" else "above"
    return f"{name} {value:.3g}, {abs(reached - value):.2g} {word} the best ({reached:.3g} at {_named(sweep, top)})"


def _others(sweep: Sweep, best: _Setting, scored: Sequence[_Setting]) -> str:
    """Return a sentence about the trials beside the best one."""
    assert sweep.metric is not None
    sign = 1 if sweep.maximises else -1
    even = [one for one in scored if one.trial_id in (sweep.summary.get("indistinguishable") or ())]
    ahead = [one for one in scored if sign * (one.values[sweep.metric] - best.values[sweep.metric]) > 0 and one not in even]
    parts = []
    if even:
        what = "One other setting" if len(even) == 1 else f"{len(even)} other settings"
        parts.append(f"{what} cannot be told apart from it ({', '.join(_named(sweep, one) for one in even[:3])})")
    if ahead and (rules := ", ".join(sweep.summary.get("bounds") or ())):
        top = max(ahead, key=lambda one: sign * one.values[sweep.metric or ""])
        parts.append(f"{_named(sweep, top)} reaches {top.values[sweep.metric]:.3g} and does not keep {rules}")
    return "".join(f" {part}." for part in parts)


def notes(runs: Sequence[Entry], names: Sequence[str]) -> dict[str, str]:
    """Return for each metric its unit and which way is better, as the small line below its name; empty for others."""
    measures = {name: measure_in(runs, name) for name in names if "/" in name}
    parts = {name: (measure.unit, _WORDS[measure.better]) for name, measure in measures.items()}
    return {name: ", ".join(part for part in some if part) for name, some in parts.items()}


def told_apart(entries: Sequence[Entry]) -> list[Entry]:
    """Return runs with names of their own: runs of one name get what differs in their jobs, or else the time of the run."""
    by_name: dict[str, list[Entry]] = {}
    for entry in entries:
        by_name.setdefault(entry.name, []).append(entry)
    return [entry if len(by_name[entry.name]) == 1 else _renamed(entry, by_name[entry.name]) for entry in entries]


def _renamed(entry: Entry, alike: Sequence[Entry]) -> Entry:
    flat = [dict(_leaves(other.job)) for other in alike]
    keys = dict.fromkeys(key for leaves in flat for key in leaves)
    differing = [key for key in keys if len({json.dumps(leaves.get(key), default=str) for leaves in flat}) > 1]
    own = dict(_leaves(entry.job))
    shown = [f"{key} {said(key, own.get(key))}" for key in differing[:_MOST_DIFFERENCES]]
    called = f"{entry.name} ({', '.join(shown)})" if shown else entry.name
    # Two runs of one job, or of jobs that differ in more than is shown.
    same = [other for other in alike if other is not entry and _shown(other, differing) == _shown(entry, differing)]
    return replace(entry, name=f"{called}, {entry.folder.rpartition('/')[2]}" if same else called)


def _shown(entry: Entry, differing: Sequence[str]) -> list[object]:
    own = dict(_leaves(entry.job))
    return [own.get(key) for key in differing[:_MOST_DIFFERENCES]]


def _leaves(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the scalars of a job by their path; names of jobs differ anyway."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    elif isinstance(tree, list | tuple):
        for number, value in enumerate(tree):
            yield from _leaves(value, f"{path}.{number}")
    else:
        yield path, tree


def groups(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Return runs in groups that measured the same tasks, in the order of their first runs."""
    by_tasks: dict[frozenset[str], list[Entry]] = {}
    for entry in entries:
        by_tasks.setdefault(frozenset(name.partition("/")[0] for name in entry.summary["metrics"]), []).append(entry)
    return list(by_tasks.values())
