"""LinEAS against its authors' formulas, derived again: both conventions of the loss, the proximal steps, the learning rate."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlab import models
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Batch, collate
from steerlab.job import TrainConfig
from steerlab.methods.contract import Inputs
from steerlab.methods.lineas import Config, Lineas, proximal
from steerlab.training.schedule import learning_rate

NUM = 32


class Sample:
    """What an extraction left, with values that the test sets: a target for places of the tiny model."""

    def __init__(self, origin: Any, columns: dict[str, torch.Tensor]) -> None:
        self.origin, self.columns, self.modules = origin, columns, list(columns)

    def column(self, name: str, pooling: str) -> torch.Tensor:
        return self.columns[name]


@pytest.fixture
def loss_of(tiny_dir: Path, encoder: Encoder) -> Any:
    """A function (source, target by place, settings) -> loss of a step: what the model computes is replaced by `source`."""
    rows = [encoder.encode(encoder.from_row({"text": "the old ship"}, "text"))] * NUM
    batch: Batch = collate(rows, encoder.pad_id)

    def loss(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor], **settings: object) -> float:
        model = models.load_model(tiny_dir, seed=0)

        class Origin:
            fingerprint, selection = models.fingerprint(model), {"modules": "model.layers.[01].mlp"}

        inputs = Inputs(activations={"target": Sample(Origin, target)})  # type: ignore[dict-item]
        trainee = Lineas(model, Config.model_validate({"steer": {"modules": "model.norm"}, **settings}), inputs)
        trainee._read.close()
        tokens = batch.input_ids.shape[1]
        # Every token of a text has the text's value, so that its mean is that value.
        trainee._read = lambda **_: {name: z[:, None].expand(-1, tokens, -1) for name, z in source.items()}  # type: ignore[assignment]
        with torch.no_grad():
            return float(trainee(batch).total) / NUM

    return loss


def places(seed: int, shift: float = 0.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"model.layers.{i}.mlp": torch.randn(NUM, size, generator=generator) + shift for i, size in enumerate((48, 20))}


def test_the_papers_loss_sums_neurons_and_places_and_averages_samples(loss_of: Any) -> None:
    source, target = places(0), places(1, 0.5)
    expected = sum(
        ((source[name][:, j].sort().values - target[name][:, j].sort().values) ** 2).sum().item() / NUM
        for name in source
        for j in range(source[name].shape[1])
    )
    assert loss_of(source, target) == pytest.approx(expected, rel=1e-5)


def test_the_codes_loss_averages_neurons_and_places_and_sums_samples(loss_of: Any) -> None:
    source, target = places(0), places(1, 0.5)
    expected = 0.0
    for name in source:
        gaps = [
            ((source[name][:, j].sort().values - target[name][:, j].sort().values) ** 2).sum().item()
            for j in range(source[name].shape[1])
        ]
        expected += sum(gaps) / len(gaps) / len(source)
    assert loss_of(source, target, reduction="code") == pytest.approx(expected, rel=1e-5)


def test_a_shift_of_three_costs_288_in_the_code_and_9_for_each_neuron_in_the_paper(loss_of: Any) -> None:
    source = places(0)
    target = {name: z + 3 for name, z in source.items()}
    assert loss_of(source, target, reduction="code") == pytest.approx(288, rel=1e-5)
    assert loss_of(source, target) == pytest.approx(9 * (48 + 20), rel=1e-5)
    assert loss_of(source, target, criterion="w1") == pytest.approx(3 * (48 + 20), rel=1e-5)


@pytest.mark.parametrize("weights", [{}, {"l1_shift": 0.2, "group_shift": 2.0}], ids=["shared", "own"])
def test_the_proximal_step_thresholds_entries_and_then_shrinks_the_group(weights: dict[str, float]) -> None:
    """soft(v, tau gamma l1), then max(0, 1 - tau gamma lG sqrt(d) / |v|) v, on w - 1 and b separately; tau = lr."""
    width, lr, gamma, l1, group = 1536, 0.1, 0.05, 1.0, 0.5
    v = 0.02 * torch.randn(2, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    l1_21, group_21 = Config.model_validate({"gamma": gamma, "l1": l1, "group": group, **weights}).penalty_21
    found = proximal(v, lr * l1_21.double(), lr * group_21.double())
    for row, (weight, group_weight) in enumerate(
        ((l1, group), (weights.get("l1_shift", l1), weights.get("group_shift", group)))
    ):
        soft = [math.copysign(max(abs(x) - lr * gamma * weight, 0), x) for x in v[row].tolist()]
        norm = math.sqrt(sum(x * x for x in soft))
        shrink = max(0.0, 1 - lr * gamma * group_weight * math.sqrt(width) / norm)
        torch.testing.assert_close(found[row], shrink * torch.tensor(soft, dtype=torch.float64), rtol=1e-5, atol=1e-9)
    assert 0 < (found == 0).double().mean() <= 1


def test_the_learning_rate_is_torchs_cosine_to_a_thousandth() -> None:
    """The authors: CosineAnnealingLR over all steps with eta_min = lr / 1000."""
    train = TrainConfig.model_validate({"steps": 1000, "lr": 0.1, "lr_floor": 0.001, "micro_batch": 32, "max_tokens": 48})
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=1000, eta_min=0.1 * 0.001)
    for step in range(1000):
        assert learning_rate(train, step) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6, abs=1e-12)
        optimizer.step()
        schedule.step()
