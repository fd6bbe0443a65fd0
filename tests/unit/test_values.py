"""What a value of a row is, where it lies, and texts composed of several."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest

from steerlab.data import compose, values
from steerlab.job import compositions

ROW = {
    "prompt": {"text": "So", "toxicity": 0.3, "a.b": {"c": 1}},
    "prompt.flat": "column",
    "answers": {"text": ["x", "y"]},
    "none": None,
    "nan": float("nan"),
}


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("prompt.text", "So"),
        ("prompt.flat", "column"),
        ("prompt.a.b.c", 1),
        ("answers.text.0", "x"),
        ("answers.text.-1", "y"),
        ("answers.text.2", values.MISSING),
        ("prompt.texd", values.MISSING),
        ("prompt.text.0", values.MISSING),
        ("none.text", None),
        ("nan.text", None),
        ("prompt.", values.MISSING),
    ],
)
def test_a_path_names_a_nested_value(path: str, value: Any) -> None:
    assert values.look_up(ROW, path) is value or values.look_up(ROW, path) == value


def test_a_column_whose_name_holds_dots_is_found_first() -> None:
    assert values.look_up({"a.b": 1, "a": {"b": 2}}, "a.b") == 1


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (["x", "y"], "output is a list (['x', 'y']), not a text"),
        ({"a": 1}, "output is an object ({'a': 1}), not a text"),
        (None, "output is null, not a text"),
        (float("nan"), "output is NaN, not a text"),
        (Decimal("nan"), "output is NaN, not a text"),
        (b"x", "output is bytes (b'x'), not a text"),
        (3, "output is a number (3), not a text"),
        (True, "output is a boolean (True), not a text"),
        ("tired \ud83d", r"output holds half of a character (\ud83d alone), which is not a valid text"),
        ("x" * 99 + "\udc00", r"output holds half of a character (\udc00 alone), which is not a valid text"),
    ],
)
def test_what_is_no_text_is_named_with_its_type(value: Any, said: str) -> None:
    with pytest.raises(ValueError) as caught:
        values.text(value, "output")
    assert str(caught.value) == said


def test_numbers_are_texts_only_where_that_is_said() -> None:
    given = [3, 2.5, True, False, Decimal("1.50"), 10**60]
    assert [values.text(value, "x", scalars=True) for value in given] == ["3", "2.5", "true", "false", "1.50", str(10**60)]
    for value in (float("inf"), float("nan"), None, [1]):
        with pytest.raises(ValueError, match="not a text"):
            values.text(value, "x", scalars=True)


@pytest.mark.parametrize(
    ("value", "wanted", "equal"),
    [
        (1, 1.0, True), ("1", 1, True), (" 1.0 ", 1, True), (1, "1", True), (1.0, "1", True), ("01", "1", False),
        ("a", 1, False), (True, True, True), ("True", True, True), ("yes", True, True), ("no", False, True),
        (True, "true", True), (True, "True", True),
        (1, True, False), (True, 1, False), (0, False, False), ("1", True, False), (False, True, False),
        ("farm", "farm", True), ("farm ", "farm", False), (None, "None", False), (float("nan"), "nan", False), (None, 0, False),
        (Decimal("1.0"), 1, True), (10**400, 1, False),
    ],
)  # fmt: skip
def test_equality_is_of_values_not_of_spellings(value: Any, wanted: Any, equal: bool) -> None:
    assert values.same(value, wanted) is equal


@pytest.mark.parametrize("value", [[1], {"a": 1}, b"1"])
def test_what_is_no_single_value_is_not_compared(value: Any) -> None:
    with pytest.raises(ValueError, match="which cannot be compared"):
        values.same(value, 1)


def test_nothing_is_no_number_and_a_text_may_write_one() -> None:
    assert [values.number(value) for value in (None, float("nan"), "", "3.5", 7, True)] == [None, None, None, 3.5, 7, 1]
    assert values.number(10**400) == 10**400
    for value in ("x", [1], {"a": 1}):
        with pytest.raises(ValueError):
            values.number(value)


QUESTION = {"question": "2 + 2?", "choices": ["3", 4], "meta": {"level": 5, "easy": True}, "none": None, "one": {"a": 1}}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{question}\n{choices}", "2 + 2?\nA. 3\nB. 4"),
        ("{choices:lines}|{choices:commas}|{choices:letters}", "3\n4|3, 4|A. 3\nB. 4"),
        ("{{{question}}} {meta.level} {meta.easy} {choices.1}", "{2 + 2?} 5 true 4"),
        ("as it is", "as it is"),
    ],
)
def test_a_template_is_filled_from_fields_and_paths(template: str, text: str) -> None:
    compositions.check(template)
    assert compose.write(template, QUESTION) == text


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{answer}", r"has no field 'answer' \(it has: question, choices, meta.level, meta.easy, none, one.a\)"),
        ("{none}", "none is null, not a text"),
        ("{one}", "one is an object"),
    ],
)
def test_what_a_template_cannot_write_is_named(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compose.write(template, QUESTION)


def test_more_choices_than_letters_and_lists_of_objects_are_refused() -> None:
    with pytest.raises(ValueError, match="choices holds 27 choices, more than the alphabet has letters"):
        compose.write("{choices}", {"choices": ["x"] * 27})
    with pytest.raises(ValueError, match="choices is an empty list"):
        compose.write("{choices}", {"choices": []})
    with pytest.raises(ValueError, match=r"choices\.1 is an object"):
        compose.write("{choices}", {"choices": ["x", {"text": "y"}]})


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{}", "braces without a plain field name"),
        ("{a!r}", "braces without a plain field name"),
        ("{a:>3}", "joins lists by '>3'; known are letters, lines, commas"),
        ("{a", "cannot be read"),
        ("a}", "cannot be read"),
    ],
)
def test_a_template_that_is_none_is_refused_with_the_job(template: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compositions.check(template)
