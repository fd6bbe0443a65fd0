"""The four kinds of patch: strength 0 is the model itself, stacks, folding, saving."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedModel,
    Qwen2Config,
)

from steerlab import models, patches
from steerlab.job import Selection
from steerlab.patches import ActivationPatch, CannotFold, EmbeddingPatch, LogitPatch, SecondModelPatch, WeightPatch, taps
from steerlab.patches.maps import AffineMap

IDS = torch.tensor([[1, 3, 20, 4, 30, 5], [1, 3, 40, 4, 50, 5]])
ROLES = torch.tensor([[0, 0, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1]])
NORM = "model.layers.1.post_attention_layernorm"
LINEAR = "model.layers.0.mlp.up_proj"


def randomised(patch: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for parameter in patch.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return patch.eval()


def embedding(model: PreTrainedModel) -> EmbeddingPatch:
    return randomised(EmbeddingPatch(model.config.hidden_size, 1.0, learned=True, shift=True))


def activation(model: PreTrainedModel) -> ActivationPatch:
    sizes = {NORM: model.config.hidden_size, LINEAR: model.config.intermediate_size, "model.layers.1": model.config.hidden_size}
    return randomised(ActivationPatch(sizes))


def logit(model: PreTrainedModel) -> LogitPatch:
    return randomised(LogitPatch(model.config.hidden_size, model.config.vocab_size, "low_rank", 4))


def weight(model: PreTrainedModel) -> WeightPatch:
    return randomised(WeightPatch({f"{LINEAR}.weight": list(model.get_parameter(f"{LINEAR}.weight").shape)}))


def logit_of_layer(model: PreTrainedModel) -> LogitPatch:
    return randomised(LogitPatch(model.config.hidden_size, model.config.vocab_size, "mlp", 4, layer=0))


def second_model(model: PreTrainedModel) -> SecondModelPatch:
    return randomised(SecondModelPatch(models.config_of(model)))


MAKERS: list[Callable[[PreTrainedModel], Any]] = [embedding, activation, logit, weight]
each_kind = pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)


def logits(model: PreTrainedModel, strengths: list[float] | None = None, **kwargs: Any) -> torch.Tensor:
    if strengths is not None:
        kwargs["strengths"] = torch.tensor(strengths)
    with torch.no_grad():
        return model(input_ids=IDS, **kwargs).logits


@each_kind
def test_strength_0_is_the_model_bit_for_bit_and_detach_restores_it(make: Any, tiny_model: PreTrainedModel) -> None:
    before = logits(tiny_model)
    attached = patches.attach(tiny_model, [make(tiny_model)])
    assert not torch.equal(logits(tiny_model, roles=ROLES), before)
    assert torch.equal(logits(tiny_model, [0.0, 0.0], roles=ROLES), before)
    attached.detach()
    assert torch.equal(logits(tiny_model), before)


@each_kind
def test_strength_1_is_no_strength_at_all(make: Any, tiny_model: PreTrainedModel) -> None:
    patches.attach(tiny_model, [make(tiny_model)])
    torch.testing.assert_close(logits(tiny_model, [1.0, 1.0], roles=ROLES), logits(tiny_model, roles=ROLES), atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", MAKERS[:3], ids=lambda make: make.__name__)
def test_a_strength_for_each_row_equals_separate_calls(make: Any, tiny_model: PreTrainedModel) -> None:
    patches.attach(tiny_model, [make(tiny_model)])
    mixed = logits(tiny_model, [0.3, 1.4], roles=ROLES)
    for row, strength in enumerate([0.3, 1.4]):
        alone = logits(tiny_model, [strength] * 2, roles=ROLES)
        torch.testing.assert_close(mixed[row], alone[row], atol=1e-5, rtol=0)


@pytest.mark.parametrize("make", [*MAKERS[:3], logit_of_layer, second_model], ids=lambda make: make.__name__)
def test_only_some_logits_are_made_and_they_are_those_of_a_whole_call(make: Any, tiny_model: PreTrainedModel) -> None:
    made: list[int] = []
    models.head(tiny_model).register_forward_hook(lambda _m, inputs, _o: made.append(inputs[0].shape[:-1].numel()))
    patches.attach(tiny_model, [make(tiny_model)])
    only = (torch.tensor([0, 0, 1]), torch.tensor([2, 4, 1]))
    for strengths in (None, [0.3, 1.4], [0.0, 0.0]):
        whole = logits(tiny_model, strengths, roles=ROLES)
        some = logits(tiny_model, strengths, roles=ROLES, only=only)
        torch.testing.assert_close(some, whole[only][None], atol=1e-5, rtol=1e-5)
    assert made == [IDS.numel(), 3] * 3


def test_a_weight_patch_refuses_a_mixed_batch(tiny_model: PreTrainedModel) -> None:
    patches.attach(tiny_model, [weight(tiny_model)])
    with pytest.raises(ValueError, match=r"one strength for all rows of a call, got \[0.5, 1.0\]"):
        logits(tiny_model, [0.5, 1.0])


def test_a_weight_patch_rounds_once_in_a_model_of_few_digits(tiny_dir: Path) -> None:
    name, few = f"{LINEAR}.weight", torch.bfloat16
    model = models.load_model(tiny_dir, dtype="bfloat16")
    base = model.get_parameter(name).detach().clone()
    patch = weight(model)
    expected = (base.double() + 0.7 * patch.deltas[0].detach().double()).to(torch.float32).to(few)
    attached = patches.attach(model, [patch])
    logits(model, [0.7, 0.7])
    assert torch.equal(model.get_parameter(name), expected)
    attached.detach()
    assert torch.equal(model.get_parameter(name), base)
    patch.fold(model, 0.7)
    assert torch.equal(model.get_parameter(name), expected) and model.get_parameter(name).dtype == few


def test_a_patch_stands_on_the_same_weights_in_another_type(tiny_dir: Path, tmp_path: Path) -> None:
    few = models.load_model(tiny_dir, seed=0).bfloat16()
    patches.save(logit(few), tmp_path / "patch", models.fingerprint(few))
    assert patches.load(tmp_path / "patch", models.load_model(tiny_dir, seed=0)).kind == "logit"
    with pytest.raises(ValueError, match="made for another model"):
        patches.load(tmp_path / "patch", models.load_model(tiny_dir, seed=1))


def test_a_stack_gives_each_patch_its_own_strength(tiny_model: PreTrainedModel) -> None:
    stack = [make(tiny_model) for make in MAKERS]
    base = logits(tiny_model)
    attached = patches.attach(tiny_model, stack)
    for number, make in enumerate(MAKERS):
        strengths = torch.zeros(4, 2)
        strengths[number] = 1.0
        with torch.no_grad():
            chosen = tiny_model(IDS, roles=ROLES, strengths=strengths).logits
        assert not torch.equal(chosen, base), make.__name__
    with pytest.raises(ValueError, match="3 rows of strengths for 4 patches"):
        tiny_model(IDS, roles=ROLES, strengths=torch.zeros(3, 2))
    with pytest.raises(ValueError, match="already carries patches"):
        patches.attach(tiny_model, [])
    attached.detach()
    assert torch.equal(logits(tiny_model), base)


@each_kind
def test_save_and_load_and_refuse_another_model(make: Any, tiny_model: PreTrainedModel, tiny_dir: Path, tmp_path: Path) -> None:
    patch = make(tiny_model)
    patches.save(patch, tmp_path, models.fingerprint(tiny_model))
    assert patches.exists(tmp_path)
    loaded = patches.load(tmp_path, tiny_model)
    patches.attach(tiny_model, [patch])
    expected = logits(tiny_model, roles=ROLES)
    other = models.load_model(tiny_dir, seed=0)
    patches.attach(other, [loaded])
    assert torch.equal(logits(other, roles=ROLES), expected)
    with pytest.raises(ValueError, match="was made for another model"):
        patches.load(tmp_path, models.load_model(tiny_dir, seed=1))


@pytest.mark.parametrize("make", [logit, weight], ids=lambda make: make.__name__)
def test_folding_equals_hooks(make: Any, tiny_model: PreTrainedModel, tiny_dir: Path) -> None:
    patch = make(tiny_model)
    patches.attach(tiny_model, [patch])
    folded = models.load_model(tiny_dir, seed=0)
    patch.fold(folded, 0.6)
    torch.testing.assert_close(logits(folded), logits(tiny_model, [0.6, 0.6]), atol=1e-5, rtol=0)


def test_folding_an_affine_map_into_a_linear(tiny_model: PreTrainedModel, tiny_dir: Path) -> None:
    patch = randomised(ActivationPatch({LINEAR: tiny_model.config.intermediate_size}))
    patches.attach(tiny_model, [patch])
    folded = models.load_model(tiny_dir, seed=0)
    patch.fold(folded, 0.6)
    torch.testing.assert_close(logits(folded), logits(tiny_model, [0.6, 0.6]), atol=1e-5, rtol=0)


def test_what_cannot_fold_says_why(tiny_model: PreTrainedModel) -> None:
    with pytest.raises(CannotFold, match="depends on token roles"):
        embedding(tiny_model).fold(tiny_model, 1.0)
    EmbeddingPatch(tiny_model.config.hidden_size).fold(tiny_model, 1.0)
    with pytest.raises(CannotFold, match=r"model.layers.1 is a LlamaDecoderLayer: only the map of a linear layer, a conv"):
        ActivationPatch({"model.layers.1": tiny_model.config.hidden_size}).fold(tiny_model, 1.0)
    for settings in ({"positions": [[-1, None]]}, {"side": "input"}):
        with pytest.raises(CannotFold, match="only maps of outputs, on all tokens and without bounds"):
            ActivationPatch({NORM: tiny_model.config.hidden_size}, {"modules": NORM, **settings}).fold(tiny_model, 1.0)


TINY: dict[str, Any] = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
FOLDS = {
    "llama": (LlamaConfig(**TINY), r".*(input|post_attention)_layernorm|model\.norm"),
    "gpt2": (GPT2Config(vocab_size=60, n_embd=32, n_layer=2, n_head=4, n_positions=64), r".*(ln_[12f]|mlp\.c_fc|attn\.c_proj)"),
    "qwen2": (Qwen2Config(**TINY), r".*input_layernorm"),
    "gemma": (GemmaConfig(**TINY), r".*input_layernorm"),
}


@pytest.mark.parametrize("name", FOLDS)
def test_a_folded_map_is_the_hooked_one(name: str, tmp_path: Path) -> None:
    """Into norms with and without a bias, linear layers and the biases behind a norm; and a saved checkpoint loads so."""
    config, pattern = FOLDS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    places = [tap.name for tap in taps.select(model, Selection(modules=pattern)) if tap.name != "model.norm"]
    sizes = {place: _width(model, place) for place in places}
    patch = randomised(ActivationPatch(sizes, {"modules": pattern}))
    attached = patches.attach(model, [patch])
    hooked = logits(model, [0.7, 0.7])
    attached.detach()
    plain = logits(model)
    patch.fold(model, 0.7)
    assert not torch.allclose(plain, hooked, atol=1e-2)
    torch.testing.assert_close(logits(model), hooked, atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), hooked, atol=1e-5, rtol=1e-5)


def _width(model: Any, place: str) -> int:
    reader = taps.Reader(model, [taps.Tap(place)])
    width = reader(input_ids=IDS)[place].shape[-1]
    reader.close()
    return width


def test_a_shift_without_a_place_is_refused() -> None:
    """Gemma 2 adds the output of this norm to the residual stream: no linear layer takes it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Gemma2Config(**TINY)).eval()
    name = "model.layers.0.post_attention_layernorm"
    with pytest.raises(CannotFold, match="has no bias, and no linear layer takes its output"):
        randomised(ActivationPatch({name: 32}, {"modules": name})).fold(model, 1.0)


