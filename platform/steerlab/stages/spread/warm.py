"""Train with one worker in a process that stays for the next training, for the small trials of a sweep.

A Ray Train run takes about 16 s on 2 cores to start and stop, whatever it trains. Here Ray Train runs in its local mode inside
a process that stays (staying.py), so that imports are paid for once. The loop is that of `launch`, with the same results to the
last bit. A process that dies is replaced, and the loop continues from the newest checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.fs as pafs
import ray
from pydantic import Field, FiniteFloat
from ray.train import RunConfig, ScalingConfig

from steerlab.data.sources import cache_root, remote
from steerlab.guards import files, private_parts, saved
from steerlab.job import ScaleConfig
from steerlab.stages.spread import reserved, staying
from steerlab.storage import temporary
from steerlab.storage.plan import ModelRef, Report
from steerlab.training.request import Request, received

if TYPE_CHECKING:
    import torch

_REPORTED = "report.json"
"""File that is written last into a checkpoint; a folder without it is no checkpoint."""
_LONGEST_REPORT = 2**20
"""Bytes of that file at most; it holds a dozen numbers."""
_NAME = re.compile(r"[0-9]{9,18}")
"""Name of a checkpoint's folder: the number of its step. Other folders are ignored."""


def fit(request: Request[ModelRef], scale: ScaleConfig, *, storage: str, report: Report) -> None:
    """Train in a warm process and write the artifact into the folder `output` of `storage`.

    Args:
        request: What the training computes.
        scale: Size of the single worker. A process that dies is replaced up to `scale.max_failures` times.
        storage: Path or URI that all nodes reach. Checkpoints lie there, and a later call continues from the newest one.
        report: Takes the metrics of each step once.
    """
    assert scale.worker_range == (1, 1), "several workers need a Ray Train run of their own"
    newest = 0.0

    def receive(metrics: dict[str, float]) -> None:
        nonlocal newest
        if metrics["step"] > newest:  # a process that replaces another repeats the steps since its checkpoint
            newest = metrics["step"]
            report(metrics)

    held = {"num_cpus": scale.cpus_per_worker, "num_gpus": int(reserved.uses_gpu(scale))}
    staying.call(_train, (request, scale, storage), scale, held, receive)


def prepare(num_processes: int) -> None:
    """Start importing the training loop in that many processes; returns at once, while they import."""
    # Ray runs the tasks at the same time in processes of their own, if CPUs are free, and keeps the processes.
    for _ in range(num_processes):
        _import.remote()


@ray.remote(num_cpus=1, scheduling_strategy=reserved.ANYWHERE)
def _import() -> None:
    import steerlab.training.loop  # noqa: F401


def _train(tell: Report, request: Request[ModelRef], scale: ScaleConfig, storage: str) -> None:
    """Run the loop under Ray Train's local mode."""
    # Not `TorchTrainer`'s local mode: it destroys the process group at the end, while DeepSpeed keeps a reference to it.
    private_parts.local_trainer()(
        lambda: _loop(request, scale, storage, tell),
        scaling_config=ScalingConfig(num_workers=0),
        run_config=RunConfig(name="warm", storage_path=tempfile.gettempdir()),
    ).fit()


def _loop(request: Request[ModelRef], scale: ScaleConfig, storage: str, tell: Report) -> None:
    """Train from the newest checkpoint below `storage` to the end, and leave the artifact there."""
    import torch
    from torch import distributed

    gpu = bool(ray.get_gpu_ids()) and torch.cuda.is_available()
    if not distributed.is_initialized():
        # Once for each process. A group of one needs no port: a `HashStore` lives in the memory of the process.
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    torch.set_num_threads(max(1, int(scale.cpus_per_worker)))
    try:
        with _scratch(storage) as scratch:
            _run(received(request), scale, storage, tell, scratch, torch.device("cuda" if gpu else "cpu"))
    finally:
        # The process stays, so the disk and the GPU memory in PyTorch's cache must be free for the next training.
        if gpu:
            torch.cuda.empty_cache()


@contextmanager
def _scratch(storage: str) -> Iterator[Path]:
    """Provide a local folder for checkpoints that are being written or read and, for a bucket, the artifact."""
    if "://" in storage:
        folder = cache_root() / "tmp"
        temporary.sweep(folder)
        with temporary.directory(folder, f"train-{uuid.uuid4().hex[:12]}") as path:
            yield path
        return
    # Beside the checkpoints, so that a finished one is renamed and not copied.
    try:
        yield Path(storage) / "scratch"
    finally:
        shutil.rmtree(Path(storage) / "scratch", ignore_errors=True)


