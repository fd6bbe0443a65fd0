"""Safety-WaRP's options: other rows and tokens for basis and importance, masks of rows and columns, and the second mask."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from here import Here
from transformers import PreTrainedModel

from steerlab import job, models, run
from steerlab.activations.moments import Moments
from steerlab.data.worlds import tiny
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import GENERATION, collate
from steerlab.methods import preparations, warp
from steerlab.methods.math import gradients
from steerlab.methods.math.masks import frozen, unpacked
from steerlab.methods.warp import Config
from steerlab.stages import JobType, Plan
from steerlab.steered.language import SteeredModel
from steerlab.storage.tensors import Parts

SAFETY = tiny.rows("refusals/train", 8)
FIRST = "model.layers.0.self_attn.q_proj"


def config(**settings: Any) -> Config:
    return Config.model_validate({"target_layers": [0], "rows_per_batch": 4, **settings})


def masks(before: dict[str, Path], places: list[models.WeightPlace]) -> dict[str, torch.Tensor]:
    mask = Parts.open(before["mask"])
    return {place.module: unpacked(mask.tensor(place.module), place.shape) for place in places}


@pytest.mark.parametrize(("unit", "axis"), [("row", 1), ("column", 0)])
def test_a_mask_of_rows_or_columns_takes_those_with_the_largest_norms(
    unit: str, axis: int, tiny_model: PreTrainedModel, prepared: Any
) -> None:
    wanted = config(mask_unit=unit, keep_ratio=0.25)
    before = prepared(warp.METHOD, wanted, tiny_model, SAFETY)
    importance = Parts.open(before["importance"])
    for name, frozen_MN in masks(before, warp.places(tiny_model, wanted)).items():
        norm = importance.tensor(name).square().sum(axis).sqrt()
        whole = frozen_MN.all(axis)
        assert torch.equal(whole, frozen_MN.any(axis)), "a row or column is frozen as a whole"
        assert int(whole.sum()) == round(0.25 * len(whole))
        assert norm[whole].min() >= norm[~whole].max()


def test_ranking_over_all_layers_counts_rows_not_coefficients() -> None:
    """Two layers of different widths, one ratio: half of the six rows, wherever they lie."""
    scores = [torch.tensor([[1.0, 0.0], [5.0, 0.0]]), torch.tensor([[2.0] * 3, [0.1] * 3, [3.0] * 3, [0.2] * 3])]
    selected = [torch.ones(2, dtype=torch.bool), torch.ones(4, dtype=torch.bool)]
    found = list(frozen(lambda: scores, selected, [2, 3], 0.5, "row"))
    assert [mask.all(1).tolist() for mask in found] == [[False, True], [True, False, True, False]]


def test_the_second_mask_spares_what_matters_for_the_utility_rows(
    tiny_model: PreTrainedModel, encoder: Encoder, tmp_path: Path
) -> None:
    """Frozen = largest on safety AND NOT largest on utility, in one basis; re-derived from the two importances."""
    wanted = config(keep_ratio=0.3, spare_ratio=0.2)
    here = TwoRoles(tmp_path, tiny_model, encoder)
    warp.METHOD.prepares(wanted, tiny_model, here)
    safety, utility = (Parts.open(here.folders[name]) for name in ("importance", "utility_importance"))
    for name, frozen_MN in masks(here.folders, warp.places(tiny_model, wanted)).items():
        keep, spare = (
            top(parts.tensor(name), ratio) for parts, ratio in ((safety, wanted.keep_ratio), (utility, wanted.spare_ratio))
        )
        assert bool((keep & spare).any()) and bool((keep & ~spare).any())
        assert torch.equal(frozen_MN, keep & ~spare)
        assert Parts.open(here.folders["mask"]).facts["mask"]["frozen"][name] == int((keep & ~spare).sum())


def top(scores: torch.Tensor, ratio: float | None) -> torch.Tensor:
    """The share of the largest by sorting, the first of equal ones."""
    order = scores.flatten().argsort(descending=True, stable=True)[: round((ratio or 0) * scores.numel())]
    return torch.zeros(scores.numel(), dtype=torch.bool).scatter(0, order, True).view_as(scores)


class TwoRoles(Here):
    """Reads arithmetic for the role `utility`, refusals for all others."""

    def __init__(self, root: Path, model: PreTrainedModel, encoder: Encoder) -> None:
        super().__init__(root, SteeredModel(model, encoder), SAFETY)

    def make(self, preparation: preparations.Preparation) -> None:
        role = getattr(preparation, "role", "safety")
        self._rows = tiny.rows("arithmetic/train", 8) if role == "utility" else SAFETY
        super().make(preparation)


@pytest.mark.parametrize(("tokens", "takes"), [("prompt", 0), ("response", 1)])
def test_the_basis_may_be_that_of_some_tokens(
    tokens: str, takes: int, tiny_model: PreTrainedModel, encoder: Encoder, prepared: Any
) -> None:
    """Against the inputs of the first layer, computed here: the normalised embeddings of these tokens alone."""
    before = prepared(warp.METHOD, config(basis_tokens=tokens), tiny_model, SAFETY)
    rows = [encoder.encode(encoder.from_row(row, "instruction")) for row in SAFETY]
    inner: Any = tiny_model.model
    chosen = [id for row in rows for id, inside in zip(row.input_ids, row.in_response, strict=True) if inside == bool(takes)]
    with torch.no_grad():
        z_MD = inner.layers[0].input_layernorm(inner.embed_tokens(torch.tensor(chosen))).double()
    moments = Moments.open(before["moments"])
    assert moments.count == len(chosen)
    torch.testing.assert_close(moments.second_moment(FIRST), z_MD.T @ z_MD / len(chosen), rtol=1e-5, atol=1e-6)


def test_importance_of_prompts_is_that_of_the_prompts_loss(
    tiny_model: PreTrainedModel, tiny_dir: Path, encoder: Encoder, prepared: Any
) -> None:
    wanted = config(rotation="none", importance_tokens="prompt")
    importance = Parts.open(prepared(warp.METHOD, wanted, tiny_model, SAFETY)["importance"])
    naive: Any = models.load_model(tiny_dir, seed=0)
    total = torch.zeros_like(naive.get_submodule(FIRST).weight)
    rows = [encoder.encode(encoder.from_row(row, "instruction")) for row in SAFETY]
    for first in (0, 4):
        losses, count = torch.zeros(()), 0
        for row in rows[first : first + 4]:
            logits = naive(torch.tensor([row.input_ids])).logits[0]
            for position in range(1, row.in_response.index(True)):
                losses = losses - logits[position - 1].log_softmax(-1)[row.input_ids[position]]
                count += 1
        (gradient,) = torch.autograd.grad(losses / count, [naive.get_submodule(FIRST).weight])
        total += gradient.abs()
    torch.testing.assert_close(importance.tensor(FIRST), total, rtol=1e-3, atol=1e-6)


def test_prompt_labels_are_the_prompts_tokens(encoder: Encoder) -> None:
    rows = [encoder.encode(encoder.from_row(row, "instruction")) for row in SAFETY[:3]]
    batch = collate(rows, encoder.pad_id, loss_on="response")
    labels_BT = gradients.prompt_labels(batch)
    taken_BT = labels_BT >= 0
    assert torch.equal(taken_BT, batch.attention_mask.bool() & (batch.phases != GENERATION))
    assert torch.equal(labels_BT[taken_BT], batch.input_ids[taken_BT])


WARP: dict[str, Any] = {
    "name": "warp",
    "model": {"source": "tiny:model"},
    "data": {
        "prompt_style": "plain",
        "train": {"source": "tiny:arithmetic/train", "limit": 8, "loss_on": "response"},
        "safety": {"source": "tiny:refusals/train", "limit": 8, "loss_on": "response"},
    },
    "method": {"name": "warp"},
    "train": {"steps": 1, "max_tokens": 64},
}
BASIS = {"source": "tiny:instructions/train", "limit": 8}
UTILITY = {"source": "tiny:arithmetic/train", "limit": 8, "loss_on": "response"}


def planned(folder: Path, data: dict[str, Any], **method: Any) -> Plan:
    tree = {**WARP, "data": {**WARP["data"], **data}, "method": {**WARP["method"], **method}}
    return Plan.of(job.validate(tree, JobType, folder / "a.yaml"))


def test_other_rows_span_the_basis_and_leave_the_importance_where_it_was(tmp_path: Path) -> None:
    plain, other = planned(tmp_path, {}), planned(tmp_path, {"basis": BASIS})
    run.check(other)
    found, expected = (one.preparing.made for one in (other, plain))
    assert found["moments"].stage.params["role"] == "basis" and found["moments"].stage.label.startswith("basis: ")
    assert found["importance"].stage.params == expected["importance"].stage.params
    assert found["importance"].stage.key != expected["importance"].stage.key, "its coefficients are those of another basis"


def test_rows_that_no_setting_reads_are_refused(tmp_path: Path) -> None:
    def refused(match: str, data: dict[str, Any], **method: Any) -> None:
        with pytest.raises(ValueError, match=match):
            run.check(planned(tmp_path, data, **method))

    refused(r"data\.basis: method\.rotation none makes no basis", {"basis": BASIS}, rotation="none")
    refused(r"data\.utility and method\.spare_ratio belong together", {"utility": UTILITY})
    refused(r"data\.utility and method\.spare_ratio belong together", {}, spare_ratio=0.1)
    refused(r"data\.utility\.loss_on: set response", {"utility": {**UTILITY, "loss_on": "all"}}, spare_ratio=0.1)
    refused(r"data\.safety: method warp needs these rows", {"safety": None})
    run.check(planned(tmp_path, {"utility": UTILITY}, spare_ratio=0.1))
    run.check(planned(tmp_path, {"safety": None, "basis": BASIS}, mask="magnitude"))
    run.check(planned(tmp_path, {"safety": {**WARP["data"]["safety"], "loss_on": "all"}}, importance_tokens="prompt"))


def test_adapters_may_train_where_every_coefficient_is_frozen() -> None:
    job_of = {
        "name": "a", "model": {"source": "tiny:model"}, "train": {"steps": 1, "max_tokens": 64},
        "data": {
            "prompt_style": "plain", "train": {"source": "tiny:arithmetic/train", "limit": 8},
            "safety": {"source": "tiny:refusals/train", "limit": 8, "loss_on": "response"},
        },
    }  # fmt: skip
    frozen = {"name": "warp", "keep_ratio": 1, "max_tokens": 64, "layer_type": ["attn_q"]}
    for more, refused in (({}, True), ({"lora": {"layer_type": ["ffn_up"]}}, False), ({"others": "train"}, False)):
        read = job.validate({**job_of, "method": {**frozen, **more}}, JobType, Path("a.yaml"))
        with pytest.raises(ValueError, match="nothing trains") if refused else nullcontext():
            run.check(Plan.of(read))
