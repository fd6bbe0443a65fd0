"""Texts whose tokens are coloured by a value, and histograms: the samples of `evaluation.statistics.sample_kinds` on the page.

A run folder may come from a stranger, so a sample whose lists do not have matching lengths is skipped, and the template escapes
the texts of tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypedDict

from steerlab.evaluation.statistics.sample_kinds import HISTOGRAM, TOKENS
from steerlab.guards.texts import without_secrets
from steerlab.job import UNPATCHED_NAME
from steerlab.report.contents import Document, Entry
from steerlab.report.plotting import MAX_METRICS, Drawing, Figure, label
from steerlab.report.samples import column

MAX_MAPS = 6
"""Largest number of items of each task whose coloured texts are shown."""
MAX_TOKENS = 600
"""Largest number of tokens of a text that are shown."""
_MOST_BINS = 2000


class Token(TypedDict):
    """One token of a coloured text."""

    text: str
    shown: str
    """The token's value as text; empty if it has none."""
    sign: str
    """Class of the page's style: plus, minus, or empty for a token without a value."""
    share: str
    """Absolute value divided by the largest one of the task, from 0.00 to 1.00."""


class HeatMap(TypedDict):
    """One item with the coloured texts of all runs and strengths."""

    task: str
    title: str
    unit: str
    largest: str
    """Largest absolute value of the task, which is drawn in full colour."""
    texts: dict[str, list[Token]]
    """Name of the run, with its strength if it has several -> tokens."""
    num_cut: int
    """Number of tokens at the end of the longest text that are not shown."""


def heat_maps(entries: Sequence[Entry]) -> list[HeatMap]:
    """Return the coloured texts of all runs, at most MAX_MAPS items of each task. A task has one scale of colours."""
    by_task: dict[str, dict[str, dict[str, tuple[Document, list[float | None]]]]] = {}
    for entry in entries:
        for task, samples in entry.samples.items():
            for sample in samples:
                values = _values(sample)
                if values is not None:
                    items = by_task.setdefault(task, {})
                    if str(sample.get("id")) in items or len(items) < MAX_MAPS:
                        items.setdefault(str(sample.get("id")), {}).setdefault(column(entry, sample), (sample, values))
    return [heat_map for task, items in by_task.items() for heat_map in _of_task(task, items)]


def _of_task(task: str, items: Mapping[str, Mapping[str, tuple[Document, list[float | None]]]]) -> Iterator[HeatMap]:
    largest = max(
        (abs(value) for texts in items.values() for _, values in texts.values() for value in values if value is not None),
        default=0.0,
    )
    for texts in items.values():
        first, _ = next(iter(texts.values()))
        # The model without a patch comes first; the sort is stable, so the runs keep their order.
        ordered = sorted(texts.items(), key=lambda text: text[0] != UNPATCHED_NAME)
        yield {
            "task": task,
            "title": str(first.get("title") or ""),
            "unit": str(first.get("unit") or ""),
            "largest": f"{largest:.3g}",
            "texts": {name: _tokens(sample["tokens"], values, largest) for name, (sample, values) in ordered},
            "num_cut": max(0, max(len(values) for _, values in texts.values()) - MAX_TOKENS),
        }


def _values(sample: Document) -> list[float | None] | None:
    """Return the values of a sample with a value for each token; None for samples of other kinds and for damaged ones."""
    tokens, values = sample.get("tokens"), sample.get("values")
    if sample.get("kind") != TOKENS or not isinstance(tokens, list) or not isinstance(values, list):
        return None
    if not tokens or len(tokens) != len(values) or not all(isinstance(token, str) for token in tokens):
        return None
    if not all(value is None or _is_finite(value) for value in values):
        return None
    # A password in a URI can only be recognised in the whole text, so a text with one is not shown at all.
    text = "".join(tokens)
    return values if without_secrets(text) == text else None


def _is_finite(value: object) -> bool:
    # An integer may have thousands of digits, and `math.isfinite` raises for one that does not fit into a float.
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300 and math.isfinite(value)


def _tokens(tokens: Sequence[str], values: Sequence[float | None], largest: float) -> list[Token]:
    return [
        {
            "text": token,
            "shown": "" if value is None else f"{value:.3g}",
            "sign": "" if value is None else "minus" if value < 0 else "plus",
            "share": f"{abs(value or 0.0) / (largest or 1.0):.2f}",
        }
        for token, value in list(zip(tokens, values, strict=True))[:MAX_TOKENS]
    ]


def histograms(entries: Sequence[Entry]) -> Figure | None:
    """Draw the histograms of all runs, a line for each group of values; the menu lists the tasks and what they count."""
    drawn, names = Drawing(), dict[str, str]()
    for entry in entries:
        for task, samples in entry.samples.items():
            for sample in samples:
                if not _is_histogram(sample):
                    continue
                name = f"{task}, {sample.get('unit') or sample.get('id')}"
                names.setdefault(name, "share of the values")
                for group, shares in sample["groups"].items():
                    _add(drawn, name, f"{column(entry, sample)}: {group}", sample["edges"], shares)
    if not names:
        return None
    drawn.axis("xaxis", "value")
    return drawn.done(380, dict([*names.items()][:MAX_METRICS]))


def _add(drawn: Drawing, name: str, group: str, edges: Sequence[float], shares: Sequence[float]) -> None:
    colour = f"@{len(drawn.data) % 10}"
    # The line has a step at each edge; the added 0 closes the last bin.
    drawn.add_scatter(
        x=list(edges), y=[*shares, 0.0], mode="lines", name=label(group), meta={"metric": name},
        line={"color": colour, "width": 1.6, "shape": "hv"},
        hovertemplate=f"from %{{x:.3g}}: %{{y:.3f}}<extra>{label(group)}</extra>",
    )  # fmt: skip


def _is_histogram(sample: Document) -> bool:
    """Return whether a sample is a histogram whose lists fit together."""
    edges, groups = sample.get("edges"), sample.get("groups")
    if sample.get("kind") != HISTOGRAM or not isinstance(edges, list) or not isinstance(groups, dict):
        return False
    if not 2 <= len(edges) <= _MOST_BINS or not all(map(_is_finite, edges)):
        return False
    return bool(groups) and all(
        isinstance(shares, list) and len(shares) == len(edges) - 1 and all(map(_is_finite, shares))
        for shares in groups.values()
    )
