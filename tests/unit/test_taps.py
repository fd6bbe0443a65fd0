"""Choosing modules and tokens, pooling, and a reader that stops."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from steerlab import patches
from steerlab.inputs.tokens import DATA, GENERATION, INSTRUCTION, PADDING, PHASES, PROMPT, RESPONSE, ROLES
from steerlab.job import Phase, Pooling, Selection
from steerlab.patches import taps, token_masks
from steerlab.patches.maps import AffineMap
from steerlab.patches.taps import Tap


def selection(**fields: Any) -> Selection:
    return Selection.model_validate(fields)


def test_whole_paths_are_matched_in_the_models_order(tiny_model: PreTrainedModel) -> None:
    found = taps.select(tiny_model, selection(modules=r"model\.layers\.[02]\.mlp|model\.norm"))
    assert found == [Tap("model.layers.0.mlp"), Tap("model.layers.2.mlp"), Tap("model.norm")]
    assert len(taps.select(tiny_model, selection())) == 4


def test_an_element_of_a_tuple_is_picked_by_number(tiny_model: PreTrainedModel) -> None:
    (found,) = taps.select(tiny_model, selection(modules=r"model\.layers\.1\.self_attn:0"))
    assert (found, found.name) == (Tap("model.layers.1.self_attn", 0), "model.layers.1.self_attn:0")
    assert taps.tap(found.name) == found
    assert taps.tap("model.norm") == Tap("model.norm")


def test_a_list_of_expressions_takes_what_any_of_them_matches(tiny_model: PreTrainedModel) -> None:
    several = selection(modules=[r"model\.layers\.0\.mlp", r"model\.layers\.(1|3)", "model.norm"])
    joined = [tap.name for tap in taps.select(tiny_model, several)]
    assert joined == ["model.layers.0.mlp", "model.layers.1", "model.layers.3", "model.norm"]
    assert selection(**several.model_dump()) == several, "as a saved job reads it again"
    elements = taps.select(tiny_model, selection(modules=[r"model\.layers\.0\.self_attn:0", r"model\.layers\.2\.self_attn:0"]))
    assert [tap.name for tap in elements] == ["model.layers.0.self_attn:0", "model.layers.2.self_attn:0"]
    assert selection(modules=["model.norm"]) == selection(modules="model.norm")
    for wrong in ([], ["a:0", "b"], ["a:0", "b:1"]):
        with pytest.raises(ValueError, match="with the same element"):
            selection(modules=wrong)


def test_excluded_modules_are_left_out(tiny_model: PreTrainedModel) -> None:
    found = taps.select(tiny_model, selection(modules=r"model\.layers\.\d", exclude_modules=r".*\.[12]"))
    assert [tap.name for tap in found] == ["model.layers.0", "model.layers.3"]
    with pytest.raises(ValueError, match="excludes all 4 modules"):
        taps.select(tiny_model, selection(modules=r"model\.layers\.\d", exclude_modules=".*"))


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("layers.0.mlp", r"'layers.0.mlp' as a whole; similar: model.layers.0.mlp, "),
        ("model.layer.0.mpl", r"similar: .*model.layers.0.mlp"),
        ("model.(", "is not a regular expression"),
    ],
)
def test_a_pattern_that_matches_nothing_lists_near_misses(tiny_model: PreTrainedModel, pattern: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        taps.select(tiny_model, selection(modules=pattern))


# Row 0: instruction, data, data, response, response; row 1: two instruction tokens padded on either side.
P, G, X = PROMPT, GENERATION, PADDING
ROWS = {
    "right": (
        [[INSTRUCTION, DATA, DATA, RESPONSE, RESPONSE], [INSTRUCTION, INSTRUCTION, X, X, X]],
        [[P, P, P, G, G], [P] * 5],
        [[0, 1, 2, 3, 4], [0, 1, 0, 0, 0]],
    ),
    "left": (
        [[INSTRUCTION, DATA, DATA, RESPONSE, RESPONSE], [X, X, X, INSTRUCTION, INSTRUCTION]],
        [[P, P, P, G, G], [P] * 5],
        [[0, 1, 2, 3, 4], [0, 0, 0, 0, 1]],
    ),
}


def selected(side: str, chosen: Selection) -> list[list[int]]:
    """Return the positions that are selected in each row."""
    roles, phases, positions = (torch.tensor(values) for values in ROWS[side])
    mask = token_masks.token_mask(chosen, roles, phases, positions, token_masks.prompt_lengths(roles, phases))
    return [row_positions[row].tolist() for row_positions, row in zip(positions, mask, strict=True)]


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [[0, 1, 2, 3, 4], [0, 1]]),
        ({"phases": ["generation"]}, [[3, 4], []]),
        ({"phases": ["prompt"]}, [[0, 1, 2], [0, 1]]),
        ({"roles": ["data"]}, [[1, 2], []]),
        ({"roles": ["data", "response"]}, [[1, 2, 3, 4], []]),
        ({"exclude_roles": ["data"]}, [[0, 3, 4], [0, 1]]),
        ({"positions": [[0, 1]]}, [[0], [0]]),
        ({"positions": [[1, None]]}, [[1, 2, 3, 4], [1]]),
        ({"positions": [[-1, None]], "phases": ["prompt"]}, [[2], [1]]),
        ({"positions": [[-1, None]]}, [[2], [1]]),
        ({"positions": [[-2, -1]]}, [[1], [0]]),
        ({"positions": [[None, -1]]}, [[0, 1], [0]]),
        ({"positions": [[0, 1], [-1, None]]}, [[0, 2], [0, 1]]),
        ({"positions": [[1, -1]]}, [[1], []]),
        ({"exclude_positions": [[0, 1]]}, [[1, 2, 3, 4], [1]]),
        ({"exclude_positions": [[-1, None]]}, [[0, 1, 3, 4], [0]]),
        ({"roles": ["instruction", "data"], "exclude_positions": [[0, 1]], "phases": ["prompt"]}, [[1, 2], [1]]),
    ],
)
def test_tokens_are_selected_by_phase_role_and_position(side: str, fields: dict[str, Any], expected: list[list[int]]) -> None:
    assert selected(side, selection(**fields)) == expected


def naive_mask(chosen: Selection, roles: list[int], phases: list[int], ids: list[int]) -> list[bool]:
    """Decide token by token, as the docstring of `Selection` says it."""
    prompt = sum(phase == PROMPT for phase in phases)

    def within(spans: Any, position: int, phase: int) -> bool:
        def reached(bound: int) -> bool:
            return position >= bound if bound >= 0 else position - prompt >= bound

        def is_in(start: int | None, end: int | None) -> bool:
            # Negative positions count back from the end of the prompt: no generated token has one.
            if phase == GENERATION and any(bound is not None and bound < 0 for bound in (start, end)):
                return False
            return (start is None or reached(start)) and (end is None or not reached(end))

        return any(is_in(*span) for span in spans)

    return [
        ROLES_BACK[role] in (chosen.roles or ("instruction", "data", "response"))
        and ROLES_BACK[role] not in chosen.exclude_roles
        and (
            phase in [PHASES[name] for name in chosen.phases if name != "prompt_end"]
            or ("prompt_end" in chosen.phases and position == prompt - 1)
        )
        and (chosen.token_ids is None or number in chosen.token_ids)
        and number not in chosen.exclude_token_ids
        and (chosen.positions is None or within(chosen.positions, position, phase))
        and not within(chosen.exclude_positions, position, phase)
        for position, (role, phase, number) in enumerate(zip(roles, phases, ids, strict=True))
    ]


ROLES_BACK = {number: name for name, number in ROLES.items()}


def test_masks_are_those_of_a_naive_loop() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(n: int) -> int:
        return int(torch.randint(n, (1,), generator=generator))

    bounds = [None, 0, 1, 3, -1, -2, -3]
    spans = [s for s in itertools.product(bounds, bounds) if _is_legal(s)]
    for _ in range(200):
        roles = [draw(3) for _ in range(1 + draw(5))]
        phases = [PROMPT] * len(roles) + [GENERATION] * draw(4)
        roles += [draw(3) for _ in range(len(phases) - len(roles))]
        chosen = selection(
            phases=[get_args(Phase), ("prompt",), ("generation",), ("prompt_end", "generation"), ("prompt_end",)][draw(5)],
            token_ids=[None, None, (1, 2), (0,)][draw(4)],
            exclude_token_ids=[(), (1,)][draw(2)],
            roles=[None, ("data",), ("instruction", "response")][draw(3)],
            exclude_roles=[(), ("response",)][draw(2)],
            positions=None if draw(2) else [spans[draw(len(spans))]],
            exclude_positions=[(9, 12)],
        ) if draw(4) else selection(exclude_positions=[spans[draw(len(spans) - 1)]])  # fmt: skip
        tensors = torch.tensor([roles]), torch.tensor([phases]), torch.arange(len(roles))[None]
        ids = [draw(3) for _ in roles]
        mask = token_masks.token_mask(chosen, *tensors, token_masks.prompt_lengths(tensors[0], tensors[1]), torch.tensor([ids]))
        assert mask[0].tolist() == naive_mask(chosen, roles, phases, ids), (chosen, roles, phases, ids)


def _is_legal(span: tuple[int | None, int | None]) -> bool:
    start, end = span
    return start is None or end is None or (start < 0) != (end < 0) or start < end


def test_an_answer_is_computed_at_the_end_of_the_prompt_and_at_generated_tokens() -> None:
    chosen = selection(phases=["prompt_end", "generation"])
    assert not chosen.takes_all_tokens and selection(phases=["prompt", "generation", "prompt_end"]).takes_all_tokens
    assert selected("left", chosen) == selected("right", chosen) == [[2, 3, 4], [1]]


def test_tokens_are_selected_by_their_ids(tiny_model: PreTrainedModel) -> None:
    """By a reader and by a patch alike; without ids there is nothing to compare with."""
    by_id = selection(token_ids=[5, 7])
    ids = torch.tensor([[5, 6, 7, 5]])
    roles, positions = torch.zeros_like(ids), torch.arange(4)[None]
    arguments = roles, torch.zeros_like(ids), positions, torch.tensor([4])
    assert token_masks.token_mask(by_id, *arguments, ids).tolist() == [[True, False, True, True]]
    left_out = selection(exclude_token_ids=[5])
    assert token_masks.token_mask(left_out, *arguments, ids).tolist() == [[False, True, True, False]]
    with pytest.raises(ValueError, match="token_ids selects tokens by their ids"):
        token_masks.token_mask(by_id, *arguments)
    with pytest.raises(ValueError, match="exclude_token_ids excludes every id in token_ids"):
        selection(token_ids=[5], exclude_token_ids=[5])
    assert "token_ids" not in selection().model_dump() and "exclude_token_ids" not in selection().model_dump()
    name, width = "model.layers.0.mlp", tiny_model.config.hidden_size
    shift = patches.ActivationPatch.from_maps({name: AffineMap.shift(torch.ones(width))}, by_id)
    seen: list[torch.Tensor] = []
    module = tiny_model.get_submodule(name)
    module.register_forward_hook(lambda _m, _i, output: seen.append(output))
    attached = patches.attach(tiny_model, [shift])
    module.register_forward_hook(lambda _m, _i, output: seen.append(output))
    with torch.no_grad():
        tiny_model(input_ids=ids, position_ids=positions, roles=roles)
    attached.detach()
    moved = (seen[1] - seen[0])[0].mean(1)
    torch.testing.assert_close(moved, torch.tensor([1.0, 0, 1, 1]), atol=1e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["mean", "median", "max", "min", "last"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_is_that_of_a_loop_over_selected_tokens(pooling: Pooling, side: str) -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(5, 7, 3, generator=generator)
    mask = torch.rand(5, 7, generator=generator) < 0.4
    mask[:, 3] = True
    lengths = [7, 5, 4, 6, 4]
    for row, length in enumerate(lengths):
        padding = slice(length, None) if side == "right" else slice(0, 7 - length)
        mask[row, padding] = False
        z[row, padding] = torch.nan  # whatever padding holds must not count
    reduce = {
        "mean": lambda rows: rows.mean(0),
        "median": lambda rows: rows.sort(0).values[(len(rows) - 1) // 2],
        "max": lambda rows: rows.amax(0),
        "min": lambda rows: rows.amin(0),
        "last": lambda rows: rows[-1],
    }[pooling]
    expected = torch.stack([reduce(z[row][mask[row]]) for row in range(5)])
    torch.testing.assert_close(token_masks.pool(z, mask, pooling), expected)


def test_a_median_shows_a_nan_in_a_selected_token() -> None:
    z = torch.tensor([[[1.0], [torch.nan], [3.0]]])
    assert token_masks.pool(z, torch.tensor([[True, True, True]]), "median").isnan().all()
    assert token_masks.pool(z, torch.tensor([[True, False, True]]), "median").tolist() == [[1.0]]


def test_pooling_of_half_precision_sums_in_float32() -> None:
    z = torch.full((1, 4096, 1), 1.001, dtype=torch.bfloat16)
    pooled = token_masks.pool(z, torch.ones(1, 4096, dtype=torch.bool), "mean")
    assert pooled.dtype == torch.float32
    assert pooled.item() == z[0, 0].float().item()


class Parts(nn.Module):
    """Four modules in a row, one of which returns a tuple; counts what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.unused = (nn.Linear(3, 3) for _ in range(4))
        self.pair = Pair()
        self.ran: list[str] = []
        for name in ("first", "second", "third"):
            self.get_submodule(name).register_forward_pre_hook(lambda _m, _i, name=name: self.ran.append(name))

    def forward(self, x: Tensor) -> Tensor:
        return self.third(self.pair(self.second(self.first(x)))[1])


