"""Whole jobs on a real cluster, through real processes, with real kills."""

from __future__ import annotations

import glob
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from safetensors.torch import load_file

from steerlab import job, run
from steerlab.run import capacity
from steerlab.stages import JobType, Plan
from steerlab.steered import stacks
from steerlab.storage import plan
from steerlab.storage.store import Store

pytestmark = pytest.mark.ray

BASE = {
    "name": "base",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "train": {"source": "tiny:pretrain/train", "limit": 64}},
    "method": {"name": "vanilla"},
    "train": {"steps": 4, "lr": 2e-3, "micro_batch": 8, "max_tokens": 64},
}
ASIDE = {
    "name": "aside",
    "model": {"source": "job:base.yaml"},
    "data": {
        "prompt_style": "plain",
        "train": {"source": "tiny:instructions/train", "limit": 64},
        "validation": {"source": "tiny:instructions/validation", "limit": 8},
    },
    "method": {"name": "aside", "learned": True},
    "train": {"steps": 4, "lr": 2e-3, "micro_batch": 4, "grad_accum": 2, "max_tokens": 64, "eval_every": 2, "keep": "best"},
    "scale": {"workers": 2, "zero_stage": 1, "checkpoint_every": 2},
    "evaluate": [
        {"task": "separation", "source": "tiny:separation/test", "limit": 6, "max_new_tokens": 4, "strengths": [1, 0]}
    ],
}


@pytest.fixture
def jobs(tmp_path: Path) -> Path:
    """A folder with a base job and one that builds on it."""
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(BASE))
    (tmp_path / "aside.yaml").write_text(yaml.safe_dump(ASIDE))
    return tmp_path


def statuses(result: run.Run) -> list[str]:
    return [record.status for record in result.records]


def test_a_job_from_file_to_result(cluster: None, jobs: Path) -> None:
    """Base job, two workers, ZeRO 1, best checkpoint, evaluation at two strengths; then everything is cached."""
    wanted = job.read(jobs / "aside.yaml", JobType)
    facts = run.check(Plan.of(wanted))
    store = Store.open(str(jobs / "root"))
    capacity.check_cluster(Plan.of(wanted), store, facts)
    lines: list[dict[str, Any]] = []
    result = run.execute(Plan.of(wanted), store, plan.Listener(reported=lambda stage, metrics: lines.append(metrics)))
    assert [(r.stage.name, r.status) for r in result.records] == [("train", "ran"), ("train", "ran"), ("evaluate", "ran")]
    assert [line["step"] for line in lines if "step" in line] == [1, 2, 3, 4, 1, 2, 3, 4]
    folder = jobs / "root" / result.folder
    assert {p.name for p in folder.iterdir()} == {
        "job.yaml", "environment.json", "metrics.jsonl", "plan.json", "summary.json", "samples",
    }  # fmt: skip
    assert job.read(folder / "job.yaml", JobType) == wanted
    summary = json.loads((folder / "summary.json").read_text())
    assert set(summary["strengths"]) == {"1.0", "0.0"}
    assert summary["metrics"]["separation/utility"]["n"] == 6
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["torch"] == torch.__version__

    again = run.execute(Plan.of(wanted), store, plan.Listener())
    assert statuses(again) == ["cached"] * 3
    assert again.summary == result.summary
    other = job.read(jobs / "aside.yaml", JobType, ["evaluate.0.limit=4"])
    assert [r.status for r in plan.status(Plan.of(other).stages, store)] == ["cached", "cached", "to run"]

    subject = store.local(**{"stage": summary["model"]["stage"], "key": summary["model"]["key"]})
    model = stacks.load(subject)
    assert model.patches[0].difference_P.abs().max() > 0
    assert isinstance(model.answer("give the topic of the text", "lamp", max_new_tokens=3), str)
    training = json.loads((subject / "training.json").read_text())
    assert (
        training["trained_parameters"] == sum(p.numel() for p in model.model.parameters()) + model.model.config.hidden_size // 2
    )
    comparison = run.compare(run.Side(store, result.folder), run.Side(store, again.folder))
    assert {one.difference.value for one in comparison.metrics.values()} == {0.0}


def command(jobs: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "steerlab", "run", str(jobs / "base.yaml"), "--root", str(jobs / "root"), *arguments]


def environment() -> dict[str, str]:
    package = Path(run.__file__).parents[2]
    return {**os.environ, "PYTHONPATH": str(package), "RAY_ADDRESS": "local"}


LONG = [
    "--set",
    "train.steps=30",
    "--set",
    "scale.checkpoint_every=4",
    "--set",
    "scale.workers=2",
    "--set",
    "scale.zero_stage=1",
]


def steps_done(root: Path) -> int:
    files = glob.glob(str(root / "runs/*/*/metrics.jsonl"))
    return sum(len(Path(file).read_text().splitlines()) for file in files)


