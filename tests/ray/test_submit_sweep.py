"""Sweeps on a cluster of their own through Ray's job API: sent, stopped in the middle with `ray job stop`, gone on with."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from steerlab.storage.store import Store
from steerlab.sweeps.history import History

pytestmark = [pytest.mark.ray, pytest.mark.slow]
REPOSITORY = Path(__file__).parents[2]
NUM_TRIALS, STEPS = 6, 12
TREE: dict[str, Any] = {
    "name": "aside",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "train": {"source": "tiny:instructions/train", "limit": 32}},
    "method": {"name": "aside"},
    "train": {"steps": STEPS, "lr": 2e-3, "micro_batch": 8, "max_tokens": 64},
    "scale": {"checkpoint_every": 3},
    "evaluate": [{"task": "perplexity", "source": "tiny:instructions/test", "limit": 8}],
}
SPACE = f"""from ray import tune
SPACE = {{"train.lr": tune.grid_search([k * 5e-4 for k in range(1, {NUM_TRIALS + 1})])}}
METRIC, MODE = "perplexity/value", "min"
"""


@pytest.fixture(scope="module")
def cluster_variables() -> Iterator[dict[str, str]]:
    """Start a cluster with cluster/local.sh, which stops this one and no other; yields what points at it."""
    folder = Path(tempfile.mkdtemp(prefix="sl-"))  # the names of Ray's sockets must be short
    keep = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS")}
    script = [str(REPOSITORY / "cluster/local.sh")]
    own = {"STEERLAB_CLUSTER_DIR": str(folder / "state"), "STEERLAB_RAY_TMP": str(folder / "ray"), "PYTHON": sys.executable}
    variables = {**keep, **own}
    started = subprocess.run(
        ["bash", *script, "start", "--num-cpus", "2"], env=variables, capture_output=True, text=True, timeout=150
    )
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        address = (folder / "state/dashboard").read_text().strip()
        yield {**variables, "RAY_AUTH_MODE": "token", "ADDRESS": address, "PYTHONPATH": str(REPOSITORY / "platform")}
    finally:
        stopped = subprocess.run(["bash", *script, "stop"], env=variables, capture_output=True, text=True, timeout=60)
        shutil.rmtree(folder, ignore_errors=True)
    assert stopped.stdout == "stopped\n"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """A working directory as somebody has it: the package, the cluster's settings, a job and a space."""
    folder = tmp_path / "work"
    for name in ("platform", "cluster"):
        shutil.copytree(REPOSITORY / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "a.yaml").write_text(yaml.safe_dump(TREE))
    (folder / "space.py").write_text(SPACE)
    return folder


class Sent:
    """A `steerlab submit` that follows its job."""

    def __init__(self, work: Path, variables: dict[str, str], *options: str) -> None:
        self.root, self.log, self.variables = work.parent / "root", work.parent / "log.txt", variables
        self.log.unlink(missing_ok=True)
        command = [sys.executable, "-m", "steerlab", "submit", "a.yaml", "--space", "space.py"]
        command += ["--address", variables["ADDRESS"], "--root", str(self.root), *options]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(command, cwd=work, env=variables, stdout=log, stderr=log)

    def history(self) -> History | None:
        found = list(self.root.glob("sweeps/aside/*/history.jsonl"))
        return History(Store(str(self.root)), f"sweeps/aside/{found[0].parent.name}") if found else None

    def wait_until(self, ready: Callable[[History], bool]) -> None:
        while (known := self.history()) is None or not ready(known):
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.1)

    def stop(self) -> int:
        """Stop the job as somebody would, and return what `steerlab submit` ends with."""
        start_s = time.monotonic()
        job_id = self.log.read_text().partition("sent as ")[2].partition(":")[0]
        done = subprocess.run(
            [sys.executable, "-m", "ray.scripts.scripts", "job", "stop", job_id, "--address", self.variables["ADDRESS"]],
            env=self.variables, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0 and "was stopped" in done.stdout + done.stderr, done.stdout + done.stderr
        code = self.process.wait(60)
        print(f"ray job stop: {time.monotonic() - start_s:.1f} s until all was over")
        return code


@pytest.fixture
def send(cluster_variables: dict[str, str], work: Path) -> Iterator[Callable[..., Sent]]:
    sent: list[Sent] = []

    def sending(*options: str) -> Sent:
        sent.append(Sent(work, cluster_variables, *options))
        return sent[-1]

    yield sending
    for one in sent:
        if one.process.poll() is None:  # a test that failed
            one.stop()


def runs_of(root: Path) -> dict[str, list[int]]:
    return {
        path.parent.name: [json.loads(line)["step"] for line in path.read_text().splitlines()]
        for path in root.glob("runs/aside/*/metrics.jsonl")
    }


def test_a_submitted_sweep_is_stopped_and_gone_on_with(send: Callable[..., Sent]) -> None:
    first = send()
    first.wait_until(lambda known: len(known.settled) >= 1)
    assert first.stop() == 1, "the exit code of an interrupted command; a killed one would have none of its own"
    text = first.log.read_text()
    assert "run the same command with --resume to go on" in text and "stopped" in text.splitlines()[-2]
    known = first.history()
    assert known is not None and not known.ended and known.pending
    lines = next(first.root.glob("sweeps/aside/*/history.jsonl")).read_text().splitlines()
    assert json.loads(lines[-1])["event"] == "stop"
    settled = {number: known.courses[number].rows for number in known.settled}

    second = send("--resume")
    assert second.process.wait(300) == 0, second.log.read_text()[-3000:]
    (folder,) = (first.root / "sweeps/aside").iterdir()
    rows = pq.read_table(folder / "trials.parquet").to_pylist()
    assert len(rows) == len({row["trial_id"] for row in rows}) == NUM_TRIALS
    assert {row["status"] for row in rows} == {"finished"}
    known = second.history()
    assert known is not None and known.ended
    assert all(known.courses[number].rows == found for number, found in settled.items()), "what was finished is kept"
    runs = runs_of(first.root)
    assert len(runs) == NUM_TRIALS and set(map(tuple, runs.values())) == {tuple(range(1, STEPS + 1))}
    assert json.loads((folder / "summary.json").read_text())["complete"] and (folder / "best.yaml").is_file()


def test_a_training_in_workers_of_its_own_stops_as_cleanly(send: Callable[..., Sent], work: Path) -> None:
    """The stop comes in the middle of a Ray Train run that would take hours, and ends before Ray's job manager kills."""
    tree = {**TREE, "train": {**TREE["train"], "steps": 1_000_000}, "scale": {"checkpoint_every": 50, "warm": False}}
    (work / "a.yaml").write_text(yaml.safe_dump(tree))
    (work / "space.py").write_text(SPACE.replace(f"range(1, {NUM_TRIALS + 1})", "range(1, 2)"))
    before = 0
    for options in ([], ["--resume"]):
        sent = send(*options)
        while not any(len(steps) > before + 60 for steps in runs_of(sent.root).values()):
            assert sent.process.poll() is None, sent.log.read_text()[-3000:]
            time.sleep(0.1)
        assert sent.stop() == 1
        (steps,) = runs_of(sent.root).values()
        time.sleep(3)
        assert list(runs_of(sent.root).values()) == [steps], "nothing trains on"
        assert steps == list(range(1, len(steps) + 1))
        before = len(steps)
    assert len(list((sent.root / "sweeps/aside").iterdir())) == 1
