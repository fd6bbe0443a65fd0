"""Reading jobs: what is right reads back equal, what is wrong ends in one message."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml

from steerlab import job, run
from steerlab.stages import JobType, first_source

GOOD = {
    "name": "a",
    "model": {"source": "tiny:model"},
    "data": {"train": {"source": "tiny:instructions/train"}},
    "method": {"name": "aside", "angle_rad": "pi/2"},
    "train": {"steps": 3, "micro_batch": 4, "grad_accum": 2},
    "evaluate": [{"task": "separation"}],
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "a.yaml"
    file.write_text(yaml.safe_dump(GOOD))
    return file


def test_reads_and_dumps_to_an_equal_job(path: Path) -> None:
    found = job.read(path, JobType)
    assert found.method.angle_rad == math.pi / 2  # type: ignore[attr-defined]
    path.write_text(job.dump(found))
    assert job.read(path, JobType) == found


def test_a_job_is_frozen(path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        job.read(path, JobType).name = "b"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "expected"),
    [("pi", math.pi), ("pi/8", math.pi / 8), ("3*pi/4", 3 * math.pi / 4), ("-pi/2", -math.pi / 2), ("0.5", 0.5)],
)
def test_angles(path: Path, text: str, expected: float) -> None:
    assert job.read(path, JobType, [f"method.angle_rad={text}"]).method.angle_rad == pytest.approx(expected)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trian.steps=3", r"a.yaml: trian: unknown key; did you mean 'train'\? valid keys: .*evaluate"),
        ("method.angel_rad=1", r"method.angel_rad: unknown key; did you mean 'angle_rad'\?"),
        (
            "method.name=asdie",
            r"method.name: 'asdie' is not known; did you mean 'aside'\?; valid: none, vanilla, aside, ise, warp, lineas",
        ),
        ("evaluate.0.limt=3", r"evaluate.0.limt: unknown key; did you mean 'limit'\?"),
        ("evaluate.0.task=seperation", r"evaluate.0.task: 'seperation' is not known; did you mean 'separation'\?"),
        ("train.steps=many", r"train.steps: Input should be a valid integer.*\(given: 'many'\)"),
        ("train.steps=0", r"train.steps: Input should be greater than or equal to 1 \(given: 0\)"),
        ("train.lr=-1", r"train.lr: Input should be greater than 0"),
        ("scale.zero_stage=4", r"scale.zero_stage: Input should be 0, 1, 2 or 3 \(given: 4\)"),
        ("scale.workers=3", r"scale.workers 3 does not divide the 8 rows of a step"),
        ("scale.workers=[2, 1]", r"scale: workers is a number of at least 1 or a pair"),
        ("train.snapshots=[9999]", r"train.snapshots \[9999\]: not between 1 and train.steps"),
        ("snapshot=2", r"snapshot 2 is not one of train.snapshots \[\]"),
        ("extract.dtype=bfloat16", r"extract.dtype: Arrow has no bfloat16"),
        ("extract.pooling=[none, mean]", r"pooling none keeps one row a token and cannot stand beside others"),
        ("extract.pooling=[mean, mean]", r"names one twice"),
        ("extract.second_moment=true", r"second_moment needs keep: moments"),
        ("extract.select.phases=[]", r"phases is empty, so no token is selected"),
        ("extract.select.exclude_roles=[data, instruction, response]", r"takes every selected role out again"),
        ("extract.select.positions=[[3, 3]]", r"the span \[3, 3\) of positions is empty"),
        ("scale.offload=true", r"scale: offload needs zero_stage 1, 2 or 3"),
        ("method.angle_rad=2*tau", r"method.angle_rad: "),
        ("evaluate.7.limit=1", r"7 is not an item of a list of 1"),
        ("steps", r"--set steps: expected a.b=c"),
    ],
)
def test_what_is_wrong_is_said(path: Path, override: str, message: str) -> None:
    with pytest.raises(job.JobError, match=message):
        job.read(path, JobType, [override])


def test_elastic_workers_need_replicated_state(path: Path) -> None:
    with pytest.raises(job.JobError, match="elastic workers need zero_stage 0"):
        job.read(path, JobType, ["scale.workers=[1, 2]", "scale.zero_stage=2"])
    assert job.read(path, JobType, ["scale.workers=[1, 2]"]).scale.worker_range == (1, 2)


def test_a_missing_file_names_the_nearest(path: Path) -> None:
    with pytest.raises(job.JobError, match=r"no such job file; did you mean .*a.yaml\?"):
        job.read(path.with_name("b.yaml"), JobType)


def test_a_file_that_is_no_mapping(path: Path) -> None:
    path.write_text("- 1")
    with pytest.raises(job.JobError, match="a job is a mapping with the keys name, model"):
        job.read(path, JobType)
    path.write_text("a: [")
    with pytest.raises(job.JobError, match="cannot be read as YAML"):
        job.read(path, JobType)


def test_a_base_job_is_inlined_with_every_default(path: Path) -> None:
    other = path.with_name("next.yaml")
    other.write_text(yaml.safe_dump({**GOOD, "name": "next", "model": {"source": "job:a.yaml"}}))
    found = job.read(other, JobType)
    assert job.base_job(found, JobType) == job.read(path, JobType)
    other.write_text(job.dump(found))
    path.unlink()
    assert job.read(other, JobType) == found


def test_jobs_that_build_on_each_other_in_a_circle(path: Path) -> None:
    path.write_text(yaml.safe_dump({**GOOD, "model": {"source": "job:a.yaml"}}))
    with pytest.raises(job.JobError, match="goes in a circle"):
        job.read(path, JobType)


def test_an_error_in_the_base_job_names_its_file(path: Path) -> None:
    other = path.with_name("next.yaml")
    other.write_text(yaml.safe_dump({**GOOD, "model": {"source": "job:a.yaml"}}))
    path.write_text(yaml.safe_dump({**GOOD, "trian": 1}))
    with pytest.raises(job.JobError, match=r"a.yaml: trian: unknown key"):
        job.read(other, JobType)


def test_the_schema_knows_every_method_and_task() -> None:
    from steerlab.evaluation import TASKS
    from steerlab.methods import METHODS

    text = job.schema(JobType)
    assert all(f'"const": "{name}"' in text for name in (*METHODS, *TASKS))


@pytest.mark.parametrize("file", sorted(Path("jobs").rglob("*.yaml")), ids=str)
def test_every_published_job_is_valid(file: Path) -> None:
    found = job.read(file, JobType)
    assert found.evaluate or found.extract
    if first_source(found).startswith(("tiny:", "pixels:")):  # the others are downloads
        run.check(found)