def test_only_selected_tokens_are_steered(tiny_model: PreTrainedModel) -> None:
    """A map of the first layer that acts on token 3 alone changes the logits of token 3 and later ones, not before."""
    name = "model.layers.0"
    patch = randomised(ActivationPatch({name: 128}, {"modules": r"model\.layers\.0", "positions": [[3, 4]]}))
    before = logits(tiny_model)
    patches.attach(tiny_model, [patch])
    after = logits(tiny_model, roles=ROLES, position_ids=torch.arange(6).expand(2, 6))
    assert torch.equal(after[:, :3], before[:, :3])
    assert not torch.allclose(after[:, 3:], before[:, 3:], atol=1e-3)


def test_a_selection_of_tokens_needs_roles_and_positions(tiny_model: PreTrainedModel) -> None:
    patches.attach(tiny_model, [ActivationPatch({NORM: 128}, {"modules": NORM, "positions": [[0, 1]]})])
    with pytest.raises(ValueError, match="call it with roles="):
        logits(tiny_model)
    with pytest.raises(ValueError, match="call it with position_ids="):
        logits(tiny_model, roles=ROLES)


@pytest.mark.parametrize("side", ["output", "input"])
def test_input_and_output_of_a_module(tiny_model: PreTrainedModel, side: str) -> None:
    """Mapping the input of the layer behind is mapping the output of the one before."""
    place = "model.layers.1" if side == "output" else "model.layers.2"
    patch = randomised(ActivationPatch({place: 128}, {"modules": place, "side": side}))
    patches.attach(tiny_model, [patch])
    reference = randomised(ActivationPatch({"model.layers.1": 128}, {"modules": "model.layers.1"}))
    expected = logits(tiny_model)
    fresh = models.load_model(tiny_model.name_or_path, seed=0) if tiny_model.name_or_path else None
    if fresh is not None:
        patches.attach(fresh, [reference])
        assert torch.equal(logits(fresh), expected)


