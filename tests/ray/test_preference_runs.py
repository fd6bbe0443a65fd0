"""IAV on a real cluster: cached hidden states, what a sweep over alphas shares, and what a run leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steerlab import job, models, run
from steerlab.data.worlds import tiny
from steerlab.inputs.encoded_rows import encode_data
from steerlab.run import capacity
from steerlab.stages import JobType, Plan
from steerlab.steered import stacks
from steerlab.storage import plan
from steerlab.storage.store import Store
from steerlab.storage.tensors import Parts

pytestmark = pytest.mark.ray

PAIRS = {"source": "tiny:preferences/train", "format": "preference", "limit": 48}
TASK = {"task": "preference", "pairs": {"source": "tiny:preferences/test", "format": "preference", "limit": 24}}
IAV: dict[str, Any] = {
    "name": "iav",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "preference": PAIRS},
    "method": {"name": "iav", "cache": True, "rows_per_shard": 20, "lambda_l2": 0.0},
    "train": {"steps": 8, "lr": 1e-2, "micro_batch": 8, "max_tokens": 64},
    "scale": {"warm": True},
    "evaluate": [{**TASK, "strengths": [1, 0, 0.5, 1.5, 2]}],
}


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One ROOT for the whole file: what one test makes is cached for the next."""
    return Store.open(str(tmp_path_factory.mktemp("root")))


def do(store: Store, folder: Path, **changes: Any) -> tuple[job.Job, run.Run]:
    wanted = job.validate({**IAV, **changes}, JobType, folder / "a.yaml")
    capacity.check_cluster(Plan.of(wanted), store, run.check(Plan.of(wanted)))
    return wanted, run.execute(Plan.of(wanted), store, plan.Listener())


def ran(done: run.Run) -> list[str]:
    return [record.stage.name for record in done.records if record.status == "ran"]


def weights(store: Store, done: run.Run) -> torch.Tensor:
    (patch,) = stacks.load(store.local("train", done.summary["model"]["key"])).patches
    return patch.up


def test_a_job_caches_trains_and_evaluates_over_alphas(cluster: None, store: Store, tmp_path: Path) -> None:
    wanted, done = do(store, tmp_path)
    assert ran(done) == ["hidden", "train", "evaluate"]
    found = done.summary["strengths"]
    assert list(found) == [1.0, 0.0, 0.5, 1.5, 2.0]
    assert found[1.0]["preference/accuracy"]["value"] > 0.9 and found[1.0]["preference/accuracy"]["n"] == 24
    assert found[0.0]["preference/accuracy"]["value"] is None and found[0.0]["preference/margin"]["value"] == 0
    kl = [found[alpha]["preference/kl"]["value"] for alpha in (0.0, 0.5, 1.0, 1.5, 2.0)]
    assert kl[0] == 0 and kl == sorted(kl)
    assert all(metric["stderr"] is not None for metric in found[0.5].values())

    cache = Parts.open(store.local("hidden", Plan.of(wanted).preparing.made["hidden"].stage.key))
    assert sorted(facts["rows"] for facts in cache.facts.values()) == [8, 20, 20]
    model = stacks.load(store.local("train", done.summary["model"]["key"]))
    rows = encode_data(model.encoder, tiny.rows("preferences/train", 48), "preference", 64).rows
    for number, row in enumerate(rows):
        states = cache.tensor(f"{number}/last")
        assert states.shape == (sum(row.targets("response")), model.model.config.hidden_size)
    facts = json.loads((store.local("train", done.summary["model"]["key"]) / "training.json").read_text())
    assert facts["trained_parameters"] == models.head(model.model).weight.numel()


def test_a_search_is_assembled_and_evaluated(cluster: None, store: Store, tmp_path: Path) -> None:
    """ARGS trains nothing: its patch names the head, and the task finds it from there."""
    save_file({"weight": torch.randn(1, 128, generator=torch.Generator().manual_seed(0))}, tmp_path / "head.safetensors")
    method = {"name": "args", "head": str(tmp_path / "head.safetensors"), "candidates": 3}
    plain = {"prompt_style": "plain"}
    _, done = do(store, tmp_path, method=method, data=plain, train=None, evaluate=[{**TASK, "limit": 3, "strengths": [1, 0]}])
    assert ran(done) == ["assemble", "evaluate"]
    found = done.summary["strengths"]
    assert found[0.0]["preference/kl"]["value"] == 0 < found[1.0]["preference/kl"]["value"]
    (patch,) = stacks.load(store.local("assemble", done.summary["model"]["key"])).patches
    assert patch.spec() == {"reward": None, "head": str(tmp_path / "head.safetensors"), "weight": 1.5, "candidates": 3}


