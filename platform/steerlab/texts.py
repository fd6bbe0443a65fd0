"""Texts of strangers as they are shown on a terminal or in a page: what a model, a file or a name holds moves no cursor."""

from __future__ import annotations

import re

_LONGEST = 2000
"""Characters of a message; what is longer is cut in the middle."""
_MOVING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # control characters, the line break and the tab aside: escapes of a terminal among them
    "\u200e\u200f\u202a-\u202e\u2066-\u2069\u061c"  # marks that turn the direction of a text
    "\u2028\u2029\ufff9-\ufffb]"  # other line breaks, annotations
)


def plain(text: str) -> str:
    """Write control characters and direction marks out, as Python does: \\x1b, \\u202e."""
    return _MOVING.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def shown(message: str) -> str:
    """Return a message for people: plain, and cut in its middle where it is longer than a page."""
    message = plain(message)
    if len(message) <= _LONGEST:
        return message
    half = _LONGEST // 2 - 20
    return f"{message[:half]} [...] {message[-half:]}"
