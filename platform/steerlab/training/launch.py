"""Run the training loop in Ray Train workers, and keep it alive."""

from __future__ import annotations

import tempfile
import threading
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.train import Checkpoint, CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer, get_device

from steerlab.job import DataConfig, ModelConfig, ScaleConfig, TrainConfig
from steerlab.plan import ModelRef

_POLL_S = 0.5


@ray.remote(num_cpus=0)
class Board:
    """A place where rank 0 leaves metrics and the driver picks them up."""

    def __init__(self) -> None:
        self._lines: list[dict[str, Any]] = []

    def put(self, line: dict[str, Any]) -> None:
        """Leave one line."""
        self._lines.append(line)

    def take(self) -> list[dict[str, Any]]:
        """Take all lines since the last call."""
        lines, self._lines = self._lines, []
        return lines


def uses_gpu(scale: ScaleConfig) -> bool:
    """Decide whether workers get a GPU each. Raises ValueError when they must and the cluster has too few."""
    available = ray.cluster_resources().get("GPU", 0)
    enough = available >= scale.worker_range[0]
    if scale.gpu == "require" and not enough:
        raise ValueError(
            f"scale.gpu is require: {scale.worker_range[0]} workers need a GPU each, the cluster has {available:g}"
        )
    return scale.gpu != "never" and enough


def check_resources(scale: ScaleConfig) -> None:
    """Refuse more workers than the cluster can ever hold."""
    low = scale.worker_range[0]
    needed = low * scale.cpus_per_worker
    available = ray.cluster_resources().get("CPU", 0)
    if needed > available:
        raise ValueError(
            f"scale.workers {low} x scale.cpus_per_worker {scale.cpus_per_worker:g} = {needed:g} CPUs, "
            f"but the cluster has {available:g}"
        )
    uses_gpu(scale)


def fit(
    request: dict[str, Any],
    scale: ScaleConfig,
    *,
    storage: str,
    name: str,
    output: Path,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Train in Ray Train workers and leave the artifact in `output`.

    `storage` and `name` find the checkpoints again after a kill of the whole job; a worker that dies is replaced up to
    `scale.max_failures` times.
    """
    gpu = uses_gpu(scale)
    board = Board.remote()  # type: ignore[attr-defined]
    config = {"request": request, "scale": scale.model_dump(mode="json"), "board": board, "output": str(output)}
    # Beside the checkpoints where that is a disk, so that it goes with them; a bucket needs a disk of the node.
    config["scratch"] = f"{tempfile.gettempdir()}/steerlab-{uuid.uuid4().hex}" if "://" in storage else f"{storage}/scratch"
    trainer = TorchTrainer(
        _worker,
        train_loop_config=config,
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
                num_to_keep=1, checkpoint_score_attribute="eval/loss_nats", checkpoint_score_order="min"
            ),
        ),
    )
    following = _Following(board, report)
    with following:
        trainer.fit()
    if following.failure is not None:
        raise following.failure


class _Following:
    """Hand what rank 0 leaves on the board to `report`, each step once, until the block ends."""

    def __init__(self, board: Any, report: Callable[[dict[str, Any]], None]) -> None:
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
        while not self._stop.wait(_POLL_S):
            self._pick_up()

    def _pick_up(self) -> None:
        for line in ray.get(self._board.take.remote()):
            if "failure" in line:
                self.failure = line["failure"]
                continue
            # A resumed run repeats the steps since its checkpoint, with the same numbers.
            if line["step"] > self._newest:
                self._newest = line["step"]
                self._report(line)


def _worker(config: dict[str, Any]) -> None:
    """Run the loop on one rank."""
    import torch

    from steerlab.training import loop

    context = ray.train.get_context()
    scale = ScaleConfig.model_validate(config["scale"])
    raw = config["request"]
    request = loop.Request(
        model_dir=ModelRef(**raw["model_ref"]).locate(),
        model=ModelConfig.model_validate(raw["model"]),
        method=raw["method"],
        data=DataConfig.model_validate(raw["data"]),
        train=TrainConfig.model_validate(raw["train"]),
    )
    torch.set_num_threads(max(1, int(scale.cpus_per_worker)))
    rank = context.get_world_rank()
    checkpoint = ray.train.get_checkpoint()
    board = config["board"]
    link = loop.Link(
        rank=rank,
        world_size=context.get_world_size(),
        device=get_device(),
        report=_report,
        scratch=Path(config["scratch"]) / f"rank{rank}",
        latest=None if checkpoint is None else _local(checkpoint),
        best=_best,
        tell=(lambda metrics: board.put.remote(metrics)) if rank == 0 else (lambda metrics: None),
    )
    try:
        loop.run(request, scale, link, Path(config["output"]))
    except (ValueError, FloatingPointError) as error:
        # What the settings or the data did, on every rank alike: another try would fail in the same way.
        if rank == 0:
            ray.get(board.put.remote({"failure": error}))


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
    filesystem: Any = checkpoint.filesystem
    return Path(checkpoint.path) if filesystem.type_name == "local" else Path(checkpoint.to_directory())


def _best() -> Path | None:
    """Return the reported checkpoint with the lowest evaluation loss; waits for uploads that are under way."""
    reported = [r for r in ray.train.get_all_reported_checkpoints() if r.checkpoint is not None]
    if not reported:
        return None
    return _local(min(reported, key=lambda r: r.metrics["eval/loss_nats"]).checkpoint)
