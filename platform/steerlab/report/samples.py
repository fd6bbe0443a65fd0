"""What models wrote and drew, ready to be set side by side: texts by prompt and strength, images by strength and guidance."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from typing import TypedDict

from steerlab.guards.faults import explained
from steerlab.job import UNPATCHED, UNPATCHED_NAME
from steerlab.report.contents import Document, Entry

MAX_TEXTS = 6
MAX_CHARS = 1200
IMAGE_BYTES = 12_000_000
"""Bytes of all images of a page together; beyond them images are left out, and that is said."""
_THUMBNAIL = 256
"""Larger images are embedded at this many pixels a side."""
_SHEET = 2000
"""Larger contact sheets are embedded at this many pixels a side."""
_OUTPUTS = ("continuation", "output", "output_in_data", "answer", "response", "generation")
_PROMPTS = ("prompt", "instruction", "question")
_CONTEXTS = ("data", "input", "data_with_probe")


class Output(TypedDict):
    """What a run wrote, and its scores in a line."""

    text: str
    facts: str


class Told(TypedDict):
    """A prompt, and what the runs wrote for it by name and strength, as the template of the page reads it."""

    task: str
    prompt: str
    context: str
    outputs: dict[str, Output]


def texts(entries: Sequence[Entry]) -> list[Told]:
    """Return what each run wrote for the same prompts: at strength 0 once, then at every strength that it kept.

    Prompts come first that more runs and strengths have an output for.
    """
    found: dict[tuple[str, str], Told] = {}
    for entry in entries:
        for task, samples in entry.samples.items():
            for sample in samples:
                output = next((name for name in _OUTPUTS if name in sample), None)
                prompt = next((name for name in _PROMPTS if name in sample), None)
                if output is None or prompt is None:
                    continue
                context = next((str(sample[name]) for name in _CONTEXTS if sample.get(name)), "")
                empty: Told = {"task": task, "prompt": str(sample[prompt]), "context": context, "outputs": {}}
                row = found.setdefault((task, str(sample["id"])), empty)
                row["outputs"].setdefault(_column(entry, sample), {"text": _cut(sample[output]), "facts": _facts(sample)})
    counts = [len(row["outputs"]) for row in found.values()]
    most = max(counts, default=0)
    whole = [row for row in found.values() if len(row["outputs"]) > 1 or most == 1]
    by_task: dict[str, list[Told]] = {}
    for row in sorted(whole, key=lambda row: -len(row["outputs"])):
        row["outputs"] = dict(sorted(row["outputs"].items(), key=lambda output: output[0] != UNPATCHED_NAME))
        by_task.setdefault(row["task"], []).append(row)
    return [row for rows in by_task.values() for row in rows[:MAX_TEXTS]]


def _column(entry: Entry, sample: Document) -> str:
    strength = sample.get("strength")
    if strength == UNPATCHED:
        return UNPATCHED_NAME
    several = len({s.get("strength") for samples in entry.samples.values() for s in samples} - {UNPATCHED}) > 1
    return f"{entry.name}, strength {strength:g}" if several and strength is not None else entry.name


def _facts(sample: Document) -> str:
    """Return a sample's scores in a line."""
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
    """Return the images of the runs that drew some: a frame for each strength and guidance, all with the same ids.

    The budget is shared evenly among runs; within a run ids are dropped, never strengths, so that the slider stays whole.
    """
    drawing = [entry for entry in entries if entry.images]
    return [found for entry in drawing if (found := _gallery(entry, budget_bytes // len(drawing)))["frames"]]


def _gallery(entry: Entry, budget_bytes: int) -> dict[str, object]:
    ids = list(dict.fromkeys(name for pictures in entry.images.values() for name, _ in pictures))
    columns: dict[str, dict[str, str]] = {}
    used = 0
    for name in ids:
        column = dict(_column_of(entry, name))
        size = sum(len(uri) for uri in column.values())
        if used + size > budget_bytes:
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
    """Yield the contact sheets that there is room for."""
    assert entry.store is not None
    for guidance, path in entry.sheets.items():
        uri = _embedded(entry.store.read_bytes(path), path, _SHEET)
        budget_bytes -= len(uri)
        if budget_bytes >= 0:
            yield {"guidance": guidance, "uri": uri}


def _setting(name: str) -> tuple[float, float]:
    """Return strength and guidance from the name of a folder of images."""
    strength, _, guidance = name.partition("_")
    try:
        return float(strength), float(guidance or 0)
    except ValueError:
        return 0.0, 0.0


def _column_of(entry: Entry, name: str) -> Iterator[tuple[str, str]]:
    """Yield one image id at every setting, as data URIs."""
    assert entry.store is not None
    for setting, pictures in entry.images.items():
        for found, path in pictures:
            if found == name:
                yield setting, _embedded(entry.store.read_bytes(path), path)


def _embedded(png: bytes, where: str, side: int = _THUMBNAIL) -> str:
    from PIL import Image

    with explained(f"the image {where}"), Image.open(io.BytesIO(png), formats=("PNG",)) as image:
        if max(image.size) > side:
            smaller = image.convert("RGB")
            smaller.thumbnail((side, side))
            buffer = io.BytesIO()
            smaller.save(buffer, "JPEG", quality=85)
            return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
    return "data:image/png;base64," + base64.b64encode(png).decode()
