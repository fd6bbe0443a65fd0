"""The training loop on a simulated GPU: the model and its patches are there before the method, and a step is read once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import patch_zoo
import pytest
import torch
from simulated_device import counted
from torch import Tensor, nn

from steerlab import models, patches
from steerlab.inputs.encoding import Encoder
from steerlab.job import DataConfig, ModelConfig, ScaleConfig, TrainConfig
from steerlab.training import engine, loop
from steerlab.training.link import Link
from steerlab.training.optimizer import make_optimizer
from steerlab.training.request import Request

DATA = {
    "preference": {"source": "tiny:preferences/train", "format": "preference", "limit": 8},
    "train": {"source": "tiny:instructions/train", "format": "instruction", "limit": 8},
}


class Plain:
    """In the place of DeepSpeed's engine, which knows no simulated device: the same calls, for one worker without sharding."""

    def __init__(self, module: nn.Module, optimizer: torch.optim.Optimizer, num_passes: int) -> None:
        self.module, self.optimizer, self._num_passes, self._done = module, optimizer, num_passes, 0

    def __call__(self, batch: object) -> Any:
        return self.module(batch)

    def backward(self, loss: Tensor) -> None:
        (loss / self._num_passes).backward()

    def step(self) -> None:
        self._done += 1
        if self._done % self._num_passes == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()


class OnePlain(engine.Engine):
    """The engine of the loop over a `Plain` one."""

    def __post_init__(self) -> None:
        self._grad_norm, self._leaves_out = torch.zeros(()), False
        self._bad_gradient = torch.zeros((), dtype=torch.bool, device=self.device)
        optimizer = make_optimizer(self.module, self.train)
        optimizer.register_step_pre_hook(lambda *_: self._clip())
        self._ds = Plain(self.module, optimizer, self.passes_per_step)


@pytest.mark.parametrize("form", ["maps with bounds on some roles", "second model"])
@pytest.mark.parametrize("method", [{"name": "iav"}, {"name": "dpo", "lora": {"rank": 2}}], ids=["iav", "dpo"])
def test_a_step(
    method: dict[str, Any],
    form: str,
    tiny_dir: Path,
    encoder: Encoder,
    device: torch.device,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model: Any = models.load_model(tiny_dir, seed=0)
    models.save_model(model, encoder.tokenizer, tmp_path / "start/model")
    patches.save(patch_zoo.FORMS[form](model, tmp_path), tmp_path / "start/patch", models.fingerprint(model))
    (tmp_path / "start/prompt.json").write_text(json.dumps(encoder.spec))
    monkeypatch.setattr(loop, "Engine", OnePlain)
    request = Request(
        tmp_path / "start",
        ModelConfig(source="tiny:model", attention="eager"),
        method,
        DataConfig.model_validate({"prompt_style": "plain", **DATA}),
        TrainConfig(steps=4, lr=5e-3, micro_batch=2, grad_accum=2),
    )
    link = Link(0, 1, device, lambda metrics, directory: None, tmp_path / "scratch")
    training = loop._Training(request, ScaleConfig(), link)
    losses = []
    for _ in range(3):
        with counted() as traffic:
            losses.append(training._step()["train/loss"])
    assert losses[-1] < losses[0]
    # The sums of all metrics, and the norm of the gradients. Beside them transformers looks at the mask of a second model,
    # which is loaded with torch's own attention: up to twice in a call, of which DPO makes two in each of the two passes.
    assert traffic.num_waits <= (2 if form != "second model" else 2 + 8), traffic
