"""ASIDE and its baselines: the acceptance tests of the method's mathematics."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from steerlab import patches
from steerlab.data.worlds import tiny
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import DATA, INSTRUCTION, PADDING, RESPONSE, Batch, collate
from steerlab.job import Job
from steerlab.methods import aside, ise, vanilla
from steerlab.methods.contract import Inputs
from steerlab.models import ModelFacts
from steerlab.patches import EmbeddingPatch, rotate


def dense_matrix(size: int, angle: float) -> torch.Tensor:
    """The paper's M: identical 2 x 2 blocks [[cos, -sin], [sin, cos]] on the diagonal, built entry by entry."""
    matrix = torch.zeros(size, size, dtype=torch.float64)
    for k in range(0, size, 2):
        matrix[k, k] = matrix[k + 1, k + 1] = math.cos(angle)
        matrix[k, k + 1], matrix[k + 1, k] = -math.sin(angle), math.sin(angle)
    return matrix


def embeddings(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def batch(encoder: Encoder) -> Batch:
    rows = tiny.rows("instructions/train", 5)
    return collate([encoder.encode(encoder.from_row(r, "instruction")) for r in rows], encoder.pad_id)


@pytest.mark.parametrize("angle", [0.0, 0.3, math.pi / 8, math.pi / 2, 2.5, math.pi])
def test_equals_the_dense_matrix(angle: float) -> None:
    e = embeddings(7, 10)
    matrix = dense_matrix(10, angle)
    torch.testing.assert_close(rotate(e, angle, "right").double(), e.double() @ matrix, atol=1e-6, rtol=0)
    torch.testing.assert_close(rotate(e, angle, "left").double(), (matrix @ e.double().T).T, atol=1e-6, rtol=0)


def test_a_quarter_turn_is_a_swap_and_a_sign_exactly() -> None:
    e = embeddings(3, 4)
    swapped = torch.stack((e[:, 1], -e[:, 0], e[:, 3], -e[:, 2]), -1)
    assert torch.equal(rotate(e, math.pi / 2), swapped)
    assert torch.equal(rotate(rotate(e, math.pi / 2), math.pi / 2), -e)


@pytest.mark.parametrize("angle", [0.4, math.pi / 2, 3.0])
def test_left_is_right_with_the_negative_angle_and_norms_stay(angle: float) -> None:
    e = embeddings(5, 8)
    assert torch.equal(rotate(e, angle, "left"), rotate(e, -angle, "right"))
    torch.testing.assert_close(rotate(e, angle).norm(dim=-1), e.norm(dim=-1))
    cosine = torch.nn.functional.cosine_similarity(rotate(e, angle), e)
    torch.testing.assert_close(cosine, torch.full_like(cosine, math.cos(angle)))


def test_only_data_is_rotated() -> None:
    e = embeddings(2, 4, 6)
    roles = torch.tensor([[INSTRUCTION, DATA, DATA, PADDING], [INSTRUCTION, INSTRUCTION, DATA, INSTRUCTION]])
    out = EmbeddingPatch(6, 0.7)(e, roles)
    assert torch.equal(out[roles != DATA], e[roles != DATA])
    assert torch.equal(out[roles == DATA], rotate(e, 0.7)[roles == DATA])


def test_bfloat16_rotates_in_float32() -> None:
    e = embeddings(50, 64).bfloat16()
    assert torch.equal(rotate(e, 0.3), rotate(e.float(), 0.3).bfloat16())


def test_angle_zero_is_vanilla_bit_for_bit(tiny_model: PreTrainedModel, batch: Batch) -> None:
    plain = vanilla.Vanilla(tiny_model, vanilla.Config(), Inputs())(batch).total
    rotated = aside.Aside(tiny_model, aside.Config(angle_rad=0.0), Inputs())(batch).total
    assert torch.equal(plain, rotated)


def test_ise_with_a_zero_table_is_vanilla_bit_for_bit(tiny_model: PreTrainedModel, batch: Batch) -> None:
    plain = vanilla.Vanilla(tiny_model, vanilla.Config(), Inputs())(batch).total
    shifted = ise.Ise(tiny_model, ise.Config(init_std=0.0), Inputs())(batch).total
    assert torch.equal(plain, shifted)


def test_ise_adds_the_vector_of_the_role() -> None:
    patch = EmbeddingPatch(4, shift=True)
    patch.shift_RD.data = torch.arange(12.0).view(3, 4)
    e, roles = embeddings(1, 2, 4), torch.tensor([[INSTRUCTION, DATA]])
    torch.testing.assert_close(patch(e, roles), e + torch.tensor([[[0.0, 1, 2, 3], [4, 5, 6, 7]]]))


def test_learned_angles_stay_a_rotation_and_get_finite_gradients(tiny_model: PreTrainedModel, batch: Batch) -> None:
    module = aside.Aside(tiny_model, aside.Config(learned=True), Inputs())
    module(batch).total.backward()
    gradient = module.patch.difference_P.grad
    assert gradient.shape == (tiny_model.config.hidden_size // 2,)
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    module.patch.difference_P.data.normal_(generator=torch.Generator().manual_seed(0))
    e = embeddings(1, 3, tiny_model.config.hidden_size)
    out = module.patch(e, torch.full((1, 3), DATA))
    torch.testing.assert_close(out.norm(dim=-1), e.norm(dim=-1))


def test_learned_angle_gradient_equals_finite_differences() -> None:
    patch = EmbeddingPatch(4, 0.6, learned=True)
    e, roles = embeddings(1, 3, 4), torch.tensor([[DATA, INSTRUCTION, DATA]])
    weight = embeddings(1, 3, 4) + 1
    (patch(e, roles) * weight).sum().backward()
    for k, gradient in enumerate(patch.difference_P.grad.tolist()):
        values = []
        for step in (1e-2, -1e-2):
            patch.difference_P.data.zero_()
            patch.difference_P.data[k] = step
            values.append((patch(e, roles) * weight).sum().item())
        assert gradient == pytest.approx((values[0] - values[1]) / 2e-2, abs=2e-3)


def test_gradual_grows_over_the_first_epoch(tiny_model: PreTrainedModel) -> None:
    module = aside.Aside(tiny_model, aside.Config(gradual=True), Inputs())
    shares = []
    for step in range(6):
        module.on_step(step, 4.0)
        shares.append(module.patch.progress)
    assert shares == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_gradual_reaches_the_full_angle(tiny_model: PreTrainedModel, batch: Batch) -> None:
    module, full = aside.Aside(tiny_model, aside.Config(gradual=True), Inputs()), EmbeddingPatch(8, math.pi / 2)
    e, roles = embeddings(1, 2, 8), torch.tensor([[DATA, DATA]])
    module.on_step(0, 2.0)
    small = EmbeddingPatch(8, math.pi / 4)
    half = EmbeddingPatch(8, math.pi / 2)
    half.progress = module.patch.progress
    torch.testing.assert_close(half(e, roles), small(e, roles))
    assert not torch.allclose(half(e, roles), full(e, roles))


def test_strength_scales_the_angle_for_each_row() -> None:
    e, roles = embeddings(3, 2, 6), torch.full((3, 2), DATA)
    out = EmbeddingPatch(6, 1.0)(e, roles, torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1))
    assert torch.equal(out[0], e[0])
    torch.testing.assert_close(out[1], rotate(e[1], 0.5))
    torch.testing.assert_close(out[2], rotate(e[2], 1.0))


def test_the_output_head_is_untouched(tiny_model: PreTrainedModel) -> None:
    before = tiny_model.get_output_embeddings().weight.clone()
    attached = patches.attach(tiny_model, [EmbeddingPatch(tiny_model.config.hidden_size, 1.0)])
    assert torch.equal(tiny_model.get_output_embeddings().weight, before)
    attached.detach()


def test_a_call_without_roles_is_refused(tiny_model: PreTrainedModel) -> None:
    patches.attach(tiny_model, [EmbeddingPatch(tiny_model.config.hidden_size, 1.0)])
    with pytest.raises(ValueError, match="call it with roles="):
        tiny_model(torch.tensor([[1, 2, 3]]))


def test_an_odd_hidden_size_is_refused_before_anything_starts() -> None:
    facts, job = ModelFacts("OddModel", 7, 1, 10, 100, 16, True), cast(Job, None)  # this check looks at the model alone
    with pytest.raises(ValueError, match=r"angle_rad 1.5708: .* hidden size of OddModel is odd \(7\)"):
        aside.METHOD.check(aside.Config(), facts, job)
    aside.METHOD.check(aside.Config(angle_rad=0.0), facts, job)


def test_golden_loss() -> None:
    """Two numbers that a refactor must not move: the loss of a seeded model, without and with the rotation."""
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2
    )
    ids = torch.arange(1, 13).view(2, 6) % 32
    roles = torch.tensor([[INSTRUCTION] * 3 + [DATA] * 3] * 2)
    batch = Batch(ids, roles, torch.ones_like(ids), torch.arange(6).expand(2, 6), ids, torch.zeros_like(ids))
    losses = []
    for method, settings in ((vanilla.Vanilla, vanilla.Config()), (aside.Aside, aside.Config())):
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        model.get_input_embeddings().weight.data.mul_(30)
        losses.append(method(model, settings, Inputs())(batch).total.item())  # type: ignore[arg-type]
    assert losses == pytest.approx([GOLDEN_VANILLA, GOLDEN_ASIDE], abs=1e-3)


GOLDEN_VANILLA, GOLDEN_ASIDE = 34.306060791015625, 34.57109069824219


def test_only_data_is_rotated_where_a_response_has_a_role_of_its_own() -> None:
    e, roles = embeddings(1, 3, 6), torch.tensor([[INSTRUCTION, DATA, RESPONSE]])
    out = EmbeddingPatch(6, 0.7)(e, roles)
    assert torch.equal(out[:, [0, 2]], e[:, [0, 2]])
    assert torch.equal(out[:, 1], rotate(e, 0.7)[:, 1])


def test_ise_starts_from_segment_vectors_of_the_given_spread(tiny_model: PreTrainedModel) -> None:
    """A table of zeros would be vanilla's start: all three rows are drawn."""
    shift = ise.Ise(tiny_model, ise.Config(init_std=0.05), Inputs()).patch.shift_RD
    assert shift is not None and shift.shape[0] == 3
    assert shift.std(dim=1).tolist() == pytest.approx([0.05] * 3, rel=0.3)
    assert ise.Config().init_std == 0.02
