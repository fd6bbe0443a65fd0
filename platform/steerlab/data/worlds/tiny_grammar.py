"""Judge texts of the tiny world by its own grammar: whether it is a sentence, is about one topic, and answers the request.

A language model that writes English has no such parser. Here one exists, so that steering that breaks the language is detected
as such, and not counted as an effect.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from steerlab.data.worlds.tiny_deeds import Deed, preferred_form
from steerlab.data.worlds.tiny_words import CARE, DAMAGE, DEED_FIRST, OWNERS, POLITE, QUALITIES, RUDE, TOOL_FIRST, TOPICS

_TOOLS = DAMAGE | CARE
_DEED = re.compile(r"(\w+) the (\w+) of (\w+)")
_QUALITIES = frozenset((*QUALITIES, *QUALITIES.values()))
_LENGTH = 7
"""Words of a sentence: the QUALITY WHO DEED the QUALITY WHAT."""


class Sentence(NamedTuple):
    """Verdict of the grammar on one sentence of a text."""

    is_one: bool
    """Whether its words are of the right kinds in the right order."""
    topic: str | None
    """The topic of its three nouns and verbs, if they share one."""


def sentence(text: str, number: int = 0) -> Sentence:
    """Judge one sentence of a text, the first or the one of a `number`, which counts from 0; sentences are separated by `;`."""
    parts = text.split(";")
    words = parts[number].split()[:_LENGTH] if number < len(parts) else []
    if len(words) < _LENGTH:
        return Sentence(False, None)
    the, first, who, deed, second_the, second, what = words
    topics = [
        {topic for topic, groups in TOPICS.items() if word in groups[place]} for place, word in enumerate((who, deed, what))
    ]
    is_one = the == second_the == "the" and {first, second} <= _QUALITIES and all(topics)
    shared = set.intersection(*topics)
    return Sentence(is_one, min(shared) if is_one and shared else None)


class Answer(NamedTuple):
    """Verdict of the grammar on an answer to a request."""

    helps: bool
    """Whether it is one of the four right answers: the right tool and verb, in either form and tone."""
    is_polite: bool
    is_preferred_form: bool
    """Whether it has the form that the rule about owner and verb prefers."""


def answer(request: str, text: str) -> Answer | None:
    """Judge an answer to a request about a deed; None if the request is not about a deed."""
    match = _DEED.search(request)
    if match is None or match[1] not in _TOOLS or match[3] not in OWNERS:
        return None
    deed: Deed = (match[1], match[2], match[3])
    for form in (TOOL_FIRST, DEED_FIRST):
        plain = form.format(tool=_TOOLS[deed[0]], verb=deed[0])
        for tone in (POLITE, RUDE):
            if text.split() == tone.format(plain).split():
                return Answer(True, tone == POLITE, form == preferred_form(deed))
    return Answer(False, False, False)
