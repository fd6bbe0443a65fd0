"""`steerlab ls` and `steerlab gc`: what a ROOT holds, and that nothing goes which a run, a sweep or a process needs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from stages import made, stage
from typer.testing import CliRunner

from steerlab.cli import app
from steerlab.run import cleaning, inventory
from steerlab.storage import claims, plan
from steerlab.storage.plan import Stage
from steerlab.storage.store import Store
from steerlab.sweeps import results


@pytest.fixture(params=["local", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))
    return Store.open(str(tmp_path / "root") if request.param == "local" else f"memory://{tmp_path.name}")


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "root"))


def run_of(store: Store, run_id: str, *stages: Stage, end: str | None = "summary.json", name: str = "job") -> str:
    """Write the folder of a run as `execute` does: the stages first, and at the end a summary or an error."""
    folder = f"runs/{name}/{run_id}"
    store.write_json(f"{folder}/plan.json", {"stages": [plan.Record(one, "to run").as_dict() for one in stages]})
    if end is not None:
        store.write_json(f"{folder}/{end}", {})
    return folder


def there(store: Store, *stages: Stage) -> list[bool]:
    return [store.has(one.name, one.key) for one in stages]


def test_what_nobody_names_is_removed_and_nothing_else(store: Store) -> None:
    base, trained, evaluated, loose, failed, judged = (
        stage("train", 0), stage("train", 1), stage("evaluate", 2), stage("evaluate", 3), stage("fit", 4), stage("answers", 5),
    )  # fmt: skip
    made(store, base, trained, evaluated, loose, failed, judged)
    of_sweep, child = stage("evaluate", 6), stage("fit", 7, stage("extract", 8))
    made(store, of_sweep, child)
    run_of(store, "a", base, trained, evaluated)
    run_of(store, "b", failed, end="error.txt")
    run_of(store, "c", child)
    results.write_table(store, "sweeps/job/s/trials.parquet", [{"trial_id": "0", "seed": 0, "status": "finished",
                        "reason": "", "key.evaluate.separation": of_sweep.key}])  # fmt: skip
    found = cleaning.leftovers(store)
    assert list(found.artifacts) == [("evaluate", loose.key)] and not found.work
    assert there(store, loose) == [True], "looking removes nothing"
    removed = cleaning.remove(store, found)
    assert (removed.artifacts, removed.num_bytes) == (1, found.num_bytes) and found.num_bytes > 1000
    assert not store.sizes(f"artifacts/evaluate/{loose.key}")
    kept = [base, trained, evaluated, failed, judged, of_sweep, *plan.ordered([child])]
    assert all(there(store, *kept))
    assert not cleaning.leftovers(store).artifacts
    made(store, loose)
    assert store.local("evaluate", loose.key)


def test_checkpoints_stay_as_long_as_a_run_names_their_stage(store: Store) -> None:
    killed, forgotten, ended = stage("train", 1), stage("train", 2), stage("train", 3)
    made(store, ended)
    for one in (killed, forgotten, ended):
        store.work("train", one.key)
        store.write_json(f"work/train/{one.key}/checkpoints/000000001/rank0.json", {})
    run_of(store, "a", killed, ended, end=None)
    found = cleaning.leftovers(store)
    assert set(found.work) == {("train", forgotten.key), ("train", ended.key)}
    cleaning.remove(store, found)
    assert set(inventory.take(store).work) == {("train", killed.key)}


def test_a_run_that_begins_between_the_look_and_the_removal_keeps_its_artifacts(store: Store) -> None:
    named, other = stage("train", 1), stage("train", 2)
    made(store, named, other)
    found = cleaning.leftovers(store)
    assert len(found.artifacts) == 2
    run_of(store, "late", named, end=None)
    assert cleaning.remove(store, found).artifacts == 1
    assert there(store, named, other) == [True, False]


def test_a_run_that_begins_while_artifacts_are_hidden_gets_them_back(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """It wrote its plan before it looked for the artifact, and may have found it before it was hidden."""
    named = stage("train", 1)
    made(store, named)
    found, take = cleaning.leftovers(store), inventory.take

    def take_late(of: Store) -> inventory.Inventory:
        assert there(store, named) == [False]
        run_of(store, "late", named, end=None)
        return take(of)

    monkeypatch.setattr(inventory, "take", take_late)
    assert cleaning.remove(store, found).artifacts == 0
    assert (store.local("train", named.key) / "content").exists()


HOLDS = """
import sys
from steerlab.storage import claims
from steerlab.storage.store import Store
with claims.hold(Store(sys.argv[1]), sys.argv[2], wait=True):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def elsewhere(local: Store) -> Iterator[Callable[[str], None]]:
    """A function that lets another process hold a claim until the test ends."""
    processes: list[subprocess.Popen[str]] = []

    def hold(name: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", HOLDS, local.root, name]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        processes.append(process)
        assert process.stdout is not None and process.stdout.readline() == "held\n"

    yield hold
    for process in processes:
        process.communicate("")


def test_what_a_process_works_on_stays(local: Store, elsewhere: Callable[[str], None]) -> None:
    busy = stage("train", 1)
    local.work("train", busy.key)
    local.write_json(f"work/train/{busy.key}/checkpoints/x", {})
    free = cleaning.leftovers(local)
    assert ("train", busy.key) in free.work
    elsewhere(f"train-{busy.key}")
    assert not cleaning.leftovers(local).work
    assert cleaning.remove(local, free).work == 0
    assert inventory.take(local).work


def test_what_is_claimed_between_the_look_and_the_removal_stays(store: Store) -> None:
    """On a disk and in a bucket: another run makes the artifact again, or continues the training."""
    busy, gone = stage("train", 1), stage("train", 2)
    for one in (busy, gone):
        made(store, one)
        store.write_json(f"work/train/{one.key}/checkpoints/x", {})
    leftovers = cleaning.leftovers(store)
    assert len(leftovers.artifacts) == 2
    with claims.hold(store, f"train-{busy.key}", wait=True):
        removed = cleaning.remove(store, leftovers)
    assert removed.artifacts == 1
    assert store.sizes(f"artifacts/train/{busy.key}") and not store.sizes(f"artifacts/train/{gone.key}")


def test_a_directory_without_a_manifest_goes_on_a_disk_and_stays_in_a_bucket(store: Store) -> None:
    """In a bucket it may be an upload that goes on."""
    store.write_text("artifacts/train/k/model", "half")
    assert bool(cleaning.leftovers(store).artifacts) == store.is_local
    cleaning.remove(store, cleaning.leftovers(store))
    assert bool(store.sizes("artifacts/train/k")) != store.is_local


@pytest.mark.parametrize("content", [None, "{", '{"stages": 3}', '{"stages": [{"name": "train"}]}'])
def test_nothing_goes_while_a_run_does_not_say_what_it_needs(content: str | None, store: Store) -> None:
    made(store, stage("train", 1))
    store.write_text("runs/job/x/job.yaml", "name: job")
    if content is not None:
        store.write_text("runs/job/x/plan.json", content)
    with pytest.raises(
        ValueError, match=r"runs/job/x does not say which artifacts it needs: .*; if you no longer need this folder"
    ) as said:
        cleaning.leftovers(store)
    assert "\n" not in str(said.value)
    assert [entry.status for entry in inventory.take(store).entries] == ["unfinished" if content is None else "damaged"]


def test_a_damaged_artifact_that_nobody_names_goes_too(local: Store) -> None:
    one = stage("train", 1)
    made(local, one)
    (Path(local.path("train", one.key)) / "manifest.json").write_text("{")
    assert cleaning.remove(local, cleaning.leftovers(local)).artifacts == 1
    assert not local.list("artifacts/train")


def test_status_of_runs_and_sweeps(local: Store, elsewhere: Callable[[str], None]) -> None:
    one, other, third = stage("train", 1), stage("train", 2), stage("train", 3)
    run_of(local, "1", one)
    run_of(local, "2", one, end="error.txt")
    run_of(local, "3", other, end=None)
    run_of(local, "4", third, end=None)
    local.write_json("sweeps/job/5/space.json", {})
    local.write_json("sweeps/job/6/space.json", {})
    local.write_json("sweeps/job/7/summary.json", {})
    elsewhere(f"train-{third.key}")
    elsewhere("sweep-6")
    status = {entry.folder: entry.status for entry in inventory.take(local).entries}
    assert status == {
        "runs/job/1": "finished", "runs/job/2": "failed", "runs/job/3": "unfinished", "runs/job/4": "running",
        "sweeps/job/5": "unfinished", "sweeps/job/6": "running", "sweeps/job/7": "finished",
    }  # fmt: skip


def test_the_commands(local: Store) -> None:
    named, loose = stage("train", 1), stage("train", 2)
    made(local, named, loose)
    run_of(local, "a", named)
    invoke = lambda *arguments: CliRunner().invoke(app, list(arguments))  # noqa: E731
    shown = invoke("ls", local.root, "--json")
    (entry,) = json.loads(shown.stdout)
    assert (entry["folder"], entry["status"], entry["artifacts"]) == ("runs/job/a", "finished", 1)
    assert entry["artifact_bytes"] == sum(local.sizes(f"artifacts/train/{named.key}").values())
    assert "of which no run names" in invoke("ls", local.root).stdout
    shown = invoke("gc", local.root)
    assert shown.exit_code == 0 and loose.key[:12] in shown.stdout and f"steerlab gc {local.root} --yes" in shown.stdout
    assert there(local, loose) == [True]
    done = invoke("gc", local.root, "--yes")
    assert done.exit_code == 0 and "removed 1 artifacts and 0 work folders" in done.stdout
    assert there(local, named, loose) == [True, False]
    assert "nothing to remove" in invoke("gc", local.root, "--yes").stdout


def test_a_root_without_anything_is_empty(store: Store) -> None:
    assert inventory.take(store).entries == [] and cleaning.leftovers(store).num_bytes == 0
