"""The driver of `test_gpus.py`: it starts a cluster with two declared GPUs, and writes what its processes saw."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

import psutil
import ray
import ray.cloudpickle

from steerlab.guards.torch_devices import TorchDevices
from steerlab.job import ScaleConfig
from steerlab.stages.spread import gpus, reserved, staying
from steerlab.storage import plan
from steerlab.storage.store import Store

_LIMIT_S = 120


def seen(*_: Any) -> dict[str, Any]:
    """Return the GPUs that Ray gave this process, those that CUDA would find, and the process."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return {
        "given": [str(gpu) for gpu in ray.get_gpu_ids()],
        "visible": [v for v in visible.split(",") if v],
        "process": os.getpid(),
    }


def slowly(*_: Any) -> dict[str, Any]:
    found = seen()
    time.sleep(3)
    return found


def alive(processes: list[dict[str, Any]]) -> list[int]:
    """Return those of the processes that are there after the time that Ray needs to end them."""
    end_s = time.monotonic() + 30
    while time.monotonic() < end_s:
        left = [one["process"] for one in processes if psutil.pid_exists(one["process"])]
        if not left:
            return []
        time.sleep(0.2)
    return left


def calls(warm: bool) -> list[dict[str, Any]]:
    """Call three times, the first two for one owner."""
    scale, held = ScaleConfig(warm=warm), {"num_cpus": 1, "num_gpus": 1}
    found = [staying.call(seen, (), scale, held, lambda line: None, owner) for owner in ("a", "a", "b")]
    staying.close()
    return found


def quarters() -> tuple[list[dict[str, Any]], float]:
    task = reserved.task(slowly, {"num_cpus": 0.25, "num_gpus": 0.25})
    running = [task.remote() for _ in range(8)]
    end_s = time.monotonic() + _LIMIT_S
    least = 2.0
    while len(ray.wait(running, num_returns=8, timeout=0.1)[0]) < 8 and time.monotonic() < end_s:
        least = min(least, ray.available_resources().get("GPU", 0.0))
    return ray.get(running), least


def two_runs(folder: Path) -> list[str]:
    """Run one plan twice at once on one GPU: the second holds an evaluator while it waits for the first one's stage."""
    scale, held = ScaleConfig(), {"num_cpus": 1, "num_gpus": 2}  # all GPUs of the cluster, as one of a cluster with one
    store, statuses = Store.open(str(folder)), ["", ""]
    second_holds, first_claims = threading.Event(), threading.Event()

    def work(work: plan.Work) -> None:
        first_claims.set()
        assert second_holds.wait(_LIMIT_S)
        staying.call(seen, (), scale, held, lambda line: None, "first")
        (work.directory / "done").write_text("")

    stage = plan.Stage("stage", 1, {}, work, {}, "the stage of both", {})

    def run(number: int) -> None:
        if number == 1:
            assert first_claims.wait(_LIMIT_S)
            staying.call(seen, (), scale, held, lambda line: None, "second")
            second_holds.set()
        records: list[plan.Record] = []
        plan.run([stage], store, scale, plan.Listener(waiting=lambda stage, line: staying.close()), records)
        statuses[number] = records[0].status
        staying.close()

    threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(_LIMIT_S)
    return statuses


def asked_torch() -> dict[str, Any]:
    """Reserve on the cluster as it is: torch finds no such GPUs here."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found: dict[str, Any] = {"reserved": reserved.gpus_of(ScaleConfig())}
    found["warning"] = " ".join(str(warning.message) for warning in caught)
    try:
        reserved.gpus_of(ScaleConfig(gpu="require"))
    except ValueError as error:
        found["required"] = str(error)
    return found


def main(answers: Path) -> None:
    ray.init(num_cpus=4, num_gpus=2, address="local", log_to_driver=False)
    # The workers do not find this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    found: dict[str, Any] = {"asked torch": asked_torch()}
    # From here on as on a machine with these devices.
    gpus._known.update({node["NodeID"]: TorchDevices("2", "", (("simulated", 1),)) for node in ray.nodes()})
    scale = ScaleConfig()
    assert reserved.gpus_of(scale) == 1 and reserved.gpus_of(ScaleConfig(gpus_per_worker=0.25)) == 0.25
    task = reserved.task(seen, reserved.of_actors(scale))
    found["tasks"] = [ray.get(task.remote()) for _ in range(10)]
    found["alive after the tasks"] = alive(found["tasks"])
    cpu = reserved.task(seen, reserved.of_actors(ScaleConfig(gpu="never")))
    found["tasks on CPUs"] = [ray.get(cpu.remote()) for _ in range(3)]
    for how in ("warm", "cold"):
        found[f"{how} calls"] = calls(how == "warm")
        found[f"alive after {how} calls"] = alive(found[f"{how} calls"])
    found["quarters"], found["free while eight quarters run"] = quarters()
    found["both runs"] = two_runs(answers.parent / "root")
    answers.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
