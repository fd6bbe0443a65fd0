"""Legibility of answers: metrics that every task that generates text reports besides its own.

Steering that is too strong destroys a text, and a destroyed text has often lost the unwanted property too. These metrics are
computed from the texts that the task generates anyway, so they cost nothing:

    <task>/empty        share of answers that are empty or blank, which a judge cannot judge      lower is better
    <task>/unfinished   share of answers that were cut at `max_new_tokens`                                  lower is better
    <task>/repetition   1 - distinct 4-grams / 4-grams of one answer, mean over answers: 0 for a text that never repeats itself,
                        near 1 for a loop (seq-rep-4 of Welleck et al., arXiv 1908.04319)                   lower is better
    <task>/letters      share of letters and digits among the characters that are not blank: about 0.95 in prose of any script,
                        near 0 in a string of punctuation                                                   higher is better

N-grams consist of lower-cased words and punctuation marks. An answer with fewer than four of them has no `repetition`, an empty
one no `letters`: they are skipped in these means. Continuations of plain texts are always cut, so for them no direction of
`unfinished` is better.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING

from steerlab.evaluation.statistics.measures import Measure, empty, share
from steerlab.evaluation.statistics.metrics import Observation

if TYPE_CHECKING:
    from steerlab.steered.generated_text import Generation

N_GRAM = 4
"""Length of the n-grams of `repetition`."""
_WORD_OR_MARK = re.compile(r"[\w'\u2019]+|[^\w\s]")
_LETTERS = ("L", "M", "N")
"""Unicode categories of letters, of the marks that scripts such as Devanagari write vowels with, and of digits."""


def measures(suffix: str = "", *, always_cut: bool = False) -> tuple[Measure, ...]:
    """Return the measures of the numbers that `observe` reports.

    Args:
        suffix: end of the metrics' names.
        always_cut: whether the task cuts its texts by design, as tasks on continuations do.
    """
    unfinished = share(f"unfinished{suffix}", None if always_cut else "lower")
    return (empty(f"empty{suffix}"), unfinished, *texts_measures(suffix))


def texts_measures(suffix: str = "") -> tuple[Measure, ...]:
    """Return the measures of the numbers that `observe_texts` reports besides `empty`."""
    # These are means of proportions of a text, not shares of items, so Wilson's interval does not apply.
    repetition = Measure(f"repetition{suffix}", "lower", "share of n-grams", 0.0, 1.0, "mean")
    return (repetition, Measure(f"letters{suffix}", "higher", "share of characters", 0.0, 1.0, "mean"))


def observe(task: str, item_id: str, outputs: Sequence[Generation], strength: float, suffix: str = "") -> list[Observation]:
    """Measure the answers of one item; an item with several answers has the means over them."""
    cut = sum(not output.finished for output in outputs) / len(outputs)
    unfinished = Observation(f"{task}/unfinished{suffix}", item_id, cut, 1.0, strength)
    return [*observe_texts(task, item_id, [output.text for output in outputs], strength, suffix), unfinished]


def observe_texts(task: str, item_id: str, texts: Sequence[str], strength: float, suffix: str = "") -> list[Observation]:
    """Measure the texts of one item, without information about their generation."""
    # Blank answers count as empty, since an over-steered model often writes only line breaks.
    blank = sum(not text.strip() for text in texts) / len(texts)
    return [
        Observation(f"{task}/empty{suffix}", item_id, blank, 1.0, strength),
        _mean(f"{task}/repetition{suffix}", item_id, [repetition(text) for text in texts], strength),
        _mean(f"{task}/letters{suffix}", item_id, [letters(text) for text in texts], strength),
    ]


def repetition(text: str) -> float | None:
    """Return 1 - distinct 4-grams / 4-grams of a text; None if it has no 4-gram."""
    distinct = distinct_share(text, N_GRAM)
    return None if distinct is None else 1.0 - distinct


def distinct_share(text: str, n: int) -> float | None:
    """Return the number of distinct n-grams of a text over the number of its n-grams; None if it has no n-gram."""
    words = _WORD_OR_MARK.findall(text.lower())
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def letters(text: str) -> float | None:
    """Return the share of letters and digits among the characters that are not blank; None if all are blank."""
    written = [character for character in text if not character.isspace()]
    return sum(unicodedata.category(c)[0] in _LETTERS for c in written) / len(written) if written else None


def _mean(metric: str, item_id: str, values: Sequence[float | None], strength: float) -> Observation:
    numbers = [value for value in values if value is not None]
    # The weight is 0 instead of a value None: an answer of three words was judged, but has no 4-gram.
    if not numbers:
        return Observation(metric, item_id, 0.0, 0.0, strength)
    return Observation(metric, item_id, sum(numbers) / len(numbers), 1.0, strength)
