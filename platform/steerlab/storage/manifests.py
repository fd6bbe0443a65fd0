"""Manifests: the list of an artifact's files with sizes and hashes, made at its commit and compared when it is read."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TypedDict

from steerlab.guards.files import escapes
from steerlab.guards.json_values import Json, JsonObject
from steerlab.storage.records import StoreError
from steerlab.storage.whole import Content

MANIFEST = "manifest.json"
SCHEMA = 1
"""Version of the manifest's format."""


class StoredFile(Content):
    """A file of an artifact: path, size in bytes, SHA-256."""

    path: str
    """Path relative to the artifact, with forward slashes."""


class Manifest(TypedDict):
    """The manifest of an artifact: where it belongs, how it was made, and its files."""

    stage: Json
    """Name of the stage; not checked, like `key` and `schema`, since the path of the artifact says the same."""
    key: Json
    meta: JsonObject
    """How the artifact was made: parameters, version and inputs of the stage, and the seconds that it took."""
    files: list[StoredFile]
    schema: Json


def listing(directory: Path) -> list[StoredFile]:
    """Return the files of a directory that becomes an artifact, with their sizes and hashes."""
    # Sorted: the order in which a directory is listed depends on the filesystem.
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)
    return [
        StoredFile(path=path.relative_to(directory).as_posix(), bytes=path.stat().st_size, sha256=sha256(path))
        for path in paths
    ]


def check(manifest: Json, artifact: str) -> Manifest:
    """Return a manifest that was read from the store.

    Raises:
        StoreError: it is no manifest, or names files outside of the artifact.
    """
    # Everybody who may write into ROOT may have written it, and its paths are opened as they are.
    fields = manifest if isinstance(manifest, dict) else {}
    files, meta = fields.get("files"), fields.get("meta")
    if not isinstance(files, list) or not isinstance(meta, dict):
        raise StoreError(f"artifact {artifact} is damaged: its {MANIFEST} names neither files nor meta")
    checked = [_checked_file(file, artifact) for file in files]
    return Manifest(stage=fields.get("stage"), key=fields.get("key"), meta=meta, files=checked, schema=fields.get("schema"))


def _checked_file(file: Json, artifact: str) -> StoredFile:
    path, size, digest = (file.get(name) for name in ("path", "bytes", "sha256")) if isinstance(file, dict) else (None,) * 3
    if not isinstance(path, str) or not isinstance(size, int) or not isinstance(digest, str):
        raise StoreError(f"artifact {artifact} is damaged: its {MANIFEST} describes a file by {file!r:.100}")
    # An absolute path, or one with "..": a download would write there.
    if escapes(path) or not path:
        raise StoreError(f"artifact {artifact} is damaged: its {MANIFEST} names {path!r:.100}, outside of it")
    return StoredFile(path=path, bytes=size, sha256=digest)


def check_sizes(directory: Path, manifest: Manifest) -> None:
    """Compare the sizes of an artifact's files with its manifest. Raises StoreError if one differs or a file is missing."""
    # Sizes and not hashes: this runs each time a stage reads the artifact, and hashing a model takes minutes.
    for file in manifest["files"]:
        path = directory / file["path"]
        if not path.is_file():
            raise damaged(directory, file["path"], "is missing")
        if (size := path.stat().st_size) != file["bytes"]:
            raise damaged(directory, file["path"], f"has {size:,} bytes, its manifest says {file['bytes']:,}")


def damaged(directory: Path | str, file: str, what: str) -> StoreError:
    """Return the error for a damaged file of an artifact; `what` says what is wrong with it."""
    return StoreError(f"artifact {directory} is damaged: {file} {what}; remove the directory and it is made again")


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
