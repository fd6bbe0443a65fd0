"""Write files atomically: a file appears complete or not at all. Also: sizes, hashes and sums of files and of JSON."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict

import xxhash


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Provide a temporary path to write to; the block's end renames the file to `path`, an error removes it."""
    # The file is beside `path`, because a rename is atomic on one disk only; its name is hidden and random, so that two writers
    # do not collide.
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        yield scratch
        # The file is synced before the rename: after a power cut the name must not refer to a file without its bytes.
        synced(scratch)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def synced(path: Path) -> None:
    """Wait until a file, or the names in a directory, are on the disk."""
    # A directory can be opened for reading only.
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Content(TypedDict):
    """Size and hash of a file, as manifests and other JSON files hold them."""

    bytes: int
    """Size in bytes."""
    sha256: str
    """SHA-256 in hexadecimal digits."""


def size_and_sha256(path: Path) -> Content:
    """Return the size and the SHA-256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def xxh3(path: Path) -> str:
    """Return the XXH3 sum of a file, 128 bits in hexadecimal digits.

    It shows damage, at about ten times the speed of SHA-256, but not forgery.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()


def json_sum(content: Mapping[str, object]) -> str:
    """Return the XXH3 sum of a JSON object without its key "xxh3", under which the sum itself is written."""
    # The sum is of the values instead of the text, because a file that was only formatted in another way is not damaged.
    rest = {name: value for name, value in content.items() if name != "xxh3"}
    return xxhash.xxh3_128(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def is_intact(content: Mapping[str, object]) -> bool:
    """Return whether a JSON object has the sum with which it was written; an object of schema 1 has no sum."""
    # One changed byte cannot both hide the sum and turn the object into one of schema 1.
    if "xxh3" not in content and content.get("schema") == 1:
        return True
    return content.get("xxh3") == json_sum(content)
