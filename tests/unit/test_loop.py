"""The pure functions under the training loop."""

from __future__ import annotations

import itertools

import pytest
import torch

from steerlab.job import TrainConfig
from steerlab.methods.contract import Loss
from steerlab.training.engine import Engine
from steerlab.training.loop import learning_rate, rows_of_step, share_of_rank


def test_every_epoch_sees_every_row_once_in_another_order() -> None:
    rows = [row for step in range(6) for row in rows_of_step(9, 3, seed=1, step=step)]
    assert sorted(rows[:9]) == sorted(rows[9:]) == list(range(9))
    assert rows[:9] != rows[9:]


def test_rows_of_a_step_do_not_depend_on_what_came_before() -> None:
    """An epoch that does not divide into steps continues within the step."""
    rows = [row for step in range(7) for row in rows_of_step(10, 4, seed=0, step=step)]
    assert sorted(rows[:10]) == sorted(rows[10:20]) == list(range(10))
    assert rows_of_step(10, 4, 0, 5) == rows[20:24]
    assert rows_of_step(3, 8, 0, 0) != []


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_ranks_share_a_step_without_loss(workers: int) -> None:
    rows, lengths = rows_of_step(50, 16, 3, 2), list(range(50))
    shares = [share_of_rank(rows, lengths, rank, workers, micro_batch=3) for rank in range(workers)]
    assert sorted(row for share in shares for chunk in share for row in chunk) == sorted(rows)
    assert all(len(chunk) <= 3 for share in shares for chunk in share)
    assert len({len(share) for share in shares}) == 1


def test_warm_up_then_a_line_to_the_floor() -> None:
    train = TrainConfig(steps=12, lr=2.0, schedule="linear", warmup_steps=2, lr_floor=0.1)
    rates = [learning_rate(train, step) for step in range(12)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[2:] == pytest.approx([2.0 - 0.18 * step for step in range(10)])
    assert learning_rate(train, 12) == pytest.approx(0.2)


def test_warm_up_then_cosine_to_the_floor() -> None:
    train = TrainConfig(steps=10, lr=1.0, warmup_steps=2, lr_floor=0.1)
    rates = [learning_rate(train, step) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert all(a > b for a, b in itertools.pairwise(rates[2:]))
    assert learning_rate(train, 10) == pytest.approx(0.1)
    assert learning_rate(train, 6) == pytest.approx(0.55)


def test_a_loss_that_depends_on_nothing_trained_is_refused_before_the_first_step() -> None:
    """A patch that was never attached; DeepSpeed would say that a loss must be a scalar."""
    weight = torch.nn.Parameter(torch.ones(3))
    engine = object.__new__(Engine)
    engine.module = torch.nn.Linear(2, 2)
    engine._ds = lambda batch: Loss(weight.detach().sum(), {})
    with pytest.raises(ValueError, match=r"loss of Linear does not depend on any trained parameter.* is its patch attached"):
        engine.backward(None, 1)


def test_constant_schedule() -> None:
    train = TrainConfig(steps=4, lr=0.3, schedule="constant")
    assert {learning_rate(train, step) for step in range(4)} == {0.3}
