"""The single pass equals the naive procedure, one forward pass a place, whatever the batches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from steerlab import models, patches
from steerlab.data.worlds import tiny
from steerlab.inputs.drawings import Drawing, Prompter
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Batch, collate
from steerlab.job import Selection
from steerlab.methods.math.sequential_fit import Reading, fit_in_order
from steerlab.methods.transport import linear_map
from steerlab.patches import taps, token_masks
from steerlab.patches.maps import AffineMap

SELECTION = Selection(modules=r"model\.layers\.\d+\.(post_attention_layernorm|mlp)")


@pytest.fixture
def batch(encoder: Encoder) -> Batch:
    rows = [encoder.encode(encoder.from_row(row, "text")) for row in tiny.rows("topics/train", 12)]
    return collate(rows, encoder.pad_id)


def part(batch: Batch, rows: slice) -> Batch:
    return Batch(*(getattr(batch, field)[rows] for field in batch.__dataclass_fields__))


def reading(batch: Batch, steer: Selection = SELECTION, target: torch.Tensor | None = None) -> Reading:
    return Reading(batch.model_inputs, token_masks.selected(batch, SELECTION), token_masks.selected(batch, steer), target)


def target_of(name: str) -> torch.Tensor:
    return torch.randn(9, 128, generator=torch.Generator().manual_seed(len(name) * 31 + sum(map(ord, name))))


def fit(name: str, source_ND: torch.Tensor, target_MD: torch.Tensor | None = None) -> AffineMap:
    """With target texts in the pass their activations are the target, else a sample that is fixed beforehand."""
    return linear_map(source_ND, target_of(name) if target_MD is None or not len(target_MD) else target_MD)


# The order in which the model runs them, which is not that of `named_modules`.
IN_ORDER = [taps.Tap(f"model.layers.{i}.{name}") for i in range(4) for name in ("post_attention_layernorm", "mlp")]


def naive(
    model: PreTrainedModel, batch: Batch, steer: Selection = SELECTION, target: torch.Tensor | None = None
) -> dict[str, AffineMap]:
    """For each place a whole forward pass with the maps of the places before it, on all texts: O(L^2)."""
    maps: dict[str, AffineMap] = {}
    for place in IN_ORDER:
        attached = patches.attach(model, [patches.ActivationPatch.from_maps(maps, steer)] if maps else [])
        reader = taps.Reader(model, [place], steer.side, stop=False)
        with torch.no_grad():
            z_BTD = reader(**batch.patched_inputs)[place.name]
        reader.close()
        attached.detach()
        pooled_BD = token_masks.pool(z_BTD, token_masks.selected(batch, SELECTION), "mean")
        is_target_B = torch.zeros(len(pooled_BD), dtype=torch.bool) if target is None else target
        maps[place.name] = fit(place.name, pooled_BD[~is_target_B], pooled_BD[is_target_B])
    return maps


def assert_equal(one: dict[str, AffineMap], other: dict[str, AffineMap]) -> None:
    assert list(one) == list(other)
    for name, fitted in one.items():
        torch.testing.assert_close(fitted.scale_D, other[name].scale_D, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fitted.shift_D, other[name].shift_D, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", [[12], [5, 7], [4, 4, 4]], ids=str)
def test_one_pass_equals_a_pass_for_each_place(tiny_model: PreTrainedModel, batch: Batch, sizes: list[int]) -> None:
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    parts = [part(batch, slice(start, start + size)) for start, size in zip(starts, sizes, strict=True)]
    places = taps.select(tiny_model, SELECTION)
    one_pass = fit_in_order(tiny_model, places, SELECTION, [reading(p) for p in parts], "mean", fit)
    assert_equal(one_pass, naive(tiny_model, batch))


@pytest.mark.parametrize("sizes", [[12], [5, 7]], ids=str)
def test_the_target_is_read_with_the_earlier_maps_too(tiny_model: PreTrainedModel, batch: Batch, sizes: list[int]) -> None:
    """As in the authors' code, whose hooks act on the texts of both sets; the batches may mix them."""
    is_target = torch.tensor([True, False, False, True, False, True, True, False, True, False, False, True])
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    spans = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    readings = [reading(part(batch, rows), target=is_target[rows]) for rows in spans]
    one_pass = fit_in_order(tiny_model, taps.select(tiny_model, SELECTION), SELECTION, readings, "mean", fit)
    assert_equal(one_pass, naive(tiny_model, batch, target=is_target))
    # Read once from the model without maps, the target of all places but the first is another one.
    plain = {tap.name: _read(tiny_model, batch, tap.name)[is_target] for tap in IN_ORDER}
    sources = [reading(part(batch, slice(i, i + 1))) for i in range(12) if not is_target[i]]
    fit_plain = lambda name, source_ND, _: linear_map(source_ND, plain[name])  # noqa: E731
    of_plain = fit_in_order(tiny_model, taps.select(tiny_model, SELECTION), SELECTION, sources, "mean", fit_plain)
    first, *others = one_pass
    torch.testing.assert_close(one_pass[first].shift_D, of_plain[first].shift_D, rtol=1e-4, atol=1e-4)
    assert all(not torch.allclose(one_pass[name].shift_D, of_plain[name].shift_D, rtol=1e-2) for name in others)


