"""The first screen of the page: a sweep's answer in words, the best cells, groups of runs, and names that differ."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from typing import Any

import pytest

from steerlab import report
from steerlab.evaluation.statistics.measures import Measure
from steerlab.report import headline, run_names, sweep_figures, tables
from steerlab.report.contents import Entry
from steerlab.report.sweep_contents import Sweep

MEASURES = {
    "separation/sep": Measure("sep", "higher", "share", 0.0, 1.0),
    "separation/utility": Measure("utility", "higher", "share", 0.0, 1.0),
    "perplexity/value": Measure("value", "lower", "", 1.0),
}
ANGLES = (0.0, math.pi / 2, 3 * math.pi / 4)


def metric(value: float, half: float = 0.02) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "stderr": half / 2, "n": 100, "unparsable": 0}


def entry(name: str, folder: str = "1", job: dict[str, Any] | None = None, **values: float) -> Entry:
    found = {key.replace("__", "/"): metric(value) for key, value in values.items()}
    summary = {"metrics": found, "strengths": {1.0: found}, "choice": None, "model": None}
    whole = {"name": name, "method": {"name": name}, **(job or {})}
    samples = {"toxicity": [{"id": "1", "strength": 1.0, "prompt": "a prompt", "continuation": f"said by {folder}"}]}
    return Entry(name, f"runs/{name}/{folder}", whole, summary, [], {}, samples, None, measures=MEASURES)


def trial(number: int, angle: float, sep: float, utility: float, perplexity: float, seed: int = 0) -> dict[str, Any]:
    row: dict[str, Any] = {"trial_id": f"t{number}", "seed": seed, "param.method.angle_rad": angle, "status": "finished"}
    for name, value in (("separation/sep", sep), ("separation/utility", utility), ("perplexity/value", perplexity)):
        row |= {f"metric.{name}": value, f"low.{name}": value - 0.02, f"high.{name}": value + 0.02}
    return row


ROWS = [trial(0, ANGLES[0], 0.40, 1.0, 1.12), trial(1, ANGLES[1], 0.97, 0.99, 1.27), trial(2, ANGLES[2], 0.99, 0.17, 1.95)]
SUMMARY: dict[str, Any] = {
    "metric": "separation/sep", "mode": "max", "best": {"trial_id": "t1", "low": 0.94, "high": 1.3},
    "bounds": ["separation/utility at least 0.9"], "prices": ["perplexity/value"], "indistinguishable": [],
}  # fmt: skip


def sweep(rows: list[dict[str, Any]] = ROWS, **changed: Any) -> Sweep:
    runs = (entry("aside", separation__sep=0.5),)
    return Sweep("aside", "sweeps/aside/1", {"name": "aside"}, {}, rows, {**SUMMARY, **changed}, runs=runs)


def test_the_sentence_names_the_choice_its_price_and_what_was_not_chosen() -> None:
    assert headline.sentence(sweep()) == (
        "angle_rad π/2: separation/sep 0.97 [0.94, 1]; perplexity/value 1.27, 0.15 above the best (1.12 at angle_rad 0); "
        "separation/utility 0.99, as good as any. angle_rad 3π/4 reaches 0.99 but does not satisfy separation/utility at least "
        "0.9."
    )
    even = headline.sentence(sweep(indistinguishable=["t0"]))
    assert "One other setting cannot be distinguished from it (angle_rad 0)." in even


def test_the_sentence_of_a_sweep_that_runs_has_no_choice_or_measured_nothing() -> None:
    running = headline.sentence(replace(sweep(), summary={}, space={"metric": "separation/sep", "mode": "max"}))
    assert running.startswith("So far: angle_rad 3π/4: separation/sep 0.99 [0.97, 1];")
    assert headline.sentence(sweep(best=None)) == "No trial satisfies the bounds (separation/utility at least 0.9)."
    waiting = [{"trial_id": "t0", "seed": 0, "param.method.angle_rad": 0.0, "status": "running", "metric.separation/sep": None}]
    assert headline.sentence(sweep(waiting)) == ""


def test_several_seeds_are_one_setting() -> None:
    rows = [*ROWS, trial(1, ANGLES[1], 0.93, 0.99, 1.25, seed=1)]
    assert headline.sentence(sweep(rows)).startswith("angle_rad π/2: separation/sep 0.95 [0.94, 1]; perplexity/value 1.26")


def test_values_without_a_direction_or_unit_are_said_plainly() -> None:
    unknown = replace(sweep(bounds=[], prices=["separation/utility"]), runs=())
    assert "separation/utility 0.99;" in headline.sentence(unknown) or "separation/utility 0.99." in headline.sentence(unknown)


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        ("method.angle_rad", math.pi, "π"),
        ("method.angle_rad", 3 * math.pi / 8, "3π/8"),
        ("method.angle_rad", -math.pi / 2, "-π/2"),
        ("method.angle_rad", 0.0, "0"),
        ("method.angle_rad", 0.3, "0.3"),
        ("train.lr", math.pi, "3.142"),
        ("method.name", "aside", "aside"),
    ],
)
def test_values_are_said_as_people_say_them(name: str, value: object, text: str) -> None:
    assert run_names.said(name, value) == text


def test_only_the_best_cell_of_a_column_is_marked_and_the_chosen_trial_comes_first() -> None:
    header, body = tables.trials(sweep())
    assert [line[0]["value"] for line in body] == ["★ t1", "t2", "t0"]
    assert body[0][header.index("method.angle_rad")]["value"] == "π/2"
    marked = {name: [line[0]["value"] for line in body if line[header.index(name)]["best"]] for name in MEASURES}
    assert marked == {"separation/sep": ["t2"], "separation/utility": ["t0"], "perplexity/value": ["t0"]}


def test_declared_prices_come_first_in_the_figure() -> None:
    figure = sweep_figures.pareto(sweep())
    assert figure is not None and figure["metrics"] == ["perplexity/value", "separation/utility"]
    bound = sweep_figures.pareto(sweep(prices=["separation/utility"]))
    assert bound is not None and bound["metrics"][0] == "separation/utility"


def test_intervals_over_seeds_end_where_the_metric_does() -> None:
    wide = {"separation/sep": {**metric(0.9), "low": -1.284, "high": 2.95}}
    page = report.page([], sweeps=[sweep(test=wide)])
    assert "0.900 [0.000, 1.000]" in page and "2.95" not in page.partition("<script>")[0]


def test_runs_are_grouped_by_the_tasks_that_they_measured() -> None:
    runs = [entry("aside", separation__sep=0.9), entry("warp", refusal__asr=0.1), entry("ise", separation__sep=0.4)]
    assert [[run.name for run in group] for group in run_names.groups(runs)] == [["aside", "ise"], ["warp"]]
    page = report.page(runs)
    tables_of_runs = re.findall(r"<table class=\"sortable\">.*?</table>", page, re.DOTALL)
    assert len(tables_of_runs) == 2 and "<h3>separation</h3>" in page and "<h3>refusal</h3>" in page
    assert "aside" in tables_of_runs[0] and "warp" not in tables_of_runs[0] and "refusal/asr" not in tables_of_runs[0]
    assert "share, ↑ more is better" in page


def test_two_runs_of_one_job_are_two_lines_with_what_differs_and_both_answer() -> None:
    runs = [entry("iav", f"2026-{n}", {"train": {"steps": steps}}, p__acc=0.5) for n, steps in enumerate((10, 20))]
    again = replace(runs[1], folder="runs/iav/2027-1")
    names = [run.name for run in run_names.told_apart([*runs, again, entry("dpo", p__acc=0.1)])]
    assert names == ["iav (train.steps 10)", "iav (train.steps 20), 2026-1", "iav (train.steps 20), 2027-1", "dpo"]
    page = report.page(runs)
    assert "iav (train.steps 10)" in page and "said by 2026-0" in page and "said by 2026-1" in page
