"""Rows in the form of their format: texts, nested fields, filters by value, composed rows, conversations, pairs."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from steerlab.data import pairs, rows
from steerlab.data.sources import SourceError
from steerlab.evaluation.asking.items import instruction_rows
from steerlab.evaluation.tasks.ability import perplexity
from steerlab.job import DataSet
from steerlab.stages.extract import text_sha256
from steerlab.stages.spread.shard_plan import planned


@pytest.fixture
def read(tmp_path: Path) -> Any:
    def of(given: list[Any], data_format: str = "instruction", **settings: Any) -> list[dict[str, Any]]:
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in given))
        data = DataSet.model_validate({"source": str(path), "format": data_format, **settings})
        rows.check(data)
        return rows.read(DataSet.model_validate(json.loads(data.model_dump_json())))

    return of


# Texts


@pytest.mark.parametrize(
    ("row", "data_format", "message"),
    [
        (
            {"instruction": "a", "output": ["x", "y"]},
            "instruction",
            r"row 2: field 'output' is a list \(\['x', 'y'\]\), not a text",
        ),
        ({"instruction": "a", "output": float("nan")}, "instruction", r"row 2 has nothing in its field 'output' \(NaN\)"),
        ({"instruction": {"x": 1}, "output": "b"}, "instruction", "row 2: field 'instruction' is an object"),
        ({"instruction": "a", "output": "b", "input": ["c"]}, "instruction", "row 2: input is a list"),
        ({"instruction": "a", "output": "b", "system": 3}, "instruction", "row 2: system is a number"),
        (
            {"instruction": "a", "output": 7},
            "instruction",
            r"row 2: field 'output' is a number \(7\), not a text; as_text: \[output\] takes",
        ),
        ({"text": "tired \ud83d"}, "text", r"row 2: field 'text' holds half of a character \(\\ud83d alone\)"),
        ({"text": {"text": "x"}}, "text", "row 2: field 'text' is an object"),
        ({"prompt": "p", "chosen": "c \ud83d", "rejected": "r"}, "preference", "row 2: chosen holds half of a character"),
        (
            {"prompt": {"text": "p"}, "chosen": "c", "rejected": "r"},
            "preference",
            "row 2: prompt is neither a text nor a list of mes",
        ),
        (
            {"messages": [{"role": "assistant", "content": 3}]},
            "conversation",
            r"row 2: messages\.0\.content is a number \(3\), not a",
        ),
        ({"messages": "hello"}, "conversation", r"row 2: messages is a text \('hello'\), neither a list of messages nor turns"),
        ({"messages": ["hello"]}, "conversation", r"row 2: messages\.0 is a text \('hello'\), not a message"),
    ],
)
def test_what_is_no_text_is_refused_before_the_start_with_row_and_field(
    read: Any, row: dict[str, Any], data_format: str, message: str
) -> None:
    fine = {"instruction": "i", "output": "o", "text": "t", "prompt": "p", "chosen": "c", "rejected": "r"}
    fine["messages"] = "\n\nHuman: a\n\nAssistant: b"
    with pytest.raises(SourceError, match=rf"rows\.jsonl {message}") as caught:
        read([fine, row], data_format)
    assert "skip_bad" in str(caught.value)
    with pytest.warns(UserWarning, match="1 of 2 rows are"):
        assert len(read([fine, row], data_format, skip_bad=True)) == 1


@pytest.mark.parametrize(
    ("row", "named"),
    [({"messages": []}, ""), ({"conversations": [{"from": "human", "value": "hi"}]}, "conversation"),
     ({"prompt": "p", "messages": [{}], "chosen": "c", "rejected": "r"}, "preference")],
)  # fmt: skip
def test_rows_of_another_format_are_recognised(read: Any, row: dict[str, Any], named: str) -> None:
    with pytest.raises(SourceError, match=r"row 1 has no field 'instruction'") as caught:
        read([row, row])
    assert (f"format: {named} reads such rows" in str(caught.value)) is bool(named)


def test_numbers_are_texts_where_the_job_says_so(read: Any) -> None:
    given = [{"instruction": "2 + 2", "output": 4, "input": 1.5}, {"instruction": "true?", "output": True}]
    found = read(given, as_text=["output", "input"])
    assert [(row["output"], row.get("input")) for row in found] == [("4", "1.5"), ("true", None)]
    assert [row["text"] for row in read([{"n": {"m": 5}}], "text", field="n.m", as_text=["n.m"])] == ["5"]


def test_nothing_in_an_optional_field_is_no_data(read: Any) -> None:
    given = [{"instruction": "a", "output": "b", "input": value} for value in (None, float("nan"), "", "c")]
    assert [row["input"] for row in read(given)] == [None, None, "", "c"]
    assert [row["input"] for row in read(given, needs_input=True)] == ["c"]


def test_system_and_history_are_there_only_where_they_hold_something(read: Any) -> None:
    given = [
        {"instruction": "a", "output": "b", "system": "Be kind.", "history": [["u", "v"], ["w", "x"]]},
        {"instruction": "a", "output": "b", "system": "", "history": []},
        {"instruction": "a", "output": "b", "system": None, "history": None},
    ]
    found = read(given)
    assert found[0]["system"] == "Be kind." and found[0]["history"] == [["u", "v"], ["w", "x"]]
    assert not {"system", "history"} & (found[1].keys() | found[2].keys())
    assert len(read(given, distinct=True)) == 2, "another system text makes another prompt"
    for history in (["u"], [["u"]], [["u", 3]], "u"):
        with pytest.raises(SourceError, match=r"row 1: history.* is .*not "):
            read([{"instruction": "a", "output": "b", "history": history}])


def test_texts_of_a_tasks_own_source_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps([{"instruction": "a", "output": ["x"]}]))
    with pytest.raises(SourceError, match=r"a\.json row 1: field 'output' is a list"):
        instruction_rows(str(path), needs_input=False, offset=0, limit=None, seed=0)
    path.write_text(json.dumps([{"text": {"x": 1}}]))
    with pytest.raises(SourceError, match=r"a\.json row 1: field 'text' is an object"):
        perplexity._rows(perplexity.Config(source=str(path), format="text"))


# Nested fields and filters


def test_nested_fields_go_by_their_paths_everywhere(read: Any) -> None:
    given = [
        {"qas": {"q": "Q1", "a": ["one"]}, "meta": {"level": 1, "ok": True}},
        {"qas": {"q": "Q2", "a": ["two"]}, "meta": {"level": 2, "ok": False}},
        {"qas": {"q": "Q3", "a": ["three"]}, "meta": None},
    ]
    names = {"qas.q": "instruction", "qas.a.0": "output"}
    assert [row["output"] for row in read(given, rename=names)] == ["one", "two", "three"]
    assert [row["output"] for row in read(given, rename=names, where={"meta.level": [2, None]})] == ["two"]
    assert [row["output"] for row in read(given, rename=names, equals={"meta.ok": True})] == ["one"]
    made = {"compose": {"instruction": "{qas.q}", "output": "{meta.level}"}, "map": {"meta.level": {1: "low", 2: "high"}}}
    composed = read(given, where={"meta.level": [0, None]}, **made)
    assert [(row["instruction"], row["output"]) for row in composed] == [("Q1", "low"), ("Q2", "high")]
    with pytest.raises(SourceError, match=r"row 1 has no field 'qas.b' \(it has: qas.q, qas.a, meta.level, meta.ok\)"):
        read(given, rename={"qas.b": "instruction", "qas.a.0": "output"})


SCORES = [
    {"text": "a", "toxicity": 0.9, "keep": True, "label": 1},
    {"text": "b", "toxicity": float("nan"), "keep": False, "label": 1.0},
    {"text": "c", "toxicity": None, "keep": None, "label": "1"},
    {"text": "d", "keep": "True", "label": 2},
    {"text": "e", "toxicity": "0.6", "keep": 1, "label": None},
    {"text": "f", "toxicity": "", "keep": "no", "label": True},
]


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"where": {"toxicity": [0.5, None]}}, "ae"),
        ({"where": {"toxicity": [None, None]}}, "ae"),
        ({"equals": {"label": 1}}, "abc"),
        ({"equals": {"label": "1"}}, "abc"),
        ({"equals": {"keep": True}}, "ad"),
        ({"equals": {"keep": False}}, "bf"),
        ({"equals": {"keep": 1}}, "e"),
        ({"equals": {"label": True}}, "f"),
        ({"equals": {"keep": True, "label": 2}}, "d"),
        ({"equals": {"toxicity": None}}, "bcd"),
    ],
)
def test_filters_compare_values(read: Any, settings: dict[str, Any], kept: str) -> None:
    assert "".join(row["text"] for row in read(SCORES, "text", **settings)) == kept


def test_what_a_filter_cannot_compare_is_named(read: Any) -> None:
    given = [{"text": "a", "t": 1}, {"text": "b", "t": [1]}]
    with pytest.raises(SourceError, match=r"row 2: where.t: a list \(\[1\]\) of the row is not a number"):
        read(given, "text", where={"t": [0, 2]})
    with pytest.raises(SourceError, match=r"row 2: equals.t is a list \(\[1\]\), which cannot be compared"):
        read(given, "text", equals={"t": 1})
    booleans = [{"text": "a", "t": True}, {"text": "b", "t": False}]
    assert [row["text"] for row in read(booleans, "text", where={"t": [1, 2]})] == ["a"]
    with pytest.raises(ValueError, match=r"where.s: a row of .* has no such field \(it has: text, t\)"):
        read(given, "text", where={"s": [0, 2]})


def test_rows_that_a_filter_leaves_out_need_no_form(read: Any) -> None:
    given = [{"kind": "chat", "x": 1}, {"kind": "qa", "instruction": "a", "output": "b"}]
    assert len(read(given, equals={"kind": "qa"})) == 1


def test_a_fields_first_row_may_lack_it(read: Any) -> None:
    given = [{"q": "a", "output": "b"}, {"q": "a", "output": "b", "context": "c", "score": 3}]
    assert [row.get("input") for row in read(given, rename={"q": "instruction", "context": "input"})] == [None, "c"]
    assert len(read(given, rename={"q": "instruction"}, where={"score": [1, None]})) == 1


# Composed rows


def test_a_multiple_choice_set_becomes_instructions(read: Any) -> None:
    given = [{"question": "2 + 2?", "choices": ["3", "4"], "answer": 1}, {"question": "1?", "choices": ["1", "0"], "answer": 0}]
    settings = {"compose": {"instruction": "{question}\n{choices}", "output": "{answer}"}, "map": {"answer": {0: "A", 1: "B"}}}
    found = read(given, **settings)
    assert [(row["instruction"], row["output"]) for row in found] == [
        ("2 + 2?\nA. 3\nB. 4", "B"),
        ("1?\nA. 1\nB. 0", "A"),
    ]
    with pytest.raises(SourceError, match=r"row 1: map.answer: a number \(2\) is not one of 0, 1"):
        read([{**given[0], "answer": 2}], **settings)
    with pytest.raises(SourceError, match=r"row 1: compose.output: answer is null, not a text"):
        read([{**given[0], "answer": None}], **settings)
    with pytest.raises(SourceError, match=r"row 1: compose.instruction: has no field 'choices' \(it has: question, answer\)"):
        read([{"question": "1?", "answer": 0}], **settings)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([0, 1], {0: "negative", 1: "positive"}),
        (["0", "1"], {0: "negative", 1: "positive"}),
        ([0.0, 1.0], {"0": "negative", "1": "positive"}),
        ([False, True], {False: "negative", True: "positive"}),
        (["no", "Yes"], {False: "negative", True: "positive"}),
        (["neg", "pos"], {"neg": "negative", "pos": "positive"}),
    ],
)
def test_labels_go_by_names(read: Any, labels: list[Any], names: dict[Any, str]) -> None:
    given = [{"text": f"t{i}", "label": label} for i, label in enumerate(labels)]
    settings = {
        "rename": {"text": "input", "label": "output"},
        "fill": {"instruction": "Good or bad?"},
        "map": {"output": names},
    }
    assert [row["output"] for row in read(given, **settings, needs_input=True)] == ["negative", "positive"]


def test_templates_are_checked_with_the_job() -> None:
    with pytest.raises(ValidationError, match="braces without a plain field name"):
        DataSet(source="a", compose={"instruction": "{}"})
    with pytest.raises(ValidationError, match="compose and fill both make the field 'output'"):
        DataSet(source="a", compose={"output": "{a}"}, fill={"output": "b"})


def test_new_settings_leave_no_trace_in_keys_where_they_are_not_set() -> None:
    new = {"rows_at", "map", "compose", "as_text"}
    assert not new & DataSet(source="a", equals={"label": "1"}).model_dump(mode="json").keys()
    assert DataSet(source="a", equals={"label": "1"}).model_dump(mode="json")["equals"] == {"label": "1"}
    data = DataSet.model_validate({"source": "a", "equals": {"a": True, "b": 1, "c": 1.5}, "map": {"a": {0: "x", True: "y"}}})
    assert DataSet.model_validate(json.loads(data.model_dump_json())) == data
    assert list(data.map["a"]) == ["0", "true"]


class _Place:
    """Keeps what is planned."""

    plan: Any = None

    def write_texts(self, number: int, texts: str) -> None:
        self.written = json.loads(texts)


@pytest.mark.parametrize(
    ("row", "data_format", "kept"),
    [
        ({"instruction": "a", "output": "b", "id": 1}, "instruction", ["instruction", "input", "output"]),
        ({"instruction": "a", "output": "b", "system": "s", "history": [["u", "v"]]}, "instruction",
         ["instruction", "input", "output", "system", "history"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference", ["prompt", "chosen", "rejected"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "input": "i"}, "preference", [*pairs.FIELDS, "input"]),
        ({"prompt": "a", "completion": "b"}, "conversation", ["messages"]),
    ],
)  # fmt: skip
def test_all_that_a_text_is_made_from_goes_into_the_shards(
    tmp_path: Path, row: dict[str, Any], data_format: str, kept: list[str]
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    place: Any = _Place()
    planned(place, DataSet.model_validate({"source": str(tmp_path / "a.jsonl"), "format": data_format}), 8)
    assert [list(text) for text in place.written] == [kept]


def test_the_hash_of_a_text_follows_its_system_text_and_its_turns() -> None:
    row = {"instruction": "a", "input": None, "output": "b"}
    found = [
        text_sha256(given) for given in (row, {**row, "system": "s"}, {**row, "history": [["u", "v"]]}, {"messages": [HI, HO]})
    ]
    assert len(set(found)) == 4 and text_sha256({"messages": [HI, says("assistant", "no")]}) not in found


# Conversations


def says(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


HI, HO = says("user", "hi"), says("assistant", "ho")


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [says("system", "s"), HI, HO, HI, HO]}, [says("system", "s"), HI, HO, HI, HO]),
        ({"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}, [HI, HO]),
        ({"messages": None, "conversation": [says("User", "hi"), says("model", "ho")]}, [HI, HO]),
        ({"prompt": "hi", "completion": "ho"}, [HI, HO]),
        ({"prompt": [HI], "completion": [HO], "messages": []}, [HI, HO]),
        ({"prompt": [HI], "completion": HO}, [HI, HO]),
        ({"system": "s", "messages": [HI, HO]}, [says("system", "s"), HI, HO]),
        ({"messages": [says("developer", "s"), HI, HO], "system": ""}, [says("system", "s"), HI, HO]),
        ({"messages": "\n\nHuman: hi\n\nAssistant: ho"}, [HI, HO]),
        ({"messages": [says("user", [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]), HO]}, [HI, HO]),
        (
            {"conversations": [
                {"from": "human", "value": "hi"}, {"from": "function_call", "value": "{}"},
                {"from": "observation", "value": "3"}, {"from": "gpt", "value": "ho"},
            ]},
            [HI, says("assistant", "{}"), says("tool", "3"), HO],
        ),
        ({"messages": [HI, says("assistant", "{}"), {"role": "tool", "name": "f", "content": "3"}, HO]},
         [HI, says("assistant", "{}"), says("tool", "3"), HO]),
    ],
)  # fmt: skip
def test_conversations_of_every_form_become_messages(read: Any, row: dict[str, Any], messages: list[Any]) -> None:
    (found,) = read([{**row, "id": 7}], "conversation", loss_on="last_response")
    assert found["messages"] == messages and found["id"] == 7


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [HI]}, "no turn of the conversation is the assistant's"),
        ({"messages": [HI, says("assistant", " ")]}, "the conversation's last answer is empty"),
        ({"messages": [], "prompt": "hi"}, r"messages is an empty list"),
        ({"messages": [says("critic", "x"), HO]}, "a message of messages has the speaker 'critic'"),
        ({"messages": [HI, {"role": "assistant", "content": None, "tool_calls": []}]}, r"messages\.1\.content is null"),
        (
            {"messages": [HI, {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
            r"messages\.1 calls tools",
        ),
        (
            {"messages": [says("user", [{"type": "image_url", "image_url": "x"}]), HO]},
            r"content\.0 is a part of type 'image_url'",
        ),
        ({"messages": [says("user", [{"type": "thinking", "text": "x"}]), HO]}, r"0 is a part of type 'thinking'"),
        ({"messages": [{"speaker": "user", "text": "hi"}, HO]}, "has the speaker None and the keys speaker, text"),
    ],
)
def test_what_is_no_conversation_is_refused(read: Any, row: dict[str, Any], message: str) -> None:
    with pytest.raises(SourceError, match=rf"rows\.jsonl row 1: .*{message}"):
        read([row, {"messages": [HI, HO]}], "conversation")


def test_what_a_conversation_does_not_use_is_said_once(read: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        given = [{"messages": [HI, HO, HI], "tools": "[]"}, {"messages": [says("system", "t"), HI, HO], "system": "s"}]
        found = read(given * 2, "conversation")
    assert [row["messages"][-1] for row in found] == [HO] * 4
    said = "format conversation does not use tools (in 2 rows), turns after the last answer (in 2 rows), system (in 2 rows)"
    assert {str(warning.message).partition("rows.jsonl: ")[2] for warning in caught} == {said}


def test_fields_of_known_forms_that_an_instruction_does_not_use_are_said(read: Any) -> None:
    row = {"instruction": "a", "output": "b"}
    with pytest.warns(UserWarning, match=r"rows\.jsonl: format instruction does not use system_prompt \(in 2 rows\)"):
        read([{**row, "system_prompt": "s"}] * 2 + [{**row, "tools": ""}])


def test_fields_of_messages_that_nobody_reads_are_said(read: Any) -> None:
    answer = {"role": "assistant", "content": "b", "weight": 0, "reasoning_content": "hm", "name": "x", "tool_calls": None}
    with pytest.warns(
        UserWarning, match=r"does not use messages.reasoning_content \(in 1 rows\), messages.weight \(in 1 rows\)$"
    ):
        read([{"messages": [HI, answer]}], "conversation")
    read([{"messages": [HI, answer | {"weight": 1, "reasoning_content": ""}]}], "conversation")


@pytest.mark.parametrize("calls", [None, [], {}, "", "[]"])
def test_tool_calls_that_hold_nothing_ask_for_nothing(read: Any, calls: Any) -> None:
    rows = read([{"messages": [HI, says("assistant", "ho") | {"tool_calls": calls}]}], "conversation")
    assert len(rows) == 1


def test_the_last_response_is_one_of_a_conversation() -> None:
    with pytest.raises(ValidationError, match="loss_on last_response: rows of format instruction have one response"):
        DataSet(source="a", loss_on="last_response")


# Pairs

ASKED = {"prompt": "Translate", "chosen": "Good day", "rejected": "Bye"}


def test_the_data_of_a_pairs_prompt_is_kept(read: Any) -> None:
    given = [{"instruction": "Translate", "input": "Guten Tag", "chosen": "Good day", "rejected": "Bye", "system": "s"}]
    for settings in ({}, {"rename": {"instruction": "prompt"}}):
        (found,) = read(given, "preference", **settings)
        assert {name: found[name] for name in (*pairs.FIELDS, *pairs.BESIDE)} == {**ASKED, "input": "Guten Tag", "system": "s"}
    (found,) = read([{**ASKED, "input": "", "system": None}], "preference")
    assert not set(pairs.BESIDE) & found.keys()
    assert len(read([{**ASKED, "input": "a"}, {**ASKED, "input": "b"}], "preference", distinct=True)) == 2


def test_a_system_text_and_earlier_turns_come_before_messages(read: Any) -> None:
    begin = [says("system", "s"), says("user", "u"), says("assistant", "v")]
    (found,) = read([{**ASKED, "system": "s", "history": [["u", "v"]]}], "preference")
    assert found["prompt"] == [*begin, says("user", "Translate")] and "system" not in found
    (found,) = read([{"prompt": [HI], "chosen": "a", "rejected": "b", "system": "s"}], "preference")
    assert found["prompt"] == [says("system", "s"), HI]
    with pytest.warns(UserWarning, match=r"format preference does not use input \(in 1 rows\)"):
        read([{"prompt": [HI], "chosen": "a", "rejected": "b", "input": "data"}], "preference")


def test_columns_without_anything_are_absent(read: Any) -> None:
    given = [
        {"conversations": None, "prompt": "hi", "chosen": "a", "rejected": "b", "completions": None, "label": None},
        {"conversations": [HI], "prompt": float("nan"), "chosen": HO, "rejected": says("assistant", "b"), "label": None},
    ]
    assert [row["prompt"] for row in read(given, "preference")] == ["hi", [HI]]


def scored(*scores: Any, name: str = "overall_score") -> dict[str, Any]:
    return {"instruction": "Do", "completions": [{"response": f"r{i}", name: score} for i, score in enumerate(scores)]}


def test_the_best_and_the_worst_of_scored_completions_are_a_pair(read: Any) -> None:
    given = [scored(3, 8.5, 1, 8.5), scored("N/A", "2", None, "7"), scored(2, 1, name="fine-grained_score")]
    assert [(row["prompt"], row["chosen"], row["rejected"]) for row in read(given, "preference")] == [
        ("Do", "r1", "r2"), ("Do", "r3", "r1"), ("Do", "r0", "r1"),
    ]  # fmt: skip
    with pytest.raises(SourceError, match=r"row 2: all of its completions have the score 3, so none is preferred"):
        read([scored(1, 2), scored(3, 3)], "preference")
    with pytest.raises(
        SourceError, match=r"row 1: no two of its completions have a score \(overall_score or fine-grained_score"
    ):
        read([scored("N/A", 3)], "preference")
    with pytest.warns(UserWarning, match="1 of 2 rows are no pairs and were skipped; the first: rows.jsonl row 2: all of"):
        assert len(read([scored(1, 2), scored(3, 3)], "preference", skip_bad=True)) == 1


def judged(prompt: str, completion: str, label: Any) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


def test_completions_judged_alone_make_pairs_where_a_prompt_has_both(read: Any) -> None:
    given = [
        judged("p", "good", True),
        judged("q", "no", False),
        judged("p", "bad", False),
        judged("q", "yes", 1),
        judged("p", "worse", 0),
    ]
    found = [(row["prompt"], row["chosen"], row["rejected"]) for row in read(given, "preference")]
    assert found == [("p", "good", "bad"), ("p", "good", "worse"), ("q", "yes", "no")]
    assert len(read(given, "preference", limit=1)) == 1
    alone = [*given, judged("r", "x", True)]
    with pytest.raises(SourceError, match=r"a prompt has 1 good and no bad completion, so it gives no pair \(skip_bad"):
        read(alone, "preference")
    with pytest.warns(UserWarning, match="1 of 6 rows are no pairs"):
        assert len(read(alone, "preference", skip_bad=True)) == 3
    with pytest.raises(SourceError, match=r"row 1: label is a text \('maybe'\), neither true nor false"):
        read([judged("p", "x", "maybe")], "preference")
    whole = [{"messages": [HI, HO], "label": True}, {"messages": [HI, says("assistant", "no")], "label": False}]
    (found,) = read(whole, "preference")
    assert (found["prompt"], found["chosen"], found["rejected"]) == ([HI], "ho", "no")
