"""The model card (README.md) of an exported folder: method, data, numbers and how to use it, in the Hugging Face format."""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import yaml

from steerlab import methods
from steerlab.data import sources
from steerlab.guards import texts
from steerlab.guards.version import VERSION
from steerlab.job import JobError
from steerlab.run import folder as folders
from steerlab.storage.store import Store

_LIBRARIES = {"checkpoint": "transformers", "peft": "peft", "gguf": "gguf"}
"""Name of the library on the hub by the format of the export; other formats have no name there."""
_OF_DATA = ("format", "field", "limit", "offset", "where", "equals", "shuffle")
"""Settings of a data set that say which rows were taken, for the card."""


def written(
    lines: str,
    format_name: str,
    strength: float,
    *,
    note: str | None = None,
    base: str | None = None,
    is_drawing: bool = False,
    run: tuple[Store, str] | None = None,
) -> str:
    """Return the card.

    Args:
        lines: How the folder is used, as Markdown.
        format_name: `checkpoint`, or a format of `steered.foreign_formats`.
        strength: Strength at which the patch was exported.
        note: What differs from the patched model; None if nothing does.
        base: Hub id of the model; None if it has none.
        is_drawing: Whether the model is a diffusion pipeline.
        run: ROOT and the folder of the run; None for a folder that was itself exported, which does not record its run.
    """
    job = {} if run is None else folders.job(*run)
    tags = ["steerlab", *([job["method"]["name"]] if job else [])]
    library = "diffusers" if is_drawing else _LIBRARIES.get(format_name)
    head: dict[str, object] = {"tags": tags}
    if library is not None:
        head = {"library_name": library, **head}
    if base is not None and "/" in base and not base.startswith(("/", ".", "~")):
        head["base_model"] = base
    parts = [
        f"---\n{yaml.safe_dump(head, sort_keys=False).strip()}\n---",
        f"# {_plain(job.get('name', 'Exported model'))}",
        *([] if run is None else [_method(job)]),
        f"Exported as {format_name} at strength {strength:g}." + ("" if note is None else f"\n\nNot exact: {_plain(note)}."),
        f"## Use\n\n{lines}",
        *([] if run is None else [_data(job), _numbers(*run, strength), _origin(*run)]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _method(job: Mapping[str, Any]) -> str:
    """Return the method's description with its paper, and its settings."""
    config = job["method"]
    settings = yaml.safe_dump(_shared(dict(config)), sort_keys=False, allow_unicode=True).strip()
    return "\n\n".join(filter(None, [f"## Method\n\n{_about(config)}", f"```yaml\n{settings}\n```"]))


def _about(config: Mapping[str, object]) -> str:
    """Return the first two paragraphs of the docstring of a method's file, which name it and its paper."""
    try:
        module = sys.modules.get(methods.TABLE.of(config).Config.__module__)
    except (JobError, ValueError):
        module = None  # the user's own file, or a method of another version
    words = (inspect.getdoc(module) or "").split("\n\n")[:2]
    return "\n\n".join(words) or f"Method `{_plain(config.get('name'))}`."


def _data(job: Mapping[str, Any]) -> str:
    """Return which rows the run read, by the role of the data set."""
    rows = []
    for role, data in (job.get("data") or {}).items():
        if isinstance(data, dict) and "source" in data:
            chosen = {name: data[name] for name in _OF_DATA if data.get(name) not in (None, {}, 0)}
            said = ", ".join(f"{name} {value}" for name, value in _shared(chosen).items())
            rows.append(f"| {_cell(role)} | {_cell(_shared(data['source']))} | {_cell(said)} |")
    if not rows:
        return ""
    return "\n".join(["## Data", "", "| role | source | rows |", "|---|---|---|", *rows])


def _numbers(store: Store, folder: str, strength: float) -> str:
    """Return the run's metrics at the exported strength and, if they were measured, those without the patch."""
    summary = folders.summary(store, folder)
    measured: Mapping[float, Mapping[str, Any]] = summary["strengths"]
    # A model without a patch reports no strength, so its metrics are taken as they are.
    own = measured.get(strength) or (summary["metrics"] if not summary.get("reported") else None)
    if own is None:
        known = ", ".join(f"{value:g}" for value in sorted(measured))
        return f"## Numbers\n\nNothing was measured at strength {strength:g}; the run measured {known or 'nothing'}."
    plain = measured.get(0.0) if strength != 0 and summary.get("reported") else None
    titles = ["metric", f"strength {strength:g}", *([] if plain is None else ["without the patch"]), "items"]
    rows = [
        [name, _number(metric), *([] if plain is None else [_number(plain.get(name))]), str(metric.get("n") or "")]
        for name, metric in own.items()
    ]
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in (titles, *rows)]
    return "\n".join(["## Numbers", "", lines[0], f"|{'---|' * len(titles)}", *lines[1:]])


def _number(metric: Mapping[str, object] | None) -> str:
    if metric is None or metric.get("value") is None:
        return "-"
    error = metric.get("stderr")
    return f"{metric['value']:.4g}" + ("" if error is None else f" ± {error:.2g}")


def _origin(store: Store, folder: str) -> str:
    environment = folders.environment(store, folder)
    versions = environment.get("versions") or {}
    assert isinstance(versions, dict)
    named = ", ".join(f"{_plain(name)} {_plain(version)}" for name, version in versions.items() if version)
    commit = environment.get("git")
    return (
        f"Made by steerlab {VERSION} in run {_plain(folder.rpartition('/')[2])}"
        + (f", commit {_plain(str(commit)[:12])}" if commit else "")
        + (f", with {named}." if named else ".")
    )


def _shared(value: object) -> Any:
    """Return a value of a job without secrets, and with paths shortened to their last name, since folders are private."""
    if isinstance(value, dict):
        return {name: _shared(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_shared(item) for item in value]
    if isinstance(value, str) and re.match(r"[/~.]|[A-Za-z]:\\", value) and "\n" not in value:
        return PurePath(value).name
    return texts.plain(value) if isinstance(value, str) else value


def hub_id(source: str | None) -> str | None:
    """Return the hub id, or the path, by which other programs know a source; None for a source that only this package knows."""
    if source is None:
        return None
    parsed = sources.parse(source)
    return parsed.name if parsed.kind in ("hf", "path") and not parsed.inside else None


def _cell(value: object) -> str:
    return _plain(value).replace("|", "\\|")


def _plain(value: object) -> str:
    """Return a text for one line of Markdown: without control characters, line breaks and HTML."""
    return " ".join(texts.plain(str(value)).split()).replace("<", "&lt;")