def test_only_steered_tokens_are_mapped(tiny_model: PreTrainedModel, batch: Batch) -> None:
    steer = SELECTION.model_copy(update={"positions": ((-2, None),)})
    one_pass = fit_in_order(tiny_model, taps.select(tiny_model, SELECTION), SELECTION, [reading(batch, steer)], "mean", fit)
    assert_equal(one_pass, naive(tiny_model, batch, steer))
    everywhere = fit_in_order(tiny_model, taps.select(tiny_model, SELECTION), SELECTION, [reading(batch)], "mean", fit)
    last = list(one_pass)[-1]
    assert not torch.allclose(one_pass[last].scale_D, everywhere[last].scale_D, rtol=1e-3)


def test_inputs_of_modules_are_fitted_and_mapped(tiny_model: PreTrainedModel, batch: Batch) -> None:
    steer = SELECTION.model_copy(update={"side": "input"})
    one_pass = fit_in_order(tiny_model, taps.select(tiny_model, steer), steer, [reading(batch)], "mean", fit)
    assert_equal(one_pass, naive(tiny_model, batch, steer))
    of_outputs = fit_in_order(tiny_model, taps.select(tiny_model, SELECTION), SELECTION, [reading(batch)], "mean", fit)
    assert all(not torch.allclose(one_pass[name].scale_D, of_outputs[name].scale_D, rtol=1e-2) for name in one_pass)


@pytest.mark.parametrize("sizes", [[6], [4, 2]], ids=str)
def test_of_a_guided_drawing_the_half_with_the_prompt_is_fitted_and_mapped(digits_dir: Path, sizes: list[int]) -> None:
    model = models.load_model(digits_dir, seed=0, sampler={"steps": 3, "guidance": 2.0})
    norms = Selection(modules=r"unet.*resnets.*norm2")
    prompter = Prompter(model)
    drawings = iter([Drawing(("bold three", "thin one")[i % 2], i, 64) for i in range(sum(sizes))])
    parts = [prompter.collate([next(drawings) for _ in range(size)]) for size in sizes]
    readings = [Reading(part.patched_inputs, *[token_masks.selected(part, norms)] * 2) for part in parts]

    def fit_channels(name: str, source_ND: torch.Tensor, _target: torch.Tensor | None = None) -> AffineMap:
        return linear_map(source_ND, target_of(name)[:, : source_ND.shape[1]])

    one_pass = fit_in_order(model, taps.select(model, norms), norms, readings, "mean", fit_channels)

    def pooled(place: taps.Tap) -> Iterator[torch.Tensor]:
        for part in parts:
            with torch.no_grad():
                yield token_masks.pool(reader(**part.patched_inputs)[place.name], token_masks.selected(part, norms), "mean")

    maps: dict[str, AffineMap] = {}
    for name in one_pass:
        attached = patches.attach(model, [patches.ActivationPatch.from_maps(maps, norms)] if maps else [])
        reader = taps.Reader(model, [taps.tap(name)])
        maps[name] = fit_channels(name, torch.cat(list(pooled(taps.tap(name)))))
        reader.close()
        attached.detach()
    assert len(maps) == len(taps.select(model, norms)) > 3
    assert_equal(one_pass, maps)


