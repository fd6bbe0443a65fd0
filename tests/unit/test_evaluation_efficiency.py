"""What a patch costs: the arithmetic with a clock of our own, the cache, and forms of a model that leave it as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from steerlab.evaluation import TASKS
from steerlab.evaluation.statistics.summaries import Metric, summarise_all
from steerlab.evaluation.tasks.cost import contenders, efficiency
from steerlab.evaluation.tasks.cost.efficiency import Config, Timing
from steerlab.inputs.encoding import Encoder
from steerlab.models import cache_name
from steerlab.patches import ActivationPatch, CannotFold, EmbeddingPatch, LogitPatch, WeightPatch
from steerlab.steered.language import SteeredModel

NORM = "model.layers.1.post_attention_layernorm"
WEIGHT = "model.layers.2.mlp.up_proj.weight"
NEW, PROMPT = 5, 12


def activation(model: PreTrainedModel) -> ActivationPatch:
    patch = ActivationPatch({NORM: model.config.hidden_size})
    with torch.no_grad():
        patch.maps[0].scale.fill_(-3.0)
        patch.maps[0].shift.normal_(generator=torch.Generator().manual_seed(1))
    return patch.eval()


def logit(model: PreTrainedModel) -> LogitPatch:
    patch = LogitPatch(model.config.hidden_size, model.config.vocab_size)
    with torch.no_grad():
        patch.up.normal_(generator=torch.Generator().manual_seed(1))
    return patch.eval()


def weight(model: PreTrainedModel) -> WeightPatch:
    return WeightPatch.of({WEIGHT: torch.ones_like(model.get_parameter(WEIGHT))})


def rotation(model: PreTrainedModel) -> EmbeddingPatch:
    return EmbeddingPatch(model.config.hidden_size, 1.2)


@pytest.fixture
def steered(tiny_model: PreTrainedModel, encoder: Encoder) -> SteeredModel:
    return SteeredModel(tiny_model, encoder, (activation(tiny_model),))


def config(**fields: object) -> Config:
    settings = {"batch_sizes": (2,), "prompt_tokens": PROMPT, "new_tokens": NEW, "repeats": 6, "warmup": 1}
    return Config.model_validate(settings | fields)


class Machine:
    """A clock that forward passes alone move: a second for a prompt, 0.1 s for a token, twice as much with a patch attached."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.now_s, self.slower = 0.0, 1.0
        self.tokens: list[int] = []
        self.cached: list[int] = []
        self.read_after: list[int] = []
        self._model, self._norm = model, model.get_submodule(NORM)
        self.handle = model.register_forward_pre_hook(self._forward, with_kwargs=True)

    def _forward(self, _model: object, _args: object, kwargs: dict) -> None:
        self.tokens.append(kwargs["input_ids"].shape[1])
        self.cached.append(kwargs[cache_name(self._model)].get_seq_length())
        cost_s = 1.0 if self.tokens[-1] > 1 else 0.1
        self.now_s += self.slower * cost_s * (2 if self._norm._forward_hooks else 1)

    def read(self) -> float:
        self.read_after.append(len(self.tokens))
        return self.now_s


@pytest.fixture
def machine(steered: SteeredModel) -> Iterator[Machine]:
    made = Machine(steered.model)
    yield made
    made.handle.remove()


def measured(model: SteeredModel, settings: Config, clock: Callable[[], float]) -> dict[str, Metric]:
    (found,) = summarise_all(efficiency.run(model, settings, clock)).values()
    return {name.removeprefix("efficiency/"): metric for name, metric in found.items()}


# Arithmetic