@pytest.mark.slow
def test_more_alphas_and_another_beta_share_what_came_before(cluster: None, store: Store, tmp_path: Path) -> None:
    do(store, tmp_path)
    _, more = do(store, tmp_path, evaluate=[{**TASK, "strengths": [0.25, 0.75]}])
    assert ran(more) == ["evaluate"]
    _, steeper = do(store, tmp_path, method={**IAV["method"], "beta": 0.2}, evaluate=[])
    assert ran(steeper) == ["train"]


@pytest.mark.slow
def test_the_cached_run_is_the_uncached_one(cluster: None, store: Store, tmp_path: Path) -> None:
    _, cached = do(store, tmp_path)
    _, plain = do(store, tmp_path, method={**IAV["method"], "cache": False}, scale={"workers": 2}, evaluate=[])
    assert ran(plain) == ["train"]
    torch.testing.assert_close(weights(store, cached), weights(store, plain), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"name": "dpo", "lora": {}}, {"name": "genarm", "num_layers": 2}], ids=lambda m: m["name"])
def test_the_baselines_run_on_two_workers_over_alphas(
    method: dict[str, Any], cluster: None, store: Store, tmp_path: Path
) -> None:
    _, done = do(store, tmp_path, method=method, scale={"workers": 2})
    assert ran(done) == ["train", "evaluate"]
    found = done.summary["strengths"]
    assert found[1.0]["preference/accuracy"]["value"] > 0.7
    kl = [found[alpha]["preference/kl"]["value"] for alpha in (0.0, 0.5, 1.0, 2.0)]
    assert kl[0] == 0 and kl == sorted(kl)


def test_bad_requests_say_what_would_be_right(tmp_path: Path) -> None:
    def refused(match: str, **changes: Any) -> None:
        with pytest.raises((ValueError, job.JobError), match=match):
            run.check(Plan.of(job.validate({**IAV, **changes}, JobType, tmp_path / "a.yaml")))

    plain = {"source": "tiny:instructions/train"}
    refused(r"method.beta: .*greater than or equal to 0", method={"name": "iav", "beta": -1})
    refused(r"data.preference: this key is required, because method iav trains on it", data={})
    refused(r"preference: rows of format instruction are not valid here", data={"preference": plain})
    refused(r"data.validation: method iav trains on rows of format preference", data={"preference": PAIRS, "validation": plain})
    refused(r"method: layer 9: LlamaForCausalLM has the layers 0 to 3", method={"name": "iav", "layer": 9})
    refused(r"scale.zero_stage 3", scale={"zero_stage": 3})
    for name in ("dpo", "genarm"):
        few = {"source": "tiny:model", "dtype": "bfloat16"}
        refused(r"needs scale.zero_stage 1, 2 or 3", method={"name": name}, model=few, evaluate=[])
    refused(r"loss_on response", data={"preference": {**PAIRS, "loss_on": "all"}})
    (tmp_path / "bad.json").write_text(json.dumps([{"prompt": "a", "chosen": "b", "rejected": "b"}]))
    bad = {"source": str(tmp_path / "bad.json"), "format": "preference"}
    refused(r"bad.json row 1: chosen and rejected are the same text", data={"preference": bad})
    refused(r"evaluate.0.pairs: .*bad.json row 1: chosen and rejected", evaluate=[{**TASK, "pairs": bad}])
    with pytest.warns(UserWarning, match=r"strengths \[3.0\] lie outside of \[0.0, 2.0\]"):
        run.check(Plan.of(job.validate({**IAV, "evaluate": [{**TASK, "strengths": [1, 3]}]}, JobType, tmp_path / "a.yaml")))
