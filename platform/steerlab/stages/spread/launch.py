"""Run the training loop in Ray Train workers, and keep it alive."""

from __future__ import annotations

import os
import tempfile
import threading
import traceback
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import pyarrow.fs as pafs
import ray
import ray.train
from pydantic import Field, FiniteFloat
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from steerlab.data.sources import remote
from steerlab.guards import files, saved
from steerlab.job import ScaleConfig
from steerlab.stages.spread import reserved
from steerlab.storage.plan import ModelRef, Report
from steerlab.training.request import Request, received

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_POLL_S = 0.5
_SNAPSHOT = "checkpoint_manager_snapshot.json"
"""Ray Train's list of the checkpoints of a run, in the run's folder."""
_LONGEST_SNAPSHOT = 2**20
_LATER = "remove its folder, and the training starts from its beginning"


class _Told(NamedTuple):
    """What was left on a board since it was last looked at."""

    lines: list[dict[str, float]]
    failures: list[Exception]


@ray.remote(num_cpus=0)
class Board:
    """A place where rank 0 leaves metrics and the driver picks them up."""

    def __init__(self) -> None:
        self._lines: list[dict[str, float]] = []
        self._failures: list[Exception] = []
        self._failed = False

    def put(self, line: dict[str, float]) -> None:
        """Leave the metrics of a step."""
        self._lines.append(line)

    def fail(self, failure: Exception) -> None:
        """Leave a failure that another try would only repeat."""
        self._failed = True
        self._failures.append(failure)

    def failed(self) -> bool:
        """Say whether a rank left a failure."""
        return self._failed

    def take(self) -> _Told:
        """Take all that was left since the last call."""
        told = _Told(self._lines, self._failures)
        self._lines, self._failures = [], []
        return told


@dataclass(frozen=True)
class _Launch:
    """What every worker of a training is handed."""

    request: Request[ModelRef]
    scale: ScaleConfig
    board: ActorHandle
    storage: str
    scratch: str
    """Folder of a node's disk for checkpoints that are being written."""

    @property
    def is_remote(self) -> bool:
        """Whether the storage is no disk that all nodes share."""
        return "://" in self.storage

    @property
    def output(self) -> Path:
        """Where rank 0 writes the artifact."""
        return Path(self.scratch if self.is_remote else self.storage) / "output"


def fit(
    request: Request[ModelRef],
    scale: ScaleConfig,
    *,
    storage: str,
    name: str,
    report: Report,
) -> None:
    """Train in Ray Train workers and leave the artifact in the folder `output` of `storage`.

    `storage` (a path or URI that all nodes reach) and `name` find the checkpoints again after a kill of the whole job; a worker
    that dies is replaced up to `scale.max_failures` times.

    Raises:
        ValueError: the list of checkpoints that is there was not left by a run, as `check_snapshot` says.
    """
    check_snapshot(storage, name)
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")  # 2 s by default, waited for at both ends of a run
    gpu = reserved.uses_gpu(scale)
    board: Any = Board.options(scheduling_strategy=reserved.beside_the_driver()).remote()  # type: ignore[attr-defined]
    # Beside the checkpoints where that is a disk, so that it goes with them; a bucket needs a disk of the node.
    scratch = f"{tempfile.gettempdir()}/steerlab-{uuid.uuid4().hex}" if "://" in storage else f"{storage}/scratch"
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"launch": _Launch(request, scale, board, storage, scratch)},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=scale.workers,
            use_gpu=gpu,
            resources_per_worker={"CPU": scale.cpus_per_worker, **({"GPU": 1} if gpu else {})},
        ),
        run_config=RunConfig(
            name=name,
            storage_path=storage,
            failure_config=FailureConfig(max_failures=scale.max_failures),
            # The best one by this score and, always, the latest one: two at most.
            checkpoint_config=CheckpointConfig(
                num_to_keep=1, checkpoint_score_attribute="eval/loss", checkpoint_score_order="min"
            ),
        ),
    )
    following = _Following(board, report)
    with following:
        trainer.fit()
    if following.failure is not None:
        raise following.failure


_Name = Annotated[str, Field(pattern=r"^checkpoint_[0-9A-Za-z_.-]+$")]
"""A folder of a checkpoint, as Ray Train calls it: a name and no path."""


class _Metrics(saved.Shape):
    loss: FiniteFloat = Field(alias="eval/loss")


class _Kept(saved.Shape):
    checkpoint_dir_name: _Name
    metrics: _Metrics


class _Snapshot(saved.Shape):
    """What the list holds in trainings of this platform, which validate nothing in Ray Train's sense."""

    checkpoint_results: list[_Kept]
    checkpoint_report_indices: list[int]
    latest_checkpoint_result: _Kept | None = None
    pending_training_results: list[object] = Field(max_length=0)
    current_report_index: int


