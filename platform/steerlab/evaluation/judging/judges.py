"""Judges of two answers to one prompt: which is better?

A judge takes pairs and gives a verdict for each: 1 where the first answer wins, 0 where the second does, 0.5 for a tie, None
where it cannot tell. Equal texts are a tie and are never shown to one. Rows that do not fit into a judge's context whole are
not cut, since what is judged would be another answer: they are too long.

A reward is a number for one answer, or too long; of two answers the one with the higher reward wins.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from steerlab import models
from steerlab.evaluation.judging import scorers
from steerlab.evaluation.statistics.metrics import TOO_LONG, Score
from steerlab.inputs import rendering
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Conversation
from steerlab.steered.language import SteeredModel

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase

QUESTION = (
    "Here are a prompt and two responses to it.\n\nPrompt: {prompt}\n\nResponse 1: {first}\n\nResponse 2: {second}\n\n"
    "Which response is better? Answer with 1 or 2."
)
PLACES: tuple[str, ...] = ("prompt", "first", "second")
"""What a question has to be filled with."""


class Answer(NamedTuple):
    """An answer and what it answers."""

    instruction: str
    data: str
    text: str
    finished: bool = True
    """False when it was cut, so that its end is not the author's."""
    turns: tuple[tuple[str, str], ...] = ()
    """(speaker, text) of the dialogue that it answers, in place of instruction and data."""
    too_long: bool = False
    """True when what it answers did not fit, so that there is no answer."""

    @property
    def messages(self) -> list[dict[str, str]]:
        """The turns {role, content} that it answers."""
        turns = self.turns or (("user", f"{self.instruction}\n\n{self.data}" if self.data else self.instruction),)
        return [{"role": speaker, "content": text} for speaker, text in turns]

    @property
    def prompt(self) -> str:
        """What it answers as one text; of several turns each begins with its speaker."""
        if len(self.messages) == 1:
            return self.messages[0]["content"]
        return "\n\n".join(f"{message['role'].title()}: {message['content']}" for message in self.messages)

    def conversation(self, encoder: Encoder, answered: bool = True) -> Conversation:
        """Make the conversation with the answer, or the prompt of one."""
        text = self.text if answered else None
        if self.turns:
            return encoder.dialogue(self.messages, text)
        return encoder.conversation(self.instruction, self.data, text)


Pair = tuple[Answer, Answer]
Verdict = Score
Judge = Callable[[Sequence[Pair]], list[Verdict]]
Reward = Callable[[Sequence[Answer]], list[Score]]


def decide(judge: Judge, pairs: Sequence[Pair]) -> list[Verdict]:
    """Return the verdicts over pairs; equal texts are a tie."""
    different = [pair for pair in pairs if pair[0].text != pair[1].text]
    verdicts = iter(judge(different) if different else [])
    return [0.5 if first.text == second.text else next(verdicts) for first, second in pairs]


def by_reward(reward: Reward) -> Judge:
    """Return the judge that prefers the higher reward; each answer is rewarded once, in however many pairs it stands."""

    def judge(pairs: Sequence[Pair]) -> list[Verdict]:
        answers = list(dict.fromkeys(answer for pair in pairs for answer in pair))
        rewards = dict(zip(answers, reward(answers), strict=True))
        return [_higher(rewards[first], rewards[second]) for first, second in pairs]

    return judge


def _higher(first: Score, second: Score) -> Verdict:
    if not isinstance(first, float) or not isinstance(second, float):
        return worse(first, second)
    return 0.5 if first == second else float(first > second)


def worse(first: Score, second: Score) -> Score:
    """Return why two scores, at least one of which is no number, say nothing."""
    return TOO_LONG if TOO_LONG in (first, second) else None


def implicit_reward(policy: SteeredModel, reference: SteeredModel | None = None) -> Reward:
    """Return log pi(answer | prompt) - log pi_ref(answer | prompt) in nats, summed over the answer's tokens.

    The reward that a policy trained by DPO stands for, up to a factor and a term of the prompt alone, neither of which changes
    which of two answers is better (Rafailov et al., arXiv 2305.18290, eq. 5). Without a reference it is the policy itself at
    strength 0.
    """

    def rewards(answers: Sequence[Answer]) -> list[Score]:
        under_policy = log_likelihoods(policy, answers, 1.0)
        under_reference = log_likelihoods(reference or policy, answers, 1.0 if reference else 0.0)
        pairs = zip(under_policy, under_reference, strict=True)
        return [p - r if isinstance(p, float) and isinstance(r, float) else worse(p, r) for p, r in pairs]

    return rewards


