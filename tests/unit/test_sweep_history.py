"""What a sweep remembers: going on from its lines is as if it had never stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.optuna import OptunaSearch
from ray.tune.utils.object_cache import _ObjectCache

from steerlab.evaluation.statistics import stored
from steerlab.evaluation.statistics.intervals import student
from steerlab.evaluation.statistics.metrics import Observation
from steerlab.evaluation.statistics.paired import paired_difference
from steerlab.storage.store import Store
from steerlab.sweeps import differences, processes, results, search
from steerlab.sweeps.history import History
from steerlab.sweeps.space import Space
from steerlab.sweeps.units import Trial, Unit, trial_id


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "root"))


def unit(number: int, seeds: tuple[int, ...] = (0,), **params: Any) -> Unit:
    return Unit(number, (Trial(trial_id(params), params),), seeds)


def test_a_history_read_again_is_the_history_that_was_written(store: Store) -> None:
    written = History(store, "sweeps/a/1")
    written.add("begin", sweep="1", job="a")
    for number in range(1, 6):
        written.suggest(unit(number, lr=number / 10))
    for number in (1, 2, 3, 4):
        written.add("start", unit=number)
    written.add("finish", unit=2, score=0.5, rows=[{"trial_id": "x", "seed": 0}])
    written.add("fail", unit=1, reason="it broke")
    written.add("report", unit=3, step=2, value=1.5)
    written.add("prune", unit=3, reason="too bad")
    with (Path(store.root) / "sweeps/a/1/history.jsonl").open("a") as file:
        file.write('{"event": "finish", "unit": 5, "sc')  # the kill came in the middle of a line
    read = History(store, "sweeps/a/1")
    assert read.settled == written.settled == [2, 1, 3]
    assert [course.unit for course in read.courses.values()] == [course.unit for course in written.courses.values()]
    assert [course.status for course in read.courses.values()] == ["failed", "finished", "pruned", "pending", "pending"]
    assert [u.number for u in read.pending] == [4, 5] and read.courses[3].reports == [(2, 1.5)]
    read.add("finish", unit=5, score=0.1, rows=[])
    read.add("finish", unit=5, score=9.9, rows=[])  # a line too many changes nothing
    assert History(store, "sweeps/a/1").courses[5].score == 0.1
    lines = (Path(store.root) / "sweeps/a/1/history.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 5 + 4 + 4 + 1 + 2


def test_two_trials_of_one_name_are_refused(store: Store) -> None:
    history = History(store, "sweeps/a/1")
    history.suggest(unit(1, lr=0.1))
    history.suggest(unit(2, seeds=(1,), lr=0.1))
    with pytest.raises(ValueError, match=r"trial [0-9a-f]{8} is in the sweep already: {'lr': 0.1}"):
        history.suggest(unit(3, lr=0.1))


def optuna_space() -> Space:
    entries = {
        "train.lr": tune.loguniform(1e-4, 1e-1),
        "train.optimizer, train.momentum": tune.choice([["adam", 0.0], ["sgd", 0.9]]),
    }
    return Space(Path("space.py"), entries, "a/b", "min", OptunaSearch(seed=3))  # fmt: skip


def searched(store: Store, folder: str, num: int, *, forget: bool) -> list[dict[str, Any]]:
    """Search one unit after the other; with `forget` everything but the history is made anew each time."""
    suggester, history = search.Suggester(optuna_space(), "min", (), (0,), num), History(store, folder)
    while True:
        if forget:
            suggester, history = search.Suggester(optuna_space(), "min", (), (0,), num), History(store, folder)
        suggested = suggester.next(history)
        if suggested is None:
            return [course.unit.shared for course in history.courses.values()]
        history.suggest(suggested)
        score = abs(math.log(suggested.shared["train.lr"]) - math.log(3e-3)) + suggested.shared["train.momentum"]
        history.add("finish", unit=suggested.number, score=score, rows=[])


def test_optuna_goes_on_as_if_it_had_never_stopped_and_learns(store: Store) -> None:
    undisturbed = searched(store, "sweeps/a/1", 30, forget=False)
    assert undisturbed == searched(store, "sweeps/a/2", 30, forget=True)
    assert len({json.dumps(point) for point in undisturbed}) == 30
    late = [abs(math.log10(point["train.lr"] / 3e-3)) for point in undisturbed[15:]]
    early = [abs(math.log10(point["train.lr"] / 3e-3)) for point in undisturbed[:10]]
    assert np.median(late) < np.median(early), "TPE was told the scores"


def test_a_space_with_nothing_new_ends_the_search(store: Store) -> None:
    space = Space(Path("space.py"), {"method.learned": tune.choice([True, False])}, "a/b", "min", OptunaSearch(seed=0))
    history, suggester = History(store, "sweeps/a/1"), search.Suggester(space, "min", (0.5, 1.0), (0,), 10)
    while (suggested := suggester.next(history)) is not None:
        assert suggested.strengths == (0.5, 1.0)
        history.suggest(suggested)
    assert len(history.courses) == 2


def test_a_scheduler_that_is_shown_the_history_decides_as_before(store: Store) -> None:
    def scheduler() -> Any:
        return ASHAScheduler(time_attr="step", metric="eval/loss", mode="min", grace_period=2, max_t=16, reduction_factor=2)

    history = History(store, "sweeps/a/1")
    for number in range(1, 9):
        history.suggest(unit(number, lr=number / 10))
        for step in (2, 4, 8):
            history.add("report", unit=number, step=step, value=number / step)
        history.add("finish", unit=number, score=0.0, rows=[])

    def decision(of: Any, value: float) -> str:
        newcomer: Any = SimpleNamespace(trial_id="newcomer")
        of.on_trial_add(None, newcomer)
        return of.on_trial_result(None, newcomer, {"step": 2, "eval/loss": value})

    shown = scheduler()
    search.replay(shown, history)
    assert decision(shown, 3.9) == "STOP"
    assert decision(scheduler(), 3.9) == "CONTINUE", "without the history it is the first of its rung"
    shown = scheduler()
    search.replay(shown, history)
    assert decision(shown, 0.6) == "CONTINUE"


def evaluated(store: Store, key: str, values: list[float]) -> None:
    """Leave the artifact of an evaluation of task `math` with these item values at strength 1."""
    observations = [Observation("math/solved", str(i), value) for i, value in enumerate(values)]
    with store.temporary("evaluate", key) as directory:
        stored.write(directory, stored.Outcome(observations, metrics={1.0: {}}))
        store.commit("evaluate", key, directory, {})


def row(name: str, value: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    measured = {"metric.m/solved": value, "key.evaluate.m": name, "run": f"runs/{name}-{seed}"}
    return {"trial_id": name, "seed": seed, "status": "finished", **measured, **more}


def test_the_best_trial_and_those_that_items_do_not_tell_from_it(store: Store) -> None:
    rng = np.random.default_rng(0)
    hard = rng.random(200)
    items = {"a": (hard < 0.80), "b": (hard < 0.79), "c": (hard < 0.4), "d": (hard < 0.80) ^ (rng.random(200) < 0.02)}
    for name, values in items.items():
        evaluated(store, name, [float(value) for value in values])
    rows = [row(name, float(values.mean())) for name, values in items.items()]
    found = results.scored(rows, "m/solved")
    best = results.best_of(found, "max")
    assert best is not None and best.value == max(float(values.mean()) for values in items.values())
    others = [name for name in items if name != best.trial_id]

    def holds_zero(name: str) -> bool:
        sides = [[Observation("m", str(i), float(v)) for i, v in enumerate(items[n])] for n in (name, best.trial_id)]
        difference = paired_difference(*sides, num_resamples=2_000)
        return difference.low <= 0 <= difference.high

    close = differences.indistinguishable(found, best, "m/solved", store)
    assert close == [name for name in others if holds_zero(name)]
    assert "c" not in close and close, "one is far off, one differs in two items of a hundred"


def test_over_seeds_the_differences_of_equal_seeds_decide(store: Store) -> None:
    luck = {0: 0.0, 1: 0.3, 2: -0.2}
    rows = [row("a", 0.5 + luck[seed], seed) for seed in luck]
    rows += [row("b", 0.45 + luck[seed] + wobble, seed) for seed, wobble in zip(luck, (0.001, -0.001, 0.0), strict=True)]
    rows += [row("c", 0.5 + other, seed) for seed, other in zip(luck, (0.2, -0.25, 0.1), strict=True)]
    rows += [row("d", 0.9, 0), {**row("d", 0.9, 1), "status": "failed"}]
    found = results.scored(rows, "m/solved")
    assert [trial.trial_id for trial in found] == ["a", "b", "c"], "a trial with a failed seed is no candidate"
    best = results.best_of(found, "max")
    assert best is not None and best.trial_id == "a"
    values = np.array([0.5, 0.8, 0.3])
    assert (best.low, best.high) == student(float(values.mean()), float(values.std(ddof=1) / 3**0.5), 3)
    assert differences.indistinguishable(found, best, "m/solved", store) == ["c"]


def test_a_trial_out_of_bounds_is_not_the_best_and_equals_go_to_the_weakest() -> None:
    rows = [
        row("a", 0.1, within=False),
        row("b", 0.2, within=True, **{"param.strength": 1.0}),
        row("c", 0.2, within=True, **{"param.strength": 0.5}),
    ]
    best = results.best_of(results.scored(rows, "m/solved"), "min")
    assert best is not None and best.trial_id == "c"


def test_the_table_takes_values_of_any_kind(store: Store) -> None:
    rows = [
        {"trial_id": "a", "seed": 0, "param.x": 1, "param.y": [1, 2], "param.z": "one", "metric.m": 1, "cached.train": True},
        {"trial_id": "b", "seed": 0, "param.x": 0.5, "param.y": [3], "param.z": 2, "metric.m": None, "reason": "broke"},
    ]
    results.write_table(store, "sweeps/a/1/trials.parquet", rows)
    table = pq.read_table(Path(store.root) / "sweeps/a/1/trials.parquet")
    assert table.column_names[:3] == ["trial_id", "seed", "reason"]
    assert table.column("param.x").to_pylist() == [1.0, 0.5]
    assert table.column("param.y").to_pylist() == ["[1, 2]", "[3]"]
    assert table.column("param.z").to_pylist() == ["one", "2"]
    assert table.column("cached.train").to_pylist() == [True, None]


def test_idle_processes_stay_until_nothing_is_left_to_run() -> None:
    """Ray Tune keeps one; every trial that is shorter than an import would otherwise start a process."""
    kept, usual = processes._KeepAll(), _ObjectCache(may_keep_one=True)
    assert [kept.cache_object("1 CPU", name) for name in "ab"] == [True, True]
    assert [usual.cache_object("1 CPU", name) for name in "ab"] == [True, False]
    assert list(kept.flush_cached_objects()) == [] and kept.num_cached_objects == 2
    assert kept.pop_cached_object("1 CPU") == "a"
    assert list(kept.flush_cached_objects(force_all=True)) == ["b"] and kept.num_cached_objects == 0
