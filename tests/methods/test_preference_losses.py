"""Losses of preference pairs against their equations, term by term, in float64 and in plain Python."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from steerlab import models, patches
from steerlab.data.worlds import tiny
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Batch, collate
from steerlab.methods import dpo, genarm, iav, simpo
from steerlab.methods.contract import Inputs, Trainee, trained_parameters
from steerlab.methods.math import pair_losses
from steerlab.methods.math.pair_losses import PairLossConfig
from steerlab.patches import WeightPatch
from steerlab.steered.language import SteeredModel
from steerlab.steered.scoring import Predicted

SIZES = (5, 3, 2, 6)
TOKENS = Predicted(torch.arange(4).repeat_interleave(torch.tensor(SIZES)), torch.zeros(16).long(), torch.arange(16))
BETA = 0.3
LORA = {"rank": 3, "layer_type": ["attn_q", "ffn_down"]}


def config(**fields: Any) -> PairLossConfig:
    return PairLossConfig(name="any", **fields)


def of_responses(average: bool) -> tuple[list[float], list[float], list[list[float]]]:
    """Scores of the four responses against a reference, their log-probabilities, and those of the tokens."""
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (-torch.rand(16, generator=generator).double() * 4 for _ in range(2))
    policy, reference = ([part.tolist() for part in values.split(SIZES)] for values in (log_p, log_q))
    gaps = [sum(p) - sum(q) for p, q in zip(policy, reference, strict=True)]
    scores = [gap / size if average else gap for gap, size in zip(gaps, SIZES, strict=True)]
    pairs = pair_losses.compare(log_p, log_q, TOKENS, BETA, average)
    for found, wanted in (
        (pairs.chosen_logp_P, [sum(policy[0]), sum(policy[2])]),
        (pairs.rejected_logp_P, [sum(policy[1]), sum(policy[3])]),
        (pairs.chosen_reward_P, [BETA * scores[0], BETA * scores[2]]),
        (pairs.rejected_reward_P, [BETA * scores[1], BETA * scores[3]]),
        (pairs.chosen_nll_P, [-sum(policy[0]) / 5, -sum(policy[2]) / 2]),
    ):
        assert found.tolist() == pytest.approx(wanted, rel=1e-12)
    return scores, pairs.margin_P.tolist(), policy


@pytest.mark.parametrize("average", [False, True])
def test_rewards_and_likelihoods_are_sums_or_means_over_each_response(average: bool) -> None:
    scores, margins, _ = of_responses(average)
    assert margins == pytest.approx([BETA * (scores[0] - scores[1]), BETA * (scores[2] - scores[3])], rel=1e-12)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# The equations as they are printed: h is the difference of log-ratios, beta h the margin.
EQUATIONS: dict[str, tuple[dict[str, Any], Any]] = {
    "dpo, eq. 7": ({}, lambda h: -math.log(sigmoid(BETA * h))),
    "cdpo, eq. 3": (
        {"label_smoothing": 0.1},
        lambda h: -0.9 * math.log(sigmoid(BETA * h)) - 0.1 * math.log(sigmoid(-BETA * h)),
    ),
    "robust dpo": (
        {"loss": "robust", "label_smoothing": 0.2},
        lambda h: (-0.8 * math.log(sigmoid(BETA * h)) + 0.2 * math.log(sigmoid(-BETA * h))) / 0.6,
    ),
    "hinge": ({"loss": "hinge"}, lambda h: max(0.0, 1 - BETA * h)),
    "ipo, eq. 17": ({"loss": "ipo"}, lambda h: (h - 1 / (2 * BETA)) ** 2),
}


@pytest.mark.parametrize("name", EQUATIONS)
def test_each_loss_is_its_equation(name: str) -> None:
    fields, equation = EQUATIONS[name]
    h_P = torch.tensor([-9.0, -1.5, -0.1, 0.0, 0.2, 1.0, 3.4, 40.0], dtype=torch.float64)
    found = pair_losses.loss(BETA * h_P, BETA, config(**fields)).tolist()
    assert found == pytest.approx([equation(h) for h in h_P.tolist()], rel=1e-10, abs=1e-12)


def test_robust_dpo_is_unbiased_under_flipped_labels() -> None:
    """Its expectation over flips of a share of labels is DPO's loss of the true labels (section 3 of its paper)."""
    margin_P = torch.linspace(-4, 4, 9, dtype=torch.float64)
    robust = config(loss="robust", label_smoothing=0.3)
    expected = 0.7 * pair_losses.loss(margin_P, 1.0, robust) + 0.3 * pair_losses.loss(-margin_P, 1.0, robust)
    torch.testing.assert_close(expected, pair_losses.loss(margin_P, 1.0))


