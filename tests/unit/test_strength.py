"""`strength`, the field of a job: which strengths the tasks are run at, which one is reported, and where it means nothing."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from steerlab import job, run
from steerlab.evaluation.statistics import stored
from steerlab.job import UNPATCHED, with_headline
from steerlab.run.folder import summary as read_summary
from steerlab.stages import JobType, Plan
from steerlab.storage.store import Store
from steerlab.sweeps.space import Space
from steerlab.sweeps.trials import plan as sweep_plan

PERPLEXITY = {"task": "perplexity", "data": {"source": "tiny:topics/test", "format": "text", "limit": 8}}
TREE: dict[str, Any] = {
    "name": "a",
    "model": {"source": "tiny:model"},
    "data": {
        "source": {"source": "tiny:topics/train", "format": "text", "equals": {"label": "farm"}, "limit": 8},
        "target": {"source": "tiny:topics/train", "format": "text", "equals": {"label": "sea"}, "limit": 8},
    },
    "method": {"name": "mean_act", "incremental": False},
    "extract": {"select": {"modules": "model.layers.1$"}},
    "evaluate": [PERPLEXITY],
}
CHOOSE = {"metric": "perplexity/value", "tasks": [PERPLEXITY]}


def valid(**changes: Any) -> Any:
    return job.validate({**copy.deepcopy(TREE), **changes}, JobType, Path("a.yaml"))


def strengths_run(wanted: Any) -> list[list[float]]:
    return [list(one.stage.params["task"]["strengths"]) for one in Plan.of(wanted).evaluations]


@pytest.mark.parametrize(
    ("headline", "declared", "expected"),
    [
        (0.5, (1.0,), (0.5,)),  # a task that declares nothing is run at the headline alone
        (0.5, (0.0, 1.0), (0.5, 0.0, 1.0)),
        (1.0, (0.0, 1.0), (1.0, 0.0)),
        (0.0, (0.5, 1.0), (0.0, 0.5, 1.0)),  # as where 0 was chosen
        (-1.0, (1.0, 1.0), (-1.0, 1.0)),
    ],
)
def test_a_headline_comes_before_what_a_task_declares(headline: float, declared: Any, expected: Any) -> None:
    assert with_headline(headline, declared) == expected


def test_the_field_is_the_same_stage_as_strengths_written_in_the_task() -> None:
    """`--set strength=0.5` pays for nothing that a job with strengths of its own has paid for."""
    field = Plan.of(valid(strength=0.5)).evaluations[0].stage
    written = Plan.of(valid(evaluate=[{**PERPLEXITY, "strengths": [0.5]}])).evaluations[0].stage
    assert field.key == written.key != Plan.of(valid()).evaluations[0].stage.key


def test_every_task_is_run_at_the_field() -> None:
    other = {**PERPLEXITY, "label": "more", "strengths": [0, 1]}
    assert strengths_run(valid(strength=0.25, evaluate=[PERPLEXITY, other])) == [[0.25], [0.25, 0.0, 1.0]]
    assert strengths_run(valid(strength=0, evaluate=[PERPLEXITY, other])) == [[0.0], [0.0]]
    assert strengths_run(valid(evaluate=[PERPLEXITY, other])) == [[1.0], [0.0, 1.0]]


def test_it_is_set_on_the_command_line_and_read_back(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(json.dumps(TREE))
    read = job.read(tmp_path / "a.yaml", JobType, ["strength=0.5"])
    (tmp_path / "b.yaml").write_text(job.dump(read))
    assert job.read(tmp_path / "b.yaml", JobType) == read and strengths_run(read) == [[0.5]]


def test_a_strength_without_tasks_is_a_mistake_and_minus_zero_is_zero() -> None:
    with pytest.raises(job.JobError, match="so nothing is measured at it"):
        valid(strength=0.5, evaluate=[])
    assert Plan.of(valid(strength=-0.0)).stages[-1].key == Plan.of(valid(strength=0)).stages[-1].key


def test_a_strength_is_given_or_chosen() -> None:
    with pytest.raises(job.JobError, match=r"strength 0\.5: the job has `choose` to find the strength"):
        valid(strength=0.5, choose=CHOOSE)


@pytest.mark.parametrize("wrong", ["half", True, float("nan"), float("inf")])
def test_it_is_a_number(wrong: Any) -> None:
    with pytest.raises(job.JobError, match="strength"):
        valid(strength=wrong)


def test_it_means_nothing_without_a_patch() -> None:
    with pytest.raises(ValueError, match=r"strength 0\.5: method none makes no patch to scale"):
        run.check(Plan.of(valid(strength=0.5, method={"name": "none"})))


def test_a_check_names_the_job_file_that_it_is_given() -> None:
    planned = Plan.of(valid(strength=0.5, method={"name": "none"}))
    with pytest.raises(ValueError, match=r"^jobs/a\.yaml: strength 0\.5: method none makes no patch"):
        run.check(planned, Path("jobs/a.yaml"))


@pytest.mark.parametrize("field", [{"strength": 0.5}, {"snapshot": 2}])
def test_a_job_below_does_not_say_how_it_is_evaluated(field: dict[str, Any]) -> None:
    """Today's stages start from the end of a training, with its patch at 1: nothing else is taken silently."""
    steps = {"steps": 4, "snapshots": [2], "micro_batch": 4, "max_tokens": 64}
    below = {**TREE, "name": "below", "method": {"name": "lineas"}, "train": steps, "evaluate": [PERPLEXITY], **field}
    above = valid(model={"source": below})
    with pytest.raises(ValueError, match=rf"the job below sets {next(iter(field))} .*, which concerns its own evaluation only"):
        run.check(Plan.of(above))
    run.check(Plan.of(valid(model={"source": {**below, next(iter(field)): None}})))


def test_a_space_goes_over_the_field(tmp_path: Path) -> None:
    """The strengths of a space take the place of the job's; where it names none, the job's field stays."""
    (tmp_path / "a.yaml").write_text(json.dumps({**TREE, "strength": 0.25}))
    own = Space(tmp_path / "s.py", {"strength": {"grid_search": [0.5, 1.0]}}, "perplexity/value")
    other = Space(tmp_path / "s.py", {"method.pooling": "mean"}, "perplexity/value")
    (over, beside) = (sweep_plan(tmp_path / "a.yaml", [], space) for space in (own, other))
    assert strengths_run(over.job_of({}, None, (0.5, 1.0))) == [[0.5, 1.0]]
    assert strengths_run(over.best_job({"strength": 0.5}, None)) == [[0.5]]
    assert strengths_run(beside.job_of({}, None, ())) == [[0.25]]


def test_strengths_are_numbers_wherever_they_are_looked_up(tmp_path: Path) -> None:
    store = Store(str(tmp_path))
    metric = {"value": 0.5, "n": 1}
    store.write_json("runs/a/1/summary.json", {"metrics": {}, "strengths": {"0.50": {"t/x": metric}, "0": {"t/x": metric}}})
    found = read_summary(store, "runs/a/1")
    assert list(found["strengths"]) == [0.5, UNPATCHED]
    (tmp_path / "metrics.json").write_text(json.dumps({"strengths": {"1": {"t/x": metric}, "0.0": {"t/x": metric}}}))
    assert list(stored.strengths(tmp_path)) == [1.0, UNPATCHED]
