"""Judges that decide which of two answers to the same prompt is better.

A judge takes pairs of answers and returns a verdict for each pair: 1 if the first answer wins, 0 if the second wins, 0.5 for a
tie, None if it cannot decide. Equal texts are a tie and are not shown to the judge. A pair that does not fit into the judge's
context is not cut, because the judge would then judge another answer; its verdict is `TOO_LONG`.

A reward is a number for a single answer, or `TOO_LONG`; of two answers the one with the higher reward wins.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from steerlab.evaluation.judging import scorers
from steerlab.evaluation.statistics.metrics import TOO_LONG, Score
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Conversation

QUESTION = (
    "Here are a prompt and two responses to it.\n\nPrompt: {prompt}\n\nResponse 1: {first}\n\nResponse 2: {second}\n\n"
    "Which response is better? Answer with 1 or 2."
)
REASONED = (
    "You compare two answers, A and B, to the same prompt. Judge them by the prompt alone, whatever their order, length "
    "and style.\n\nFirst work out briefly what a good answer has to do. Then name the mistakes and the omissions of each "
    "answer, and say which of them matter. End with one line that holds one of these labels and nothing else:\n\n"
    "[[A>>B]] A is much better\n[[A>B]] A is a little better\n[[A=B]] they are about equal\n"
    "[[B>A]] B is a little better\n[[B>>A]] B is much better\n\n"
    "Prompt:\n{prompt}\n\nAnswer A:\n{first}\n\nAnswer B:\n{second}"
)
"""A question in the style of Arena-Hard (Li et al., arXiv 2406.11939): the judge reasons first and has five labels. The
wording is this repository's; set `question` to the published one to compare with published numbers."""
PLACES: tuple[str, ...] = ("prompt", "first", "second")
"""Placeholders that a question must contain."""


class Answer(NamedTuple):
    """An answer and the prompt that it answers."""

    instruction: str
    data: str
    text: str
    finished: bool = True
    """False if generation was cut at its longest length, so that the answer is not complete."""
    turns: tuple[tuple[str, str], ...] = ()
    """(speaker, text) of the dialogue before the answer, instead of instruction and data."""
    too_long: bool = False
    """True if the prompt did not fit into the context, so the answer is missing."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns of the prompt as {role, content}."""
        turns = self.turns or (("user", f"{self.instruction}\n\n{self.data}" if self.data else self.instruction),)
        return [{"role": speaker, "content": text} for speaker, text in turns]

    @property
    def prompt(self) -> str:
        """The prompt as one text; if it has several turns, each begins with its speaker."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n\n".join(f"{message['role'].title()}: {message['content']}" for message in self.messages)

    def conversation(self, encoder: Encoder, answered: bool = True) -> Conversation:
        """Return the prompt as a conversation, with the answer unless `answered` is False."""
        text = self.text if answered else None
        if self.turns:
            return encoder.dialogue(self.messages, text)
        return encoder.conversation(self.instruction, self.data, text)


Pair = tuple[Answer, Answer]
"""Two answers to the same prompt."""
Verdict = Score
"""1 first answer, 0 second, 0.5 tie, None undecided, `TOO_LONG`."""
Judge = Callable[[Sequence[Pair]], list[Verdict]]


class Compared(NamedTuple):
    """A verdict, with the two single verdicts if the judge was asked in both orders."""

    verdict: Verdict
    orders: tuple[Verdict, Verdict] | None = None
    """Verdicts with the first answer shown first, and with it shown second; in both, 1 means that the answer shown first
    wins. None if the judge was not asked in both orders."""


Compare = Callable[[Sequence[Pair]], list[Compared]]
Reward = Callable[[Sequence[Answer]], list[Score]]


def decide(judge: Judge, pairs: Sequence[Pair]) -> list[Verdict]:
    """Return the judge's verdict for each pair; equal texts are a tie and are not judged."""
    different = [pair for pair in pairs if pair[0].text != pair[1].text]
    # A judge would have to invent a difference between equal texts, which are frequent at small strengths.
    verdicts = iter(judge(different) if different else [])
    return [0.5 if first.text == second.text else next(verdicts) for first, second in pairs]


def once(judge: Judge) -> Compare:
    """Return the comparison by a judge that gives one verdict for each pair."""
    return lambda pairs: [Compared(verdict) for verdict in decide(judge, pairs)]


