"""Wrong requests at the command line: one message, exit code 2, nothing started."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from steerlab import job, run
from steerlab.run import capacity
from steerlab.stages import JobType, Plan
from steerlab.storage.store import Store

pytestmark = pytest.mark.ray

JOB = {
    "name": "a",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "train": {"source": "tiny:instructions/train", "limit": 8}},
    "method": {"name": "vanilla"},
    "train": {"steps": 1, "micro_batch": 8, "max_tokens": 64},
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(JOB))
    return file


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.train=null"], "data.train: this key is required"),
        (["train=null"], "neither a train nor an extract nor an evaluate section"),
        (["model.dtype=bfloat16"], "bfloat16 trains with float32 master weights, which needs scale.zero_stage 1, 2 or 3"),
        (["train.snapshots=[1]"], "train.snapshots: method vanilla trains the model itself"),
        (["train=null", "method.name=aside"], "train: this key is required by method aside"),
        (["train.keep=best"], "that needs data.validation"),
        (["train.max_tokens=100000"], "the context of LlamaForCausalLM holds"),
        (["data.train.source=nowhere.json"], "nowhere.json"),
        (["data.train.source=tiny:nothing/train"], "tiny world has no data set"),
        (["data.train.format=text"], "has no field 'text'"),
        (["evaluate=[{task: perplexity, strengths: [0, 1]}]"], "method vanilla makes no patch to scale"),
        (["evaluate=[{task: perplexity}, {task: perplexity, limit: 2}]"], "give one of them another `label`"),
        (["model.source=wheel:unknown==1.0"], "unknown==1.0"),
    ],
)
def test_what_is_known_before_the_start_is_refused_before_the_start(path: Path, overrides: list[str], message: str) -> None:
    wanted = job.read(path, JobType, overrides)
    with pytest.raises(ValueError, match=message):
        run.check(Plan.of(wanted))


def test_more_workers_than_the_cluster_has(cluster: None, path: Path, tmp_path: Path) -> None:
    wanted = job.read(path, JobType, ["scale.workers=8"])
    with pytest.raises(ValueError, match=r"scale.workers 8 x scale.cpus_per_worker 1 = 8 CPUs, but the cluster has 2"):
        capacity.check_cluster(Plan.of(wanted), Store.open(str(tmp_path / "root")), run.check(Plan.of(wanted)))


def test_a_disk_that_is_too_full(cluster: None, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Store, "free_bytes", lambda self: 1_000_000)
    wanted = job.read(path, JobType)
    with pytest.raises(ValueError, match=r"has 1\.0 MB free, but the job needs about \d+\.\d MB \(train\)"):
        capacity.check_cluster(Plan.of(wanted), Store.open(str(tmp_path / "root")), run.check(Plan.of(wanted)))


def test_what_a_job_builds_on_is_checked_with_it(
    cluster: None, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A job without a training of its own still trains what it starts from, and an extraction needs room too."""
    store = Store.open(str(tmp_path / "root"))
    (tmp_path / "above.yaml").write_text(
        f"name: above\nmodel: {{source: 'job:{path}'}}\nmethod: {{name: none}}\nevaluate: [{{task: perplexity}}]\n"
    )
    above = Plan.of(job.read(tmp_path / "above.yaml", JobType, ["scale.workers=8"]))
    with pytest.raises(ValueError, match="8 CPUs, but the cluster has 2"):
        capacity.check_cluster(above, store, run.check(above))
    extraction = yaml.safe_load((Path(__file__).parents[2] / "jobs/tiny/act.yaml").read_text())
    del extraction["choose"]
    extraction["method"]["incremental"] = False
    (tmp_path / "act.yaml").write_text(yaml.safe_dump(extraction | {"model": {"source": "tiny:model"}}))
    reading = Plan.of(job.read(tmp_path / "act.yaml", JobType))
    capacity.check_cluster(reading, store, run.check(reading))
    monkeypatch.setattr(Store, "free_bytes", lambda self: 1_000)
    with pytest.raises(ValueError, match=r"has 0\.0 MB free, but the job needs about .*\(extract\)"):
        capacity.check_cluster(reading, store, run.check(reading))


def test_an_address_where_no_cluster_answers(path: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [sys.executable, "-m", "steerlab", "run", str(path), "--root", str(tmp_path / "root")]
    environment = {**os.environ, "PYTHONPATH": str(Path(run.__file__).parents[2]), "RAY_ADDRESS": f"127.0.0.1:{port}"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert f"no Ray cluster answers at RAY_ADDRESS 127.0.0.1:{port}" in done.stderr


def test_gpus_that_are_not_there(cluster: None, path: Path, tmp_path: Path) -> None:
    wanted = job.read(path, JobType, ["scale.gpu=require"])
    with pytest.raises(ValueError, match="1 workers need a GPU each, the cluster has 0"):
        capacity.check_cluster(Plan.of(wanted), Store.open(str(tmp_path / "root")), run.check(Plan.of(wanted)))


def test_an_empty_data_set_and_a_row_without_the_field(path: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.json"
    rows.write_text("[]")
    with pytest.raises(ValueError, match=r"rows.json has no rows"):
        run.check(Plan.of(job.read(path, JobType, [f"data.train.source={rows}"])))
    rows.write_text('[{"instruction": "a"}]')
    with pytest.raises(ValueError, match=r"rows.json.* row 1 has no field 'output'"):
        run.check(Plan.of(job.read(path, JobType, [f"data.train.source={rows}"])))


def test_the_command_line_ends_with_code_2_and_one_message(path: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    done = subprocess.run(
        [sys.executable, "-m", "steerlab", "run", str(path), "--root", str(root), "--set", "trian.steps=1"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(Path(run.__file__).parents[2]), "PATH": "/usr/bin:/bin"},
    )
    assert done.returncode == 2
    assert "trian: unknown key; did you mean 'train'?" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not list(root.glob("runs/*"))


def test_a_root_that_cannot_be_written() -> None:
    with pytest.raises(ValueError, match=r"ROOT '/proc/nowhere' cannot be written"):
        Store.open("/proc/nowhere")
    with pytest.raises(ValueError, match="absolute"):
        Store.open("relative/root")
