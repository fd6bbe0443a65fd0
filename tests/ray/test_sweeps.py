"""Sweeps on a real cluster: what trials share, what a sweep leaves, and that kills and stops cost nothing that was done."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
import ray
import torch
import yaml
from safetensors.torch import load_file

from steerlab import job, report, run
from steerlab.methods import vanilla
from steerlab.stages import JobType, Plan
from steerlab.storage import claims, plan
from steerlab.storage.store import Store
from steerlab.sweeps import driver, estimate, sweep_request, trials
from steerlab.sweeps import space as spaces
from steerlab.sweeps.history import History

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore:the inputs of .* span")]

PERPLEXITY = {"task": "perplexity", "source": "tiny:instructions/test", "limit": 8}
ASIDE: dict[str, Any] = {
    "name": "aside",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "train": {"source": "tiny:instructions/train", "limit": 32}},
    "method": {"name": "aside"},
    "train": {"steps": 3, "lr": 2e-3, "micro_batch": 8, "max_tokens": 64},
    "evaluate": [PERPLEXITY],
}
PAIRS = {"source": "tiny:preferences/train", "format": "preference", "limit": 24}
IAV: dict[str, Any] = {
    "name": "iav",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "preference": PAIRS},
    "method": {"name": "iav", "lambda_l2": 0.0},
    "train": {"steps": 4, "lr": 1e-2, "micro_batch": 8, "max_tokens": 64},
    "evaluate": [{"task": "preference", "pairs": {**PAIRS, "source": "tiny:preferences/test"}}],
}
WARP: dict[str, Any] = {
    **ASIDE,
    "name": "warp",
    "data": {
        "prompt_style": "plain",
        "train": {"source": "tiny:arithmetic/train", "limit": 32, "loss_on": "response"},
        "safety": {"source": "tiny:refusals/train", "limit": 16, "loss_on": "response"},
    },
    "method": {"name": "warp", "target_layers": [0, 1]},
}
TOPICS = {"format": "text", "limit": 8}
LINEAS: dict[str, Any] = {
    **ASIDE,
    "name": "lineas",
    "data": {
        "prompt_style": "plain",
        "source": {"source": "tiny:topics/train", "equals": {"label": "farm"}, **TOPICS},
        "target": {"source": "tiny:topics/train", "equals": {"label": "sea"}, **TOPICS},
    },
    "method": {"name": "lineas"},
    "extract": {"max_tokens": 64},
    "train": {"steps": 8, "lr": 0.02, "optimizer": "adam", "micro_batch": 8, "max_tokens": 64, "clip_norm": 0},
    "evaluate": [{"task": "perplexity", "source": "tiny:topics/test", "format": "text", "limit": 8}],
    "choose": {
        "strengths": [0.5, 1],
        "metric": "perplexity/value",
        "within": {"metric": "perplexity/value", "factor": 1.5},
        "tasks": [{"task": "perplexity", "source": "tiny:topics/validation", "format": "text", "limit": 8}],
    },
}
BEST = 'METRIC, MODE = "perplexity/value", "min"\n'


def ask(
    folder: Path, tree: dict[str, Any], text: str, samples: int | None = None, seeds: int = 1
) -> sweep_request.SweepRequest:
    (folder / "a.yaml").write_text(yaml.safe_dump(tree))
    (folder / "space.py").write_text("from ray import tune\n" + text)
    return sweep_request.checked(trials.plan(folder / "a.yaml", (), spaces.load(folder / "space.py")), samples, seeds)


def do(
    folder: Path, asked: sweep_request.SweepRequest, *, resume: bool = False
) -> tuple[Store, driver.Outcome, list[dict[str, Any]]]:
    store = Store.open(str(folder / "root"))
    sweep_request.check_cluster(asked, store)
    outcome = driver.sweep(asked, store, resume=resume, command="test")
    return store, outcome, table(folder, outcome.folder)


def table(folder: Path, below: str) -> list[dict[str, Any]]:
    return pq.read_table(folder / "root" / below / "trials.parquet").to_pylist()


def stages_run(folder: Path, rows: list[dict[str, Any]]) -> Counter[str]:
    """Count what ran, by the plan records of the sweep's runs."""
    records = [json.loads((folder / "root" / run_ / "plan.json").read_text()) for run_ in sorted({r["run"] for r in rows})]
    return Counter(line["name"] for record in records for line in record["stages"] if line["status"] == "ran")


