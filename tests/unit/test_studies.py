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