def log_likelihoods(model: SteeredModel, answers: Sequence[Answer], strength: float) -> list[Score]:
    """Return log p(answer | prompt) in nats; the end of the turn counts where the answer's author wrote it."""
    conversations = [answer.conversation(model.encoder) for answer in answers]
    found: list[Score] = [TOO_LONG] * len(answers)
    scored = model.token_log_probs(conversations, strength=strength, skip_long=True)
    for i, (row, scores) in enumerate(zip(model.encoder.encode_all(conversations), scored, strict=True)):
        if not scores.too_long:
            tokens = zip(scores.log_prob, scores.in_response, row.parts[1:], strict=True)
            # The answer is the last part; the end of its turn belongs to the template.
            values = [value for value, inside, part in tokens if inside and (part >= 0 or answers[i].finished)]
            found[i] = float(sum(values))
    return found


def reward_model(source: str, device: torch.device | str = "cpu") -> Reward:
    """Load a sequence classifier with one output, which it gives to a prompt with its answer.

    The two are the turns of the tokenizer's chat template, or a pair of texts where it has none. They are read one at a time:
    many reward models have no token for padding.

    Raises:
        ValueError: when the classifier has several classes.
    """
    check_reward_model(source)
    model, tokenizer = scorers.load_classifier(source, device)
    longest = min(tokenizer.model_max_length, models.max_positions(model))

    @torch.inference_mode()
    def reward(answer: Answer) -> Score:
        inputs = _turns(tokenizer, answer) if tokenizer.chat_template else tokenizer(answer.prompt, answer.text)
        inputs = inputs.convert_to_tensors("pt", prepend_batch_axis=True).to(device)
        return TOO_LONG if inputs["input_ids"].shape[1] > longest else float(model(**inputs).logits[0, 0])

    return lambda answers: [reward(answer) for answer in answers]


def check_reward_model(source: str) -> None:
    """Refuse a classifier with several classes, which gives no reward. Raises ValueError."""
    classes = scorers.check_classifier(source)
    if len(classes) != 1:
        raise ValueError(f"{source} is no reward model: it has the classes {', '.join(classes)}, not one")


def _turns(tokenizer: PreTrainedTokenizerBase, answer: Answer) -> BatchEncoding:
    turns = [*answer.messages, {"role": "assistant", "content": answer.text}]
    from transformers import BatchEncoding

    encoded = rendering.apply(tokenizer, turns, return_dict=True)
    assert isinstance(encoded, BatchEncoding)
    return encoded


def language_model(
    source: str, question: str = QUESTION, *, both_orders: bool = True, seed: int = 0, device: torch.device | str = "cpu"
) -> Judge:
    """Load a causal language model that is asked which of two answers is better, 1 or 2.

    With `both_orders` it is asked twice, and the answers tie unless the same one wins from both places: models prefer a place.
    Otherwise the order of each pair is drawn at random.
    """
    ask = scorers.first_or_second(source, ("1", "2"), device)

    def judge(pairs: Sequence[Pair]) -> list[Verdict]:
        if both_orders:
            forward = ask([asked(question, first, second) for first, second in pairs])
            backward = ask([asked(question, second, first) for first, second in pairs])
            return [agreed(a, b) for a, b in zip(forward, backward, strict=True)]
        generator = random.Random(seed)
        swapped = [generator.random() < 0.5 for _ in pairs]
        shown = [(b, a) if swap else (a, b) for (a, b), swap in zip(pairs, swapped, strict=True)]
        verdicts = ask([asked(question, first, second) for first, second in shown])
        return [1 - v if swap and isinstance(v, float) else v for v, swap in zip(verdicts, swapped, strict=True)]

    return judge


def asked(question: str, first: Answer, second: Answer) -> str:
    """Fill the places of a question; what looks like a place inside a text stays as it is."""
    texts: dict[str, str] = dict(zip(PLACES, (first.prompt, first.text, second.text), strict=True))
    return re.sub(r"\{(" + "|".join(PLACES) + r")\}", lambda place: texts[place[1]], question)


def agreed(forward: Verdict, backward: Verdict) -> Verdict:
    """Join the verdicts of both orders, each 1 where the answer shown first wins; they tie where the orders disagree."""
    if not isinstance(forward, float) or not isinstance(backward, float):
        return worse(forward, backward)
    return 0.5 if forward == backward else forward
