"""Folders of an object store: listed and copied, never to a place outside of the local folder.

A key may be called `data/../../x`; whoever writes into a bucket, or answers in a bucket's name, would write where it likes.
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
"""Kinds of stores; pyarrow knows another one that needs a Java machine."""
_RETRY_S = 15


def opened(uri: str) -> tuple[pafs.FileSystem, str]:
    """Open a URI: the filesystem, and the path on it.

    Raises:
        SourceError: its scheme is not one of `SCHEMES`.
        OSError, pyarrow.ArrowInvalid: the store does not answer, or the URI is none.
    """
    scheme, _, rest = uri.partition("://")
    if scheme.lower() not in SCHEMES:
        raise SourceError(f"'{uri}': {scheme}:// is not read here; known: {', '.join(SCHEMES[:5])}")
    if scheme.lower() in ("gs", "gcs") and "retry_limit_seconds" not in rest:
        # Its own limit is a quarter of an hour, in which nothing is said.
        uri += f"{'&' if '?' in rest else '?'}retry_limit_seconds={_RETRY_S}"
    return pafs.FileSystem.from_uri(uri)


def files_below(filesystem: pafs.FileSystem, folder: str) -> list[pafs.FileInfo]:
    """Return the files below a folder, sorted by path; none where there is no such folder.

    Raises:
        SourceError: the name of one leads out of the folder.
        OSError, pyarrow.ArrowInvalid: the store cannot be read.
    """
    listing = filesystem.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True))
    for info in listing:
        if not info.path.startswith(f"{folder.rstrip('/')}/") or escapes(_relative(info, folder)):
            raise SourceError(f"{folder} holds the name {info.path!r:.200}, which leads out of the folder; it is not read")
    return sorted((info for info in listing if info.type == pafs.FileType.File), key=lambda info: info.path)


def copy(filesystem: pafs.FileSystem, folder: str, files: Sequence[pafs.FileInfo], directory: Path) -> None:
    """Copy files that `files_below` returned of a folder into a local directory."""
    for info in files:
        target = directory / _relative(info, folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        with filesystem.open_input_stream(info.path) as stream, target.open("wb") as file:
            shutil.copyfileobj(stream, file, _CHUNK)


def _relative(info: pafs.FileInfo, folder: str) -> str:
    """Return a path below a folder as it is written: `PurePosixPath` keeps `..`."""
    return str(PurePosixPath(info.path[len(folder.rstrip("/")) + 1 :]))