def test_elements_of_a_tuple_and_images() -> None:
    class Twins(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return x, 2 * x

    model: Any = torch.nn.Sequential()
    model.add_module("twins", Twins())
    patch = randomised(ActivationPatch({"twins:1": 3}, {"modules": "twins:1"}))
    patches.attach(model, [patch])
    image = torch.randn(2, 3, 4, 5)
    first, second = model(image)
    scale, shift = patch.maps[0].scale[:, None, None], patch.maps[0].shift[:, None, None]
    assert torch.equal(first, image)
    torch.testing.assert_close(second, scale * 2 * image + shift)


def test_bounds_leave_values_outside_alone_and_an_inverse_undoes() -> None:
    scale, shift = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 0.5])
    bounded = AffineMap(scale, shift, torch.tensor([0.0, 0.0]), torch.tensor([1.0, 1.0]))
    z = torch.tensor([[0.5, 0.5], [2.0, -3.0]])
    assert bounded(z).tolist() == [[2.0, 0.0], [2.0, -3.0]]
    patch = ActivationPatch.from_maps({NORM: bounded}, Selection(modules=NORM))
    assert patch.maps[0](z).tolist() == bounded(z).tolist()
    inside = torch.tensor([[0.1, 0.9], [1.0, 0.0]])
    torch.testing.assert_close(bounded.inverse()(bounded(inside)), inside)
    undone = patch.inverse().maps[0](patch.maps[0](inside))
    torch.testing.assert_close(undone, inside)
    with pytest.raises(ValueError, match="1 neurons have scale 0"):
        AffineMap(torch.tensor([0.0, 1.0]), shift).inverse()
    with pytest.raises(ValueError, match="bounds do not make one affine map"):
        bounded.then(AffineMap(scale, shift))


