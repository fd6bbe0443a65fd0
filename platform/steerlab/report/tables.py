"""The tables of the page: runs and trials, with intervals and the best value of each column."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import NotRequired, TypedDict

from steerlab.evaluation.statistics.measures import Better
from steerlab.evaluation.statistics.seeds import between_seeds
from steerlab.evaluation.statistics.stored import MetricNumbers
from steerlab.evaluation.statistics.summaries import left_out
from steerlab.job import UNPATCHED, UNPATCHED_NAME
from steerlab.report.contents import Document, Entry, measure_in
from steerlab.report.run_names import said
from steerlab.report.sweep_contents import Sweep
from steerlab.report.sweep_figures import measured, standing

DASH = "\u2013"


class Cell(TypedDict):
    """A cell of a table, as the template of the page uses it."""

    value: str
    interval: str
    """Text in smaller type after the value; may be empty."""
    best: bool
    """Whether the cell is highlighted."""
    key: float | None
    """Number by which the column is sorted; None to sort by the text."""
    state: NotRequired[str]
    """State of a trial, which sets the colour."""


Cells = list[Cell]
"""One line of a table."""


def metrics(entries: Sequence[Entry]) -> list[str]:
    """Return the metrics of the table's columns: those that chose strengths, those that bounded choices, then others.

    Metrics of single layers are not in the table; a figure shows them.
    """
    rules = [entry.choice["rule"] for entry in entries if entry.choice]
    first = [rule["metric"] for rule in rules] + [rule["within"]["metric"] for rule in rules if rule["within"]]
    names = [name for entry in entries for name in entry.summary["metrics"] if "layer_" not in name]
    return list(dict.fromkeys([*(name for name in first if name in names), *names]))


def cell(metric: MetricNumbers | None) -> str:
    """Format a metric with its interval and the number of skipped items; a dash if nothing was scored."""
    if metric is None:
        return DASH
    words = ", ".join(part for part in (left_out(metric), between_seeds(metric)) if part)
    aside = f" ({words})" if words else ""
    if metric["value"] is None:
        return DASH + aside
    if metric.get("low") is None or metric.get("high") is None:
        return f"{metric['value']:.3g}{aside}"
    # Fixed decimals, so that value and ends of the interval line up: shares need three, perplexities one.
    digits = 3 if abs(metric["value"]) < 10 else 1
    return f"{metric['value']:.{digits}f} [{metric['low']:.{digits}f}, {metric['high']:.{digits}f}]{aside}"


def rows(entries: Sequence[Entry], names: Sequence[str]) -> list[list[str]]:
    """Return the body of the table: a line for each model at strength 0 that some run measured, then a line for each run."""
    plain = _unsteered(entries)
    lines = []
    for entry in plain:
        name = f"{UNPATCHED_NAME} (no patch)" if len(plain) == 1 else f"{UNPATCHED_NAME} of {entry.name}"
        lines.append([name, "0", *(cell(entry.summary["strengths"][UNPATCHED].get(name)) for name in names), DASH])
    for entry in entries:
        values = [cell(entry.summary["metrics"].get(name)) for name in names]
        fit = DASH if entry.fit_s is None else f"{entry.fit_s:.2g}" if entry.fit_s < 10 else f"{entry.fit_s:.0f}"
        lines.append([entry.name, f"{entry.strength:g}" if entry.summary.get("model") else DASH, *values, fit])
    return lines


def _unsteered(entries: Sequence[Entry]) -> list[Entry]:
    """Return, for each model that was measured at strength 0, the first run that measured it."""
    by_model: dict[str, Entry] = {}
    for entry in entries:
        if UNPATCHED in entry.summary["strengths"]:
            # The key is the whole `model` section of the job, since dtype and prompt settings change the model's outputs too.
            by_model.setdefault(json.dumps(entry.job.get("model"), sort_keys=True), entry)
    return list(by_model.values())


def overview(entries: Sequence[Entry], names: Sequence[str]) -> list[Cells]:
    """Return `rows` as cells, with the best value of each column marked.

    No value of a column is marked if its metric has no better direction, or if the runs measured it with other settings.
    """
    plain = _unsteered(entries)
    values = [[_value(entry.summary["strengths"][UNPATCHED].get(name)) for name in names] for entry in plain]
    values += [[_value(entry.summary["metrics"].get(name)) for name in names] for entry in entries]
    first = len(plain)
    best = [
        _best([row[i] for row in values[first:]], measure_in(entries, name).better) if _comparable(entries, name) else None
        for i, name in enumerate(names)
    ]
    table = []
    for number, line in enumerate(rows(entries, names)):
        # Only runs are marked; the rows at strength 0 are the baseline.
        marks = [False, False, *(number >= first and len(entries) > 1 and value is not None and value == top
                 for value, top in zip(values[number], best, strict=True)), False]  # fmt: skip
        keys = [None, None, *values[number], None]
        table.append([_split(text, mark, key) for text, mark, key in zip(line, marks, keys, strict=True)])
    return table


def _comparable(entries: Sequence[Entry], metric: str) -> bool:
    """Return whether all runs that have a metric measured it with the same config of its task, except for strengths."""
    label, configs = metric.partition("/")[0], set()
    for entry in entries:
        if metric in entry.summary["metrics"]:
            for task in entry.job.get("evaluate") or ():
                if (task.get("label") or task.get("task")) == label:
                    configs.add(json.dumps({**task, "strengths": None}, sort_keys=True))
    return len(configs) <= 1


def _value(metric: MetricNumbers | None) -> float | None:
    return metric["value"] if metric is not None else None


def _best(values: Sequence[float | None], better: Better | None) -> float | None:
    """Return the best value of a column; None if all are equal or the metric has no better direction."""
    scored = [value for value in values if value is not None]
    if len(set(scored)) < 2 or better is None:
        return None
    return min(scored) if better == "lower" else max(scored)


def _split(text: str, best: bool, key: float | None) -> Cell:
    """Return a cell with separate value and interval, so that the page can print the interval in smaller type."""
    value, bracket, interval = text.partition(" [")
    return {"value": value, "interval": bracket.strip() + interval, "best": best, "key": key}


def trials(sweep: Sweep) -> tuple[list[str], list[Cells]]:
    """Return the header and the lines of the table of trials: the best first, trials without a value last."""
    class_of = standing(sweep)
    shown = sweep.metrics[:6]
    seeded = len({trial.get("seed") for trial in sweep.trials}) > 1
    header = ["trial", *(["seed"] if seeded else []), *sweep.parameters, *shown, "ran, s", "state"]
    # The chosen trial comes first: with bounds or prices it need not have the best value.
    ranked = sorted(sweep.finished, key=lambda trial: class_of(trial) != 2)
    # Trials that failed, were stopped or are still running have no value, but belong in the table.
    ranked += [trial for trial in sweep.trials if trial not in ranked]
    # The best value of each column is marked, beside the star of the chosen trial, which need not be the best in each.
    tops = [
        _best([m["value"] for trial in sweep.trials if (m := measured(trial, name))], _better(sweep, name)) for name in shown
    ]
    body = []
    for trial in ranked:
        # A star for the best trial, an approximately-equal sign for those that cannot be distinguished from it.
        mark = ("", "\u2248", "\u2605")[class_of(trial)]
        line: Cells = [{**_plain(f"{mark} {trial['trial_id']}".strip()), "best": class_of(trial) == 2}]
        if seeded:
            line.append(_plain(trial.get("seed")))
        line += [_parameter(name, trial.get(f"param.{name}")) for name in sweep.parameters]
        measurements = [measured(trial, name) for name in shown]
        line += [
            _split(cell(metric), metric is not None and metric["value"] == top, metric["value"] if metric else None)
            for metric, top in zip(measurements, tops, strict=True)
        ]
        line.append(_plain(round(ran_s(trial), 1)))
        state = trial.get("status") or "finished"
        line.append({"value": state, "interval": trial.get("reason") or "", "best": False, "key": None, "state": state})
        body.append(line)
    return header, body


def _better(sweep: Sweep, metric: str) -> Better | None:
    if metric == sweep.metric:
        return "higher" if sweep.maximises else "lower"
    return measure_in(sweep.runs, metric).better


def _parameter(name: str, value: object) -> Cell:
    """Return the value of a parameter in readable form; columns are sorted by the number."""
    cell_of_value = _plain(value)
    return {**cell_of_value, "value": said(name, value)} if isinstance(value, float) else cell_of_value


def _plain(value: object) -> Cell:
    key = value if isinstance(value, int | float) and not isinstance(value, bool) else None
    text = DASH if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return {"value": text, "interval": "", "best": False, "key": key}


def ran_s(trial: Document) -> float:
    """Return the seconds of the stages that ran for a trial, without those whose result was in the store."""
    stages = [name.removeprefix("seconds.") for name in trial if name.startswith("seconds.")]
    # In rows of a Parquet file a missing number is None or NaN.
    spent = [trial[f"seconds.{stage}"] or 0.0 for stage in stages if not trial.get(f"cached.{stage}")]
    return sum(value for value in spent if math.isfinite(value))


def facts(sweep: Sweep) -> list[tuple[str, str]]:
    """Return the key numbers of a sweep as (name, text)."""
    states: dict[str, int] = {}
    for trial in sweep.trials:
        state = trial.get("status") or "finished"
        states[state] = states.get(state, 0) + 1
    stages = [name for name in (sweep.trials[0] if sweep.trials else {}) if name.startswith("cached.")]
    # A run that several trials share is counted once.
    paying = [trial for trial, paid in zip(sweep.trials, sweep.paid, strict=True) if paid]
    flags = [trial[name] for trial in paying for name in stages if trial.get(name) is not None]
    best = next((trial for trial in sweep.finished if trial["trial_id"] == sweep.best), None)
    pairs = [("trials", str(len({trial["trial_id"] for trial in sweep.trials})))]
    pairs += [(state, str(number)) for state, number in states.items() if state != "finished"]
    if best is not None and sweep.metric is not None:
        pairs.append((f"best {sweep.metric}", cell(measured(best, sweep.metric))))
    if flags:
        pairs.append(("stages taken from the store", f"{sum(flags)} of {len(flags)}"))
    pairs.append(("seconds that stages ran", f"{sum(map(ran_s, paying)):.0f}"))
    return pairs
