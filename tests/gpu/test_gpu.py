"""What only a GPU can show: bfloat16 weights, device placement by the tensors themselves, memory, exact rotations there."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from steerlab import models
from steerlab.data.worlds import tiny
from steerlab.evaluation.tasks.cost import efficiency
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import collate
from steerlab.methods import trained
from steerlab.methods.contract import Inputs, trained_parameters
from steerlab.patches import EmbeddingPatch, LogitPatch, rotate
from steerlab.steered.language import SteeredModel

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def test_a_quarter_turn_is_exact_in_bfloat16() -> None:
    x = torch.randn(4, 64, device="cuda", dtype=torch.bfloat16)
    expected = torch.stack((x[:, 1::2], -x[:, ::2]), -1).flatten(-2)
    assert torch.equal(rotate(x, math.pi / 2), expected)


# Those that need no stage before their training.
@pytest.mark.parametrize("name", ["vanilla", "ise", "aside", "iav", "dpo", "genarm"])
def test_a_bfloat16_step_lowers_the_loss(name: str, tiny_dir: Path, encoder: Encoder) -> None:
    torch.manual_seed(0)
    model = models.load_model(tiny_dir, dtype="bfloat16").to("cuda").train()  # type: ignore[arg-type]
    method = trained({"name": name})
    module = method.module(model, method.Config(), Inputs()).to("cuda").train()
    pairs = method.module.trains_on == "preference"
    texts, data_format = ("preferences", "preference") if pairs else ("instructions", "instruction")
    rows = encode_data(encoder, tiny.rows(f"{texts}/train", 16), data_format, 64).rows
    batch = collate(rows, encoder.pad_id, loss_on="response" if pairs else "all").to("cuda")
    optimizer = torch.optim.AdamW(trained_parameters(module).values(), lr=1e-3)
    losses = []
    for _ in range(6):
        loss = module(batch).total
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0]


def test_generation_on_the_gpu_equals_the_cpu(tiny_dir: Path, encoder: Encoder) -> None:
    prompts = [encoder.conversation(r["instruction"], r["input"]) for r in tiny.rows("instructions/test", 5)]
    texts = []
    for device in ("cpu", "cuda"):
        model = models.load_model(tiny_dir).to(device)  # type: ignore[arg-type]
        patch = EmbeddingPatch(model.config.hidden_size, 1.0).to(device)
        texts.append([g.text for g in SteeredModel(model, encoder, (patch,)).generate(prompts, max_new_tokens=6)[0]])
    assert texts[0] == texts[1]


def test_peak_memory_is_that_of_each_form_alone(tiny_dir: Path, encoder: Encoder) -> None:
    """A patch's tensors count where it is attached only, and the folded copy is not charged for the model beside it."""
    model = models.load_model(tiny_dir).to("cuda")  # type: ignore[arg-type]
    patch = LogitPatch(model.config.hidden_size, model.config.vocab_size).to("cuda")
    settings = {"batch_sizes": (2,), "prompt_tokens": 16, "new_tokens": 4, "repeats": 2, "folded": True}
    result = efficiency.run(SteeredModel(model, encoder, (patch,)), efficiency.Config.model_validate(settings))
    found = {o.metric.removeprefix("efficiency/"): o.value for o in result.observations}
    plain, folded = found["unpatched_peak_memory_bytes_batch_2"], found["folded_peak_memory_bytes_batch_2"]
    assert plain > 4 * model.num_parameters()
    assert found["peak_memory_bytes_batch_2"] >= plain + 4 * patch.up.numel()
    assert folded == pytest.approx(plain, rel=0.01)
    assert found["control_memory_ratio_batch_2"] == pytest.approx(1, abs=0.01)