def test_eight_alphas_are_one_training_and_one_evaluation(cluster: None, tmp_path: Path) -> None:
    alphas = [0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0]
    text = f"SPACE = {{'strength': tune.grid_search({alphas})}}\nMETRIC, MODE = 'preference/margin', 'max'\n"
    text += "SEEDS = [{'data.preference.shuffle': 3}]\n"  # also of the best trial's own job, below
    asked = ask(tmp_path, IAV, text)
    before = estimate.of(asked, Store.open(str(tmp_path / "root")))
    to_run = {name: line["to_run"] for name, line in before["stages"].items()}
    assert before["trials"] == 8 and to_run == {"train": 1, "evaluate": 1}
    store, outcome, rows = do(tmp_path, asked)
    assert stages_run(tmp_path, rows) == {"train": 1, "evaluate": 1}
    assert [row["param.strength"] for row in rows] == alphas and {row["status"] for row in rows} == {"finished"}
    summary = outcome.summary
    top = max(rows, key=lambda row: row["metric.preference/margin"])
    assert (summary["best"]["trial_id"], summary["best"]["value"]) == (top["trial_id"], top["metric.preference/margin"])
    assert top["low.preference/margin"] <= summary["best"]["value"] <= top["high.preference/margin"]
    assert set(summary["indistinguishable"]) < {row["trial_id"] for row in rows} - {top["trial_id"]}
    assert summary["test"]["preference/margin"]["value"] == top["metric.preference/margin"], "its own run has said it"
    assert summary["test_runs"] == [top["run"]]
    shown = report.read_sweep(store, outcome.folder)
    assert shown.best == top["trial_id"] and len(shown.runs) == 1
    assert top["trial_id"] in report.page([], sweeps=[shown])
    again = run.execute(Plan.of(job.read(tmp_path / "root" / outcome.folder / "best.yaml", JobType)), store, plan.Listener())
    assert [record.status for record in again.records] == ["cached", "ran"]
    assert again.summary["metrics"]["preference/margin"]["value"] == pytest.approx(top["metric.preference/margin"], rel=1e-5)
    assert estimate.of(asked, store)["stages"]["train"] == {"distinct": 1, "cached": 1, "to_run": 0, "seconds": 0.0, "bytes": 0}


def test_a_trial_that_fails_fails_alone_and_two_processes_do_not_run_one_sweep(cluster: None, tmp_path: Path) -> None:
    """A loss that is no number ends its trial with the reason; the sweep goes on."""
    text = "SPACE = {'train.lr, train.optimizer': tune.grid_search([(1e-3, 'adamw'), (1e30, 'sgd'), (3e-3, 'adamw')])}\n" + BEST
    tree = {**ASIDE, "train": {**ASIDE["train"], "clip_norm": 0}}
    store, outcome, rows = do(tmp_path, ask(tmp_path, tree, text))
    assert [row["status"] for row in rows] == ["finished", "failed", "finished"]
    assert "FloatingPointError" in rows[1]["reason"] and outcome.summary["counts"] == {"trials": 3, "failed": 1, "finished": 2}
    assert rows[0]["seconds.train"] > 0 and rows[0]["cached.train"] is False and len(rows[0]["key.evaluate.perplexity"]) == 64
    with (
        claims.hold(store, f"sweep-{outcome.folder.rpartition('/')[2]}", wait=False),
        pytest.raises(ValueError, match="is run by another process"),
    ):
        driver.sweep(ask(tmp_path, tree, text), store, resume=True, command="test")
    seen = (tmp_path / "root" / rows[0]["run"] / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in seen] == [1, 2, 3]


@pytest.mark.slow
def test_a_warm_process_trains_to_the_bits_of_a_ray_train_run_of_its_own(cluster: None, tmp_path: Path) -> None:
    store, _, rows = do(tmp_path, ask(tmp_path, ASIDE, "SPACE = {'train.lr': tune.grid_search([2e-3, 1e-3])}\n" + BEST))
    usual = job.validate({**ASIDE, "train": {**ASIDE["train"], "lr": 1e-3}}, JobType, tmp_path / "a.yaml")
    other, key = Store.open(str(tmp_path / "other")), Plan.of(usual).stages[0].key
    assert key == rows[1]["key.train"]
    run.execute(Plan.of(usual), other, plan.Listener())
    paths = [side.local("train", key) / "model/model.safetensors" for side in (store, other)]
    warm, cold = (load_file(path) for path in paths)
    assert warm.keys() == cold.keys() and all(torch.equal(warm[name], cold[name]) for name in warm)


