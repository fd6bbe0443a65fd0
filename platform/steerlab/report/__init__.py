"""Render runs and sweeps as one static HTML page: results with intervals, figures, texts, images and settings.

The page is one file that needs no server and no network. It follows the reader's light or dark theme, fits the screen of a
phone and works by keyboard. Texts that a model wrote are escaped, so that browsers show them and never interpret them as HTML.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import TypeAlias

import yaml
from markupsafe import Markup

from steerlab.data.sources import remote
from steerlab.guards.called_package import CalledPackage
from steerlab.guards.texts import everywhere, plain
from steerlab.report import figures, headline, heat_maps, modules, predictions, run_names, samples, sweep_figures, tables
from steerlab.report.contents import Document, Entry, fit_seconds, measure_in, read
from steerlab.report.plotting import Figure, front
from steerlab.report.samples import texts
from steerlab.report.sweep_contents import Sweep, read_sweep
from steerlab.report.tables import cell, metrics, rows

# `import steerlab as sl` also gives the function `sl.report(...)`, which this package would otherwise hide.
sys.modules[__name__].__class__ = CalledPackage

__all__ = ["Entry", "Sweep", "cell", "fit_seconds", "front", "metrics", "page", "read", "read_sweep", "rows", "texts", "write"]
Placed: TypeAlias = dict[str, object]
"""A figure as the template uses it: its number on the page, name, height in pixels, and metrics to choose from."""
_NUM_SHOWN = 2
"""Number of a sweep's best trials whose texts and images are shown."""
# libyaml's dumper is several times faster; PyYAML has it only if it was built with libyaml.
_DUMPER: type[yaml.SafeDumper] = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


def page(entries: Sequence[Entry], title: str = "steerlab report", sweeps: Sequence[Sweep] = ()) -> str:
    """Render the page as HTML.

    Args:
        entries: runs.
        title: title of the page.
        sweeps: sweeps, with the runs of their best trials.
    """
    # Imported here, because these imports are slow and most commands write no page.
    import jinja2
    from plotly.offline import get_plotlyjs

    # importlib.resources is used because the package may be imported from an archive.
    template = resources.files("steerlab.report").joinpath("page.html").read_text(encoding="utf-8")
    drawn: list[Figure] = []

    def put(figure: Figure | None, name: str) -> Placed | None:
        """Add a figure to the page; None if there is nothing to draw."""
        if figure is None:
            return None
        drawn.append(figure)
        return {"id": len(drawn) - 1, "name": name, "height": figure["layout"]["height"], "metrics": figure["metrics"]}

    # Everything is escaped by default, since texts of models, names and folders may come from anywhere.
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_plain
    )
    # Tables, texts and images are keyed by the name of the run, so the names must differ.
    named = run_names.told_apart([*entries, *(run for sweep in sweeps for run in sweep.runs)])
    entries, later = named[: len(entries)], iter(named[len(entries) :])
    sweeps = [replace(sweep, runs=tuple(next(later) for _ in sweep.runs)) for sweep in sweeps]
    shown = named
    with_texts = [*entries, *(run for sweep in sweeps for run in sweep.runs[:_NUM_SHOWN])]
    sections = {
        "sweeps": [_sweep(sweep, put) for sweep in sweeps],
        "runs": [_group(group) for group in run_names.groups(entries)],
        "choices": put(figures.choices(shown), "Effect against fluency"),
        "training": put(figures.training(shown), "Training"),
        "places": put(figures.by_place(shown), "Training by place"),
        "timeline": put(figures.timeline(shown), "Stages"),
        "layers": put(figures.by_layer(shown), "By layer"),
        "histograms": put(heat_maps.histograms(shown), "Histograms"),
        "spectra": put(modules.spectra(shown), "Spectra"),
        "modules": put(modules.numbers(shown), "By module"),
        "charts": [_chart(numbers, put) for numbers in samples.charts(with_texts)],
        "texts": texts(with_texts),
        "heat_maps": heat_maps.heat_maps(with_texts),
        "galleries": samples.galleries(with_texts),
        "made": [_made(entry) for entry in shown],
    }
    return environment.from_string(template).render(
        title=title,
        counts=_counts(entries, sweeps),
        figures_json=_script(drawn),
        # Plotly's script has 4.5 MB, so a page without figures does not contain it.
        plotly=get_plotlyjs() if drawn else "",
        **sections,
    )


def _group(entries: Sequence[Entry]) -> dict[str, object]:
    """Return the table of runs that measured the same tasks."""
    names = metrics(entries)
    tasks = dict.fromkeys(name.partition("/")[0] for name in names)
    body = tables.overview(entries, names)
    return {"title": ", ".join(tasks) or "no tasks", "names": names, "rows": body, "notes": headline.notes(entries, names)}


def _chart(numbers: samples.Chart, put: Callable[[Figure | None, str], Placed | None]) -> dict[str, object]:
    """Return the figure of a task's numbers, and the rows of the table below it."""
    rows = [(repr(name), f"{value:.4g}") for name, value in numbers["bars"]]
    return {"figure": put(figures.chart(numbers), numbers["title"]), "unit": numbers["unit"], "rows": rows, **numbers}


def _counts(entries: Sequence[Entry], sweeps: Sequence[Sweep]) -> str:
    parts = [(len(sweeps), "sweep"), (sum(len(sweep.trials) for sweep in sweeps), "trial"), (len(entries), "run")]
    return ", ".join(f"{number} {word}{'' if number == 1 else 's'}" for number, word in parts if number)


