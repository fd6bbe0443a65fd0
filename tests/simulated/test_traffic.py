"""What a program waits for on a GPU and what it sends there: in a step of decoding, in a batch of an importance."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import patch_zoo
import pytest
import torch
from simulated_device import Traffic, counted

from steerlab import models
from steerlab.data.worlds import tiny
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import collate
from steerlab.methods.math import orthonormal
from steerlab.methods.math.gradients import GradientSums
from steerlab.methods.math.selected_layers import places
from steerlab.models import Kept
from steerlab.steered.language import SteeredModel


def waits_of_a_step(steered: SteeredModel, **settings: Any) -> tuple[float, Traffic]:
    """Return how often a step of decoding waits for the device, and all that a longer generation does."""
    rows = tiny.rows("instructions/test", 2)
    prompts = [steered.encoder.conversation(row["instruction"], row["input"]) for row in rows]
    num_waits = []
    for num_tokens in (3, 7):
        with counted() as traffic:
            steered.generate(prompts, max_new_tokens=num_tokens, strengths=(0.5,), **settings)
        num_waits.append(traffic.num_waits)
    return (num_waits[1] - num_waits[0]) / 4, traffic


@pytest.mark.parametrize("form", patch_zoo.FORMS)
def test_a_step_of_decoding_waits_at_most_twice(
    form: str, tiny_dir: Path, encoder: Encoder, tmp_path: Path, device: torch.device
) -> None:
    model: Any = models.load_model(tiny_dir, seed=0)
    model.generation_config.eos_token_id = None  # no row ends early: all generations have as many steps
    patch = patch_zoo.FORMS[form](model, tmp_path)
    steered = SteeredModel(model.to(device), encoder, (patch,))
    per_step, traffic = waits_of_a_step(steered)
    # The tokens that were chosen, and transformers' look at the mask of each model that runs.
    assert per_step <= (3 if "reward" in form else 2), traffic


@pytest.fixture
def sums(tiny_dir: Path, encoder: Encoder, device: torch.device) -> Callable[[], Any]:
    """A function that makes the sums of an importance in the coordinates of one basis, and batches for it."""

    def made() -> Any:
        # Without torch's own attention: transformers looks at its mask up to twice a pass, where rows are padded.
        steered = SteeredModel(models.load_model(tiny_dir, seed=0, attention="eager").to(device), encoder)  # type: ignore[arg-type]
        chosen = places(steered.model, ("attn_q", "attn_k", "attn_v"), ("all",))
        basis = Kept(orthonormal.random_basis(chosen[0].shape[1], 0, "x"))
        return GradientSums(steered, chosen, lambda place, grad_MN: (grad_MN @ basis.like(grad_MN)).abs_(), "data.safety")

    return made


def test_a_batch_of_an_importance_waits_once_and_sends_its_rows(
    sums: Callable[[], Any], encoder: Encoder, device: torch.device
) -> None:
    """Bases, and the sums, stay on a device that has room: at 7B parameters they would be 42 GB a batch."""
    rows = encode_data(encoder, tiny.rows("refusals/train", 4), "instruction", 64).rows
    total = sums()
    for number in range(2):
        batch = collate(rows, encoder.pad_id, loss_on="response")
        with counted() as traffic:
            total.add(batch.to(device), number)
    assert traffic.num_waits <= 1, traffic
    assert traffic.up_bytes < 20_000 and traffic.down_bytes < 100, traffic


def test_a_tensor_that_is_kept_goes_to_the_device_once(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    value, like = torch.randn(8, 8), torch.zeros(1, device=device)
    kept = Kept(value)
    with counted() as traffic:
        for _ in range(3):
            assert torch.equal(kept.like(like).cpu(), value)
    assert traffic.up_bytes == 256
    assert kept.like(torch.zeros(1)) is value
    assert kept.like(like.double()).dtype == torch.float64
    monkeypatch.setattr("steerlab.models.devices.has_room", lambda num_bytes, device: False)
    full = Kept(value)
    with counted() as traffic:
        for _ in range(3):
            full.like(like)
    assert traffic.up_bytes == 3 * 256, "what has no room is sent anew"
