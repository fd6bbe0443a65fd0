"""Safety-WaRP on a real cluster: what a sweep over keep_ratio shares, and what a run leaves."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from steerlab import job, models, run
from steerlab.activations.moments import Moments
from steerlab.methods.math import masks
from steerlab.methods.warp import Config, places
from steerlab.run import capacity
from steerlab.stages import JobType, Plan
from steerlab.steered import stacks
from steerlab.storage import plan
from steerlab.storage.store import Store
from steerlab.storage.tensors import Parts

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore:the inputs of .* span")]

WARP: dict[str, Any] = {
    "name": "warp",
    "model": {"source": "tiny:model"},
    "data": {
        "prompt_style": "plain",
        "train": {"source": "tiny:arithmetic/train", "limit": 40, "loss_on": "response"},
        "safety": {"source": "tiny:refusals/train", "limit": 24, "loss_on": "response"},
    },
    "method": {"name": "warp", "keep_ratio": 0.1, "target_layers": [0, 1], "rows_per_shard": 8},
    "train": {"steps": 2, "lr": 2e-3, "micro_batch": 4, "grad_accum": 2, "max_tokens": 64},
    "scale": {"warm": True},
    "evaluate": [{"task": "perplexity", "source": "tiny:arithmetic/test", "limit": 8, "strengths": [1, 0.5, 0]}],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One ROOT for the whole file: what one test makes is cached for the next."""
    return Store.open(str(tmp_path_factory.mktemp("root")))


def do(store: Store, folder: Path, **method: Any) -> tuple[job.Job, run.Run]:
    wanted = job.validate({**WARP, "method": {**WARP["method"], **method}}, JobType, folder / "a.yaml")
    capacity.check_cluster(Plan.of(wanted), store, run.check(Plan.of(wanted)))
    return wanted, run.execute(Plan.of(wanted), store, plan.Listener())


def prepared(wanted: job.Job) -> dict[str, plan.Stage]:
    """The stages of what the method asks for before its training."""
    return {name: found.stage for name, found in Plan.of(wanted).preparing.made.items()}


def stages_run(store: Store, folder: Path, ratios: tuple[float, ...]) -> Counter[str]:
    """Run a job for every ratio and count the stages that were not cached."""
    runs = [do(store, folder, keep_ratio=ratio)[1] for ratio in ratios]
    return Counter(record.stage.name for done in runs for record in done.records if record.status == "ran")


@pytest.mark.slow
def test_five_ratios_share_all_that_comes_before_the_mask(cluster: None, tmp_path: Path) -> None:
    ran = stages_run(Store.open(str(tmp_path / "root")), tmp_path, (0.0, 0.01, 0.05, 0.1, 0.2))
    assert ran == {"moments": 1, "basis": 1, "importance": 1, "mask": 5, "train": 5, "evaluate": 5}


def test_the_artifacts_say_what_was_kept(cluster: None, store: Store, tmp_path: Path) -> None:
    wanted, done = do(store, tmp_path)
    stages = prepared(wanted)
    basis, mask, importance = (Parts.open(store.local(n, stages[n].key)) for n in ("basis", "mask", "importance"))
    moments = Moments.open(store.local("moments", stages["moments"].key))
    assert importance.facts["all"]["rows"] == 24 and importance.facts["all"]["batches"] == 6
    assert set(basis.facts) == set(moments.modules)
    first = next(iter(basis.facts))
    assert basis.facts[first]["vectors"] == moments.count == importance.facts["all"]["tokens"]
    torch.testing.assert_close(
        basis.tensor(f"{first}/values"), torch.linalg.eigvalsh(moments.second_moment(first)).flip(0), rtol=1e-6, atol=1e-9
    )

    assert done.summary["model"] is not None
    loaded = stacks.load(store.local("train", done.summary["model"]["key"]))
    (patch,) = loaded.patches
    skeleton = models.load_model(tmp_path_model(tmp_path))
    for place in places(skeleton, Config.model_validate(WARP["method"])):
        delta = dict(zip(patch.shapes, patch.deltas, strict=True))[f"{place.module}.weight"]
        frozen = masks.unpacked(mask.tensor(place.module), place.shape)
        coefficients = delta @ basis.tensor(f"{place.input_of}/vectors")
        assert int(frozen.sum()) == round(0.1 * frozen.numel()) == mask.facts["mask"]["frozen"][place.module]
        assert coefficients[frozen].abs().max() < 1e-3 * coefficients.abs().max()
    values = {s: m["perplexity/value"]["value"] for s, m in done.summary["strengths"].items()}
    assert len(set(values.values())) == 3, "the strength interpolates between the base weights and the trained ones"


