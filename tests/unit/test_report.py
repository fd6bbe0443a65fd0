"""The page about runs: its table, its front, and that texts cannot break it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from steerlab import report
from steerlab.evaluation.statistics import stored
from steerlab.report import Entry, cell, figures, front, plotting


def entry(name: str, strength: float, share: float, perplexity: float) -> Entry:
    def metric(value: float) -> dict[str, Any]:
        return {"value": value, "stderr": 0.1, "n": 10, "unparsable": 0, "low": value - 0.1, "high": value + 0.1}

    rule = {"metric": "toxicity/share", "mode": "min", "within": {"metric": "perplexity/value", "rise": 1.0}}
    table = {str(s): {"toxicity/share": 0.3 - 0.1 * s, "perplexity/value": 50.0 + s} for s in (0.0, 0.5, 1.0)}
    found = {"toxicity/share": metric(share), "perplexity/value": metric(perplexity)}
    return Entry(
        name=name,
        folder=f"runs/{name}/1",
        job={"name": name, "method": {"name": name}},
        summary={
            "metrics": found,
            "strengths": {strength: found, 0.0: {n: metric(1.0) for n in found}},
            "choice": {"strength": strength, "rule": rule, "table": table},
            "model": {"stage": "fit", "key": "k"},
        },
        stages=[{"name": "fit", "label": "x", "status": "ran", "seconds": 1.0, "key": "k" * 64}],
        environment={"git": None, "git_changes": "", "created": "now", "versions": {"torch": "2"}},
        samples={
            "toxicity": [
                {"id": "1", "strength": s, "prompt": "a <b>prompt", "continuation": f"<script>{s}"} for s in (0.0, strength)
            ]
        },
        fit_s=0.02,
    )


def test_the_front_holds_what_no_other_point_beats() -> None:
    points = [(50.0, 0.3), (51.0, 0.2), (52.0, 0.25), (53.0, 0.1), (49.0, 0.4)]
    assert front(points) == [4, 0, 1, 3]
    assert front(points, maximise=True) == [4]
    naive = [i for i, (x, y) in enumerate(points) if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in points)]
    assert sorted(front(points)) == naive


def test_the_table_starts_with_strength_0() -> None:
    names = ["toxicity/share", "perplexity/value"]
    body = report.rows([entry("a", 0.5, 0.2, 50.4), entry("b", 1.0, 0.1, 51.0)], names)
    assert [line[0] for line in body] == ["strength 0 (no patch)", "a", "b"]
    assert body[1] == ["a", "0.5", "0.200 [0.100, 0.300]", "50.4 [50.3, 50.5]", "0.02"]


def test_cells() -> None:
    assert cell(None) == cell({"value": None}) == "\u2013"
    assert cell({"value": 1.0, "low": None, "high": None, "unparsable": 0}) == "1"
    assert cell({"value": 0.5, "low": 0.25, "high": 0.75, "unparsable": 2}) == "0.500 [0.250, 0.750] (2 unparsable)"


def test_the_page_is_whole_and_texts_are_text() -> None:
    page = report.page([entry("a", 0.5, 0.2, 50.4), entry("b", 1.0, 0.1, 51.0)])
    assert "<script>0.0" not in page and "&lt;script&gt;0.0" in page and "a &lt;b&gt;prompt" in page
    assert "Pareto front" in page and "Plotly.react" in page


def test_no_text_of_the_page_turns_a_line_round() -> None:
    """Control characters and direction marks in names, samples and metrics are written out, in figures as well."""
    turned = entry("a\u202eb", 0.5, 0.2, 50.4)
    turned.summary["metrics"]["toxicity/\u2066x"] = turned.summary["metrics"]["toxicity/share"]
    turned.samples["toxicity"][0]["continuation"] = "\x1b[31m \u202eevil"
    page = report.page([turned, entry("b", 1.0, 0.1, 51.0)])
    shown, script = page.split("<script", 1)
    assert not {"\u202e", "\u2066", "\x1b"} & set(shown)
    assert "\\u202eevil" in page and "a\\u202eb" in page
    figures_json = script[script.rindex("application/json") :] if "application/json" in script else script
    assert "\u202e" not in figures_json and '"a\\u202eb' not in figures_json


def test_without_a_choice_there_is_no_figure() -> None:
    plain = entry("a", 1.0, 0.2, 50.0)
    plain.summary["choice"] = None
    assert figures.choices([plain]) is None
    assert "Effect against fluency" not in report.page([plain])


def test_texts_are_shown_side_by_side() -> None:
    (row,) = report.texts([entry("a", 0.5, 0.2, 50.4), entry("b", 1.0, 0.1, 51.0)])
    assert list(row["outputs"]) == ["strength 0", "a", "b"]


def test_a_folder_that_is_no_run(tmp_path: Any) -> None:
    from steerlab.storage.store import Store

    with pytest.raises(ValueError, match=r"runs/x/1 is not a finished run folder"):
        report.read(Store.open(str(tmp_path)), "runs/x/1")


def test_error_bars_reach_the_ends_of_an_interval_that_is_not_symmetric() -> None:
    """Wilson's interval of 19 of 20: longer below than above."""
    drawn = plotting.bars([{"value": 0.95, "low": 0.76, "high": 0.99, "stderr": 0.05}, {"value": 0.5, "stderr": 0.1}], "red")
    assert drawn["array"] == pytest.approx([0.04, 0.196]) and drawn["arrayminus"] == pytest.approx([0.19, 0.196])


def test_samples_without_an_id_are_read_and_shown(tmp_path: Path) -> None:
    """Answers in AlpacaEval's form have none, and neither have the conditions of a timing."""
    answer = {"instruction": "say it", "output": "moo", "generator": "a"}
    (tmp_path / "samples.json").write_text(json.dumps([answer, {"strength": 1.0, "device": "cpu"}]))
    shown = entry("a", 0.5, 0.2, 50.4)
    shown = dataclasses.replace(shown, samples={"alpaca": stored.samples(tmp_path)})
    (found,) = report.texts([shown])
    assert found["prompt"] == "say it" and [one["text"] for one in found["outputs"].values()] == ["moo"]
