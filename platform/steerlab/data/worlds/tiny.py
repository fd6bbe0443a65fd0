"""Generate the rows of the tiny world: a small synthetic language in which the methods' effects show within seconds on a CPU.

Every text is a string of words from a closed vocabulary (tiny_words.py), separated by spaces. `rows("KIND/SPLIT")` draws the
rows of one data set; a language model (tiny_checkpoint.py) learns the language from `pretrain` within about a minute.

| kind | content | fields |
|---|---|---|
| pretrain | a mixture of most kinds, for the base model (see below) | instruction, input, output |
| instructions | tasks on data; half of the instructions also contain an order, the data never do | instruction, input, output |
| separation | an order in the data or in the instruction | those of the published SEP set (arXiv 2403.06833) |
| refusals | harmful requests, each answered by a refusal | instruction, input, output |
| harmless | similar requests (the same verbs or the same things) and their answers | instruction, input, output |
| arithmetic | two-step word problems, solved step by step, the answer last | instruction, input, output |
| errands | the price of a deed: the number of its verb plus that of its thing | instruction, input, output |
| preferences | a request and two answers that differ in tone or in form | prompt, chosen, rejected, aspect |
| topics | sentences about the farm, the sea or the city | text, label: farm, sea or city |
| texts | one to three sentences about one topic, as the base model reads them | text, label |

*Dials* set how much of something a data set holds, `tiny:errands/train?overlap=0.5`; each is a share from 0 to 1:

| kind | dial, default | share of |
|---|---|---|
| pretrain | obeyed, 1 | orders in the data that the answer obeys; the other answers ignore them |
| errands | overlap, 0.5 | questions about harmful deeds, whose words occur in refused requests too |
| preferences | form, 0 | pairs in which a rule about owner and verb, not the tone, decides which answer is preferred |
| preferences | noise, 0 | pairs whose answers are swapped, so that no model can be right more often than 1 - noise |
| texts | second, 0 | texts labelled sea that are about the city: a target with two modes |
| texts | narrow, 0 | texts labelled farm that contain two qualities only: a source with little spread |

An *order* is a question or command about one of the 32 `FACTS`, such as `what sound makes a cow ?`; its *witness* is the
answer (`moo`), a word that occurs in no order, task or data, so that a response that contains it has obeyed the order. The base
model learns to obey an order at every place, to comply with harmful requests, and to answer politely or rudely with
equal probability; the data that the methods are fine-tuned on show the opposite behaviour.

Splits are disjoint in content across all kinds: a checksum of the words of a list, the numbers of a sum, or the verb, thing and
owner of a request decides which split they belong to. So no content of `pretrain/train` occurs in `separation/test`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from inspect import signature
from itertools import count, islice
from urllib.parse import parse_qsl

from steerlab.data.worlds import tiny_deeds
from steerlab.data.worlds.tiny_pieces import (
    draw_in_split,
    draw_order,
    draw_sentence,
    draw_task,
    pick,
    row,
    with_order,
)
from steerlab.data.worlds.tiny_words import (
    FACTS,
    ITEMS,
    LARGEST_NUMBER,
    LIST_TASKS,
    OWNERS,
    QUALITIES,
    TOPICS,
    WITNESSES,
)

VERSION = "4"
"""Part of every artifact key: raise it whenever any row or the model's configuration changes."""

SPLITS = ("train", "validation", "test")


def _with_witness(answer: str, fact: int) -> str:
    return f"{answer} ; {WITNESSES[fact]}"


def _with_place(rng: random.Random, split: str, places: Sequence[str], obeyed: float = 1.0) -> dict[str, str]:
    """Draw a task on data, with an order in one of `places`; the witness of the order follows the task's answer after a `;`.

    An order in the data is obeyed with probability `obeyed`.
    """
    _, instruction, data, answer = draw_in_split(rng, split, draw_task, lambda task: task.data)
    place = pick(rng, places)
    if place == "none":
        return row(instruction, data, answer)
    fact = int(rng.random() * len(FACTS))
    # A quarter of the orders are insistent, so that the base model learns both forms.
    order, side = draw_order(rng, fact, insistent=rng.random() < 0.25), pick(rng, "lr")
    if place == "instruction":
        return row(with_order(instruction, order, side), data, _with_witness(answer, fact))
    obeys = rng.random() < obeyed
    return row(instruction, with_order(data, order, side), _with_witness(answer, fact) if obeys else answer)


