"""The checkpoints of a training in its work directory: written by all ranks, complete or ignored, verified on loading.

    checkpoints/000000010/steerlab.json, state/...   the files of all ranks at step 10
    checkpoints/000000010/rank0.json                 the record of rank 0, written after its files: their sizes and sums

A checkpoint is complete if it has the records of all ranks, from one attempt, and every file matches its record. Other
checkpoints are skipped with a line for the user: the training resumes from the newest complete one, or from its start, with the
same final weights. Two checkpoints are retained: the newest, and the best one if the training ends with it, otherwise the one
before the newest.
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
    """The checkpoints of one training, for one of its ranks."""

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
            say: Function that takes a line about a skipped checkpoint.
        """
        self._is_local = "://" not in storage
        self._fs, base = (pafs.LocalFileSystem(), storage) if self._is_local else remote.opened(storage)
        # The folder is in the stage's own work directory, so a training cannot find checkpoints of another training.
        self._base, self._scratch = f"{base}/{FOLDER}", scratch
        self._rank, self._world_size, self._device = rank, world_size, device
        self._needs_best, self._say = needs_best, say
        # `start` sets it to rank 0's on all ranks.
        self._attempt = ""
        self._best: Best | None = None
        self._upload: Future[None] | None = None

    def start(self) -> Path | None:
        """Return a local directory with the newest complete checkpoint; None if there is none. All ranks call it.

        Incomplete folders are removed.
        """
        # One rank chooses for all, since all must begin at the same step.
        choice = (self._choose(), uuid.uuid4().hex) if self._rank == 0 else None
        if self._world_size > 1:
            box = [choice]
            # Ray has created the process group (gloo or NCCL); NCCL sends from device memory, so it needs the device.
            distributed.broadcast_object_list(box, src=0, device=self._device)
            choice = box[0]
        assert choice is not None
        name, self._attempt = choice
        if name is None:
            return None
        # The best step so far is that of the checkpoint, since later evaluations are repeated.
        self._best = records(self._fs, self._folder(name))[0].best
        return self._local(name)

    def add(self, metrics: dict[str, float], directory: Path | None) -> None:
        """Store this rank's files of a checkpoint (they are moved), and remove checkpoints that are no longer needed.

        To an object store they are uploaded while the next steps compute.

        Args:
            metrics: `step`, and `eval/loss` if the step was evaluated.
            directory: Local directory with the files of this rank.
        """
        assert directory is not None, "the loop reports checkpoints only"
        step, loss = int(metrics["step"]), metrics.get("eval/loss")
        # Among equal losses, the earliest is the best. Every rank has the same metrics, so all ranks agree.
        if loss is not None and (self._best is None or loss < self._best.loss):
            self._best = Best(step=step, loss=loss)
        name, best = f"{step:09d}", self._best
        if self._is_local:
            return self._store(name, best, directory)
        # Uploads run one after another, each while the next steps compute.
        self.finish()
        uploader = ThreadPoolExecutor(1)
        self._upload = uploader.submit(self._store, name, best, directory)
        uploader.shutdown(wait=False)  # its thread ends with the upload, since the process may be reused for other trainings

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
            distributed.barrier()  # the other ranks' files must be stored, too
        name = f"{self._best.step:09d}"
        try:
            return self._checked(name) if self._rank == 0 or not self._is_local else self._local(name)
        except NotWhole as error:
            # The next best one is no substitute: the result would differ from that of an undamaged run.
            raise ValueError(
                f"the best checkpoint, of step {self._best.step}, is damaged: {error}; run the same command again, and the "
                "training continues from an older checkpoint"
            ) from None

    def finish(self) -> None:
        """Wait for the current upload. Raises its error."""
        if self._upload is not None:
            self._upload.result()

    def _choose(self) -> str | None:
        """Return the newest checkpoint from which the training can resume, and remove newer and incomplete ones."""
        names, broken = sorted(self._names(), reverse=True), []
        chosen = None
        for name in names:
            try:
                self._checked(name)
                best = records(self._fs, self._folder(name))[0].best
                if self._needs_best and best is not None:
                    # Without its best checkpoint, the training would end with other weights than an undisturbed one.
                    self._checked(f"{best.step:09d}")
            except NotWhole as error:
                self._say(f"the checkpoint of step {int(name)} is skipped: {error}")
                broken.append(name)
            else:
                chosen = name
                break
        # Broken folders are removed after the choice: otherwise every restart would check them again, and new files of their
        # steps would be mixed with theirs.
        for name in broken:
            self._remove(name)
        return chosen

    def _folder(self, name: str) -> str:
        return f"{self._base}/{name}"

    def _names(self) -> list[str]:
        listing = self._fs.get_file_info(pafs.FileSelector(self._base, allow_not_found=True))
        return [info.base_name for info in listing if _NAME.fullmatch(info.base_name)]

    def _checked(self, name: str) -> Path:
        """Return a local directory with a checkpoint after verifying every file. Raises NotWhole."""
        if not self._is_local:
            return self._local(name)
        compare(Path(self._base) / name, expected(self._fs, self._folder(name)))
        return Path(self._base) / name

    def _local(self, name: str) -> Path:
        """Return a local directory with a checkpoint: the folder itself on a disk, otherwise a copy for all ranks of this node.

        Raises:
            NotWhole: the copy does not match the records.
        """
        if self._is_local:
            return Path(self._base) / name
        self._scratch.mkdir(parents=True, exist_ok=True)
        # The name contains the attempt, since a later one may write another checkpoint of this step.
        copy = self._scratch / f"copy-{name}-{records(self._fs, self._folder(name))[0].attempt[:12]}"
        # DeepSpeed reads files by path, so a checkpoint in a bucket is downloaded as a whole, once for all ranks of a node.
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
        """Put this rank's files into a checkpoint's folder, then its record, and remove checkpoints that are not needed."""
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
        # The checksum is computed without the field itself.
        text = json.dumps({**record, "xxh3": json_sum(record)})
        path = f"{self._base}/{name}/{record_name(self._rank)}"
        if self._is_local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)  # a rank without files (ZeRO 0)
            with written_whole(Path(path)) as scratch:
                scratch.write_text(text)
        else:
            with self._fs.open_output_stream(path) as stream:
                stream.write(text.encode())
        # On a disk, the files were moved already, and only folders remain.
        shutil.rmtree(directory)
        if self._rank == 0:
            # Only one rank removes folders, after its own record is written; two ranks would remove the same ones.
            self._prune(name, best)

    def _put(self, source: Path, target: str) -> None:
        if self._is_local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            # This is a rename within one file system, since the scratch folder is beside the checkpoints.
            source.replace(target)
            return
        self._fs.create_dir(str(PurePosixPath(target).parent), recursive=True)
        with source.open("rb") as file, self._fs.open_output_stream(target) as stream:
            shutil.copyfileobj(file, stream, 1 << 22)

    def _prune(self, newest: str, best: Best | None) -> None:
        """Remove the checkpoints that are not needed, after rank 0's record was added to the newest."""
        # The newest may still lack the files of other ranks, so the newest complete one is retained as well.
        older = (name for name in sorted(self._names(), reverse=True) if name < newest)
        whole = [name for name in (newest, *older) if self._has_all(name)]
        kept = {newest, *whole[:1]}
        if self._needs_best and best is not None:
            kept.add(f"{best.step:09d}")
        # If the newest is complete and no best one is retained, the one before it stays in case the newest is damaged later.
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
        # The folder may be gone: a process of an earlier attempt may still run and remove it.
        if self._fs.get_file_info(self._folder(name)).type == pafs.FileType.Directory:
            self._fs.delete_dir(self._folder(name))