def test_a_stack_of_maps_is_their_composition(tiny_model: PreTrainedModel) -> None:
    one, two = (AffineMap(torch.rand(128) + 0.5, torch.randn(128)) for _ in range(2))
    selection = Selection(modules=NORM)
    stacked = patches.attach(tiny_model, [ActivationPatch.from_maps({NORM: fitted}, selection) for fitted in (one, two)])
    expected = logits(tiny_model)
    stacked.detach()
    patches.attach(tiny_model, [ActivationPatch.from_maps({NORM: one.then(two)}, selection)])
    torch.testing.assert_close(logits(tiny_model), expected, atol=1e-5, rtol=1e-5)


def small_network(norm: torch.nn.Module, channels_last: bool) -> tuple[torch.nn.Sequential, torch.Tensor]:
    shape = (2, 5, 8) if channels_last else (2, 8, 3, 3)
    return torch.nn.Sequential(norm, torch.nn.SiLU()), torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("norm", "channels_last"),
    [
        (torch.nn.GroupNorm(2, 8), False),
        (torch.nn.GroupNorm(2, 8, affine=False), False),
        (torch.nn.LayerNorm(8), True),
        (torch.nn.LayerNorm(8, bias=False), True),
    ],
)
def test_a_map_that_trains_behind_a_norm_is_the_map_of_its_output(norm: torch.nn.Module, channels_last: bool) -> None:
    """Merged into the norm's weights for the call: same values, same gradients, and the weights are the norm's own again."""
    network, x = small_network(norm, channels_last)
    for parameter in network.parameters():
        parameter.requires_grad_(False).copy_(torch.rand(8))
    before = {name: value.clone() for name, value in network.state_dict().items()}
    patch = ActivationPatch({"0": 8}, Selection(modules="0"))
    layer = patch.layers()[0]
    layer.set(AffineMap(torch.linspace(0.5, 2, 8), torch.linspace(-1, 1, 8)))
    plain = norm(x)
    scale, shift = (value.detach().clone().requires_grad_() for value in (layer.scale, layer.shift))
    shape = (8,) if channels_last else (8, 1, 1)
    expected = torch.nn.functional.silu(plain * scale.view(shape) + shift.view(shape))
    expected.square().sum().backward()
    attached = patches.attach(network, [patch])
    got = network(x)
    got.square().sum().backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(layer.scale.grad, scale.grad)
    torch.testing.assert_close(layer.shift.grad, shift.grad)
    with torch.no_grad():
        torch.testing.assert_close(network(x), expected)
    with pytest.raises(RuntimeError):
        network(x[..., :5] if channels_last else x[:, :5])
    attached.detach()
    assert network.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert torch.equal(norm(x), plain)


