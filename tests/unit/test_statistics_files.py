"""What an evaluation stores and reads back, field by field; the objects that the page draws; ends and sizes of intervals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from steerlab.evaluation.statistics import generations, intervals, metrics, paired, sample_kinds, seeds, stored
from steerlab.evaluation.statistics.measures import Measure, likeness
from steerlab.evaluation.statistics.metrics import TOO_LONG, Observation, Result

MEASURES = {
    "a/rate": Measure("a/rate", "higher", "share", 0.0, 1.0, "mean"),
    "a/nats": Measure("a/nats", "lower", "nats", -2.0, None, "exp"),
    "a/ms": Measure("a/ms", None, "ms", None, 9.0, "median"),
}


def test_measures_are_read_back_as_they_were_written(tmp_path: Path) -> None:
    stored.write(tmp_path, stored.Outcome([], metrics={1.0: {}}, measures=MEASURES))
    assert stored.measures(tmp_path) == MEASURES
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert written["measures"]["a/ms"] == {"better": None, "unit": "ms", "low": None, "high": 9.0, "transform": "median"}
    # An older file holds the transform alone.
    (tmp_path / "metrics.json").write_text(json.dumps({"strengths": {"1": {}}, "transforms": {"a/ms": "median"}}))
    assert stored.measures(tmp_path) == {"a/ms": Measure("a/ms", None, transform="median")}


def test_files_share_folders_and_texts_keep_their_letters(tmp_path: Path) -> None:
    files = {"images/1.png": b"1", "images/2.png": b"2", "map.png": b"3"}
    samples = [{"id": "ä", "strength": 0.5, "text": "ein schöner Tag 你好"}, {"id": "b", "strength": 1, "text": "b"}]
    stored.write(tmp_path, stored.Outcome([], samples, files, {1.0: {}}, num_shown=1))
    assert {path: (tmp_path / "files" / path).read_bytes() for path in files} == files
    # People read the file as it is.
    assert "schöner Tag 你好" in (tmp_path / "samples.json").read_text(encoding="utf-8")
    assert len(stored.samples(tmp_path)) == 1 and stored.written(tmp_path).num_rows == 2


def test_columns_have_the_types_of_their_values() -> None:
    rows = [
        {"id": 7, "strength": 1, "share": 1, "flag": True, "text": None, "any": {"ä": [1]}, "n": None},
        {"id": "x", "strength": "none", "share": 0.5, "flag": None, "text": "é", "any": "plain", "n": 3},
    ]
    seen = [Observation("t/m", "7", 0.25, 1.0, 1.0), Observation("t/m", "x", 1.0, 0.0, 1.0)]
    table = generations.table(rows, seen, {"task": "t", "note": "ß"})
    types = {name: str(table.schema.field(name).type) for name in table.schema.names}
    assert types == {
        "id": "string", "strength": "double", "share": "double", "flag": "bool", "text": "string", "any": "string",
        "n": "int64", "t/m": "double",
    }  # fmt: skip
    assert table.to_pydict() == {
        "id": ["7", "x"], "strength": [1.0, None], "share": [1.0, 0.5], "flag": [True, None], "text": [None, "é"],
        "any": ['{"ä": [1]}', "plain"], "n": [None, 3], "t/m": [0.25, None],
    }  # fmt: skip
    assert generations.about(table.schema) == {"task": "t", "note": "ß"}
    assert generations.about(table.schema.remove_metadata()) == {}
    assert generations.about(table.schema.with_metadata({b"steerlab": b"[1]"})) == {}
    empty = generations.table([], [], {})
    assert empty.schema.names == ["id", "strength"] and empty.schema.field("id").type == pa.string()


def test_metadata_of_a_stranger_are_named_where_they_are_wrong() -> None:
    schema = pa.schema([("id", pa.string())]).with_metadata({b"steerlab": b"{"})
    with pytest.raises(ValueError, match="the metadata `steerlab` of the file"):
        generations.about(schema)


def test_rows_of_both_models_stand_in_one_table() -> None:
    steered = generations.table([{"id": "1", "strength": 1.0, "text": "a", "score": 1.0}], [], {"whose": "steered"})
    plain = generations.table([{"id": "1", "strength": 1.0, "text": "b", "score": None}], [], {"whose": "plain"})
    both = generations.joined(steered, plain, 0.0)
    assert both.to_pylist() == [
        {"id": "1", "strength": 1.0, "text": "a", "score": 1.0},
        {"id": "1", "strength": 0.0, "text": "b", "score": None},
    ]
    assert generations.about(both.schema) == {"whose": "steered"}


@pytest.mark.parametrize(
    ("first", "second", "kind", "values"),
    [
        (1.5, None, "double", [1.5, None]),
        (None, 1.5, "double", [None, 1.5]),
        (True, None, "bool", [True, None]),
        (None, None, "string", [None, None]),
        (1, 1.5, "double", [1.0, 1.5]),
        (1, "x", "string", ["1", "x"]),
        ("x", {"a": 1}, "string", ["x", '{"a": 1}']),
        ([1], 2.0, "string", ["[1]", "2.0"]),
        (True, 2, "string", ["true", "2"]),
    ],
)
def test_a_column_may_hold_other_values_with_the_patch_than_without(
    first: object, second: object, kind: str, values: Any
) -> None:
    """A score that every plain text lacks, for example."""
    tables = [generations.table([{"id": "1", "strength": 1.0, "score": score}], [], {}) for score in (first, second)]
    both = generations.joined(*tables, 0.0)
    assert str(both.schema.field("score").type) == kind and both["score"].to_pylist() == values
    generations.dumped(both)


def test_a_column_of_one_model_alone_is_null_for_the_other() -> None:
    both = generations.joined(
        generations.table([{"id": "1", "strength": 1.0, "a": 1}], [], {}),
        generations.table([{"id": "1", "strength": 1.0, "b": 2}], [], {}),
        0.0,
    )
    assert both.to_pydict() == {"id": ["1", "1"], "strength": [1.0, 0.0], "a": [1, None], "b": [None, 2]}


def test_objects_that_the_page_draws_have_exactly_these_fields() -> None:
    drawn = sample_kinds.heat_map("7", 0.5, ["a", "b"], [0.123456, None], unit="nats", title="of a")
    assert drawn == {
        "id": "7", "strength": 0.5, "kind": "tokens", "title": "of a", "unit": "nats", "tokens": ["a", "b"],
        "values": [0.1235, None],
    }  # fmt: skip
    counted = sample_kinds.histogram("7", 0.5, {"x": [0.0, 1.0], "y": [1.0], "none": []}, unit="nats", bins=2)
    assert counted == {
        "id": "7", "strength": 0.5, "kind": "histogram", "unit": "nats", "edges": [0.0, 0.5, 1.0],
        "groups": {"x": [0.5, 0.5], "y": [0.0, 1.0]}, "sizes": {"x": 2, "y": 1},
    }  # fmt: skip


def result(values: dict[str, float | None], weight: float = 1.0, **more: Any) -> Result:
    seen = [Observation("t/m", name, value, weight, 1.0) for name, value in values.items()]
    return Result(seen, [{"id": name, "strength": 1.0} for name in values], (Measure("m", "higher"),), **more)


def test_seeds_are_pooled_item_by_item() -> None:
    of_seeds = [result({"a": 1.0, "b": 0.0}, num_shown=3), result({"a": 0.0, "b": 0.0}, num_shown=3)]
    pooled = seeds.pooled(of_seeds)
    assert [(o.id, o.value, o.weight) for o in pooled.observations] == [("a", 0.5, 1.0), ("b", 0.0, 1.0)]
    assert pooled.num_shown == 3 and len(pooled.samples) == 4
    # An item whose condition never held keeps a value, of weight 0.
    (never,) = seeds.pooled([result({"a": 1.0}, weight=0.0), result({"a": 0.5}, weight=0.0)]).observations
    assert (never.value, never.weight) == (1.0, 0.0)
    (one,) = seeds.pooled([result({"a": None}, weight=0.0), result({"a": 0.5}, weight=0.0)]).observations
    assert (one.value, one.weight) == (0.5, 0.0)
    # A strength that one seed alone has: no spread, and no failure.
    apart = replace(of_seeds[1], observations=[o._replace(strength=2.0) for o in of_seeds[1].observations])
    assert {
        metric.seed_deviation for metrics in seeds.summarise([of_seeds[0], apart]).values() for metric in metrics.values()
    } == {None}
    deviations = seeds.summarise(of_seeds)[1.0]["t/m"].seed_deviation
    assert deviations == pytest.approx(np.std([0.5, 0.0], ddof=1))


def test_samples_say_which_seed_they_are_of() -> None:
    class Task:
        @staticmethod
        def run(model: object, config: Any) -> Result:
            return result({"a": float(config.seed)})

    class Config:
        seeds = (3, 5)

        def __init__(self, seed: int = 0) -> None:
            self.seed = seed

        def model_copy(self, update: dict[str, int]) -> Config:
            return Config(**update)

    ran: Any = seeds.run
    assert [sample["task_seed"] for one in ran(Task, None, Config()) for sample in one.samples] == [3, 5]


def test_ends_of_intervals_and_numbers_of_resamples() -> None:
    for n in (1, 3, 7, 50):
        assert intervals.wilson(1.0, n)[1] == 1.0 and intervals.wilson(0.0, n)[0] == 0.0
    # More items than a block holds rows for: the last block is shorter.
    blocks = list(intervals.resampled(300_000, 10, np.random.default_rng(0)))
    assert sum(len(block) for block in blocks) == 10 and len(blocks) == 2
    whole = np.random.default_rng(0).integers(0, 300_000, (10, 300_000))
    assert np.array_equal(np.concatenate(blocks), whole), "the numbers do not depend on the blocks"


def test_medians_leave_out_items_without_weight() -> None:
    weights = np.array([[1.0, 0.5, 1.0, 0.0]])
    values = np.array([[1.0, 2.0, 9.0, 100.0]])
    assert paired._medians(values * weights, weights) == pytest.approx([2.0])
    assert paired._medians((values * weights)[:, :3], weights[:, :3]) == pytest.approx([2.0])


def test_resamples_without_weight_of_both_runs_are_named() -> None:
    """Each run counts one item alone, and another one: most resamples hold only one of them."""
    a, b = ([Observation("t/m", str(i), 1.0, float(i == counts)) for i in range(2)] for counts in (0, 1))
    seed = next(seed for seed in range(50) if set(np.random.default_rng(seed).integers(0, 2, (1, 2))[0]) != {0, 1})
    with pytest.raises(ValueError, match="none of 1 resamples holds items with weight of both runs: of 2 shared items too few"):
        paired.paired_difference(a, b, num_resamples=1, seed=seed)
    assert paired.paired_difference(a, b, num_resamples=100).n == 2


def test_the_score_of_an_item_is_that_of_its_metric() -> None:
    """A value, a text that did not fit, one that could not be judged, and a metric that is missing."""
    own = [Observation("m/a", "0", 0.5), Observation("m/b", "0", None, reason=TOO_LONG), Observation("m/c", "0", None)]
    assert [metrics.score_of(own, f"m/{name}") for name in "abcd"] == [0.5, TOO_LONG, None, None]


def test_a_likeness_is_better_the_higher_it_is_unless_the_task_says_otherwise() -> None:
    assert (likeness("x").better, likeness("x", None).better, likeness("x").low, likeness("x").high) == (
        "higher",
        None,
        -1.0,
        1.0,
    )