def test_numbers_by_hand() -> None:
    """Batch 3, 5 new tokens: the prefill gives the first, decoding the four others."""
    timings = {"": [Timing(0.5, 2.0, 300)], "unpatched_": [Timing(0.25, 0.5, 200)], "control_": [Timing(0.5, 0.5, 200)]}
    found = {o.metric.removeprefix("efficiency/"): o.value for o in efficiency.observe(timings, 3, 5)}
    expected = {
        "decode_ratio": 4.0, "prefill_ratio": 2.0, "memory_ratio": 1.5,
        "control_decode_ratio": 1.0, "control_prefill_ratio": 2.0, "control_memory_ratio": 1.0,
        "decode_ms": 500.0, "prefill_ms": 500.0, "tokens_per_s": 6.0, "peak_memory_bytes": 300,
        "unpatched_decode_ms": 125.0, "unpatched_prefill_ms": 250.0, "unpatched_tokens_per_s": 20.0,
        "unpatched_peak_memory_bytes": 200,
    }  # fmt: skip
    assert list(found.items()) == [(f"{name}_batch_3", value) for name, value in expected.items()]


def test_ratios_are_taken_within_a_repeat() -> None:
    """A machine that slows down by the repeat leaves every ratio what it is."""
    patched = [Timing(2.0 * slow, 3.0 * slow, None) for slow in (1, 2, 4)]
    plain = [Timing(1.0 * slow, 2.0 * slow, None) for slow in (1, 2, 4)]
    found = efficiency.observe({"": patched, "unpatched_": plain}, 1, 2)
    assert [o.value for o in found if o.metric == "efficiency/decode_ratio_batch_1"] == [1.5] * 3
    assert [o.id for o in found if o.metric == "efficiency/decode_ratio_batch_1"] == ["0", "1", "2"]
    assert [o.value for o in found if o.metric == "efficiency/prefill_ratio_batch_1"] == [2.0] * 3
    assert {o.value for o in found if "memory" in o.metric} == {None}


def test_the_clock_decides(steered: SteeredModel, machine: Machine) -> None:
    found = measured(steered, config(), machine.read)
    expected = Metric(pytest.approx(2), pytest.approx(0), 6, 0, pytest.approx(2), pytest.approx(2))
    assert found["decode_ratio_batch_2"] == expected
    assert found["prefill_ratio_batch_2"].value == pytest.approx(2)
    assert found["control_decode_ratio_batch_2"].value == pytest.approx(1)
    assert found["decode_ms_batch_2"].value == pytest.approx(200)
    assert found["unpatched_decode_ms_batch_2"].value == pytest.approx(100)
    assert found["prefill_ms_batch_2"].value == pytest.approx(2000)
    assert found["tokens_per_s_batch_2"].value == pytest.approx(2 * NEW / (2 + 0.2 * (NEW - 1)))
    assert list(found)[:3] == ["decode_ratio_batch_2", "prefill_ratio_batch_2", "memory_ratio_batch_2"]


def test_one_slow_repeat_does_not_move_the_median(steered: SteeredModel, machine: Machine) -> None:
    def hiccup() -> float:
        machine.slower = 50.0 if 100 < len(machine.tokens) < 110 else 1.0
        return machine.read()

    found = measured(steered, config(repeats=10), hiccup)
    assert found["decode_ratio_batch_2"].value == pytest.approx(2)


def test_memory_is_not_measured_on_a_cpu(steered: SteeredModel, machine: Machine) -> None:
    found = measured(steered, config(), machine.read)
    unmeasured = Metric(None, None, 0, 6)
    assert all(found[f"{name}_batch_2"] == unmeasured for name in ("memory_ratio", "peak_memory_bytes"))


# What is timed


def test_the_cache_is_used_and_nothing_stops_early(steered: SteeredModel, machine: Machine) -> None:
    """Every run reads the prompt once untimed and once timed, then one token a pass, each with all before it in the cache.

    The clock is read behind the untimed pass, behind the prefill and at the end.
    """
    efficiency.run(steered, config(strengths=(1.0, 0.5), repeats=2), machine.read)
    runs = 2 * 3 * 3  # strengths, contenders, repeats with warm-up
    steps = list(range(PROMPT, PROMPT + NEW - 1))
    assert machine.tokens == [PROMPT, PROMPT, *[1] * (NEW - 1)] * runs
    assert machine.cached == [0, 0, *steps] * runs
    assert machine.read_after == [run * (NEW + 1) + passes for run in range(runs) for passes in (1, 2, NEW + 1)]


