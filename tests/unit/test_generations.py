"""All that a model wrote is kept in one file, and every text is measured for whether it is still language."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from steerlab.cli import app
from steerlab.evaluation import TASKS
from steerlab.evaluation.asking import legibility
from steerlab.evaluation.statistics import generations, stored
from steerlab.evaluation.statistics.metrics import MAX_SAMPLES, Observation
from steerlab.evaluation.statistics.summaries import summarise_all
from steerlab.interactive.opened_run import Run
from steerlab.steered.generated_text import Generation
from steerlab.steered.language import SteeredModel
from steerlab.storage.store import Store

# Whether a text is still language


def naive_repetition(text: str) -> float:
    words = text.split()
    seen: list[tuple[str, ...]] = []
    repeated = 0
    for start in range(len(words) - 3):
        gram = tuple(words[start : start + 4])
        repeated += gram in seen
        seen.append(gram)
    return repeated / len(seen)


@pytest.mark.parametrize("text", ["a b c d", "a b c d a b c d", "the cow " * 20, "a b c d e a b c d e f"])
def test_repetition_is_the_share_of_4_grams_that_occurred_before(text: str) -> None:
    assert legibility.repetition(text) == pytest.approx(naive_repetition(text))


def test_repetition_of_known_texts() -> None:
    """Golden: eight words give five 4-grams; a loop of one word has one distinct 4-gram among n - 3."""
    assert legibility.repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert legibility.repetition("no " * 13) == pytest.approx(9 / 10)
    assert legibility.repetition("No no NO no no") == pytest.approx(1 / 2), "in any case"
    assert legibility.repetition("three words only") is None and legibility.repetition("") is None


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("ab c", 1.0),
        ("a, b", 2 / 3),
        ("\u0928\u092e\u0938\u094d\u0924\u0947", 1.0),
        ("\u4f60\u597d\u3002", 2 / 3),
        ("!?... \n", 0.0),
    ],
)  # Devanagari writes vowels with marks, which are no letters for str.isalpha
def test_letters_are_those_of_any_script(text: str, share: float) -> None:
    assert legibility.letters(text) == pytest.approx(share)


def test_answers_without_words_are_empty_and_count_for_nothing_else() -> None:
    answers = [Generation(" \n", 2, True), Generation("words without end and more of them", 512, False)]
    blank, text = ({o.metric: o for o in legibility.observe("t", "0", [answer], 0.5, "_x")} for answer in answers)
    assert {name: o.value for name, o in text.items()} == {
        "t/empty_x": 0.0, "t/repetition_x": 0.0, "t/letters_x": 1.0, "t/unfinished_x": 1.0
    }  # fmt: skip
    assert (blank["t/empty_x"].value, blank["t/unfinished_x"].value) == (1.0, 0.0)
    assert [blank[f"t/{name}_x"].weight for name in ("repetition", "letters")] == [0.0, 0.0]
    both = {o.metric: o.value for o in legibility.observe("t", "0", answers, 0.5)}
    assert (both["t/empty"], both["t/unfinished"], both["t/letters"]) == (0.5, 0.5, 1.0)


# The file


SAMPLES = [
    {"id": 3, "strength": 1.0, "prompt": "a", "output": "b", "score": 1, "is": True, "turns": [{"role": "user"}]},
    {"id": "x", "strength": 0, "prompt": "a", "output": "c", "score": 0.5, "is": None, "only": None},
]
OBSERVED = [
    Observation("t/rate", "3", 1.0, 1.0, 1.0),
    Observation("t/rate", "x", None, 1.0, 0.0),
    Observation("t/weighed", "x", 0.25, 0.0, 0.0),
    Observation("t/rate", "3", 0.0, 1.0, 0.0),
]


def test_every_row_has_its_text_and_its_verdicts_in_plain_columns(tmp_path: Path) -> None:
    pq.write_table(generations.table(SAMPLES, OBSERVED, {"task": {"task": "t"}}), tmp_path / "g.parquet")
    table = pq.read_table(tmp_path / "g.parquet")
    plain = (pa.string(), pa.float64(), pa.int64(), pa.bool_())
    assert all(column.type in plain for column in table.schema), "no struct, list or null type"
    rows = pandas.read_parquet(tmp_path / "g.parquet").astype(object).to_dict("records")
    assert [(r["id"], r["strength"], r["output"], r["score"]) for r in rows] == [("3", 1.0, "b", 1.0), ("x", 0.0, "c", 0.5)]
    assert json.loads(rows[0]["turns"]) == [{"role": "user"}]
    assert rows[0]["t/rate"] == 1.0, "the verdict at its own strength"
    assert pandas.isna(rows[1]["t/rate"]) and pandas.isna(rows[1]["t/weighed"]), "what does not count is no number"
    assert generations.about(table.schema) == {"task": {"task": "t"}}
    assert generations.about(pa.table({"text": ["a"]}).schema) == {}


def test_rows_without_the_patch_stand_beside_the_others_at_strength_0() -> None:
    steered = generations.table(SAMPLES[:1], [], {"task": "t"})
    both = generations.joined(steered, generations.table(SAMPLES[:1], OBSERVED, {}), 0.0)
    written = pq.read_table(io.BytesIO(generations.dumped(both)))
    assert written["strength"].to_pylist() == [1.0, 0.0] and written["t/rate"].to_pylist() == [None, 1.0]
    assert generations.about(written.schema) == {"task": "t"}


def test_pages_show_a_few_and_the_file_has_all(tiny_model, encoder, tmp_path: Path) -> None:
    model = SteeredModel(tiny_model, encoder)
    for task, num_shown in (("concept", MAX_SAMPLES), ("alpaca", 30)):
        fields = {"concept": {"concept": "cow", "words": ("cow",), "embedding_source": None, "samples": 30}}.get(
            task, {"limit": 30}
        )
        if task == "alpaca":
            fields |= {"source": "tiny:instructions/test"}
        config = TASKS[task].Config(max_new_tokens=3, **fields)
        result = TASKS[task].run(model, config)
        (tmp_path / task).mkdir()
        outcome = stored.Outcome(result.observations, result.samples, metrics={1.0: {}}, num_shown=result.num_shown)
        stored.write(tmp_path / task, outcome, {"task": config.model_dump(mode="json")})
        table = stored.written(tmp_path / task)
        assert len(table) == len(result.samples) == 30 and len(stored.samples(tmp_path / task)) == num_shown
        metric = f"{task}/empty"
        values = [value for value in table[metric].to_pylist() if value is not None]
        assert sum(values) / len(values) == pytest.approx(summarise_all(result)[1.0][metric].value)


# All texts of a run


def test_the_texts_of_all_tasks_are_one_table() -> None:
    """Columns of different types under one name, a task without prompts, and columns that only one task has."""
    sentiment = pa.table(
        {"id": ["0"], "strength": [1.0], "prompt": ["a"], "continuation": ["b"], "level": [3], "s/score": [0.5]}
    )
    attack = pa.table(
        {"id": ["0", "1"], "strength": [1.0, 0.5], "output": ["c", "d"], "level": ["x", None], "note": pa.nulls(2, pa.string())}
    )
    counted = pa.table({"id": ["0"], "strength": [1.0], "output": ["e"], "note": [2], "s/score": [1]})
    found = generations.stacked({"mood": sentiment, "struq": attack, "other": counted}).to_pandas()
    assert list(found.columns[:5]) == ["task", "id", "strength", "prompt", "text"]
    assert list(found.columns[5:]) == ["level", "s/score", "note"], (
        "the prompt and the text are not repeated under their own names"
    )
    assert found["task"].tolist() == ["mood", "struq", "struq", "other"]
    assert found["text"].tolist() == ["b", "c", "d", "e"] and found["strength"].tolist() == [1.0, 1.0, 0.5, 1.0]
    assert found["prompt"].tolist()[0] == "a" and found["prompt"].isna().tolist() == [False, True, True, True]
    assert found["level"].tolist()[:2] == ["3", "x"], "a number and a text are both texts"
    assert found["note"].dropna().tolist() == [2], "a column without a value takes any type"
    assert found["s/score"].dropna().tolist() == [0.5, 1.0]
    own = pa.table({"id": ["0"], "strength": [1.0], "text": ["given"], "output": ["answer"], "task": ["sum"]})
    (row,) = generations.stacked({"mine": own}).to_pylist()
    assert row == {
        "task": "mine",
        "id": "0",
        "strength": 1.0,
        "prompt": None,
        "text": "answer",
        "text_": "given",
        "task_": "sum",
    }
    names = ("t/empty", "t/empty_harmless", "lm_eval/said.empty", "t/emptyish", "empty", "t/x_empty")
    assert [generations.generated(pa.table({name: [1]})) for name in names] == [True, True, True, False, False, False]


def test_a_run_s_texts_in_one_file(tmp_path: Path) -> None:
    store, folder = Store.open(str(tmp_path)), "runs/a/1"
    for label, text in (("mood", "the cow"), ("struq", "the dog")):
        table = generations.table(
            [{"id": "0", "strength": 1.0, "output": text}],
            [Observation(f"{label}/empty", "0", 0.0)],
            {"task": {"task": label}},
        )
        store.write_bytes(f"{folder}/samples/{label}.parquet", generations.dumped(table))
    # Rows that a task scored are no texts of the model.
    scored = generations.table([{"id": "0", "strength": 1.0, "text": "the sea"}], [Observation("p/value", "0", 2.0)], {})
    store.write_bytes(f"{folder}/samples/perplexity.parquet", generations.dumped(scored))
    verdicts = generations.with_metadata(pa.table({"id": ["0"], "strength": [1.0]}), {"judged": "mood.parquet"})
    store.write_bytes(f"{folder}/samples/mood.sentiment.parquet", generations.dumped(verdicts))
    result = CliRunner().invoke(app, ["show", f"{tmp_path}/{folder}", "--texts", str(tmp_path / "all.parquet")])
    assert result.exit_code == 0 and "2 texts of 2 tasks" in result.output, result.output
    found = pandas.read_parquet(tmp_path / "all.parquet")
    assert found[["task", "text"]].values.tolist() == [["mood", "the cow"], ["struq", "the dog"]]
    assert Run(store, folder).texts().equals(found)
    store.write_bytes(f"{folder}/samples/mood.parquet", b"PAR1 nonsense")
    result = CliRunner().invoke(app, ["show", f"{tmp_path}/{folder}", "--texts", str(tmp_path / "all.parquet")])
    assert result.exit_code == 2 and "mood.parquet" in result.output and "Traceback" not in result.output, result.output
    result = CliRunner().invoke(app, ["show", f"{tmp_path}/runs/b/1", "--texts", str(tmp_path / "none.parquet")])
    assert result.exit_code == 2 and "has no texts" in result.output and not (tmp_path / "none.parquet").exists()
