"""Run the training loop in Ray Train workers, and continue it from the newest checkpoint when a worker or the controller dies.

Checkpoints are written by the platform itself (training/checkpoint_folder.py); Ray Train does not know them.
"""

from __future__ import annotations

import os
import threading
import traceback
import uuid
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import ray
import ray.train
from ray.exceptions import ActorDiedError, ActorUnavailableError
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from steerlab.data.sources import remote
from steerlab.job import ScaleConfig
from steerlab.stages.spread import reserved
from steerlab.storage.errors import FullDisk
from steerlab.storage.plan import ModelRef, Report
from steerlab.training.request import Request

if TYPE_CHECKING:
    from ray.actor import ActorHandle

# Seconds between two calls of the board: two lines per second are enough for a reader, and each call takes time.
_POLL_S = 0.5


class _News(NamedTuple):
    """Content of a board since it was last read."""

    lines: list[dict[str, float]]
    """Metrics of steps."""
    notes: list[str]
    """Lines for the user."""
    failures: list[Exception]


# The board is an actor, because Ray Train's own reports reach the driver only when `fit` returns.
@ray.remote(num_cpus=0)
class Board:
    """Hold the metrics that rank 0 sends until the driver takes them."""

    def __init__(self) -> None:
        self._lines: list[dict[str, float]] = []
        self._notes: list[str] = []
        self._failures: list[Exception] = []
        # A flag besides the list, because `take` empties the list, and a later group of workers still needs to know.
        self._failed = False

    def put(self, line: dict[str, float]) -> None:
        """Add the metrics of a step."""
        self._lines.append(line)

    def note(self, line: str) -> None:
        """Add a line for the user."""
        self._notes.append(line)

    def fail(self, failure: Exception) -> None:
        """Add an error that every further attempt would repeat."""
        self._failed = True
        self._failures.append(failure)

    def failed(self) -> bool:
        """Return whether a rank has added a failure, even if the driver has taken it since."""
        return self._failed

    def take(self) -> _News:
        """Return and remove all content."""
        news = _News(self._lines, self._notes, self._failures)
        self._lines, self._notes, self._failures = [], [], []
        return news


@dataclass(frozen=True)
class _Launch:
    """Arguments that every worker of a training receives."""

    request: Request[ModelRef]
    scale: ScaleConfig
    board: ActorHandle
    storage: str
    """Path or URI of the stage's work directory, valid on all nodes."""
    attempt: str
    """Twelve random digits that all workers share."""


def fit(request: Request[ModelRef], scale: ScaleConfig, *, storage: str, report: Report) -> None:
    """Train in Ray Train workers and write the artifact into the folder `output` of `storage`.

    Args:
        request: What the training computes.
        scale: Number and size of the workers. A worker or Ray Train's controller that dies is replaced, each up to
            `scale.max_failures` times.
        storage: Path or URI that all nodes reach. It holds the checkpoints; a later call continues from the newest one.
        report: Takes the metrics of each step once.

    Raises:
        ValueError: the loop refused the settings or the data.
        FloatingPointError: a step was bad (training/bad_steps.py), or a metric of the evaluation is NaN or infinite.
        FullDisk: there is no room for a checkpoint or the artifact.
    """
    # Ray Train's controller checks its workers every 2 s by default, and a run waits for a check when it starts and ends.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    board: Any = Board.options(scheduling_strategy=reserved.beside_the_driver()).remote()  # type: ignore[attr-defined]
    # All groups of workers of this call share one id; records in a checkpoint distinguish groups by their own number.
    launch = _Launch(request, scale, board, storage, uuid.uuid4().hex[:12])
    # The thread starts before `fit`, so that lines are passed on at once; the block ends the board in every case.
    following = _Following(board, report)
    with following:
        for failures_left in reversed(range(scale.max_failures + 1)):
            try:
                _trainer(launch).fit()
                break
            except (ActorDiedError, ActorUnavailableError) as error:
                # Ray Train itself replaces workers, but not its controller, which is an actor without restarts.
                if not failures_left:
                    raise
                warnings.warn(
                    f"Ray Train's controller died ({_first_line(error)}); another one continues from the newest checkpoint",
                    stacklevel=2,
                )
    # After a failure that a repetition would not change, replaced workers end without an error, so `fit` returns normally.
    if following.failure is not None:
        raise following.failure


