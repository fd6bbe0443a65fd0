"""Steering jobs on a real cluster: fits, LinEAS over workers, choices, snapshots, stacks, and the page about them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import steerlab as sl
from steerlab import cli, job, report, run
from steerlab.evaluation.statistics import generations
from steerlab.run import capacity
from steerlab.stages import JobType, Plan
from steerlab.steered import stacks
from steerlab.storage import plan
from steerlab.storage.store import Store

pytestmark = pytest.mark.ray

TOPICS = {"format": "text", "limit": 8}
DATA = {
    "prompt_style": "plain",
    "source": {"source": "tiny:topics/train", "equals": {"label": "farm"}, **TOPICS},
    "target": {"source": "tiny:topics/train", "equals": {"label": "sea"}, **TOPICS},
}
PERPLEXITY = {"task": "perplexity", "source": "tiny:topics/test", "format": "text", "limit": 8}
LINEAS: dict[str, Any] = {
    "name": "lineas",
    "model": {"source": "tiny:model"},
    "data": DATA,
    "method": {"name": "lineas"},
    "extract": {"max_tokens": 64, "pooling": ["mean", "max"]},
    "train": {
        "steps": 4, "lr": 0.02, "optimizer": "adam", "micro_batch": 8, "max_tokens": 64, "clip_norm": 0, "snapshots": [2],
    },
    "scale": {"warm": True, "checkpoint_every": 3},
    "choose": {
        "strengths": [0.5, 1],
        "metric": "perplexity/value",
        "mode": "max",
        "within": {"metric": "perplexity/value", "rise": 1e6},
        "tasks": [{**PERPLEXITY, "source": "tiny:topics/validation"}],
    },
    "evaluate": [
        PERPLEXITY,
        {"task": "concept", "concept": "sea", "words": ["ship"], "embedding_source": None, "prompt": ["the old"], "samples": 2,
         "max_new_tokens": 3},
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One ROOT for the whole file: what one test makes is cached for the next."""
    return Store.open(str(tmp_path_factory.mktemp("root")))


def do(store: Store, tree: dict[str, Any], folder: Path) -> run.Run:
    wanted = job.validate(tree, JobType, folder / "a.yaml")
    capacity.check_cluster(Plan.of(wanted), store, run.check(Plan.of(wanted)))
    return run.execute(Plan.of(wanted), store, plan.Listener())


def artifact(store: Store, done: run.Run) -> Path:
    model = done.summary["model"]
    return store.local(model["stage"], model["key"])


