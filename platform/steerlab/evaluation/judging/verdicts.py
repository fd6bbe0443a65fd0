"""Parse the verdict in a judge's answer: a rating, or the better one of two answers.

A verdict is in double brackets, as the published judges ask for it: `[[7]]`, `[[A>>B]]`, `[[C]]`. The last one counts, because
judges reason first. A verdict that cannot be parsed is None and is counted as unparsable, never guessed.
"""

from __future__ import annotations

import re

from steerlab.evaluation.judging.asking import Said
from steerlab.evaluation.statistics.metrics import TOO_LONG, Score

_NUMBER = r"(-?[0-9]+(?:\.[0-9]+)?)"
_BRACKETED = re.compile(rf"\[\[\s*{_NUMBER}\s*(?:/\s*[0-9]+\s*)?\]\]")
_SAID = re.compile(rf"\brating\b\W{{0,8}}{_NUMBER}", re.IGNORECASE)
"""A rating without brackets: `**Rating:** 2`."""
_LABEL = re.compile(r"\[\[\s*([AB12])\s*(?:(>>|>|=|<<|<)\s*([AB12]))?\s*\]\]|\[\[\s*(C|TIE)\s*\]\]", re.IGNORECASE)
_FIRST = ("A", "1")
_ALONE = re.compile(r"(?<![\w.])([12])(?![\w]|\.[0-9])")


def rating(said: Said, low: float, high: float) -> Score:
    """Return the rating in an answer; None without one between `low` and `high`."""
    if said == TOO_LONG:
        return TOO_LONG
    grades = _BRACKETED.findall(said) or _SAID.findall(said)
    value = float(grades[-1]) if grades else None
    # A number outside of the scale is a misunderstanding; clipped to the scale, it would count as the best or worst rating.
    return value if value is not None and low <= value <= high else None


def better(said: Said) -> Score:
    """Return 1 if the answer that was shown first is called better, 0 for the second, 0.5 for a tie; None if unparsable."""
    if said == TOO_LONG:
        return TOO_LONG
    labels = list(_LABEL.finditer(said))
    if labels:
        return _of_label(labels[-1])
    # An answer without a label is parsed only if it names exactly one answer: "1", or "Response 2 is better."
    named = set(_ALONE.findall(said))
    return float(named == {"1"}) if len(named) == 1 else None


def _of_label(label: re.Match[str]) -> Score:
    one, sign, other, tie = label.groups()
    if tie or sign == "=":
        return 0.5
    first = one.upper() in _FIRST
    if sign is None:
        return float(first)
    if first == (other.upper() in _FIRST):
        return None  # [[A>A]] is not a verdict
    return float(first == sign.startswith(">"))
