"""Folders that a stranger may have written, or in which a command starts: sweeps to go on with, links in ROOT, settings."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_report_sweeps import write_run, write_sweep

from steerlab import report
from steerlab.guards import files
from steerlab.storage.store import Store
from steerlab.sweeps import driver, sweep_request, trial, trials, tuner
from steerlab.sweeps import space as spaces
from steerlab.sweeps.history import History
from steerlab.sweeps.units import trial_id
from steerlab.tracking import spool
from steerlab.tracking.wandb_client import agents, sweep_page

JOB = {
    "name": "a",
    "model": {"source": "tiny:model"},
    "data": {"train": {"source": "tiny:instructions/train", "limit": 32}},
    "method": {"name": "aside"},
    "train": {"steps": 4, "lr": 2e-3, "micro_batch": 8, "max_tokens": 64},
    "evaluate": [{"task": "perplexity", "source": "tiny:instructions/test", "limit": 8}],
}
FOLDER = "sweeps/a/20260101-000000-aaaaaa"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "root"))


@pytest.fixture
def asked(tmp_path: Path) -> sweep_request.SweepRequest:
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(JOB))
    (tmp_path / "space.py").write_text(
        "from ray import tune\nSPACE = {'train.lr': tune.grid_search([1e-3, 2e-3])}\nMETRIC = 'perplexity/value'\n"
    )
    return sweep_request.checked(trials.plan(tmp_path / "a.yaml", (), spaces.load(tmp_path / "space.py")), None, 1)


def suggestion(number: int, params: dict[str, Any], name: str | None = None, **more: Any) -> dict[str, Any]:
    of = {"trial_id": name or trial_id(params), "params": params}
    return {"event": "suggest", "time": 1, "number": number, "trials": [of], "seeds": [0], **more}


EVIL = {"model.source": "/evil", "model.trust_remote_code": True}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (suggestion(1, EVIL), "unit 1 does not belong to this job, space and seeds"),
        (suggestion(9, {"train.lr": 1e-3}), "unit 9 does not belong to this job"),
        (suggestion(1, {"train.lr": 1e-3}, seeds=[7]), "unit 1 does not belong to this job"),
        (suggestion(1, {"train.lr": 1e-3}, "x/../../../y"), r"line 2 is damaged: trials\.0\.trial_id"),
        (suggestion(1, {"train.lr": 1e-3}, "aaaaaaaa"), "aaaaaaaa is not the name of the trial"),
        (suggestion(-1, {"train.lr": 1e-3}), "line 2 is damaged: number"),
        (suggestion(1, {"train.lr": 1e-3}, seeds=["0/../.."]), "line 2 is damaged: seeds"),
        (suggestion(1, {"train.lr": 1e-3}, trials=[]), "line 2 is damaged: trials"),
        ([1], "line 2 is damaged"),
        ({"event": 3}, "line 2 is damaged: event"),
        ({"event": "finish", "unit": 3, "rows": []}, "unit 3 was never suggested"),
        ({"event": "finish", "unit": "a"}, "line 2 is damaged: unit"),
    ],
)
def test_a_sweep_that_goes_on_takes_no_unit_of_another(
    store: Store, asked: sweep_request.SweepRequest, line: Any, message: str
) -> None:
    """A line of a history sets fields of the user's own job: only what the user's space gives."""
    store.append_line(f"{FOLDER}/history.jsonl", {"event": "begin", "time": 1})
    store.append_line(f"{FOLDER}/history.jsonl", line)
    with pytest.raises(ValueError, match=message):
        driver._begin(asked, store, FOLDER)


def test_what_a_searcher_left_sets_entries_of_the_space_alone(store: Store, asked: sweep_request.SweepRequest) -> None:
    drawn = replace(asked, units=[])
    history = f"{FOLDER}/history.jsonl"
    store.append_line(history, {"event": "begin", "time": 1})
    store.append_line(history, suggestion(1, {"train.lr": 0.5}))
    assert [unit.number for unit in driver._begin(drawn, store, FOLDER).pending] == [1]
    store.append_line(history, suggestion(2, {"train.lr": 0.5, **EVIL}))
    with pytest.raises(ValueError, match=r"unit 2 sets 'model\.source', which is not an entry of SPACE"):
        driver._begin(drawn, store, FOLDER)


def test_a_sweep_goes_on_with_its_own_units(store: Store, asked: sweep_request.SweepRequest) -> None:
    first = History(store, FOLDER)
    first.add("begin", sweep="20260101-000000-aaaaaa", job="a")
    for unit in asked.units:
        first.suggest(unit)
    assert driver._begin(asked, store, FOLDER).pending == asked.units


def test_a_unit_runs_what_was_asked_for_and_nothing_that_was_put_in_its_place(
    store: Store, asked: sweep_request.SweepRequest
) -> None:
    told = tuner._request(asked, store, FOLDER, asked.units[0], {"command": "x"})
    assert trial._request(store, told["request"], told["sha256"]).sweep == FOLDER.rpartition("/")[2]
    store.write_json(told["request"], {"unit": {}, "jobs": []})
    with pytest.raises(ValueError, match="has changed while the sweep ran"):
        trial._request(store, told["request"], told["sha256"])


# Links and pipes in ROOT


def test_nothing_is_written_or_cut_through_a_link(store: Store, tmp_path: Path) -> None:
    victim = tmp_path / "token"
    victim.write_text("only copy, no line break")
    run = Path(store.root) / "runs/n/id"
    (run / "wandb").mkdir(parents=True)
    for name in ("metrics.jsonl", "wandb/events.jsonl"):
        (run / name).symlink_to(victim)
    with pytest.raises(files.FileError, match=r"metrics\.jsonl is a link, and this file is written to"):
        store.append_line("runs/n/id/metrics.jsonl", {"a": 1})
    with pytest.raises(files.FileError, match=r"events\.jsonl is a link, and this file is written to"):
        spool._opened(run / "wandb/events.jsonl")
    assert victim.read_text() == "only copy, no line break"


def test_a_pipe_that_is_written_to_is_not_waited_for(store: Store) -> None:
    run = Path(store.root) / "runs/n/id"
    run.mkdir(parents=True)
    os.mkfifo(run / "metrics.jsonl")
    with pytest.raises(files.FileError, match=r"metrics\.jsonl is a named pipe, and this file is written to"):
        store.append_line("runs/n/id/metrics.jsonl", {"a": 1})


def test_a_torn_line_is_cut_and_the_next_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"kind": "a"}\n{"kind"')
    with spool._opened(path) as opened:
        opened.write(b'{"kind": "b"}\n')
    assert path.read_bytes() == b'{"kind": "a"}\n{"kind": "b"}\n'


# The folder in which a command starts


def test_no_setting_of_the_current_folder_reaches_the_client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`wandb/settings` there names the server that gets the user's key."""
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb/settings").write_text("[default]\nbase_url = http://127.0.0.1:9\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)

    started: list[Any] = []

    def noted(*command: Any, **how: Any) -> Any:
        started.append(how.get("cwd"))
        raise OSError("not started")

    monkeypatch.setattr("subprocess.Popen", noted)
    monkeypatch.setattr("subprocess.run", noted)
    from steerlab.tracking import writer, writer_process

    for call in (
        lambda: writer_process.started(tmp_path),
        lambda: sweep_page._call({}),
        lambda: writer._write_offline({}, tmp_path, lambda: True),
    ):
        with pytest.raises(OSError, match="not started"):
            call()
    assert started == [files.OWN_FOLDER] * 3 and not (files.OWN_FOLDER / "wandb").exists()

    seen: list[Path] = []

    def api(**how: Any) -> Any:
        seen.append(Path.cwd())
        raise ValueError("no server")

    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("wandb.Api", api)
    with pytest.raises(ValueError, match="no server"):
        agents.Agents("e/p/s", 1)
    assert seen == [files.OWN_FOLDER] and Path.cwd() == tmp_path