def test_progress_counts_places(tiny_model: PreTrainedModel, batch: Batch) -> None:
    told: list[tuple[int, int]] = []
    places = taps.select(tiny_model, SELECTION)
    fit_in_order(tiny_model, places, SELECTION, [reading(batch)], "mean", fit, lambda *counts: told.append(counts))
    assert told == [(number, 8) for number in range(1, 9)]


def test_a_place_that_runs_twice_is_refused(tiny_model: PreTrainedModel, batch: Batch) -> None:
    tiny_model.model.layers[1].mlp = tiny_model.model.layers[0].mlp
    places = [taps.Tap("model.layers.0.mlp"), taps.Tap("model.layers.3.mlp")]
    with pytest.raises(ValueError, match=r"model\.layers\.0\.mlp runs more than once in a forward pass"):
        fit_in_order(tiny_model, places, SELECTION, [reading(batch)], "mean", fit)


def test_batches_that_run_modules_in_another_order_are_refused(tiny_model: PreTrainedModel, batch: Batch) -> None:
    """Otherwise a map would be fitted on the values of two places."""

    class Either(torch.nn.Module):
        def __init__(self, first: torch.nn.Module, second: torch.nn.Module) -> None:
            super().__init__()
            self.first, self.second = first, second

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            own, other = (self.first, self.second) if len(x) > 5 else (self.second, self.first)
            return other(own(x))

    layer = tiny_model.model.layers[0]
    layer.mlp = Either(torch.nn.Linear(128, 128), torch.nn.Linear(128, 128))
    places = [taps.Tap(f"model.layers.0.mlp.{name}") for name in ("first", "second")]
    parts = [reading(part(batch, slice(0, 8))), reading(part(batch, slice(8, 12)))]
    with pytest.raises(ValueError, match=r"the batches reach .*first.*second at the same time"):
        fit_in_order(tiny_model, places, SELECTION, parts, "mean", fit)


def test_a_place_without_a_map_is_left_alone(tiny_model: PreTrainedModel, batch: Batch) -> None:
    places = taps.select(tiny_model, SELECTION)
    last = IN_ORDER[-1].name
    all_but_last = fit_in_order(
        tiny_model, places, SELECTION, [reading(batch)], "mean", lambda name, z_ND, _: fit(name, z_ND) if name == last else None
    )
    assert_equal(all_but_last, {last: fit(last, _read(tiny_model, batch, last))})


def _read(model: PreTrainedModel, batch: Batch, name: str) -> torch.Tensor:
    reader = taps.Reader(model, [taps.tap(name)], stop=False)
    with torch.no_grad():
        z_BTD = reader(**batch.patched_inputs)[name]
    reader.close()
    return token_masks.pool(z_BTD, token_masks.selected(batch, SELECTION), "mean")


def test_the_model_runs_once(tiny_model: PreTrainedModel, batch: Batch) -> None:
    counts: list[int] = []
    tiny_model.model.layers[0].register_forward_hook(lambda *_: counts.append(1))
    fit_in_order(tiny_model, taps.select(tiny_model, SELECTION), SELECTION, [reading(batch)], "mean", fit)
    assert len(counts) == 1


def test_an_error_in_a_fit_ends_every_batch(tiny_model: PreTrainedModel, batch: Batch) -> None:
    def failing(name: str, source_ND: torch.Tensor, target_MD: torch.Tensor) -> AffineMap:
        raise ValueError(f"no map for {name}")

    parts = [reading(part(batch, slice(i, i + 4))) for i in (0, 4, 8)]
    with pytest.raises(ValueError, match=r"no map for model\.layers\.0\.mlp|no map for model\.layers\.0\.post"):
        fit_in_order(tiny_model, taps.select(tiny_model, SELECTION), SELECTION, parts, "mean", failing)


def test_a_place_that_does_not_run_is_named(tiny_model: PreTrainedModel, batch: Batch) -> None:
    places: list[Any] = [taps.Tap("model.layers.0.mlp"), taps.Tap("unused")]
    tiny_model.unused = torch.nn.Identity()
    with pytest.raises(ValueError, match="1 of 2 modules never run in a forward pass: unused"):
        fit_in_order(tiny_model, places, SELECTION, [reading(batch)], "mean", fit)