def test_contenders_take_turns_in_changing_order(steered: SteeredModel, machine: Machine) -> None:
    steered.detach()
    field, _ = contenders.at_strength(steered, 1.0, folded=False)
    order: list[str] = []
    watched = [c._replace(open=lambda c=c: (order.append(c.name), c.open())[1]) for c in field]
    timings = efficiency.race(watched, efficiency.prompts(steered, 2, PROMPT, 0), config(repeats=20), machine.read)
    assert {name: len(found) for name, found in timings.items()} == {"": 20, "unpatched_": 20, "control_": 20}
    rounds = [tuple(order[i : i + 3]) for i in range(0, len(order), 3)]
    assert len(rounds) == 21 and all(set(names) == set(timings) for names in rounds)
    assert len(set(rounds)) == 6, "all orders of three"


def test_prompts_have_one_length_and_both_roles(steered: SteeredModel) -> None:
    batch = efficiency.prompts(steered, 3, 7, seed=1)
    assert batch.input_ids.shape == (3, 7) and bool(batch.attention_mask.all())
    assert batch.roles.tolist() == [[0, 0, 0, 1, 1, 1, 1]] * 3
    assert torch.equal(batch.input_ids, efficiency.prompts(steered, 3, 7, seed=1).input_ids)
    assert not torch.equal(batch.input_ids, efficiency.prompts(steered, 3, 7, seed=2).input_ids)


# Forms of the model


def logits(model: SteeredModel, strength: float) -> torch.Tensor:
    with torch.inference_mode():
        return model.prefill(efficiency.prompts(model, 2, PROMPT, 0), torch.full((2,), strength)).logits_BV


@pytest.mark.parametrize("made", [activation, logit, weight, rotation])
def test_each_form_is_what_it_is_called(tiny_model: PreTrainedModel, encoder: Encoder, made: Callable) -> None:
    model = SteeredModel(tiny_model, encoder, (made(tiny_model),))
    strong, base = logits(model, 0.5), logits(model, 0.0)
    assert not torch.allclose(strong, base, atol=1e-3)
    model.detach()
    field, _ = contenders.at_strength(model, 0.5, folded=False)
    found = {}
    for _ in range(2):
        for contender in field:
            with contender.open() as form:
                found[contender.name] = logits(form, contender.strength)
        assert torch.equal(found[""], strong) and torch.equal(found["unpatched_"], base)
        assert torch.equal(found["control_"], base)


@pytest.mark.parametrize("made", [activation, logit, weight, rotation])
def test_a_run_leaves_the_model_as_it_was(
    tiny_model: PreTrainedModel, encoder: Encoder, made: Callable, weights_equal: Callable
) -> None:
    weights = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    model = SteeredModel(tiny_model, encoder, (made(tiny_model),))
    before = logits(model, 0.5)
    efficiency.run(model, config(strengths=(0.5, 1.0), repeats=1))
    assert torch.equal(logits(model, 0.5), before)
    model.detach()
    assert weights_equal(tiny_model.state_dict(), weights)


def test_a_run_that_fails_attaches_the_patches_again(steered: SteeredModel) -> None:
    before = logits(steered, 1.0)

    def broken() -> float:
        raise OSError("no clock")

    with pytest.raises(OSError, match="no clock"):
        efficiency.run(steered, config(), broken)
    assert torch.equal(logits(steered, 1.0), before)


