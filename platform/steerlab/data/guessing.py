"""Examine the rows of a source and find the settings with which a job reads them: their format, and the names of their
fields."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Mapping, Sequence

from steerlab.data import dialogues, rows, sources, values
from steerlab.data.sources import SourceError
from steerlab.data.values import Row
from steerlab.guards.json_values import JsonObject
from steerlab.job import DataSet

_LOOKED_AT = 50
"""Number of rows of a source that are examined."""
_SHOWN_FIELDS = 12
# The first name that the rows have is taken; these are names of public data sets.
_ASKED = ("instruction", "question", "prompt", "query", "problem", "request", "goal", "user")
_ABOUT = ("input", "context", "data", "passage")
_ANSWERED = ("output", "response", "answer", "completion", "solution", "target", "reply", "assistant")
_ROWS = ("messages", "conversations", "chosen", "image")
_WRITTEN = ("text", "content", "sentence", "body", "document", "comment", "review", "caption", "tweet", "prompt", "question")


def settings_of(source: str, role: str = "train") -> JsonObject:
    """Return the settings of a data set, besides its source, with which a job can read it: `format`, `field`, `rename`.

    Args:
        source: The source.
        role: What the data set is for in a job: pairs belong to `preference` only, and `source` and `target` are texts where
            the rows allow it.

    Raises:
        ValueError: no format fits; the message names the fields that the rows have, and how to name them.
    """
    looked_at = _first(source)
    names = list(dict.fromkeys(name for row in looked_at for name in row))
    for settings in _candidates(looked_at, names, role):
        if _fits(source, settings):
            return settings
    raise ValueError(
        f"{sources.short(source)}: no format fits its rows, which have {_described(looked_at, names)}; set how they are read: "
        "format instruction needs a question and an answer, {rename: {OLD: instruction, OTHER: output}}; text one field, "
        "{field: NAME}; preference a prompt with chosen and rejected; conversation a list of messages"
    )


def _first(source: str) -> list[dict[str, object]]:
    looked_at = []
    for row in itertools.islice(sources.each_row(source, is_row=_is_row), _LOOKED_AT):
        if isinstance(row, SourceError):
            raise row
        looked_at.append(row)
    if not looked_at:
        raise SourceError(f"{source} has no rows")
    return looked_at


def _is_row(content: Row) -> bool:
    """Return whether the only object of a file is a row, and not one that holds a list of rows."""
    return any(_of([str(name) for name in content], known) for known in (_ASKED, _ANSWERED, _WRITTEN, _ROWS))


def _candidates(looked_at: Sequence[Row], names: Sequence[str], role: str) -> Iterator[JsonObject]:
    """Yield the settings that may fit, the likeliest first."""
    if role == "preference":
        yield {"format": "preference"}
        yield from _renamed_pairs(names)
        return
    if "image" in names:
        yield {"format": "image", "field": _of(names, _WRITTEN) or "text"}
    asked, about, answered = _of(names, _ASKED), _of(names, _ABOUT), _of(names, _ANSWERED)
    field = _of(names, _WRITTEN) or _only_text(looked_at, names)
    # A method that moves activations reads texts; a training prefers rows with an answer.
    texts: list[JsonObject] = [] if field is None else [{"format": "text", **({} if field == "text" else {"field": field})}]
    if role in ("source", "target") and "instruction" not in names:
        yield from texts
    if set(names) & set(dialogues.KNOWN_BY) - {"completion"} or {"prompt", "completion"} <= set(names):
        yield {"format": "conversation"}
    if asked is not None and answered is not None:
        wanted = {asked: "instruction", answered: "output", **({} if about is None else {about: "input"})}
        rename: JsonObject = {old: new for old, new in wanted.items() if old != new}
        yield {"format": "instruction", **({"rename": rename} if rename else {})}
    yield from texts


def _renamed_pairs(names: Sequence[str]) -> Iterator[JsonObject]:
    asked = _of(names, _ASKED)
    for better, worse in (("chosen", "rejected"), ("preferred", "dispreferred"), ("winner", "loser"), ("better", "worse")):
        if better in names and worse in names and asked is not None:
            wanted = {asked: "prompt", better: "chosen", worse: "rejected"}
            yield {"format": "preference", "rename": {old: new for old, new in wanted.items() if old != new}}


def _of(names: Sequence[str], known: Sequence[str]) -> str | None:
    """Return the name of a field that is known, in any case."""
    lower = {name.lower(): name for name in reversed(names)}
    return next((lower[name] for name in known if name in lower), None)


def _only_text(looked_at: Sequence[Row], names: Sequence[str]) -> str | None:
    """Return the only field that holds texts in every row; None if there are several, or none."""
    texts = [name for name in names if all(isinstance(row.get(name), str) for row in looked_at)]
    return texts[0] if len(texts) == 1 else None


def _fits(source: str, settings: Mapping[str, object]) -> bool:
    """Return whether the first rows can be read with some settings."""
    try:
        data = DataSet.model_validate({"source": source, "limit": _LOOKED_AT, **settings})
        # A row may be skipped with a warning; here all of the first rows have to fit.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bool(rows.read(data))
    except ValueError:
        return False


def _described(looked_at: Sequence[Row], names: Sequence[str]) -> str:
    some = [f"{name} ({_kind(looked_at, name)})" for name in names[:_SHOWN_FIELDS]]
    more = f" and {len(names) - _SHOWN_FIELDS} more" if len(names) > _SHOWN_FIELDS else ""
    return f"the fields {', '.join(some)}{more}" if some else "no fields"


def _kind(looked_at: Sequence[Row], name: str) -> str:
    return values.kind(next((row[name] for row in looked_at if name in row), None))
