"""Files that are there whole or not at all, with their size and hash."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypedDict


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give another name to write to; what was written is synced and renamed to `path` at the end, or removed."""
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        yield scratch
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


class Content(TypedDict):
    """Size and hash of a file, as they stand in rows of JSON."""

    bytes: int
    sha256: str


def size_and_sha256(path: Path) -> Content:
    """Return bytes and sha256 of a file."""
    with path.open("rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
