"""Run the training loop on one rank, from the newest complete checkpoint to the artifact in `output` of the work directory."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs as pafs
import torch
from torch import distributed

from steerlab.data.sources import cache_root, remote
from steerlab.job import ScaleConfig
from steerlab.storage import temporary
from steerlab.storage.errors import explained_full_disk
from steerlab.storage.plan import ModelRef
from steerlab.training import loop
from steerlab.training.checkpoint_folder import FOLDER, CheckpointFolder
from steerlab.training.engine import WorldSizeError
from steerlab.training.link import Link
from steerlab.training.request import Request, received


@dataclass(frozen=True)
class Seat:
    """Rank and surroundings of this process in a training."""

    rank: int
    world_size: int
    local_rank: int
    """Number of this rank on its node."""
    device: torch.device
    storage: str
    """Path or URI of the stage's work directory, valid on all nodes."""
    attempt: str
    """Twelve random digits that the ranks of this attempt share; they name the scratch folder of each node."""
    tell: Callable[[dict[str, float]], None]
    """Function that takes the metrics of every step; called on rank 0."""
    say: Callable[[str], None]
    """Function that takes a line for the user."""


def run(request: Request[ModelRef], scale: ScaleConfig, seat: Seat) -> None:
    """Train to the end and write the artifact into the folder `output` of the storage.

    Raises:
        ValueError: the settings or the data are wrong, or the checkpoints belong to another number of workers.
        FloatingPointError: a step was bad, or a metric of the evaluation became NaN or infinite.
        FullDisk: there is no room for a checkpoint or the artifact.
    """
    with _scratch(seat) as scratch:
        _run(request, scale, seat, scratch)


def _run(request: Request[ModelRef], scale: ScaleConfig, seat: Seat, scratch: Path) -> None:
    is_remote = "://" in seat.storage
    # On a disk, the artifact is written to its final place; for a bucket, it is first written to the node's disk.
    output = scratch / "output" if is_remote else Path(seat.storage) / "output"
    folder = CheckpointFolder(
        seat.storage,
        scratch,
        rank=seat.rank,
        world_size=seat.world_size,
        device=seat.device,
        needs_best=request.train.keep == "best",
        say=seat.say,
    )
    link = Link(
        rank=seat.rank,
        world_size=seat.world_size,
        device=seat.device,
        report=folder.add,
        scratch=scratch / f"rank{seat.rank}",
        checkpoints=remote.joined(seat.storage, FOLDER),
        # A collective call: all ranks reach it before any of them loads a model.
        latest=folder.start(),
        best=folder.best,
        # Every rank has the same metrics, summed over all of them.
        tell=seat.tell if seat.rank == 0 else lambda metrics: None,
    )
    # DeepSpeed, torch and safetensors report a full disk by different errors, here and for the artifact.
    full = explained_full_disk("a checkpoint or the trained weights", seat.storage, scratch)
    try:
        here = received(request)
        with full:
            loop.run(here, scale, link, output)
            # The last upload may still be running when the loop returns.
            folder.finish()
        if seat.world_size > 1:
            distributed.barrier()  # no rank of a node needs its scratch folder any more
        if is_remote and seat.rank == 0:
            _upload(output, seat.storage)
    except WorldSizeError as error:
        raise WorldSizeError(f"{error}: {link.checkpoints}") from error


@contextmanager
def _scratch(seat: Seat) -> Iterator[Path]:
    """Provide a local folder for checkpoints that are being written, one for all ranks of a node; its first rank removes it."""
    if "://" in seat.storage:
        folder = cache_root() / "tmp"
        # Folders of killed workers are removed here, since perhaps no other process of steerlab runs on this node.
        temporary.sweep(folder)
        with temporary.shared(folder / f"train-{seat.attempt}", removes=not seat.local_rank) as path:
            yield path
        return
    # The folder is beside the checkpoints, so that finished ones are renamed instead of copied.
    path = Path(seat.storage) / "scratch"
    try:
        yield path
    finally:
        shutil.rmtree(path / f"rank{seat.rank}" if seat.local_rank else path, ignore_errors=True)


def _upload(output: Path, storage: str) -> None:
    filesystem, base = remote.opened(storage)
    pafs.copy_files(str(output), f"{base}/output", source_filesystem=pafs.LocalFileSystem(), destination_filesystem=filesystem)