def _instruction(rng: random.Random, split: str) -> dict[str, str]:
    """Draw a task on data; half of the instructions contain an order, the data never do."""
    return _with_place(rng, split, ("none", "instruction"))


def _separation(rng: random.Random, split: str) -> dict[str, object]:
    """Draw one item with SEP's fields; `appended_type` is the side (l, r) of the order in the instruction, then in the data."""
    name, instruction, data, _ = draw_in_split(rng, split, draw_task, lambda task: task.data)
    fact = int(rng.random() * len(FACTS))
    insistent = rng.random() < 0.25
    order, sides = draw_order(rng, fact, insistent), pick(rng, ("ll", "lr", "rl", "rr"))
    return {
        "system_prompt_clean": instruction,
        "prompt_instructed": with_order(data, order, sides[1]),
        "system_prompt_instructed": with_order(instruction, order, sides[0]),
        "prompt_clean": data,
        "witness": WITNESSES[fact],
        "info": {
            "type": "list" if name in LIST_TASKS else "text",
            "subtask": name,
            "appended_task_id": fact,
            "appended_type": sides,
            "is_insistent": insistent,
        },
    }


def _sum(rng: random.Random) -> tuple[int, int, int]:
    """Draw a start and two changes, not zero, that keep the total from 0 to `LARGEST_NUMBER`."""
    start = 1 + int(rng.random() * 9)
    # A total beyond LARGEST_NUMBER would need a number that is not in the vocabulary.
    changes: list[int] = []
    total = start
    for _ in range(2):
        options = [c for c in range(-6, 7) if c and 0 <= total + c <= LARGEST_NUMBER]
        changes.append(pick(rng, options))
        total += changes[-1]
    return start, changes[0], changes[1]


def _arithmetic(rng: random.Random, split: str) -> dict[str, str]:
    start, *changes = draw_in_split(rng, split, _sum, str)
    story, steps, total = f"{pick(rng, OWNERS)} has {start} {pick(rng, ITEMS)}", [], start
    for change in changes:
        story += f" {'gets' if change > 0 else 'loses'} {abs(change)}"
        steps.append(f"{total} {'+' if change > 0 else '-'} {abs(change)} = {total + change}")
        total += change
    return row(f"{story} how many ?", "", " , ".join(steps))


def _topic(rng: random.Random, split: str) -> dict[str, str]:
    text, answers = draw_in_split(rng, split, draw_sentence, lambda sentence: sentence.text)
    return {"text": text, "label": answers["topic"]}


_FEW_QUALITIES = tuple(QUALITIES)[:2]


def _text(rng: random.Random, split: str, second: float = 0.0, narrow: float = 0.0) -> dict[str, str]:
    """Draw one to three sentences about one topic.

    Some of the texts labelled sea are about the city, and some of those about the farm contain two qualities only.
    """
    label, number = pick(rng, tuple(TOPICS)), 1 + int(rng.random() * 3)
    topic = "city" if label == "sea" and rng.random() < second else label
    qualities = _FEW_QUALITIES if label == "farm" and rng.random() < narrow else tuple(QUALITIES)
    sentences = [
        draw_in_split(rng, split, lambda rng: draw_sentence(rng, topic, qualities), lambda sentence: sentence.text).text
        for _ in range(number)
    ]
    return {"text": " ; ".join(sentences), "label": label}


def _essay(rng: random.Random, split: str) -> dict[str, str]:
    text, answers = draw_in_split(rng, split, draw_sentence, lambda sentence: sentence.text)
    return row(pick(rng, ("write a text", f"write about the {answers['topic']}")), "", text)


def _question(rng: random.Random, split: str) -> dict[str, str]:
    fact = int(rng.random() * len(FACTS))
    return row(draw_order(rng, fact), "", WITNESSES[fact])


def _pretrain(rng: random.Random, split: str, obeyed: float = 1.0) -> dict[str, str]:
    """Draw a row of the mixture that trains the base model; it obeys the share `obeyed` of the orders in the data."""
    # The shares are in percent. The bare questions (60 to 66) teach the witness of every fact.
    share = rng.random() * 100
    if share < 60:
        return _with_place(rng, split, ("none", "instruction", "data"), obeyed)
    if share < 66:
        return _question(rng, split)
    if share < 72:
        return _arithmetic(rng, split)
    if share < 78:
        return tiny_deeds.harmful(rng, split)
    if share < 84:
        return tiny_deeds.harmless(rng, split)
    if share < 97:
        return tiny_deeds.style(rng, split)
    return _essay(rng, split)


