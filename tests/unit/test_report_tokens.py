"""Coloured texts and histograms of the page: their scale, their order, and that no sample can break out of them."""

from __future__ import annotations

import math
from html.parser import HTMLParser
from typing import Any

import pytest
from test_report import entry

from steerlab import report
from steerlab.evaluation.statistics.sample_kinds import heat_map, histogram
from steerlab.report import heat_maps

HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "a\u202eb", "' style='x", "</p></div>"]


def with_samples(name: str, *samples: Any, task: str = "instruction_concept") -> Any:
    run = entry(name, 0.5, 0.2, 50.4)
    run.samples.clear()  # type: ignore[attr-defined]
    run.samples[task] = list(samples)  # type: ignore[index]
    return run


class Elements(HTMLParser):
    """Names of all elements of a page with their attributes, and the texts within coloured tokens."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tokens: list[str] = []
        self._in_token = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_token = tag == "span" and "style" in dict(attrs)

    def handle_data(self, data: str) -> None:
        if self._in_token:
            self.tokens.append(data)
            self._in_token = False


def test_a_hostile_token_is_text() -> None:
    """Neither tokens nor units and titles add an element or an attribute to the page; direction marks are written out."""
    values = [0.5] * len(HOSTILE)
    mine = heat_map("1", 0.5, HOSTILE, values, unit="<b>u</b>", title="<i>t</i>")
    tame = heat_map("1", 0.5, ["a"] * len(HOSTILE), values, unit="u", title="t")
    page, reference = (Elements(report.page([with_samples("a", sample)])) for sample in (mine, tame))
    assert page.elements == reference.elements
    assert page.tokens == [token.replace("\u202e", "\\u202e") for token in HOSTILE]


def test_colours_are_shares_of_the_largest_value_of_the_task() -> None:
    first = heat_map("1", 0.5, ["a", "b", "c"], [2.0, -4.0, None], unit="logit")
    second = heat_map("2", 0.5, ["d"], [1.0], unit="logit")
    one, two = heat_maps.heat_maps([with_samples("a", first, second)])
    (tokens,) = one["texts"].values()
    assert [(t["text"], t["sign"], t["share"], t["shown"]) for t in tokens] == [
        ("a", "plus", "0.50", "2"),
        ("b", "minus", "1.00", "-4"),
        ("c", "", "0.00", ""),
    ]
    assert two["texts"]["a"][0]["share"] == "0.25" and two["largest"] == "4"


def test_runs_and_strengths_stand_side_by_side_the_unpatched_model_first() -> None:
    runs = [
        with_samples(name, *(heat_map("1", strength, ["a"], [strength], unit="u") for strength in (1.0, 0.5, 0.0)))
        for name in ("a", "b")
    ]
    (row,) = heat_maps.heat_maps(runs)
    assert list(row["texts"]) == ["strength 0", "a, strength 1", "a, strength 0.5", "b, strength 1", "b, strength 0.5"]
    assert 'href="#tokens"' in report.page(runs)


WHOLE = heat_map("1", 0.5, ["a", "b"], [1.0, 2.0], unit="u")


@pytest.mark.parametrize(
    "change",
    [
        {"kind": "text"},
        {"tokens": "ab"},
        {"tokens": ["a", 3]},
        {"tokens": ["a"]},
        {"values": [1.0, "0; background: url(x)"]},
        {"values": [1.0, math.nan]},
        {"values": [1.0, True]},
        {"values": [1.0, 10**5000]},
        {"tokens": ["s3://user:", "password@host/x"]},
    ],
)
def test_a_damaged_sample_is_left_out(change: dict[str, Any]) -> None:
    """Also a text that holds a password, of which no token alone can be told to be one."""
    assert heat_maps.heat_maps([with_samples("a", WHOLE)]) != []
    assert heat_maps.heat_maps([with_samples("a", {**WHOLE, **change})]) == []
    report.page([with_samples("a", {**WHOLE, **change})])


def test_a_long_text_is_cut_and_items_are_few() -> None:
    long = heat_map("0", 0.5, ["a"] * 700, [1.0] * 700, unit="u")
    rows = heat_maps.heat_maps([with_samples("a", long, *(WHOLE | {"id": str(number)} for number in range(1, 9)))])
    assert len(rows) == heat_maps.MAX_MAPS and rows[0]["num_cut"] == 100
    assert len(rows[0]["texts"]["a"]) == heat_maps.MAX_TOKENS


def test_a_histogram_has_a_line_for_each_group() -> None:
    sample = histogram("a", 0.5, {"injected": [0.0, 1.0, 3.9], "<b>clean": [4.0]}, unit="logit", bins=4)
    figure = heat_maps.histograms([with_samples("a", sample)])
    assert figure is not None and figure["metrics"] == ["instruction_concept, logit"]
    injected, clean = figure["data"]
    assert injected["x"] == [0, 1, 2, 3, 4] and injected["y"] == pytest.approx([1 / 3, 1 / 3, 0, 1 / 3, 0])
    assert clean["name"] == "a: &lt;b&gt;clean", "Plotly would read it as markup"
    assert 'id="histograms"' in report.page([with_samples("a", sample)])
    for change in ({"edges": [0, 1]}, {"edges": "abc"}, {"groups": {"x": [1.0]}}, {"groups": []}, {"edges": [0, math.nan] * 3}):
        assert heat_maps.histograms([with_samples("a", {**sample, **change})]) is None
