"""SN-Tune: importances against the removal of a neuron, counts over queries, and what trains."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from here import Here
from test_warp import family
from transformers import PreTrainedModel

from steerlab import models, patches
from steerlab.data.worlds import tiny
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Batch, collate
from steerlab.methods import sn_tune
from steerlab.methods.contract import Inputs
from steerlab.methods.math import neurons
from steerlab.methods.preparations import Prepare
from steerlab.methods.sn_tune import Config, SnTune
from steerlab.steered.language import SteeredModel
from steerlab.storage.tensors import Parts, write

SAFETY = tiny.rows("refusals/train", 5)


def output_of(model: Any, path: str, ids: torch.Tensor) -> torch.Tensor:
    """The output of a module for one query."""
    seen: list[Any] = []
    handle = model.get_submodule(path).register_forward_hook(lambda module, args, result: seen.append(result))
    with torch.no_grad():
        model(ids)
    handle.remove()
    return (seen[0][0] if isinstance(seen[0], tuple) else seen[0])[0]


@pytest.mark.parametrize(
    ("kind", "block", "neuron"), [("ffn_up", "mlp", 3), ("ffn_down", "mlp", 7), ("attn_v", "self_attn", 5)]
)
def test_importance_is_what_the_block_loses_without_the_neuron(kind: str, block: str, neuron: int, encoder: Encoder) -> None:
    """Eq. 1 by removal: the row or column is set to zero, and the block's output compared. Two heads share each value."""
    model: Any = family("llama")
    query = encoder.encode(encoder.conversation(str(SAFETY[0]["instruction"]), ""))
    batch = collate([query], encoder.pad_id)
    counting = sn_tune.count(SteeredModel(model, encoder), {"active": 1.0, "target_layers": ["all"]}, {})
    counting.add(batch, 0)
    with torch.no_grad():
        found = counting._importance(kind, 0, batch.attention_mask[0].bool())[0]  # type: ignore[arg-type]
    counting.close()
    place = neurons.blocks(model, ("all",))[0][kind]
    ids = torch.tensor([query.input_ids])
    before = output_of(model, f"model.layers.0.{block}", ids)
    weight = model.get_submodule(place.module).weight
    with torch.no_grad():
        (weight[:, neuron] if kind == "ffn_down" else weight[neuron]).zero_()
    lost = (output_of(model, f"model.layers.0.{block}", ids) - before).norm()
    assert float(lost) > 1e-6
    assert float(found[neuron]) == pytest.approx(float(lost), rel=1e-3)


