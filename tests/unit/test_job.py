"""Reading jobs: what is right reads back equal, what is wrong ends in one message."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from steerlab import job, run
from steerlab.stages import JobType, Plan

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
            r"method.name: 'asdie' is not known; did you mean 'aside'\?; valid: none, vanilla, aside, ise, warp, resta",
        ),
        ("evaluate.0.limt=3", r"evaluate.0.limt: unknown key; did you mean 'limit'\?"),
        ("evaluate.0.task=seperation", r"evaluate.0.task: 'seperation' is not known; did you mean 'separation'\?"),
        ("train.steps=many", r"train.steps: Input should be a valid integer.*\(given: 'many'\)"),
        ("train.steps=0", r"train.steps: Input should be greater than or equal to 1 \(given: 0\)"),
        ("train.steps=null", r"train: steps: this key is required, or epochs"),
        ("train.epochs=3", r"train: steps 3 and epochs 3 both set the length of the training"),
        ("train={steps: 3, warmup_steps: 1, warmup_ratio: 0.5}", r"train: warmup_ratio 0.5 and warmup_steps 1 both set"),
        ("train.patience=2", r"train: patience 2 counts evaluation losses: set eval_every"),
        ("train.lr=-1", r"train.lr: Input should be greater than 0"),
        ("scale.zero_stage=4", r"scale.zero_stage: Input should be 0, 1, 2 or 3 \(given: 4\)"),
        ("scale.workers=3", r"scale.workers 3 does not divide the 8 rows of a step"),
        ("scale.workers=[2, 1]", r"scale: workers is a number of at least 1 or a pair"),
        ("train.snapshots=[9999]", r"train.snapshots \[9999\]: not between 1 and train.steps"),
        ("snapshot=2", r"snapshot 2 is not one of train.snapshots \[\]"),
        ("extract.dtype=bfloat16", r"extract.dtype: Arrow has no bfloat16"),
        ("extract.pooling=[none, mean]", r"pooling none stores one row for each token and cannot be combined with others"),
        ("extract.pooling=[mean, mean]", r"names one twice"),
        ("extract.second_moment=true", r"second_moment needs keep: moments"),
        ("extract.select.phases=[]", r"phases is empty, so no token is selected"),
        ("extract.select.exclude_roles=[data, instruction, response]", r"excludes every selected role"),
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


SETTINGS = {
    "evaluate": [
        {"task": "toxicity"},
        {"task": "perplexity", "source": "tiny:instructions/test", "offset": 3},
        {"task": "controllability", "of": {"task": "toxicity"}, "metric": "toxicity/score"},
    ],
    "data": {"train": {"source": "tiny:instructions/train", "equals": {"meta.label": "x"}}},
    "choose": None,
}


@pytest.mark.parametrize(
    ("override", "place", "value"),
    [
        ("train.lr=2e-2", "train.lr", 0.02),
        ("train.steps=1e3", "train.steps", 1000),
        ("train.steps=010", "train.steps", 10),
        ("train=null", "train", None),
        ("name=2026-01-01", "name", "2026-01-01"),
        ("data.train.subset=no", "data.train.subset", "no"),
        ("data.train.fill.output=a=b", "data.train.fill.output", "a=b"),
        ('data.train.fill.output="*.mlp: [x # y"', "data.train.fill.output", "*.mlp: [x # y"),
        ("method.gradual=true", "method.gradual", True),
        ('data.train.equals."meta.label"=y', "data.train.equals", {"meta.label": "y"}),
        ("data.train.equals={meta.label: y}", "data.train.equals", {"meta.label": "y"}),
        # One value of a default, the rest of which stays.
        ("evaluate.0.prompts.limit=20", "evaluate.0.prompts", {"limit": 20, "format": "text", "distinct": True}),
        ("evaluate.0.prompts.source=tiny:x", "evaluate.0.prompts", {"source": "tiny:x", "format": "text", "shuffle": 0}),
        ("evaluate.2.of.prompts.limit=20", "evaluate.2.of.prompts", {"limit": 20, "format": "text", "distinct": True}),
        ("evaluate.1.data.limit=20", "evaluate.1.data", {"limit": 20, "source": "tiny:instructions/test", "offset": 3}),
        ("evaluate.0.label=a.b", "evaluate.0.label", "a.b"),
        ("scale.workers=2", "scale.workers", 2),
    ],
)
def test_one_value_is_overridden_as_it_is_written(path: Path, override: str, place: str, value: object) -> None:
    path.write_text(yaml.safe_dump(GOOD | SETTINGS))
    found: Any = job.read(path, JobType, [override]).model_dump(mode="json")
    for part in place.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    assert found == (found | value if isinstance(value, dict) else value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name=[", r"--set name=\[: .* a \[ or { is not closed; a text goes in quotes: 'name=\"...\"'"),
        ("extract.select.modules=*.mlp", r"a text that begins with \* is an alias in YAML; a text goes in quotes"),
        ("name=&a", r"a.yaml: name: "),
        ("name=@a", r"--set name=@a: .*goes in quotes"),
        ("name={a", r"--set name={a: .*goes in quotes"),
        ("name=%a", r"--set name=%a: .*goes in quotes"),
        ("name=:", r"--set name=:: .*goes in quotes"),
        ("name=a # b", r"would be a comment"),
        ("train.steps=.inf", r"--set train.steps=.inf: .*finite numbers"),
        ("a..b=1", r"'a..b' is not the path of a key"),
        (".a=1", r"is not the path of a key"),
        ("a.=1", r"is not the path of a key"),
        ("=x", r"--set =x: expected a.b=c"),
        ("", r"--set : expected a.b=c"),
        ("evaluate.-1.limit=1", r"-1 is not an item of a list of 3"),
        ("evaluate.\u00b2=1", r"is not an item of a list of 3"),
        ("train.steps.x=1", r"steps holds 3, not a group of settings"),
        ("train.steps=true", r"train.steps: .*integer \(given: True\); true and false are not numbers"),
        ('train.steps="5"', r"train.steps: .*integer \(given: '5'\); write the number without quotes"),
        ("train.steps=1:30", r"train.steps: .*given: '1:30'"),
        ("method.gradual=yes", r"method.gradual: .*given: 'yes'\); write true or false"),
        ("name=123", r"name: .*given: 123\); write a text in quotes"),
        ("scale.workers=x", r"scale.workers: Input should be a valid integer or a list \(given: 'x'\)"),
        ("scale.workers=[1]", r"scale.workers.1: this key is required"),
        ("evaluate=[{}]", r"evaluate.0.task: this key is required"),
        ("model=5", r"model: Input should be a mapping"),
        ("model.source={a: 1}", r"model.source: name: this key is required"),
        ("train.seed=4294967296", r"train.seed: .*less than 4294967296"),
        ("evaluate.0.seed=-1", r"evaluate.0.seed: .*greater than or equal to 0"),
        ("name=" + "y" * 10**6, r"name: .*1000002 characters\)"),
        ("z" * 10**6 + "=1", r"zzz... \(1000000 characters\): unknown key"),
    ],
)  # fmt: skip
def test_a_wrong_override_ends_in_one_line(path: Path, override: str, message: str) -> None:
    path.write_text(yaml.safe_dump(GOOD | SETTINGS))
    with pytest.raises(job.JobError, match=message) as caught:
        job.read(path, JobType, [override])
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "a.yaml: the file is empty; a job is a mapping"),
        (b"# nothing\n", "a.yaml: the file is empty"),
        (b"- a: 1\n", "the file holds a list; a job is a mapping"),
        (b"text\n", "the file holds one value"),
        (b"name: a\nx: \xff\n", "a.yaml:2: cannot be read as YAML: the file is not UTF-8 text"),
        (bytes(range(256)), "the file is not UTF-8 text"),
        ("name: a\n".encode("utf-16"), "the file is not UTF-8 text"),
        (b"train: {steps: 1}\nname: a\ntrain: {steps: 2}\n", "a.yaml:3: .*the key 'train' is in lines 1 and 3"),
    ],
)
def test_a_file_that_is_no_job_is_named_with_its_line(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(job.JobError, match=message) as caught:
        job.read(path, JobType)
    assert "\n" not in str(caught.value)


def test_a_byte_order_mark_and_a_folder(path: Path, tmp_path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert job.read(path, JobType).name == "a"
    with pytest.raises(job.JobError, match="is a folder, not a file, so it is not a job"):
        job.read(tmp_path, JobType)
    path.write_bytes(path.read_bytes() + b"1: x\n")
    with pytest.raises(job.JobError, match=r"a.yaml: 1: a key is a text; write it in quotes$"):
        job.read(path, JobType)


def test_texts_stay_texts_in_free_settings(path: Path) -> None:
    sampler = "{options: {beta_end: 2e-2, spacing: no, clip: true, power: 1.0, order: 2, name: '2'}}"
    path.write_text(
        f"name: a\nmodel: {{source: pixels:digits-model, kind: diffusion, sampler: {sampler}}}\nmethod: {{name: none}}\n"
    )
    options = job.read(path, JobType).model.drawing.options
    assert options == {"beta_end": 0.02, "spacing": "no", "clip": True, "power": 1.0, "order": 2, "name": "2"}
    assert [type(value) for value in options.values()] == [float, str, bool, float, int, str]


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
    with pytest.raises(job.JobError, match="forms a circle"):
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
    if Plan.of(found).source.startswith(("tiny:", "pixels:")):  # the others are downloads
        run.check(Plan.of(found))
