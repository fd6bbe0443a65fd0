"""Methods and tasks of files on a real cluster: they compute what the platform's own do, from a text that travels."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

import steerlab
from steerlab import job, report, run
from steerlab.run import folder as folders
from steerlab.stages import JobType, Plan
from steerlab.storage import plan
from steerlab.storage.store import Store
from steerlab.sweeps import driver, sweep_request, trials
from steerlab.sweeps import space as spaces

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore:the inputs of .* span")]

SOURCES = Path(steerlab.__file__).parent
TOPICS = {"format": "text", "limit": 8}
PERPLEXITY = {"task": "perplexity", "source": "tiny:topics/test", **TOPICS}
STEERED: dict[str, Any] = {
    "name": "steered",
    "model": {"source": "tiny:model"},
    "data": {
        "prompt_style": "plain",
        "source": {"source": "tiny:topics/train", "equals": {"label": "farm"}, **TOPICS},
        "target": {"source": "tiny:topics/train", "equals": {"label": "sea"}, **TOPICS},
        "train": {"source": "tiny:instructions/train", "limit": 16},
    },
    "extract": {"max_tokens": 64, "pooling": ["mean", "last"]},
    "evaluate": [PERPLEXITY],
}
WARP: dict[str, Any] = {
    "name": "warp",
    "model": {"source": "tiny:model"},
    "data": {
        "prompt_style": "plain",
        "train": {"source": "tiny:arithmetic/train", "limit": 16, "loss_on": "response"},
        "safety": {"source": "tiny:refusals/train", "limit": 8, "loss_on": "response"},
    },
    "method": {"target_layers": [0]},
    "train": {"steps": 2, "lr": 2e-3, "micro_batch": 8, "max_tokens": 64},
}


EITHER = pytest.mark.parametrize("warm", [True, pytest.param(False, marks=pytest.mark.slow)])


def executed(tree: dict[str, Any], store: Store, *gone: Path) -> tuple[Plan, run.Run]:
    """Run a job; files that are `gone` are deleted when the plan stands, before any worker starts."""
    planned = Plan.of(job.validate(tree, JobType, Path("a.yaml")))
    run.check(planned)
    assert planned.stages
    for file in gone:
        file.unlink()
    return planned, run.execute(planned, store, plan.Listener())


def patch_of(planned: Plan, store: Store) -> dict[str, Any]:
    assert planned.model is not None
    return load_file(store.local(planned.model.name, planned.model.key) / "patch" / "patch.safetensors")


def renamed(source: str, name: str, target: Path) -> Path:
    """Write a file of the platform as one of one's own, under another name."""
    text = (SOURCES / source).read_text()
    assert text.count(f'Literal["{name}"] = "{name}"') == 1
    target.write_text(text.replace(f'Literal["{name}"] = "{name}"', f'Literal["my_{name}"] = "my_{name}"'))
    return target


@EITHER
def test_the_file_of_a_closed_form_and_of_a_task_compute_what_the_platforms_do(
    cluster: None, tmp_path: Path, warm: bool
) -> None:
    store = Store.open(str(tmp_path / "root"))
    scale = {"warm": warm}
    method = renamed("methods/caa.py", "caa", tmp_path / "method.py")
    task = renamed("evaluation/tasks/ability/perplexity.py", "perplexity", tmp_path / "task.py")
    own_task = {**PERPLEXITY, "task": f"file:{task}", "label": "mine"}
    ours, first = executed({**STEERED, "method": {"name": "caa"}, "scale": scale}, store)
    own, second = executed(
        {**STEERED, "method": {"file": str(method)}, "evaluate": [PERPLEXITY, own_task], "scale": scale}, store, method, task
    )
    (expected, found) = (patch_of(planned, store) for planned in (ours, own))
    assert expected.keys() == found.keys() and all(found[name].equal(value) for name, value in expected.items())
    value = first.summary["metrics"]["perplexity/value"]["value"]
    assert second.summary["metrics"]["perplexity/value"]["value"] == value
    assert [m["value"] for name, m in second.summary["metrics"].items() if name.startswith("mine/")] == [value]
    environment = json.loads((tmp_path / "root" / second.folder / "environment.json").read_text())
    assert [line.partition(" (")[0] for line in environment["own_code"]] == [
        f"method my_caa: {method}", f"task my_perplexity: {task}",
    ]  # fmt: skip
    report.write([report.read(store, second.folder)], tmp_path / "page.html")
    assert f"not steerlab's: method my_caa: {method}" in (tmp_path / "page.html").read_text()


@EITHER
def test_the_file_of_a_training_with_preparations_trains_to_the_same_bits(cluster: None, tmp_path: Path, warm: bool) -> None:
    """Safety-WaRP has all kinds of them: moments, which are the platform's business, parts, and sums over rows."""
    store = Store.open(str(tmp_path / "root"))
    file = renamed("methods/warp.py", "warp", tmp_path / "method.py")
    scale = {"warm": warm}
    ours, _ = executed({**WARP, "method": {"name": "warp", **WARP["method"]}, "scale": scale}, store)
    own, done = executed({**WARP, "method": {"file": str(file), **WARP["method"]}, "scale": scale}, store, file)
    made = [record.stage.name for record in done.records if record.status != "cached"]
    assert made == ["basis", "importance", "mask", "train"], "what the file's own code makes is not what the platform's made"
    (expected, found) = (patch_of(planned, store) for planned in (ours, own))
    assert all(found[name].equal(value) for name, value in expected.items())


@pytest.mark.slow
def test_a_sweep_runs_the_file_as_it_was_when_it_began(cluster: None, tmp_path: Path, monkeypatch: Any) -> None:
    """The file is named by a relative path, and is gone before the first trial starts."""
    store = Store.open(str(tmp_path / "root"))
    monkeypatch.chdir(tmp_path)
    renamed("methods/caa.py", "caa", tmp_path / "method.py")
    (tmp_path / "a.yaml").write_text(json.dumps({**STEERED, "method": {"file": "method.py"}}))
    (tmp_path / "space.py").write_text(
        "from ray import tune\nSPACE = {'method.at': tune.grid_search([0, 1])}\nMETRIC = 'perplexity/value'\n"
    )
    found = trials.plan(tmp_path / "a.yaml", [], spaces.load(tmp_path / "space.py"))
    asked = sweep_request.checked(found, None, 1)
    (tmp_path / "method.py").unlink()
    outcome = driver.sweep(asked, store, resume=False, command="")
    rows = folders.trials(store, outcome.folder)
    assert [row["status"] for row in rows] == ["finished", "finished"]
    assert len({row["metric.perplexity/value"] for row in rows}) == 2