def test_scores_lose_one_number_of_queries_and_keys() -> None:
    """Eq. 12, entry by entry."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randn(4, 2, 3, generator=generator) for _ in range(2))
    found = sn_tune.of_scores(queries, keys)
    for head in range(2):
        for k in range(3):
            total = 0.0
            for t in range(4):
                full = [sum(float(queries[t, head, j] * keys[s, head, j]) for j in range(3)) for s in range(t + 1)]
                less = [score - float(queries[t, head, k] * keys[s, head, k]) for s, score in enumerate(full)]
                pairs = [(torch.tensor(one) / math.sqrt(3)).softmax(0) for one in (full, less)]
                total += float((pairs[0] - pairs[1]).square().sum())
            assert float(found[head, k]) == pytest.approx(math.sqrt(total), rel=1e-4)


def test_counts_are_over_queries_whatever_the_batches(tiny_model: PreTrainedModel, prepared: Any) -> None:
    parts = [
        Parts.open(prepared(sn_tune.METHOD, Config(active=0.3, rows_per_batch=size), tiny_model, SAFETY)[sn_tune.SAFETY])
        for size in (1, 2, 5)
    ]
    for layer in neurons.blocks(tiny_model, ("all",)):
        for kind in neurons.TYPES:
            counts = [one.tensor(layer[kind].module) for one in parts]
            assert torch.equal(counts[0], counts[1]) and torch.equal(counts[0], counts[2])
    for kind in neurons.TYPES:
        of_kind = torch.cat([parts[0].tensor(layer[kind].module) for layer in neurons.blocks(tiny_model, ("all",))])
        # For every query exactly the share is active, over all layers together.
        assert int(of_kind.sum()) == 5 * round(0.3 * len(of_kind)) and 0 < int((of_kind == 5).sum()) < len(of_kind)


def train(module: Any, encoder: Encoder) -> None:
    rows = [encoder.encode(encoder.from_row(row, "instruction")) for row in tiny.rows("arithmetic/train", 8)]
    batch: Batch = collate(rows, encoder.pad_id, loss_on="response")
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1)
    for step in range(3):
        module.on_step(step, 3.0)
        optimizer.zero_grad()
        module.before_pass(True)
        module(batch).total.backward()
        optimizer.step()
        module.after_step(1e-2)


@pytest.mark.parametrize("trained", ["safety", "others"])
def test_only_the_chosen_neurons_move(
    trained: str, tiny_model: PreTrainedModel, tiny_dir: Path, encoder: Encoder, prepared: Any
) -> None:
    wanted = Config.model_validate({"active": 0.3, "train": trained})
    before = prepared(sn_tune.METHOD, wanted, tiny_model, SAFETY)
    counts, layers = Parts.open(before[sn_tune.SAFETY]), neurons.blocks(tiny_model, ("all",))
    module = SnTune(tiny_model, wanted, Inputs(prepared=before))
    train(module, encoder)
    patch = module.finished(module.patch.state_dict())
    changes = dict(patch.differences())
    for layer in layers:
        for kind in neurons.TYPES:
            safe = counts.tensor(layer[kind].module) == len(SAFETY)
            moved = changes[f"{layer[kind].module}.weight"].ne(0).any(0 if kind == "ffn_down" else 1)
            assert torch.equal(moved, safe if trained == "safety" else ~safe)
    with torch.no_grad():
        ids = torch.tensor([[1, 2, 3, 4]])
        expected = module.model(ids).logits
        base = models.load_model(tiny_dir, seed=0)
        patches.attach(base, [patch])
        torch.testing.assert_close(base(ids).logits, expected, rtol=1e-5, atol=1e-5)


def test_robust_tuning_leaves_foundation_neurons_out(tiny_model: PreTrainedModel, encoder: Encoder, tmp_path: Path) -> None:
    """RSN-Tune: N_safe without what general texts need in the same way."""

    class Both(Here):
        def has(self, role: str) -> bool:
            return True

        def make(self, preparation: Any) -> None:
            self._rows = tiny.rows("instructions/train", 4) if preparation.role == "utility" else SAFETY
            super().make(preparation)

    wanted, steered = Config(active=0.5), SteeredModel(tiny_model, encoder)
    here = Both(tmp_path, steered)
    assert sn_tune.prepares(wanted, tiny_model, here) == (sn_tune.SAFETY, sn_tune.FOUNDATION)
    assert sn_tune.prepares(wanted, tiny_model, Prepare({"safety"})) == (sn_tune.SAFETY,)
    steered.detach()
    counts = [Parts.open(here.folders[name]) for name in (sn_tune.SAFETY, sn_tune.FOUNDATION)]
    module = SnTune(tiny_model, wanted, Inputs(prepared=here.folders))
    for name, layer in zip(module.patch.names, module.patch.rotated(), strict=True):
        safe, base = counts[0].tensor(name) == 5, counts[1].tensor(name) == 4
        trains = layer.free_MN.any(0) if name.endswith("down_proj") else layer.free_MN.any(1)
        assert torch.equal(trains, safe & ~base)


def test_too_few_active_neurons_and_fused_layers_are_refused(tiny_model: PreTrainedModel, tmp_path: Path) -> None:
    layers, wanted = neurons.blocks(tiny_model, ("all",)), Config(active=0.01)
    # Each neuron was active for two of three queries.
    counts: dict[str, torch.Tensor] = {}
    for kind, axis in {**dict.fromkeys(neurons.TYPES, 0), "ffn_down": 1}.items():
        for layer in layers:
            counts[layer[kind].module] = torch.full((layer[kind].shape[axis],), 2.0)
    write(tmp_path / "part.safetensors", counts)
    Parts.write_index(tmp_path, {"all": {"rows": 3}}, {"all": "part.safetensors"})
    with pytest.raises(
        ValueError, match=r"method\.active 0\.01: no neuron is left to train, with agreement 1\.0 over 3 queries"
    ):
        SnTune(tiny_model, wanted, Inputs(prepared={sn_tune.SAFETY: tmp_path}))
    with pytest.raises(ValueError, match=r"attn_q: GPT2LMHeadModel computes it in one layer with others"):
        sn_tune.prepares(wanted, family("gpt2"), Prepare())


@pytest.mark.parametrize(
    ("agreement", "queries", "least"),
    [(1.0, 5, 5), (0.5, 5, 3), (0.5, 4, 2), (0.7, 10, 7), (0.1, 3, 1), (0.01, 5, 1), (0.34, 3, 2), (0.6, 5, 3), (1 / 3, 3, 1)],
)
def test_a_neuron_counts_if_at_least_the_share_of_the_queries_agrees(
    agreement: float, queries: int, least: int, tmp_path: Path
) -> None:
    write(tmp_path / "part.safetensors", {"a": torch.arange(queries + 1.0)})
    Parts.write_index(tmp_path, {"all": {"rows": queries}}, {"all": "part.safetensors"})
    chosen = sn_tune.agreed(Parts.open(tmp_path), "a", agreement)
    assert chosen.tolist() == [number >= least for number in range(queries + 1)]


def test_neurons_that_never_fire_do_not_all_count(tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    """Their importances tie at 0: the share that was asked for is taken, and not all of them."""
    with torch.no_grad():
        for layer in neurons.blocks(tiny_model, ("all",)):
            tiny_model.get_parameter(f"{layer['ffn_up'].module}.weight")[5:] = 0.0
    counting = sn_tune.count(SteeredModel(tiny_model, encoder), {"active": 0.5, "target_layers": ["all"]}, {})
    counting.add(collate([encoder.encode(encoder.conversation(str(SAFETY[0]["instruction"]), ""))], encoder.pad_id), 0)
    counting.close()
    counts = dict(counting.tensors())
    for kind in neurons.TYPES:
        of_kind = torch.cat([counts[layer[kind].module] for layer in neurons.blocks(tiny_model, ("all",))])
        assert int(of_kind.sum()) == round(0.5 * len(of_kind))
    for layer in neurons.blocks(tiny_model, ("all",)):
        assert counts[layer["ffn_up"].module][:5].all(), "those that fire come first"
