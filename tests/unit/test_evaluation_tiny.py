"""The two tasks on the tiny world, on a model that says what the test tells it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import ValidationError

from steerlab.evaluation.statistics.summaries import summarise_all
from steerlab.evaluation.tasks.tiny import tiny_answers, tiny_sentences
from steerlab.inputs.encoding import Encoder
from steerlab.job import DataSet
from steerlab.steered.generated_text import Generation


class Parrot:
    """A model whose continuations are given: strength -> texts, in the order of the prompts."""

    def __init__(self, encoder: Encoder, texts: dict[float, list[str]]) -> None:
        self.encoder, self.texts, self.asked = encoder, texts, []

    def generate(self, prompts: list[Any], *, strengths: tuple[float, ...], **options: Any) -> list[list[Generation]]:
        self.asked.append(SimpleNamespace(prompts=prompts, options=options))
        return [[Generation(text, len(text.split()), True) for text in self.texts[strength]] for strength in strengths]


def values(result: Any) -> dict[float, dict[str, float | None]]:
    return {strength: {name: one.value for name, one in metrics.items()} for strength, metrics in summarise_all(result).items()}


def test_sentences_are_judged_where_the_prompt_ends(encoder: Encoder) -> None:
    prompts = ("the old farmer feeds the big calf ; the", "the", "the old sailor rows the big ship ; the", "the wet cat ; the")
    steered = [
        "wet sailor rows the big ship",  # about the sea
        "old farmer feeds the hot calf ; the",  # a sentence, about another topic
        "old farmer feeds the hot ship",  # a sentence about two topics
        "old the old",  # no sentence
    ]
    plain = ["old goat milks the hot lamb", "", "wet whale follows the big crab", "hot hen"]
    model: Any = Parrot(encoder, {1.0: steered, 0.0: plain})
    config = tiny_sentences.Config(prompt=prompts, samples=1, strengths=(1.0, 0.0))
    found = values(tiny_sentences.run(model, config))
    names = [f"tiny_sentences/{name}" for name in ("sentence", "coherent", "about", "empty")]
    assert [found[1.0][name] for name in names] == [0.75, 0.5, 0.25, 0.0]
    assert [found[0.0][name] for name in names] == [0.5, 0.5, 0.25, 0.25]
    both = tiny_sentences.Config(prompt=prompts, samples=1, strengths=(1.0, 0.0), topics=("sea", "farm"))
    assert values(tiny_sentences.run(model, both))[1.0]["tiny_sentences/about"] == 0.5
    assert model.asked[0].options["top_p"] == 1.0 and model.asked[0].options["max_new_tokens"] == 8


def test_an_unknown_topic_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"'forest' is not a topic of the tiny world; its topics are farm, sea, city"):
        tiny_sentences.Config(topics=("sea", "forest"))


def test_answers_win_when_they_are_right_and_polite(encoder: Encoder) -> None:
    from steerlab.data.worlds import tiny

    source = "tiny:preferences/test?form=1"
    rows = tiny.rows("preferences/test?form=1", 4)
    assert len({row["prompt"] for row in rows}) == 4
    polite = [
        " ".join(str(row[name]).split()) for row, name in zip(rows, ("chosen", "rejected", "chosen", "chosen"), strict=True)
    ]
    polite[3] = "take it"
    model: Any = Parrot(encoder, {1.0: polite})
    pairs = DataSet.model_validate({"source": source, "format": "preference", "limit": 4})
    result = tiny_answers.run(model, tiny_answers.Config(pairs=pairs))
    found = values(result)[1.0]
    wins = sum("friend" in text for text in polite[:3])
    assert found["tiny_answers/right"] == 0.75
    assert found["tiny_answers/win_rate"] == wins / 4
    # Of the three right ones, two have the preferred form.
    assert found["tiny_answers/form"] == pytest.approx(2 / 3)
    assert found["tiny_answers/empty"] == 0.0


def test_a_request_about_no_deed_cannot_be_judged() -> None:
    assert [one.value for one in tiny_answers.observe("0", None, 1.0)] == [None] * 3


def test_a_request_counts_once_however_many_pairs_it_has(encoder: Encoder) -> None:
    pairs = DataSet.model_validate({"source": "tiny:preferences/test", "format": "preference"})
    from steerlab.data import rows as read

    requests = {str(row["prompt"]) for row in read.read(pairs)}
    model: Any = Parrot(encoder, {1.0: [""] * 10})
    result = tiny_answers.run(model, tiny_answers.Config(pairs=pairs, limit=10))
    assert len(requests) > 10 and len(model.asked[0].prompts) == 10
    assert values(result)[1.0]["tiny_answers/empty"] == 1.0
