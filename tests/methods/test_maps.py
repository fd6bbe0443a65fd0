"""Maps of any kind: what they are together, undone, at a strength, in weights and on disk; the methods that fit other ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from steerlab import models, patches
from steerlab.data.worlds import tiny
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import collate
from steerlab.job import Selection
from steerlab.methods import METHODS, ablation, fitted, iti, iti_heads, lineas, repe, trained
from steerlab.methods.contract import Inputs, trained_parameters
from steerlab.patches import ActivationPatch, CannotFold, taps
from steerlab.patches.maps import LAYERS, AffineLayer, AffineMap, LowRankMap

WRITERS = r"model[.]layers[.]\d+[.](self_attn[.]o_proj|mlp[.]down_proj)"


def low_rank(width: int, rank: int, seed: int = 0) -> LowRankMap:
    generator = torch.Generator().manual_seed(seed)
    up, down, bias = (torch.randn(size, generator=generator) for size in ((width, rank), (rank, width), (rank,)))
    return LowRankMap(0.3 * up, 0.3 * down, bias)


def values(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9))


def test_a_map_of_low_rank_is_its_formula() -> None:
    found, z = low_rank(6, 2), values(5, 6)
    naive = torch.stack([row + found.up_DR @ (found.down_RD @ row + found.bias_R) for row in z])
    torch.testing.assert_close(found(z), naive)
    assert found.width == 6 and LAYERS["low_rank"](6, rank=2)(z).equal(z), "it begins as no change"


def test_a_bounded_layer_is_its_map() -> None:
    layer = AffineLayer(3, bounded=True)
    layer.load_state_dict(
        {"scale": torch.full((3,), 2.0), "shift": torch.ones(3), "low": -torch.ones(3), "high": torch.ones(3)}
    )
    value = torch.tensor([[0.5, -2.0, 2.0], [1.5, 0.0, -1.0]])
    expected = torch.tensor([[2.0, -2.0, 2.0], [1.5, 1.0, -1.0]])
    assert torch.equal(layer.mapped(value), expected) and torch.equal(layer.fitted()(value), expected)


def test_a_direction_is_removed_and_nothing_else() -> None:
    r, z = values(8), values(50, 8)
    left = LowRankMap.without(r)(z)
    unit = r / r.norm()
    torch.testing.assert_close(left @ unit, torch.zeros(50), atol=1e-5, rtol=0)
    torch.testing.assert_close(left, z - (z @ unit)[:, None] * unit)
    torch.testing.assert_close(LowRankMap.without(r)(left), left)
    with pytest.raises(ValueError, match="what was erased cannot be brought back"):
        LowRankMap.without(r).inverse()


@pytest.mark.parametrize("rank", [1, 3])
def test_maps_are_undone_and_follow_each_other(rank: int) -> None:
    one, two, z = low_rank(6, rank), low_rank(6, 2, seed=1), values(20, 6)
    torch.testing.assert_close(one.inverse()(one(z)), z, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(one.then(two)(z), two(one(z)), atol=1e-4, rtol=1e-4)
    assert len(one.then(two).bias_R) == rank + 2


def test_maps_of_two_kinds_are_no_one_map() -> None:
    affine = AffineMap(torch.ones(6), torch.ones(6))
    for first, second in ((affine, low_rank(6, 1)), (low_rank(6, 1), affine)):
        with pytest.raises(ValueError, match="do not make one map: attach them as a stack of patches"):
            first.then(second)  # type: ignore[attr-defined]


@pytest.mark.parametrize("found", [AffineMap(values(6), values(6)), low_rank(6, 2)])
def test_a_layer_moves_by_its_strength_on_the_chosen_tokens(found: Any) -> None:
    z = values(2, 3, 6)
    tokens = torch.tensor([[True, False, True], [False, False, True]])
    strength = torch.tensor([0.5, 2.0]).view(-1, 1, 1)
    moved = found.layer()(z, strength, tokens).detach()
    expected = torch.where(tokens[..., None], z + strength * (found(z) - z), z)
    torch.testing.assert_close(moved, expected)
    assert found.layer()(z, torch.zeros(2, 1, 1)).equal(z)
    assert found.layer()(z.bfloat16()).dtype == torch.bfloat16


def logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("strength", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("bias", [False, True])
def test_a_map_of_low_rank_in_the_weights_is_the_patch(tiny_dir: Path, strength: float, bias: bool) -> None:
    """Every layer that writes into the residual stream: with the hooks, and folded."""
    steered, folded = (models.load_model(tiny_dir, seed=0) for _ in range(2))
    names = [place.name for place in taps.select(steered, Selection(modules=WRITERS))]
    width = steered.config.hidden_size
    maps = {name: low_rank(width, 2, seed)._replace(bias_R=values(2) * bias) for seed, name in enumerate(names)}
    patch = ActivationPatch.from_maps(maps, Selection(modules=WRITERS))
    ids = torch.arange(1, 9)[None]
    plain = logits(folded, ids)
    patch.fold(folded, strength)
    patches.attach(steered, [patch])
    with torch.no_grad():
        by_hooks = steered(input_ids=ids, strengths=torch.tensor([strength])).logits
    torch.testing.assert_close(logits(folded, ids), by_hooks, rtol=1e-4, atol=1e-4)
    assert strength == 0 or not torch.allclose(logits(folded, ids), plain, atol=1e-3)


def test_weights_that_are_stored_transposed_and_embeddings_take_a_map(tiny_dir: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, n_positions=16, tie_word_embeddings=False)
    model = GPT2LMHeadModel(config).eval()
    for name, bias in (("transformer.h.0.mlp.c_proj", True), ("transformer.wte", True)):
        module, found = model.get_submodule(name), low_rank(16, 2)
        given = torch.arange(5) if isinstance(module, nn.Embedding) else values(5, 64)
        with torch.no_grad():
            expected = found(module(given))
            models.fold_low_rank(model, name, found.up_DR.double(), found.down_RD.double(), found.bias_R.double() * bias)
            torch.testing.assert_close(module(given), expected, rtol=1e-4, atol=1e-4)
    tied = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20, n_positions=16))
    for name, message in (
        ("transformer.wte", "shares its weights with another layer"),
        ("transformer.h.0.ln_1", "is a LayerNorm: only a map of the output of a linear layer"),
        ("transformer.h.0:0", "is an element of a tuple"),
    ):
        with pytest.raises(CannotFold, match=message):
            ActivationPatch.from_maps({name: low_rank(16, 1)}, Selection(modules=".*")).fold(tied, 1.0)  # type: ignore[arg-type]


def test_a_patch_holds_maps_of_several_kinds_on_disk(tmp_path: Path, tiny_model: PreTrainedModel) -> None:
    maps = {
        "a": AffineMap(values(6), values(6)),
        "b": low_rank(4, 3),
        "c": AffineMap(values(2), values(2), *values(2, 2).sort(0)[0]),
    }
    patch = ActivationPatch.from_maps(maps, Selection(modules="a|b|c"))
    patches.save(patch, tmp_path, "model")
    loaded = patches.load(tmp_path)
    assert loaded.spec() == patch.spec() and loaded.kinds == {"b": {"kind": "low_rank", "rank": 3}}
    for layer, (name, found) in zip(loaded.layers(), maps.items(), strict=True):
        z = values(5, found.width)
        torch.testing.assert_close(layer(z).detach(), found(z), msg=name)
    undone = ActivationPatch.from_maps({name: found for name, found in maps.items() if name != "c"}, Selection()).inverse()
    torch.testing.assert_close(undone.layers()[1](maps["b"](values(5, 4))).detach(), values(5, 4), atol=1e-4, rtol=1e-4)


def test_a_patch_of_earlier_versions_has_no_kinds(tmp_path: Path) -> None:
    patch = ActivationPatch.from_maps({"a": AffineMap(values(6), values(6))}, Selection(modules="a"))
    patches.save(patch, tmp_path, "model")
    spec = json.loads((tmp_path / "patch.json").read_text())
    assert set(spec["spec"]) == {"sizes", "selection", "bounded", "strength_range"}
    assert torch.equal(patches.load(tmp_path).layers()[0].scale, patch.layers()[0].scale)


@pytest.mark.parametrize(
    "kinds",
    [
        {"a": {"kind": "evil"}},
        {"b": {"kind": "low_rank", "rank": 1}},
        {"a": {"kind": "low_rank"}},
        {"a": {"kind": "low_rank", "rank": -1}},
        {"a": {"kind": "low_rank", "rank": 10**12}},
        {"a": {"kind": "low_rank", "rank": 1, "more": 1}},
        {"a": {"rank": 1}},
        {"a": 3},
    ],
)
def test_a_patch_of_maps_that_there_are_not_is_refused(tmp_path: Path, kinds: Any) -> None:
    patches.save(ActivationPatch.from_maps({"a": low_rank(6, 1)}, Selection(modules="a")), tmp_path, "model")
    spec = json.loads((tmp_path / "patch.json").read_text())
    spec["spec"]["kinds"] = kinds
    (tmp_path / "patch.json").write_text(json.dumps(spec))
    with pytest.raises(ValueError, match="damaged"):
        patches.load(tmp_path)


# Methods that fit maps of other kinds


def samples(mean: torch.Tensor, num: int, seed: int) -> torch.Tensor:
    return mean + 0.3 * torch.randn((num, len(mean)), generator=torch.Generator().manual_seed(seed))


def test_ablation_removes_the_difference_of_the_means_everywhere() -> None:
    mean = torch.tensor([0.0, 3.0, 4.0, 0.0])
    source = {name: samples(mean, 40, seed) for seed, name in enumerate("abc")}
    target = {name: samples(torch.zeros(4), 30, seed + 9) for seed, name in enumerate("abc")}
    maps = fitted({"name": "ablation"}).fit(ablation.Config(at=1), source, target)
    naive = source["b"].mean(0) - target["b"].mean(0)
    for found in maps.values():
        torch.testing.assert_close(found(naive[None])[0], torch.zeros(4), atol=1e-5, rtol=0)
        torch.testing.assert_close(found(torch.eye(4)), torch.eye(4) - torch.outer(naive, naive) / (naive @ naive))
    with pytest.raises(ValueError, match="numbered from 0"):
        fitted({"name": "ablation"}).fit(ablation.Config(at=3), source, target)
    with pytest.raises(ValueError, match="extract places of one width"):
        fitted({"name": "ablation"}).fit(ablation.Config(), {**source, "d": values(8, 7)}, {**target, "d": values(8, 7)})
    with pytest.raises(ValueError, match="the same mean"):
        ablation.direction(source["a"], source["a"])


def test_an_ablated_model_computes_nothing_along_the_direction_and_folds(tiny_dir: Path) -> None:
    """Out of all that is written into the residual stream and of the embedding: the last hidden state has none of it."""
    model = models.load_model(tiny_dir, seed=0)
    r = values(model.config.hidden_size)
    modules = f"{WRITERS}|model[.]embed_tokens"
    names = [place.name for place in taps.select(model, Selection(modules=modules))]
    patch = ActivationPatch.from_maps(dict.fromkeys(names, LowRankMap.without(r)), Selection(modules=modules))
    seen: list[torch.Tensor] = []
    model.model.norm.register_forward_pre_hook(lambda _m, args: seen.append(args[0]))
    ids = torch.arange(1, 9)[None]
    plain = logits(model, ids)
    attached = patches.attach(model, [patch])
    steered = logits(model, ids)
    attached.detach()
    if model.config.tie_word_embeddings:
        with pytest.raises(CannotFold, match="shares its weights"):
            patch.fold(model, 1.0)
    else:
        patch.fold(model, 1.0)
        torch.testing.assert_close(logits(model, ids), steered, rtol=1e-4, atol=1e-4)
    along = [float((h @ (r / r.norm())).abs().max()) for h in seen]
    assert along[1] < 1e-4 < along[0] and not torch.allclose(plain, steered, atol=1e-3)


def test_repe_finds_the_axis_along_which_pairs_differ() -> None:
    """Along one axis the target lies far off, with a spread of its own; the others are noise."""
    axis = torch.tensor([0.6, 0.0, -0.8])
    drawn = torch.randn(200, generator=torch.Generator().manual_seed(3))
    source = samples(torch.zeros(3), 200, 1)
    target = samples(torch.zeros(3), 200, 2) + (4 + drawn)[:, None] * axis
    found = repe.reading_vector(source, target)
    assert float(found @ axis) > 0.99 and float(found.norm()) == pytest.approx(1, abs=1e-5)
    assert float(repe.reading_vector(target, source) @ axis) < -0.99
    maps = fitted({"name": "repe"}).fit(repe.Config(coefficient=2.5), {"a": source}, {"a": target})
    torch.testing.assert_close(maps["a"](torch.zeros(3)), 2.5 * found)
    uneven = repe.reading_vector(source[:150], target)
    assert float(uneven @ axis) > 0.99


def test_iti_shifts_the_heads_that_tell_the_texts_apart_along_their_means() -> None:
    """Two places with three heads of two numbers; in one head of the second place the texts differ."""
    source, target = ({name: 0.5 * values_of(seed + shift) for seed, name in enumerate("ab")} for shift in (0, 50))
    target["b"][:, 2:4] += torch.tensor([3.0, -4.0])
    config = iti_heads.Config(heads=3, top_k=1, alpha=2.0)
    maps = fitted({"name": "iti_heads"}).fit(config, source, target)
    assert list(maps) == ["b"] and maps["b"].shift_D.nonzero().flatten().tolist() == [2, 3]  # type: ignore[attr-defined]
    theta = target["b"][:, 2:4].mean(0) - source["b"][:, 2:4].mean(0)
    theta = theta / theta.norm()
    sigma = (torch.cat([source["b"], target["b"]])[:, 2:4].double() @ theta.double()).std(correction=0)
    torch.testing.assert_close(maps["b"].shift_D[2:4], (2 * sigma * theta).float(), rtol=1e-4, atol=1e-5)  # type: ignore[attr-defined]
    along = fitted({"name": "iti_heads"}).fit(config.model_copy(update={"direction": "probe"}), source, target)
    probe, _ = iti.probe(source["b"][:, 2:4], target["b"][:, 2:4])
    shift = along["b"].shift_D[2:4].double()  # type: ignore[attr-defined]
    torch.testing.assert_close(shift / shift.norm(), probe, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(along["b"].shift_D, maps["b"].shift_D, rtol=1e-2)  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"method\.heads 4: a has 6 numbers"):
        fitted({"name": "iti_heads"}).fit(iti_heads.Config(heads=4), source, target)


def values_of(seed: int) -> torch.Tensor:
    return torch.randn((40, 6), generator=torch.Generator().manual_seed(seed))


def test_reft_trains_its_maps_alone_and_begins_at_the_model(tiny_dir: Path, encoder: Encoder) -> None:
    """R (2 D + 1) numbers a place."""
    model = models.load_model(tiny_dir, seed=0)
    rows = encode_data(encoder, tiny.rows("instructions/train", 8), "instruction", 64).rows
    batch = collate(rows, encoder.pad_id, loss_on="response")
    with torch.no_grad():
        plain = model(**batch.model_inputs).logits
    method = trained({"name": "reft"})
    module = method.module(model, method.Config.model_validate({"rank": 3}), Inputs())  # type: ignore[call-arg]
    with torch.no_grad():
        assert torch.equal(model(**batch.patched_inputs).logits, plain)
    sizes = [parameter.numel() for parameter in trained_parameters(module).values()]
    assert sum(sizes) == 3 * (2 * model.config.hidden_size + 1) * model.config.num_hidden_layers
    optimizer = torch.optim.Adam(trained_parameters(module).values(), lr=0.01)
    losses = []
    for _ in range(20):
        loss = module(batch).total
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.9 * losses[0]


def test_the_inverse_is_a_key_that_changes_no_other_artifact() -> None:
    """Jobs that do not ask for it keep their keys."""
    for name in ("mean_act", "lineas", "caa"):
        kind = METHODS[name].Config
        assert (
            "inverse" not in kind().model_dump(mode="json") and kind.model_validate({"inverse": True}).model_dump()["inverse"]
        )


def test_a_trained_map_is_left_inverted_where_that_is_asked_for(tiny_dir: Path, extracted: Any) -> None:
    texts = [row["text"] for row in tiny.rows("topics/train", 8)]
    left = []
    for inverse in (False, True):
        model = models.load_model(tiny_dir, seed=0)
        config = lineas.Config(inverse=inverse)
        trainee = lineas.Lineas(model, config, Inputs(activations={"target": extracted(model, texts)}))
        state = {name: value + 0.5 for name, value in trainee.patch.state_dict().items()}
        left.append(trainee.finished(state))
    z = values(5, left[0].layers()[0].fitted().width)
    torch.testing.assert_close(left[1].layers()[0](left[0].layers()[0](z)).detach(), z, atol=1e-5, rtol=1e-5)