@pytest.mark.parametrize("made", [logit, weight])
def test_the_folded_copy_computes_what_the_patched_model_does(
    tiny_model: PreTrainedModel, encoder: Encoder, made: Callable
) -> None:
    model = SteeredModel(tiny_model, encoder, (made(tiny_model),))
    expected, base = logits(model, 0.5), logits(model, 0.0)
    model.detach()
    merged = contenders.fold(model, 0.5)
    torch.testing.assert_close(logits(merged, 1.0), expected, atol=1e-3, rtol=1e-4)
    model.attach()
    assert torch.equal(logits(model, 0.0), base)


def test_below_the_newest_patch_a_stack_folds_at_strength_1(tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    model = SteeredModel(tiny_model, encoder, (weight(tiny_model), logit(tiny_model)))
    expected = logits(model, 0.5)
    model.detach()
    torch.testing.assert_close(logits(contenders.fold(model, 0.5), 1.0), expected, atol=1e-3, rtol=1e-4)


def test_the_folded_patch_is_measured_where_it_folds(tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    model = SteeredModel(tiny_model, encoder, (logit(tiny_model),))
    result = efficiency.run(model, config(folded=True, repeats=1))
    names = {o.metric for o in result.observations}
    assert {"efficiency/folded_decode_ratio_batch_2", "efficiency/folded_decode_ms_batch_2"} <= names
    assert result.samples[0]["folded"] == "measured"


def test_a_patch_that_does_not_fold_is_left_out_and_said(tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    model = SteeredModel(tiny_model, encoder, (rotation(tiny_model),))
    with pytest.raises(CannotFold):
        contenders.fold(model, 1.0)
    with pytest.warns(UserWarning, match="no folded patch at strength 1: an embedding patch depends on token roles"):
        result = efficiency.run(model, config(folded=True, repeats=1))
    assert not any("folded" in o.metric for o in result.observations)
    assert result.samples[0]["folded"].startswith("left out: an embedding patch")


def test_weights_count_once_and_patches_with_the_patched_form(tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    patch = logit(tiny_model)
    model = SteeredModel(tiny_model, encoder, (patch,))
    model.detach()
    patched, plain, control = (c.weight_bytes for c in contenders.at_strength(model, 1.0, folded=False)[0])
    buffers = sum(b.numel() * b.element_size() for b in tiny_model.buffers())
    assert plain == control == 4 * tiny_model.num_parameters() + buffers
    assert patched == plain + 4 * patch.up.numel()


# Requests


def test_every_strength_and_batch_size_has_its_rows(steered: SteeredModel) -> None:
    result = TASKS["efficiency"].run(steered, config(strengths=(1.0, 0.0), batch_sizes=(1, 3), repeats=1))
    found = summarise_all(result)
    assert list(found) == [1.0, 0.0] and list(found[1.0]) == list(found[0.0])
    assert {name.rpartition("_")[2] for name in found[1.0]} == {"1", "3"}
    assert [sample["strength"] for sample in result.samples] == [1.0, 0.0] and "CPU" in result.samples[0]["device"]
    assert {result.measure(o.metric).transform for o in result.observations} == {"median"}


def test_a_model_without_a_patch_stands_beside_itself(tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    plain = SteeredModel(tiny_model, encoder)
    assert summarise_all(efficiency.run(plain, config(repeats=1)))[1.0]["efficiency/decode_ratio_batch_2"].n == 1
    with pytest.raises(ValueError, match="has no patch to scale"):
        efficiency.run(plain, config(strengths=(0.5,)))


def test_what_cannot_be_measured_is_refused(steered: SteeredModel) -> None:
    with pytest.raises(ValueError, match="prompt_tokens 200 and new_tokens 57 are more than the model's context holds: 256"):
        efficiency.run(steered, config(prompt_tokens=200, new_tokens=57))
    with pytest.raises(ValidationError, match="this task has no rows; set batch_sizes and repeats"):
        config(limit=3)
    with pytest.raises(ValidationError, match="batch_sizes"):
        config(batch_sizes=())
