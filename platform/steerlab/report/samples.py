"""Texts and images of models, arranged for comparison: texts by prompt and strength, images by strength and guidance scale."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TypedDict

from steerlab.evaluation.statistics.generations import PROMPTS, TEXTS
from steerlab.guards.faults import explained
from steerlab.job import UNPATCHED, UNPATCHED_NAME
from steerlab.report.contents import Document, Entry

MAX_TEXTS = 6
"""Largest number of prompts of each task whose texts are shown."""
MAX_CHARS = 1200
"""Largest number of characters of a text; longer ones are cut."""
MAX_CHARTS = 12
"""Largest number of charts of a page."""
MAX_BARS = 60
"""Largest number of bars of a chart."""
IMAGE_BYTES = 12_000_000
"""Largest size of all images of a page together, in bytes; the page states how many images are missing."""
_THUMBNAIL = 256
"""Larger images are scaled down to at most this many pixels on their longer side."""
_SHEET = 2000
"""The same limit for contact sheets."""
_CONTEXTS = ("data", "input", "data_with_probe")


class Output(TypedDict):
    """A text of a run, and its scores."""

    text: str
    facts: str
    """The scores in one line."""


class Comparison(TypedDict):
    """A prompt with the texts of all runs, as the template of the page uses it."""

    task: str
    prompt: str
    context: str
    """The data that belongs to the prompt; empty if there is none."""
    outputs: dict[str, Output]
    """Name of the run, with its strength if it has several -> its text."""


class Chart(TypedDict):
    """Numbers of a task by name, from a sample that asks to draw them as bars."""

    title: str
    """The task, the run with its strength, and the sample's own title."""
    unit: str
    bars: list[tuple[str, float]]


def charts(entries: Sequence[Entry]) -> list[Chart]:
    """Return the numbers that tasks ask to draw, from each sample {"chart": {"title", "unit", "bars": [[name, number]]}}.

    Any task may write such a sample. One without this shape is skipped, since its file may come from a stranger.
    """
    of_all: list[Chart] = []
    for entry in entries:
        for task, samples in entry.samples.items():
            for sample in samples:
                bars = _bars(sample.get("chart"))
                if bars:
                    chart = sample["chart"]
                    title = f"{task}, {column(entry, sample)}: {chart.get('title', '')}"
                    of_all.append({"title": title, "unit": str(chart.get("unit", "")), "bars": bars})
    return of_all[:MAX_CHARTS]


def _bars(chart: object) -> list[tuple[str, float]]:
    """Return the names and finite numbers of a chart, at most MAX_BARS of them; empty if the value is not a chart."""
    rows = chart.get("bars") if isinstance(chart, Mapping) else None
    if not isinstance(rows, list):
        return []
    pairs = [row for row in rows if isinstance(row, list) and len(row) == 2 and isinstance(row[1], int | float)]
    return [(_cut(name), float(value)) for name, value in pairs if math.isfinite(value)][:MAX_BARS]


def texts(entries: Sequence[Entry]) -> list[Comparison]:
    """Return the texts of all runs for the same prompts: first at strength 0, then at every strength with samples.

    Prompts with texts of more runs and strengths come first; each task has at most MAX_TEXTS of them.
    """
    by_prompt: dict[tuple[str, str], Comparison] = {}
    for entry in entries:
        for task, samples in entry.samples.items():
            for sample in samples:
                output = next((name for name in TEXTS if name in sample), None)
                prompt = next((name for name in PROMPTS if name in sample), None)
                if output is None or prompt is None:
                    continue
                context = next((str(sample[name]) for name in _CONTEXTS if sample.get(name)), "")
                # Samples of different runs are matched by the task's name and the item's id, not by the prompt's text.
                empty: Comparison = {"task": task, "prompt": str(sample[prompt]), "context": context, "outputs": {}}
                row = by_prompt.setdefault((task, str(sample.get("id", sample[prompt]))), empty)
                row["outputs"].setdefault(column(entry, sample), {"text": _cut(sample[output]), "facts": _facts(sample)})
    # A prompt with texts of a single run shows no difference, so it is dropped unless all prompts are like that.
    counts = [len(row["outputs"]) for row in by_prompt.values()]
    most = max(counts, default=0)
    whole = [row for row in by_prompt.values() if len(row["outputs"]) > 1 or most == 1]
    by_task: dict[str, list[Comparison]] = {}
    for row in sorted(whole, key=lambda row: -len(row["outputs"])):
        # The model without a patch comes first; the sort is stable, so the runs keep their order.
        row["outputs"] = dict(sorted(row["outputs"].items(), key=lambda output: output[0] != UNPATCHED_NAME))
        by_task.setdefault(row["task"], []).append(row)
    return [row for rows in by_task.values() for row in rows[:MAX_TEXTS]]


