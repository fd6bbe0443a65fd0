"""Run the training loop on one rank, from the newest whole checkpoint in the work directory to the artifact in its `output`."""

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
    """The place of this process among the workers of a training."""

    rank: int
    world_size: int
    local_rank: int
    """Number of this rank on its node."""
    device: torch.device
    storage: str
    """Path or URI of the stage's work directory, valid on all nodes."""
    attempt: str
    """Twelve random digits that the ranks of this attempt share: the name of the folder that those of a node share."""
    tell: Callable[[dict[str, float]], None]
    """Takes the metrics of every step, on rank 0."""
    say: Callable[[str], None]
    """Takes lines for the user."""


def run(request: Request[ModelRef], scale: ScaleConfig, seat: Seat) -> None:
    """Train to the end and leave the artifact in the folder `output` of the storage.

    Raises:
        ValueError: the settings or the data are wrong, or the checkpoints belong to another number of workers.
        FloatingPointError: a step was bad, or a metric of the evaluation became NaN or infinite.
        FullDisk: there is no room for a checkpoint or the artifact.
    """
    with _scratch(seat) as scratch:
        _run(request, scale, seat, scratch)


def _run(request: Request[ModelRef], scale: ScaleConfig, seat: Seat, scratch: Path) -> None:
    is_remote = "://" in seat.storage
    # On a disk, the artifact is written where it is read; for a bucket it needs the node's own disk first.
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
        # A collective: all ranks are here before any of them loads a model.
        latest=folder.start(),
        best=folder.best,
        # Every rank has the same metrics, summed over all of them.
        tell=seat.tell if seat.rank == 0 else lambda metrics: None,
    )
    # Checkpoints and the artifact: DeepSpeed, torch and safetensors have errors of their own for a full disk.
    full = explained_full_disk("a checkpoint or the trained weights", seat.storage, scratch)
    try:
        here = received(request)
        with full:
            loop.run(here, scale, link, output)
            # The last upload is still under way when the loop returns.
            folder.finish()
        if seat.world_size > 1:
            distributed.barrier()  # nobody needs the scratch of its node any more
        if is_remote and seat.rank == 0:
            _upload(output, seat.storage)
    except WorldSizeError as error:
        raise WorldSizeError(f"{error}: {link.checkpoints}") from error


@contextmanager
def _scratch(seat: Seat) -> Iterator[Path]:
    """Provide a local folder for checkpoints that are being written, one for all ranks of a node; its first rank removes it."""
    if "://" in seat.storage:
        folder = cache_root() / "tmp"
        # Those of workers that were killed on this node: nothing else of steerlab may run here.
        temporary.sweep(folder)
        with temporary.shared(folder / f"train-{seat.attempt}", removes=not seat.local_rank) as path:
            yield path
        return
    # Beside the checkpoints, so that a finished one is renamed and not copied.
    path = Path(seat.storage) / "scratch"
    try:
        yield path
    finally:
        shutil.rmtree(path / f"rank{seat.rank}" if seat.local_rank else path, ignore_errors=True)


def _upload(output: Path, storage: str) -> None:
    filesystem, base = remote.opened(storage)
    pafs.copy_files(str(output), f"{base}/output", source_filesystem=pafs.LocalFileSystem(), destination_filesystem=filesystem)
