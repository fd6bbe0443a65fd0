"""Steering jobs that cannot work are refused before anything starts, with what would be right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from steerlab import job, run
from steerlab.run import capacity
from steerlab.stages import JobType, Plan
from steerlab.storage import plan
from steerlab.storage.store import Store

TEXT = {"source": "tiny:topics/train", "format": "text", "limit": 8}
LINEAS: dict[str, Any] = {
    "name": "a",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "source": TEXT, "target": {**TEXT, "offset": 8}},
    "method": {"name": "lineas"},
    "extract": {"max_tokens": 64},
    "train": {"steps": 2, "micro_batch": 8, "max_tokens": 64},
    "choose": {
        "metric": "perplexity/value",
        "tasks": [{"task": "perplexity", "source": "tiny:topics/validation", "format": "text"}],
    },
    "evaluate": [{"task": "perplexity", "source": "tiny:topics/test", "format": "text"}],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(LINEAS))
    return tmp_path / "a.yaml"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["extract=null"], "extract: this key is required by method lineas"),
        (["train=null"], "train: this key is required by method lineas"),
        (["extract.keep=moments"], "extract.keep moments: method lineas is fitted on the rows"),
        (["extract.pooling=[max]"], r"method.pooling mean: extract.pooling is \['max'\]; add it there"),
        (
            ["extract.select.modules=.*post_atention_layernorm"],
            r"extract.select: no module path matches .* similar: model\.layers",
        ),
        (["method.steer.modules=model.layers.9"], "method.steer: no module path matches 'model.layers.9'"),
        (["extract.select.exclude_modules=.*"], "exclude_modules '.*' excludes all 4 modules"),
        (["data.target=null"], "data.target: method lineas needs this data set"),
        (["data.source=null"], "data.source: this key is required, because method lineas trains on it"),
        (["data.target.offset=0"], "data.source and data.target are the same rows"),
        (
            ["data.target.format=instruction", "data.target.source=tiny:instructions/train"],
            "has format text and data.target instr",
        ),
        (["data.target.limit=3"], "data.target.limit 3: a distribution needs 4 samples or more"),
        (["train.grad_accum=2"], "the loss compares whole distributions"),
        (["train.micro_batch=2"], "train.micro_batch 2: a distribution needs 4 samples"),
        (["scale.zero_stage=1"], "needs no sharding; set 0"),
        (
            ["data.validation.source=tiny:topics/test", "data.validation.format=text"],
            "data.validation: the loss of method lineas",
        ),
        (["method.name=caa", "method.steer=null"], "train: method caa trains nothing; remove this section"),
        (
            ["choose.metric=toxicity/share"],
            r"choose.metric: none of choose.tasks measures toxicity/share: no task is called .toxicity.",
        ),
    ],
)
def test_what_cannot_work_is_refused(path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run.check(Plan.of(job.read(path, JobType, overrides)))


def test_the_job_itself_is_fine_in_bfloat16_too(path: Path) -> None:
    """A frozen model trains nothing that would need float32 master weights."""
    run.check(Plan.of(job.read(path, JobType)))
    run.check(Plan.of(job.read(path, JobType, ["model.dtype=bfloat16"])))


def test_strengths_outside_of_the_range_are_warned_of(path: Path) -> None:
    with pytest.warns(UserWarning, match=r"strengths \[1.5\] lie outside of \[0.0, 1.0\], the range of method lineas"):
        run.check(Plan.of(job.read(path, JobType, ["choose.strengths=[0.5, 1.5]"])))


def test_what_a_stage_needs_is_estimated(path: Path) -> None:
    wanted = job.read(path, JobType, ["data.target.limit=100"])
    facts = run.check(Plan.of(wanted))
    needs = capacity.estimates(
        Plan.of(wanted), facts, plan.status(Plan.of(wanted).stages, Store.open(str(path.parent / "root")))
    )
    found = {stage.name: needs[stage.key] for stage in Plan.of(wanted).stages if stage.key in needs}
    assert 0.5 < found["extract"].disk_bytes / (100 * 4 * 128 * 4) < 2, "100 rows of four places of 128 float32"
    assert found["train"].disk_bytes == 0 and found["train"].memory_bytes > 4 * facts.num_parameters
