"""The plan of a job as a value: what it asks is asked once, however many jobs stand on one another."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from steerlab import job
from steerlab.data import sources
from steerlab.job import Job
from steerlab.run import length
from steerlab.stages import JobType, Plan

TREE: dict[str, Any] = {
    "name": "bottom",
    "model": {"source": "tiny:model"},
    "data": {"train": {"source": "tiny:instructions/train", "limit": 10}},
    "method": {"name": "vanilla"},
    "train": {"steps": 2, "lr": 1e-3, "max_tokens": 64},
    "evaluate": [{"task": "perplexity", "source": "tiny:instructions/test", "limit": 4}],
}


def stacked(depth: int) -> Job:
    """A job on a job on a job: each trains the model of the one below."""
    tree = TREE
    for number in range(1, depth):
        tree = {**TREE, "name": f"on-{number}", "model": {"source": tree}, "train": {**TREE["train"], "seed": number}}
    return job.validate(tree, JobType, Path("a.yaml"))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often a plan validates a job and asks what a source holds."""
    found: Counter[str] = Counter()
    validate, fingerprint = JobType.model_validate.__func__, sources.fingerprint  # type: ignore[attr-defined]

    def validated(kind: type[Job], *given: Any, **how: Any) -> Job:
        found["jobs"] += 1
        return validate(kind, *given, **how)

    def counted(source: str) -> Any:
        found["sources"] += 1
        return fingerprint(source)

    monkeypatch.setattr(JobType, "model_validate", classmethod(validated))
    monkeypatch.setattr(sources, "fingerprint", counted)
    return found


def test_a_chain_of_jobs_is_walked_once(asked: Counter[str]) -> None:
    counts = []
    for depth in (1, 2, 4, 8):
        wanted = stacked(depth)
        asked.clear()
        stages = Plan.of(wanted).stages
        assert [stage.name for stage in stages] == ["train"] * depth + ["evaluate"]
        counts.append((asked["jobs"], asked["sources"]))
    assert [jobs for jobs, _ in counts] == [0, 1, 3, 7]
    one = counts[0][1]
    steps = [(later - one) / depth for (_, later), depth in zip(counts[1:], (1, 3, 7), strict=True)]
    assert one > 0 and len(set(steps)) == 1, counts


def test_the_parts_of_a_plan_are_the_stages_that_run() -> None:
    plan = Plan.of(stacked(3))
    assert plan.below is not None and plan.below.below is not None and plan.below.below.below is None
    assert [one.job.name for one in plan.chain] == ["on-2", "on-1", "bottom"]
    models = [one.model for one in reversed(plan.chain)]
    assert list(plan.stages) == [*models, *(one.stage for one in plan.evaluations)]
    assert list(plan.trainings) == [stage.key for stage in models if stage is not None]
    assert [trained.name for trained in plan.trainings.values()] == ["bottom", "on-1", "on-2"]
    assert plan.source == "tiny:model" and not plan.leaves_patch and plan.start.stage == plan.below.model


def test_a_job_that_makes_no_model_evaluates_the_one_below() -> None:
    patched = {**TREE, "name": "patched", "method": {"name": "aside"}}
    tree = {"name": "asks", "model": {"source": patched}, "method": {"name": "none"}, "evaluate": TREE["evaluate"]}
    plan = Plan.of(job.validate(tree, JobType, Path("a.yaml")))
    assert plan.below is not None and plan.model == plan.below.model and plan.leaves_patch
    assert list(plan.trainings.values()) == [plan.below.job]


def test_epochs_are_said_in_steps_of_the_rows_that_the_job_names() -> None:
    """Also for a training below, on whose rows this job does not train."""
    upper = {**TREE, "name": "upper", "model": {"source": TREE}, "train": {"epochs": 2.5, "micro_batch": 4, "max_tokens": 64}}
    plan = Plan.of(JobType.model_validate(upper))
    assert list(length.by_key(plan).values()) == [2, 7]
    (line,) = length.in_words(plan)
    assert line.startswith("upper: 2.5 epochs of 10 rows, 4 in a step, are 7 steps;"), line
    assert plan.model is not None and "'epochs': 2.5" in str(plan.model.params) and "'steps'" not in str(plan.model.params)
