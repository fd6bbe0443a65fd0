"""Which process computes on which GPU: on a cluster that declares two, on a machine that need not have any."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import steerlab
from steerlab.guards import torch_devices
from steerlab.guards.torch_devices import TorchDevices
from steerlab.job import ScaleConfig

pytestmark = pytest.mark.ray

DRIVER = Path(__file__).with_name("on_two_gpus.py")


def scale(**settings: Any) -> ScaleConfig:
    return ScaleConfig.model_validate(settings)


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a driver saw on a cluster of its own, with two declared GPUs."""
    # A process of its own: the other tests of this folder share a cluster without GPUs, and a process has one cluster.
    folder = tmp_path_factory.mktemp("gpus")
    environment = {**os.environ, "PYTHONPATH": str(Path(steerlab.__file__).parent.parent)}
    environment.pop("RAY_ADDRESS", None)
    with (folder / "log").open("w") as log:
        command = [sys.executable, str(DRIVER), str(folder / "answers.json")]
        code = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=400, check=False).returncode
    assert code == 0, (folder / "log").read_text()[-3000:]
    return json.loads((folder / "answers.json").read_text())


@pytest.mark.slow
def test_each_of_ten_tasks_has_the_gpu_that_ray_gave_it(answers: dict[str, Any]) -> None:
    """CUDA takes the devices of its environment once, when it starts: a process must not be given another one."""
    tasks = answers["tasks"]
    assert len(tasks) == 10 and all(task["given"] == task["visible"] for task in tasks)
    assert len({task["process"] for task in tasks}) == 10, "no process had a second task"
    assert answers["alive after the tasks"] == []


@pytest.mark.slow
def test_tasks_without_a_gpu_may_share_a_process_and_see_none(answers: dict[str, Any]) -> None:
    assert all(task["given"] == [] for task in answers["tasks on CPUs"])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["warm", "cold"])
def test_a_call_has_one_gpu_and_nothing_of_it_stays(answers: dict[str, Any], how: str) -> None:
    calls = answers[f"{how} calls"]
    assert all(call["given"] == call["visible"] and len(call["given"]) == 1 for call in calls)
    # The first two have one owner, and so one process and one device; the third has another.
    assert calls[0] == calls[1] and calls[2]["process"] != calls[0]["process"]
    assert answers[f"alive after {how} calls"] == []


@pytest.mark.slow
def test_four_quarters_share_a_gpu_and_the_fifth_waits(answers: dict[str, Any]) -> None:
    quarters = answers["quarters"]
    of_each = [sum(quarter["given"] == [gpu] for quarter in quarters) for gpu in ("0", "1")]
    assert sorted(of_each) == [4, 4] and len({quarter["process"] for quarter in quarters}) == 8
    assert answers["free while eight quarters run"] == 0


@pytest.mark.slow
def test_two_runs_that_need_one_gpu_and_each_others_work_end(answers: dict[str, Any]) -> None:
    """One holds an evaluator and waits for what the other computes, which waits for the GPU."""
    assert answers["both runs"] == ["ran", "cached"]


@pytest.mark.slow
def test_gpus_that_torch_cannot_use_are_left_alone(answers: dict[str, Any]) -> None:
    assert answers["asked torch"]["reserved"] == 0
    assert "Ray counts GPUs, but torch" in answers["asked torch"]["warning"]
    assert answers["asked torch"]["required"].startswith("scale.gpu is require: ")


def test_torch_says_what_it_can_use() -> None:
    gpu = ["NVIDIA H200", 150_000_000_000]
    for answer, words in [
        ({"torch": "2.13.0+cpu", "built": False, "cuda": None, "gpus": []}, "torch 2.13.0+cpu is a build for CPUs"),
        ({"torch": "2.13.0", "built": True, "cuda": "12.8", "gpus": []}, "torch 2.13.0 (CUDA 12.8) finds no GPU and driver"),
        ({"torch": "2.13.0", "built": True, "cuda": "12.8", "gpus": [gpu, gpu]}, "2 x NVIDIA H200, 150 GB"),
    ]:
        assert str(torch_devices.read(f"a line of a library\n{json.dumps(answer)}\n")) == words
    here = torch_devices.here()
    assert isinstance(here, TorchDevices) and here.torch


def test_a_part_of_a_gpu_is_for_one_worker() -> None:
    assert scale(gpus_per_worker=0.25).gpus_per_worker == 0.25
    for wrong, message in [
        ({"gpus_per_worker": 0.5, "workers": 2}, "NCCL refuses two on one GPU"),
        ({"gpus_per_worker": 0}, "greater than 0"),
        ({"gpus_per_worker": 2}, "less than or equal to 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            scale(**wrong)
