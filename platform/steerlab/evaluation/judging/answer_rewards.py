"""Rewards of single answers: the implicit reward of a trained policy, and reward models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from steerlab import models
from steerlab.evaluation.judging import scorers
from steerlab.evaluation.judging.judges import Answer, Reward, worse
from steerlab.evaluation.statistics.metrics import TOO_LONG, Score
from steerlab.inputs import rendering
from steerlab.steered.language import SteeredModel

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerBase


def implicit_reward(policy: SteeredModel, reference: SteeredModel | None = None) -> Reward:
    """Return the implicit reward log pi(answer | prompt) - log pi_ref(answer | prompt), in nats.

    Rafailov et al., arXiv 2305.18290, eq. 5: a policy trained by DPO defines this reward, up to the factor beta and a term that
    depends on the prompt only. Neither changes which of two answers to the same prompt is better.

    Args:
        policy: the model pi.
        reference: the model pi_ref; None takes the policy at strength 0.
    """

    def rewards(answers: Sequence[Answer]) -> list[Score]:
        under_policy = log_likelihoods(policy, answers, 1.0)
        # The same model at strength 0 is the base that its patches were trained from, so no second model is loaded.
        under_reference = log_likelihoods(reference or policy, answers, 1.0 if reference else 0.0)
        pairs = zip(under_policy, under_reference, strict=True)
        return [p - r if isinstance(p, float) and isinstance(r, float) else worse(p, r) for p, r in pairs]

    return rewards


def log_likelihoods(model: SteeredModel, answers: Sequence[Answer], strength: float) -> list[Score]:
    """Return log p(answer | prompt) in nats, summed over the answer's tokens; `TOO_LONG` if the pair does not fit.

    The token that ends the turn is included if the answer is finished.
    """
    conversations = [answer.conversation(model.encoder) for answer in answers]
    log_probs: list[Score] = [TOO_LONG] * len(answers)
    scored = model.token_log_probs(conversations, strength=strength, skip_long=True)
    for i, (row, scores) in enumerate(zip(model.encoder.encode_all(conversations), scored, strict=True)):
        if not scores.too_long:
            tokens = zip(scores.log_prob, scores.in_response, row.parts[1:], strict=True)
            # Tokens of the chat template have part -1: within the response that is the end of the turn.
            values = [value for value, inside, part in tokens if inside and (part >= 0 or answers[i].finished)]
            log_probs[i] = float(sum(values))
    return log_probs


def reward_model(source: str, device: torch.device | str = "cpu") -> Reward:
    """Load a reward model: a sequence classifier with one output, the reward of an answer to its prompt.

    Prompt and answer are formatted by the tokenizer's chat template, or as a pair of texts if it has none.

    Raises:
        ValueError: the classifier has several classes.
    """
    check_reward_model(source)
    model, tokenizer = scorers.load_classifier(source, device)
    # Tokenizers without a limit have 10^30 (VERY_LARGE_INTEGER of transformers), so the model's own limit applies as well.
    longest = min(tokenizer.model_max_length, models.max_positions(model))

    @torch.inference_mode()
    def reward(answer: Answer) -> Score:
        inputs = _turns(tokenizer, answer) if tokenizer.chat_template else tokenizer(answer.prompt, answer.text)
        inputs = inputs.convert_to_tensors("pt", prepend_batch_axis=True).to(device)
        # Tokens are counted after the template is applied, since its tokens take part of the context.
        return TOO_LONG if inputs["input_ids"].shape[1] > longest else float(model(**inputs).logits[0, 0])

    # One answer at a time, because many reward models have no padding token.
    return lambda answers: [reward(answer) for answer in answers]


def check_reward_model(source: str) -> None:
    """Refuse a classifier with several classes, which is not a reward model. Raises ValueError."""
    classes = scorers.check_classifier(source)
    if len(classes) != 1:
        raise ValueError(f"{source} is not a reward model: it has the classes {', '.join(classes)} instead of one")


def _turns(tokenizer: PreTrainedTokenizerBase, answer: Answer) -> BatchEncoding:
    turns = [*answer.messages, {"role": "assistant", "content": answer.text}]
    from transformers import BatchEncoding

    encoded = rendering.apply(tokenizer, turns, return_dict=True)
    assert isinstance(encoded, BatchEncoding)
    return encoded
