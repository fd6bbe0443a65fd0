"""Safety-WaRP against the explicit module of its equations, and what its masks promise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from steerlab import models, patches
from steerlab.activations.moments import TENSORS
from steerlab.data.worlds import tiny
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Batch, collate
from steerlab.methods import warp
from steerlab.methods.contract import Inputs, language_modelling_loss
from steerlab.methods.math import gradients, orthonormal, rotation, weight_space, weight_space_plan
from steerlab.methods.math.masks import unpacked
from steerlab.methods.math.selected_layers import numbers
from steerlab.methods.preparations import Prepare, Source
from steerlab.methods.warp import Config, Warp
from steerlab.stages import JobType, extraction_size
from steerlab.storage.plan import Estimate
from steerlab.storage.tensors import Parts

SAFETY = tiny.rows("refusals/train", 12)
ALL_TYPES = ("attn_q", "attn_k", "attn_v", "attn_o", "ffn_gate", "ffn_up", "ffn_down")


@pytest.fixture
def model(tiny_dir: Path) -> PreTrainedModel:
    """A small model in float64."""
    return models.load_model(tiny_dir, seed=0).double()


@pytest.fixture
def batches(encoder: Encoder) -> list[Batch]:
    rows = [encoder.encode(encoder.from_row(r, "instruction")) for r in tiny.rows("arithmetic/train", 24)]
    return [collate(rows[i : i + 4], encoder.pad_id, loss_on="response") for i in range(0, 24, 4)]


def config(**settings: Any) -> Config:
    return Config.model_validate({"target_layers": [0, 1], "rows_per_batch": 4, **settings})


def train(module: Any, optimizer: torch.optim.Optimizer, batches: list[Batch], passes: int = 1) -> None:
    """Take steps of `passes` batches each, as the loop does."""
    for step in range(len(batches) // passes):
        module.on_step(step, 10.0)
        optimizer.zero_grad()
        for number in range(passes):
            module.before_pass(number == passes - 1)
            (module(batches[step * passes + number]).total / 50).backward()
        optimizer.step()
        module.after_step(0.0)


def changes(module: Warp) -> list[nn.Parameter]:
    return [layer.change_MN for layer in module.patch.rotated()]


def finished(module: Warp) -> patches.WeightPatch:
    return module.finished(module.patch.state_dict())


class Explicit(nn.Module):
    """The manuscript's phase 3: W~ trains, masked by a stopped gradient; every forward multiplies by the basis."""

    def __init__(self, linear: nn.Linear, vectors_NN: torch.Tensor, frozen_MN: torch.Tensor) -> None:
        super().__init__()
        self.vectors_NN, self.frozen_MN = vectors_NN, frozen_MN
        self.rotated_MN = nn.Parameter(linear.weight.detach() @ vectors_NN)
        linear.forward = lambda x: nn.functional.linear(x, self.weight())  # type: ignore[method-assign]

    def weight(self) -> torch.Tensor:
        kept = (self.rotated_MN * self.frozen_MN).detach()
        return (kept + self.rotated_MN * ~self.frozen_MN) @ self.vectors_NN.T


