"""The pure functions under the training loop."""

from __future__ import annotations

import itertools

import pytest
import torch

from steerlab.inputs.tokens import IGNORED
from steerlab.job import TrainConfig, stops
from steerlab.methods.contract import Loss, next_token_loss
from steerlab.training.engine import Engine
from steerlab.training.schedule import learning_rate, rows_of_step, share_of_rank


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


def test_the_rows_of_a_step_are_those_of_permutations_seeded_by_their_epochs() -> None:
    """Whatever was asked before: runs of earlier releases continue with the same rows."""

    def drawn(num_rows: int, size: int, seed: int, step: int) -> list[int]:
        epochs = range(step * size // num_rows, ((step + 1) * size - 1) // num_rows + 1)
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + epoch) for epoch in epochs]
        rows = [row for generator in generators for row in torch.randperm(num_rows, generator=generator).tolist()]
        start = step * size - epochs[0] * num_rows
        return rows[start : start + size]

    for num_rows, size, seed in [(10, 4, 0), (3, 8, 7), (1, 1, 1), (1000, 64, 2**32 - 1)]:
        steps = [0, 1, 2, 40, 3, 0, 25, 24, 26]
        assert [rows_of_step(num_rows, size, seed, s) for s in steps] == [drawn(num_rows, size, seed, s) for s in steps]


def test_an_epoch_is_permuted_once_for_all_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing it for each step would make the choice of a step cost as much as there are rows."""
    drawn: list[int] = []
    randperm = torch.randperm
    monkeypatch.setattr(torch, "randperm", lambda num, **kwargs: drawn.append(num) or randperm(num, **kwargs))
    for step in range(100):
        rows_of_step(160, 3, seed=987_654, step=step)
    # 300 rows are the first epoch and most of the second.
    assert drawn == [160, 160]


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


def test_linear_decay_ends_at_the_floor() -> None:
    train = TrainConfig(steps=10, lr=2.0, schedule="linear", warmup_steps=2, lr_floor=0.25)
    rates = [learning_rate(train, step) for step in range(11)]
    assert rates[:3] == [1.0, 2.0, 2.0] and rates[10] == 0.5
    assert [a - b for a, b in itertools.pairwise(rates[2:])] == pytest.approx([1.5 / 8] * 8)


@pytest.mark.parametrize(
    ("epochs", "num_rows", "micro_batch", "steps"),
    [(2, 10, 4, 5), (1, 10, 4, 3), (3, 46_581, 64, 2184), (0.1, 30, 3, 1), (0.01, 10, 4, 1), (1.5, 8, 4, 3)],
)
def test_epochs_become_steps_once_the_rows_are_counted(epochs: float, num_rows: int, micro_batch: int, steps: int) -> None:
    """The last step of an epoch that does not divide holds the first rows of the next one, so only the end is rounded up."""
    train = TrainConfig(epochs=epochs, micro_batch=micro_batch, warmup_ratio=0.1).resolved(num_rows)
    assert train.num_steps == steps and train.warmup_steps == -(-steps // 10)
    assert train.epochs is None and not train.warmup_ratio
    seen = [row for step in range(steps) for row in rows_of_step(num_rows, micro_batch, 0, step)]
    assert len(seen) >= epochs * num_rows > len(seen) - micro_batch or steps == 1


def test_a_snapshot_after_the_last_epoch_is_refused_once_the_rows_are_counted() -> None:
    with pytest.raises(ValueError, match=r"train.snapshots \[4\]: not between 1 and train.steps 3"):
        TrainConfig(epochs=1, micro_batch=4, snapshots=(3, 4)).resolved(10)
    with pytest.raises(ValueError, match=r"train.warmup_steps 4 is more than train.steps 3"):
        TrainConfig(epochs=1, micro_batch=4, warmup_steps=4).resolved(10)


@pytest.mark.parametrize(
    ("losses", "patience", "ends"),
    [
        ([], 1, False),
        ([3.0], 1, False),
        ([3.0, 2.0, 2.5], 1, True),
        ([3.0, 2.0, 2.5], 2, False),
        ([3.0, 2.0, 2.5, 1.9, 2.0], 2, False),
        ([3.0, 2.0, 2.0, 2.0], 2, True),
        ([3.0, 2.0, 2.1, 2.05], 2, True),
    ],
)
def test_patience_counts_evaluations_since_the_lowest_loss(losses: list[float], patience: int, ends: bool) -> None:
    """A loss that is only reached again, or falls without becoming the lowest, is no progress."""
    assert stops(losses, patience) is ends


def test_fields_that_are_not_set_are_no_part_of_a_key() -> None:
    old = {"steps", "lr", "schedule", "lr_floor", "warmup_steps", "optimizer", "betas", "weight_decay", "momentum", "clip_norm"}
    old |= {"micro_batch", "grad_accum", "max_tokens", "eval_every", "keep", "snapshots", "seed"}
    assert TrainConfig(steps=3).model_dump().keys() == old
    assert TrainConfig(epochs=3).model_dump().keys() == old - {"steps"} | {"epochs"}
    assert TrainConfig.model_validate({"epochs": 3}).model_dump_json() == TrainConfig(epochs=3.0).model_dump_json()


def test_token_accuracy_counts_targets_alone() -> None:
    logits_BTV = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0))
    labels_BT = logits_BTV.argmax(-1).roll(1, 1)  # every token is predicted by the one before it
    labels_BT[0, 2] = (labels_BT[0, 2] + 1) % 7
    labels_BT[1, :3] = IGNORED
    loss = next_token_loss(logits_BTV, labels_BT)
    targets = [(b, t) for b in range(2) for t in range(1, 5) if labels_BT[b, t] != IGNORED]
    naive = sum(-logits_BTV[b, t - 1].log_softmax(-1)[labels_BT[b, t]] for b, t in targets)
    torch.testing.assert_close(loss.total, naive)
    assert len(targets) == 6 and loss.metrics["token_accuracy"] == 5


def test_constant_schedule() -> None:
    train = TrainConfig(steps=4, lr=0.3, schedule="constant")
    assert {learning_rate(train, step) for step in range(4)} == {0.3}
