"""Losses of preference pairs, as functions of the log-probabilities of response tokens.

With the reward r of a response under the trained policy, the margin of a pair and beta, the loss is one of

    sigmoid   (1 - e) s(m) + e s(-m), s(m) = -log sigmoid(m)     DPO, arXiv 2305.18290, eq. 7; e > 0: conservative DPO, eq. 3 of
                                                                https://ericmitchell.ai/cdpo.pdf
    robust    [ (1 - e) s(m) - e s(-m) ] / (1 - 2 e)             robust DPO, arXiv 2403.00409, the unbiased loss of section 3
    hinge     max(0, 1 - m)                                      SLiC's loss with DPO's reward, as in RSO, arXiv 2309.06657
    ipo       (m / beta - 1 / (2 beta))^2                        IPO, arXiv 2310.12036, eq. 17, whose tau is beta here

    m = r(y_w) - r(y_l)        y_w the chosen response, y_l the rejected one, e the share of pairs whose labels are flipped

A supervised term may be added to any of them: alpha times the mean negative log-likelihood of the chosen response (RPO,
arXiv 2404.19733, eq. 1). It keeps the likelihood of chosen responses from falling, which the losses above allow: they only ask
that of the rejected ones to fall further.

Axes besides those of tokens.py: N response tokens of a batch, S its sequences (chosen, rejected, chosen, ...), P its pairs.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from steerlab.job import MethodConfig
from steerlab.steered.scoring import Predicted


# The fields are inherited instead of nested in a config of their own, so that a job writes `method.loss`.
class PairLossConfig(MethodConfig):
    """Fields of methods whose loss is one of those above. At its default a field is excluded from the keys of artifacts."""

    loss: Literal["sigmoid", "robust", "hinge", "ipo"] = Field("sigmoid", exclude_if=lambda loss: loss == "sigmoid")
    """Loss of a pair with margin m: sigmoid: -log sigmoid(m); robust: the same, corrected for flipped labels; hinge:
    max(0, 1 - m); ipo: (m / beta - 1 / (2 beta))^2."""
    # The limit is 0.5, because at one half the two labels weigh the same and the robust loss divides by 1 - 2 e = 0.
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, exclude_if=lambda share: share == 0)
    """Share of pairs whose labels are taken to be flipped: conservative DPO with loss sigmoid; robust needs it."""
    chosen_nll: float = Field(0.0, ge=0, exclude_if=lambda weight: weight == 0)
    """Weight of the mean negative log-likelihood of the chosen response, in nats per token (alpha of RPO's eq. 1; there 1)."""

    @model_validator(mode="after")
    def _check(self) -> PairLossConfig:
        # The setting is refused instead of ignored: a job that names a share of flipped labels would seem to use it.
        if self.label_smoothing and self.loss in ("hinge", "ipo"):
            raise ValueError(f"label_smoothing {self.label_smoothing:g}: loss {self.loss} has none; use sigmoid or robust")
        if self.loss == "robust" and not self.label_smoothing:
            raise ValueError("loss robust: give the share of flipped labels as label_smoothing; at 0 it is sigmoid")
        # `beta` belongs to the derived config; SimPO's cannot be 0, DPO's can.
        if self.loss == "ipo" and getattr(self, "beta", 1.0) == 0:
            raise ValueError("loss ipo: its margin is 1 / (2 beta), so beta has to be above 0")
        return self


# All tensors are (P,): the losses, the penalties and the log need these values of the two responses.
class Pairs(NamedTuple):
    """The two responses of each pair under the policy, (P,), in nats."""

    # Sequences come as chosen, rejected, chosen, ..., so that every second entry belongs to one side of the pairs.
    chosen_logp_P: Tensor
    """Log-probability of the chosen response, a sum over its tokens."""
    rejected_logp_P: Tensor
    chosen_reward_P: Tensor
    """Reward of the chosen response: beta times its log-ratio to the reference, or its log-probability without one."""
    rejected_reward_P: Tensor
    chosen_nll_P: Tensor
    """Mean negative log-probability of the chosen response's tokens."""

    @property
    def margin_P(self) -> Tensor:
        """Difference of the two rewards."""
        # m of the module docstring; beta is a factor of both rewards already.
        return self.chosen_reward_P - self.rejected_reward_P

    def metrics(self) -> dict[str, Tensor]:
        """Return sums over the pairs for the training's log.

        `chosen_logp` is the one to watch: a margin also grows while the chosen responses become less likely.
        """
        # The property is read once, because it would be computed for each of the metrics.
        margin_P = self.margin_P
        values = {
            "margin": margin_P,
            # A tie counts as wrong: without a trained vector all margins are 0, and the accuracy is 0 instead of 1.
            "accuracy": margin_P > 0,
            "chosen_logp": self.chosen_logp_P,
            "rejected_logp": self.rejected_logp_P,
            "chosen_reward": self.chosen_reward_P,
            "rejected_reward": self.rejected_reward_P,
        }
        # The loop divides these sums by the number of pairs of the whole step, as it does for every metric.
        return {name: value_P.detach().float().sum() for name, value_P in values.items()}


def compare(
    log_prob_N: Tensor, reference_N: Tensor | None, tokens: Predicted, beta: float, length_average: bool = False
) -> Pairs:
    """Return the log-probabilities and rewards of the responses of each pair.

    Args:
        log_prob_N: log pi(y_t) of each response token, in nats.
        reference_N: log pi_ref(y_t) of each token; None for a reward without a reference (SimPO, reward models).
        tokens: The response tokens, of sequences chosen, rejected, chosen, ...
        beta: Scale of the reward (beta of DPO's eq. 7).
        length_average: Whether a reward is a mean over the tokens of a response instead of a sum.
    """
    # The difference log pi - log pi_ref (or log pi without a reference), r of the module docstring, is taken token by token:
    # the two sums are large and nearly equal, and float32 would lose digits.
    score_N = log_prob_N if reference_N is None else log_prob_N - reference_N
    # `size_S` is the number of response tokens of each sequence, (S,).
    size_S = _counts(tokens.sequence_N, tokens.sequences)
    score_S, logp_S = (_sums(values_N, size_S, tokens) for values_N in (score_N, log_prob_N))
    # Without a reference a sum favours short responses, whose log-probability is larger; `length_average` avoids that.
    reward_S = beta * (score_S / size_S if length_average else score_S)
    # The supervised term is the mean over the tokens of the chosen response, whatever the reward is.
    return Pairs(logp_S[0::2], logp_S[1::2], reward_S[0::2], reward_S[1::2], -logp_S[0::2] / size_S[0::2])


def loss(margin_P: Tensor, beta: float, config: PairLossConfig | None = None) -> Tensor:
    """Return the loss of each pair in nats, (P,), without the supervised term (see the equations above).

    Args:
        margin_P: Differences of the rewards, which are scaled by beta already.
        beta: Scale of the rewards, which IPO takes out again.
        config: Which of the losses; None for sigmoid without smoothing.
    """
    # A caller without a config, GenARM's reward model, trains on the plain loss of eq. 7.
    kind, flipped = ("sigmoid", 0.0) if config is None else (config.loss, config.label_smoothing)
    if kind == "hinge":
        # Pairs with a margin above 1 have no gradient; only the others move the policy.
        return torch.relu(1 - margin_P)
    # IPO replaces log sigmoid by a square, so that a pair that is always won does not push the margin to infinity. The margin
    # is divided by beta again, because IPO regresses the plain log-ratio, and its target 1 / (2 beta) is in nats.
    if kind == "ipo":
        return (margin_P / beta - 1 / (2 * beta)).square()
    # `logsigmoid` is used, because log(sigmoid(x)) is -inf for margins below about -100 in float32. s(m) and s(-m), (P,) each,
    # are computed once for the two losses that use both.
    as_labelled_P, as_flipped_P = -nn.functional.logsigmoid(margin_P), -nn.functional.logsigmoid(-margin_P)
    # With flip probability e the expected loss of a pair is (1 - e) s(m) + e s(-m); the combination below inverts that mixture.
    if kind == "robust":
        # The loss is unbiased: its expectation over labels that are flipped with probability e is the loss of the true labels.
        # It may be negative.
        return ((1 - flipped) * as_labelled_P - flipped * as_flipped_P) / (1 - 2 * flipped)
    # At e = 0 the second term is 0 times a finite number, since `logsigmoid` is finite, so that this is plain DPO bit for bit.
    return (1 - flipped) * as_labelled_P + flipped * as_flipped_P


def total(pairs: Pairs, loss_P: Tensor, config: PairLossConfig) -> Tensor:
    """Return the loss of each pair with the supervised term, (P,) (RPO's eq. 1)."""
    # At weight 0 the term is not added, because 0 times an infinite likelihood is NaN. alpha multiplies the mean over the
    # tokens of y_w, in nats per token, which is as large as an ordinary fine-tuning loss.
    return loss_P + config.chosen_nll * pairs.chosen_nll_P if config.chosen_nll else loss_P


# IAV's penalties, KL and |a|^2 per response token, are such means.
def mean_of_pairs(values_N: Tensor, tokens: Predicted) -> Tensor:
    """Return the mean over the response tokens of each pair, (P,)."""
    # The mean is over the tokens of both responses together, so that a long response weighs more than a short one.
    pair_N, num = tokens.sequence_N // 2, tokens.sequences // 2
    return values_N.new_zeros(num).index_add(0, pair_N, values_N) / _counts(pair_N, num)


def _counts(number_N: Tensor, num: int) -> Tensor:
    """Return how often each number below `num` occurs, (num,)."""
    # `bincount` reads the largest number first, for which the program would wait on a GPU.
    return number_N.new_zeros(num).index_add(0, number_N, torch.ones_like(number_N))


def _sums(values_N: Tensor, size_S: Tensor, tokens: Predicted) -> Tensor:
    """Return the sum over the tokens of each sequence, (S,)."""
    # `index_add` needs no sizes on the CPU, while a split by sizes would wait for a GPU. (N,) to (S,).
    return values_N.new_zeros(len(size_S)).index_add(0, tokens.sequence_N, values_N)
