"""Modules that give a vector for each attention head, or all tokens in one axis, are read and steered along the last axis."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from torch import Tensor

from steerlab import models, patches
from steerlab.inputs.tokens import DATA, INSTRUCTION, Encoded, collate
from steerlab.job import Selection
from steerlab.patches import ActivationPatch, taps
from steerlab.patches.maps import AffineMap


def batch(lengths: tuple[int, ...]) -> Any:
    rows = [
        Encoded(list(range(5, 5 + n)), [INSTRUCTION] * (n // 2) + [DATA] * (n - n // 2), [False] * n, [0] * n) for n in lengths
    ]
    return collate(rows, 0, side="left")


@pytest.fixture(params=["qwen3", "hunyuan_v1_dense", "olmo2", "opt"])
def case(request: pytest.FixtureRequest) -> tuple[Any, str, str]:
    """A model, a module with heads on either side of the tokens, flat heads, or tokens in one axis."""
    name = {"qwen3": "q_norm", "hunyuan_v1_dense": "query_layernorm", "olmo2": "q_norm", "opt": "fc1"}[request.param]
    model = zoo.model(zoo.config(request.param, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2))
    path = next(name_ for name_, _ in model.named_modules() if name_.endswith(name))
    return model, path, request.param


def seen(model: Any, path: str, inputs: dict[str, Any]) -> Tensor:
    found: list[Tensor] = []
    handle = model.get_submodule(path).register_forward_hook(lambda _m, _i, out: found.append(out.clone()))
    model(**inputs)
    handle.remove()
    return found[0]


def as_tokens(value: Tensor, name: str, shape: tuple[int, int]) -> Tensor:
    """A value as (B, T, H, D), by what is known of each architecture."""
    if name == "qwen3":
        return value
    if name == "hunyuan_v1_dense":
        return value.transpose(1, 2)
    return value.reshape(*shape, 1, -1)


# As many tokens as heads as well, where the axes are told apart by their order in memory.
@torch.no_grad()
@pytest.mark.parametrize("lengths", [(4, 3), (6, 4), (1, 1)])
def test_heads_and_flat_tokens_are_read_and_steered(case: tuple[Any, str, str], lengths: tuple[int, ...]) -> None:
    model, path, name = case
    made = batch(lengths)
    shape = (len(lengths), max(lengths))
    plain_BTHD = as_tokens(seen(model, path, made.model_inputs), name, shape)
    reader = taps.Reader(model, [taps.Tap(path)])
    read = reader(**made.model_inputs, use_cache=False)[path]
    reader.close()
    torch.testing.assert_close(read, plain_BTHD.mean(2), atol=1e-5, rtol=1e-5)

    width = plain_BTHD.shape[-1]
    fitted = AffineMap(torch.linspace(0.5, 2, width), torch.linspace(-1, 1, width))
    selection = Selection(modules=path, roles=("data",))
    attached = patches.attach(model, [ActivationPatch.from_maps({path: fitted}, selection)])
    strength_B = torch.linspace(0.3, 1, len(lengths))
    changed = as_tokens(seen(model, path, {**made.patched_inputs, "strengths": strength_B}), name, shape)
    attached.detach()
    mapped = plain_BTHD + strength_B[:, None, None, None] * (fitted(plain_BTHD) - plain_BTHD)
    steered_BT = made.roles == DATA
    torch.testing.assert_close(changed, torch.where(steered_BT[:, :, None, None], mapped, plain_BTHD), atol=1e-5, rtol=1e-5)
    assert steered_BT.any()


def test_all_norms_of_a_model_with_heads_can_be_chosen(tiny_dir: Path, tmp_path: Path) -> None:
    zoo.write("qwen3", tmp_path, tiny_dir)
    model = models.load_model(tmp_path)
    chosen = taps.select(model, Selection(modules=".*norm"))
    reader = taps.Reader(model, chosen)
    widths = {name: value.shape[-1] for name, value in reader(**models.small_inputs(model)).items()}
    reader.close()
    assert widths["model.layers.0.self_attn.q_norm"] == 8 and widths["model.layers.0.input_layernorm"] == 32
    maps = {name: AffineMap(torch.full((width,), 1.5), torch.ones(width)) for name, width in widths.items()}
    patches.attach(model, [ActivationPatch.from_maps(maps, Selection(modules=".*norm"))])
    assert model(**models.small_inputs(model)).logits.isfinite().all()