def test_far_margins_have_finite_losses_and_gradients() -> None:
    for fields, _ in EQUATIONS.values():
        margin_P = torch.tensor([-500.0, 500.0], requires_grad=True)
        losses_P = pair_losses.loss(margin_P, BETA, config(**fields))
        losses_P.sum().backward()
        assert losses_P.isfinite().all() and margin_P.grad is not None and margin_P.grad.isfinite().all()


def test_losses_without_a_meaning_are_refused_and_defaults_leave_keys_alone() -> None:
    for fields, match in (
        ({"loss": "ipo", "label_smoothing": 0.1}, "loss ipo has none"),
        ({"loss": "robust"}, "share of flipped labels"),
        ({"label_smoothing": 0.5}, "less than 0.5"),
    ):
        with pytest.raises(ValueError, match=match):
            dpo.Config.model_validate(fields)
    with pytest.raises(ValueError, match="beta has to be above 0"):
        dpo.Config(loss="ipo", beta=0)
    with pytest.raises(ValueError, match=r"SimPO's is gamma"):
        simpo.Config(loss="ipo")
    assert set(dpo.Config().model_dump()) == {"name", "beta", "length_average", "lora"}
    assert dpo.Config(loss="hinge", chosen_nll=1.0).model_dump()["chosen_nll"] == 1.0


# --- in the methods ----------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(encoder: Encoder) -> Batch:
    rows = encode_data(encoder, tiny.rows("preferences/train", 8), "preference", 64).rows
    return collate(rows, encoder.pad_id, loss_on="response", numbers=range(8))


def trainee(method: Any, model: PreTrainedModel, **fields: Any) -> Any:
    torch.manual_seed(0)
    made: Trainee = method.METHOD.module(model, method.Config.model_validate(fields), Inputs())
    # Away from the start, where all rewards are 0.
    for parameter in trained_parameters(made).values():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return made.eval()


def likelihoods(model: Any, batch: Batch, **how: Any) -> list[list[float]]:
    """Log-probabilities of the response tokens of each sequence, from whole logits."""
    with torch.no_grad():
        logs_BTV = model(**batch.patched_inputs, **how).logits[:, :-1].double().log_softmax(-1)
    found = logs_BTV.gather(2, batch.input_ids[:, 1:, None])[..., 0]
    return [row[mask].tolist() for row, mask in zip(found, batch.labels[:, 1:] >= 0, strict=True)]


def test_simpo_is_equation_6_with_its_mean_and_margin(tiny_model: PreTrainedModel, batch: Batch) -> None:
    module = trainee(simpo, tiny_model, beta=2.5, gamma=0.7, chosen_nll=0.2)
    rows, expected = likelihoods(module.model, batch), 0.0
    for chosen, rejected in zip(rows[0::2], rows[1::2], strict=True):
        gap = 2.5 / len(chosen) * sum(chosen) - 2.5 / len(rejected) * sum(rejected) - 0.7
        expected += -math.log(sigmoid(gap)) - 0.2 * sum(chosen) / len(chosen)
    loss = module(batch)
    assert loss.total.item() == pytest.approx(expected, rel=1e-5)
    assert loss.metrics["chosen_logp"].item() == pytest.approx(sum(map(sum, rows[0::2])), rel=1e-5)


