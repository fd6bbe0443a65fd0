"""What a command imports, and that a job that was checked is not checked again: torch, transformers and Ray take seconds."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from steerlab import job
from steerlab.run import checked_before
from steerlab.stages import JobType, Plan
from steerlab.storage.store import Store

ROOT = Path(__file__).parents[2]
HEAVY = ("torch", "transformers", "ray", "scipy", "pandas", "datasets", "diffusers", "deepspeed", "sklearn", "wandb")
_COMMAND = """
import atexit, json, runpy, sys
atexit.register(lambda: print(json.dumps(sorted(sys.modules)), file=sys.stderr))
sys.argv = ["steerlab", *sys.argv[1:]]
runpy.run_module("steerlab", run_name="__main__")
"""
Command = Callable[..., tuple[str, set[str]]]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """Run `steerlab` with a cache of its own; return what it printed and the modules that it imported."""
    folder = tmp_path_factory.mktemp("startup")
    environment = {**os.environ, "STEERLAB_CACHE": str(folder / "cache"), "STEERLAB_ROOT": str(folder / "root")}

    def run(*arguments: str) -> tuple[str, set[str]]:
        done = subprocess.run(
            [sys.executable, "-c", _COMMAND, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout, set(json.loads(done.stderr.splitlines()[-1]))

    return run


def heavy(modules: set[str]) -> set[str]:
    return modules & set(HEAVY)


def test_help_and_schema_import_no_library(command: Command) -> None:
    assert "Usage" in (text := command("--help"))[0] and not heavy(text[1])
    printed, modules = command("schema")
    assert not heavy(modules)
    assert printed == (ROOT / "platform/steerlab/job/schema.json").read_text()


def test_plan_imports_the_code_of_the_method_and_the_tasks_that_it_names(command: Command) -> None:
    first, modules = command("plan", "jobs/tiny/aside.yaml")
    assert "ray" not in modules
    again, modules = command("plan", "jobs/tiny/aside.yaml")
    assert again == first
    assert heavy(modules) == {"torch"}
    files = {name.rpartition(".")[2] for name in modules if name.startswith("steerlab.methods.")}
    # The job stands on one that trains without a rotation.
    assert files & {"aside", "vanilla"} == {"aside", "vanilla"} and not files & {"warp", "iav", "lineas", "caa", "denoise"}
    tasks = {name for name in modules if name.startswith("steerlab.evaluation.tasks.")}
    files = {name.rpartition(".")[2] for name in tasks}
    assert files >= {"separation", "perplexity"} and not files & {
        "refusal",
        "toxicity",
        "bipia",
        "arithmetic",
        "controllability",
    }


def test_a_wholly_cached_run_starts_no_ray(command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store.open(str(tmp_path))
    for stage in Plan.of(job.read(ROOT / "jobs/tiny/extract.yaml", JobType)).stages:
        with store.temporary(stage.name, stage.key) as directory:
            (directory / "part").write_text("as another run has made it")
            store.commit(stage.name, stage.key, directory, {"params": dict(stage.params), "seconds": 1.0})
    run = ("run", "jobs/tiny/extract.yaml", "--root", str(tmp_path))
    command(*run)
    printed, modules = command(*run)
    assert "cached" in printed and heavy(modules) == {"torch"}
    folders = sorted((tmp_path / "runs/tiny-extract").iterdir())
    assert len(folders) == 2 and all((folder / "summary.json").is_file() for folder in folders)


@pytest.fixture
def checks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the jobs that are checked in full from now on, with a cache of the test's own."""
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))
    checked: list[str] = []
    check = checked_before.checks.check
    monkeypatch.setattr(
        checked_before.checks, "check", lambda planned, path=None: checked.append(planned.job.name) or check(planned, path)
    )
    return checked


def planned(rows: Path, **changes: Any) -> Plan:
    data = {"prompt_style": "plain", "source": {"source": str(rows), "format": "text"}}
    extract = {"select": {"modules": ".*layernorm"}, "pooling": ["mean"]}
    tree: dict[str, Any] = {"name": "a", "model": {"source": "tiny:model"}, "data": data, "method": {"name": "none"}}
    return Plan.of(job.validate({**tree, "extract": extract, **changes}, JobType, rows.with_name("a.yaml")))


def test_a_job_is_checked_again_when_the_job_or_a_file_or_the_code_changes(
    checks: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a cow"}\n')
    facts = checked_before.check(planned(rows))
    assert checked_before.check(planned(rows)) == facts and checks == ["a"]
    checked_before.check(planned(rows, name="b"))
    rows.write_text('{"text": "a horse"}\n')
    checked_before.check(planned(rows))
    monkeypatch.setattr(checked_before, "_code", lambda: ["another version"])
    checked_before.check(planned(rows))
    assert checks == ["a", "b", "a", "a"]
    # What a crash or an older version has left is no answer.
    for file in (tmp_path / "cache/checks").iterdir():
        file.write_text('{"facts": {"width": 1}, "warnings": []}')
    assert checked_before.check(planned(rows)) == facts and len(checks) == 5


def test_a_refused_job_is_refused_again_and_warnings_are_repeated(checks: list[str], tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "a cow"}\n')
    wrong = {"extract": {"select": {"modules": "no_such_module"}, "pooling": ["mean"]}}
    for _ in range(2):
        with pytest.raises(ValueError, match="no_such_module"):
            checked_before.check(planned(rows, **wrong))
    assert len(checks) == 2
    # A row that `skip_bad` would leave out is a warning of the check.
    odd = {"method": {"name": "linear_act"}, "choose": None}
    said = []
    data = {"prompt_style": "plain", **{role: {"source": str(rows), "format": "text"} for role in ("source", "target")}}
    rows.write_text("".join(f'{{"text": "a cow number {i}"}}\n' for i in range(8)))
    data["target"] = {**data["target"], "offset": 4}
    task = {"task": "perplexity", "data": data["source"], "strengths": [3]}
    for _ in range(2):
        with warnings.catch_warnings(record=True) as given:
            warnings.simplefilter("always")
            checked_before.check(planned(rows, **odd, data=data, evaluate=[task]))
        said.append([str(one.message) for one in given if one.category is UserWarning])
    assert said[0] == said[1] and any("strengths [3.0]" in text for text in said[0])
    assert len(checks) == 3


def test_a_file_that_the_tables_name_holds_an_entry_of_that_name() -> None:
    from steerlab import evaluation, methods

    for table in (methods.TABLE, evaluation.TABLE):
        for name, entry in table.entries.items():
            assert entry.Config.model_fields[table.tag].default == name