def _run(request: Request[Path], scale: ScaleConfig, storage: str, tell: Report, scratch: Path, device: torch.device) -> None:
    """Run the loop, and leave the artifact in the storage."""
    from steerlab.training import loop

    checkpoints, is_remote = _Checkpoints(storage, scratch), "://" in storage
    output = (scratch if is_remote else Path(storage)) / "output"
    link = loop.Link(
        rank=0,
        world_size=1,
        device=device,
        report=checkpoints.add,
        scratch=scratch / "rank0",
        latest=checkpoints.latest(),
        best=checkpoints.best,
        tell=tell,
    )
    loop.run(request, scale, link, output)
    if is_remote:
        filesystem, path = remote.opened(remote.joined(storage, "output"))
        pafs.copy_files(str(output), path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=filesystem)


class _Report(saved.Shape):
    loss: FiniteFloat = Field(alias="eval/loss")


class _Checkpoints:
    """The newest checkpoint of a training and the one with the lowest evaluation loss, below its storage."""

    def __init__(self, storage: str, scratch: Path) -> None:
        self._scratch = scratch
        self._is_local = "://" not in storage
        if self._is_local:
            self._fs, self._base = pafs.LocalFileSystem(), f"{storage}/warm"
        else:
            self._fs, self._base = remote.opened(remote.joined(storage, "warm"))

    def add(self, metrics: dict[str, float], directory: Path | None) -> None:
        """Store the checkpoint in `directory` atomically, and remove those that are neither the newest nor the best."""
        assert directory is not None, "the loop reports checkpoints only"
        # Within the folder and before the rename: folder and report appear in one step.
        (directory / _REPORTED).write_text(json.dumps(metrics))
        name = f"{int(metrics['step']):09d}"
        if self._is_local:
            target = Path(self._base) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            # An earlier process may have stored the same step before it died; a rename onto a full directory fails.
            shutil.rmtree(target, ignore_errors=True)
            os.rename(directory, target)
        else:
            self._upload(directory, f"{self._base}/{name}")
        losses = self._losses()
        # Names have nine digits and more, so that their order as texts is that of the steps.
        for step in losses.keys() - {max(losses), _best(losses)}:
            self._fs.delete_dir(f"{self._base}/{step}")

    def latest(self) -> Path | None:
        """Return a local directory with the newest checkpoint; None if there is no checkpoint."""
        losses = self._losses()
        return self._local(max(losses)) if losses else None

    def best(self) -> Path | None:
        """Return a local directory with the checkpoint of the lowest evaluation loss; None if there is no checkpoint."""
        losses = self._losses()
        return self._local(_best(losses)) if losses else None

    def _losses(self) -> dict[str, float]:
        """Return the evaluation loss of every complete checkpoint by its name.

        Raises:
            ValueError: the report of a checkpoint is damaged.
        """
        losses = {}
        for info in self._fs.get_file_info(pafs.FileSelector(self._base, allow_not_found=True)):
            marker = f"{self._base}/{info.base_name}/{_REPORTED}"
            report = self._fs.get_file_info(marker)
            if not _NAME.fullmatch(info.base_name) or report.type != pafs.FileType.File:
                continue
            if report.size > _LONGEST_REPORT:
                raise files.FileError(f"{marker} has {report.size:,} bytes; such a file has {_LONGEST_REPORT:,} at most")
            with self._fs.open_input_stream(marker) as stream:
                losses[info.base_name] = saved.parsed(stream.read(), _Report, marker).loss
        return losses

    def _upload(self, directory: Path, target: str) -> None:
        """Copy a checkpoint to an object store, its report last: without it an upload that was cut short is no checkpoint."""
        marker = (directory / _REPORTED).read_bytes()
        (directory / _REPORTED).unlink()
        pafs.copy_files(str(directory), target, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=self._fs)
        with self._fs.open_output_stream(f"{target}/{_REPORTED}") as stream:
            stream.write(marker)
        shutil.rmtree(directory)

    def _local(self, name: str) -> Path:
        if self._is_local:
            return Path(self._base) / name
        # DeepSpeed reads files by path, so that a checkpoint in a bucket has to be downloaded whole.
        copy = self._scratch / f"read-{uuid.uuid4().hex}"
        folder = f"{self._base}/{name}"
        remote.copy(self._fs, folder, remote.files_below(self._fs, folder), copy)
        return copy


def _best(losses: dict[str, float]) -> str:
    """Return the checkpoint with the lowest evaluation loss; of equal ones the earliest."""
    return min(losses, key=lambda step: (losses[step], step))