@pytest.mark.parametrize(("passes", "outputs"), [(1, 10_000), (1, 1), (2, 10_000)])
@pytest.mark.parametrize("kind", ["adam", "sgd"])
def test_training_equals_the_explicit_module(
    kind: str, passes: int, outputs: int, model: PreTrainedModel, tiny_dir: Path, batches: list[Batch], prepared: Any
) -> None:
    """METHODS 2.2: the same weights after three steps, in float64, below 1e-10."""
    wanted = config(keep_ratio=0.3)
    before = prepared(warp.METHOD, wanted, model, SAFETY)
    basis, mask = Parts.open(before["basis"]), Parts.open(before["mask"])
    places = warp.places(model, wanted)

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.Adam(parameters, lr=1e-2) if kind == "adam" else torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    # An orthonormal basis in float64: the explicit module goes to W~ and back, which rounding of U alone would show.
    vectors = {p.input_of: torch.linalg.qr(basis.tensor(f"{p.input_of}/vectors").double())[0] for p in places}
    module = Warp(model, wanted, Inputs(prepared=before))
    for place, layer in zip(places, module.patch.rotated(), strict=True):
        assert layer.shared is not None
        layer.shared._vectors_NN = models.Kept(vectors[place.input_of])
        layer.shared.num_outputs = outputs  # many: inputs are rotated in a step of one pass; few: gradients are
    train(module, optimizer(changes(module)), batches[: 3 * passes], passes)
    patch = finished(module)

    naive = models.load_model(tiny_dir, seed=0).double()
    start = {place.module: naive.get_submodule(place.module).weight.detach().clone() for place in places}
    explicit = [
        Explicit(
            naive.get_submodule(p.module),  # type: ignore[arg-type]
            vectors[p.input_of],
            unpacked(mask.tensor(p.module), p.shape),
        )
        for p in places
    ]
    naive_optimizer = optimizer([one.rotated_MN for one in explicit])
    for step in range(3):
        naive_optimizer.zero_grad()
        for batch in batches[step * passes : (step + 1) * passes]:
            (language_modelling_loss(naive(**batch.model_inputs).logits.double(), batch.labels) / 50).backward()
        naive_optimizer.step()
    for place, one, delta in zip(places, explicit, patch.deltas, strict=True):
        moved = one.weight().detach() - start[place.module]
        assert moved.abs().max() > 1e-3
        assert (delta - moved).abs().max() < 1e-10


@pytest.mark.parametrize("keep_ratio", [0.0, 0.013, 0.5, 1.0])
@pytest.mark.parametrize("scope", ["module", "global"])
def test_the_mask_holds_exactly_the_share(keep_ratio: float, scope: str, tiny_model: PreTrainedModel, prepared: Any) -> None:
    wanted = config(keep_ratio=keep_ratio, scope=scope)
    mask = Parts.open(prepared(warp.METHOD, wanted, tiny_model, SAFETY)["mask"])
    places = warp.places(tiny_model, wanted)
    frozen = [int(unpacked(mask.tensor(p.module), p.shape).sum()) for p in places]
    sizes = [p.shape[0] * p.shape[1] for p in places]
    if scope == "module":
        assert frozen == [round(keep_ratio * size) for size in sizes]
    assert sum(frozen) == round(keep_ratio * sum(sizes)) or scope == "module"
    assert sum(tensor.numel() for tensor in map(mask.tensor, [p.module for p in places])) <= sum(sizes) / 8 + len(sizes)


@pytest.mark.parametrize("scope", ["module", "global"])
def test_the_mask_holds_the_most_important(scope: str, tiny_model: PreTrainedModel, prepared: Any) -> None:
    wanted = config(keep_ratio=0.2, scope=scope)
    before = prepared(warp.METHOD, wanted, tiny_model, SAFETY)
    importance, mask = Parts.open(before["importance"]), Parts.open(before["mask"])
    frozen = {p.module: unpacked(mask.tensor(p.module), p.shape) for p in warp.places(tiny_model, wanted)}
    groups = [[name] for name in frozen] if scope == "module" else [list(frozen)]
    for names in groups:
        scores = torch.cat([importance.tensor(name).flatten() for name in names])
        taken = torch.cat([frozen[name].flatten() for name in names])
        assert scores[taken].min() >= scores[~taken].max()