def column(entry: Entry, sample: Document) -> str:
    """Return the heading of a sample's column: its run, with its strength if the run has several; strength 0 shares one."""
    strength = sample.get("strength")
    # At strength 0 all runs of one model generate the same text, so they share a column.
    if strength == UNPATCHED:
        return UNPATCHED_NAME
    # The strength is part of a column's name only if the run has samples at several strengths besides 0.
    several = len({s.get("strength") for samples in entry.samples.values() for s in samples} - {UNPATCHED}) > 1
    return f"{entry.name}, strength {strength:g}" if several and isinstance(strength, int | float) else entry.name


def _facts(sample: Document) -> str:
    """Return the first scores of a sample in one line."""
    scores = {name: value for name, value in sample.items() if isinstance(value, bool | float) and name != "strength"}
    shown = [
        f"{name.replace('_', ' ')}: " + (("yes" if value else "no") if isinstance(value, bool) else f"{value:.3g}")
        for name, value in scores.items()
    ]
    return " · ".join(shown[:4])


def _cut(text: object) -> str:
    whole = str(text).strip("\n")
    return whole if len(whole) <= MAX_CHARS else whole[:MAX_CHARS] + " …"


def galleries(entries: Sequence[Entry], budget_bytes: int = IMAGE_BYTES) -> list[dict[str, object]]:
    """Return the images of each run that has any: a frame for each strength and guidance scale.

    Args:
        entries: runs.
        budget_bytes: size of all embedded images; the runs share it evenly.
    """
    drawing = [entry for entry in entries if entry.images]
    return [gallery for entry in drawing if (gallery := _gallery(entry, budget_bytes // len(drawing)))["frames"]]


def _gallery(entry: Entry, budget_bytes: int) -> dict[str, object]:
    """Return a run's images by strength and guidance, of as many ids as `budget_bytes` allows."""
    ids = list(dict.fromkeys(name for pictures in entry.images.values() for name, _ in pictures))
    columns: dict[str, dict[str, str]] = {}
    used = 0
    # To stay within the budget, whole ids are skipped and never strengths: the page's slider needs every strength of an id.
    for name in ids:
        column = dict(_column_of(entry, name))
        size = sum(len(uri) for uri in column.values())
        if used + size > budget_bytes:  # the size of the base64 texts, by which the page grows
            break
        used += size
        columns[name] = column
    frames = []
    for setting in sorted(entry.images, key=_setting):
        strength, guidance = _setting(setting)
        pictures = [{"id": name, "uri": columns[name][setting]} for name in columns if setting in columns[name]]
        if pictures:
            frames.append({"strength": f"{strength:g}", "guidance": f"{guidance:g}", "images": pictures})
    return {
        "name": entry.name,
        "frames": frames,
        "sheets": list(_sheets(entry, budget_bytes - used)),
        "strengths": list(dict.fromkeys(frame["strength"] for frame in frames)),
        "guidances": list(dict.fromkeys(frame["guidance"] for frame in frames)),
        "left_out": len(ids) - len(columns),
    }


def _sheets(entry: Entry, budget_bytes: int) -> Iterator[dict[str, str]]:
    """Yield the contact sheets that fit into the budget."""
    assert entry.store is not None
    for guidance, path in entry.sheets.items():
        uri = _embedded(entry.store.read_bytes(path), path, _SHEET)
        budget_bytes -= len(uri)
        if budget_bytes >= 0:
            yield {"guidance": guidance, "uri": uri}


def _setting(name: str) -> tuple[float, float]:
    """Parse `{strength}_{guidance}`, the name of a folder of images; (0, 0) if the name has another form."""
    strength, _, guidance = name.partition("_")
    try:
        return float(strength), float(guidance or 0)
    # A copied folder of images may have any name.
    except ValueError:
        return 0.0, 0.0


def _column_of(entry: Entry, name: str) -> Iterator[tuple[str, str]]:
    """Yield (setting, data URI) of the image `name` at every strength and guidance scale."""
    assert entry.store is not None
    for setting, pictures in entry.images.items():
        for image_id, path in pictures:
            if image_id == name:
                yield setting, _embedded(entry.store.read_bytes(path), path)


def _embedded(png: bytes, where: str, side: int = _THUMBNAIL) -> str:
    """Return a PNG as a data URI; if it is larger than `side` pixels, scaled down and as JPEG."""
    from PIL import Image

    # Only PNG is accepted: Pillow's other decoders are not needed, and the file may come from a stranger.
    with explained(f"the image {where}"), Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        if max(image.size) > side:
            smaller = image.convert("RGB")  # JPEG has no transparency and no palette
            smaller.thumbnail((side, side))
            buffer = io.BytesIO()
            smaller.save(buffer, "JPEG", quality=85)
            return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return "data:image/png;base64," + base64.b64encode(png).decode()
