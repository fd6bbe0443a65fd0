"""SIGKILL at a random step: of a worker, of Ray Train's controller, of the command with its whole cluster."""

from __future__ import annotations

import glob
import json
import os
import random
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

from steerlab import run

pytestmark = [pytest.mark.ray, pytest.mark.faults]

STEPS, LIMIT_S = 30, 600
JOB = {
    "name": "kills",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "train": {"source": "tiny:pretrain/train", "limit": 64}},
    "method": {"name": "vanilla"},
    "train": {"steps": STEPS, "lr": 2e-3, "micro_batch": 8, "max_tokens": 64},
    "scale": {"workers": 2, "zero_stage": 1, "checkpoint_every": 4},
}


class Command:
    """`steerlab run` of the job, with a cluster of its own."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        (folder / "job.yaml").write_text(yaml.safe_dump(JOB))
        self._command = [sys.executable, "-m", "steerlab", "run", str(folder / "job.yaml"), "--root", str(self.root)]
        package = Path(run.__file__).parents[2]
        self._environment = {**os.environ, "PYTHONPATH": str(package), "RAY_ADDRESS": "local"}

    def start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(self._command, env=self._environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    @property
    def runs(self) -> list[list[int]]:
        """The steps in the metrics of each run."""
        files = sorted(glob.glob(str(self.root / "runs/*/*/metrics.jsonl")))
        return [[json.loads(line)["step"] for line in Path(file).read_text().splitlines()] for file in files]

    def wait_for_step(self, process: subprocess.Popen[str], step: int) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while not self.runs or len(self.runs[-1]) < step:
            assert process.poll() is None and time.monotonic() < deadline_s, process.communicate()
            time.sleep(0.05)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        (found,) = glob.glob(str(self.root / "artifacts/train/*/model/model.safetensors"))
        return load_file(found)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The final weights of a run that nobody disturbs."""
    command = Command(tmp_path_factory.mktemp("undisturbed"))
    process = command.start()
    said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said
    return command.weights


def same(command: Command, undisturbed: dict[str, torch.Tensor]) -> bool:
    weights = command.weights
    return weights.keys() == undisturbed.keys() and all(torch.equal(weights[name], undisturbed[name]) for name in weights)


def relatives(process: subprocess.Popen[str], name: str) -> list[psutil.Process]:
    """Processes of this command only: Ray's are descendants of the command that started the cluster."""
    family = psutil.Process(process.pid).children(recursive=True)
    return [member for member in family if name in " ".join(member.cmdline())]


@pytest.mark.parametrize("number", range(20))
def test_a_worker(number: int, chance: random.Random, undisturbed: Any, tmp_path: Path) -> None:
    command = Command(tmp_path)
    process = command.start()
    command.wait_for_step(process, chance.randrange(1, STEPS - 4))
    chance.choice(relatives(process, "RayTrainWorker")).kill()
    said = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, said
    assert same(command, undisturbed) and command.runs == [list(range(1, STEPS + 1))]


@pytest.mark.parametrize("number", range(10))
def test_the_controller(number: int, chance: random.Random, undisturbed: Any, tmp_path: Path) -> None:
    """Replaced without a person, with a line."""
    command = Command(tmp_path)
    process = command.start()
    command.wait_for_step(process, chance.randrange(1, STEPS - 4))
    (controller,) = relatives(process, "TrainController")
    controller.kill()
    killed_s = time.monotonic()
    out, err = process.communicate(timeout=LIMIT_S)
    print(f"from the kill of the controller to the end of the run: {time.monotonic() - killed_s:.1f} s")
    assert process.returncode == 0, (out, err)
    assert "Ray Train's controller died" in " ".join(err.split()) and "continues from the newest checkpoint" in " ".join(
        err.split()
    )
    assert same(command, undisturbed) and command.runs == [list(range(1, STEPS + 1))]


@pytest.mark.parametrize("number", range(10))
def test_the_command_and_its_cluster(number: int, chance: random.Random, undisturbed: Any, tmp_path: Path) -> None:
    """The same command goes on; no half artifact counts, and no line of metrics is lost or doubled."""
    command = Command(tmp_path)
    process = command.start()
    command.wait_for_step(process, chance.randrange(1, STEPS - 4))
    family = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    for member in family:
        if member.is_running():
            member.kill()
    process.communicate()
    assert not glob.glob(str(command.root / "artifacts/*/*"))
    again = command.start()
    said = again.communicate(timeout=LIMIT_S)
    assert again.returncode == 0, said
    assert same(command, undisturbed)
    first, second = command.runs
    assert first == list(range(1, len(first) + 1)) and second == list(range(1, STEPS + 1))
    assert not glob.glob(str(command.root / "work/*/*")), "checkpoints are removed once the artifact stands"