def test_importance_is_the_sum_of_absolute_gradients_over_batches(
    model: PreTrainedModel, tiny_dir: Path, encoder: Encoder, prepared: Any
) -> None:
    """The coefficients as parameters of an explicit module: their gradients by autograd, batch by batch."""
    wanted = config()
    before = prepared(warp.METHOD, wanted, model, SAFETY)
    importance, basis = Parts.open(before["importance"]), Parts.open(before["basis"])
    naive = models.load_model(tiny_dir, seed=0).double()
    nothing = torch.tensor(False)
    explicit = {
        p.module: Explicit(
            naive.get_submodule(p.module),  # type: ignore[arg-type]
            basis.tensor(f"{p.input_of}/vectors").double(),
            nothing,
        )
        for p in warp.places(model, wanted)
    }
    sums = {name: torch.zeros_like(one.rotated_MN) for name, one in explicit.items()}
    rows = [encoder.encode(encoder.from_row(row, "instruction")) for row in SAFETY]
    for first in range(0, len(rows), 4):
        batch = collate(rows[first : first + 4], encoder.pad_id, loss_on="response")
        loss = nn.functional.cross_entropy(
            naive(**batch.model_inputs).logits[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100
        )
        naive.zero_grad()
        gradients = torch.autograd.grad(loss, [one.rotated_MN for one in explicit.values()])
        for name, gradient in zip(explicit, gradients, strict=True):
            sums[name] += gradient.abs()
    for name, total in sums.items():
        torch.testing.assert_close(importance.tensor(name).double(), total, rtol=1e-4, atol=1e-6)


def test_the_rotation_matters_for_coefficients_and_not_for_norms_of_rows(
    tiny_model: PreTrainedModel, tiny_dir: Path, prepared: Any
) -> None:
    """A norm over rotated inputs, the seed's importance, is the same in all rotations; a ranking of coefficients is not."""
    found = {}
    for kind in ("safety", "random", "none"):
        before = prepared(warp.METHOD, config(rotation=kind, rows_per_batch=12), models.load_model(tiny_dir, seed=0), SAFETY)
        importance, mask = Parts.open(before["importance"]), Parts.open(before["mask"])
        name = "model.layers.0.mlp.up_proj"
        found[kind] = importance.tensor(name), mask.tensor(name)
    for kind in ("safety", "random"):  # one batch: the sum of absolute values is one gradient's
        torch.testing.assert_close(found[kind][0].norm(dim=1), found["none"][0].norm(dim=1), rtol=1e-3, atol=1e-6)
        assert not torch.equal(found[kind][1], found["none"][1])


def test_a_frozen_coefficient_does_not_move_by_a_bit(tiny_model: PreTrainedModel, batches: list[Batch], prepared: Any) -> None:
    """With decay and momentum on: zero in coordinates, and (W - W_0) U is zero there within float32."""
    wanted = config(keep_ratio=0.4)
    before = prepared(warp.METHOD, wanted, tiny_model, SAFETY)
    places = warp.places(tiny_model, wanted)
    start = {p.module: tiny_model.get_submodule(p.module).weight.detach().clone() for p in places}
    module = Warp(tiny_model, wanted, Inputs(prepared=before))
    train(module, torch.optim.AdamW(changes(module), lr=1e-2, weight_decay=0.1), batches)
    basis = Parts.open(before["basis"])
    for place, layer in zip(places, module.patch.rotated(), strict=True):
        assert bool((layer.change_MN[~layer.free_MN] == 0).all()) and bool(layer.change_MN[layer.free_MN].ne(0).all())
        coefficients = (layer.matrix() - start[place.module]) @ basis.tensor(f"{place.input_of}/vectors")
        assert coefficients[~layer.free_MN].abs().max() < 1e-6 * coefficients.abs().max() + 1e-7


def test_everything_frozen_leaves_the_weights_bit_for_bit(
    tiny_model: PreTrainedModel, batches: list[Batch], prepared: Any
) -> None:
    wanted = config(keep_ratio=1.0)
    before = prepared(warp.METHOD, wanted, tiny_model, SAFETY)
    start = {p.module: tiny_model.get_submodule(p.module).weight.detach().clone() for p in warp.places(tiny_model, wanted)}
    module = Warp(tiny_model, wanted, Inputs(prepared=before))
    train(module, torch.optim.AdamW(changes(module), lr=1e-2, weight_decay=0.1), batches)
    for weight, layer in zip(start.values(), module.patch.rotated(), strict=True):
        assert torch.equal(layer.matrix(), weight)
    assert all(not bool(delta.any()) for delta in finished(module).deltas)


@pytest.mark.parametrize("kind", ["none", "safety", "random"])
def test_nothing_frozen_with_sgd_is_plain_sgd_in_any_coordinates(
    kind: str, model: PreTrainedModel, tiny_dir: Path, batches: list[Batch], prepared: Any
) -> None:
    wanted = config(keep_ratio=0.0, rotation=kind)
    before = prepared(warp.METHOD, wanted, model, SAFETY)
    names = [p.module for p in warp.places(model, wanted)]
    module = Warp(model, wanted, Inputs(prepared=before))
    train(module, torch.optim.SGD(changes(module), lr=0.1), batches[:3])
    plain = models.load_model(tiny_dir, seed=0).double()
    start = {name: plain.get_submodule(name).weight.detach().clone() for name in names}
    weights = [plain.get_submodule(name).weight for name in names]
    optimizer = torch.optim.SGD(weights, lr=0.1)  # type: ignore[arg-type]
    for batch in batches[:3]:
        optimizer.zero_grad()
        (language_modelling_loss(plain(**batch.model_inputs).logits.double(), batch.labels) / 50).backward()
        optimizer.step()
    for name, weight, delta in zip(names, weights, finished(module).deltas, strict=True):
        torch.testing.assert_close(delta.double(), (weight - start[name]).detach(), rtol=1e-5, atol=1e-8)  # type: ignore[operator]


def test_other_weights_train_where_they_are_asked_to(
    tiny_model: PreTrainedModel, tiny_dir: Path, batches: list[Batch], prepared: Any
) -> None:
    """And what is saved gives the trained model on the base weights."""
    wanted = config(keep_ratio=0.5, others="train")
    before = prepared(warp.METHOD, wanted, tiny_model, SAFETY)
    module = Warp(tiny_model, wanted, Inputs(prepared=before))
    train(module, torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-3), batches)
    with torch.no_grad():
        trained = module.eval()(batches[0]).total
    base = models.load_model(tiny_dir, seed=0)
    with torch.no_grad():
        assert abs(language_modelling_loss(base(**batches[0].model_inputs).logits, batches[0].labels) - trained) > 1
        patches.attach(base, [finished(module)])
        folded = language_modelling_loss(base(**batches[0].model_inputs).logits, batches[0].labels)
    torch.testing.assert_close(folded, trained, rtol=1e-5, atol=1e-4)