def _trainer(launch: _Launch) -> TorchTrainer:
    """Return a Ray Train run with a unique name, so that it does not resume an earlier one."""
    scale, gpus = launch.scale, reserved.gpus_of(launch.scale)
    filesystem, path = (None, launch.storage) if "://" not in launch.storage else remote.opened(launch.storage)
    return TorchTrainer(
        _worker,
        train_loop_config={"launch": launch},
        # gloo on CPUs, since NCCL supports GPUs only.
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=scale.workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": scale.cpus_per_worker, **({"GPU": gpus} if gpus else {})},
        ),
        run_config=RunConfig(
            # Ray Train would resume a run of the same name from its own snapshot, which ignores the platform's checkpoints.
            name=f"ray-{uuid.uuid4().hex[:12]}",
            storage_path=path,
            storage_filesystem=filesystem,
            # Ray Train V2 replaces no worker by default: its `max_failures` is 0.
            failure_config=FailureConfig(max_failures=scale.max_failures),
        ),
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


class _Following:
    """Pass the metrics on the board to `report`, each step once, until the block ends; then stop the board."""

    def __init__(self, board: ActorHandle, report: Report) -> None:
        # The driver polls the board, since an actor cannot call a driver.
        self._board, self._report = board, report
        # The newest reported step; steps are numbered from 1.
        self._newest = 0.0
        self.failure: Exception | None = None
        """First error of the workers or of `report`; None if there was none."""
        self._stop = threading.Event()
        # A thread, because `fit` blocks the main one; a daemon, so that it does not keep an ending process alive.
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        # The last steps may have been added after the thread's last call.
        self._take()
        ray.kill(self._board)

    def _follow(self) -> None:
        try:
            while not self._stop.wait(_POLL_S):
                self._take()
        except Exception as error:  # an exception in a thread is only printed, so `fit` raises it
            self.failure = error

    def _take(self) -> None:
        news: _News = ray.get(self._board.take.remote())  # type: ignore[assignment]
        self.failure = next((failure for failure in (self.failure, *news.failures) if failure is not None), None)
        for note in news.notes:
            warnings.warn(note, stacklevel=2)
        for line in news.lines:
            # Replaced workers repeat the steps since the checkpoint, with the same numbers.
            if line["step"] > self._newest:
                self._newest = line["step"]
                self._report(line)


def _worker(config: dict[str, _Launch]) -> None:
    """Run the training loop on one rank."""
    import torch

    from steerlab.training import worker

    launch = config["launch"]
    board = launch.board
    # Ray Train starts a new group of workers after any error. If the error was one of settings or data, a second group would
    # only repeat it, so it returns here without an error, which ends the run.
    if ray.get(board.failed.remote()):
        return
    context = ray.train.get_context()

    def say(line: str) -> None:
        # The call is awaited, because a line that a worker sends just before it dies would otherwise be lost.
        ray.get(board.note.remote(line))

    # PyTorch starts a thread for every core of the node, not for the CPUs that Ray reserved for this worker.
    torch.set_num_threads(max(1, int(launch.scale.cpus_per_worker)))
    seat = worker.Seat(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        local_rank=context.get_local_rank(),
        # The device that Ray assigned to this worker; torch's own default would be the first one of the node.
        device=get_device(),
        storage=launch.storage,
        attempt=launch.attempt,
        # The call is not awaited, because a step must not take as long as a call to another node.
        tell=lambda metrics: board.put.remote(metrics),
        say=say,
    )
    try:
        worker.run(launch.request, launch.scale, seat)
    except (ValueError, FloatingPointError, FullDisk) as error:
        # Errors of the settings or the data, or a full disk. The traceback is added as a note, since pickling drops it. `get`
        # waits until the board has the error, because this process ends with the `raise`.
        error.add_note(traceback.format_exc())
        ray.get(board.fail.remote(error))
        raise
