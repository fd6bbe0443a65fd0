"""The records of a checkpoint's files, one of each rank, and the comparison of the files with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import pyarrow.fs as pafs
from pydantic import FiniteFloat

from steerlab.data.sources import SourceError, remote
from steerlab.guards import saved
from steerlab.storage.whole import is_intact, xxh3

_LONGEST_RECORD = 2**20
"""Bytes of a record at most; it names a handful of files."""
_RECORD = re.compile(r"rank[0-9]+\.json")


class File(saved.Shape):
    """Size and sum of a file when it was written."""

    bytes: int
    xxh3: str


class Best(saved.Shape):
    """The evaluated step with the lowest loss."""

    step: int
    loss: FiniteFloat


class Record(saved.Shape):
    """What a rank has written into a checkpoint."""

    attempt: str
    """Random text that all ranks of one attempt at the training share: their files belong together."""
    world_size: int
    best: Best | None = None
    """The evaluated step with the lowest loss up to this checkpoint; None if none was evaluated."""
    files: dict[saved.Inside, File]


class NotWhole(Exception):
    """A checkpoint is damaged or was never finished; the message says what is wrong with it."""


def record_name(rank: int) -> str:
    """Return the name of a rank's record in the folder of a checkpoint."""
    return f"rank{rank}.json"


def records(fs: pafs.FileSystem, folder: str) -> list[Record]:
    """Return the records of all ranks of a checkpoint. Raises NotWhole if one is missing, damaged or of another attempt."""
    # Rank 0's record says how many ranks wrote this checkpoint.
    first = _record(fs, folder, 0)
    of_ranks = [first, *(_record(fs, folder, rank) for rank in range(1, first.world_size))]
    # A zombie of an earlier attempt may have finished its part of this step after its successor began.
    if {(record.attempt, record.world_size) for record in of_ranks} != {(first.attempt, first.world_size)}:
        raise NotWhole(f"{folder} holds files of two attempts")
    return of_ranks


def _record(fs: pafs.FileSystem, folder: str, rank: int) -> Record:
    path = f"{folder}/{record_name(rank)}"
    info = fs.get_file_info(path)
    if info.type != pafs.FileType.File:
        raise NotWhole(f"{path} is missing, as after a kill")
    # Before it is read: a record may come from a stranger, and be of any size.
    if info.size > _LONGEST_RECORD:
        raise NotWhole(f"{path} has {info.size:,} bytes; such a file has {_LONGEST_RECORD:,} at most")
    with fs.open_input_stream(path) as stream:
        content = stream.read()
    try:
        values = saved.parsed(content, dict[str, object], path)
        record = saved.checked(values, Record, path)
    except saved.SavedError as error:
        raise NotWhole(str(error)) from None
    # By the sum within the record: a truncated or edited JSON may still be valid.
    if not is_intact(values):
        raise NotWhole(f"{path} has another content than when it was written")
    return record


def expected(fs: pafs.FileSystem, folder: str) -> dict[str, File]:
    """Return what the records say of the files of a checkpoint. Raises NotWhole if others are there, or some are not."""
    named = {path: file for record in records(fs, folder) for path, file in record.files.items()}
    try:
        sizes = {info.path.removeprefix(f"{folder}/"): info.size for info in remote.files_below(fs, folder)}
    except SourceError as error:
        raise NotWhole(str(error)) from None
    # DeepSpeed would load a file that somebody has added.
    extra = sorted(path for path in sizes.keys() - named.keys() if not _RECORD.fullmatch(path))
    if extra:
        raise NotWhole(f"{folder}/{extra[0]} is named by no record")
    for path, file in sorted(named.items()):
        if path not in sizes:
            raise NotWhole(f"{folder}/{path} is missing")
        # Sizes first, for all files: a listing costs nothing, a sum reads gigabytes.
        if sizes[path] != file.bytes:
            raise NotWhole(f"{folder}/{path} has {sizes[path]:,} bytes, its record says {file.bytes:,}")
    return named


def compare(directory: Path, named: Mapping[str, File]) -> None:
    """Raise NotWhole if a file of a local directory has another content than its record says."""
    for path, file in sorted(named.items()):
        if xxh3(directory / path) != file.xxh3:
            raise NotWhole(f"{directory / path} has another content than when it was written")
