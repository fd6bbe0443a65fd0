"""Whether the patched model prefers the responses that humans prefer.

Each held-out pair has a chosen and a rejected response. For every strength alpha the reference is the model at strength 0
(Rafailov et al., arXiv 2305.18290: the implicit reward of a policy is beta log(pi / pi_ref)):

    preference/margin                beta [ (log pi_alpha - log pi_0)(chosen) - (log pi_alpha - log pi_0)(rejected) ], nats
    preference/accuracy              pairs with a margin above 0, the implicit accuracy              higher is better
    preference/likelihood_accuracy   pairs whose chosen response has the higher log pi_alpha; longer responses have lower ones
    preference/chosen_logp           log pi_alpha(chosen), nats a response; training often lowers it while the margin grows
    preference/rejected_logp         log pi_alpha(rejected), nats a response
    preference/chosen_reward         beta (log pi_alpha - log pi_0)(chosen), nats; below 0 they became less likely
    preference/rejected_reward       the same for the rejected responses; the margin is the difference of the two
    preference/kl                    KL(pi_alpha || pi_0) in nats per response token, the change of the model's outputs
    preference/shorter               pairs whose chosen response has fewer tokens (a tie counts 0.5). A control: the accuracy
                                     of a policy that always prefers the shorter response; 1 minus it for the longer one

At strength 0, and for a model without a patch, every margin is 0, without an accuracy. Log-probabilities are sums over the
tokens of a response. A pair that is longer than `max_tokens`, or than the model's context, is not scored and counted as too
long.

The default needs no hub: the 60 pairs of LLaMA-Factory's demonstration data that jobs/iav.yaml does not train on.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from steerlab.evaluation.asking.items import Numbered, data_rows
from steerlab.evaluation.statistics.measures import Measure, share
from steerlab.evaluation.statistics.metrics import TOO_LONG, Observation, Result, Task, observed
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.tokens import Pair
from steerlab.job import DataSet, TaskConfig
from steerlab.steered import explain
from steerlab.steered.explain import Scored
from steerlab.steered.language import SteeredModel

PAIRS = "sdist:llamafactory==0.9.5#data/dpo_en_demo.json"


def require_pairs(data: DataSet) -> DataSet:
    """Return the data set if its rows are preference pairs. Raises ValueError otherwise."""
    if data.format != "preference":
        raise ValueError(f"the task needs two responses: set pairs.format to preference, not {data.format}")
    return data


class Config(TaskConfig):
    """Preference between two responses."""

    task: Literal["preference"] = "preference"
    """This task."""
    pairs: Annotated[DataSet, AfterValidator(require_pairs)] = DataSet.model_validate(
        {"source": PAIRS, "format": "preference", "offset": 240}
    )
    """Held-out pairs."""
    beta: float = Field(0.1, gt=0)
    """Factor of the margin, DPO's beta; it does not change any accuracy."""
    max_tokens: int = Field(2048, ge=2)
    """Pairs with more tokens are not scored."""


_MEASURES = (
    share("accuracy", "higher"),
    Measure("margin", "higher", "nats", transform="mean"),
    share("likelihood_accuracy", "higher"),
    Measure("kl", "lower", "nats a token", low=0.0, transform="mean"),
    share("shorter", None),
    Measure("chosen_logp", "higher", "nats", high=0.0, transform="mean"),
    # These have no better direction: a good policy may make both responses likelier, or both less likely.
    Measure("rejected_logp", None, "nats", high=0.0, transform="mean"),
    Measure("chosen_reward", "higher", "nats", transform="mean"),
    Measure("rejected_reward", None, "nats", transform="mean"),
)
NAMES = tuple(measure.name for measure in _MEASURES)


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures of the numbers that the task reports."""
    return _MEASURES


def run(model: SteeredModel, config: Config) -> Result:
    """Score the pairs at every strength."""
    items = data_rows(config.pairs, config.limit, config.rows_seed)
    longest = int(min(config.max_tokens, model.max_tokens))
    # Pairs are cut at one token more than fits, so that a cut pair is longer than the limit, unlike one that just fits.
    encoded = encode_data(model.encoder, [item.row for item in items], "preference", longest + 1)
    fits = {n: row for n, row in zip(encoded.numbers, encoded.rows, strict=True) if len(row) <= longest}
    rows = [row for row in fits.values() if isinstance(row, Pair)]
    observations, samples = [], []
    for strength, scored in zip(config.strengths, explain.score(model, rows, config.strengths), strict=True):
        of = dict(zip(fits, scored, strict=True))
        # Without a patch, or at strength 0, policy and reference are the same model and every margin is 0.
        compares = bool(model.patches) and strength != 0
        for n, item in enumerate(items):
            observations += observe(item.id, of.get(n), config.beta, strength, compares)
            samples.append(_sample(item, of.get(n), config.beta, strength))
    return Result(observations, samples, measures(config))


def observe(pair_id: str, scored: Scored | None, beta: float, strength: float, compares: bool) -> list[Observation]:
    """Turn the scores of one pair into observations.

    Args:
        pair_id: id of the pair.
        scored: scores of the chosen and the rejected response; None if the pair is too long.
        beta: factor of the margin.
        strength: strength of the patch.
        compares: whether the policy differs from the reference; otherwise the pair has no weight in the accuracy.
    """
    if scored is None:
        return [observed(f"preference/{name}", pair_id, TOO_LONG, strength) for name in NAMES]
    chosen, rejected = scored
    num_tokens = chosen.num_tokens + rejected.num_tokens
    gap, likelier = margin(scored, beta), chosen.log_prob > rejected.log_prob
    rewards = [beta * (response.log_prob - response.base_log_prob) for response in scored]
    # The KL divergence is estimated on the tokens of both responses, hence the weight by their number.
    shorter = 0.5 if chosen.num_tokens == rejected.num_tokens else float(chosen.num_tokens < rejected.num_tokens)
    values = {
        "accuracy": float(gap > 0),
        "margin": gap,
        "likelihood_accuracy": float(likelier),
        "chosen_logp": chosen.log_prob,
        "rejected_logp": rejected.log_prob,
        "chosen_reward": rewards[0],
        "rejected_reward": rewards[1],
        "kl": (chosen.kl + rejected.kl) / num_tokens,
        "shorter": shorter,
    }
    # A margin that is 0 by construction is not a preference, so its weight 0 excludes the pair from the accuracy.
    weights = {"accuracy": float(compares), "kl": float(num_tokens)}
    return [Observation(f"preference/{n}", pair_id, values[n], weights.get(n, 1.0), strength) for n in NAMES]


def margin(scored: Scored, beta: float) -> float:
    """Return beta times the difference of the log-ratios of the chosen and the rejected response, in nats."""
    chosen, rejected = (response.log_prob - response.base_log_prob for response in scored)
    return beta * (chosen - rejected)


def _sample(item: Numbered, scored: Scored | None, beta: float, strength: float) -> dict[str, object]:
    texts = {name: item.row[name] for name in ("prompt", "chosen", "rejected")}
    return {"id": item.id, "strength": strength, **texts, "margin": None if scored is None else margin(scored, beta)}


TASK = Task(Config, run, measures, version=4)
