"""Run the training loop in Ray Train workers, and continue it from the newest checkpoint when a worker dies.

The file is longer than 300 lines because driver and workers of a training share its types: launch, board and checkpoints.
"""

from __future__ import annotations

import os
import shutil
import threading
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import pyarrow.fs as pafs
import ray
import ray.train
from pydantic import Field, FiniteFloat
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from steerlab.data.sources import cache_root, remote
from steerlab.guards import files, saved
from steerlab.job import ScaleConfig
from steerlab.stages.spread import reserved
from steerlab.storage import temporary
from steerlab.storage.plan import ModelRef, Report
from steerlab.training.request import Request, received

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_POLL_S = 0.5
_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""File in the folder of a run in which Ray Train lists the checkpoints of the run."""
_LONGEST_SNAPSHOT = 2**20
"""Bytes of that file at most; a run keeps two checkpoints, whose entries take a few hundred."""
_ADVICE = "remove its folder, and the training starts from its beginning"


class _News(NamedTuple):
    """Metrics and failures that were put on a board since it was last read."""

    lines: list[dict[str, float]]
    failures: list[Exception]


# An actor, because Ray Train's own reports reach the driver only when `fit` returns.
@ray.remote(num_cpus=0)
class Board:
    """Holds the metrics that rank 0 sends until the driver takes them."""

    def __init__(self) -> None:
        self._lines: list[dict[str, float]] = []
        self._failures: list[Exception] = []
        self._failed = False

    def put(self, line: dict[str, float]) -> None:
        """Add the metrics of a step."""
        self._lines.append(line)

    def fail(self, failure: Exception) -> None:
        """Add an error that another attempt would only repeat."""
        self._failed = True
        self._failures.append(failure)

    def failed(self) -> bool:
        """Return whether a rank has added a failure, also if it has been taken since."""
        return self._failed

    def take(self) -> _News:
        """Return all that was added since the last call, and forget it."""
        news = _News(self._lines, self._failures)
        self._lines, self._failures = [], []
        return news


@dataclass(frozen=True)
class _Launch:
    """What every worker of a training receives."""

    request: Request[ModelRef]
    scale: ScaleConfig
    board: ActorHandle
    storage: str
    """Path or URI of the stage's work directory, valid on all nodes."""

    @property
    def is_remote(self) -> bool:
        """Whether the storage is an object store and not a disk."""
        return "://" in self.storage


def fit(
    request: Request[ModelRef],
    scale: ScaleConfig,
    *,
    storage: str,
    name: str,
    report: Report,
) -> None:
    """Train in Ray Train workers and write the artifact into the folder `output` of `storage`.

    Args:
        request: What the training computes.
        scale: Number and size of the workers. A worker that dies is replaced up to `scale.max_failures` times.
        storage: Path or URI that all nodes reach. Checkpoints lie there, and a later call continues from the newest one.
        name: Name of the run, and of its folder in `storage`; a later call must use the same.
        report: Takes the metrics of each step once.

    Raises:
        ValueError: `storage` holds a list of checkpoints that no run wrote (see `check_snapshot`), or the loop refused the
            settings or the data.
    """
    # Before `trainer.fit`, in which Ray Train restores from this list.
    check_snapshot(storage, name)
    # Ray Train's controller looks at its workers every 2 s by default, and a run waits for a look when it starts and ends.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    gpu = reserved.uses_gpu(scale)
    filesystem, base = _opened(storage)
    board: Any = Board.options(scheduling_strategy=reserved.beside_the_driver()).remote()  # type: ignore[attr-defined]
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"launch": _Launch(request, scale, board, storage)},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=scale.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": scale.cpus_per_worker, **({"GPU": 1} if gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            # Opened here: Ray Train would open a URI without the options and the schemes that `remote` adds.
            storage_path=base,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=scale.max_failures),
            # Ray Train keeps the latest checkpoint besides the best one by this score, so two lie there at most.
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="eval/loss", checkpoint_score_order="min"
            ),
        ),
    )
    following = _Following(board, report)
    with following:
        trainer.fit()
    # After a failure that a repetition would not change, the replaced workers end without an error, and `fit` returns.
    if following.failure is not None:
        raise following.failure


