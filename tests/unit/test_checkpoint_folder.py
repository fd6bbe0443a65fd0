"""The checkpoints of a training in its work directory: which are kept, which are taken, and what damaged ones lead to."""

from __future__ import annotations

import json
import os
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import DAMAGES, files_below, flip

from steerlab.storage.whole import json_sum
from steerlab.training.checkpoint_folder import CheckpointFolder

MODEL = "state/mp_rank_00_model_states.pt"


class Folder:
    """A work directory, and what was said of its checkpoints."""

    def __init__(self, storage: str, path: Path, scratch: Path) -> None:
        self.storage, self.scratch = storage, scratch
        self.path = path / "checkpoints"
        self.lines: list[str] = []

    def opened(self, *, needs_best: bool = False) -> CheckpointFolder:
        """Open it, as another process on another node would."""
        self.lines = []
        self.scratch = self.scratch.with_name(f"{self.scratch.name}+")
        return CheckpointFolder(
            self.storage, self.scratch, rank=0, world_size=1, device=torch.device("cpu"), needs_best=needs_best,
            say=self.lines.append,
        )  # fmt: skip

    def add(self, folder: CheckpointFolder, step: int, loss: float | None = None) -> None:
        """Add a checkpoint with a file of the loop and one of the engine."""
        directory = self.scratch / f"rank0/{step}"
        (directory / "state").mkdir(parents=True)
        (directory / "steerlab.json").write_text(json.dumps({"step": step}))
        (directory / MODEL).write_bytes(random.Random(step).randbytes(1000))
        folder.add({"step": step} if loss is None else {"step": step, "eval/loss": loss}, directory)

    def filled(self, *losses: float | None, needs_best: bool = False) -> None:
        """Train from the start to the step of the last loss."""
        folder = self.opened(needs_best=needs_best)
        assert folder.start() is None
        for step, loss in enumerate(losses, 1):
            self.add(folder, step, loss)
        folder.finish()

    @property
    def steps(self) -> list[int]:
        return sorted(int(path.name) for path in self.path.iterdir())

    def of(self, step: int) -> Path:
        return self.path / f"{step:09d}"


