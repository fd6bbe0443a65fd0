"""The records of a checkpoint's files, one per rank, and the verification of the files."""

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
"""Largest size of a record in bytes; a record lists only a few files."""
_RECORD = re.compile(r"rank[0-9]+\.json")


class File(saved.Shape):
    """Size and checksum of a file when it was written."""

    bytes: int
    xxh3: str


class Best(saved.Shape):
    """The evaluated step with the lowest loss."""

    step: int
    loss: FiniteFloat


class Record(saved.Shape):
    """The files that a rank has written into a checkpoint."""

    attempt: str
    """Random text that all ranks of one attempt share, which marks files that belong together."""
    world_size: int
    best: Best | None = None
    """The evaluated step with the lowest loss up to this checkpoint; None if none was evaluated."""
    files: dict[saved.Inside, File]


class NotWhole(Exception):
    """A checkpoint is damaged or was never finished; the message gives the reason."""


def record_name(rank: int) -> str:
    """Return the name of a rank's record in the folder of a checkpoint."""
    return f"rank{rank}.json"


def records(fs: pafs.FileSystem, folder: str) -> list[Record]:
    """Return the records of all ranks of a checkpoint. Raises NotWhole if one is missing, damaged or of another attempt."""
    # Rank 0's record contains the number of ranks that wrote this checkpoint.
    first = _record(fs, folder, 0)
    of_ranks = [first, *(_record(fs, folder, rank) for rank in range(1, first.world_size))]
    # A process of an earlier attempt may have finished its part of this step after the next attempt began.
    if {(record.attempt, record.world_size) for record in of_ranks} != {(first.attempt, first.world_size)}:
        raise NotWhole(f"{folder} has files of two attempts")
    return of_ranks


def _record(fs: pafs.FileSystem, folder: str, rank: int) -> Record:
    path = f"{folder}/{record_name(rank)}"
    info = fs.get_file_info(path)
    if info.type != pafs.FileType.File:
        raise NotWhole(f"{path} is missing, as after a kill")
    # The size is checked first, since a record may come from a stranger and have any size.
    if info.size > _LONGEST_RECORD:
        raise NotWhole(f"{path} has {info.size:,} bytes; a record has at most {_LONGEST_RECORD:,}")
    with fs.open_input_stream(path) as stream:
        content = stream.read()
    try:
        values = saved.parsed(content, dict[str, object], path)
        record = saved.checked(values, Record, path)
    except saved.SavedError as error:
        raise NotWhole(str(error)) from None
    # The checksum is compared, since truncated or edited JSON may still be valid.
    if not is_intact(values):
        raise NotWhole(f"{path} has changed since it was written")
    return record


def expected(fs: pafs.FileSystem, folder: str) -> dict[str, File]:
    """Return the files in the records of a checkpoint by path. Raises NotWhole if the folder has other files, or lacks some."""
    named = {path: file for record in records(fs, folder) for path, file in record.files.items()}
    try:
        sizes = {info.path.removeprefix(f"{folder}/"): info.size for info in remote.files_below(fs, folder)}
    except SourceError as error:
        raise NotWhole(str(error)) from None
    # DeepSpeed would also load an added file.
    extra = sorted(path for path in sizes.keys() - named.keys() if not _RECORD.fullmatch(path))
    if extra:
        raise NotWhole(f"{folder}/{extra[0]} is not in any record")
    for path, file in sorted(named.items()):
        if path not in sizes:
            raise NotWhole(f"{folder}/{path} is missing")
        # All sizes are compared first: a listing is cheap, while checksums need gigabytes to be read.
        if sizes[path] != file.bytes:
            raise NotWhole(f"{folder}/{path} has {sizes[path]:,} bytes, but its record has {file.bytes:,}")
    return named


def compare(directory: Path, named: Mapping[str, File]) -> None:
    """Raise NotWhole if a file of a local directory does not match its record."""
    for path, file in sorted(named.items()):
        if xxh3(directory / path) != file.xxh3:
            raise NotWhole(f"{directory / path} has changed since it was written")