# Numbers that are none


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_a_page_is_made_of_folders_with_numbers_that_are_none(store: Store, tmp_path: Path, number: str) -> None:
    folder = write_run(store, "one", 0.5, 0)
    for name in ("plan.json", "summary.json"):
        path = Path(store.root) / folder / name
        tree = json.loads(path.read_text())
        path.write_text(json.dumps(spoilt(tree)).replace('"SPOILT"', number))
    report.write([report.read(store, folder)], tmp_path / "page.html")
    sweep = report.read_sweep(store, write_sweep(store, 4))
    sweep.trials[0] |= {
        "seconds.train": float(number),
        "metric.perplexity/value": float(number),
        "param.method.alpha": float(number),
    }
    report.write([], tmp_path / "page.html", [sweep])
    page = (tmp_path / "page.html").read_text().partition('id="figures"')[2]
    drawn = page.partition(">")[2].partition("</script>")[0]
    assert json.loads(drawn) and "NaN" not in drawn and "Infinity" not in drawn


def spoilt(tree: Any) -> Any:
    """Every real number of a tree as a text that stands for another one."""
    if isinstance(tree, dict):
        return {key: spoilt(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [spoilt(value) for value in tree]
    return "SPOILT" if isinstance(tree, float) else tree


@pytest.mark.parametrize("name", ["probing/layer_\u00b2", f"probing/layer_{'1' * 5000}", "layer_-1"])
def test_metrics_that_are_called_like_layers_are_none(store: Store, tmp_path: Path, name: str) -> None:
    folder = write_run(store, "one", 0.5, 0)
    path = Path(store.root) / folder / "summary.json"
    tree = json.loads(path.read_text())
    tree["metrics"][name] = tree["metrics"]["separation/sep"]
    path.write_text(json.dumps(tree))
    report.write([report.read(store, folder)], tmp_path / "page.html")
