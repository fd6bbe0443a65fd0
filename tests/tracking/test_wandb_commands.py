"""The commands around W&B, whole, as somebody types them, with the stand-in server at the other end."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import standin
import yaml
from typer.testing import CliRunner, Result

from steerlab import tracking
from steerlab.cli import app
from steerlab.job import TrackConfig
from steerlab.tracking import writer_process
from steerlab.tracking.wandb_client import sweep_page, workspaces

REPOSITORY = Path(__file__).parents[2]
LOSS = """from ray import tune
SPACE = {"train.lr": tune.loguniform(1e-4, 1e-2), "train.steps": tune.choice([30, 60])}
METRIC, MODE = "train/loss", "min"
"""
# What is left open by the client and by wandb-workspaces is theirs.
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")


def call(*arguments: str | int | Path, code: int = 0) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


@pytest.fixture
def job(tmp_path: Path) -> Path:
    shutil.copytree(REPOSITORY / "jobs/tiny", tmp_path / "jobs")
    path = tmp_path / "jobs/aside.yaml"
    tree = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump(tree | {"track": {"wandb": {"project": "tests", "entity": "me", "mode": "online"}}}))
    (path.parent / "loss.py").write_text(LOSS)
    return path


# wandb-sweep


def test_a_space_is_printed_as_the_sweep_that_wandb_makes_of_it(server: standin.Standin, job: Path, tmp_path: Path) -> None:
    space = REPOSITORY / "search_spaces/rotation_angle.py"
    printed = call("wandb-sweep", job, space).stdout
    assert printed.startswith(f"# run by: steerlab sweep {job} {space} --backend wandb --wandb-sweep ENTITY/PROJECT/ID\n")
    config = yaml.safe_load(printed)
    assert (config["method"], config["metric"]) == ("grid", {"name": "separation/sep", "goal": "maximize"})
    assert config["parameters"]["method.angle_rad"]["values"][-1] == pytest.approx(3.14159265)
    (tmp_path / "sweep.yaml").write_text(printed)
    made = subprocess.run(
        [sys.executable, "-m", "wandb", "sweep", "--project", "tests", "--entity", "me", str(tmp_path / "sweep.yaml")],
        cwd=tmp_path, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert made.returncode == 0 and "sweep1" in made.stderr, made.stdout + made.stderr
    sent = yaml.safe_load(server.sweeps["sweep1"]["config"])
    assert {name: sent[name] for name in config} == config and not server.unknown


def test_a_space_whose_trials_wandb_may_stop_early(job: Path) -> None:
    printed = call("wandb-sweep", job, job.parent / "loss.py", "--method", "bayes", "--min-reports", 4).stdout
    config = yaml.safe_load(printed)
    assert (config["method"], config["metric"]) == ("bayes", {"name": "train/loss", "goal": "minimize"})
    assert config["early_terminate"] == {"type": "hyperband", "min_iter": 4}
    space = REPOSITORY / "search_spaces/rotation_angle.py"
    refused = call("wandb-sweep", job, space, "--min-reports", 4, code=2)
    assert "separation/sep is measured once, at the end" in " ".join(refused.stderr.split()) and not refused.stdout


def test_an_evaluation_loss_has_the_name_that_wandb_knows_it_by(job: Path) -> None:
    validation = "data.validation={source: 'tiny:instructions/validation', limit: 8}"
    (job.parent / "loss.py").write_text(LOSS.replace("train/loss", "eval/loss"))
    printed = call("wandb-sweep", job, job.parent / "loss.py", "--set", validation).stdout
    assert yaml.safe_load(printed)["metric"]["name"] == "train/eval/loss"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "hyperopt"], "--method hyperopt: W&B has grid, random and bayes"),
        (["--method", "grid"], "SPACE['train.lr'] is a range; W&B's grid needs lists of values: use random or bayes"),
    ],
)
def test_what_wandb_sweep_refuses(job: Path, arguments: list[str], message: str) -> None:
    refused = call("wandb-sweep", job, job.parent / "loss.py", *arguments, code=2)
    assert message in " ".join(refused.stderr.split()) and not refused.stdout


# wandb-send


def tracked(folder: Path, mode: str, run_id: str = "run-1") -> None:
    """Leave a run folder as a run does."""
    track = TrackConfig.model_validate({"wandb": {"project": "tests", "mode": mode}})
    run = tracking.Tracker(track, run_id, "aside", {"seed": 0}, folder)
    for step in range(1, 31):
        run.log({"step": step, "train/loss": 1 / step})
    run.table("samples/separation", [{"prompt": "a", "output": "b"}])
    run.finish({"separation/sep": 0.5}, exit_code=0, wait_s=60)


def test_an_offline_run_is_sent_and_sent_again_without_doubles(server: standin.Standin, tmp_path: Path) -> None:
    folder = tmp_path / "runs/aside/1"
    tracked(folder, "offline")
    assert not server.runs
    for _ in range(2):
        assert "sent" in call("wandb-send", folder).stdout
        lines = server.lines("run-1")
        assert [line.get("train/step") for line in lines] == [*range(1, 31), None] and not server.overwritten
        assert [line["_step"] for line in lines] == list(range(31))
    assert server.runs["run-1"]["summary"]["separation/sep"] == 0.5 and set(server.exits["run-1"]) == {0}


def test_a_run_that_had_no_key_says_what_sends_it(
    server: standin.Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as without:
        without.delenv("WANDB_API_KEY")
        without.setenv("NETRC", str(tmp_path / "none"))
        with pytest.warns(UserWarning, match="written offline; with a key, `steerlab wandb-send RUN` sends it"):
            tracked(tmp_path / "run", "online")
        refused = call("wandb-send", tmp_path / "run", code=2)
        assert "no W&B API key" in refused.stderr and not server.runs
    writer_process.close(30)
    call("wandb-send", tmp_path / "run")
    assert len(server.lines("run-1")) == 31


def test_a_folder_that_was_never_tracked_is_refused(server: standin.Standin, tmp_path: Path) -> None:
    refused = call("wandb-send", tmp_path, code=2)
    assert "is not the folder of a run that was tracked in W&B" in " ".join(refused.stderr.split()) and not server.runs


@pytest.mark.slow
def test_an_offline_sweep_is_sent_with_its_runs_and_its_page(server: standin.Standin, tmp_path: Path) -> None:
    folder = tmp_path / "sweeps/aside/s1"
    track = TrackConfig.model_validate({"wandb": {"project": "tests", "mode": "offline"}})
    assert (
        sweep_page.begin(track, {"name": "aside", "method": "grid", "parameters": {"train.lr": {"values": [1]}}}, folder)
        is None
    )
    for name in ("0001-a-0", "0002-b-0", "best-0"):
        tracked(tmp_path / f"runs/aside/s1-{name}", "offline", f"s1-{name}")
    for _ in range(2):
        assert f"{folder}: on the page of sweep sweep1" in call("wandb-send", folder).stdout
        assert sorted(server.runs) == ["s1-0001-a-0", "s1-0002-b-0", "s1-best-0"] and len(server.sweeps) == 1
        assert all(len(server.lines(run)) == 31 for run in server.runs) and not server.overwritten
    (asked,) = server.sweeps.values()
    assert asked["priorRunsFilters"] == '{"$or": [{"name": "s1-0001-a-0"}, {"name": "s1-0002-b-0"}]}'


# dashboards push


def test_every_definition_is_written_to_the_project(server: standin.Standin) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("wandb_workspaces", reason="wandb-workspaces (the extra `dashboards`) is not installed")
        folder = REPOSITORY / "dashboards"
        printed = call("dashboards", "push", "--project", "me/tests", "--folder", folder).stdout
    boards = workspaces.load(folder)
    assert [line.partition(":")[0] for line in printed.splitlines() if f": {server.url}/me/tests" in line] == [
        *boards,
        "report",
    ]
    assert len(server.views) == len(boards) + 1 and not server.unknown
    for view, board in zip(server.views, boards.values(), strict=False):
        assert (view["entityName"], view["projectName"], view["displayName"]) == ("me", "tests", board.title)
        spec = json.loads(view["spec"])
        sections = {section["name"]: section["panels"] for section in spec["section"]["panelBankConfig"]["sections"]}
        kinds = [panel["viewType"] for panel in sections["Results"]]
        assert kinds == ["Parallel Coordinates Plot", "Parameter Importance", "Run Comparer"]
        assert len(sections["Metric against parameter"]) == len(board.parameters)
        assert len(sections.get("Pareto", [])) == len(board.metrics) - 1
        runs = spec["section"]["runSets"][0]
        assert {name for f in runs["filters"]["filters"] for name in f["value"]} == set(board.methods)
    report = json.loads(server.views[-1]["spec"])
    titles = [block["children"][0]["text"] for block in report["blocks"] if block["type"] == "heading" and block["level"] == 1]
    assert titles == [board.title for board in boards.values() if board.in_report]


@pytest.mark.parametrize("status", [401, pytest.param(500, marks=pytest.mark.slow)])
def test_a_server_that_refuses_dashboards_is_named(server: standin.Standin, status: int) -> None:
    pytest.importorskip("wandb_workspaces")
    server.fail = status
    refused = call("dashboards", "push", "--project", "me/tests", "--folder", REPOSITORY / "dashboards", code=2)
    assert "W&B refused" in refused.stderr and not server.views


# --backend wandb


def test_wandb_chooses_nothing_for_somebody_without_a_key(
    server: standin.Standin, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    arguments: list[Any] = ["sweep", job, job.parent / "loss.py", "--root", tmp_path / "root", "--backend", "wandb"]
    refused = call(*arguments, "--wandb-sweep", "me/tests/abc", code=2)
    assert "no W&B API key: set WANDB_API_KEY or run `wandb login`" in " ".join(refused.stderr.split())
    assert not server.agents and not (tmp_path / "root/sweeps").exists()
    refused = call(*arguments, code=2)
    assert "wandb together with --wandb-sweep ENTITY/PROJECT/ID" in " ".join(refused.stderr.split())
