"""The choice of a strength: best within the bound, never by the rows it is reported on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steerlab import job
from steerlab.job import Limit
from steerlab.stages import JobType, Plan, choose
from steerlab.stages.choose import best

TABLE: dict[float, dict[str, float | None]] = {
    0.0: {"tox/share": 0.3, "ppl/value": 50.0},
    0.5: {"tox/share": 0.2, "ppl/value": 50.8},
    0.75: {"tox/share": 0.2, "ppl/value": 50.9},
    1.0: {"tox/share": 0.1, "ppl/value": 53.0},
}
BOUND = Limit(metric="ppl/value", rise=1.0)


def test_the_best_strength_within_the_bound_and_of_equals_the_weakest() -> None:
    assert best(TABLE, "tox/share", "min", None) == 1.0
    assert best(TABLE, "tox/share", "min", BOUND) == 0.5
    assert best(TABLE, "tox/share", "max", BOUND) == 0.0
    assert best(TABLE, "tox/share", "min", Limit(metric="ppl/value", rise=0.0)) == 0.0
    assert best(TABLE, "tox/share", "min", Limit(metric="ppl/value", factor=1.06)) == 1.0
    assert best(TABLE, "tox/share", "min", Limit(metric="ppl/value", factor=1.017)) == 0.5


@pytest.mark.parametrize("bounds", [{}, {"rise": 1, "factor": 2}])
def test_a_bound_is_a_rise_or_a_factor(bounds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="give one of rise and factor"):
        Limit.model_validate({"metric": "ppl/value", **bounds})


def test_what_could_not_be_scored_is_not_chosen() -> None:
    table = {**TABLE, 1.0: {"tox/share": None, "ppl/value": 40.0}, 0.75: {"tox/share": 0.0, "ppl/value": None}}
    assert best(table, "tox/share", "min", BOUND) == 0.5
    with pytest.raises(ValueError, match="could not be scored at strength 0"):
        best({**TABLE, 0.0: {"tox/share": None, "ppl/value": 1.0}}, "tox/share", "min", None)
    with pytest.raises(ValueError, match=r"no metric 'tox/shar'; they have tox/share, ppl/value"):
        best(TABLE, "tox/shar", "min", None)


TREE: dict[str, Any] = {
    "name": "act",
    "model": {"source": "tiny:model"},
    "data": {
        "prompt_style": "plain",
        "source": {"source": "tiny:topics/train", "format": "text", "limit": 8},
        "target": {"source": "tiny:topics/test", "format": "text", "limit": 8},
    },
    "method": {"name": "mean_act", "incremental": False},
    "extract": {},
    "choose": {
        "strengths": [1, 0.5],
        "tasks": [{"task": "perplexity", "source": "tiny:topics/validation", "format": "text"}],
        "metric": "perplexity/value",
    },
    "evaluate": [{"task": "perplexity", "source": "tiny:topics/test", "format": "text"}],
}


def plan_for(**changes: Any) -> Any:
    return Plan.of(job.validate({**TREE, **changes}, JobType, Path("a.yaml"))).stages


def test_the_choice_stands_between_development_and_report() -> None:
    stages = plan_for()
    names = ["extract", "extract", "fit", "evaluate", "evaluate", "choose", "evaluate", "evaluate"]
    assert [stage.name for stage in stages] == names
    development, plain, choice, report, baseline = stages[3:]
    assert development.params["task"]["strengths"] == [0.5, 1.0]
    assert list(choice.inputs.values()) == [development, plain]
    assert report.inputs == {"model": stages[2], "choice": choice}
    assert plain.inputs == baseline.inputs == {}


def test_the_model_without_a_patch_is_measured_once_for_all_methods() -> None:
    """Strength 0 is the same model whatever the method: its evaluations are those of method none."""
    baselines = [
        [stage.key for stage in plan_for(method=method) if stage.name == "evaluate" and not stage.inputs]
        for method in ({"name": "mean_act", "incremental": False}, {"name": "caa"})
    ]
    assert baselines[0] == baselines[1] and len(baselines[0]) == 2
    alone = [stage.key for stage in plan_for(method={"name": "none"}) if stage.name == "evaluate"]
    assert alone == baselines[0][1:]


def test_without_a_patch_there_is_nothing_to_choose() -> None:
    stages = plan_for(method={"name": "none"})
    assert "choose" not in [stage.name for stage in stages]


def test_candidates_are_sorted_and_zero_is_evaluated_apart() -> None:
    config = job.ChooseConfig.model_construct(strengths=(1.0, 0.0, 0.5, 0.5))
    assert choose.candidates(config) == (0.5, 1.0)


def test_knobs_that_act_at_inference_leave_the_fit_alone() -> None:
    """A sweep over candidates, tasks or the bound pays for no extraction and no fit."""
    keys = [stage.key for stage in plan_for()[:3]]
    other = plan_for(choose={**TREE["choose"], "strengths": [0.1], "within": {"metric": "perplexity/value", "rise": 2}})
    assert [stage.key for stage in other[:3]] == keys


def test_closed_form_methods_share_their_extractions() -> None:
    keys = {tuple(s.key for s in plan_for(method={"name": n, **more}) if s.name == "extract") for n, more in [
        ("mean_act", {"incremental": False}), ("gaussian_act", {"incremental": False}), ("caa", {}), ("iti", {}),
    ]}  # fmt: skip
    assert len(keys) == 1


def test_a_factor_lets_a_negative_metric_rise_too() -> None:
    """Times 1.1, -10 would have to fall to -11, which strength 0 itself does not satisfy."""
    limit = Limit.model_validate({"metric": "score/value", "factor": 1.1})
    assert limit.highest(10.0) == 10.0 * 1.1
    assert limit.highest(-10.0) == pytest.approx(-9.0)
    table = {0.0: {"a/x": 1.0, "score/value": -10.0}, 1.0: {"a/x": 2.0, "score/value": -9.5}}
    assert best(table, "a/x", "max", limit) == 1.0