_Name = Annotated[str, Field(pattern=r"^checkpoint_[0-9A-Za-z_.-]+$")]
"""Name of a checkpoint's folder as Ray Train makes it. No path: Ray Train removes the folders that its list names."""


class _Metrics(saved.Shape):
    loss: FiniteFloat = Field(alias="eval/loss")


class _Entry(saved.Shape):
    checkpoint_dir_name: _Name
    metrics: _Metrics


class _Snapshot(saved.Shape):
    """Content of Ray Train's list of checkpoints, in trainings of this platform."""

    checkpoint_results: list[_Entry]
    checkpoint_report_indices: list[int]
    latest_checkpoint_result: _Entry | None = None
    # Always empty: the platform uses none of Ray Train's asynchronous validations.
    pending_training_results: list[object] = Field(max_length=0)
    current_report_index: int


def check_snapshot(storage: str, name: str) -> None:
    """Refuse a list of checkpoints that no run of this platform wrote.

    Raises:
        ValueError: the list is damaged, or names something else than a checkpoint in the folder of the run.
    """
    # Whoever may write into ROOT may have written the list; Ray Train loads the folders that it names, and removes them later.
    filesystem, base = _opened(storage)
    is_local = isinstance(filesystem, pafs.LocalFileSystem)
    folder, where = f"{base}/{name}", remote.joined(storage, name, _SNAPSHOT)
    try:
        snapshot = saved.parsed(_read(filesystem, f"{folder}/{_SNAPSHOT}", is_local), _Snapshot, where)
    except FileNotFoundError:
        return
    except (saved.SavedError, files.FileError) as error:
        raise ValueError(f"{error}; {_ADVICE}") from None
    names = [entry.checkpoint_dir_name for entry in snapshot.checkpoint_results]
    latest = snapshot.latest_checkpoint_result
    if len(names) != len(snapshot.checkpoint_report_indices) or (latest and latest.checkpoint_dir_name not in names):
        raise ValueError(f"{where} is damaged: its lists of checkpoints do not belong together; {_ADVICE}")
    for checkpoint in names:
        # pyarrow follows links, so a link to a directory elsewhere would pass as one.
        is_link = is_local and Path(folder, checkpoint).is_symlink()
        if is_link or filesystem.get_file_info(f"{folder}/{checkpoint}").type != pafs.FileType.Directory:
            raise ValueError(f"{where} names {checkpoint}, which is no folder beside it; {_ADVICE}")


def _opened(storage: str) -> tuple[pafs.FileSystem, str]:
    return remote.opened(storage) if "://" in storage else (pafs.LocalFileSystem(), storage)


def _read(filesystem: pafs.FileSystem, path: str, is_local: bool) -> bytes:
    if is_local:
        return files.read(Path(path), _LONGEST_SNAPSHOT)
    with filesystem.open_input_stream(path) as stream:
        return stream.read(_LONGEST_SNAPSHOT)


class _Following:
    """Pass the metrics on the board to `report`, each step once, until the block ends; then end the board."""

    def __init__(self, board: ActorHandle, report: Report) -> None:
        # The driver asks the board, since an actor has no handle on a driver.
        self._board, self._report = board, report
        self._newest = 0.0
        self.failure: Exception | None = None
        """First error of the workers or of `report`; None if there was none."""
        self._stop = threading.Event()
        # A thread, because `fit` blocks the main one. A daemon, so that it cannot keep a process alive that is ending.
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        # Once more: the last steps may have come after the thread's last look.
        self._take()
        ray.kill(self._board)

    def _follow(self) -> None:
        try:
            while not self._stop.wait(_POLL_S):
                self._take()
        except Exception as error:  # of `report`: a full disk, a bug. A thread's exception is only printed; `fit` raises it
            self.failure = error

    def _take(self) -> None:
        news: _News = ray.get(self._board.take.remote())  # type: ignore[assignment]
        self.failure = next((failure for failure in (self.failure, *news.failures) if failure is not None), None)
        for line in news.lines:
            # Workers that replace others repeat the steps since the checkpoint, with the same numbers.
            if line["step"] > self._newest:
                self._newest = line["step"]
                self._report(line)


