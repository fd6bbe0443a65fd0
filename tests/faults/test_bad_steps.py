"""Steps whose loss is NaN or a spike: the training stops with step, rows and last checkpoint, or leaves them out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from trainings import Training, in_a_process

from steerlab.job import TrainConfig
from steerlab.training import bad_steps

BAD_ROW = 3
"""Row of the data set whose loss is spoiled."""


def line(loss: float, **more: float) -> dict[str, float]:
    return {"train/loss": loss, **more}


@pytest.mark.parametrize("loss", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_a_fault(loss: float) -> None:
    assert bad_steps.fault_of(loss, [], None) == f"is {loss}"


@pytest.mark.parametrize(
    ("loss", "before", "spike", "is_fault"),
    [
        (100.0, [1.0] * 5, None, False), (100.0, [1.0] * 4, 3.0, False), (3.1, [1.0] * 5, 3.0, True),
        (3.0, [1.0] * 5, 3.0, False), (3.1, [100.0] * 30 + [1.0] * 20, 3.0, True), (100.0, [-1.0] * 5, 3.0, False),
        (-100.0, [1.0] * 5, 3.0, False), (3.1, [1.0] * 11 + [9.0] * 9, 3.0, True),
    ],
)  # fmt: skip
def test_a_spike_is_measured_against_the_median_before(
    loss: float, before: list[float], spike: float | None, is_fault: bool
) -> None:
    assert (bad_steps.fault_of(loss, [line(value) for value in before], spike) is not None) == is_fault


def test_steps_that_were_left_out_do_not_raise_the_median() -> None:
    history = [*[line(1.0)] * 5, *[line(50.0, **{bad_steps.SKIPPED: 1.0})] * 9]
    assert bad_steps.num_skipped(history) == 9
    fault = bad_steps.fault_of(4.0, history, 3.0)
    assert fault == "is 4, more than 3 times the median of the 5 steps before, 1 (train.spike)"


def test_defaults_change_no_key() -> None:
    """The fields are not part of the parameters of a stage that does not use them."""
    assert not {"skip_steps", "spike"} & TrainConfig(steps=1).model_dump().keys()
    assert {"skip_steps", "spike"} < TrainConfig(steps=1, skip_steps=1, spike=2.0).model_dump().keys()


def spoil(factor: float) -> None:
    """Multiply the loss of every pass that holds the bad row."""
    from steerlab.methods import vanilla

    forward = vanilla.Vanilla.forward

    def spoiled(self: Any, batch: Any) -> Any:
        loss = forward(self, batch)
        return loss._replace(total=loss.total * factor) if self.training and BAD_ROW in batch.numbers else loss

    vanilla.Vanilla.forward = spoiled


def bad_step_of(training: Training) -> int:
    from steerlab.training.schedule import rows_of_step

    train = training.request.train
    return next(s + 1 for s in range(4) if BAD_ROW in rows_of_step(16, train.rows_per_step, train.seed, s))


def tensors_of(folder: Path, step: int) -> dict[str, bytes]:
    """The files of a checkpoint with weights and optimizer."""
    return {path.name: path.read_bytes() for path in (folder / f"{step:09d}" / "state").iterdir()}


def nan(root: Path, zero_stage: int) -> None:
    import torch

    spoil(math.nan)
    settings = {"zero_stage": zero_stage, "keep": "last", "eval_every": 0, "schedule": "constant", "seed": 1}
    stopping = Training(root, **settings)
    bad = bad_step_of(stopping)
    assert bad > 1, "choose another seed"
    with pytest.raises(FloatingPointError) as said:
        stopping.run("stops")
    message = str(said.value)
    assert message.startswith(f"train/loss of step {bad} is nan; rows ") and f" {BAD_ROW}" in message.partition(" of tiny")[0]
    newest = root / "stops" / "checkpoints" / f"{bad - 1:09d}"
    assert f"the newest checkpoint before it is {newest};" in message and newest.is_dir()
    assert "lower train.lr or use float32" in message and "train.skip_steps" in message
    # Left out: weights and moments are those of the step before, bit by bit, and the training goes on.
    skipping = Training(root, **settings, skip_steps=2)
    assert skipping.run("skips", stop_after=bad + 1) is None
    folder = root / "skips" / "checkpoints"
    before, after = tensors_of(folder, bad - 1), tensors_of(folder, bad)
    for name in before:
        states = [torch.load(folder / f"{step:09d}" / "state" / name, weights_only=False) for step in (bad - 1, bad)]
        assert equal(*states), name
    assert before.keys() == after.keys()
    whole = skipping.run("whole")
    assert whole is not None and skipping.run("skips") == whole, "a run that is continued leaves out the same steps"
    skipped = [int(told["step"]) for told in skipping.told if bad_steps.SKIPPED in told]
    assert skipped[0] == bad and all(told.get("train/loss") == told.get("train/loss") for told in skipping.told)
    weights = root / "whole" / "output" / "model" / "model.safetensors"
    from safetensors.torch import load_file

    assert all(torch.isfinite(tensor).all() for tensor in load_file(weights).values())
    # A later epoch meets the row again: no more than so many steps are left out.
    longer = Training(root, **{**settings, "steps": 14}, skip_steps=2)
    with pytest.raises(FloatingPointError, match=r"2 steps were skipped before \(train\.skip_steps\)"):
        longer.run("longer")


def equal(a: Any, b: Any) -> bool:
    """Whether two states hold the same tensors; counters of DeepSpeed's own may differ."""
    import torch

    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        counted = {"global_steps", "global_samples", "skipped_steps", "micro_steps"}
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a.keys() - counted)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(equal, a, b))
    return True


def spikes(root: Path) -> None:
    spoil(100.0)
    # Steps 1 to 4 hold each row once: the first spike cannot be told, the second can.
    settings = {"keep": "last", "eval_every": 0, "schedule": "constant", "seed": 1, "steps": 9, "clip_norm": 0.001}
    plain = Training(root, **settings)
    assert plain.run("plain") is not None and plain.steps == list(range(1, 10))
    second = bad_step_of_later(plain)
    with pytest.raises(FloatingPointError, match=rf"train/loss of step {second} is .*, more than 20 times the median"):
        Training(root, **settings, spike=20.0).run("stops")
    skipping = Training(root, **settings, spike=20.0, skip_steps=1)
    assert skipping.run("skips") is not None
    assert [told["step"] for told in skipping.told if bad_steps.SKIPPED in told] == [second]


def bad_step_of_later(training: Training) -> int:
    from steerlab.training.schedule import rows_of_step

    train = training.request.train
    return next(s + 1 for s in range(5, 9) if BAD_ROW in rows_of_step(16, train.rows_per_step, train.seed, s))


@pytest.mark.faults
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_a_loss_that_is_nan(zero_stage: int, tmp_path: Path) -> None:
    in_a_process(nan, tmp_path, zero_stage)


@pytest.mark.faults
def test_a_loss_that_is_a_spike(tmp_path: Path) -> None:
    in_a_process(spikes, tmp_path)
