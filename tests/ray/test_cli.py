"""The commands that work on what a run left: plan, generate, export, compare, schema, doctor."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner, Result

from steerlab import job, run
from steerlab.cli import app
from steerlab.stages import JobType, Plan
from steerlab.steered import explain
from steerlab.steered.stacks import load
from steerlab.storage import plan
from steerlab.storage.store import Store

pytestmark = pytest.mark.ray

JOB = {
    "name": "a",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "train": {"source": "tiny:instructions/train", "limit": 32}},
    "method": {"name": "vanilla"},
    "train": {"steps": 2, "lr": 2e-3, "micro_batch": 8, "max_tokens": 64},
    "scale": {"warm": True},
    "evaluate": [{"task": "perplexity", "source": "tiny:instructions/test", "limit": 8}],
}


@pytest.fixture(scope="module")
def done(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """ROOT and the run folders of a vanilla and an ASIDE job."""
    folder = tmp_path_factory.mktemp("cli")
    store = Store.open(str(folder / "root"))
    folders = {}
    for name in ("vanilla", "aside"):
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**JOB, "name": name, "method": {"name": name}}))
        folders[name] = run.execute(Plan.of(job.read(path, JobType)), store, plan.Listener()).folder
    return folder, folders


def call(*arguments: str, code: int = 0) -> Result:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, result.output
    return result


def test_plan_shows_what_is_cached(done: tuple[Path, dict[str, str]]) -> None:
    folder, _ = done
    arguments = ["plan", str(folder / "aside.yaml"), "--root", str(folder / "root"), "--json"]
    stages = json.loads(call(*arguments).output)["stages"]
    assert [(s["name"], s["status"]) for s in stages] == [("train", "cached"), ("evaluate", "cached")]
    changed = json.loads(call(*arguments, "--set", "method.angle_rad=1").output)["stages"]
    assert [s["status"] for s in changed] == ["to run", "to run"]
    assert "M parameters" in call(*arguments[:-1]).output


def test_generate_puts_strengths_side_by_side(done: tuple[Path, dict[str, str]]) -> None:
    folder, folders = done
    run_folder = str(folder / "root" / folders["aside"])
    output = call(
        "generate", run_folder, "--prompt", "give the topic", "--data", "lamp", "--strength", "0", "--strength", "1"
    ).output
    assert "strength" in output
    assert call("generate", str(folder), "--prompt", "a", code=2).exit_code == 2


def test_explain_names_the_tokens_that_a_patch_moves(done: tuple[Path, dict[str, str]]) -> None:
    folder, folders = done
    asked = ["--prompt", "give the topic", "--data", "lamp", "--top", "2"]
    patched = ["explain", str(folder / "root" / folders["aside"]), *asked]
    found = json.loads(call(*patched, "--response", "home", "--json").output)
    model = load(folder / "root" / _trained(folder / "root", folders["aside"]))
    expected = explain.explain(model, model.encoder.conversation("give the topic", "lamp", "home"), num=2)
    assert found["response"] == "home"
    assert found["tokens"] == json.loads(json.dumps([effect._asdict() for effect in expected]))
    assert any(token["kl"] > 0 for token in found["tokens"])
    at_0 = json.loads(call(*patched, "--response", "home", "--strength", "0", "--json").output)["tokens"]
    assert {token["kl"] for token in at_0} == {token["norm"] for token in at_0} == {0.0}
    assert "promotes" in call(*patched, "--max-new-tokens", "3").output
    refused = call("explain", str(folder / "root" / folders["vanilla"]), *asked, "--response", "home", code=2).output
    assert "has no patch to scale" in " ".join(refused.split())


def _trained(root: Path, run_folder: str) -> str:
    subject = json.loads((root / run_folder / "summary.json").read_text())["model"]
    return f"artifacts/{subject['stage']}/{subject['key']}"


def test_a_vanilla_model_exports_to_plain_transformers(done: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, folders = done
    target = tmp_path / "exported"
    call("export", str(folder / "root" / folders["vanilla"]), str(target))
    ours = load(target)
    plain = AutoModelForCausalLM.from_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(target)
    text = tokenizer.apply_chat_template(
        [{"role": "system", "content": "give the topic"}, {"role": "user", "content": "lamp"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, ours.model(ids).logits)
    assert ours.encoder.encode(ours.encoder.conversation("give the topic", "lamp")).input_ids == ids[0].tolist()
    call("export", str(folder / "root" / folders["vanilla"]), str(target), code=2)


def test_a_model_that_needs_roles_exports_to_three_lines(done: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, folders = done
    target = tmp_path / "exported"
    output = call("export", str(folder / "root" / folders["aside"]), str(target)).output
    assert "from steerlab import load" in output
    model = load(target)
    assert len(model.patches) == 1
    assert isinstance(model.answer("give the topic", "lamp", max_new_tokens=3), str)


def test_compare_prints_paired_differences(done: tuple[Path, dict[str, str]]) -> None:
    folder, folders = done
    arguments = [str(folder / "root" / folders[name]) for name in ("vanilla", "aside")]
    found = json.loads(call("compare", *arguments, "--root", str(folder / "root"), "--json").output)["metrics"][
        "perplexity/value"
    ]
    assert found["low"] < found["value"] < found["high"]
    assert found["n"] == 8
    values = []
    for name in ("vanilla", "aside"):
        summary = json.loads((folder / "root" / folders[name] / "summary.json").read_text())
        values.append(summary["metrics"]["perplexity/value"]["value"])
    assert found["value"] == pytest.approx(values[1] - values[0])
    named = json.loads(call("compare", "vanilla", "aside", "--root", str(folder / "root"), "--json").output)
    assert named["metrics"]["perplexity/value"] == found


def test_a_report_of_names_is_that_of_the_newest_runs(done: tuple[Path, dict[str, str]], tmp_path: Path) -> None:
    folder, folders = done
    call("report", "vanilla", "aside", "--root", str(folder / "root"), "-o", str(tmp_path / "page.html"))
    page = (tmp_path / "page.html").read_text()
    assert all(run_folder in page for run_folder in folders.values())


def test_schema_is_json() -> None:
    assert "properties" in json.loads(call("schema").output)


def test_doctor_looks_at_everything(tmp_path: Path, cluster: None) -> None:
    from steerlab.run.doctor import examine

    findings = {finding.check: finding for finding in examine(str(tmp_path))}
    assert findings["torch"].ok
    assert findings["Python's own platform module"].ok
    assert findings["ROOT"].ok
    assert not {f.check: f for f in examine("/proc/nowhere")}["ROOT"].ok
    logging.getLogger("ray").setLevel(logging.ERROR)
