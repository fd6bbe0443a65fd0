"""What a sweep costs: against its trials run one by one with a cold store, and per small trial against nested Ray Train runs.

    python tests/benchmarks/sweep_cost.py [--trials 40] [--nested 3] [-o FILE.json]

Seconds of wall time on the cluster of this machine, tiny models with random weights; a trial by itself is a sweep of one, and
every kind of trial has run before it is timed. `overhead` is the time from one finished
trial to the next when they run one at a time, less what their training and evaluation take as plain calls in one process.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
import yaml

from steerlab import run
from steerlab.data import sources
from steerlab.evaluation import TASKS
from steerlab.job import Job
from steerlab.steered.stacks import load
from steerlab.storage.store import Store
from steerlab.sweeps import driver, sweep_request, trials
from steerlab.sweeps import space as spaces
from steerlab.training import loop
from steerlab.training.link import Link
from steerlab.training.request import Request

sys.path.insert(0, str(Path(__file__).parents[1] / "ray"))
from test_sweeps import ASIDE, BEST, IAV, LINEAS, WARP  # the jobs whose stages the tests count

LINEAS_STEPS = [10, 20, 40, 60]
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "8 alphas": (
        {**IAV, "train": {**IAV["train"], "steps": 60}},
        "SPACE = {'strength': tune.grid_search([0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0])}\n"
        "METRIC, MODE = 'preference/margin', 'max'\n",
    ),
    "5 keep_ratios": (WARP, "SPACE = {'method.keep_ratio': tune.grid_search([0.0, 0.05, 0.1, 0.2, 0.5])}\n" + BEST),
    "4 steering steps": (
        {**LINEAS, "train": {**LINEAS["train"], "steps": 60}},
        f"SPACE = {{'snapshot': tune.grid_search({LINEAS_STEPS})}}\n",
    ),
}


def ask(folder: Path, tree: dict[str, Any], text: str) -> sweep_request.SweepRequest:
    """Write a job and a space and read them."""
    folder.mkdir(parents=True)
    (folder / "a.yaml").write_text(yaml.safe_dump(tree))
    (folder / "space.py").write_text("from ray import tune\n" + text)
    return sweep_request.checked(trials.plan(folder / "a.yaml", (), spaces.load(folder / "space.py")), None, 1)


def swept(asked: sweep_request.SweepRequest, root: Path) -> tuple[float, list[float], int]:
    """Return the seconds of a sweep, those between its finished units, and by how many bytes this process grew meanwhile."""
    store, before, start_s = Store.open(str(root)), psutil.Process().memory_info().rss, time.monotonic()
    outcome = driver.sweep(asked, store, resume=False, command="benchmark")
    took = time.monotonic() - start_s
    ends = [line["time"] for line in store.read_lines(f"{outcome.folder}/history.jsonl") if line["event"] == "finish"]
    return took, [b - a for a, b in itertools.pairwise(ends)], psutil.Process().memory_info().rss - before


def one_by_one(asked: sweep_request.SweepRequest, folder: Path, most: int = 3) -> list[float]:
    """Return the seconds of the first, a middle and the last trial, each as a sweep of its own with a cold store."""
    alone = [replace(unit, trials=(trial,)) for unit in asked.units for trial in unit.trials]
    chosen = [alone[number * (len(alone) - 1) // (most - 1)] for number in range(most)]
    return [swept(replace(asked, units=[unit]), folder / str(number))[0] for number, unit in enumerate(chosen)]


def plainly(made: Job, folder: Path) -> float:
    """Return the seconds of a job's training and evaluation as function calls in this process."""
    assert made.train is not None and isinstance(made.model.source, str)
    source, start_s = sources.fetch(made.model.source), time.monotonic()
    request = Request(source, made.model, made.method.model_dump(mode="json"), made.data, made.train)
    link = Link(0, 1, torch.device("cpu"), report=lambda metrics, directory: None, scratch=folder / "scratch")
    loop.run(request, made.scale, link, folder / "output")
    model = load(folder / "output")
    for task in made.evaluate:
        TASKS[task.task].run(model, task)
    return time.monotonic() - start_s


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=40, help="small trials whose overhead is measured")
    parser.add_argument("--nested", type=int, default=3, help="of those, run with a Ray Train run and an actor each")
    parser.add_argument("--cases", nargs="*", default=list(CASES), help="sweeps that are compared with their trials")
    parser.add_argument("-o", "--output", type=Path)
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = str(Path(run.__file__).parents[2])
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")
    torch.set_num_threads(1)
    ray.init(num_cpus=None if os.environ.get("RAY_ADDRESS") else 2, log_to_driver=False, logging_level="ERROR")
    found: dict[str, Any] = {"hardware": platform.processor(), "cores": os.cpu_count(), "ray": ray.__version__}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        grid = "SPACE = {{'train.lr': tune.grid_search([k * 1e-4 for k in range(1, {})])}}\n" + BEST
        small = ask(folder / "small", ASIDE, grid.format(options.trials + 1))
        driver.concurrency, at_once = (lambda asked: 1), driver.concurrency  # one at a time
        _, gaps, grown = swept(small, folder / "small/root")
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
        jobs = [small.plan.job_of(unit.shared, 0, ()) for unit in small.units[:12]]
        own = [plainly(made, folder / f"own{number}") for number, made in enumerate(jobs)][2:]
        found["small trial"] = {
            "median_s": statistics.median(gaps[2:]),
            "own_work_median_s": statistics.median(own),
            "overhead_median_s": statistics.median(gaps[2:]) - statistics.median(own),
            "driver_grew_bytes": grown,
        }
        print(json.dumps(found["small trial"]), flush=True)
        if options.nested:
            tree = {**ASIDE, "scale": {"warm": False}}
            nested = ask(folder / "nested", tree, grid.format(options.nested + 2))
            _, gaps, _ = swept(nested, folder / "nested/root")
            found["nested trial"] = {"median_s": statistics.median(gaps), "n": len(gaps)}
            print(json.dumps(found["nested trial"]), flush=True)
        driver.concurrency = at_once
        for case in options.cases:
            asked = ask(folder / case, *CASES[case])
            one_by_one(asked, folder / case / "warm", 2)  # imports are paid
            alone = one_by_one(asked, folder / case / "alone")
            took, _, _ = swept(asked, folder / case / "root")
            found[case] = {
                "sweep_s": took,
                "one_trial_s": alone,
                "trials": (trials_ := sum(len(unit.trials) for unit in asked.units)),
                "sweep / one trial": took / statistics.median(alone),
                "sweep / trials one by one": took / statistics.mean(alone) / trials_,
            }
            print(case, json.dumps(found[case]), flush=True)
    print(json.dumps(found, indent=1))
    if options.output:
        options.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
