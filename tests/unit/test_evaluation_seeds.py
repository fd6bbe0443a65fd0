"""Several seeds of one task: a mean over seeds within each item, the interval over items, the spread between seeds."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
from pydantic import ValidationError

from steerlab.cli import terminal
from steerlab.evaluation.statistics import item_means, seeds
from steerlab.evaluation.statistics.measures import Measure, share
from steerlab.evaluation.statistics.metrics import Observation, Result, Task
from steerlab.evaluation.statistics.summaries import summarise, summarise_all
from steerlab.evaluation.tasks.attacks import injection, struq
from steerlab.job import TaskConfig
from steerlab.report import tables
from steerlab.stages import evaluate
from steerlab.steered.language import SteeredModel

VALUES = {1: [0.0, 1.0, 1.0, 0.0], 2: [1.0, 1.0, 0.0, 0.0], 3: [1.0, 1.0, 1.0, 0.0]}
"""Seed -> values of four items."""


def result(values: list[float | None], weights: list[float] | None = None, **more: Any) -> Result:
    weighted = zip(values, weights or [1.0] * len(values), strict=True)
    observations = [Observation("t/x", str(i), value, weight, **more) for i, (value, weight) in enumerate(weighted)]
    return Result(observations, [{"id": "0", "first": values[0]}], (share("x", "higher"),))


def task_of(values: dict[int, list[Any]]) -> Task[Any, Any]:
    return Task(TaskConfig, lambda model, config: result(values[config.seed]), lambda config: (Measure("x", None),))


def test_the_interval_is_over_items_and_the_deviation_between_seeds() -> None:
    results = seeds.run(task_of(VALUES), None, TaskConfig(task="t", seeds=(1, 2, 3)))
    found = seeds.summarise(results)[1.0]["t/x"]
    means = [2 / 3, 1.0, 2 / 3, 0.0]
    naive = summarise([Observation("t/x", str(i), value) for i, value in enumerate(means)], bounds=(0, 1), is_share=True)
    assert found[:6] == naive[:6] and found.n == 4, "four items, not twelve"
    assert found.value == pytest.approx(sum(map(sum, VALUES.values())) / 12)
    assert found.seed_deviation == pytest.approx(statistics.stdev([0.5, 0.5, 0.75]))
    together = summarise([o for one in results for o in one.observations])
    assert found.stderr is not None and together.stderr is not None and found.stderr > together.stderr


def test_one_seed_is_the_task_as_it_is() -> None:
    results = seeds.run(task_of(VALUES), None, TaskConfig(task="t", seed=2))
    assert len(results) == 1 and seeds.pooled(results) is results[0]
    assert seeds.summarise(results) == summarise_all(results[0])
    assert seeds.summarise(results)[1.0]["t/x"].seed_deviation is None


def test_a_conditional_share_adds_numerators_and_denominators() -> None:
    """SEP: an item weighs as much as its condition held, so the whole is sum w v / sum w over all seeds."""
    results = [result([1.0, 0.0, 1.0], [1, 1, 0]), result([1.0, 1.0, 0.0], [1, 0, 0])]
    found = seeds.summarise(results)[1.0]["t/x"]
    assert (found.value, found.n) == (pytest.approx(2 / 3), 2)
    assert [o.weight for o in seeds.pooled(results).observations] == [1.0, 0.5, 0.0]
    assert found.seed_deviation == pytest.approx(statistics.stdev([0.5, 1.0]))


def test_an_item_is_unparsable_only_if_no_seed_could_be_judged() -> None:
    results = [result([None, None, 1.0]), result([1.0, None, 0.0])]
    found = seeds.summarise(results)[1.0]["t/x"]
    assert (found.value, found.n, found.unparsable) == (0.75, 2, 1)
    long = [Observation("t/x", "0", None, reason="too_long"), Observation("t/x", "0", None)]
    assert summarise([item_means.mean(long)]).too_long == 1
    cut = [Observation("m", "0", 1.0), Observation("m", "0", 0.0, reason="cut")]
    assert (item_means.mean(cut).reason, item_means.mean(cut).value) == ("cut", 0.5)
    assert item_means.mean(cut[:1] * 2).reason is None
    one = seeds.summarise([result([None]), result([1.0])])[1.0]["t/x"]
    assert one.value == 1.0 and one.seed_deviation is None, "one seed has no spread"


def test_strengths_stay_apart_and_samples_of_all_seeds_are_kept() -> None:
    two = [Result([*result([v]).observations, *result([1 - v], strength=0.0).observations], [{"v": v}]) for v in (1.0, 0.0)]
    found = seeds.pooled(two)
    assert [(o.strength, o.value) for o in found.observations] == [(1.0, 0.5), (0.0, 0.5)]
    assert found.samples == [{"v": 1.0}, {"v": 0.0}]


def test_seeds_replace_the_seed_and_choose_the_rows_once() -> None:
    config = struq.Config(source="a.json", seeds=(43, 44))
    assert (config.seed, config.rows_seed) == (43, 43)
    assert config.model_copy(update={"seed": 44}).rows_seed == 43
    assert struq.Config.model_validate(config.model_dump(mode="json")) == config
    assert struq.Config(source="a.json").rows_seed == 42 and "seeds" not in struq.Config(source="a.json").model_dump()
    for wrong, said in (
        ({"seed": 7, "seeds": [1, 2]}, "seed 7: the task is run with `seeds`"),
        ({"seeds": [1, 1]}, "a repeated seed"),
    ):
        with pytest.raises(ValidationError, match=said):
            struq.Config.model_validate({"source": "a.json", **wrong})


def test_a_task_runs_on_the_same_rows_with_every_seed_and_draws_anew(tiny_model: Any, encoder: Any) -> None:
    """Of 40 rows 6 are chosen by the first seed; the answers are sampled, and the sentences drawn, by each."""
    fields: dict[str, Any] = {
        "source": "tiny:instructions/test",
        "witness": "moo",
        "injection": "moo !",
        "attacks": ("ignore",),
    }
    fields |= {"limit": 6, "max_new_tokens": 4, "temperature": 1.0}
    model = SteeredModel(tiny_model, encoder)
    config = injection.Config(**fields, seeds=(5, 6))
    results = seeds.run(injection.TASK, model, config)
    rows = [{o.id for o in one.observations} for one in results]
    assert rows[0] == rows[1] and len(rows[0]) == 6
    assert results[0].observations == injection.TASK.run(model, injection.Config(**fields, seed=5)).observations
    assert [s["data"] for s in results[0].samples] != [s["data"] for s in results[1].samples]
    assert seeds.summarise(results)[1.0]["injection/asr"].n == 6


def test_the_stage_stores_the_deviation_and_one_row_for_each_item(tiny_model: Any, encoder: Any, tmp_path: Any) -> None:
    config: dict[str, Any] = {"task": "struq", "source": "tiny:instructions/test", "witness": "e", "attacks": ["naive"]}
    config |= {
        "injection": "moo",
        "positions": ["end"],
        "limit": 3,
        "max_new_tokens": 3,
        "temperature": 1.0,
        "seeds": [5, 6, 7],
    }
    evaluate.stored.write(tmp_path, evaluate._outcome(SteeredModel(tiny_model, encoder), config))
    metric = evaluate.stored.strengths(tmp_path)[1.0]["struq/asr_id"]
    assert metric["n"] == 3 and metric["seed_deviation"] is not None
    stored = [o for o in evaluate.stored.observations(tmp_path, 1.0) if o.metric == "struq/asr_id"]
    assert len({o.id for o in stored}) == len(stored) == 3
    assert sum(o.value or 0.0 for o in stored) / 3 == pytest.approx(metric["value"])


def test_tables_say_the_spread_between_seeds() -> None:
    metric: Any = summarise(result([0.0, 1.0]).observations)._replace(seed_deviation=0.0125)._asdict()
    assert "(2, seeds ±0.0125)" in terminal.cell(metric) and "(seeds ±0.0125)" in tables.cell(metric)
    assert "seeds" not in terminal.cell(metric | {"seed_deviation": None})


def test_seeds_that_change_nothing_are_warned_of() -> None:
    def outcome(*deviations: float | None) -> Any:
        metrics = {1.0: {str(i): {"seed_deviation": one} for i, one in enumerate(deviations)}}
        return evaluate.stored.Outcome([], metrics=metrics)

    with pytest.warns(UserWarning, match="task a gave the same numbers with each of its seeds"):
        evaluate._warn_of_equal_seeds("a", outcome(0.0, None))
    evaluate._warn_of_equal_seeds("a", outcome(0.0, 0.1))
    evaluate._warn_of_equal_seeds("a", outcome(None))
