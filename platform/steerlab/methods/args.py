"""ARGS: at each step the likeliest tokens are scored again, by a reward model that reads the text with each of them.

Khanov, Burapacheep and Li, "ARGS: Alignment as Reward-Guided Search", ICLR 2024, https://arxiv.org/abs/2402.01694.

For the text x, prompt included, the k likeliest next tokens v of the frozen model are candidates. Each gets the score

    s(v, x) = log p(v | x) + w r([x, v])

with r the reward of the text that ends in v. ARGS-greedy takes the token with the highest score; ARGS-stochastic draws from
softmax(s / temperature) over the k candidates. Here the scores are logits, and the sampler of generation does both: temperature
0 is greedy. Log-probabilities and logits of one step differ by a constant, which neither the maximum nor the softmax sees.

Nothing trains. The reward model is a sequence classifier with one output, of the same tokenizer; or a linear head on the frozen
model's own last hidden states. It reads the text once and keeps its keys and values. The k candidates are placed side by side
at the next position, where each attends to the text and itself (models/language/rewards.py): a token costs a pass over k + 1
tokens.

The strength alpha multiplies w: 1 is the job's w, and 0 is the model alone with all of its tokens. At every other strength only
the k candidates can be chosen. All others get a log-probability of about -10,000, so that perplexity and implicit rewards are
not meaningful: compare generated texts instead (`win_rate`, `efficiency`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from steerlab import models, patches
from steerlab.data import sources
from steerlab.job import Job, MethodConfig, Source
from steerlab.methods.contract import Assembled
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel

# Patches of logits change no hidden state, and patches of weights act on the model's own weights, so that the states which a
# head reads are right under both.
_CHANGE_STATES = ("embedding", "activation")
"""Kinds of patches that change hidden states."""


class Config(MethodConfig):
    """Hyperparameters of ARGS; give one of `reward` and `head`."""

    name: Literal["args"] = "args"
    """The method."""
    # Both default to null, so that the method has a config without either, as all methods have one.
    reward: Source | None = None
    """Source of the reward model: a sequence classifier with one output and the model's tokenizer. Paper:
    hf:argsearch/llama-7b-rm-float32."""
    head: Source | None = None
    """Source of a safetensors file with a weight (1, D) and optionally a bias (1,): a reward head on the last hidden states of
    the model itself."""
    # The reward is added to a log-probability: w is in nats for each unit of reward.
    weight: float = 1.5
    """w, the factor of the reward. Paper: 1.5."""
    # All k candidates go through the model in one call, so the cost of a step grows with k.
    candidates: int = Field(10, ge=1)
    """k, the number of likeliest tokens that are scored. Paper: 10."""

    @model_validator(mode="after")
    def _has_one_reward(self) -> Config:
        # This check is not in `check`, because the catalogue and the editor describe a config without either key; `check`
        # refuses a job without one.
        if self.reward is not None and self.head is not None:
            raise ValueError("give reward (a reward model) or head (a head on the model's own states), not both")
        return self


def assemble(config: Config, model: SteeredModel) -> patches.SavedPatch:
    """Return the patch that re-scores the model's candidates.

    Raises:
        ValueError: the reward model has another tokenizer, or the head another width; or a patch changes the model's states.
    """
    # The reward model itself is not part of the patch: it is loaded from its source wherever the patch is attached.
    patch = patches.RewardPatch(config.reward, config.head, config.weight, config.candidates)
    if config.reward is not None:
        _check_tokenizer(config.reward, model)
        return patch
    # The candidates are read without the hooks' arguments (roles, positions) of the running call.
    if any(below.kind in _CHANGE_STATES for below in model.patches):
        raise ValueError("method.head: a patch below steers the model's states, which a head would not see; use reward")
    # The call is made for its checks only: the head's width is compared here, before the job's evaluation starts.
    patch.rewards(model.model)
    return patch


def _check_tokenizer(reward: str, model: SteeredModel) -> None:
    """Raise ValueError unless the reward model's tokenizer gives every token the id that the model's own gives it."""
    # The vocabularies are compared token by token: two vocabularies of one size may number their tokens differently, and the
    # reward model would then score other words.
    own = model.encoder.tokenizer.get_vocab()
    other = models.named.load_tokenizer(models.prepare(sources.fetch(reward))).get_vocab()
    # Only the model's tokens are looked up, because tokens that the model cannot write never reach the reward model. The reward
    # model may have further tokens, such as one for padding.
    different = [token for token, number in own.items() if other.get(token) != number]
    if different:
        raise ValueError(
            f"method.reward: {reward} has another tokenizer: {different[0]!r:.40} and {len(different) - 1} other tokens of the "
            "model have another number or none in it"
        )


def check(config: Config, facts: ModelFacts, job: Job) -> None:
    """Raise ValueError for a reward model that does not exist or does not go with the model, and for too many candidates."""
    # These keys are required here and not in `Config`, because the catalogue describes a config without either.
    if config.reward is None and config.head is None:
        raise ValueError(
            "method.reward: this key is required by method args: the source of a reward model (or give method.head)"
        )
    # `topk` would otherwise raise in the first step of the first generation.
    if config.candidates > facts.vocab_size:
        raise ValueError(f"method.candidates {config.candidates}: the model has {facts.vocab_size} tokens")
    # The source is fetched and its config read before the job starts; no weights are loaded.
    try:
        if config.reward is None:
            sources.fetch(config.head or "")
            return
        # The config of the reward model shows that it has one output, and how many tokens its embedding has.
        num = models.check_reward_model(models.prepare(sources.fetch(config.reward)))
    # The message names the key of the job, which the code that raised the error does not know.
    except ValueError as error:
        raise ValueError(f"method.{'head' if config.reward is None else 'reward'}: {error}") from None
    # The reward model may have more tokens, because embedding tables are often padded to a multiple of 64 or 128.
    if num < facts.vocab_size:
        raise ValueError(f"method.reward: {config.reward} has {num} tokens, the model {facts.vocab_size}: another tokenizer")


# No range of strengths is given: the strength multiplies w, and a negative strength prefers the worst candidate.
METHOD = Assembled(Config, assemble, check=check)
