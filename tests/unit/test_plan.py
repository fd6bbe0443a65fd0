"""Keys, order and execution of plans, without Ray and without torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import s3_server

from steerlab.job import ScaleConfig
from steerlab.storage import claims, plan
from steerlab.storage.plan import Listener, Record, Stage, Work
from steerlab.storage.store import Store


def writer(text: str, log: Path | None = None) -> Callable[[Work], None]:
    def run(work: Work) -> None:
        (work.directory / "out.txt").write_text(text + "".join((d / "out.txt").read_text() for d in work.inputs.values()))
        if log is not None:
            with log.open("a") as file:
                file.write(text + "\n")

    return run


def stage(name: str, *inputs: Stage, log: Path | None = None, **params: object) -> Stage:
    return Stage(name, 1, params, writer(name, log), {str(number): needed for number, needed in enumerate(inputs)})


def execute(stages: list[Stage], store: Store) -> list[Record]:
    records: list[Record] = []
    plan.run(stages, store, ScaleConfig(), Listener(), records)
    return records


def test_the_key_holds_name_version_parameters_and_inputs() -> None:
    a = stage("a", x=1)
    assert a.key == stage("a", x=1).key
    others = [stage("b", x=1), stage("a", x=2), stage("a"), Stage("a", 2, {"x": 1}, writer("a")), stage("a", stage("c"), x=1)]
    assert len({a.key, *(other.key for other in others)}) == 1 + len(others)


def test_labels_and_scale_are_not_in_the_key() -> None:
    assert Stage("a", 1, {}, writer("a"), label="x").key == Stage("a", 1, {}, writer("b"), label="y").key


def test_what_an_input_is_taken_for_is_not_in_the_key_but_its_place_is() -> None:
    a, b = stage("a"), stage("b")
    keys = [Stage("c", 1, {}, writer("c"), inputs).key for inputs in ({"x": a, "y": b}, {"y": a, "x": b}, {"x": b, "y": a})]
    assert keys[0] == keys[1] != keys[2]


def test_a_golden_key() -> None:
    """Artifacts of earlier versions stay valid: the way keys are made must not change unnoticed."""
    assert stage("a", stage("b", y=[1, 2]), x=1).key.startswith(GOLDEN)


GOLDEN = "cbfed627b761"


def test_inputs_come_first_and_shared_ones_once() -> None:
    base = stage("base")
    left, right = stage("left", base), stage("right", base)
    assert [s.name for s in plan.ordered([left, right])] == ["base", "left", "right"]


def test_runs_once_then_is_cached(tmp_path: Path) -> None:
    store, log = Store.open(str(tmp_path)), tmp_path / "log"
    stages = plan.ordered([stage("top", stage("base", log=log), log=log)])
    assert [r.status for r in execute(stages, store)] == ["ran", "ran"]
    assert [r.status for r in execute(stages, store)] == ["cached", "cached"]
    assert log.read_text().split() == ["base", "top"]
    assert (store.local("top", stages[1].key) / "out.txt").read_text() == "topbase"


def test_a_failing_stage_leaves_nothing_that_counts(tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))

    def fail(work: Work) -> None:
        (work.directory / "half").write_text("half")
        raise RuntimeError("broken")

    bad = Stage("bad", 1, {}, fail)
    records: list[Record] = []
    with pytest.raises(RuntimeError, match="broken"):
        plan.run([bad], store, ScaleConfig(), Listener(), records)
    assert [r.status for r in records] == ["failed"]
    assert not store.has("bad", bad.key)
    assert not list(tmp_path.rglob("half"))


def slow(work: Work) -> None:
    with Path(os.environ["LOG"]).open("a") as file:
        file.write(f"{os.getpid()}\n")
    (work.directory / "half").write_text("half")
    work.store.write_text(f"work/slow/{work.stage.key}/part", "half")
    time.sleep(float(os.environ["SECONDS"]))
    assert work.store.read_text(f"work/slow/{work.stage.key}/part") == "half", "nobody else removes it"


def run_slow(root: str, log: Path, machine: str, seconds: float) -> None:
    """Run the stage. Machines have caches of their own, and on a bucket no lock of the kernel in common."""
    os.environ |= {"LOG": str(log), "SECONDS": str(seconds), "STEERLAB_CACHE": str(log.with_name(machine))}
    # So many looks that a living holder, which gives a sign of life ten times between two of them, is never taken for dead.
    claims.BEAT_S, claims.LOOK_S, claims.LOOKS = 0.05, 0.5, 8
    with log.with_name(f"{machine}.txt").open("w", buffering=1) as lines:
        listener = Listener(waiting=lambda stage, line: print(line, file=lines))
        plan.run([Stage("slow", 1, {}, slow)], Store.open(root), ScaleConfig(), listener, [])


@pytest.fixture(params=["local", pytest.param("s3", marks=pytest.mark.slow)])
def shared(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A ROOT that two machines share."""
    if request.param == "local":
        yield str(tmp_path / "root")
        return
    with s3_server.running() as server:
        yield server.root("root")


def started(root: str, log: Path, *machines: str, seconds: float = 1.0) -> list[BaseProcess]:
    context = multiprocessing.get_context("spawn")
    processes: list[BaseProcess] = [
        context.Process(target=run_slow, args=(root, log, machine, seconds)) for machine in machines
    ]
    for process in processes:
        process.start()
    return processes


def test_two_machines_run_a_shared_stage_once(shared: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = started(shared, log, "a", "b")
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0]
    (owner,) = log.read_text().split()
    said = [(tmp_path / f"{machine}.txt").read_text() for machine in "ab"]
    # The later one may have come when the first had ended already.
    assert all(line.endswith(f"process {owner}") for text in said for line in text.splitlines())


def test_a_killed_owner_is_replaced_by_one_who_waits(shared: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    (first,) = started(shared, log, "a", seconds=600)
    while not log.exists():
        time.sleep(0.02)
    (second,) = started(shared, log, "b")
    while not (tmp_path / "b.txt").exists() or "waits for" not in (tmp_path / "b.txt").read_text():
        time.sleep(0.02)
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    second.join(60)
    first.join()
    assert second.exitcode == 0
    assert len(log.read_text().split()) == 2
    assert Store(shared).has("slow", Stage("slow", 1, {}, slow).key)
    assert "its work is taken over" in (tmp_path / "b.txt").read_text()
