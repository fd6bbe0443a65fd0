"""SIGKILL at a random step: of a worker, of Ray Train's controller, of the command with its whole cluster."""

from __future__ import annotations

import glob
import random
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from commands import LIMIT_S, Command

pytestmark = [pytest.mark.ray, pytest.mark.faults]

STEPS = 30
JOB = {
    "name": "kills",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "train": {"source": "tiny:pretrain/train", "limit": 64}},
    "method": {"name": "vanilla"},
    "train": {"steps": STEPS, "lr": 2e-3, "micro_batch": 8, "max_tokens": 64},
    "scale": {"workers": 2, "zero_stage": 1, "checkpoint_every": 4},
}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """The final weights of a run that nobody disturbs."""
    command = Command(JOB, tmp_path_factory.mktemp("undisturbed"))
    assert command.start().wait(LIMIT_S) == 0, command.said
    return command.weights


def same(command: Command, undisturbed: dict[str, torch.Tensor]) -> bool:
    weights = command.weights
    return weights.keys() == undisturbed.keys() and all(torch.equal(weights[name], undisturbed[name]) for name in weights)


def relatives(process: subprocess.Popen[bytes], name: str) -> list[psutil.Process]:
    """Processes of this command only: Ray's are descendants of the command that started the cluster."""
    family = psutil.Process(process.pid).children(recursive=True)
    return [member for member in family if name in " ".join(member.cmdline())]


@pytest.mark.parametrize("number", range(20))
def test_a_worker(number: int, chance: random.Random, undisturbed: Any, tmp_path: Path) -> None:
    command = Command(JOB, tmp_path)
    process = command.start()
    command.wait_for_step(process, chance.randrange(1, STEPS - 4))
    chance.choice(relatives(process, "RayTrainWorker")).kill()
    assert process.wait(LIMIT_S) == 0, command.said
    assert same(command, undisturbed) and command.runs == [list(range(1, STEPS + 1))]


@pytest.mark.parametrize("number", range(10))
def test_the_controller(number: int, chance: random.Random, undisturbed: Any, tmp_path: Path) -> None:
    """Replaced without a person, with a line."""
    command = Command(JOB, tmp_path)
    process = command.start()
    command.wait_for_step(process, chance.randrange(1, STEPS - 4))
    (controller,) = relatives(process, "TrainController")
    controller.kill()
    killed_s = time.monotonic()
    assert process.wait(LIMIT_S) == 0, command.said
    print(f"from the kill of the controller to the end of the run: {time.monotonic() - killed_s:.1f} s")
    assert "Ray Train's controller died" in command.said and "continues from the newest checkpoint" in command.said
    assert same(command, undisturbed) and command.runs == [list(range(1, STEPS + 1))]


@pytest.mark.parametrize("number", range(10))
def test_the_command_and_its_cluster(number: int, chance: random.Random, undisturbed: Any, tmp_path: Path) -> None:
    """The same command goes on; no half artifact counts, and no line of metrics is lost or doubled."""
    command = Command(JOB, tmp_path)
    process = command.start()
    command.wait_for_step(process, chance.randrange(1, STEPS - 4))
    command.kill_all(process)
    assert not glob.glob(str(command.root / "artifacts/*/*"))
    again = command.start()
    assert again.wait(LIMIT_S) == 0, command.said
    assert same(command, undisturbed)
    first, second = command.runs
    assert first == list(range(1, len(first) + 1)) and second == list(range(1, STEPS + 1))
    assert not glob.glob(str(command.root / "work/*/*")), "checkpoints are removed once the artifact stands"