@pytest.mark.slow
def test_five_keep_ratios_share_moments_basis_and_importance(cluster: None, tmp_path: Path) -> None:
    text = "SPACE = {'method.keep_ratio': tune.grid_search([0.0, 0.05, 0.1, 0.2, 0.5])}\n" + BEST
    _, _, rows = do(tmp_path, ask(tmp_path, WARP, text))
    assert stages_run(tmp_path, rows) == {"moments": 1, "basis": 1, "importance": 1, "mask": 5, "train": 5, "evaluate": 5}


@pytest.mark.slow
def test_four_steering_steps_train_once_and_development_rows_choose(cluster: None, tmp_path: Path) -> None:
    asked = ask(tmp_path, LINEAS, "SPACE = {'snapshot': tune.grid_search([1, 2, 4, 8])}\n")
    _, outcome, rows = do(tmp_path, asked)
    assert stages_run(tmp_path, rows) == {"extract": 1, "train": 1, "evaluate": 4}
    assert len(rows) == 12 and {row["param.strength"] for row in rows} == {0.0, 0.5, 1.0}
    start = next(row["metric.perplexity/value"] for row in rows if row["param.strength"] == 0.0)
    for row in rows:
        assert row["within"] == (row["metric.perplexity/value"] <= 1.5 * start)
    summary = outcome.summary
    assert summary["development"]["perplexity/value"]["value"] == summary["best"]["value"]
    assert summary["test"]["perplexity/value"]["value"] != summary["best"]["value"], "reported on other rows"


ASHA = (
    """from ray.tune.schedulers import ASHAScheduler
SPACE = {'train.lr': tune.grid_search([3e-3, 1e-3, 1e-6, 1e-7, 1e-8, 1e-9])}
SCHEDULER = ASHAScheduler(time_attr='step', grace_period=2, reduction_factor=2, max_t=40)
"""
    + BEST
)


@pytest.mark.slow
@pytest.mark.parametrize("warm", [True, False])
def test_asha_stops_trainings_that_fall_behind(cluster: None, tmp_path: Path, warm: bool) -> None:
    """Also those in workers of their own, whose process is not handed on while they are at work."""
    tree = {**ASIDE, "train": {**ASIDE["train"], "steps": 40}, "scale": {"warm": warm}}
    _, outcome, rows = do(tmp_path, ask(tmp_path, tree, ASHA))
    by_status = {
        status: [row["param.train.lr"] for row in rows if row["status"] == status] for status in ("finished", "pruned")
    }
    assert 3e-3 in by_status["finished"] and len(by_status["pruned"]) >= 2 and min(by_status["finished"]) >= 1e-3
    assert all("stopped by the scheduler after step" in row["reason"] for row in rows if row["status"] == "pruned")
    assert outcome.summary["best"]["params"] == {"train.lr": 3e-3}


class Watch:
    """Looks for the processes that train, and keeps the largest number of them at one moment."""

    def __enter__(self) -> Watch:
        self.most, self._over = 0, threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._over.wait(0.1):
            now = 0
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    now += process.cmdline()[:1] == ["ray::train"]
            self.most = max(self.most, now)


MEET = """
        import os, time
        from pathlib import Path

        folder, limit = Path({folder!r}), time.monotonic() + {limit_s}
        (folder / f"{{os.getpid()}}-{{time.time_ns()}}.here").touch()
        while len(list(folder.glob("*.here"))) < 2:
            if time.monotonic() > limit:
                (folder / "alone").touch()
                break
            time.sleep(0.05)
"""


def ask_to_meet(folder: Path, rates: list[float], limit_s: float) -> tuple[sweep_request.SweepRequest, Path]:
    """Return a sweep whose trainings wait until two of them are there; one that waited in vain leaves the second result.

    However long a loaded machine takes to start a process, two trainings meet if they may run at the same time.
    """
    folder.mkdir()
    text = Path(vanilla.__file__).read_text().replace('Literal["vanilla"] = "vanilla"', 'Literal["meet"] = "meet"')
    before = "        super().__init__(model, config.lora)\n"
    assert text.count(before) == 1
    (folder / "meet.py").write_text(text.replace(before, before + MEET.format(folder=str(folder), limit_s=limit_s)))
    tree = {**ASIDE, "method": {"file": str(folder / "meet.py")}}
    asked = ask(folder, tree, f"SPACE = {{'train.lr': tune.grid_search({rates})}}\n" + BEST)
    return asked, folder / "alone"


