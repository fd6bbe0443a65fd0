"""Manifests: the list of an artifact's files with sizes and hashes, made at its commit and compared when it is read.

The SHA-256 of a file is its identity. The XXH3 sum beside it is compared each time a process reads the artifact for the first
time, and so is the manifest's own sum. Manifests of schema 1 have no XXH3 sums; there the SHA-256 is compared instead.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NotRequired, TypedDict

from steerlab.guards.files import escapes
from steerlab.guards.json_values import Json, JsonObject
from steerlab.storage.records import StoreError
from steerlab.storage.whole import Content, is_intact, json_sum, size_and_sha256, xxh3

MANIFEST = "manifest.json"
SCHEMA = 2
"""Version of the manifest's format."""
_verified: dict[Path, tuple[int, int, int, str]] = {}
"""Files that this process has compared with a manifest: inode, size, time of the last change, and the sum that they had."""


class StoredFile(Content):
    """A file of an artifact: path, size in bytes, SHA-256."""

    path: str
    """Path relative to the artifact, with forward slashes."""
    xxh3: NotRequired[str]
    """XXH3 sum in hexadecimal digits; absent in manifests of schema 1."""


class Manifest(TypedDict):
    """The manifest of an artifact: where it belongs, how it was made, and its files."""

    stage: Json
    """Name of the stage; not checked, like `key` and `schema`, since the path of the artifact contains the same."""
    key: Json
    meta: JsonObject
    """Origin of the artifact: parameters, version and inputs of the stage, and the seconds that it took."""
    files: list[StoredFile]
    schema: Json
    xxh3: NotRequired[str]
    """XXH3 sum of the rest of the manifest; absent in schema 1."""


def listing(directory: Path) -> list[StoredFile]:
    """Return the files of a directory that becomes an artifact, with their sizes and hashes."""
    # The paths are sorted, because the order in which a directory is listed depends on the filesystem.
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)
    return [StoredFile(path=path.relative_to(directory).as_posix(), **size_and_sha256(path), xxh3=xxh3(path)) for path in paths]


def made(stage: str, key: str, meta: JsonObject, files: list[StoredFile]) -> Manifest:
    """Return the manifest of an artifact, with its own sum."""
    manifest = Manifest(stage=stage, key=key, meta=meta, files=files, schema=SCHEMA)
    manifest["xxh3"] = json_sum(manifest)
    return manifest


def parsed(content: bytes, artifact: str) -> Manifest:
    """Return the manifest in a file. Raises StoreError if it is not JSON, and as `check` does."""
    try:
        manifest = json.loads(content)
    except (ValueError, RecursionError):  # RecursionError: thousands of nested brackets
        raise damaged(artifact, MANIFEST, "is not JSON, so it may be truncated") from None
    return check(manifest, artifact)


def check(manifest: Json, artifact: str) -> Manifest:
    """Return a manifest that was read from the store.

    Raises:
        StoreError: it is not a manifest, or names files outside of the artifact.
    """
    # Anyone who may write into ROOT may have written it, and its paths are opened without further checks.
    fields = manifest if isinstance(manifest, dict) else {}
    files, meta = fields.get("files"), fields.get("meta")
    if not isinstance(files, list) or not isinstance(meta, dict):
        raise damaged(artifact, MANIFEST, "names neither files nor meta")
    checked = [_checked_file(file, artifact) for file in files]
    if not is_intact(fields):
        raise damaged(artifact, MANIFEST, "has changed since it was written")
    return Manifest(stage=fields.get("stage"), key=fields.get("key"), meta=meta, files=checked, schema=fields.get("schema"))


def _checked_file(file: Json, artifact: str) -> StoredFile:
    path, size, digest = (file.get(name) for name in ("path", "bytes", "sha256")) if isinstance(file, dict) else (None,) * 3
    if not isinstance(path, str) or not isinstance(size, int) or not isinstance(digest, str):
        raise damaged(artifact, MANIFEST, f"describes a file by {file!r:.100}")
    # A download would write to an absolute path, or to one with "..".
    if escapes(path) or not path:
        raise damaged(artifact, MANIFEST, f"names {path!r:.100}, outside of the artifact")
    checked = StoredFile(path=path, bytes=size, sha256=digest)
    cheap = file.get("xxh3") if isinstance(file, dict) else None
    if isinstance(cheap, str):
        checked["xxh3"] = cheap
    return checked


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Compare the sizes of an artifact's files with its manifest. Raises StoreError if one differs or a file is missing."""
    for file in manifest["files"]:
        path = directory / file["path"]
        if not path.is_file():
            raise damaged(directory, file["path"], "is missing")
        if (size := path.stat().st_size) != file["bytes"]:
            raise damaged(directory, file["path"], f"has {size:,} bytes, its manifest has {file['bytes']:,}")


def verify(directory: Path, manifest: Manifest) -> None:
    """Compare an artifact's files with its manifest, each to its last byte, but only once in this process.

    Raises:
        StoreError: a file is missing, or its size or sum differs.
    """
    check_sizes(directory, manifest)
    for file in manifest["files"]:
        path = directory / file["path"]
        status = path.stat()
        state = (status.st_ino, status.st_size, status.st_mtime_ns, file["sha256"])
        if _verified.get(path) == state:
            continue
        check_sum(directory, path, file)
        _verified[path] = state


def check_sum(artifact: Path | str, path: Path, file: StoredFile) -> None:
    """Compare the content of a local file with the manifest of its artifact. Raises StoreError if they differ."""
    wanted = file.get("xxh3")
    is_whole = size_and_sha256(path)["sha256"] == file["sha256"] if wanted is None else xxh3(path) == wanted
    if not is_whole:
        raise damaged(artifact, file["path"], "has changed since it was written")


def damaged(directory: Path | str, file: str, what: str) -> StoreError:
    """Return the error for a damaged file of an artifact; `what` names the damage."""
    return StoreError(f"artifact {directory} is damaged: {file} {what}; remove the directory and it is made again")
