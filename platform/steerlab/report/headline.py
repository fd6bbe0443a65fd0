"""Write the result of a sweep as a sentence: the chosen setting, its metric and its prices; and notes on each metric."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from steerlab.report.contents import Document, Entry, measure_in
from steerlab.report.run_names import said
from steerlab.report.sweep_contents import Sweep
from steerlab.report.sweep_figures import measured

_MOST_PRICES = 3
"""Metrics besides the sweep's own that the sentence names."""
_WORDS = {"higher": "↑ more is better", "lower": "↓ less is better", None: ""}


class _Setting(NamedTuple):
    """A trial with the means over its seeds."""

    trial_id: str
    rows: list[Document]
    values: dict[str, float]
    """Metrics by name."""


def sentence(sweep: Sweep) -> str:
    """Return the result of a sweep in one or two sentences; empty while nothing is measured."""
    settings = [_setting(sweep, rows) for rows in _by_trial(sweep).values()]
    scored = [setting for setting in settings if sweep.metric in setting.values]
    best = next((setting for setting in scored if setting.trial_id == sweep.best), None)
    if sweep.metric is None or not scored:
        return ""
    if best is None:
        bounds = ", ".join(sweep.summary.get("bounds") or ())
        return f"No trial satisfies the bounds ({bounds})." if bounds else ""
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
    return f"{shown} [{measure.within(low):.3g}, {measure.within(high):.3g}]"


def _prices(sweep: Sweep) -> list[str]:
    """Return the metrics that are prices of the choice: those that the space declares, else others with a better direction."""
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
    """Return a sentence about the trials other than the best one."""
    assert sweep.metric is not None
    sign = 1 if sweep.maximises else -1
    even = [one for one in scored if one.trial_id in (sweep.summary.get("indistinguishable") or ())]
    ahead = [one for one in scored if sign * (one.values[sweep.metric] - best.values[sweep.metric]) > 0 and one not in even]
    parts = []
    if even:
        what = "One other setting" if len(even) == 1 else f"{len(even)} other settings"
        parts.append(f"{what} cannot be distinguished from it ({', '.join(_named(sweep, one) for one in even[:3])})")
    if ahead and (rules := ", ".join(sweep.summary.get("bounds") or ())):
        top = max(ahead, key=lambda one: sign * one.values[sweep.metric or ""])
        parts.append(f"{_named(sweep, top)} reaches {top.values[sweep.metric]:.3g} but does not satisfy {rules}")
    return "".join(f" {part}." for part in parts)


def notes(runs: Sequence[Entry], names: Sequence[str]) -> dict[str, str]:
    """Return for each metric its unit and its better direction, for the small line below its name; empty without either."""
    measures = {name: measure_in(runs, name) for name in names if "/" in name}
    parts = {name: (measure.unit, _WORDS[measure.better]) for name, measure in measures.items()}
    return {name: ", ".join(part for part in some if part) for name, some in parts.items()}
