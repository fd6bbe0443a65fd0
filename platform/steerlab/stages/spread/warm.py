"""Train one worker in a process that stays for the next training: what a sweep of small trials needs.

A Ray Train run of its own takes about 16 s on 2 cores to start and stop, whatever it trains. Here Ray Train runs in its local
mode inside a process that stays (staying.py): the imports are paid once a process. The loop and its bits are those of `launch`;
a process that dies is replaced, and the loop goes on from the newest checkpoint.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import uuid
from pathlib import Path

import pyarrow.fs as pafs
import ray
from pydantic import Field, FiniteFloat
from ray.train import RunConfig, ScalingConfig

from steerlab.data.sources import remote
from steerlab.guards import files, private_parts, saved
from steerlab.job import ScaleConfig
from steerlab.stages.spread import reserved, staying
from steerlab.storage.plan import ModelRef, Report
from steerlab.training.request import Request, received

_REPORTED = "report.json"
"""Written last into a checkpoint: one without it does not count."""
_LONGEST_REPORT = 2**20
_NAME = re.compile(r"[0-9]{9,18}")
"""The folder of a checkpoint: the number of its step. Others do not count."""


def fit(request: Request[ModelRef], scale: ScaleConfig, *, storage: str, report: Report) -> None:
    """Train in a warm process and leave the artifact in the folder `output` of `storage`, a path or URI that all nodes reach.

    A process that dies is replaced up to `scale.max_failures` times; `report` sees each step once.
    """
    assert scale.worker_range == (1, 1), "several workers need a Ray Train run of their own"
    newest = 0

    def told(metrics: dict[str, float]) -> None:
        nonlocal newest
        if metrics["step"] > newest:  # a process that replaces another repeats the steps since its checkpoint
            newest = metrics["step"]
            report(metrics)

    held = {"num_cpus": scale.cpus_per_worker, "num_gpus": int(reserved.uses_gpu(scale))}
    staying.call(_train, (request, scale, storage), scale, held, told)


def prepare(num_processes: int) -> None:
    """Let processes that will train import what that needs, while the caller does something else; returns at once."""
    for _ in range(num_processes):
        _import.remote()


@ray.remote(num_cpus=1, scheduling_strategy=reserved.ANYWHERE)
def _import() -> None:
    import steerlab.training.loop  # noqa: F401


def _train(tell: Report, request: Request[ModelRef], scale: ScaleConfig, storage: str) -> None:
    """Run the loop under Ray Train's local mode; TorchTrainer's would take down the process group, which DeepSpeed keeps."""
    private_parts.local_trainer()(
        lambda: _loop(request, scale, storage, tell),
        scaling_config=ScalingConfig(num_workers=0),
        run_config=RunConfig(name="warm", storage_path=tempfile.gettempdir()),
    ).fit()


def _loop(request: Request[ModelRef], scale: ScaleConfig, storage: str, tell: Report) -> None:
    import torch
    from torch import distributed

    from steerlab.training import loop

    gpu = bool(ray.get_gpu_ids()) and torch.cuda.is_available()
    if not distributed.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    torch.set_num_threads(max(1, int(scale.cpus_per_worker)))
    kept = _Checkpoints(storage)
    is_remote = "://" in storage
    scratch = Path(f"{tempfile.gettempdir()}/steerlab-{uuid.uuid4().hex}" if is_remote else f"{storage}/scratch")
    output = scratch / "output" if is_remote else Path(storage) / "output"
    link = loop.Link(
        rank=0,
        world_size=1,
        device=torch.device("cuda" if gpu else "cpu"),
        report=kept.add,
        scratch=scratch / "rank0",
        latest=kept.latest(),
        best=kept.best,
        tell=tell,
    )
    try:
        loop.run(received(request), scale, link, output)
        if is_remote:
            filesystem, path = remote.opened(f"{storage}/output")
            pafs.copy_files(str(output), path, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=filesystem)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if gpu:
            torch.cuda.empty_cache()


class _Report(saved.Shape):
    loss: FiniteFloat = Field(alias="eval/loss")


class _Checkpoints:
    """The newest checkpoint of a training and the one with the lowest evaluation loss, below its storage."""

    def __init__(self, storage: str) -> None:
        self._is_local = "://" not in storage
        if self._is_local:
            self._fs, self._base = pafs.LocalFileSystem(), f"{storage}/warm"
        else:
            self._fs, self._base = remote.opened(f"{storage}/warm")

    def add(self, metrics: dict[str, float], directory: Path | None) -> None:
        """Keep the checkpoint in `directory`, whole or not at all, and let go of those that are neither newest nor best."""
        assert directory is not None, "the loop reports checkpoints only"
        (directory / _REPORTED).write_text(json.dumps(metrics))
        name = f"{int(metrics['step']):09d}"
        if self._is_local:
            target = Path(self._base) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.rmtree(target, ignore_errors=True)
            os.rename(directory, target)
        else:
            self._upload(directory, f"{self._base}/{name}")
        found = self._found()
        keep = {max(found), min(found, key=lambda step: (found[step], step))}
        for step in found.keys() - keep:
            self._fs.delete_dir(f"{self._base}/{step}")

    def latest(self) -> Path | None:
        """Return the newest checkpoint as a local directory."""
        found = self._found()
        return self._local(max(found)) if found else None

    def best(self) -> Path | None:
        """Return the checkpoint with the lowest evaluation loss as a local directory."""
        found = self._found()
        return self._local(min(found, key=lambda step: (found[step], step))) if found else None

    def _found(self) -> dict[str, float]:
        """Return the evaluation loss of every whole checkpoint by its name.

        Raises:
            ValueError: what was reported of one is damaged, or no number.
        """
        found = {}
        for info in self._fs.get_file_info(pafs.FileSelector(self._base, allow_not_found=True)):
            marker = f"{self._base}/{info.base_name}/{_REPORTED}"
            report = self._fs.get_file_info(marker)
            if not _NAME.fullmatch(info.base_name) or report.type != pafs.FileType.File:
                continue
            if report.size > _LONGEST_REPORT:
                raise files.FileError(f"{marker} has {report.size:,} bytes; such a file has {_LONGEST_REPORT:,} at most")
            with self._fs.open_input_stream(marker) as stream:
                found[info.base_name] = saved.parsed(stream.read(), _Report, marker).loss
        return found

    def _upload(self, directory: Path, target: str) -> None:
        """Copy a checkpoint to an object store, the file that makes it count last."""
        marker = (directory / _REPORTED).read_bytes()
        (directory / _REPORTED).unlink()
        pafs.copy_files(str(directory), target, source_filesystem=pafs.LocalFileSystem(), destination_filesystem=self._fs)
        with self._fs.open_output_stream(f"{target}/{_REPORTED}") as stream:
            stream.write(marker)
        shutil.rmtree(directory)

    def _local(self, name: str) -> Path:
        if self._is_local:
            return Path(self._base) / name
        copy = Path(tempfile.mkdtemp(prefix="steerlab-"))
        folder = f"{self._base}/{name}"
        remote.copy(self._fs, folder, remote.files_below(self._fs, folder), copy)
        return copy
