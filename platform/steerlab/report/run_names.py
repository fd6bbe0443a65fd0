"""Names of runs on one page, groups of runs, and readable values of parameters."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from steerlab.report.contents import Entry

_MOST_DIFFERENCES = 3


def said(name: str, value: object) -> str:
    """Return the value of a parameter in readable form: an angle in radians as a multiple of π."""
    if isinstance(value, float) and name.endswith("_rad") and value:
        for denominator in (1, 2, 3, 4, 6, 8):
            numerator = value * denominator / math.pi
            if abs(numerator - round(numerator)) < 1e-4:
                whole = round(numerator)
                return f"{'' if whole == 1 else '-' if whole == -1 else whole}π{'' if denominator == 1 else f'/{denominator}'}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def told_apart(entries: Sequence[Entry]) -> list[Entry]:
    """Return runs with distinct names: runs of one name get the differing fields of their jobs, or else the id of the run."""
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
    # Names may still agree, for two runs of one job or for jobs that differ in fields that are not shown.
    same = [other for other in alike if other is not entry and _shown(other, differing) == _shown(entry, differing)]
    return replace(entry, name=f"{called}, {entry.folder.rpartition('/')[2]}" if same else called)


def _shown(entry: Entry, differing: Sequence[str]) -> list[object]:
    own = dict(_leaves(entry.job))
    return [own.get(key) for key in differing[:_MOST_DIFFERENCES]]


def _leaves(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Yield the scalars of a job by their path."""
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