class Pair(nn.Module):
    """Returns its input and twice its input."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, 2 * x


def test_a_reader_stops_behind_the_last_module_that_it_reads() -> None:
    model, x = Parts(), torch.randn(2, 4, 3)
    reader = taps.Reader(model, [Tap("first"), Tap("second")])
    values = reader(x=x)
    assert model.ran == ["first", "second"]
    torch.testing.assert_close(values["second"], model.second(model.first(x)))
    model.ran.clear()
    assert list(reader(x=x)) == ["first", "second"], "the second pass is read as the first was"
    reader.close()
    model.ran.clear()
    model(x)
    assert model.ran == ["first", "second", "third"]


def test_a_reader_that_does_not_stop_runs_the_whole_model() -> None:
    model = Parts()
    taps.Reader(model, [Tap("first")], stop=False)(x=torch.randn(1, 1, 3))
    assert model.ran == ["first", "second", "third"]


def test_the_stop_does_not_depend_on_the_order_of_the_taps() -> None:
    model = Parts()
    values = taps.Reader(model, [Tap("second"), Tap("first")])(x=torch.randn(1, 1, 3))
    assert set(values) == {"first", "second"}
    assert model.ran == ["first", "second"]


def test_inputs_and_elements_of_tuples_are_read() -> None:
    model, x = Parts(), torch.randn(2, 4, 3)
    z = model.second(model.first(x))
    inputs = taps.Reader(model, [Tap("third")], "input")(x=x)
    torch.testing.assert_close(inputs["third"], 2 * z)
    model = Parts()
    z = model.second(model.first(x))
    found = taps.Reader(model, [Tap("pair", 0), Tap("pair", 1)])(x=x)
    torch.testing.assert_close(found["pair:1"], 2 * found["pair:0"])
    torch.testing.assert_close(found["pair:0"], z)


@pytest.mark.parametrize(
    ("tap", "message"),
    [
        (Tap("unused"), "1 of 1 modules never run in a forward pass: unused"),
        (Tap("pair", 5), "element 5 does not exist"),
        (Tap("first", 1), "not a tuple"),
    ],
)
def test_what_cannot_be_read_is_said(tap: Tap, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        taps.Reader(Parts(), [tap])(x=torch.randn(1, 1, 3))


def test_a_module_that_runs_twice_is_refused() -> None:
    model = Parts()
    model.third = model.second
    reader = taps.Reader(model, [Tap("second"), Tap("unused")])
    with pytest.raises(ValueError, match="runs more than once"):
        reader(x=torch.randn(1, 1, 3))


def test_early_stop_skips_layers_of_a_real_model(tiny_model: PreTrainedModel) -> None:
    ran: list[str] = []
    for name, module in tiny_model.named_modules():
        module.register_forward_hook(lambda _m, _i, _o, name=name: ran.append(name))
    reader = taps.Reader(tiny_model, taps.select(tiny_model, selection(modules=r"model\.layers\.[01]")))
    values = reader(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    assert [tuple(z.shape) for z in values.values()] == [(1, 3, 128)] * 2
    assert not any(name.startswith(("model.layers.2", "model.layers.3", "model.norm", "lm_head")) for name in ran)
