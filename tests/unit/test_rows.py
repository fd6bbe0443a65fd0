"""The rows of a data set: filters, order, splits, and what is said when nothing is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steerlab.data import forms, rows, sources
from steerlab.job import DataSet


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.txt"
    lines = [f"{i}\t{score}\tReview {i}. It goes on." for i, score in enumerate([-3, -1, 0.5, 2, 3, -2.5])]
    path.write_text("\r\n".join(lines) + "\r\n")
    return path


def data(source: Path | list[str], **settings: Any) -> DataSet:
    where = [str(s) for s in source] if isinstance(source, list) else str(source)
    return DataSet.model_validate({"source": where, "format": "text", **settings})


def texts(found: DataSet) -> list[str]:
    return [row["text"] for row in rows.read(found)]


COLUMNS = {"columns": ["id", "score", "text"]}


def test_columns_filters_and_first_sentences(reviews: Path) -> None:
    assert texts(data(reviews, **COLUMNS, where={"score": [None, -2]})) == ["Review 0. It goes on.", "Review 5. It goes on."]
    assert texts(data(reviews, **COLUMNS, where={"score": [2, 2.5]}, first_sentence=True)) == ["Review 3."]
    assert texts(data(reviews, **COLUMNS, equals={"id": "4"})) == ["Review 4. It goes on."]


def test_a_first_sentence_ends_at_its_mark_and_not_in_a_number() -> None:
    wanted = data(Path("x"), first_sentence=True)
    found = [forms.formed({"text": text}, wanted) for text in ('It costs 3.50 here! "Really?" he said.', "no mark at all")]
    assert found == [{"text": "It costs 3.50 here!"}, {"text": "no mark at all"}]


def test_a_shuffle_is_one_order_and_splits_are_disjoint(reviews: Path) -> None:
    whole = texts(data(reviews, **COLUMNS, shuffle=1))
    assert whole != texts(data(reviews, **COLUMNS)) and sorted(whole) == sorted(texts(data(reviews, **COLUMNS)))
    assert texts(data(reviews, **COLUMNS, shuffle=1, limit=2)) + texts(data(reviews, **COLUMNS, shuffle=1, offset=2)) == whole


def test_equal_texts_are_kept_once_before_a_split(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a\nb\na\nc\nlonger\n")
    assert texts(data(path, distinct=True)) == ["a", "b", "c", "longer"]
    assert texts(data(path, distinct=True, offset=2, limit=1)) == ["c"]
    assert texts(data(path, min_chars=2)) == ["longer"]


def instructions(path: Path, rows: list[dict[str, Any]], **settings: Any) -> DataSet:
    path.write_text(json.dumps(rows))
    return DataSet.model_validate({"source": str(path), **settings})


def test_equal_prompts_are_kept_once_whatever_their_answers(tmp_path: Path) -> None:
    given = [("a", "", "1"), ("a", None, "2"), ("a", "x", "3"), ("b", "", "4"), ("c", "", "5")]
    found = [{"instruction": i, "input": x, "output": o} for i, x, o in given]
    kept = instructions(tmp_path / "a.json", found, distinct=True, offset=1, limit=2)
    assert [row["output"] for row in rows.read(kept)] == ["3", "4"]


def test_fields_get_other_names_before_anything_else(tmp_path: Path) -> None:
    found = [
        {"prompt": "burn it", "llama3_output": "no", "output": "take fire", "kind": 1, "context": None},
        {"prompt": "wash it", "llama3_output": "yes", "output": "take water", "kind": 2, "context": "the car"},
    ]
    names = {"prompt": "instruction", "llama3_output": "output", "context": "input", "kind": "class"}
    data = instructions(tmp_path / "a.json", found, rename=names, where={"class": [2, None]})
    assert rows.read(data) == [{"instruction": "wash it", "output": "yes", "class": 2, "input": "the car"}]
    rows.check(data)
    swapped = instructions(tmp_path / "a.json", found, rename={"prompt": "output", "output": "instruction"})
    assert rows.read(swapped)[0]["instruction"] == "take fire" and rows.read(swapped)[0]["output"] == "burn it"


def test_what_cannot_be_renamed_is_said(tmp_path: Path) -> None:
    found = [{"question": "q", "answer": "a"}]
    with pytest.raises(sources.SourceError, match=r"row 1 has no field 'qestion' \(it has: question, answer\)"):
        rows.check(instructions(tmp_path / "a.json", found, rename={"qestion": "instruction", "answer": "output"}))
    names = {"question": "instruction", "answer": "output", "kontext": "input"}
    with pytest.raises(ValueError, match=r"rename.kontext: a row of .* has no such field \(it has: question, answer\)"):
        rows.read(instructions(tmp_path / "a.json", found, rename=names))
    names = {"question": "instruction", "answer": "output"}
    with pytest.raises(ValueError, match=r"map.answer: .* has no such field after rename \(it has: instruction, output\)"):
        rows.read(instructions(tmp_path / "a.json", found, rename=names, map={"answer": {"a": "b"}}))
    with pytest.raises(ValueError, match="rename gives the name 'output' to two fields"):
        DataSet(source="a", rename={"question": "output", "answer": "output"})
    with pytest.raises(ValueError, match="rename removes the field 'output', which format instruction or a filter needs"):
        DataSet(source="a", rename={"output": "answer"})


def test_names_that_nobody_changes_leave_a_data_set_as_it_was() -> None:
    assert "rename" not in DataSet(source="a").model_dump()
    renamed = DataSet(source="a", rename={"question": "instruction"})
    assert DataSet.model_validate(renamed.model_dump()) == renamed


def test_several_sources_are_one_data_set_and_one_fingerprint(tmp_path: Path) -> None:
    first, second = tmp_path / "a.txt", tmp_path / "b.txt"
    first.write_text("a\n")
    second.write_text("b\n")
    both = data([str(first), str(second)])
    assert texts(both) == ["a", "b"]
    before = rows.fingerprint(both)
    second.write_text("c\n")
    assert rows.fingerprint(both) != before


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("tiny:topics/train", "tiny:topics/train"),
        ("hf:owner/name#train", "hf:owner/name#train"),
        ("sdist:a==1#data/x.json", "x.json"),
        ("sdist:a==1#b/c.tar.gz!d/e.txt", "e.txt"),
        (["wheel:a==1#b/x.txt", "wheel:a==1#b/y.txt"], "x.txt and 1 more"),
    ],
)
def test_a_data_set_in_a_few_words(source: Any, said: str) -> None:
    assert rows.describe(DataSet.model_validate({"source": source, "format": "text"})) == said


def test_what_is_wrong_is_said(reviews: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no rows remain; 6 were read, 0 pass the filters, offset is 0"):
        rows.read(data(reviews, **COLUMNS, where={"score": [9, None]}))
    with pytest.raises(ValueError, match=r"where.id: 'x' of .* is not a number"):
        other = tmp_path / "o.jsonl"
        other.write_text(json.dumps({"id": "x", "text": "t"}))
        rows.read(data(other, where={"id": [0, 1]}))
    with pytest.raises(sources.SourceError, match=r"line 1 has 3 tab-separated cells, not 2: id, text"):
        rows.read(data(reviews, columns=["id", "text"]))
    with pytest.raises(sources.SourceError, match=r"has no field 'review'"):
        rows.check(data(reviews, **COLUMNS, field="review"))


def test_a_file_inside_an_archive_inside_a_package() -> None:
    source = "sdist:vaderSentiment==3.3.2#additional_resources/hutto_ICWSM_2014.tar.gz!hutto_ICWSM_2014/{}"
    found = rows.read(data(Path("x")).model_copy(update={"source": source.format("movieReviewSnippets_GroundTruth.txt"), **{
        "columns": ("id", "score", "text"), "limit": 2}}))  # fmt: skip
    assert found[1]["score"].startswith("3.53") and "Lord of the Rings" in found[1]["text"]
    with pytest.raises(sources.SourceError, match=r"hutto_ICWSM_2014.tar.gz has no 'absent.txt'"):
        sources.fetch(source.split("!")[0] + "!absent.txt")


def test_rows_of_other_data_are_mixed_in_behind_the_own_ones(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"value": "do harm"}\n{"value": "do more harm"}\n')
    (tmp_path / "b.jsonl").write_text('{"instruction": "say hi", "output": "hi"}\n' * 3)
    own = {
        "source": str(tmp_path / "a.jsonl"),
        "rename": {"value": "instruction"},
        "fill": {"output": "no"},
        "loss_on": "response",
    }
    other = {"source": str(tmp_path / "b.jsonl"), "limit": 2, "loss_on": "response"}
    data = DataSet.model_validate({**own, "limit": 1, "also": [other]})
    rows.check(data)
    found = [(row["instruction"], row["output"]) for row in rows.read(data)]
    assert found == [("do harm", "no"), ("say hi", "hi"), ("say hi", "hi")]
    before = rows.fingerprint(data)
    (tmp_path / "b.jsonl").write_text('{"instruction": "say ho", "output": "ho"}\n' * 3)
    assert rows.fingerprint(data) != before
    with pytest.raises(ValueError, match=r"also: rows of format instruction with loss_on all do not go with"):
        DataSet.model_validate({**own, "also": [{**other, "loss_on": "all"}]})


def test_what_is_not_set_leaves_no_trace_in_keys() -> None:
    assert not {"rename", "fill", "also", "weight", "mixed_rows"} & set(
        DataSet(source="tiny:topics/train").model_dump(mode="json")
    )


def test_rows_mixed_into_a_tasks_data_set_are_part_of_its_key() -> None:
    from steerlab.evaluation import TASKS
    from steerlab.stages.evaluate import fingerprints

    prompts = {"source": "tiny:topics/test", "also": [{"source": "tiny:refusals/test"}]}
    task = TASKS["refusal"].Config.model_validate({"prompts": prompts})
    assert list(fingerprints(task)) == ["prompts.also.0.source", "prompts.source"]
