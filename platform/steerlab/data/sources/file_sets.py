"""Data sets of several files: folders of shards, and patterns."""

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
_WALK_S = 20.0
"""Time in which the folders of a pattern are looked through; `/**` goes through a whole disk."""

_ABOUT = ("dataset_info.json", "state.json", "dataset_dict.json")
"""What `datasets` writes beside shards about them."""


def is_pattern(source: Source) -> bool:
    """Say whether a path is a pattern for files (`*`, `?`, `[...]`) and not the name of one."""
    return source.kind == "path" and glob.has_magic(source.name) and not local_path(source.name).exists()


def matches(source: Source) -> list[Path]:
    """Return the files that a pattern means, in the order of their numbers. Raises SourceError if it means none."""
    pattern = str(local_path(source.name))
    try:
        with limited(f"the pattern '{source.text}'", seconds=_WALK_S):
            found = [path for path in _at_most(map(Path, glob.iglob(pattern, recursive=True)), source.text) if path.is_file()]
    except TooLong as error:
        raise SourceError(f"{error}: name the folder in which the files lie") from None
    if not found:
        raise SourceError(f"'{source.text}' matches no file")
    return sorted(found, key=_order)


def matches_sha256(source: Source) -> str:
    """Hash the content of the files that a pattern means, with their names."""
    digest = hashlib.sha256()
    for path in matches(source):
        digest.update(f"{path.name}\0{content_sha256(path)}\n".encode())
    return digest.hexdigest()


def of_folder(folder: Path) -> list[Path]:
    """Return the shards of the one data set that a folder holds, in the order of their numbers.

    Raises:
        SourceError: it holds none, several, or not all of its shards.
    """
    below = (
        Path(at, name) for at, folders, names in os.walk(folder) for name in (*folders, *names)
    )  # of what may be looked at
    every = _at_most(below, folder)
    inside = (path for path in every if data_suffix(path)[0] in READ and path.is_file() and path.name not in _ABOUT)
    files = sorted((path for path in inside if not _is_hidden(path.relative_to(folder))), key=_order)
    if not files:
        raise SourceError(f"{folder} is a directory that holds no data: no file that ends in {', '.join(READ)}")
    sets = {_set_of(path): path for path in files}
    if len(sets) > 1:
        names = examples([path.relative_to(folder).as_posix() for path in sets.values()])
        raise SourceError(
            f"{folder} is a directory of {len(sets)} data sets: name one file of it ({names}) or those you mean by a pattern, "
            f"{folder.name}/*{''.join(data_suffix(files[0]))}"
        )
    _check_whole(folder, files)
    return files


def _at_most(paths: Iterable[Path], where: Path | str) -> Iterator[Path]:
    """Pass paths on, as long as they are not those of a whole disk."""
    for number, path in enumerate(paths):
        if number == _MOST_PATHS:
            raise SourceError(f"{where} means more than {_MOST_PATHS:,} files and folders: name the data set in it")
        yield path


def _is_hidden(path: Path) -> bool:
    return any(part.startswith((".", "_")) for part in path.parts)


def _set_of(path: Path) -> tuple[Path, str, str]:
    """Return what the shards of one data set have in common: folder, name without numbers, type."""
    match = _SHARD.match(_stem(path))
    return path.parent, match["name"] if match else _stem(path), data_suffix(path)[0]


def _stem(path: Path) -> str:
    return path.name[: len(path.name) - len("".join(data_suffix(path)))]


def _order(path: Path) -> list[tuple[int, str]]:
    """Sort by name, with numbers in it as numbers: part-2 before part-10."""
    return [(int(piece), "") if i % 2 else (0, piece) for i, piece in enumerate(re.split(r"([0-9]+)", str(path)))]


def _check_whole(folder: Path, files: list[Path]) -> None:
    """Refuse a folder that lacks some of the shards that their names count (train-00000-of-00002)."""
    found = [match for path in files if (match := _SHARD.match(_stem(path))) and match["count"]]
    for count, number in Counter(int(match["count"]) for match in found).items():
        if number < count:
            raise SourceError(f"{folder} holds {number} of {count} shards; name them by a pattern to read these alone")
