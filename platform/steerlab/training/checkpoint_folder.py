"""The checkpoints of a training in its work directory: written by all ranks, complete or absent, compared before they are read.

    checkpoints/000000010/steerlab.json, state/...   the files of all ranks at step 10
    checkpoints/000000010/rank0.json                 the record of rank 0, written after its files: their sizes and sums

A checkpoint is whole if the records of all ranks are there, of one attempt, and every file is as its record says. What is not
whole is left out with a line, and the training goes on from the newest one that is, or from its start; its final weights are
the same. Two checkpoints are kept: the newest, and the best one if the training ends with it, else the one before the newest.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import pyarrow.fs as pafs
import torch
from torch import distributed

from steerlab.data.sources import remote
from steerlab.guards import files
from steerlab.storage.whole import json_sum, written_whole, xxh3
from steerlab.training.checkpoint_records import Best, NotWhole, compare, expected, record_name, records

FOLDER = "checkpoints"
_NAME = re.compile(r"[0-9]{9,18}")
"""Name of a checkpoint's folder: the number of its step, so that the order of names is that of steps. Others are ignored."""


class CheckpointFolder:
    """The checkpoints of one training, as one of its ranks reads and writes them."""

    def __init__(
        self,
        storage: str,
        scratch: Path,
        *,
        rank: int,
        world_size: int,
        device: torch.device,
        needs_best: bool,
        say: Callable[[str], None],
    ) -> None:
        """Open the folder.

        Args:
            storage: Path or URI of the stage's work directory.
            scratch: Local folder for copies from an object store; one for all ranks of a node.
            rank: Number of this rank.
            world_size: Number of ranks.
            device: Device of this rank, on which ranks exchange messages.
            needs_best: Whether the training ends with the checkpoint of the lowest evaluation loss.
            say: Takes a line about a checkpoint that is left out.
        """
        self._is_local = "://" not in storage
        self._fs, base = (pafs.LocalFileSystem(), storage) if self._is_local else remote.opened(storage)
        # A folder `checkpoints` in the stage's own work directory: a training finds no other training's.
        self._base, self._scratch = f"{base}/{FOLDER}", scratch
        self._rank, self._world_size, self._device = rank, world_size, device
        self._needs_best, self._say = needs_best, say
        # Set by `start`: all ranks get rank 0's.
        self._attempt = ""
        self._best: Best | None = None
        self._upload: Future[None] | None = None

    def start(self) -> Path | None:
        """Return a local directory with the newest whole checkpoint; None if there is none. All ranks call it.

        Folders that are not whole are removed.
        """
        # One rank decides, and all follow: they must begin at the same step.
        choice = (self._choose(), uuid.uuid4().hex) if self._rank == 0 else None
        if self._world_size > 1:
            box = [choice]
            # Over the group that Ray has made (gloo or NCCL); NCCL sends from device memory, so the device is named.
            distributed.broadcast_object_list(box, src=0, device=self._device)
            choice = box[0]
        assert choice is not None
        name, self._attempt = choice
        if name is None:
            return None
        # As it was at that step: later evaluations come again.
        self._best = records(self._fs, self._folder(name))[0].best
        return self._local(name)

    def add(self, metrics: dict[str, float], directory: Path | None) -> None:
        """Store this rank's files of a checkpoint, which are moved away, and remove checkpoints that are no longer kept.

        To an object store they are uploaded while the next steps compute.

        Args:
            metrics: `step`, and `eval/loss` if the step was evaluated.
            directory: Local directory with the files of this rank.
        """
        assert directory is not None, "the loop reports checkpoints only"
        step, loss = int(metrics["step"]), metrics.get("eval/loss")
        # Of equal ones the earliest. Every rank has the same metrics, so that all agree.
        if loss is not None and (self._best is None or loss < self._best.loss):
            self._best = Best(step=step, loss=loss)
        name, best = f"{step:09d}", self._best
        if self._is_local:
            return self._store(name, best, directory)
        # One after another, each while the next steps compute.
        self.finish()
        uploader = ThreadPoolExecutor(1)
        self._upload = uploader.submit(self._store, name, best, directory)
        uploader.shutdown(wait=False)  # its thread ends with the upload: the process may stay for other trainings

    def best(self) -> Path | None:
        """Return a local directory with the checkpoint of the lowest evaluation loss; None if none was evaluated.

        All ranks call it.

        Raises:
            ValueError: that checkpoint is damaged.
        """
        if self._best is None:
            return None
        self.finish()
        if self._world_size > 1:
            distributed.barrier()  # the other ranks' files have to be there, too
        name = f"{self._best.step:09d}"
        try:
            return self._checked(name) if self._rank == 0 or not self._is_local else self._local(name)
        except NotWhole as error:
            # Not the next best one: the result would be another than that of a run without damage.
            raise ValueError(
                f"the best checkpoint, of step {self._best.step}, is not whole: {error}; run the same command again, and the "
                "training continues from an older checkpoint"
            ) from None

    def finish(self) -> None:
        """Wait for the upload that is under way. Raises its error."""
        if self._upload is not None:
            self._upload.result()

    def _choose(self) -> str | None:
        """Return the newest checkpoint from which the training can go on, and remove those that are newer or not whole."""
        names, broken = sorted(self._names(), reverse=True), []
        chosen = None
        for name in names:
            try:
                self._checked(name)
                best = records(self._fs, self._folder(name))[0].best
                if self._needs_best and best is not None:
                    # Without it, the training would end with other weights than one that nobody disturbed.
                    self._checked(f"{best.step:09d}")
            except NotWhole as error:
                self._say(f"the checkpoint of step {int(name)} is left out: {error}")
                broken.append(name)
            else:
                chosen = name
                break
        # After the choice: a folder that stays broken would be looked at in every restart, and mixed with new files of its
        # step.
        for name in broken:
            self._remove(name)
        return chosen

    def _folder(self, name: str) -> str:
        return f"{self._base}/{name}"

    def _names(self) -> list[str]:
        listing = self._fs.get_file_info(pafs.FileSelector(self._base, allow_not_found=True))
        return [info.base_name for info in listing if _NAME.fullmatch(info.base_name)]

    def _checked(self, name: str) -> Path:
        """Return a local directory with a checkpoint after comparing every file. Raises NotWhole."""
        if not self._is_local:
            return self._local(name)
        compare(Path(self._base) / name, expected(self._fs, self._folder(name)))
        return Path(self._base) / name

    def _local(self, name: str) -> Path:
        """Return a local directory with a checkpoint: the folder itself on a disk, else a copy for all ranks of this node.

        Raises:
            NotWhole: the copy is not as the records say.
        """
        if self._is_local:
            return Path(self._base) / name
        self._scratch.mkdir(parents=True, exist_ok=True)
        # Of this attempt: a later one may write another checkpoint of this step.
        copy = self._scratch / f"copy-{name}-{records(self._fs, self._folder(name))[0].attempt[:12]}"
        # DeepSpeed reads files by path, so that a checkpoint in a bucket is downloaded whole; once, and not by every rank.
        with files.locked(copy.with_suffix(".lock")):
            if not copy.exists():
                with tempfile.TemporaryDirectory(dir=self._scratch) as part:
                    remote.copy(
                        self._fs, self._folder(name), remote.files_below(self._fs, self._folder(name)), Path(part) / "whole"
                    )
                    compare(Path(part) / "whole", expected(self._fs, self._folder(name)))
                    (Path(part) / "whole").rename(copy)
        return copy

    def _store(self, name: str, best: Best | None, directory: Path) -> None:
        """Put this rank's files into a checkpoint's folder, then its record, and remove checkpoints that are not kept."""
        listing = sorted(path for path in directory.rglob("*") if path.is_file())
        found = {path.relative_to(directory).as_posix(): {"bytes": path.stat().st_size, "xxh3": xxh3(path)} for path in listing}
        for path in listing:
            self._put(path, f"{self._base}/{name}/{path.relative_to(directory).as_posix()}")
        record = {
            "attempt": self._attempt,
            "world_size": self._world_size,
            "best": None if best is None else best.model_dump(),
            "files": found,
        }
        # The sum is of the record without itself.
        text = json.dumps({**record, "xxh3": json_sum(record)})
        path = f"{self._base}/{name}/{record_name(self._rank)}"
        if self._is_local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)  # a rank without files of its own (ZeRO 0)
            with written_whole(Path(path)) as scratch:
                scratch.write_text(text)
        else:
            with self._fs.open_output_stream(path) as stream:
                stream.write(text.encode())
        # On a disk the files are gone already, and only folders are left.
        shutil.rmtree(directory)
        if self._rank == 0:
            # One rank, after its own record: two would remove the same folders.
            self._prune(name, best)

    def _put(self, source: Path, target: str) -> None:
        if self._is_local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            # A rename within one file system: the scratch lies beside the checkpoints.
            source.replace(target)
            return
        self._fs.create_dir(str(PurePosixPath(target).parent), recursive=True)
        with source.open("rb") as file, self._fs.open_output_stream(target) as stream:
            shutil.copyfileobj(file, stream, 1 << 22)

    def _prune(self, newest: str, best: Best | None) -> None:
        """Remove the checkpoints that are not kept, after the record of rank 0 was added to the newest."""
        # The newest may lack the files of other ranks yet: the newest whole one stays, whichever that is.
        older = (name for name in sorted(self._names(), reverse=True) if name < newest)
        whole = [name for name in (newest, *older) if self._has_all(name)]
        kept = {newest, *whole[:1]}
        if self._needs_best and best is not None:
            kept.add(f"{best.step:09d}")
        # The newest is whole, and no best one is kept: the one before it stays for a newest that turns out damaged.
        if len(kept) == 1:
            kept |= set(whole[:2])
        for name in self._names():
            if name < newest and name not in kept:
                self._remove(name)

    def _has_all(self, name: str) -> bool:
        try:
            return bool(records(self._fs, self._folder(name)))
        except NotWhole:
            return False

    def _remove(self, name: str) -> None:
        # Another process may be removing it: a zombie of an earlier attempt, or the same rank that was killed while it did.
        if self._fs.get_file_info(self._folder(name)).type == pafs.FileType.Directory:
            self._fs.delete_dir(self._folder(name))