def test_a_map_that_trains_above_another_one_of_the_same_norm_acts_behind_it() -> None:
    network, x = small_network(torch.nn.LayerNorm(8), True)
    below, above = (ActivationPatch({"0": 8}, Selection(modules="0")) for _ in range(2))
    below.layers()[0].set(AffineMap(torch.full((8,), 2.0), torch.ones(8)))
    above.layers()[0].set(AffineMap(torch.full((8,), 3.0), torch.zeros(8)))
    expected = torch.nn.functional.silu(3 * (2 * network[0](x) + 1))
    patches.attach(network, [below, above])
    torch.testing.assert_close(network(x), expected)
    assert torch.equal(network[0].weight, torch.ones(8)), "left as it was"


def test_each_call_is_steered_at_the_tokens_of_its_own_roles(tiny_model: PreTrainedModel, tiny_dir: Path) -> None:
    """What an earlier call of the same model chose is not used again."""
    settings = {"modules": r"model\.layers\.0", "roles": ["data"]}
    patch = randomised(ActivationPatch({"model.layers.0": 128}, settings))
    patches.attach(tiny_model, [patch])
    position = torch.arange(6).expand(2, 6)
    first = logits(tiny_model, roles=ROLES, position_ids=position)
    second = logits(tiny_model, roles=1 - ROLES, position_ids=position)
    fresh = models.load_model(tiny_dir, seed=0)
    patches.attach(fresh, [randomised(ActivationPatch({"model.layers.0": 128}, settings))])
    assert torch.equal(logits(fresh, roles=1 - ROLES, position_ids=position), second)
    assert not torch.equal(first, second)
