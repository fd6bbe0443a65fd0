"""The cache of downloaded and generated files, shared by processes; hashes of files, and hints about folders for messages."""

import errno
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path


def cache_root() -> Path:
    """Return the folder of downloaded and generated files: $STEERLAB_CACHE or ~/.cache/steerlab."""
    return Path(os.environ.get("STEERLAB_CACHE") or "~/.cache/steerlab").expanduser().absolute()


@contextmanager
def filled_once(target: Path) -> Iterator[Path]:
    """Yield a scratch directory in which the caller makes a subdirectory `content`, which then becomes `target`.

    Two processes may fill the same target at once: the result of the first to finish is used, and that of the other is
    discarded.
    """
    # The scratch directory is beside the target, because a rename is atomic within one file system only.
    scratch = target.parent / f".{target.name[:40]}-{uuid.uuid4().hex[:12]}"
    scratch.mkdir(parents=True)
    try:
        yield scratch
        os.rename(scratch / "content", target)
    except OSError as error:
        # Renaming onto a non-empty folder fails if another process was first; its content is the same.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not target.exists():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@lru_cache(maxsize=4096)
def file_sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Return the SHA-256 of a file, computed once per process for each path, size and modification time."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_sha256(directory: Path) -> str:
    """Return a SHA-256 over the names and contents of all files below a directory, except Python's compiled files."""
    digest = hashlib.sha256()
    # Python writes __pycache__ next to sources that it imports, which must not change the hash.
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(directory).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def nearby(path: Path) -> str:
    """Describe, for a message about a missing `path`, the content of the nearest existing folder above it."""
    parent = next(folder for folder in path.parents if folder.is_dir())
    names = examples(sorted(entry.name for entry in parent.iterdir()))
    return f"{parent.name or parent}/ holds {names or 'nothing'}"


def examples(names: Sequence[str]) -> str:
    """List the first dozen names for a message."""
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