def check_snapshot(storage: str, name: str) -> None:
    """Refuse a list of checkpoints that no run here has left: Ray Train continues from what it names, and removes that.

    Raises:
        ValueError: it is damaged, or names what is no checkpoint in the folder of the run.
    """
    is_local = "://" not in storage
    filesystem, base = (pafs.LocalFileSystem(), storage) if is_local else remote.opened(storage)
    folder, where = f"{base}/{name}", f"{storage}/{name}/{_SNAPSHOT}"
    try:
        snapshot = saved.parsed(_read(filesystem, f"{folder}/{_SNAPSHOT}", is_local), _Snapshot, where)
    except FileNotFoundError:
        return
    except (saved.SavedError, files.FileError) as error:
        raise ValueError(f"{error}; {_LATER}") from None
    named = [kept.checkpoint_dir_name for kept in snapshot.checkpoint_results]
    latest = snapshot.latest_checkpoint_result
    if len(named) != len(snapshot.checkpoint_report_indices) or (latest and latest.checkpoint_dir_name not in named):
        raise ValueError(f"{where} is damaged: its lists of checkpoints do not belong together; {_LATER}")
    for one in named:
        is_link = is_local and Path(folder, one).is_symlink()
        if is_link or filesystem.get_file_info(f"{folder}/{one}").type != pafs.FileType.Directory:
            raise ValueError(f"{where} names {one}, which is no folder beside it; {_LATER}")


def _read(filesystem: pafs.FileSystem, path: str, is_local: bool) -> bytes:
    if is_local:
        return files.read(Path(path), _LONGEST_SNAPSHOT)
    with filesystem.open_input_stream(path) as stream:
        return stream.read(_LONGEST_SNAPSHOT)


class _Following:
    """Hand what rank 0 leaves on the board to `report`, each step once, until the block ends."""

    def __init__(self, board: ActorHandle, report: Report) -> None:
        self._board, self._report = board, report
        self._newest = 0
        self.failure: Exception | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._pick_up()
        ray.kill(self._board)

    def _follow(self) -> None:
        try:
            while not self._stop.wait(_POLL_S):
                self._pick_up()
        except Exception as error:  # whatever `report` raised (a full disk, a bug): the main thread has to hear of it
            self.failure = error

    def _pick_up(self) -> None:
        told: _Told = ray.get(self._board.take.remote())  # type: ignore[assignment]
        self.failure = next((failure for failure in (self.failure, *told.failures) if failure is not None), None)
        for line in told.lines:
            # A resumed run repeats the steps since its checkpoint, with the same numbers.
            if line["step"] > self._newest:
                self._newest = line["step"]
                self._report(line)


def _worker(config: dict[str, _Launch]) -> None:
    """Run the loop on one rank."""
    import torch

    from steerlab.training import loop

    launch = config["launch"]
    board = launch.board
    if ray.get(board.failed.remote()):
        return
    context = ray.train.get_context()
    request = received(launch.request)
    torch.set_num_threads(max(1, int(launch.scale.cpus_per_worker)))
    rank = context.get_world_rank()
    checkpoint = ray.train.get_checkpoint()
    link = loop.Link(
        rank=rank,
        world_size=context.get_world_size(),
        device=get_device(),
        report=_report,
        scratch=Path(launch.scratch) / f"rank{rank}",
        latest=None if checkpoint is None else _local(checkpoint),
        best=_best,
        tell=(lambda metrics: board.put.remote(metrics)) if rank == 0 else (lambda metrics: None),
    )
    try:
        loop.run(request, launch.scale, link, launch.output)
    except (ValueError, FloatingPointError) as error:
        # What the settings or the data did: the next group of workers finds it on the board and ends at once.
        error.add_note(traceback.format_exc())
        ray.get(board.fail.remote(error))
        raise
    if launch.is_remote and rank == 0:
        filesystem, path = remote.opened(f"{launch.storage}/output")
        pafs.copy_files(str(launch.output), path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=filesystem)


def _report(metrics: dict[str, float], directory: Path | None) -> None:
    """Report from every rank; each rank's files become part of one checkpoint."""
    checkpoint = None if directory is None else Checkpoint.from_directory(str(directory))
    ray.train.report(
        metrics,
        checkpoint=checkpoint,
        checkpoint_upload_mode=ray.train.CheckpointUploadMode.ASYNC,
        delete_local_checkpoint_after_upload=True,
    )


def _local(checkpoint: Checkpoint) -> Path:
    """Return a local directory of a checkpoint: itself on a local ROOT, else a copy shared by the ranks of this node."""
    assert checkpoint.filesystem is not None, "a checkpoint lies somewhere"
    return Path(checkpoint.path) if checkpoint.filesystem.type_name == "local" else Path(checkpoint.to_directory())


def _best() -> Path | None:
    """Return the reported checkpoint with the lowest evaluation loss; waits for uploads that are under way."""
    reported = [r for r in ray.train.get_all_reported_checkpoints() if r.checkpoint is not None]
    if not reported:
        return None
    return _local(min(reported, key=lambda r: r.metrics["eval/loss"]).checkpoint)
