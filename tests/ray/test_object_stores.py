"""Whole jobs and a sweep with ROOT on a real S3 server, whose address is part of the URI."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3_server
import yaml
from typer.testing import CliRunner

from steerlab import cli, job, run
from steerlab.data.sources import remote
from steerlab.stages import JobType, Plan
from steerlab.storage import plan
from steerlab.storage.store import Store
from steerlab.sweeps import driver, sweep_request, trials
from steerlab.sweeps import space as spaces

pytestmark = pytest.mark.ray

TOPICS = {"source": "tiny:topics/train", "format": "text", "limit": 8}
LINEAS: dict[str, Any] = {
    "name": "lineas",
    "model": {"source": "tiny:model"},
    "data": {
        "prompt_style": "plain",
        "source": {**TOPICS, "equals": {"label": "farm"}},
        "target": {**TOPICS, "equals": {"label": "sea"}},
    },
    "method": {"name": "lineas"},
    "extract": {"max_tokens": 64},
    "train": {"steps": 4, "lr": 0.02, "optimizer": "adam", "micro_batch": 8, "max_tokens": 64, "clip_norm": 0},
    "scale": {"checkpoint_every": 2},
    "evaluate": [{"task": "perplexity", "source": "tiny:topics/test", "format": "text", "limit": 8, "strengths": [1]}],
}


@pytest.fixture(scope="module")
def server() -> Iterator[s3_server.Server]:
    with s3_server.running() as running:
        yield running


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))


def written(tmp_path: Path, changes: dict[str, Any]) -> Path:
    path = tmp_path / "lineas.yaml"
    path.write_text(yaml.safe_dump(LINEAS | changes))
    return path


@pytest.mark.parametrize(
    "scale",
    [{"warm": True}, pytest.param({"workers": 2, "zero_stage": 1}, marks=pytest.mark.slow)],
    ids=["warm", "two workers"],
)
def test_a_job_runs_on_a_bucket_and_its_folder_is_read_back(
    cluster: None, server: s3_server.Server, tmp_path: Path, scale: dict[str, Any]
) -> None:
    wanted = job.read(written(tmp_path, {"scale": LINEAS["scale"] | scale}), JobType)
    store = Store.open(server.root(f"job-{len(scale)}"))
    result = run.execute(Plan.of(wanted), store, plan.Listener())
    assert {r.status for r in result.records} == {"ran"} and len(result.records) >= 3
    # The same job on a disk: where ROOT lies must not change a number.
    on_disk = run.execute(Plan.of(wanted), Store.open(str(tmp_path / "root")), plan.Listener())
    assert result.summary["metrics"] == on_disk.summary["metrics"]
    assert [line["step"] for line in store.read_lines(f"{result.folder}/metrics.jsonl") if "step" in line] == [1, 2, 3, 4]
    assert store.list("work/train") == [] and store.list("work/extract") == []

    again = run.execute(Plan.of(wanted), store, plan.Listener())
    assert {r.status for r in again.records} == {"cached"}
    folder, page = store.where(result.folder), tmp_path / "page.html"
    shown = CliRunner().invoke(cli.app, ["report", folder, "-o", str(page)])
    assert shown.exit_code == 0, shown.output
    assert "perplexity" in page.read_text() and s3_server.SECRET + "@" not in page.read_text()
    texts = CliRunner().invoke(cli.app, ["generate", folder, "--prompt", "the old", "--max-new-tokens", "2"])
    assert texts.exit_code == 0, texts.output
    # As the page's line for repeating the run names it: the job lies in the bucket too.
    repeated = CliRunner().invoke(cli.app, ["run", remote.joined(folder, "job.yaml"), "--root", store.root, "--json"])
    assert repeated.exit_code == 0, repeated.output
    assert json.loads(repeated.stdout)[0]["summary"]["metrics"] == result.summary["metrics"]


@pytest.mark.slow
def test_a_sweep_runs_on_a_bucket_and_is_resumed_from_it(cluster: None, server: s3_server.Server, tmp_path: Path) -> None:
    space = tmp_path / "space.py"
    space.write_text("SPACE = {'train.lr': {'grid_search': [0.01, 0.02]}}\nMETRIC, MODE = 'perplexity/value', 'min'\n")
    path, store = written(tmp_path, {"scale": {"warm": True}}), Store.open(server.root("sweep"))
    request = sweep_request.checked(trials.plan(path, (), spaces.load(space)), None, 1)
    done = driver.sweep(request, store, resume=False, command="")
    assert done.summary["counts"]["finished"] == 2
    assert driver.sweep(request, store, resume=True, command="").folder == done.folder
    page = tmp_path / "page.html"
    shown = CliRunner().invoke(cli.app, ["report", store.where(done.folder), "-o", str(page)])
    assert shown.exit_code == 0, shown.output
