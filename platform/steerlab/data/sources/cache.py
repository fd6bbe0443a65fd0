"""What is downloaded or made once and kept, however many processes want it, and what a message says of what is there."""

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
    """Return where what is downloaded or made once is kept: $STEERLAB_CACHE or ~/.cache/steerlab."""
    return Path(os.environ.get("STEERLAB_CACHE") or "~/.cache/steerlab").expanduser().absolute()


@contextmanager
def filled_once(target: Path) -> Iterator[Path]:
    """Give a scratch directory beside `target`; its subdirectory 'content' becomes `target`, in one rename.

    Two processes may do so at once: the first to finish wins, the other's work is discarded.
    """
    scratch = target.parent / f".{target.name[:40]}-{uuid.uuid4().hex[:12]}"
    scratch.mkdir(parents=True)
    try:
        yield scratch
        os.rename(scratch / "content", target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not target.exists():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@lru_cache(maxsize=4096)
def file_sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Hash a file once a process; size and time stand in the cache's key so that a changed file is hashed anew."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tree_sha256(directory: Path) -> str:
    """Hash all files below a directory with their names, Python's caches aside."""
    digest = hashlib.sha256()
    for path in sorted(path for path in directory.rglob("*") if path.is_file() and "__pycache__" not in path.parts):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(directory).as_posix()}\0{content}\n".encode())
    return digest.hexdigest()


def nearby(path: Path) -> str:
    """Describe what there is in the nearest existing directory above `path`."""
    parent = next(folder for folder in path.parents if folder.is_dir())
    names = examples(sorted(entry.name for entry in parent.iterdir()))
    return f"{parent.name or parent}/ holds {names or 'nothing'}"


def examples(names: Sequence[str]) -> str:
    """Write some names out, those beyond a dozen as dots."""
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")
