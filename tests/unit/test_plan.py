"""Keys, order and execution of plans, without Ray and without torch."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from steerlab.job import ScaleConfig
from steerlab.storage import plan
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
    with (work.directory.parent.parent / "log").open("a") as file:
        file.write(f"{os.getpid()}\n")
    (work.directory / "half").write_text("half")
    time.sleep(1.0)


def run_slow(root: str) -> None:
    execute([Stage("slow", 1, {}, slow)], Store.open(root))


def test_two_processes_run_a_shared_stage_once(tmp_path: Path) -> None:
    processes = [multiprocessing.get_context("spawn").Process(target=run_slow, args=(str(tmp_path),)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [p.exitcode for p in processes] == [0, 0]
    assert len((tmp_path / "log").read_text().split()) == 1


def test_a_killed_owner_is_replaced_by_one_who_waits(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    first, second = (context.Process(target=run_slow, args=(str(tmp_path),)) for _ in range(2))
    first.start()
    while not (tmp_path / "log").exists():
        time.sleep(0.02)
    second.start()
    assert first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    second.join(30)
    first.join()
    key = Stage("slow", 1, {}, slow).key
    assert second.exitcode == 0
    assert len((tmp_path / "log").read_text().split()) == 2
    assert Store(str(tmp_path)).has("slow", key)
