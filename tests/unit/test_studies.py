"""The studies of jobs/ ask for jobs that could start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steerlab import job, run
from steerlab.stages import JobType, Plan

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture
def preferences(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(JOBS))
    import preferences

    return preferences


@pytest.fixture
def protection(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(JOBS))
    import protection

    return protection


def test_lines_of_the_protection_study_differ_in_what_they_name(protection: Any) -> None:
    variants = protection.variants((0.05,), 0.1)
    found = {variant.group: protection.wanted("tiny", variant, 7, "train", []) for variant in variants}
    for name in found.keys() - {"before", "safety rows mixed in"}:  # which read more rows than the others
        run.check(Plan.of(found[name]))
    assert found["before"].name == "tiny-safety" and {found[name].train.seed for name in found.keys() - {"before"}} == {7}
    safety = found["eigenvectors"].data.by_role["safety"]
    (mixed,) = found["safety rows mixed in"].data.train.also
    assert mixed.source == safety.source and mixed.limit == (safety.limit or 100) // 2
    assert all("safety" not in found[name].data.by_role for name in ("full fine-tuning", "safety rows mixed in"))
    assert found["selected layers, half way"].evaluate[0].strengths == (1.0, 0.5)
    settings = {name: one.method.model_dump() for name, one in found.items() if one.method.name == "warp"}
    assert {one["seed"] for one in settings.values()} == {7} and {one["others"] for one in settings.values()} == {"train"}
    shown = {name: (one["rotation"], one["mask"], one["keep_ratio"]) for name, one in settings.items()}
    assert shown == {
        "selected layers, half way": ("none", "importance", 0.0),
        "eigenvectors": ("safety", "importance", 0.05),
        "no rotation": ("none", "importance", 0.05),
        "random rotation": ("random", "importance", 0.05),
        "random mask": ("safety", "random", 0.1),
        "magnitude mask": ("safety", "magnitude", 0.1),
    }


def test_every_variant_trains_in_bfloat16_and_is_evaluated_in_float32(preferences: Any) -> None:
    for variant in preferences.VARIANTS:
        (plain, two) = (preferences.wanted("tiny", variant, 3, [], dtype) for dtype in (None, "bfloat16"))
        run.check(Plan.of(two))
        below = job.base_job(two, JobType)
        assert below is not None
        assert (plain.model.dtype, two.model.dtype, below.model.dtype) == ("float32", "float32", "bfloat16")
        assert two.evaluate == plain.evaluate and not below.evaluate
        assert (below.method, below.train, two.train) == (plain.method, plain.train, None)
        assert below.train.seed == 3


def test_alphas_are_those_that_were_measured(preferences: Any) -> None:
    variant = preferences.VARIANTS[0]
    one = preferences.wanted("tiny", variant, 0, ["evaluate.0.strengths=[1,0.25]"], None)
    assert one.evaluate[0].strengths == (1.0, 0.25)
    assert preferences.alphas_of([{1.0: {}, 0.0: {}, 0.25: {}}]) == [0.25, 1.0]
