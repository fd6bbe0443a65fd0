"""Judges of pairs that need only the texts: a reward model, a local language model, or an API."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from steerlab import models
from steerlab.data import sources
from steerlab.evaluation.judging import answer_rewards, judges, scorers
from steerlab.evaluation.judging.asking import Asker
from steerlab.evaluation.judging.endpoint import Endpoint
from steerlab.evaluation.judging.judges import Compare, Compared, Verdict
from steerlab.evaluation.judging.verdicts import better
from steerlab.evaluation.statistics.metrics import Observation, Score, observed
from steerlab.guards import saved


class PairJudge(NamedTuple):
    """A judge of pairs under the name of its metric."""

    name: str
    compare: Compare
    both_orders: bool = False
    """Whether the judge is asked in both orders, so that its bias for a position is known."""

    def observations(self, task: str, item_id: str, compared: Compared, strength: float) -> list[Observation]:
        """Turn a comparison into observations: the winner, and the effect of the order."""
        verdict = compared.verdict
        values = {self.name: verdict, "ties": float(verdict == 0.5) if isinstance(verdict, float) else verdict}
        own = [observed(f"{task}/{name}", item_id, value, strength) for name, value in values.items()]
        if not self.both_orders:
            return own
        # Equal texts were not shown to the judge, so they have weight 0 in the metrics of the order.
        shown = compared.orders is not None
        orders: dict[str, Score] = {"first_shown": 0.5, "agreement": 0.5}
        if shown:
            orders = {"first_shown": judges.first_shown(compared), "agreement": judges.agreement(compared)}
        return own + [observed(f"{task}/{name}", item_id, value, strength, float(shown)) for name, value in orders.items()]


def behind_api(endpoint: Endpoint, question: str) -> PairJudge:
    """Return the judge of an API, asked in both orders."""
    asker = Asker(endpoint)

    def ask(questions: Sequence[str]) -> list[Verdict]:
        return [better(said) for said in asker([[{"role": "user", "content": text}] for text in questions])]

    return PairJudge("language_model", judges.in_both_orders(ask, question), both_orders=True)


def local(source: str, question: str, *, both_orders: bool, seed: int, device: torch.device | str) -> PairJudge:
    """Load a reward model or a causal language model; its config.json decides which.

    Raises:
        ValueError: a question or a random order is set for a reward model, which gets no question.
    """
    if is_classifier(source):
        if not both_orders or question != judges.QUESTION:
            raise ValueError(f"question and both_orders are for a language model, but {source} is a reward model")
        return PairJudge("reward_model", judges.once(judges.by_reward(answer_rewards.reward_model(source, device))))
    if both_orders:
        ask = scorers.first_or_second(source, ("1", "2"), device)
        return PairJudge("language_model", judges.in_both_orders(ask, question), both_orders=True)
    judge = judges.language_model(source, question, both_orders=False, seed=seed, device=device)
    return PairJudge("language_model", judges.once(judge))


class _Architectures(saved.Shape):
    architectures: list[str] | None = None


def is_classifier(source: str) -> bool:
    """Return whether a model is a sequence classifier, by its config.json."""
    config = saved.read(models.prepare(sources.fetch(source)) / "config.json", _Architectures)
    return any(name.endswith("ForSequenceClassification") for name in config.architectures or ())
