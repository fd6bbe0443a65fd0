"""List and copy folders of an object store, never to a place outside the local folder.

A key of a bucket may be `data/../../x`: copied without a check, it would let anyone who writes into the bucket write any local
file.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from urllib.parse import parse_qsl

import pyarrow as pa
import pyarrow.fs as pafs

from steerlab.guards import texts
from steerlab.guards.files import escapes
from steerlab.job.grammar import SourceError

_CHUNK = 1 << 22
_MOST_BESIDE = 100
"""Maximum number of files that are read with one that may name them."""
SCHEMES = ("s3", "gs", "gcs", "abfs", "abfss", "file", "mock")
"""Schemes of the stores that pyarrow opens. Its hdfs:// is not one of them: it needs a Java runtime."""
BY_FSSPEC = {"az": "adlfs", "oss": "ossfs", "oci": "ocifs", "sftp": "paramiko", "memory": "fsspec"}
"""Schemes that fsspec opens -> the package that it needs."""
_SILENCE_S, _ATTEMPTS = 10.0, 3
"""Seconds without a byte after which a request to S3 has failed, and how often it is tried."""
_RETRY_S = 15
"""Seconds in which Google's client repeats a failed request."""


def opened(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the file system of a URI and the path on it.

    Raises:
        SourceError: the scheme is one of neither `SCHEMES` nor `BY_FSSPEC`, or the package for it is not installed.
        OSError, pyarrow.ArrowInvalid: the store does not answer, or the URI is malformed.
    """
    scheme, _, rest = uri.partition("://")
    if scheme.lower() in BY_FSSPEC:
        return _by_fsspec(uri, BY_FSSPEC[scheme.lower()])
    if scheme.lower() not in SCHEMES:
        known = ", ".join((*SCHEMES[:5], *list(BY_FSSPEC)[:4]))
        raise SourceError(f"'{uri}': {scheme}:// is not read here; known: {known}")
    if scheme.lower() in ("gs", "gcs") and "retry_limit_seconds" not in rest:
        # The client's default is 15 minutes, during which the user sees nothing.
        uri += f"{'&' if '?' in rest else '?'}retry_limit_seconds={_RETRY_S}"
    if scheme.lower() == "s3" and "allow_delayed_open" not in rest:
        # With this option a small file needs one request instead of three.
        uri += f"{'&' if '?' in rest else '?'}allow_delayed_open=true"
    filesystem, path = pafs.FileSystem.from_uri(uri)
    return (_impatient(filesystem), path) if isinstance(filesystem, pafs.S3FileSystem) else (filesystem, path)


def _impatient(filesystem: pafs.S3FileSystem) -> pafs.S3FileSystem:
    """Return a file system of S3 that gives up a request after `_SILENCE_S` seconds without a byte, and repeats it."""
    # A URI cannot contain such options (pyarrow 26). By default the client waits 210 s for a server that never answers.
    _, (options, *_) = filesystem.__reduce__()
    retries = pafs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS)
    return pafs.S3FileSystem(**options | {"connect_timeout": 5.0, "request_timeout": _SILENCE_S, "retry_strategy": retries})


def _by_fsspec(uri: str, package: str) -> tuple[pafs.FileSystem, str]:
    import fsspec

    path, _, options = uri.partition("?")
    try:
        # The options of the URI are fsspec's own: az://container/x?account_name=NAME.
        filesystem, base = fsspec.url_to_fs(path, **dict(parse_qsl(options)))
    except ImportError as error:
        raise SourceError(f"'{uri}' needs the package {package}: pip install {package} ({error})") from None
    except (TypeError, ValueError) as error:
        raise SourceError(f"'{uri}' is not a URI that fsspec can open: {error}") from None
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), base


def joined(root: str, *parts: str) -> str:
    """Return the path or URI of something below `root`: the parts follow its path, and come before the options of a URI.

    `joined("s3://bucket/x?region=eu", "runs")` is "s3://bucket/x/runs?region=eu".
    """
    path, options = divided(root)
    return "/".join((path.rstrip("/"), *parts)) + options


def divided(root: str) -> tuple[str, str]:
    """Return a path or URI without its options, and the options with their question mark; empty if it has none."""
    path, mark, options = root.partition("?") if "://" in root else (root, "", "")
    return path, mark + options


def files_below(filesystem: pafs.FileSystem, folder: str) -> list[pafs.FileInfo]:
    """Return the files below a folder, sorted by path; an empty list if the folder does not exist.

    Raises:
        SourceError: a file's name leads outside the folder.
        OSError, pyarrow.ArrowInvalid: the store cannot be read.
    """
    listing = filesystem.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True))
    for info in listing:
        if not info.path.startswith(f"{folder.rstrip('/')}/") or escapes(_relative(info, folder)):
            raise SourceError(f"{folder} holds the name {info.path!r:.200}, which leads outside the folder; it is not read")
    return sorted((info for info in listing if info.type == pafs.FileType.File), key=lambda info: info.path)


def copy(filesystem: pafs.FileSystem, folder: str, files: Sequence[pafs.FileInfo], directory: Path) -> None:
    """Copy the files that `files_below` returned for a folder into a local directory."""
    for info in files:
        target = directory / _relative(info, folder)
        # Object stores have no folders, only keys with slashes.
        target.parent.mkdir(parents=True, exist_ok=True)
        with filesystem.open_input_stream(info.path) as stream, target.open("wb") as file:
            shutil.copyfileobj(stream, file, _CHUNK)


def beside(uri: str, longest: int) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of a file, and of the others of its type in its folder that it may name.

    Raises:
        SourceError: the file does not exist, a file has more than `longest` bytes, or the store does not answer.
    """
    name = PurePosixPath(divided(uri)[0]).name
    try:
        filesystem, path = opened(uri)
        if filesystem.get_file_info(path).type != pafs.FileType.File:
            raise SourceError(f"{texts.without_secrets(uri)}: no such file")
        folder = path.rpartition("/")[0]
        # The file itself comes first, so that the limit on their number does not exclude it.
        listing = sorted(filesystem.get_file_info(pafs.FileSelector(folder)), key=lambda info: info.base_name != name)
        alike = [info for info in listing if info.extension == name.rpartition(".")[2] and info.type == pafs.FileType.File]
        for info in alike[:_MOST_BESIDE]:
            if escapes(_relative(info, folder)):
                continue
            with filesystem.open_input_stream(info.path) as stream:
                # One byte more than allowed is read, because the size in a listing is only what the store reports.
                content = stream.read(longest + 1)
            if len(content) > longest and info.base_name == name:
                raise SourceError(f"{texts.without_secrets(uri)} has more than {longest:,} bytes")
            yield info.base_name, content
    except (OSError, pa.ArrowInvalid) as error:
        raise SourceError(f"{texts.without_secrets(uri)} cannot be read: {error}") from None


def _relative(info: pafs.FileInfo, folder: str) -> str:
    """Return a file's path relative to the folder; PurePosixPath retains `..` in it, so that `escapes` sees it."""
    return str(PurePosixPath(info.path[len(folder.rstrip("/")) + 1 :]))
