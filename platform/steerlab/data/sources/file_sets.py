"""Find the files of a data set of several files: a folder of shards, or a pattern such as `train-*.parquet`."""

from __future__ import annotations

import glob
import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

from steerlab.data.sources.cache import examples
from steerlab.data.sources.compressed import data_suffix
from steerlab.data.sources.paths import content_sha256
from steerlab.data.sources.readers import READ
from steerlab.guards.faults import TooLong, limited
from steerlab.job.grammar import Source, SourceError, local_path

_SHARD = re.compile(r"^(?P<name>.*?)[-_.]?(?P<number>[0-9]+)(-of-(?P<count>[0-9]+)(-[0-9a-f]{16})?)?$")

_MOST_PATHS = 100_000
"""Files and folders that a pattern or a folder may hold."""
_WALK_S = 20.0
"""Seconds that matching a pattern may take: `/**` would walk the whole disk."""

_ABOUT = ("dataset_info.json", "state.json", "dataset_dict.json")
"""Files of metadata that `datasets` writes next to its shards."""


def is_pattern(source: Source) -> bool:
    """Return whether a path is a pattern (`*`, `?`, `[...]`). A file of exactly this name takes precedence."""
    return source.kind == "path" and glob.has_magic(source.name) and not local_path(source.name).exists()


def matches(source: Source) -> list[Path]:
    """Return the files that match a pattern, ordered by the numbers in their names. Raises SourceError if no file matches."""
    pattern = str(local_path(source.name))
    try:
        # A walk may also hang in a network file system.
        with limited(f"the pattern '{source.text}'", seconds=_WALK_S):
            paths = _at_most(map(Path, glob.iglob(pattern, recursive=True)), source.text)
            files = [path for path in paths if path.is_file()]
    except TooLong as error:
        raise SourceError(f"{error}: name the folder that contains the files") from None
    if not files:
        raise SourceError(f"'{source.text}' matches no file")
    return sorted(files, key=_order)


def matches_sha256(source: Source) -> str:
    """Return a SHA-256 over the names and contents of the files that match a pattern."""
    digest = hashlib.sha256()
    for path in matches(source):
        digest.update(f"{path.name}\0{content_sha256(path)}\n".encode())
    return digest.hexdigest()


def of_folder(folder: Path) -> list[Path]:
    """Return the shards of the only data set in a folder, ordered by their numbers.

    Raises:
        SourceError: the folder holds no data set, several, or not all shards of one.
    """
    # `os.walk` skips folders that this user may not read.
    below = (Path(at, name) for at, folders, names in os.walk(folder) for name in (*folders, *names))
    every = _at_most(below, folder)
    inside = (path for path in every if data_suffix(path)[0] in READ and path.is_file() and path.name not in _ABOUT)
    files = sorted((path for path in inside if not _is_hidden(path.relative_to(folder))), key=_order)
    if not files:
        raise SourceError(f"{folder} is a directory that holds no data: no file that ends in {', '.join(READ)}")
    sets = {_set_of(path): path for path in files}
    # Reading several data sets as one would mix train with test.
    if len(sets) > 1:
        names = examples([path.relative_to(folder).as_posix() for path in sets.values()])
        raise SourceError(
            f"{folder} is a directory of {len(sets)} data sets: name one file of it ({names}), or several by a pattern, "
            f"{folder.name}/*{''.join(data_suffix(files[0]))}"
        )
    _check_whole(folder, files)
    return files


def _at_most(paths: Iterable[Path], where: Path | str) -> Iterator[Path]:
    """Yield the paths. Raises SourceError after `_MOST_PATHS` of them; `where` is named in the message."""
    for number, path in enumerate(paths):
        if number == _MOST_PATHS:
            raise SourceError(f"{where} matches more than {_MOST_PATHS:,} files and folders: name the data set in it")
        yield path


def _is_hidden(path: Path) -> bool:
    # Examples are .cache of the hub, _SUCCESS of Spark and .ipynb_checkpoints.
    return any(part.startswith((".", "_")) for part in path.parts)


def _set_of(path: Path) -> tuple[Path, str, str]:
    """Return the identity of the data set of a shard: its folder, its name without numbers, its type."""
    match = _SHARD.match(_stem(path))
    return path.parent, match["name"] if match else _stem(path), data_suffix(path)[0]


def _stem(path: Path) -> str:
    return path.name[: len(path.name) - len("".join(data_suffix(path)))]


def _order(path: Path) -> list[tuple[int, str]]:
    """Return a sort key by which the numbers in names count as numbers: part-2 comes before part-10."""
    return [(int(piece), "") if i % 2 else (0, piece) for i, piece in enumerate(re.split(r"([0-9]+)", str(path)))]


def _check_whole(folder: Path, files: list[Path]) -> None:
    """Raise SourceError if shards are missing by the count in their names (train-00000-of-00002)."""
    counted = [match for path in files if (match := _SHARD.match(_stem(path))) and match["count"]]
    for count, number in Counter(int(match["count"]) for match in counted).items():
        if number < count:
            raise SourceError(f"{folder} holds {number} of {count} shards; name them by a pattern to read only these")
