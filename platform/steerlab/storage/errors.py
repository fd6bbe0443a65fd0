"""Errors of reading and writing below a ROOT, and the message for a disk that is full."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
"""Errors of a full disk and of a user's full quota."""
_IN_WORDS = ("No space left on device", "Disk quota exceeded", "PytorchStreamWriter failed writing", "file write failed")
"""Texts in the errors of libraries that raise their own for it: torch's writer of archives, safetensors in Rust."""


class StoreError(OSError):
    """An artifact or a file below ROOT could not be written or read; the message is one line for users."""


class NotTextError(StoreError):
    """A file that steerlab wrote as text is not UTF-8 any more, so it is damaged."""


class FullDisk(StoreError):
    """A disk is full, so that another attempt would fail as well until somebody makes room."""


def is_of_full_disk(error: BaseException) -> bool:
    """Return whether a full disk caused an error, or an error from which it was raised."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in _FULL_DISK:
            return True
        if any(words in str(seen) for words in _IN_WORDS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


@contextmanager
def explained_full_disk(what: str, where: str, folder: Path, num_bytes: int | None = None) -> Iterator[None]:
    """Turn the error of a full disk into one with the written object, its size and the free space.

    Args:
        what: Object that is written in the block, for the message.
        where: ROOT or folder, for the message.
        folder: A folder on the disk, which may not exist yet.
        num_bytes: Bytes that are written; None if that is not known.

    Raises:
        FullDisk: the disk is full.
    """
    try:
        yield
    except FullDisk:
        raise
    except Exception as error:  # libraries have errors of their own for it
        if not is_of_full_disk(error):
            raise
        free = shutil.disk_usage(existing_parent(folder)).free
        needed = "" if num_bytes is None else f"{num_bytes:,} bytes needed, "
        advice = "make room and run the same command again"
        raise FullDisk(f"no space left for {what} in {where}: {needed}{free:,} bytes free; {advice}") from error


def existing_parent(path: Path) -> Path:
    """Return a path, or the nearest folder above it that exists; `disk_usage` accepts only existing paths."""
    return next(parent for parent in (path, *path.parents) if parent.exists())
