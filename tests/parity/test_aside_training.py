"""ASIDE and ISE against their papers' equations, written again without steerlab: trainings, and generation without a cache.

`tests/methods/test_aside.py` compares the single functions with the dense matrix M of the paper. Here the whole path runs: the
rows with their roles and padding, the hooks on the embedding, the loss over all tokens, the trained parameters, and several
steps of SGD, against a loop that multiplies by matrices and looks up segment vectors. Weights are float64, so that a difference
is one of mathematics; Adam would divide by the root of tiny squared gradients, and magnify the rounding of the loss.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from steerlab.data.worlds import tiny
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import DATA, Batch, Conversation, collate
from steerlab.methods import aside, ise, vanilla
from steerlab.methods.contract import Inputs, trained_parameters
from steerlab.patches import EmbeddingPatch
from steerlab.steered.language import SteeredModel

STEPS, STEPS_PER_EPOCH, LR = 3, 2.0, 0.5
SIZE = 128
"""Width of the tiny model."""


@pytest.fixture
def batches(encoder: Encoder) -> list[Batch]:
    """Rows of different lengths, so that each batch has padding, which the released code shifts the roles by."""
    rows = [encoder.encode(encoder.from_row(row, "instruction")) for row in tiny.rows("instructions/train", 3 * STEPS)]
    made = [collate(rows[3 * step : 3 * step + 3], encoder.pad_id) for step in range(STEPS)]
    assert all(not bool(batch.attention_mask.all()) for batch in made)
    return made


def dense(angle_P: Tensor) -> Tensor:
    """M of the paper's section 4, blocks [[cos, -sin], [sin, cos]] on the diagonal, one angle for each."""
    blocks = [torch.stack((torch.stack((a.cos(), -a.sin())), torch.stack((a.sin(), a.cos())))) for a in angle_P]
    return torch.block_diag(*blocks)


