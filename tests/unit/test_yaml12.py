"""YAML as its version 1.2 means it, and what is no job's YAML in one line."""

from __future__ import annotations

import time

import pytest
import yaml

from steerlab.guards import yaml12


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("off", "off"), ("Yes", "Yes"), ("y", "y"), ("true", True), ("False", False), ("TRUE", True),
        ("010", 10), ("0o17", 15), ("0x1F", 31), ("1_000", 1000), ("-3", -3), ("+2", 2), ("1:30", "1:30"),
        ("2e-2", 0.02), ("1E3", 1000.0), (".5", 0.5), ("5.", 5.0), ("1_0.5", 10.5), ("-1.5e+3", -1500.0), ("1.0.0", "1.0.0"),
        ("2026-01-01", "2026-01-01"), ("2026-01-01T10:00:00Z", "2026-01-01T10:00:00Z"), ("=", "="), ("<<", "<<"), ("~", None),
        ("Null", None), ("", None), ("nULL", "nULL"), ("'010'", "010"), ("!!str 1", "1"), ("!!int '7'", 7), ("!!float 1", 1.0),
        ("[no, 2e-2]", ["no", 0.02]), ("{a: off}", {"a": "off"}), ("{0: a, 1: b}", {0: "a", 1: "b"}), ("a#b", "a#b"),
    ],
)  # fmt: skip
def test_plain_scalars_are_what_people_mean(text: str, value: object) -> None:
    found = yaml12.load(f"key: {text}\n")["key"]
    assert found == value and type(found) is type(value)
    assert yaml12.load_value(text) == value


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("train: {a: 1}\nname: x\ntrain: {b: 2}\n", 3, "the key 'train' is in lines 1 and 3"),
        ("a:\n- b:\n    c: 1\n    d: 2\n    c: 3\n", 5, "'c' is in lines 3 and 5"),
        ("a: {b: 1, b: 1}", 1, "'b' is in line 1, twice"),
        ("a: 1\n'a': 2", 2, "'a' is in lines 1 and 2"),
        ("a: &x {p: 1}\nb:\n  <<: *x\n  <<: *x\n", 4, "'<<' is in lines 3 and 4"),
        ("a:\n\tb: 1\n", 2, "a tab is at a place where YAML needs spaces"),
        ("a: 1\n---\nb: 2\n", 2, "a second document begins"),
        ("a: [1\n", 2, r"a \[ or { is not closed"),
        ("a: 'x\n", 2, "a quote is not closed"),
        ("a: *b\n", 1, "text that begins with . is an alias"),
        ("a: b: c\n", 1, "mapping values are not allowed here"),
        ("? [a]\n: 1\n", 1, "a key is a text"),
        ("a: .inf\n", 1, "settings are finite numbers"),
        ("a: [1, .NaN]\n", 1, "settings are finite numbers"),
        ("a: 1e999\n", 1, "settings are finite numbers"),
        ("a: " + "9" * 5000, 1, "a number of 5000 digits"),
        ("a: !!python/object/apply:os.system [ls]\n", 1, "the tag !!python/object/apply:os.system is not supported"),
        ("a: !!timestamp 2026-01-01\n", 1, "the tag !!timestamp is not supported"),
        ("a: !mine 1\n", 1, "the tag !mine is not supported"),
        ("a: !!int ''\n", 1, "'' is not a whole number"),
        ("a: !!bool maybe\n", 1, "'maybe' is not a truth value"),
        ("a: !!map 1\n", 1, "belongs to a mapping"),
        ("a: !!str [1]\n", 1, "belongs to one value"),
        ("a: 1\nb: \x00\n", 2, "a control character"),
        ('a: "\\ud83d"\n', 1, "half of a character"),
        ("a: &a [*a]\n", 1, "an alias .* is inside the value that it names"),
        ("[" * 20_000, 1, "nested more than 64 deep"),
        ("a: " + "{b: " * 100, 1, "nested more than 64 deep"),
        ("\n".join(["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]" for i in range(1, 60)]), 16, "more than 100000"),
    ],
)
def test_what_is_no_job_is_refused_in_one_line(text: str, line: int, message: str) -> None:
    start_s = time.monotonic()
    with pytest.raises(yaml12.YamlError, match=message) as caught:
        yaml12.load(text)
    assert caught.value.line == line and "\n" not in str(caught.value) and len(str(caught.value)) < 300
    assert time.monotonic() - start_s < 2


def test_merges_and_anchors_are_read_in_any_order() -> None:
    text = "deep: {one: &x {<<: &y {p: 1, q: 2}, p: 3}}\nflat: {<<: *x, q: 4}\nboth: {<<: [*y, {r: 5}]}\nsame: *x\n"
    x = {"p": 3, "q": 2}
    assert yaml12.load(text) == {"deep": {"one": x}, "flat": {"p": 3, "q": 4}, "both": {"p": 1, "q": 2, "r": 5}, "same": x}


@pytest.mark.parametrize("text", ["Is this #1 or #2 ?", "x # y", "[1, 2] # c"])
def test_a_comment_in_a_value_of_the_command_line_is_a_mistake(text: str) -> None:
    with pytest.raises(yaml12.YamlError, match="a comment"):
        yaml12.load_value(text)
    assert yaml12.load_value(f'"{text}"') == text


def test_what_is_dumped_is_read_back_by_either_version() -> None:
    texts = ["no", "010", "2e-2", "1:30", "2026-01-01", "0o17", "~", "", "a: b", "*x", "<<", "1_000", "true", "\u00e9 # x"]
    tree = {"texts": texts, "values": [1, 1.5, 2e-5, 1e30, True, None, {"no": []}]}
    assert yaml12.load(yaml12.dump(tree)) == tree
    assert yaml.safe_load(yaml12.dump(tree)) == tree
