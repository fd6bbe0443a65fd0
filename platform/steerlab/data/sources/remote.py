"""List and copy folders of an object store, never to a place outside of the local folder.

A key of a bucket may be `data/../../x`: copied as it is, it would let anyone who writes into the bucket write any local file.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import pyarrow.fs as pafs

from steerlab.guards.files import escapes
from steerlab.job.grammar import SourceError

_CHUNK = 1 << 22
SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "file", "mock")
"""Schemes of the supported stores. pyarrow's hdfs:// is not one of them: it needs a Java runtime."""
_RETRY_S = 15
"""Seconds in which Google's client repeats a failed request."""


def opened(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a URI and the path on it.

    Raises:
        SourceError: the scheme is not one of `SCHEMES`.
        OSError, pyarrow.ArrowInvalid: the store does not answer, or the URI is malformed.
    """
    scheme, _, rest = uri.partition("://")
    if scheme.lower() not in SCHEMES:
        raise SourceError(f"'{uri}': {scheme}:// is not read here; known: {', '.join(SCHEMES[:5])}")
    if scheme.lower() in ("gs", "gcs") and "retry_limit_seconds" not in rest:
        # The client's default is 15 minutes, during which the user sees nothing.
        uri += f"{'&' if '?' in rest else '?'}retry_limit_seconds={_RETRY_S}"
    return pafs.FileSystem.from_uri(uri)


def files_below(filesystem: pafs.FileSystem, folder: str) -> list[pafs.FileInfo]:
    """Return the files below a folder, sorted by path; an empty list if the folder does not exist.

    Raises:
        SourceError: a file's name leads out of the folder.
        OSError, pyarrow.ArrowInvalid: the store cannot be read.
    """
    listing = filesystem.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True))
    for info in listing:
        if not info.path.startswith(f"{folder.rstrip('/')}/") or escapes(_relative(info, folder)):
            raise SourceError(f"{folder} holds the name {info.path!r:.200}, which leads out of the folder; it is not read")
    return sorted((info for info in listing if info.type == pafs.FileType.File), key=lambda info: info.path)


def copy(filesystem: pafs.FileSystem, folder: str, files: Sequence[pafs.FileInfo], directory: Path) -> None:
    """Copy the files that `files_below` returned for a folder into a local directory."""
    for info in files:
        target = directory / _relative(info, folder)
        # Object stores have no folders, only keys with slashes.
        target.parent.mkdir(parents=True, exist_ok=True)
        with filesystem.open_input_stream(info.path) as stream, target.open("wb") as file:
            shutil.copyfileobj(stream, file, _CHUNK)


def _relative(info: pafs.FileInfo, folder: str) -> str:
    """Return a file's path relative to the folder; `..` in it is kept (by PurePosixPath), so that `escapes` sees it."""
    return str(PurePosixPath(info.path[len(folder.rstrip("/")) + 1 :]))
