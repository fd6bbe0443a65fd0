"""A disk that is full at a random byte, or read-only: one message, nothing half-written counts, and it goes on afterwards."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from damage import files_below, times
from disks import Disk, mounted
from trainings import Training, in_a_process
from typer.testing import CliRunner

from steerlab.cli import app
from steerlab.job import ScaleConfig
from steerlab.stages.spread.shard_plan import Facts, Planned, WorkFolder
from steerlab.storage import plan
from steerlab.storage.errors import FullDisk
from steerlab.storage.plan import Stage
from steerlab.storage.store import Store
from steerlab.storage.tensors import Shape, writing
from steerlab.storage.whole import size_and_sha256, written_whole

SAID = r"no space left for .+: .*bytes free; make room and run the same command again"


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    with mounted(tmp_path / "disk", 8 << 20) as disk:
        yield disk


def stage_of(size: int, seed: float) -> Stage:
    def fill(work: plan.Work) -> None:
        for number in range(4):
            (work.directory / f"{number}.bin").write_bytes(random.Random(number).randbytes(size // 4))

    return Stage("make", 1, {"seed": seed}, fill)


@times(5)
def test_an_artifact_and_its_manifest(number: int, chance: random.Random, disk: Disk) -> None:
    store = Store.open(str(disk.path / "root"))
    stage = stage_of(1 << 20, chance.random())
    for left in (chance.randrange(1 << 20), (1 << 20) + chance.randrange(4096)):  # in a file, and near the manifest
        disk.fill(left)
        with pytest.raises(FullDisk, match=SAID) as said:
            plan.run([stage], store, ScaleConfig(), plan.Listener(), [])
            raise FullDisk("no space left for nothing: it fitted, 0 bytes free; make room and run the same command again")
        assert "\n" not in str(said.value)
        assert not store.has("make", stage.key) or "it fitted" in str(said.value)
        assert store.list("tmp") == []
        disk.make_room()
        if store.has("make", stage.key):
            return
    plan.run([stage], store, ScaleConfig(), plan.Listener(), [])
    assert len(files_below(store.local("make", stage.key))) == 5


@times(5)
def test_a_file_of_a_run(number: int, chance: random.Random, disk: Disk) -> None:
    """The old content stays, and no half file lies beside it."""
    store = Store.open(str(disk.path / "root"))
    store.write_json("runs/a/summary.json", {"old": 1})
    store.append_line("runs/a/metrics.jsonl", {"step": 1})
    disk.fill(chance.randrange(2) * 4096)
    with pytest.raises(FullDisk, match=SAID):
        store.write_json("runs/a/summary.json", {"new": "x" * 50_000})
    with pytest.raises(FullDisk, match=SAID):
        store.append_line("runs/a/metrics.jsonl", {"step": 2, "text": "x" * 50_000})
    assert store.read_json("runs/a/summary.json") == {"old": 1} and store.list("runs/a") == ["metrics.jsonl", "summary.json"]
    assert store.read_lines("runs/a/metrics.jsonl") == [{"step": 1}]
    disk.make_room()
    store.append_line("runs/a/metrics.jsonl", {"step": 2})
    assert store.read_lines("runs/a/metrics.jsonl") == [{"step": 1}, {"step": 2}]


def parquet(path: Path, chance: random.Random) -> None:
    from steerlab.activations import part_writing

    values = np.random.default_rng(chance.randrange(1 << 30)).normal(size=(3000, 64)).astype(np.float32)
    to = part_writing.schema({"m": 64}, "float32", False, {})
    about: dict[str, part_writing.AboutColumn] = {
        "sample_id": list(range(3000)), "label": ["x"] * 3000, "text_sha256": ["y"] * 3000,
    }  # fmt: skip
    part_writing.write_part([part_writing.table(about, {"m": values}, to)], path)


def tensors(path: Path, chance: random.Random) -> None:
    with writing(path, {"a": Shape(torch.float32, [3000, 64])}) as writer:
        writer.write("a", torch.randn(3000, 64, generator=torch.Generator().manual_seed(chance.randrange(1 << 30))))


@pytest.mark.parametrize("write", [parquet, tensors], ids=lambda write: write.__name__)
@times(5)
def test_a_part_of_a_shard(
    write: Callable[[Path, random.Random], None], number: int, chance: random.Random, disk: Disk
) -> None:
    folder = WorkFolder(str(disk.path / "root"), "extract", "k")
    entry = Planned(number=0, first=0, rows=1, sha256="x")
    folder.plan = [entry]

    def make(path: Path) -> Facts:
        write(path, chance)
        return Facts(path=path.name, **size_and_sha256(path))

    disk.fill(chance.randrange(16, 150) * 4096)
    with pytest.raises(FullDisk, match=rf"no space left for part 0 in {disk.path}/root: .*make room"):
        folder.keep(entry, ".part", make)
    assert folder.done(entry) is None
    assert not [path for path in files_below(disk.path / "root" / "work") if path.parent.name == "parts"], "no half part"
    disk.make_room()
    folder.keep(entry, ".part", make)
    assert folder.done(entry, verify=True) is not None


@times(5)
def test_the_disk_of_a_node_that_makes_parts_for_a_bucket(
    number: int, chance: random.Random, disk: Disk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """/tmp is full, not ROOT: the message names the folder."""
    monkeypatch.setattr(tempfile, "tempdir", str(disk.path))
    folder = WorkFolder((tmp_path / "bucket").as_uri(), "extract", "k")
    folder._fs = pa.fs.SubTreeFileSystem("/", pa.fs.LocalFileSystem())  # not a local disk in the eyes of the store
    entry = Planned(number=0, first=0, rows=1, sha256="x")

    def make(path: Path) -> Facts:
        tensors(path, chance)
        return Facts(path=path.name, **size_and_sha256(path))

    disk.fill(chance.randrange(16, 150) * 4096)
    with pytest.raises(FullDisk, match=rf"no space left for part 0 in {disk.path}: .*make room"):
        folder.keep(entry, ".part", make)
    assert folder.done(entry) is None and [path.name for path in disk.path.iterdir()] == ["filler"]
    disk.make_room()
    folder.keep(entry, ".part", make)
    assert folder.done(entry, verify=True) is not None


def test_a_file_that_is_written_whole_leaves_nothing(disk: Disk) -> None:
    disk.fill(8192)
    with pytest.raises(OSError, match="No space left"), written_whole(disk.path / "a") as scratch:
        scratch.write_bytes(b"x" * 100_000)
    assert [path.name for path in disk.path.iterdir()] == ["filler"]


def full_while_training(root: Path, disk: str, seed: str, rounds: int) -> None:
    """Fill the disk of the checkpoints at a random step, to a random byte; make room, and go on."""
    chance, small = random.Random(seed), Disk(Path(disk))
    training = Training(root)
    whole = training.run("whole")
    for number in range(rounds):
        place = f"{disk}/{number}"
        step = chance.randrange(1, 7)

        def full(metrics: dict[str, float], step: int = step) -> None:
            if metrics["step"] == step:
                small.fill(chance.randrange(1 << 20))

        with pytest.raises(FullDisk, match=rf"no space left for a checkpoint or the trained weights in {place}: .*make room"):
            training.run(place, each=full)
            small.fill()  # it fitted: the artifact was all that came
            raise FullDisk(f"no space left for a checkpoint or the trained weights in {place}: fitted; make room")
        small.make_room()
        assert training.run(place) == whole, (place, step)
        assert all("as after a kill" in line for line in training.lines)


@pytest.mark.faults
def test_a_checkpoint(chance: random.Random, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 64 << 20) as disk:
        in_a_process(full_while_training, tmp_path, str(disk.path), f"{chance.random()}", 5)


# A ROOT that is read-only


@times(5)
def test_a_root_that_is_read_only(number: int, chance: random.Random, disk: Disk, tmp_path: Path) -> None:
    """Refused at the start; one that becomes so later is one message as well. Looking at it works."""
    root = str(disk.path / "root")
    store, stage = Store.open(root), stage_of(1 << 12, chance.random())
    plan.run([stage], store, ScaleConfig(), plan.Listener(), [])
    store.write_json("runs/a/1/plan.json", {"stages": [plan.Record(stage, "ran").as_dict()]})
    with disk.read_only():
        with pytest.raises(ValueError, match=rf"^ROOT '{root}' cannot be written: [^\n]*Read-only file system"):
            Store.open(root)
        with pytest.raises(OSError, match="Read-only file system"):
            plan.run([stage_of(1 << 12, chance.random())], store, ScaleConfig(), plan.Listener(), [])
        assert store.local("make", stage.key)
        shown = CliRunner().invoke(app, ["ls", root, "--json"])
        assert shown.exit_code == 0 and json.loads(shown.stdout)[0]["folder"] == "runs/a/1"
        refused = CliRunner().invoke(app, ["gc", root])
        assert refused.exit_code == 2 and "cannot be written" in refused.stderr and refused.stderr.count("\n") == 1
    plan.run([stage_of(1 << 12, chance.random())], store, ScaleConfig(), plan.Listener(), [])