def _worker(config: dict[str, _Launch]) -> None:
    """Run the training loop on one rank."""
    import torch

    launch = config["launch"]
    board = launch.board
    # Ray Train starts a new group of workers after any error. If the error was one of settings or data, a second group would
    # only repeat it; it ends here instead, without an error, which ends the run.
    if ray.get(board.failed.remote()):
        return
    request = received(launch.request)
    # PyTorch starts a thread for every core of the node, not for the CPUs that Ray reserved for this worker.
    torch.set_num_threads(max(1, int(launch.scale.cpus_per_worker)))
    with _scratch(launch) as scratch:
        _train(launch, request, scratch)


def _train(launch: _Launch, request: Request[Path], scratch: Path) -> None:
    """Run the loop on this rank, and leave the artifact in the storage."""
    from steerlab.training import loop

    context, board, copies = ray.train.get_context(), launch.board, _Copies()
    rank, checkpoint = context.get_world_rank(), ray.train.get_checkpoint()
    output = (scratch if launch.is_remote else Path(launch.storage)) / "output"
    link = loop.Link(
        rank=rank,
        world_size=context.get_world_size(),
        device=get_device(),
        report=_report,
        scratch=scratch / f"rank{rank}",
        latest=None if checkpoint is None else copies.of(checkpoint),
        best=copies.best,
        tell=(lambda metrics: board.put.remote(metrics)) if rank == 0 else (lambda metrics: None),
    )
    try:
        loop.run(request, launch.scale, link, output)
    except (ValueError, FloatingPointError) as error:
        # An error of the settings or the data. The traceback travels as a note, since pickling an exception drops it; `get`
        # waits until the board has the error, because this process ends with the `raise`.
        error.add_note(traceback.format_exc())
        ray.get(board.fail.remote(error))
        raise
    if launch.is_remote:
        if rank == 0:
            filesystem, path = remote.opened(remote.joined(launch.storage, "output"))
            pafs.copy_files(str(output), path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=filesystem)
        # Waits for uploads of checkpoints from the scratch folder, which is about to be removed.
        ray.train.get_all_reported_checkpoints()
        copies.remove()


@contextmanager
def _scratch(launch: _Launch) -> Iterator[Path]:
    """Provide a local folder for checkpoints that are being written and, for a bucket, the artifact."""
    if not launch.is_remote:
        # Beside the checkpoints, so that they are renamed and not copied, and removed with them.
        yield Path(launch.storage) / "scratch"
        return
    folder = cache_root() / "tmp"
    # Those of workers that were killed on this node: nothing else of steerlab may run here.
    temporary.sweep(folder)
    with temporary.directory(folder, f"train-{uuid.uuid4().hex[:12]}") as path:
        yield path


def _report(metrics: dict[str, float], directory: Path | None) -> None:
    """Report a checkpoint to Ray Train; it merges the files of all ranks into one checkpoint."""
    checkpoint = None if directory is None else Checkpoint.from_directory(str(directory))
    ray.train.report(
        metrics,
        checkpoint=checkpoint,
        # The upload runs in a thread while the next steps compute; Ray Train removes the local files after it.
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


class _Copies:
    """Local directories with checkpoints: on a local ROOT the checkpoints themselves, else copies for this node's ranks."""

    def __init__(self) -> None:
        self._paths: set[Path] = set()

    def of(self, checkpoint: Checkpoint) -> Path:
        """Return the directory of a checkpoint."""
        assert checkpoint.filesystem is not None, "Ray Train sets the filesystem of a checkpoint"
        if checkpoint.filesystem.type_name == "local":
            return Path(checkpoint.path)
        path = Path(checkpoint.to_directory())
        self._paths.add(path)
        return path

    def best(self) -> Path | None:
        """Return the directory of the checkpoint of the lowest evaluation loss; None if no checkpoint was reported."""
        # `get_all_reported_checkpoints` waits for uploads that are under way.
        reported = [r for r in ray.train.get_all_reported_checkpoints() if r.checkpoint is not None]
        if not reported:
            return None
        return self.of(min(reported, key=lambda r: r.metrics["eval/loss"]).checkpoint)

    def remove(self) -> None:
        """Remove the copies, when all ranks have read them."""
        from torch import distributed

        if self._paths:
            distributed.barrier()
        for path in self._paths:
            shutil.rmtree(path, ignore_errors=True)