def test_lineas_from_job_to_report(cluster: None, store: Store, tmp_path: Path) -> None:
    done = do(store, LINEAS, tmp_path)
    names = [record.stage.name for record in done.records]
    assert names == ["extract", "train", *["evaluate"] * 2, "choose", *["evaluate"] * 4]
    found = artifact(store, done)
    assert not (found / "model").exists(), "a frozen model is not copied"
    assert json.loads((found / "base.json").read_text()) == {"source": "tiny:model"}
    training = json.loads((found / "training.json").read_text())
    assert training["trained_parameters"] == 2 * 4 * 128
    losses = [json.loads(line)["train/loss"] for line in (found / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]

    end, early = (load_file(found / folder / "patch.safetensors") for folder in ("patch", "snapshots/2"))
    assert end.keys() == early.keys() and not torch.equal(end["maps.0.scale"], early["maps.0.scale"])
    assert done.summary["choice"]["strength"] in (0.5, 1.0)
    assert list(done.summary["strengths"]) == [done.summary["choice"]["strength"], 0.0]

    # All that was written lies in the run folder, at the chosen strength and without the patch, with what made it.
    texts = pq.read_table(Path(store.root) / done.folder / "samples/concept.parquet")
    assert texts["strength"].to_pylist() == [done.summary["choice"]["strength"]] * 2 + [0.0] * 2
    assert texts["concept/words"].null_count == 0 and all(texts["continuation"].to_pylist())
    made = generations.about(texts.schema)
    model = done.summary["model"]
    assert made["evaluation"] == done.summary["evaluations"]["concept"]
    assert made["artifacts"]["model"] == f"{model['stage']}/{model['key']}" and made["task"]["task"] == "concept"  # type: ignore[index,call-overload]

    # Strength 0 is the model itself: the same job without a method measures the same.
    none = do(store, {**LINEAS, "name": "none", "method": {"name": "none"}, "train": None, "extract": None}, tmp_path)
    base = none.summary["metrics"]["perplexity/value"]["value"]
    assert done.summary["strengths"][0.0]["perplexity/value"]["value"] == base
    assert [r.status for r in none.records] == ["cached"] * len(none.records)

    # A snapshot costs its evaluation alone.
    early_run = do(store, {**LINEAS, "snapshot": 2, "evaluate": [PERPLEXITY]}, tmp_path)
    assert [r.status for r in early_run.records if r.status == "ran"] == ["ran"] * 3  # development, choice, report
    page = tmp_path / "page.html"
    report.write([report.read(store, r.folder) for r in (done, none, early_run)], page)
    text = page.read_text()
    assert "perplexity/value" in text and "plotly" in text and "strength 0 (no patch)" in text


@pytest.mark.slow
def test_one_worker_gives_the_maps_of_two(cluster: None, store: Store, tmp_path: Path) -> None:
    one = artifact(store, do(store, {**LINEAS, "evaluate": []}, tmp_path))
    wider = {**LINEAS, "evaluate": [], "scale": {"workers": 2}}
    other = Store.open(str(tmp_path / "other"))
    two = artifact(other, do(other, wider, tmp_path))
    assert one.name == two.name, "how the work is spread is no part of the key"
    first, second = load_file(one / "patch/patch.safetensors"), load_file(two / "patch/patch.safetensors")
    for name, value in first.items():
        torch.testing.assert_close(value, second[name], rtol=1e-5, atol=1e-5)


def test_fits_on_one_extraction_and_a_stack_of_two(cluster: None, store: Store, tmp_path: Path) -> None:
    """AurA and Linear-AcT share what was read; a map fitted on a steered model stands on that one's patch."""
    short = {**LINEAS, "train": None, "choose": None, "evaluate": [{**PERPLEXITY, "strengths": [1, 0]}]}
    aura = do(store, {**short, "name": "aura", "method": {"name": "aura"}}, tmp_path)
    assert [r.stage.name for r in aura.records] == ["extract", "extract", "fit", "evaluate"]
    linear = do(store, {**short, "name": "linear", "method": {"name": "linear_act", "incremental": False}}, tmp_path)
    assert [r.status for r in linear.records] == ["cached", "cached", "ran", "ran"]
    walked = {**short, "name": "walked", "method": {"name": "linear_act"}}
    fit = json.loads((artifact(store, do(store, walked, tmp_path)) / "fit.json").read_text())
    assert (fit["places"], fit["neurons"], fit["rows"]) == (4, 512, {"source": 8, "target": 8})

    (tmp_path / "below.yaml").write_text(json.dumps(walked))
    stacked = {**short, "name": "stack", "model": {"source": "job:below.yaml"}, "method": {"name": "mean_act"}}
    done = do(store, stacked, tmp_path)
    loaded = stacks.load(artifact(store, done))
    assert [patch.kind for patch in loaded.patches] == ["activation", "activation"]
    # Strength scales the newest patch; at 0 it is the steered model below.
    below = artifact(store, do(store, walked, tmp_path))
    prompt = [loaded.encoder.conversation("the old", "")]
    one = stacks.load(below).token_log_probs(prompt)[0].log_prob
    assert loaded.token_log_probs(prompt, strength=0.0)[0].log_prob == pytest.approx(one, abs=1e-5)
    assert loaded.token_log_probs(prompt, strength=1.0)[0].log_prob != pytest.approx(one, abs=1e-3)


def test_a_fit_of_what_says_nothing_is_refused_with_the_reason(cluster: None, store: Store, tmp_path: Path) -> None:
    data = {**DATA, "target": {**DATA["target"], "equals": {"label": "sea"}, "limit": None, "offset": 10**6}}  # type: ignore[dict-item]
    with pytest.raises(ValueError, match=r"tiny:topics/train: no rows remain; .*offset is 1000000"):
        do(store, {**LINEAS, "method": {"name": "aura"}, "train": None, "data": data}, tmp_path)


def test_the_command_line_writes_the_page_and_shows_strengths(cluster: None, store: Store, tmp_path: Path) -> None:
    done = do(store, {**LINEAS, "choose": {**LINEAS["choose"], "strengths": [0.5]}, "evaluate": [PERPLEXITY]}, tmp_path)
    assert done.summary["choice"]["strength"] == 0.5 and done.summary["reported"] == {"perplexity": 0.5}
    runner = CliRunner()
    page = tmp_path / "page.html"
    result = runner.invoke(cli.app, ["report", f"{store.root}/{done.folder}", "-o", str(page)])
    assert result.exit_code == 0, result.output
    assert page.is_file()
    generate = ["generate", f"{store.root}/{done.folder}", "--prompt", "the old", "--max-new-tokens", "3"]
    result = runner.invoke(cli.app, [*generate, *[a for s in ("0", "0.5", "1", "3") for a in ("--strength", s)]])
    assert result.exit_code == 0, result.output
    assert "outside of [0.0, 1.0]" in " ".join(result.output.split())
    said = "at strength 0.5, chosen by perplexity/value on development rows; --strength takes another"
    result = runner.invoke(cli.app, generate)
    assert result.exit_code == 0 and said in result.output, "without --strength it is the one that the run reported"
    explained = runner.invoke(cli.app, ["explain", *generate[1:], "--response", "ship", "--json"])
    assert explained.exit_code == 0 and json.loads(explained.stdout)["strength"] == 0.5, explained.output
    exported = tmp_path / "exported"
    result = runner.invoke(cli.app, ["export", f"{store.root}/{done.folder}", str(exported)])
    assert result.exit_code == 0 and "AutoModelForCausalLM" in result.output and said in result.output, result.output
    steered = stacks.load(artifact(store, done))
    prompt = [steered.encoder.conversation("the old", "ship")]
    expected = steered.token_log_probs(prompt, strength=0.5)[0].log_prob
    row = steered.encoder.encode(prompt[0])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(exported)(torch.tensor([row.input_ids])).logits.log_softmax(-1)
    found = logits[0, :-1].gather(-1, torch.tensor(row.input_ids[1:])[:, None])[:, 0]
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    missing = runner.invoke(cli.app, ["report", f"{store.root}/runs/lineas/absent"])
    assert missing.exit_code == 2 and "not a finished run folder" in missing.output


def test_python_fits_the_very_bits_of_the_jobs(cluster: None, store: Store, tmp_path: Path) -> None:
    """`steerlab.fit`, in this process, leaves what the stages of a job leave on a cluster: closed forms and trainings."""
    model = sl.load("tiny:model", prompt={"prompt_style": "plain"}, device="cpu")
    short = {**LINEAS, "choose": None, "evaluate": []}
    texts = {role: DATA[role] for role in ("source", "target")}
    for method in ({"name": "linear_act", "incremental": False}, {"name": "linear_act"}, {"name": "lineas"}):
        training = LINEAS["train"] if method["name"] == "lineas" else None
        done = do(store, {**short, "name": "bits", "method": method, "train": training}, tmp_path)
        patch = sl.fit(method, model, data=texts, extract=LINEAS["extract"], training=training)
        made, expected = (folder / "patch/patch.safetensors" for folder in (patch.folder, artifact(store, done)))
        assert made.read_bytes() == expected.read_bytes(), method
