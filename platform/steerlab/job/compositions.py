"""Parse the templates of `compose`, which make a text from several fields of a row.

    "{question}\\n{choices}"      fields and paths (data/values.py) in braces; {{ and }} are written for braces
    "{choices}"                  a list of texts as lettered lines: A. first, B. second
    "{choices:lines}"            a list of texts, one per line
    "{choices:commas}"           a list of texts, separated by commas

Numbers and booleans are written as JSON writes them; null and objects are refused.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence


def _lettered(texts: Sequence[str]) -> str:
    # More choices than letters would get letters that no answer can name.
    if len(texts) > len(string.ascii_uppercase):
        raise ValueError(f"holds {len(texts)} choices, more than the alphabet has letters; write them with :lines")
    return "\n".join(f"{letter}. {text}" for letter, text in zip(string.ascii_uppercase, texts, strict=False))


# Keys are the format specifications of Python's `str.format`; "" is a field without one.
JOINS: dict[str, Callable[[Sequence[str]], str]] = {
    "": _lettered,
    "letters": _lettered,
    "lines": "\n".join,
    "commas": ", ".join,
}


def check(template: str) -> None:
    """Raise ValueError if a template does not follow the syntax above."""
    for _, field, join, conversion in pieces(template):
        if field == "" or conversion:
            raise ValueError(f"the template {template!r} has braces without a plain field name in them; {{{{ is a brace")
        if join is not None and join not in JOINS:
            raise ValueError(f"the template {template!r} joins lists by {join!r}; known are {', '.join(filter(None, JOINS))}")


def pieces(template: str) -> list[tuple[str, str | None, str | None, str | None]]:
    """Split a template into (text, field after it, how its list is joined, conversion). Raises ValueError if a brace is open.

    Field, join and conversion are None after the last field.
    """
    try:
        # Python's own parser of format strings is used, so that {{ and }} have the same meaning.
        return list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(f"the template {template!r} cannot be read ({error}); {{{{ and }}}} are braces") from None


def fields(template: str) -> list[str]:
    """Return the fields that a template names, in their order, as written: with paths."""
    return [field for _, field, _, _ in pieces(template) if field is not None]