def tmp_path_model(folder: Path) -> Path:
    from steerlab.data.worlds import tiny_checkpoint

    tiny_checkpoint.write_model(folder / "model")
    return folder / "model"


@pytest.mark.slow
def test_two_workers_sum_what_one_does(cluster: None, store: Store, tmp_path: Path) -> None:
    wanted, _ = do(store, tmp_path)
    other = Store.open(str(tmp_path / "other"))
    two = job.validate({**WARP, "scale": {"workers": 2}}, JobType, tmp_path / "a.yaml")
    run.execute(Plan.of(two), other, plan.Listener())
    stages = prepared(wanted)
    assert prepared(two)["importance"].key == stages["importance"].key
    for name in ("basis", "importance", "mask"):
        ours, theirs = (Parts.open(one.local(name, stages[name].key)) for one in (store, other))
        for tensor in ours._file_of:
            assert torch.equal(ours.tensor(tensor), theirs.tensor(tensor)), f"{name}: {tensor}"


def test_bad_requests_say_what_would_be_right(tmp_path: Path) -> None:
    def refused(match: str, **changes: Any) -> None:
        tree = {**WARP, **changes}
        with pytest.raises((ValueError, job.JobError), match=match):
            run.check(Plan.of(job.validate(tree, JobType, tmp_path / "a.yaml")))

    data = WARP["data"]
    refused(r"method.keep_ratio: Input should be less than or equal to 1", method={"name": "warp", "keep_ratio": 1.5})
    refused(r"method.layer_type.*Input should be 'attn_q'", method={"name": "warp", "layer_type": "attn_x"})
    refused(r"method: layer 7: LlamaForCausalLM has the layers 0 to 3", method={"name": "warp", "target_layers": "7"})
    refused(r"data.safety: method warp needs these rows", data={**data, "safety": None})
    refused(r"data.safety.loss_on: set response", data={**data, "safety": {**data["safety"], "loss_on": "all"}})
    refused(r"scale.zero_stage 3: method warp", scale={"zero_stage": 3})
    refused(r"keep_ratio 1 freezes every coefficient", method={"name": "warp", "keep_ratio": 1})
    refused(r"method.others train: .* set model.dtype: float32", model={"source": "tiny:model", "dtype": "bfloat16"},
            method={"name": "warp", "others": "train"})  # fmt: skip


def test_a_7b_model_is_planned_in_bytes(tmp_path: Path) -> None:
    """METHODS 2.2: 20 GB of bases in float32, half a gigabyte of masks; this machine does not train it."""
    from steerlab.data.worlds import tiny_checkpoint

    tiny_checkpoint.write_model(directory := tmp_path / "model")
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    config = json.loads((directory / "config.json").read_text()) | sizes | {"num_key_value_heads": 32}
    (directory / "config.json").write_text(json.dumps(config))
    tree = {**WARP, "model": {"source": str(directory)}, "method": {"name": "warp", "rows_per_shard": 512}}
    wanted = job.validate(tree, JobType, tmp_path / "a.yaml")
    records = plan.status([*prepared(wanted).values()], Store.open(str(tmp_path / "root")))
    needs = capacity.estimates(Plan.of(wanted), run.check(Plan.of(wanted)), records)
    found = {name: needs[stage.key] for name, stage in prepared(wanted).items()}
    assert found["basis"].disk_bytes == 4 * 32 * (2 * 4096**2 + 11008**2)
    assert found["mask"].disk_bytes == 32 * (3 * 4096**2 + 2 * 4096 * 11008) / 8
    assert found["moments"].disk_bytes == pytest.approx(2 * found["basis"].disk_bytes, rel=0.01), "float64"
    weights = 4 * 6.5e9
    assert found["moments"].memory_bytes < weights + 8e9, "not all at once"
    assert found["basis"].memory_bytes < 5e9
    with pytest.raises(
        ValueError, match=r"stage importance needs about \d+\.\d+ GB of memory for each worker; this machine has 8\.00 GB"
    ):
        capacity.check_memory(records, needs, int(8e9), "this machine")