def _plain(value: object) -> object:
    """Make control characters and marks of writing direction visible, in strings that are not HTML yet."""
    return plain(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _script(drawn: Sequence[Figure]) -> str:
    """Return figures as JSON that is safe inside a script element."""
    text = json.dumps(_finite(everywhere(plain, drawn)), allow_nan=False)
    # A browser ends the script at "</script>" even within a JSON string, so the characters of markup are escaped.
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: object) -> object:
    """Return a JSON tree with null instead of NaN and infinity, which JavaScript cannot parse."""
    if isinstance(value, Mapping):
        return {key: _finite(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(child) for child in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _sweep(sweep: Sweep, put: Callable[[Figure | None, str], Placed | None]) -> dict[str, object]:
    header, body = tables.trials(sweep)
    best = sweep.summary.get("best") or {}
    return {
        "name": sweep.name,
        "folder": remote.joined(sweep.root, sweep.folder),
        "metric": sweep.metric,
        # The template puts this word into a sentence.
        "goal": "more" if sweep.maximises else "less",
        "answer": headline.sentence(sweep),
        "notes": headline.notes(sweep.runs, sweep.metrics),
        "facts": tables.facts(sweep),
        "rules": _rules(sweep),
        "predictions": predictions.lines(sweep),
        "header": header,
        "body": body,
        # At most eight parameters are drawn, since a space may have dozens; `varied` lists those with several values.
        "against": [
            put(figure, name) for name in sweep.varied[:8] if (figure := sweep_figures.against(sweep, name)) is not None
        ],
        "parallel": put(sweep_figures.parallel(sweep), "Parallel coordinates"),
        "pareto": put(sweep_figures.pareto(sweep), "Pareto front"),
        "costs": put(sweep_figures.costs_of(sweep), "Seconds by stage"),
        "even": len(sweep.summary.get("indistinguishable") or ()),
        "splits": _splits(sweep),
        "best": best,
        "reproduce": _run_command(sweep.root, f"{sweep.folder}/best.yaml"),
        "job": _readable(sweep.job),
        "space": json.dumps(sweep.space, indent=1, ensure_ascii=False),
    }


def _rules(sweep: Sweep) -> str:
    """Return the rules by which the best trial was chosen, and the sweep's warnings, as sentences; empty without either."""
    bounds, prices = (", ".join(sweep.summary.get(name) or ()) for name in ("bounds", "prices"))
    sentences = [f"The best trial satisfies {bounds}."] if bounds else []
    sentences += [f"Between trials that cannot be distinguished from it, {prices} decides."] if prices else []
    sentences += [f"Warning: {warning}." for warning in sweep.summary.get("warnings") or ()]
    return " ".join(sentences)


def _splits(sweep: Sweep) -> list[tuple[str, str]]:
    """Return (label, text) of the best trial's metric on the rows that it was chosen by and on the reported rows."""
    lines = []
    for split, note in (("development", "chosen by"), ("test", "reported")):
        value = sweep.summary.get(split)
        # A summary holds a number, a metric {value, low, high, ...}, or an object that maps each metric to one of these.
        if isinstance(value, dict) and "value" not in value:
            value = value.get(sweep.metric or "")
        # `cell` formats metrics, so a bare number becomes a metric without an interval.
        if isinstance(value, int | float):
            value = {"value": value}
        if isinstance(value, dict) and value.get("value") is not None:
            # An interval by Student's t over seeds may exceed the range of a proportion, so its ends are clipped.
            measure = measure_in(sweep.runs, sweep.metric or "")
            ends = {end: measure.within(value[end]) for end in ("low", "high") if value.get(end) is not None}
            value = {**value, **ends}
            lines.append((f"{split} rows, {note}", cell({"unparsable": 0, "low": None, "high": None, **value})))
    return lines


def _made(entry: Entry) -> dict[str, object]:
    """Return the stages, environment and job of a run, and the command that repeats it."""
    # The template refuses a missing key (StrictUndefined), and runs of earlier versions stored fewer of them.
    environment = {"git": None, "git_changes": "", "created": "", "versions": {}, "command": "", "cluster": {}, "nodes": None}
    environment |= {"own_code_of": None, "own_code": []}
    return {
        "name": entry.name,
        "folder": entry.folder,
        "stages": entry.stages,
        "environment": {**environment, **entry.environment},
        "job": _readable(entry.job),
        "reproduce": _command(entry),
    }


def _command(entry: Entry) -> str:
    """Return the shell command that reproduces a run: its resolved job at its commit."""
    command = _run_command(entry.root, f"{entry.folder}/job.yaml")
    commit = entry.environment.get("git")
    # Users paste this into a shell, and the folder may come from a stranger, so only a hash is accepted as the commit.
    return f"git checkout {commit}\n{command}" if commit and re.fullmatch("[0-9a-f]{7,64}", commit) else command


def _run_command(root: str, job: str) -> str:
    """Return the shell command that runs a job file below ROOT."""
    return f"steerlab run {shlex.quote(remote.joined(root, job))} --root {shlex.quote(root)}"


def _readable(job: Document) -> str:
    return str(yaml.dump(job, Dumper=_DUMPER, sort_keys=False, allow_unicode=True, width=100))


def write(entries: Sequence[Entry], path: Path, sweeps: Sequence[Sweep] = ()) -> None:
    """Write the page to a file."""
    path.write_text(page(entries, path.stem, sweeps), encoding="utf-8")