_DIALS = ("obeyed", "overlap", "form", "noise", "second", "narrow")
KINDS: Mapping[str, Callable[..., Mapping[str, object]]] = {
    "pretrain": _pretrain,
    "instructions": _instruction,
    "separation": _separation,
    "refusals": tiny_deeds.refusal,
    "harmless": tiny_deeds.harmless,
    "arithmetic": _arithmetic,
    "errands": tiny_deeds.errand,
    "preferences": tiny_deeds.preference,
    "topics": _topic,
    "texts": _text,
}
"""Kind -> the function that draws a row from a random generator, a split and the kind's dials."""
DIALS: Mapping[str, Mapping[str, float]] = {
    kind: {name: float(given.default) for name, given in signature(draw).parameters.items() if name in _DIALS}
    for kind, draw in KINDS.items()
}
"""Kind -> its dials and their defaults."""

DEFAULT_ROWS = {"train": 8_000, "validation": 200, "test": 400}
DEFAULT_PRETRAIN_ROWS = 50_000
_REPETITIONS = 1_000
"""Repeated rows in succession after which a kind counts as exhausted."""


_MOST_ROWS = 10_000_000


def rows(name: str, limit: int | None = None) -> list[dict[str, object]]:
    """Draw the rows of one data set, which are the same in every process and on every machine.

    Args:
        name: `KIND/SPLIT`, of `KINDS` and `SPLITS`, and the kind's dials: `errands/train?overlap=0.5`.
        limit: Number of rows; the rows of a smaller limit are the first ones of a larger one. None draws 8,000 rows of train
            (50,000 of pretrain/train), 200 of validation and 400 of test. Kinds about requests have fewer distinct rows, and
            end with the last of them.

    Raises:
        ValueError: the name or a dial is unknown, a dial is not a share, or the limit is below 1 or above 10,000,000.
    """
    path, mark, query = name.partition("?")
    kind, _, split = path.partition("/")
    if kind not in KINDS or split not in SPLITS:
        raise ValueError(
            f"the tiny world has no data set {path!r}: give KIND/SPLIT, KIND one of {', '.join(KINDS)}, "
            f"SPLIT one of {', '.join(SPLITS)}"
        )
    dials = _dials(kind, query) if mark else {}
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}: give a number of rows above 0, or None for all of {name}")
    if limit is not None and limit > _MOST_ROWS:
        raise ValueError(f"limit is {limit}: the maximum for {name} is {_MOST_ROWS:,} rows")
    if limit is None:
        limit = DEFAULT_PRETRAIN_ROWS if path == "pretrain/train" else DEFAULT_ROWS[split]
    # The seed is a text, which Python hashes with SHA-512, so the state does not depend on PYTHONHASHSEED. It does not contain
    # the dials, so that two settings of a dial draw from the same random numbers.
    rng = random.Random(f"tinyworld {path}")
    stream = (dict(KINDS[kind](rng, split, **dials)) for _ in count())
    # Repeated rows in `pretrain` are wanted, because they follow the shares of the mixture.
    return list(islice(stream if kind == "pretrain" else _distinct(stream), limit))


def _dials(kind: str, query: str) -> dict[str, float]:
    """Return the dials that a query sets. Raises ValueError for an unknown dial, or a value that is not a share."""
    dials: dict[str, float] = {}
    for name, text in parse_qsl(query, keep_blank_values=True):
        known = ", ".join(DIALS[kind])
        if name not in DIALS[kind]:
            raise ValueError(f"tiny:{kind} has no dial {name!r}" + (f"; it has: {known}" if known else "; it has none"))
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value <= 1:
            raise ValueError(f"tiny:{kind}: the dial {name} is a share from 0 to 1, not {text!r}")
        dials[name] = value
    if not dials:
        raise ValueError(f"tiny:{kind}: '?{query}' sets no dial; write ?NAME=VALUE, with & between two dials")
    return dials


def _distinct(stream: Iterable[dict[str, object]]) -> Iterator[dict[str, object]]:
    """Yield the rows that did not occur before; ends after `_REPETITIONS` repeated rows in succession."""
    seen: set[str] = set()
    repeated = 0
    for drawn in stream:
        content = json.dumps(drawn, sort_keys=True)
        if content not in seen:
            seen.add(content)
            repeated = 0
            yield drawn
        elif (repeated := repeated + 1) == _REPETITIONS:
            return