def in_both_orders(ask: Callable[[Sequence[str]], list[Verdict]], question: str = QUESTION) -> Compare:
    """Return the comparison by a judge that is asked twice, with the answers exchanged the second time.

    This removes the preference of language models for a position from the verdict, and measures it: see `first_shown` and
    `agreement`.

    Args:
        ask: questions -> 1 if the answer that is shown first wins, 0 for the second, 0.5 for a tie.
        question: the question, with the placeholders {prompt}, {first} and {second}.
    """

    def compare(pairs: Sequence[Pair]) -> list[Compared]:
        different = [pair for pair in pairs if pair[0].text != pair[1].text]
        # Both orders are asked in one call, so that a judge with concurrent questions is never idle between them.
        questions = [filled(question, first, second) for first, second in different]
        questions += [filled(question, second, first) for first, second in different]
        said = ask(questions) if questions else []
        orders = iter(zip(said[: len(different)], said[len(different) :], strict=True))
        return [_compared(pair, orders) for pair in pairs]

    return compare


def _compared(pair: Pair, orders: Iterator[tuple[Verdict, Verdict]]) -> Compared:
    # Equal texts are not judged, since a judge would have to invent a difference.
    if pair[0].text == pair[1].text:
        return Compared(0.5)
    forward, backward = next(orders)
    return Compared(combined(forward, backward), (forward, backward))


def first_shown(compared: Compared) -> Score:
    """Return how often the answer shown first won, 0 to 1; a mean of 0.5 over many pairs means no bias for a position."""
    if compared.orders is None:
        return None
    forward, backward = compared.orders
    both = isinstance(forward, float) and isinstance(backward, float)
    return (forward + backward) / 2 if both else worse(forward, backward)  # type: ignore[operator]


def agreement(compared: Compared) -> Score:
    """Return 1 if both orders prefer the same answer, otherwise 0."""
    if compared.orders is None:
        return None
    forward, backward = compared.orders
    both = isinstance(forward, float) and isinstance(backward, float)
    return float(forward == 1 - backward) if both else worse(forward, backward)  # type: ignore[operator]


def by_reward(reward: Reward) -> Judge:
    """Return the judge that prefers the answer with the higher reward."""

    def judge(pairs: Sequence[Pair]) -> list[Verdict]:
        # An answer at strength 0 occurs in a pair with every other strength, but gets its reward once.
        answers = list(dict.fromkeys(answer for pair in pairs for answer in pair))
        rewards = dict(zip(answers, reward(answers), strict=True))
        return [_higher(rewards[first], rewards[second]) for first, second in pairs]

    return judge


def _higher(first: Score, second: Score) -> Verdict:
    if not isinstance(first, float) or not isinstance(second, float):
        return worse(first, second)
    return 0.5 if first == second else float(first > second)


def worse(first: Score, second: Score) -> Score:
    """Combine two scores of which at least one is not a number: `TOO_LONG` if one of them is, otherwise None."""
    return TOO_LONG if TOO_LONG in (first, second) else None


def language_model(
    source: str, question: str = QUESTION, *, both_orders: bool = True, seed: int = 0, device: torch.device | str = "cpu"
) -> Judge:
    """Load a causal language model that judges by answering with 1 or 2 to the question which answer is better.

    Args:
        source: the model.
        question: the question, with the placeholders {prompt}, {first} and {second}.
        both_orders: ask twice, with the answers exchanged the second time; they tie unless the same answer wins both times.
            This removes the preference of language models for a position. Otherwise the order of each pair is random.
        seed: seed of the random orders.
        device: where the model runs.
    """
    ask = scorers.first_or_second(source, ("1", "2"), device)
    compare = in_both_orders(ask, question)

    def judge(pairs: Sequence[Pair]) -> list[Verdict]:
        if both_orders:
            return [compared.verdict for compared in compare(pairs)]
        # If each pair is asked once, its order is random, so that the preference for a position averages out.
        generator = random.Random(seed)
        swapped = [generator.random() < 0.5 for _ in pairs]
        shown = [(b, a) if swap else (a, b) for (a, b), swap in zip(pairs, swapped, strict=True)]
        verdicts = ask([filled(question, first, second) for first, second in shown])
        return [1 - v if swap and isinstance(v, float) else v for v, swap in zip(verdicts, swapped, strict=True)]

    return judge


def filled(question: str, first: Answer, second: Answer) -> str:
    """Fill the placeholders of a question with the prompt and the two answers."""
    texts: dict[str, str] = dict(zip(PLACES, (first.prompt, first.text, second.text), strict=True))
    # All placeholders are replaced in one pass, since an answer may itself contain "{second}".
    return re.sub(r"\{(" + "|".join(PLACES) + r")\}", lambda place: texts[place[1]], question)


def combined(forward: Verdict, backward: Verdict) -> Verdict:
    """Combine the verdicts of both orders; in either one, 1 means that the answer shown first wins."""
    if not isinstance(forward, float) or not isinstance(backward, float):
        return worse(forward, backward)
    # The mean over both orders. Equal verdicts prefer the same position, hence different answers, and give a tie.
    return (forward + 1 - backward) / 2
