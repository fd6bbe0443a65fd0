"""Where architectures keep their linear layers: the spans of fused ones are checked by what they do, not by their names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

from steerlab import models

FUSED = ["phi3", "falcon/40b", "bloom", "gpt_bigcode/heads"]
SLOW = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("gpt2", "gpt_neox", "falcon", "falcon/rw", "gpt_bigcode", "mpt", "persimmon")
]
APART = [
    "opt",
    *(
        pytest.param(name, marks=pytest.mark.slow)
        for name in (
            "llama",
            "phi",
            "gptj",
            "gpt_neo",
            "starcoder2",
            "cohere",
            "stablelm",
            "glm",
            "nemotron",
            "biogpt",
            "olmo2",
        )
    ),
]
ATTENTION = ["attn_q", "attn_k", "attn_v", "attn_o"]
IDS = torch.tensor([[3, 9, 4, 11, 7]])


def made(name: str) -> Any:
    return zoo.model(zoo.config(name, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2))


def rows_of(model: Any, kind: str) -> tuple[Any, Tensor]:
    """The layer that holds a type in the first decoder layer, and which of its outputs are meant."""
    (place,) = models.weight_places(model, [kind], [0])
    spans = place.outputs or ((0, place.shape[0]),)
    return model.get_submodule(place.module), torch.cat([torch.arange(*span) for span in spans])


def change(model: Any, kind: str, factor: float | None) -> None:
    """Multiply the outputs of a type, or draw them anew."""
    module, rows = rows_of(model, kind)
    weight = models.linear_weight(module)
    weight.data[rows] = torch.randn_like(weight[rows]) if factor is None else factor * weight[rows]
    if module.bias is not None:
        module.bias.data[rows] *= 0.0 if factor is None else factor


@torch.no_grad()
def attended(model: Any, changes: Sequence[tuple[str, float | None]]) -> Tensor:
    """What the output projection of attention is given after some changes, which are taken back."""
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(5)
    for kind, factor in changes:
        change(model, kind, factor)
    found: list[Tensor] = []
    module, _ = rows_of(model, "attn_o")
    handle = module.register_forward_pre_hook(lambda _m, args: found.append(args[0].clone()))
    model(input_ids=IDS)
    handle.remove()
    model.load_state_dict(kept)
    return found[0]


@pytest.mark.parametrize("name", [*FUSED, *SLOW])
def test_the_spans_of_queries_keys_and_values_are_theirs(name: str) -> None:
    """Without queries keys do not matter, without keys queries; without values there is nothing; all outputs are one type's."""
    model = made(name)
    rows = torch.cat([rows_of(model, kind)[1] for kind in ATTENTION[:3]])
    assert sorted(rows.tolist()) == list(range(models.linear_shape(rows_of(model, "attn_q")[0])[0]))
    assert attended(model, [("attn_v", 0.0)]).abs().max() == 0
    for one, other in (("attn_q", "attn_k"), ("attn_k", "attn_q")):
        without = attended(model, [(one, 0.0)])
        torch.testing.assert_close(attended(model, [(one, 0.0), (other, None)]), without, atol=1e-5, rtol=0)
        assert (attended(model, [(one, 0.0), ("attn_v", None)]) - without).abs().max() > 0.01
        assert (attended(model, [(other, None)]) - attended(model, [])).abs().max() > 0.01


@torch.no_grad()
@pytest.mark.parametrize("name", ["phi3", "glm"])
def test_the_half_that_is_gated_is_linear(name: str) -> None:
    model = made(name)
    down, _ = rows_of(model, "ffn_down")
    found: list[Tensor] = []
    down.register_forward_pre_hook(lambda _m, args: found.append(args[0].clone()))
    model(input_ids=IDS)
    change(model, "ffn_up", 3.0)
    model(input_ids=IDS)
    torch.testing.assert_close(found[1], 3 * found[0], atol=1e-4, rtol=1e-4)
    change(model, "ffn_gate", 3.0)
    model(input_ids=IDS)
    assert (found[2] - 3 * found[1]).abs().max() > 0.01


@pytest.mark.parametrize("name", [*FUSED, *SLOW, *APART])
def test_every_type_has_its_place_in_every_layer(name: str) -> None:
    model = made(name)
    types = [*ATTENTION, "ffn_up", "ffn_down"]
    places = models.weight_places(model, types, [0, 1])
    heads, hidden = model.config.num_attention_heads, model.config.hidden_size
    for kind, inputs in (("attn_q", hidden), ("attn_o", None), ("ffn_up", hidden), ("ffn_down", None)):
        one = [place for place in places if place in models.weight_places(model, [kind], [0, 1])]
        assert inputs is None or all(place.shape[1] == inputs for place in one)
    assert {place.module.split(".")[models.layer_names(model)[0].count(".")] for place in places} == {"0", "1"} and heads == 4


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_experts_are_refused_with_the_reason_and_attention_is_not(name: str) -> None:
    model = made(name)
    assert len(models.weight_places(model, ATTENTION, [0, 1])) == 8
    with pytest.raises(ValueError, match=r"ffn_up: .* Its experts are in tensors of three axes such as model\.layers\.0\.mlp"):
        models.weight_places(model, ["ffn_up"], [0])


def test_layers_of_a_hybrid_model_that_have_no_attention_have_no_place() -> None:
    model = made("jamba")
    assert [place.module for place in models.weight_places(model, ["attn_q"], [0, 1])] == ["model.layers.1.self_attn.q_proj"]
    with pytest.raises(ValueError, match="attn_q: JambaForCausalLM has no such linear layers"):
        models.weight_places(model, ["attn_q"], [0])