@pytest.mark.parametrize("lora", [None, LORA], ids=["whole", "lora"])
def test_simpo_leaves_the_change_of_its_weights(
    lora: Any, tiny_dir: Path, encoder: Encoder, batch: Batch, tmp_path: Path
) -> None:
    """The saved patch on the model at the start is the trained model, and strength 0 is the start, bit for bit."""
    module = trainee(simpo, models.load_model(tiny_dir, seed=0), lora=lora)
    with torch.no_grad():
        trained = module.model(**batch.patched_inputs).logits
    patches.save(module.finished(module.patch.state_dict()), tmp_path / "patch", "")
    (patch, plain) = patches.load(tmp_path / "patch"), models.load_model(tiny_dir, seed=0)
    assert isinstance(patch, WeightPatch)
    with torch.no_grad():
        start = plain(**batch.model_inputs).logits
    steered = SteeredModel(plain, encoder, (patch,))
    torch.testing.assert_close(steered.logits(batch, 1.0), trained, rtol=1e-4, atol=1e-4)
    assert torch.equal(steered.logits(batch, 0.0), start) and not torch.allclose(trained, start, atol=1e-3)
    num, _ = simpo.Simpo.size(module.config, plain)
    assert num == sum(p.numel() for p in trained_parameters(module).values())


@pytest.mark.parametrize("name", [name for name in EQUATIONS if name != "dpo, eq. 7"])
@pytest.mark.parametrize("method", [dpo, iav], ids=["dpo", "iav"])
def test_dpo_and_iav_take_each_loss_of_their_own_margin(
    method: Any, name: str, tiny_model: PreTrainedModel, batch: Batch
) -> None:
    fields, equation = EQUATIONS[name]
    rest = {"lora": LORA} if method is dpo else {"lambda_kl": 0, "lambda_l2": 0, "head": "low_rank", "rank": 2}
    module = trainee(method, tiny_model, beta=BETA, chosen_nll=0.5, **rest, **fields)
    policy = likelihoods(module.model, batch)
    if method is dpo:
        with module._reference() as reference:
            base = likelihoods(reference, batch)
    else:
        base = likelihoods(module.model, batch, strengths=torch.zeros(len(batch.labels)))
    gaps = [sum(p) - sum(q) for p, q in zip(policy, base, strict=True)]
    expected = sum(equation(chosen - rejected) for chosen, rejected in zip(gaps[0::2], gaps[1::2], strict=True))
    expected -= 0.5 * sum(sum(chosen) / len(chosen) for chosen in policy[0::2])
    loss = module(batch)
    assert loss.total.item() == pytest.approx(expected, rel=1e-4)
    assert loss.metrics["chosen_reward"].item() == pytest.approx(BETA * sum(gaps[0::2]), rel=1e-3, abs=1e-4)
    assert loss.metrics["rejected_reward"].item() == pytest.approx(BETA * sum(gaps[1::2]), rel=1e-3, abs=1e-4)
    assert loss.metrics["chosen_logp"].item() == pytest.approx(sum(map(sum, policy[0::2])), rel=1e-4)


@pytest.mark.parametrize("method", [dpo, iav, simpo, genarm], ids=lambda m: m.__name__.rpartition(".")[2])
def test_every_preference_training_logs_the_same_names(method: Any, tiny_model: PreTrainedModel, batch: Batch) -> None:
    metrics = {name: float(value) for name, value in trainee(method, tiny_model)(batch).metrics.items()}
    named = {"margin", "accuracy", "chosen_logp", "rejected_logp", "chosen_reward", "rejected_reward"}
    assert named <= set(metrics)
    assert metrics["margin"] == pytest.approx(metrics["chosen_reward"] - metrics["rejected_reward"], rel=1e-4, abs=1e-5)
    assert metrics["chosen_logp"] < 0 and 0 <= metrics["accuracy"] <= 8
