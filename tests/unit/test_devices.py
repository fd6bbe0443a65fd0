"""The device of a model by its name, a full GPU as one message, and trainings by deterministic operations alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import steerlab
from steerlab import models
from steerlab.job import TrainConfig
from steerlab.training import numerics
from steerlab.training.optimizer import make_optimizer

SAID = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.10 GiB. Process 1 has 70 GiB"


def test_auto_is_a_gpu_where_torch_can_use_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for present in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda present=present: present)
        assert models.device("auto").type == ("cuda" if present else "cpu")


@pytest.mark.parametrize(("name", "message"), [("cuda:1", r"device cuda:1: torch .* finds 1 GPUs"), ("gpu", "give auto, cpu")])
def test_a_device_that_is_not_there_is_refused_before_the_model_is_loaded(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert models.device("cuda:0").index == 0
    with pytest.raises(ValueError, match=message):
        steerlab.load(tmp_path / "nothing is here", device=name)


def test_a_full_gpu_is_one_message_that_holds_no_tensors() -> None:
    held = []

    def fill() -> None:
        large = torch.zeros(3)
        held.append(torch.utils.weak.WeakTensorKeyDictionary({large: None}))
        raise torch.OutOfMemoryError(SAID)

    with (
        pytest.raises(
            ValueError, match=r"the memory of the GPU is full \(CUDA out of memory\. Tried .* GiB\): lower x"
        ) as caught,
        models.memory_explained("lower x"),
    ):
        fill()
    assert caught.value.__suppress_context__ and len(held[0]) == 0, "what the failed computation held is free"


class Lossy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("index_add_cuda_ does not have a deterministic implementation, but you set ...")


def test_a_training_is_deterministic_while_it_runs_and_names_what_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with numerics.of(TrainConfig(steps=1)):
        assert not torch.are_deterministic_algorithms_enabled() and torch.get_float32_matmul_precision() == "highest"
        assert "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    with numerics.of(TrainConfig(steps=1, deterministic=True, tf32=True)):
        assert torch.are_deterministic_algorithms_enabled() and torch.get_float32_matmul_precision() == "high"
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    refused = pytest.raises(ValueError, match=r"train\.deterministic: index_add_cuda_ has no deterministic form")
    with refused, numerics.of(TrainConfig(steps=1, deterministic=True)):
        Lossy()(torch.zeros(1))
    with pytest.raises(RuntimeError, match="does not have"), numerics.of(TrainConfig(steps=1)):
        Lossy()(torch.zeros(1))
    # The process of a sweep's trials trains again, with other settings.
    assert not torch.are_deterministic_algorithms_enabled() and torch.get_float32_matmul_precision() == "highest"


def test_settings_of_a_gpu_leave_the_keys_of_earlier_trainings() -> None:
    assert {"deterministic", "tf32"}.isdisjoint(TrainConfig(steps=1).model_dump())
    assert TrainConfig(steps=1, deterministic=True).model_dump()["deterministic"] is True


@pytest.mark.parametrize("name", ["adamw", "adam", "sgd"])
def test_optimizers_are_fused_on_a_gpu_alone(name: str) -> None:
    module = nn.Linear(3, 3)
    optimizer = make_optimizer(module, TrainConfig(steps=1, optimizer=name))  # type: ignore[arg-type]
    assert not any(group["fused"] for group in optimizer.param_groups)
