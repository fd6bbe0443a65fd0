"""Data sets mixed by weights: exact counts, which rows, and that the rows of a step depend on data, seed and step alone."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from steerlab import job
from steerlab.cli import app
from steerlab.data import mixing, rows
from steerlab.job import DataSet
from steerlab.stages import JobType
from steerlab.training.schedule import rows_of_step


@pytest.fixture
def mixture(tmp_path: Path) -> Any:
    """A function (sizes, weights, **fields) -> a data set that mixes files of these sizes."""

    def made(sizes: list[int], weights: list[float], **fields: Any) -> DataSet:
        parts = []
        for number, (size, weight) in enumerate(zip(sizes, weights, strict=True)):
            path = tmp_path / f"{'abc'[number]}.jsonl"
            path.write_text("".join(json.dumps({"text": f"{'abc'[number]} {i}"}) + "\n" for i in range(size)))
            parts.append({"source": str(path), "format": "text", "weight": weight})
        return DataSet.model_validate({**parts[0], "also": parts[1:], **fields})

    return made


def texts(data: DataSet) -> list[str]:
    return [str(row["text"]) for row in rows.read(data)]


def test_the_largest_mixture_without_repetition_has_the_exact_shares(mixture: Any) -> None:
    data = mixture([900, 400], [0.9, 0.1])
    found = texts(data)
    assert found == [f"a {i}" for i in range(900)] + [f"b {i}" for i in range(100)]
    assert {name: str(portion) for name, portion in rows.portions(data).items()} == {
        "a.jsonl": "900 of 900 rows", "b.jsonl": "100 of 400 rows",
    }  # fmt: skip
    rows.check(data)


@pytest.mark.parametrize("total", [1, 2, 7, 10, 99, 1000])
@pytest.mark.parametrize("weights", [[1, 1, 1], [0.5, 0.3, 0.2], [7, 2, 1]], ids=str)
def test_counts_add_up_and_are_less_than_a_row_off(weights: list[float], total: int) -> None:
    shares = [weight / sum(weights) for weight in weights]
    try:
        found = mixing.portions([50, 50, 50], weights, total)
    except ValueError as error:
        assert total < 10 and "has no room for the data set of weight" in str(error)
        return
    assert sum(portion.taken for portion in found) == total
    assert all(abs(portion.taken - share * total) < 1 for portion, share in zip(found, shares, strict=True))


def test_the_largest_mixture_cannot_be_larger() -> None:
    """Against a search over all totals: no total above the chosen one fits into the sizes."""
    for sizes, weights in (([10, 3, 8], [3.0, 1.0, 2.0]), ([7, 7], [0.7, 0.3]), ([100, 9], [0.9, 0.1]), ([5, 5], [1.0, 1.0])):
        found = mixing.portions(sizes, weights, None)
        assert all(portion.taken <= portion.size for portion in found)
        for more in range(1, 30):
            larger = mixing.portions(sizes, weights, sum(portion.taken for portion in found) + more)
            exact = [w / sum(weights) * (sum(portion.taken for portion in found) + more) for w in weights]
            assert any(portion.taken > size or share > size for portion, size, share in zip(larger, sizes, exact, strict=True))


def test_a_small_part_begins_again_in_a_larger_mixture(mixture: Any) -> None:
    data = mixture([8, 3], [0.5, 0.5], mixed_rows=16)
    counts = Counter(texts(data))
    assert counts == {**{f"a {i}": 1 for i in range(8)}, "b 0": 3, "b 1": 3, "b 2": 2}
    assert str(rows.portions(data)["b.jsonl"]) == "8 rows, each of its 3 up to 3 times"


def test_rows_of_a_step_are_a_function_of_data_seed_and_step(mixture: Any) -> None:
    """An epoch has the exact shares, in whatever steps it is taken, and reading again gives the same rows."""
    data = mixture([90, 40], [0.9, 0.1])
    read, again = texts(data), texts(data)
    assert read == again and len(read) == 100
    epoch = [read[i] for step in range(25) for i in rows_of_step(len(read), 4, seed=5, step=step)]
    assert Counter(text[0] for text in epoch) == {"a": 90, "b": 10}
    assert [read[i] for i in rows_of_step(100, 4, seed=5, step=9)] == epoch[36:40]


def test_weights_that_say_nothing_are_refused(mixture: Any) -> None:
    one = {"source": "tiny:topics/train", "format": "text"}
    for match, fields in (
        (r"weight: also\.1 has no weight", {"weight": 1, "also": [{**one, "weight": 1}, one]}),
        (r"weight: this data set has no weight", {"also": [{**one, "weight": 1}]}),
        (r"cannot be a mixture itself", {"weight": 1, "also": [{**one, "weight": 1, "also": [{**one, "weight": 1}]}]}),
        (r"mixed_rows applies to a mixture", {"mixed_rows": 5, "also": [one]}),
        (r"greater than 0", {"weight": 0, "also": [{**one, "weight": 1}]}),
    ):
        with pytest.raises(ValueError, match=match):
            DataSet.model_validate({**one, **fields})
    with pytest.raises(ValueError, match=r"mixture of 5 rows has no room for the data set of weight 1 \(weights 99, 1\)"):
        rows.read(mixture([9, 9], [99, 1], mixed_rows=5))
    tree = {
        "name": "a",
        "model": {"source": "tiny:model"},
        "method": {"name": "vanilla"},
        "data": {"train": {**one, "weight": 2}},
    }
    with pytest.raises(job.JobError, match=r"train.weight 2: there is no other data set to mix with"):
        job.validate(tree, JobType, Path("a.yaml"))


@pytest.mark.parametrize(
    ("sizes", "weights", "fields", "said"),
    [
        ([50, 50], [0.99, 0.01], {"mixed_rows": 20}, "a mixture of 20 rows has no room for the data set of weight 0.01"),
        ([5, 500], [0.999, 0.001], {}, "a mixture of 5 rows has no room"),
        ([50, 50], [0.9, 0.1], {"mixed_rows": 20}, None),
    ],
)
def test_a_mixture_without_room_for_a_part_is_refused_before_the_start(
    mixture: Any, sizes: list[int], weights: list[float], fields: dict[str, Any], said: str | None
) -> None:
    data = mixture(sizes, weights, **fields)
    for _ in range(2):  # what was refused once is refused again
        with nullcontext() if said is None else pytest.raises(ValueError, match=said):
            rows.check(data)
    # Of rows that are made here the number is not counted.
    made = {"source": "tiny:texts/train", "format": "text", "weight": weights[0]}
    also = [{"source": "tiny:topics/train", "format": "text", "weight": weights[1]}]
    generated = DataSet.model_validate({**made, "also": also, **fields})
    with nullcontext() if said is None or not fields else pytest.raises(ValueError, match=said):
        rows.check(generated)


def test_the_plan_states_the_counts(mixture: Any, tmp_path: Path) -> None:
    data = mixture([90, 40], [0.9, 0.1]).model_dump(mode="json", exclude_unset=True)
    tree = {"name": "a", "model": {"source": "tiny:model"}, "method": {"name": "vanilla"}, "data": {"train": data}}
    (tmp_path / "a.yaml").write_text(json.dumps({**tree, "train": {"steps": 1, "max_tokens": 16}}))
    result = CliRunner().invoke(app, ["plan", str(tmp_path / "a.yaml"), "--root", str(tmp_path / "root")])
    assert result.exit_code == 0, result.output
    assert "data.train mixes a.jsonl: 90 of 90 rows; b.jsonl: 10 of 40 rows" in result.output