def wait_for_step(process: subprocess.Popen[bytes], root: Path, step: int) -> None:
    while steps_done(root) < step:
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.05)


def kill_all(process: subprocess.Popen[bytes]) -> None:
    """SIGKILL a command and everything that it started, its Ray cluster included."""
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for member in family:
        if member.is_running():
            member.kill()
    process.wait()


def final_weights(root: Path) -> dict[str, torch.Tensor]:
    (found,) = glob.glob(str(root / "artifacts/train/*/model/model.safetensors"))
    return load_file(found)


@pytest.fixture(scope="module")
def undisturbed(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The final weights of the long run when nobody disturbs it, on the cluster that the tests share."""
    folder = tmp_path_factory.mktemp("undisturbed")
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    wanted = job.read(folder / "base.yaml", JobType, LONG[1::2])
    run.execute(Plan.of(wanted), Store.open(str(folder / "root")), plan.Listener())
    return final_weights(folder / "root")


def test_a_killed_worker_is_replaced_and_the_weights_are_the_same_bits(jobs: Path, undisturbed: Any) -> None:
    process = subprocess.Popen(command(jobs, *LONG), env=environment(), stdout=subprocess.DEVNULL)
    wait_for_step(process, jobs / "root", 10)
    # Only workers of this run: Ray's processes are descendants of the command that started the cluster.
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())]
    assert len(workers) == 2
    workers[1].kill()
    assert process.wait(120) == 0
    weights = final_weights(jobs / "root")
    assert all(torch.equal(weights[name], undisturbed[name]) for name in undisturbed)
    (history,) = glob.glob(str(jobs / "root/artifacts/train/*/metrics.jsonl"))
    assert [json.loads(line)["step"] for line in Path(history).read_text().splitlines()] == list(range(1, 31))


@pytest.mark.slow
def test_a_killed_job_started_again_continues_to_the_same_bits(jobs: Path, undisturbed: Any) -> None:
    root = jobs / "root"
    process = subprocess.Popen(command(jobs, *LONG), env=environment(), stdout=subprocess.DEVNULL)
    wait_for_step(process, root, 14)
    kill_all(process)
    assert not glob.glob(str(root / "artifacts/*/*")), "nothing half-written counts as an artifact"
    before = steps_done(root)
    assert subprocess.run(command(jobs, *LONG), env=environment(), capture_output=True).returncode == 0
    weights = final_weights(root)
    assert all(torch.equal(weights[name], undisturbed[name]) for name in undisturbed)
    assert steps_done(root) - before < 30, "the second run continued from a checkpoint, not from step 0"
    assert not glob.glob(str(root / "work/*/*")), "checkpoints are removed once the artifact stands"


@pytest.mark.slow
def test_a_driver_killed_between_stages_leaves_no_half_artifact(jobs: Path) -> None:
    """The kill comes as soon as the first stage's artifact stands; the second run takes it as it is and goes on."""
    task = {"task": "separation", "source": "tiny:separation/test", "limit": 6, "max_new_tokens": 4}
    (jobs / "base.yaml").write_text(yaml.safe_dump({**BASE, "evaluate": [task]}))
    root = jobs / "root"
    process = subprocess.Popen(command(jobs), env=environment(), stdout=subprocess.DEVNULL)
    while not (found := glob.glob(str(root / "artifacts/train/*"))):
        assert process.poll() is None, "the run ended before it could be killed"
        time.sleep(0.01)
    kill_all(process)
    assert not glob.glob(str(root / "artifacts/evaluate/*"))
    store, key = Store.open(str(root)), Path(found[0]).name
    for file in store.manifest("train", key)["files"]:
        content = (store.local("train", key) / file["path"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == file["sha256"]
    wanted = job.read(jobs / "base.yaml", JobType)
    assert [record.status for record in plan.status(Plan.of(wanted).stages, store)] == ["cached", "to run"]
    again = subprocess.run(command(jobs, "--json"), env=environment(), capture_output=True, text=True)
    assert again.returncode == 0
    folder = Path(json.loads(again.stdout)[0]["folder"])
    stages = json.loads((folder / "plan.json").read_text())["stages"]
    assert [stage["status"] for stage in stages] == ["cached", "ran"]


@pytest.mark.slow
def test_a_failing_stage_names_itself_and_the_log(jobs: Path) -> None:
    """A loss that is not a number ends the stage at once: no retries, exit code 1, a message with the log."""
    arguments = ["--set", "train.lr=1e30", "--set", "train.clip_norm=0", "--set", "train.optimizer=sgd"]
    done = subprocess.run(command(jobs, *arguments), env=environment(), capture_output=True, text=True)
    assert done.returncode == 1
    assert "stage train (vanilla on tiny:pretrain/train) failed: FloatingPointError: train/" in done.stderr
    log = done.stderr.partition("log: ")[2].strip()
    assert "FloatingPointError" in Path(log).read_text()
    assert not glob.glob(str(jobs / "root/artifacts/*/*"))