@pytest.fixture(params=["disk", "objects"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    """A folder on a disk, and one that is reached as an object store is: by uploads and downloads."""
    work = tmp_path / "work"
    return Folder(str(work) if request.param == "disk" else work.as_uri(), work, tmp_path / "scratch")


def step_of(directory: Path | None) -> int | None:
    return None if directory is None else json.loads((directory / "steerlab.json").read_text())["step"]


def test_the_newest_two_are_kept_and_the_newest_is_taken(folder: Folder) -> None:
    folder.filled(None, None, None, None)
    assert folder.steps == [3, 4]
    assert step_of(folder.opened().start()) == 4 and folder.lines == []


@pytest.mark.parametrize(
    ("losses", "kept", "best"),
    [((3.0, 1.0, 2.0, 2.5), [2, 4], 2), ((1.0, 1.0, 1.0), [1, 3], 1), ((3.0, 2.0, 1.0), [2, 3], 3), ((1.0, None), [1, 2], 1)],
)
def test_the_best_is_kept_where_the_training_ends_with_it(
    losses: tuple[float, ...], kept: list[int], best: int, folder: Folder
) -> None:
    """Of equal ones the earliest, and in a continued training as in one that nobody disturbed."""
    folder.filled(*losses, needs_best=True)
    assert folder.steps == kept
    opened = folder.opened(needs_best=True)
    assert step_of(opened.start()) == len(losses)
    assert step_of(opened.best()) == best


def test_a_training_without_evaluation_has_no_best(folder: Folder) -> None:
    folder.filled(None, None, needs_best=True)
    opened = folder.opened(needs_best=True)
    opened.start()
    assert opened.best() is None


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
@pytest.mark.parametrize("file", ["steerlab.json", MODEL, "rank0.json"])
def test_a_damaged_checkpoint_is_left_out_with_a_line(
    damage: Callable[[Path, random.Random], None], file: str, folder: Folder
) -> None:
    folder.filled(None, None, None)
    damage(folder.of(3) / file, random.Random(file))
    assert step_of(folder.opened().start()) == 2
    assert len(folder.lines) == 1 and folder.lines[0].startswith("the checkpoint of step 3 is skipped: ")
    assert folder.steps == [2], "the damaged one is removed"
    damage(folder.of(2) / file, random.Random(file))
    assert folder.opened().start() is None and len(folder.lines) == 1


def test_every_byte_of_a_checkpoint_counts(tmp_path: Path) -> None:
    """Each bit of a record and of a small file, flipped: never taken, or of the same meaning."""
    folder = Folder(str(tmp_path / "work"), tmp_path / "work", tmp_path / "scratch")
    folder.filled(None, None)
    whole = {path: path.read_bytes() for path in files_below(folder.path)}
    record = folder.of(2) / "rank0.json"
    before = json.loads(whole[record])
    for place in range(len(whole[record])):
        content = bytearray(whole[record])
        content[place] ^= 1 << place % 8
        record.write_bytes(content)
        taken = step_of(folder.opened().start())
        assert taken == 1 or json.loads(content) == before, bytes(content)
        for path, kept in whole.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(kept)


def test_a_training_that_ends_with_the_best_goes_back_before_it_if_it_is_damaged(folder: Folder) -> None:
    """Going on without it would end with other weights than a run that nobody disturbed."""
    folder.filled(3.0, 1.0, 2.0, needs_best=True)
    flip(folder.of(2) / MODEL, random.Random(0))
    assert folder.opened(needs_best=True).start() is None
    assert [line.partition(":")[0] for line in folder.lines] == [
        "the checkpoint of step 3 is skipped", "the checkpoint of step 2 is skipped",
    ]  # fmt: skip
    assert not folder.steps


def test_the_best_that_was_damaged_meanwhile_is_refused(folder: Folder) -> None:
    folder.filled(3.0, 1.0, 2.0, needs_best=True)
    opened = folder.opened(needs_best=True)
    assert step_of(opened.start()) == 3
    if opened._is_local:
        flip(folder.of(2) / MODEL, random.Random(0))
        with pytest.raises(ValueError, match=r"the best checkpoint, of step 2, is damaged: .*has changed.*run the same"):
            opened.best()
    else:  # it was compared when it was copied to this node
        assert step_of(opened.best()) == 2


def test_files_of_two_attempts_are_no_checkpoint(folder: Folder) -> None:
    folder.filled(None, None)
    path = folder.of(2) / "rank0.json"
    record = json.loads(path.read_text())
    for rank, attempt in ((0, record["attempt"]), (1, "another")):
        changed = {**record, "world_size": 2, "attempt": attempt, "files": record["files"] if rank == 0 else {}}
        (folder.of(2) / f"rank{rank}.json").write_text(json.dumps({**changed, "xxh3": json_sum(changed)}))
    assert step_of(folder.opened().start()) == 1 and "has files of two attempts" in folder.lines[0]


def test_a_kill_before_the_record_leaves_no_checkpoint(folder: Folder) -> None:
    folder.filled(None, None)
    (folder.of(2) / "rank0.json").unlink()
    assert step_of(folder.opened().start()) == 1 and "rank0.json is missing, as after a kill" in folder.lines[0]


def test_a_file_that_nobody_recorded_is_not_loaded(folder: Folder) -> None:
    """DeepSpeed loads every file whose name fits."""
    folder.filled(None, None)
    (folder.of(2) / "state" / "zero_pp_rank_7_mp_rank_00_optim_states.pt").write_bytes(b"x")
    assert step_of(folder.opened().start()) == 1 and "is not in any record" in folder.lines[0]


FORGED: list[Any] = [
    "", "{}", "[1]", "null", "[" * 100_000, " " * (2**20 + 1), {"world_size": "2"}, {"world_size": 10**9}, {"files": None},
    {"files": {"../../victim/thesis": {"bytes": 4, "xxh3": ""}}}, {"files": {"/etc/passwd": {"bytes": 4, "xxh3": ""}}},
    {"best": {"step": 1, "loss": float("nan")}}, {"best": {"step": "../1", "loss": 1.0}}, {"attempt": 7},
]  # fmt: skip


@pytest.mark.parametrize("content", FORGED, ids=lambda content: f"{content!r:.40}")
def test_a_record_that_no_training_wrote_is_left_out(content: Any, folder: Folder, tmp_path: Path) -> None:
    folder.filled(None, None)
    path = folder.of(2) / "rank0.json"
    record = json.loads(path.read_text())
    if isinstance(content, dict):
        forged = {**record, **content}
        content = json.dumps({**forged, "xxh3": json_sum(forged)})
    path.write_text(content)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "thesis").write_text("mine")
    assert step_of(folder.opened().start()) == 1
    assert len(folder.lines) == 1 and "\n" not in folder.lines[0] and len(folder.lines[0]) < 600
    assert (tmp_path / "victim" / "thesis").read_text() == "mine"


def test_folders_of_other_names_are_not_touched(folder: Folder) -> None:
    folder.filled(None, None)
    for name in ("zzz", "9", "-00000009", "notes"):
        (folder.path / name).mkdir()
    os.mkfifo(folder.path / "pipe")
    assert step_of(folder.opened().start()) == 2 and folder.lines == []
    assert {"zzz", "9", "-00000009", "notes", "pipe"} < {path.name for path in folder.path.iterdir()}


def test_a_step_that_is_trained_again_replaces_its_files(folder: Folder) -> None:
    folder.filled(None, None)
    flip(folder.of(2) / MODEL, random.Random(0))
    opened = folder.opened()
    assert step_of(opened.start()) == 1
    folder.add(opened, 2)
    opened.finish()
    assert step_of(folder.opened().start()) == 2 and folder.lines == []


def test_an_upload_that_fails_is_an_error_of_the_next_step(tmp_path: Path) -> None:
    folder = Folder((tmp_path / "work").as_uri(), tmp_path / "work", tmp_path / "scratch")
    folder.filled(None)
    opened = folder.opened()
    opened.start()
    (folder.path / "000000002").write_text("in the way")
    folder.add(opened, 2)
    with warnings.catch_warnings(), pytest.raises(OSError):
        folder.add(opened, 3)