class Naive(nn.Module):
    """The model of the papers: e' = e M for data tokens, then + S[segment]; the cross-entropy over every token but padding."""

    def __init__(self, model: Any, angle_rad: float, direction: str, learned: bool, shift_RD: Tensor | None) -> None:
        super().__init__()
        self.model, self.angle_rad, self.direction, self.share = model, angle_rad, direction, 1.0
        self.difference_P = nn.Parameter(torch.zeros(SIZE // 2).double()) if learned else None
        self.shift_RD = None if shift_RD is None else nn.Parameter(shift_RD.clone())

    def forward(self, batch: Batch) -> Tensor:
        logits_BTV = self.model(inputs_embeds=self.embedded(batch), attention_mask=batch.attention_mask).logits
        total = torch.zeros((), dtype=torch.float64)
        for b in range(len(logits_BTV)):
            for t in range(1, int(batch.attention_mask[b].sum())):
                # The platform takes the cross-entropy in float32 whatever the model is.
                total = total - logits_BTV[b, t - 1].float().log_softmax(-1)[batch.input_ids[b, t]]
        return total

    def embedded(self, batch: Batch) -> Tensor:
        e_BTD = self.model.get_input_embeddings()(batch.input_ids).double()
        angle_P = torch.full((SIZE // 2,), self.angle_rad).double()
        angle_P = (angle_P if self.difference_P is None else angle_P + self.difference_P) * self.share
        matrix = dense(angle_P)
        # The platform rotates in float32; here the product of matrices is rounded to it once.
        right = self.direction == "right"
        rotated_BTD = (e_BTD @ matrix if right else torch.einsum("ij,btj->bti", matrix, e_BTD)).float().double()
        is_data_BT1 = (batch.roles == DATA).unsqueeze(-1)
        e_BTD = torch.where(is_data_BT1, rotated_BTD, e_BTD) if self.angle_rad or self.difference_P is not None else e_BTD
        return e_BTD if self.shift_RD is None else e_BTD + self.shift_RD[batch.roles.clamp(max=2)]


def losses_of(module: nn.Module, batches: list[Batch], loss: Callable[[int, Batch], Tensor]) -> list[float]:
    """Train for a few steps on the mean over targets, and return the losses in nats per token."""
    optimizer = torch.optim.SGD(trained_parameters(module).values(), lr=LR, momentum=0.9)
    losses = []
    for step, batch in enumerate(batches):
        optimizer.zero_grad()
        mean = loss(step, batch) / int(batch.attention_mask[:, 1:].sum())
        mean.backward()
        optimizer.step()
        losses.append(mean.item())
    return losses


ANGLES = [
    pytest.param({"angle_rad": math.pi / 2}, id="right"),
    pytest.param({"angle_rad": math.pi / 2, "direction": "left"}, id="left"),
    pytest.param({"angle_rad": 0.7}, id="any angle"),
    pytest.param({"angle_rad": -2.9, "direction": "left"}, id="any angle, left"),
    pytest.param({"angle_rad": math.pi / 2, "gradual": True}, id="gradual"),
    pytest.param({"angle_rad": 0.4, "learned": True}, id="learned"),
    pytest.param({"angle_rad": 0.4, "learned": True, "gradual": True, "direction": "left"}, id="learned, gradual, left"),
    pytest.param({"angle_rad": math.pi / 2, "linear_shift": True}, id="linear shift"),
]


def compared(ours: Any, naive: Naive, batches: list[Batch], gradual: bool) -> None:
    """Train both from the same start, and compare losses and every trained weight."""

    def our_loss(step: int, batch: Batch) -> Tensor:
        ours.on_step(step, STEPS_PER_EPOCH)
        return ours(batch).total

    def naive_loss(step: int, batch: Batch) -> Tensor:
        # The angle grows over the first epoch; the first step has a share of it, not 0 (a departure that aside.py names).
        naive.share = min(1.0, (step + 1) / STEPS_PER_EPOCH) if gradual else 1.0
        return naive(batch)

    start = {name: value.detach().clone() for name, value in naive.named_parameters()}
    found = losses_of(ours, batches, our_loss)
    assert found == pytest.approx(losses_of(naive, batches, naive_loss), abs=1e-6)
    expected = dict(naive.named_parameters())
    for name, value in trained_parameters(ours).items():
        own = name.removeprefix("patch.")
        torch.testing.assert_close(value, expected[own], atol=1e-6, rtol=0, msg=lambda text, own=own: f"{own}: {text}")
        assert float((value - start[own]).detach().abs().max()) > 1e-4, f"{own} has not moved"


@pytest.mark.parametrize("settings", ANGLES)
def test_a_training_with_aside_is_that_of_the_paper(settings: dict[str, Any], tiny_model: Any, batches: list[Batch]) -> None:
    tiny_model.double()
    reference = copy.deepcopy(tiny_model)
    torch.manual_seed(3)
    ours = aside.Aside(tiny_model, aside.Config(**settings), Inputs()).double()
    shift = None if ours.patch.shift_RD is None else ours.patch.shift_RD.detach()
    assert (shift is None) == (not settings.get("linear_shift")) and (shift is None or 0.015 < float(shift.std()) < 0.025)
    direction, learned = settings.get("direction", "right"), settings.get("learned", False)
    naive = Naive(reference, settings["angle_rad"], direction, learned, shift)
    compared(ours, naive, batches, settings.get("gradual", False))


def test_a_training_with_ise_is_that_of_its_paper(tiny_model: Any, batches: list[Batch]) -> None:
    """e' = e + S[segment], with the table and all weights trained."""
    tiny_model.double()
    reference = copy.deepcopy(tiny_model)
    ours = ise.Ise(tiny_model, ise.Config(), Inputs()).double()
    assert ours.patch.shift_RD is not None
    start = ours.patch.shift_RD.detach().clone()
    compared(ours, Naive(reference, 0.0, "right", False, start), batches, gradual=False)
    assert not torch.equal(ours.patch.shift_RD, start)


def test_a_vanilla_training_has_no_roles(tiny_model: Any, batches: list[Batch]) -> None:
    """The baseline of both: the same loss and steps, and no patch at all."""
    tiny_model.double()
    reference = copy.deepcopy(tiny_model)
    ours = vanilla.Vanilla(tiny_model, vanilla.Config(), Inputs())
    compared(ours, Naive(reference, 0.0, "right", False, None), batches, gradual=False)


@pytest.mark.parametrize("response_role", ["data", "instruction"])
def test_generation_is_that_of_a_loop_without_a_cache(response_role: Any, tiny_model: Any, encoder: Encoder) -> None:
    """Every new token has the role of responses, which is that of data in the paper, and is rotated like them."""
    own = Encoder(encoder.tokenizer, prompt_style="plain", response_role=response_role)
    prompts: list[Conversation] = [
        own.conversation("find the ship", "a red ship"),
        own.conversation("name it", "the sea is big"),
    ]
    steered = SteeredModel(tiny_model, own, (EmbeddingPatch(SIZE, math.pi / 2),))
    ours = [generation.text for generation in steered.generate(prompts, max_new_tokens=6)[0]]
    steered.detach()
    naive = Naive(tiny_model, math.pi / 2, "right", False, None)
    for prompt, text in zip(prompts, ours, strict=True):
        row = next(own.encode_all([prompt], continued=True))
        ids, roles = [*row.input_ids], [*row.roles]
        written: list[int] = []
        while len(written) < 6 and (not written or written[-1] not in steered.end_ids):
            batch = _one(ids, roles)
            with torch.no_grad():
                e_BTD = naive.embedded(batch).float()
                written.append(int(tiny_model(inputs_embeds=e_BTD).logits[0, -1].argmax()))
            ids.append(written[-1])
            roles.append(own.response_role_id)
        assert text == own.decode(written)


def _one(ids: list[int], roles: list[int]) -> Batch:
    input_ids, role = torch.tensor([ids]), torch.tensor([roles])
    ones = torch.ones_like(input_ids)
    return Batch(input_ids, role, ones, torch.arange(len(ids))[None], input_ids, torch.zeros_like(input_ids))