def test_two_cpus_train_two_trials_of_one_at_the_same_time(cluster: None, tmp_path: Path) -> None:
    asked, alone = ask_to_meet(tmp_path / "two", [1e-3, 2e-3, 3e-3], limit_s=120)
    _, _, rows = do(tmp_path / "two", asked)
    assert {row["status"] for row in rows} == {"finished"} and not alone.exists()
    asked, alone = ask_to_meet(tmp_path / "one", [1e-3, 2e-3], limit_s=5)
    with Watch() as seen:
        driver.sweep(asked, Store.open(str(tmp_path / "one" / "root")), resume=False, command="test", at_once=1)
    assert seen.most == 1 and alone.exists()


def test_a_trial_that_can_never_fit_is_refused_with_the_arithmetic(cluster: None, tmp_path: Path) -> None:
    text = "SPACE = {'scale.workers': tune.grid_search([1, 4])}\n" + BEST
    with pytest.raises(ValueError, match=r"scale.workers 4 x scale.cpus_per_worker 1 = 4 CPUs, but the cluster has 2"):
        do(tmp_path, ask(tmp_path, ASIDE, text))
    assert sweep_request.concurrency(ask(tmp_path, ASIDE, "SPACE = {'train.lr': tune.grid_search([1e-3])}\n" + BEST)) == 2
    assert sweep_request.concurrency(ask(tmp_path, ASIDE, "SPACE = {'scale.workers': tune.grid_search([2])}\n" + BEST)) == 1


@pytest.mark.slow
def test_two_hundred_trials_leave_the_driver_flat_and_the_report_fast(cluster: None, tmp_path: Path) -> None:
    """The driver of trial 200 is no larger than that of trial 40 by more than what the rows themselves take."""
    tree = {**ASIDE, "method": {"name": "none"}, "train": None, "data": {"prompt_style": "plain"}}
    text = "SPACE = {'evaluate.0.limit': tune.grid_search(list(range(1, 201)))}\n" + BEST
    asked, store = ask(tmp_path, tree, text), Store.open(str(tmp_path / "root"))
    process = start(tmp_path, ray.get_runtime_context().gcs_address)
    wait_until(tmp_path, process, lambda known: len(known.settled) >= 40)
    sizes = [psutil.Process(process.pid).memory_info().rss]
    while process.poll() is None:
        with suppress(psutil.NoSuchProcess):
            sizes.append(psutil.Process(process.pid).memory_info().rss)
        time.sleep(0.2)
    assert process.returncode == 0, (tmp_path / "log.txt").read_text()[-2000:]
    (folder,) = (tmp_path / "root/sweeps/aside").iterdir()
    rows = table(tmp_path, f"sweeps/aside/{folder.name}")
    assert len(rows) == 200 and {row["status"] for row in rows} == {"finished"}
    grown = max(sizes) - sizes[0]
    print(f"{grown / 2**20:.1f} MiB from trial 40 to the end")
    assert grown < 30 * 2**20, "the last trial's own tasks and the table of all included"
    start_s = time.process_time()
    report.write([], tmp_path / "page.html", [report.read_sweep(store, f"sweeps/aside/{folder.name}")])
    assert time.process_time() - start_s < 10, "the issue's own bar, in seconds of this process"
    start_s = time.process_time()
    assert driver.sweep(asked, store, resume=True, command="test").folder == f"sweeps/aside/{folder.name}"
    assert time.process_time() - start_s < 10


# Kills

TWELVE = "SPACE = {'train.lr': tune.grid_search([k * 5e-4 for k in range(1, 13)])}\n" + BEST
LONG = {**ASIDE, "train": {**ASIDE["train"], "steps": 12}, "scale": {"checkpoint_every": 3}}


def start(folder: Path, address: str, *arguments: str) -> subprocess.Popen[bytes]:
    package = Path(run.__file__).parents[2]
    command = [sys.executable, "-m", "steerlab", "sweep", "a.yaml", "space.py", "--root", str(folder / "root"), *arguments]
    variables = {**os.environ, "PYTHONPATH": str(package), "RAY_ADDRESS": address}
    with (folder / "log.txt").open("ab") as log:
        return subprocess.Popen(command, cwd=folder, env=variables, stdout=log, stderr=log)


def history_of(folder: Path) -> History | None:
    found = list((folder / "root/sweeps/aside").glob("*/history.jsonl"))
    return History(Store(str(folder / "root")), f"sweeps/aside/{found[0].parent.name}") if found else None


def wait_until(folder: Path, process: subprocess.Popen[bytes], ready: Callable[[History], bool]) -> None:
    while (known := history_of(folder)) is None or not ready(known):
        assert process.poll() is None, (folder / "log.txt").read_text()[-2000:]
        time.sleep(0.1)


