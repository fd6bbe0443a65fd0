"""The parts of the quickstart are jobs and sweeps that could start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from steerlab import job
from steerlab.methods import METHODS
from steerlab.sweeps import sweep_request

JOBS = Path(__file__).parents[2] / "jobs"


@pytest.fixture
def quickstart(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(JOBS))
    import quickstart

    return quickstart


@pytest.mark.filterwarnings("ignore:strengths .* lie outside")
def test_every_part_that_needs_no_download_can_start(quickstart: Any) -> None:
    parts = [part for part in quickstart.PARTS if part.file.startswith("tiny/")]
    checked = {part.name: quickstart.check(part).todo for part in parts}
    sweeps = {name: todo for name, todo in checked.items() if isinstance(todo, sweep_request.SweepRequest)}
    knobs = {key for todo in sweeps.values() for unit in todo.units for trial in unit.trials for key in trial.params}
    assert knobs >= {"method.angle_rad", "method.keep_ratio", "snapshot", "strength", "model.sampler.guidance"}
    # Each knob has what theory says about it, a control that is flat, and controls are never the best.
    for todo in sweeps.values():
        assert {"flat"} < {prediction.expected for prediction in todo.plan.space.predictions}
        assert todo.plan.space.controls or todo.plan.bounds
    jobs_ = [todo if isinstance(todo, job.Job) else todo.plan.job for todo in checked.values()]
    assert all(one.scale.warm and one.scale.cpus_per_worker == 1 for one in jobs_)
    assert {"aside", "ise", "warp", "lineas", "iav", "dpo"} <= {one.method.name for one in jobs_} <= set(METHODS)