def test_second_moments_read_in_several_passes_are_the_same_bits(
    tiny_model: PreTrainedModel, prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = prepared(warp.METHOD, config(), tiny_model, SAFETY)["moments"]
    monkeypatch.setattr(extraction_size, "SUMS_HELD_BYTES", 1)
    apart = prepared(warp.METHOD, config(), tiny_model, SAFETY)["moments"]
    assert (whole / TENSORS).read_bytes() == (apart / TENSORS).read_bytes()


def test_layers_that_share_an_input_share_a_basis(tiny_model: PreTrainedModel, prepared: Any) -> None:
    wanted = config(layer_type=ALL_TYPES, target_layers=[2])
    before = prepared(warp.METHOD, wanted, tiny_model, SAFETY)
    assert list(Parts.open(before["basis"]).facts) == [
        f"model.layers.2.{name}" for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    ]
    for group in Parts.open(before["basis"]).facts:
        vectors = Parts.open(before["basis"]).tensor(f"{group}/vectors").double()
        torch.testing.assert_close(vectors.T @ vectors, torch.eye(len(vectors), dtype=torch.float64), rtol=0, atol=1e-5)


def test_too_few_rows_for_a_whole_basis_are_said(tiny_model: PreTrainedModel, prepared: Any) -> None:
    facts = Parts.open(prepared(warp.METHOD, config(), tiny_model, SAFETY[:2])["basis"]).facts
    for group, known in facts.items():
        assert known["rank"] <= known["vectors"] < known["size"]
        assert f"the inputs of {group} span {known['rank']} of {known['size']} directions" in known["note"]


FAMILIES = {
    "llama": {"num_key_value_heads": 2},
    "qwen2": {"num_key_value_heads": 2},
    "qwen3": {"num_key_value_heads": 2, "head_dim": 8},
    "mistral": {"num_key_value_heads": 2},
    "gemma": {"num_key_value_heads": 1, "head_dim": 8},
    "gpt2": {},
    "gpt_neox": {},
}


def family(name: str) -> PreTrainedModel:
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48, "vocab_size": 256}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes, **FAMILIES[name])).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_and_folds(name: str, batches: list[Batch], prepared: Any) -> None:
    model, base = family(name), family(name)
    kinds = [kind for kind in ALL_TYPES if kind != "ffn_gate" or name not in ("gpt2", "gpt_neox")]
    wanted = config(layer_type=kinds, keep_ratio=0.25)
    before = prepared(warp.METHOD, wanted, model, SAFETY)
    module = Warp(model, wanted, Inputs(prepared=before))
    train(module, torch.optim.Adam(changes(module), lr=1e-2), batches[:2])
    with torch.no_grad():
        trained = module(batches[0]).total
        finished(module).fold(base, 1.0)
        folded = language_modelling_loss(base(**batches[0].model_inputs).logits, batches[0].labels)
    torch.testing.assert_close(folded, trained, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox"])
def test_parts_of_a_fused_layer_are_meant_alone(name: str, batches: list[Batch], prepared: Any) -> None:
    """Training the queries of a fused layer moves the queries, whatever their place among the outputs."""
    model = family(name)
    before = prepared(warp.METHOD, wanted := config(layer_type="attn_q", keep_ratio=0.0, target_layers=0), model, SAFETY)
    module = Warp(model, wanted, Inputs(prepared=before))
    train(module, torch.optim.Adam(changes(module), lr=1e-2), batches[:2])
    delta = models.linear_weight(model.get_submodule(module.patch.names[0]), finished(module).deltas[0])
    moved = delta.abs().sum(1) > 0
    heads = moved.view(4, 3, 8) if name == "gpt_neox" else moved.view(3, 4, 8).transpose(0, 1)
    assert bool(heads[:, 0].all()) and not bool(heads[:, 1:].any())


def test_a_layer_type_that_the_model_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ffn_gate: GPT2LMHeadModel has no such linear layers; it has attn_q, attn_k"):
        warp.places(family("gpt2"), config(layer_type="ffn_gate"))
    with pytest.raises(ValueError, match=r"layer 9: LlamaForCausalLM has the layers 0 to 2"):
        warp.places(family("llama"), config(target_layers=[9]))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("all", list(range(32))),
        ("early", list(range(11))),
        ("middle", list(range(11, 22))),
        ("late", list(range(22, 32))),
        ("last", [31]),
        (7, [7]),
        ("8-10", [8, 9, 10]),
        ("0, 5-6, last", [0, 5, 6, 31]),
        ([3, "1-2"], [1, 2, 3]),
    ],
)
def test_layers_are_named_as_in_the_papers_code(given: Any, expected: list[int]) -> None:
    assert numbers(Config.model_validate({"target_layers": given}).target_layers, 32) == expected