def outcome_of(folder: Path) -> tuple[dict[tuple[str, int], float], dict[str, Any]]:
    """Return every trial's final metric, and the summary, of the only sweep of a folder."""
    (found,) = (folder / "root/sweeps/aside").iterdir()
    rows = pq.read_table(found / "trials.parquet").to_pylist()
    assert len(rows) == len({(row["trial_id"], row["seed"]) for row in rows}), "no trial is doubled"
    summary = json.loads((found / "summary.json").read_text())
    return {(row["trial_id"], row["seed"]): row["metric.perplexity/value"] for row in rows}, summary


def check_steps(folder: Path, num_steps: int) -> None:
    """Every run's own log holds each step once, whatever killed it in between."""
    for path in (folder / "root/runs/aside").glob("*/metrics.jsonl"):
        steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
        assert steps == list(range(1, num_steps + 1)), path


def test_a_killed_sweep_goes_on_and_ends_as_if_it_had_not_been(cluster: None, tmp_path: Path) -> None:
    """SIGKILL of the driver in the middle of four trials; what was settled stays, and nothing is lost or doubled."""
    text = "SPACE = {'train.lr': tune.grid_search([1e-3, 2e-3, 3e-3, 4e-3])}\n" + BEST
    sides = {name: tmp_path / name for name in ("killed", "undisturbed")}
    for folder in sides.values():
        folder.mkdir()
        asked = ask(folder, LONG, text)
    do(sides["undisturbed"], asked)
    process = start(sides["killed"], ray.get_runtime_context().gcs_address)
    wait_until(sides["killed"], process, lambda known: len(known.settled) >= 1)
    process.kill()
    process.wait()
    known = history_of(sides["killed"])
    assert known is not None
    settled = {number: known.courses[number].rows for number in known.settled}
    do(sides["killed"], ask(sides["killed"], LONG, text), resume=True)
    known = history_of(sides["killed"])
    assert known is not None and known.ended and not known.pending
    assert all(known.courses[number].rows == rows for number, rows in settled.items())
    (metrics, summary), (expected, undisturbed) = outcome_of(sides["killed"]), outcome_of(sides["undisturbed"])
    assert metrics == expected and summary["best"]["value"] == undisturbed["best"]["value"]
    check_steps(sides["killed"], 12)


@pytest.fixture(scope="module")
def expected(cluster: None, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int], float]:
    """The final metrics of twelve trials that nobody disturbs."""
    folder = tmp_path_factory.mktemp("undisturbed")
    do(folder, ask(folder, LONG, TWELVE))
    return outcome_of(folder)[0]


def victims(process: subprocess.Popen[bytes], kind: str) -> list[psutil.Process]:
    """Return the processes of a sweep that has a cluster of its own: the driver, its workers, or the node itself."""
    family = psutil.Process(process.pid).children(recursive=True)
    if kind == "driver":
        return [psutil.Process(process.pid)]
    if kind == "node":
        return [p for p in family if p.name() == "raylet"]
    return [p for p in family if p.name().startswith("ray::") or "default_worker" in " ".join(p.cmdline())]


def end(process: subprocess.Popen[bytes]) -> None:
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    if process.poll() is None:
        process.kill()
    for member in family:
        if member.is_running():
            member.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["driver", "worker", "node", "interrupt"])
def test_kills_at_random_moments_change_nothing(expected: Any, tmp_path: Path, kind: str) -> None:
    """Up to three kills of a sweep of twelve trials, each followed by --resume; a killed worker needs none."""
    ask(tmp_path, LONG, TWELVE)
    random_ = random.Random(kind)
    for attempt in range(4):
        process = start(tmp_path, "local", *(["--resume"] if attempt else []))
        if attempt == 3:
            assert process.wait(600) == 0, (tmp_path / "log.txt").read_text()[-2000:]
            break
        known = history_of(tmp_path)
        goal = min(11, (len(known.settled) if known else 0) + random_.randint(1, 3))
        wait_until(tmp_path, process, lambda now, goal=goal: len(now.settled) >= goal)
        time.sleep(random_.random())
        family = psutil.Process(process.pid).children(recursive=True)
        if kind == "interrupt":
            process.send_signal(signal.SIGINT)
            assert process.wait(60) == 1
            assert "--resume" in (tmp_path / "log.txt").read_text()
        else:
            random_.choice(victims(process, kind)).kill()
            if kind == "worker":
                assert process.wait(600) == 0, (tmp_path / "log.txt").read_text()[-2000:]
                break
            if kind == "driver":
                process.wait()
        end(process)
        for member in family:
            if member.is_running():
                member.kill()
    assert outcome_of(tmp_path)[0] == expected
    check_steps(tmp_path, 12)
