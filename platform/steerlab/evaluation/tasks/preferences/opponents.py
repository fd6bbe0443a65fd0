"""Answers of the model with their opponents: the same model without its patch, or the reference answers of the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from steerlab.data import sources
from steerlab.evaluation.asking.items import Numbered, has_input
from steerlab.evaluation.judging import answer_rewards
from steerlab.evaluation.judging.judges import Answer, Pair
from steerlab.job import Preamble
from steerlab.steered import stacks
from steerlab.steered.language import SteeredModel

if TYPE_CHECKING:
    from steerlab.evaluation.tasks.preferences.win_rate import Config


def pairs_of(model: SteeredModel, items: list[Numbered], config: Config) -> list[list[Pair]]:
    """Return each answer with its opponent, indexed [strength][prompt]."""
    references = [reference_of(item.row, config.prompts.format) for item in items]
    base = 0.0 if model.patches else 1.0  # a model without a patch is its own base and accepts only strength 1
    # Strength 0 is generated with the others in one call, even if the config does not report it.
    strengths = list(dict.fromkeys((*config.strengths, *((base,) if config.against == "base" else ()))))
    drawn = [_answers(model, references, strengths, config, number) for number in range(config.best_of)]
    best = _best(model, drawn, config)
    # The opponent is a single sample, since best-of-N is compared with plain sampling.
    opponents = drawn[0][base] if config.against == "base" else references
    return [list(zip(best[strength], opponents, strict=True)) for strength in config.strengths]


Answers = dict[float, list[Answer]]
"""strength -> answers in the order of the prompts."""


def _answers(model: SteeredModel, references: list[Answer], strengths: list[float], config: Config, number: int) -> Answers:
    """Answer the prompts of all references at every strength; `number` counts the samples of best-of-N."""
    outputs = model.generate(
        [reference.conversation(model.encoder, answered=False) for reference in references],
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        top_p=config.top_p,
        top_k=config.top_k,
        min_p=config.min_p,
        # Each sample has another seed; different seeds of the config share no sample.
        seed=config.seed * config.best_of + number,
        strengths=strengths,
        skip_long=True,
    )
    return {
        strength: [
            reference._replace(text=o.text.strip(), finished=o.finished, too_long=o.too_long)
            for reference, o in zip(references, row, strict=True)
        ]
        for strength, row in zip(strengths, outputs, strict=True)
    }


def _best(model: SteeredModel, drawn: list[Answers], config: Config) -> Answers:
    """Return for each prompt and strength the answer with the highest reward; an answer without a reward ranks last."""
    if config.best_by_source is None:
        return drawn[0]
    policy = load_like(config.best_by_source, model)
    if not policy.patches:
        raise ValueError(f"{config.best_by_source} has no patch, so it gives no implicit reward")
    reward = answer_rewards.implicit_reward(policy)

    def best(answers: Sequence[Answer]) -> Answer:
        # An answer that is too long for the reward has none, and must not be chosen.
        rewards = [value if isinstance(value, float) else -math.inf for value in reward(answers)]
        return answers[rewards.index(max(rewards))]

    return {
        strength: [best(candidates) for candidates in zip(*(answers[strength] for answers in drawn), strict=True)]
        for strength in drawn[0]
    }


def load_like(source: str, like: SteeredModel) -> SteeredModel:
    """Load a model with the data type and device of another, and with its prompt settings if the source has none."""
    dtype = str(like.model.dtype).removeprefix("torch.")
    # The preamble is removed, since it belongs to the evaluated model only.
    prompt = like.encoder.preceded_by(Preamble()).saved_spec
    model = stacks.load(sources.fetch(source), dtype=dtype, device=like.device, prompt=prompt)
    if not isinstance(model, SteeredModel):
        raise ValueError(f"{source} draws images; this task needs a language model")
    return model


def reference_of(row: Mapping[str, Any], data_format: str) -> Answer:
    """Return a row's prompt with its reference answer, which is empty for a plain text."""
    if data_format == "text":
        return Answer(row["text"], "", "")
    if data_format == "instruction":
        return Answer(str(row["instruction"]), str(row["input"]) if has_input(row) else "", str(row.get("output")).strip())
    prompt, chosen = row["prompt"], row["chosen"].strip()
    if isinstance(prompt, str):
        return Answer(prompt, "", chosen)
    return Answer("", "", chosen, turns=tuple((message["role"], message["content"]) for message in prompt))