def test_a_basis_of_another_model_is_refused(tiny_model: PreTrainedModel, tiny_dir: Path, prepared: Any) -> None:
    before = prepared(warp.METHOD, config(), tiny_model, SAFETY)
    with pytest.raises(ValueError, match=r"the basis of model.layers.0.self_attn.q_proj was made from activations of another"):
        Warp(models.load_model(tiny_dir, seed=1), config(), Inputs(prepared=before))


def test_a_broken_gradient_is_named_with_its_module_and_batch(tiny_model: PreTrainedModel, prepared: Any) -> None:
    with torch.no_grad():
        tiny_model.get_submodule("model.layers.0.mlp.down_proj").weight[0, 0] = math.nan
    with pytest.raises(ValueError, match=r"data\.safety, batch 0: the loss is nan"):
        prepared(warp.METHOD, config(rotation="none"), tiny_model, SAFETY)


def test_a_gradient_that_is_none_is_named_too(
    tiny_model: PreTrainedModel, prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def finite_with_a_broken_slope(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return language_modelling_loss(logits, labels) + (0 * logits.sum()).abs().sqrt()

    monkeypatch.setattr(gradients, "language_modelling_loss", finite_with_a_broken_slope)
    with pytest.raises(
        ValueError, match=r"data\.safety, batch 0: the gradient of model\.layers\.1\.mlp\.down_proj holds a NaN"
    ):
        prepared(warp.METHOD, config(rotation="none"), tiny_model, SAFETY)


@pytest.mark.parametrize("kind", ["random", "magnitude"])
def test_control_masks_need_no_safety_rows(kind: str, tiny_model: PreTrainedModel, tiny_dir: Path, prepared: Any) -> None:
    wanted = config(mask=kind, rotation="none", keep_ratio=0.3)
    masks = [Parts.open(prepared(warp.METHOD, wanted, models.load_model(tiny_dir, seed=0), [])["mask"]) for _ in range(2)]
    for place in warp.places(tiny_model, wanted):
        first, second = (unpacked(mask.tensor(place.module), place.shape) for mask in masks)
        assert torch.equal(first, second)
        assert int(first.sum()) == round(0.3 * first.numel())
        if kind == "magnitude":
            weight = tiny_model.get_submodule(place.module).weight.abs()  # type: ignore[operator]
            assert weight[first].min() >= weight[~first].max()


def test_magnitudes_are_those_of_the_rotated_weights(tiny_model: PreTrainedModel, prepared: Any) -> None:
    wanted = config(mask="magnitude", rotation="safety", keep_ratio=0.3)
    before = prepared(warp.METHOD, wanted, tiny_model, SAFETY)
    basis, mask = Parts.open(before["basis"]), Parts.open(before["mask"])
    for place in warp.places(tiny_model, wanted):
        weight_MN = tiny_model.get_submodule(place.module).weight.detach()  # type: ignore[union-attr]
        rotated_MN = (weight_MN @ basis.tensor(f"{place.input_of}/vectors")).abs()  # type: ignore[operator]
        frozen_MN = unpacked(mask.tensor(place.module), place.shape)
        assert rotated_MN[frozen_MN].min() >= rotated_MN[~frozen_MN].max() - 1e-6
        plain_MN = weight_MN.abs()  # type: ignore[operator]
        assert plain_MN[frozen_MN].min() < plain_MN[~frozen_MN].max()


def test_random_bases_are_those_of_the_seed_and_the_inputs_name(tiny_model: PreTrainedModel, prepared: Any) -> None:
    wanted = config(rotation="random", mask="random", keep_ratio=0.3)
    before = prepared(warp.METHOD, wanted, tiny_model, SAFETY)
    basis = Parts.open(before["basis"])
    for group, size in {place.input_of: place.shape[1] for place in warp.places(tiny_model, wanted)}.items():
        assert torch.equal(basis.tensor(f"{group}/vectors"), orthonormal.random_basis(size, wanted.seed, group))


class Declared(Prepare):
    """Keeps the declarations."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[str, Any] = {}

    def make(self, preparation: Any) -> None:
        self.made[getattr(preparation, "name", "moments")] = preparation


def test_stages_declare_what_they_need(tiny_model: PreTrainedModel) -> None:
    """Versions and limits are part of the keys of artifacts; memory and disk are refused before the start."""

    def of(**settings: Any) -> tuple[dict[str, Any], list[tuple[int, int]]]:
        wanted, found = config(rows_per_shard=10, **settings), Declared()
        warp.prepares(wanted, tiny_model, found)
        return found.made, [place.shape for place in warp.places(tiny_model, wanted)]

    made, shapes = of()
    sizes = [rows * columns for rows, columns in shapes]
    widths = {place.input_of: place.shape[1] for place in warp.places(tiny_model, config())}.values()
    assert {name: one.version for name, one in made.items() if name != "moments"} == dict.fromkeys(made.keys() - {"moments"}, 1)
    assert made["basis"].estimate == Estimate(max(widths) ** 2 * 32, sum(width**2 for width in widths) * 4)
    # Whole batches: of 10 rows a shard, batches of 4 leave 8.
    limits = {name: made["importance"].params[name] for name in ("rows_per_batch", "rows_per_shard", "max_tokens")}
    assert limits == {"rows_per_batch": 4, "rows_per_shard": 8, "max_tokens": config().max_tokens}
    assert made["importance"].estimate == Estimate(4 * sum(sizes), 4 * sum(sizes), work_bytes=4 * sum(sizes))
    assert made["mask"].estimate == Estimate(24 * max(sizes), sum(-(-size // 8) for size in sizes))
    made, _ = of(rotation="random", mask="magnitude")
    assert (made["basis"].version, made["importance"].version) == (1, 1) and "moments" not in made
    assert made["importance"].estimate == Estimate(4 * max(sizes), 4 * sum(sizes))


@pytest.mark.parametrize(
    ("settings", "needs"),
    [
        ({"mask": "importance", "rotation": "none"}, True),
        ({"mask": "random", "rotation": "safety"}, True),
        ({"mask": "magnitude", "rotation": "safety"}, True),
        ({"mask": "random", "rotation": "random"}, False),
        ({"mask": "magnitude", "rotation": "none"}, False),
    ],
)
def test_safety_rows_are_asked_for_where_a_mask_or_a_basis_is_made_of_them(settings: dict[str, Any], needs: bool) -> None:
    tree = {
        "name": "w", "model": {"source": "tiny:model"}, "train": {"steps": 1}, "evaluate": [],
        "data": {"train": {"source": "tiny:arithmetic/train"}}, "method": {"name": "warp", "target_layers": [0], **settings},
    }  # fmt: skip
    job = JobType.model_validate(tree)
    if needs:
        with pytest.raises(ValueError, match=r"data\.safety: method warp needs these rows"):
            weight_space_plan.check_rows(config(**settings), job)
    else:
        weight_space_plan.check_rows(config(**settings), job)


def test_inputs_are_rotated_only_in_a_step_of_one_pass() -> None:
    """In a step of several passes the matrix is computed once, for all of them, and the summed gradient is rotated once."""
    shared = rotation.SharedInput(orthonormal.random_basis(6, 0, "x"), num_outputs=100)
    layer = rotation.RotatedLayer(nn.Linear(6, 4), torch.zeros(4, 6, dtype=torch.bool), shared)
    x = torch.zeros(3, 6)
    found = []
    for passes in (1, 3):
        layer.start_step()
        for number in range(passes):
            layer.start_pass(number == passes - 1)
            found.append(layer._takes_rotated(x))
    assert found == [True, False, False, False]
    assert not layer._takes_rotated(torch.zeros(100, 6)), "as many tokens as outputs"


def test_the_record_of_a_random_basis_is_that_of_a_whole_one(tmp_path: Path) -> None:
    source = Source({"seed": 3, "sizes": {"a": 5, "b": 7}}, {}, None)
    assert weight_space.random_basis(source, "b", tmp_path / "b.bin") == {"rank": 7, "size": 7}
