"""Write files atomically: a file appears complete or not at all. Also: size and hash of a file."""

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
    """Provide a temporary path to write to; the block's end renames the file to `path`, an error removes it."""
    # Beside `path`, because a rename is atomic on one disk only; hidden and random, so that two writers do not meet.
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")
    try:
        yield scratch
        # Synced before the rename: after a power cut the name must not lead to a file without its bytes.
        with scratch.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


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
