"""Draw the pieces of the tiny world's rows: lists of words, tasks, sentences, orders. Each piece belongs to one split."""

from __future__ import annotations

import hashlib
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from steerlab.data.worlds.tiny_words import (
    FACTS,
    INSISTENCE,
    LIST_TASKS,
    ORDERS,
    PHRASES,
    QUALITIES,
    TOPICS,
    WORD_KINDS,
)

T = TypeVar("T")


def pick(rng: random.Random, options: Sequence[T]) -> T:
    """Draw one of the options."""
    # Python promises the same numbers in every version for `random()` only, so `choice` and `randrange` are not used.
    return options[int(rng.random() * len(options))]


def row(instruction: str, input: str, output: str) -> dict[str, str]:
    """Return a row with the fields of an instruction."""
    return {"instruction": instruction, "input": input, "output": output}


def share_of(*content: str) -> float:
    """Return a number from 0 to 1 that depends only on the content and is spread evenly, to divide contents by a share."""
    # CRC-32, which decides the split, is not used: checksums of equally long texts with two prefixes differ by a constant.
    return int.from_bytes(hashlib.sha256(" ".join(content).encode()).digest()[:4]) / 2**32


def _split_of(content: str) -> str:
    """Return the split that a content belongs to: 70 % are in train, 15 % in validation, 15 % in test."""
    # CRC-32 is used, because `hash` differs between processes (PYTHONHASHSEED).
    share = zlib.crc32(content.encode()) % 100
    return "train" if share < 70 else "validation" if share < 85 else "test"


def draw_in_split(rng: random.Random, split: str, draw: Callable[[random.Random], T], content: Callable[[T], str]) -> T:
    """Draw with `draw` until the `content` of the result belongs to the split."""
    while True:
        piece = draw(rng)
        if _split_of(content(piece)) == split:
            return piece


def _words(rng: random.Random, kinds: Sequence[str], number: int) -> list[str]:
    """Draw `number` different words, each of a random one of the kinds."""
    words: list[str] = []
    while len(words) < number:
        word = pick(rng, WORD_KINDS[pick(rng, kinds)])
        if word not in words:
            words.append(word)
    return words


class Task(NamedTuple):
    """A task on data and its answer; `name` is a key of `PHRASES`."""

    name: str
    instruction: str
    data: str
    answer: str


def _list_task(rng: random.Random, name: str) -> Task:
    """Draw a task on a list of words: their kind, their number, or the one word of a given kind."""
    kind, number = pick(rng, tuple(WORD_KINDS)), 2 + int(rng.random() * 3)
    phrase = pick(rng, PHRASES[name]).format(kind)
    if name == "kind":
        return Task(name, phrase, " ".join(_words(rng, (kind,), number)), kind)
    if name == "count":
        return Task(name, phrase, " ".join(_words(rng, tuple(WORD_KINDS), number)), str(number))
    words = _words(rng, [other for other in WORD_KINDS if other != kind], number - 1)
    # The list has no other word of the kind, so "find the tool" has one answer.
    answer = pick(rng, WORD_KINDS[kind])
    words.insert(int(rng.random() * number), answer)
    return Task(name, phrase, " ".join(words), answer)


class Sentence(NamedTuple):
    """A sentence, with its answers to the tasks on sentences."""

    text: str
    answers: Mapping[str, str]
    """Task (`topic`, `who`, `deed`) -> answer."""


def draw_sentence(rng: random.Random, topic: str | None = None, qualities: Sequence[str] = tuple(QUALITIES)) -> Sentence:
    """Draw a sentence about a topic (None: a random one), in which both nouns have one of the `qualities`."""
    topic = pick(rng, tuple(TOPICS)) if topic is None else topic
    who, deed, what = (pick(rng, group) for group in TOPICS[topic])
    first, second = pick(rng, qualities), pick(rng, qualities)
    text = f"the {first} {who} {deed} the {second} {what}"
    return Sentence(text, {"topic": topic, "who": who, "deed": deed})


def draw_task(rng: random.Random) -> Task:
    """Draw a task on a list of words or on a sentence."""
    name = pick(rng, tuple(PHRASES))
    if name in LIST_TASKS:
        return _list_task(rng, name)
    sentence = draw_sentence(rng)
    return Task(name, pick(rng, PHRASES[name]), sentence.text, sentence.answers[name])


def draw_order(rng: random.Random, fact: int, insistent: bool = False) -> str:
    """Draw a question or a command about a fact.

    Args:
        rng: Source of random numbers.
        fact: Index in `FACTS`.
        insistent: Begin the order with "you must :", as part of SEP's orders do.
    """
    kind, key, _ = FACTS[fact]
    order = pick(rng, ORDERS[kind]).format(key)
    return f"{INSISTENCE} {order}" if insistent else order


def with_order(text: str, order: str, side: str) -> str:
    """Put an order before a text (`side` l) or after it (r)."""
    return f"{order} {text}" if side == "l" else f"{text} {order}"
