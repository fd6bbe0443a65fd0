"""Files that somebody else may have left: read only where they are files, and only as large as they may be.

A named pipe never ends a read, a device never ends at all, and a link leads wherever its maker liked.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import BinaryIO

SOURCE_ROOT = Path(__file__).parents[2]
"""Where this package is imported from: processes that are started here import it from there too."""
OWN_FOLDER = Path(__file__).parent
"""A folder with nothing of anybody else in it. Libraries take settings from the folder in which they start (`wandb/settings`
names the server that gets the key), which may be a stranger's: processes that talk to a service start here."""
_LONGEST = 2**30
"""Bytes of a file that is read whole."""


class FileError(ValueError):
    """A file is not one, or too large; the message is for people."""


def read(path: Path, longest: int = _LONGEST) -> bytes:
    """Read a file whole.

    Raises:
        FileError: it is a pipe, a device or a folder, or has more than `longest` bytes.
        FileNotFoundError: there is none.
    """
    check(path, longest)
    return path.read_bytes()


def read_text(path: Path, longest: int = _LONGEST) -> str:
    """Read a file of UTF-8 whole. Raises FileError where it is none, and as `read` does."""
    try:
        return read(path, longest).decode()
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is no UTF-8 text (byte {error.start})") from None


def check(path: Path, longest: int | None = None) -> None:
    """Refuse what is no file, wherever a link leads. Raises FileError, FileNotFoundError."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"{path} is {_kind(found.st_mode)}, not a file")
    if longest is not None and found.st_size > longest:
        raise FileError(f"{path} has {found.st_size:,} bytes; such a file has {longest:,} at most")


def check_folder(folder: Path, depth: int = 1) -> None:
    """Refuse a folder with pipes or devices among its files, down to a depth: libraries open what they expect there.

    Raises:
        FileError: with the first one. What does not exist, or cannot be looked at, is no matter here.
    """
    for entry in _entries(folder):
        try:
            mode = Path(entry.path).stat().st_mode
        except OSError:
            continue
        if stat.S_ISDIR(mode) and depth > 0:
            check_folder(Path(entry.path), depth - 1)
        elif not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise FileError(f"{entry.path} is {_kind(mode)}, not a file")


def check_links(folder: Path) -> None:
    """Refuse links in a folder, at any depth, and a folder that is one: what is written and removed there lies there.

    Raises:
        FileError: with the first one. What does not exist, or goes away meanwhile, is no matter here.
    """
    if folder.is_symlink():
        raise FileError(f"{folder} is a link, and files are written and removed below it: remove it")
    left = [folder]
    while left:
        for entry in _entries(left.pop()):
            if entry.is_symlink():
                raise FileError(f"{entry.path} is a link, which could lead anywhere: remove it")
            if entry.is_dir(follow_symlinks=False):
                left.append(Path(entry.path))


def appending(path: Path) -> BinaryIO:
    """Open a file to append to, unbuffered. Raises FileError where the path is a link, which could lead to any file."""
    return os.fdopen(_opened(path, os.O_WRONLY | os.O_APPEND), "ab", buffering=0)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold the only right to something; the kernel gives it back when the process dies, however it does.

    Raises:
        FileError: the path is a link, which could lead to any file.
        BlockingIOError: somebody else holds it, and nobody waits.
    """
    handle = _opened(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


def _opened(path: Path, flags: int) -> int:
    try:
        # Without a wait: nobody may ever read from a pipe.
        handle = os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        what = "a link" if error.errno == errno.ELOOP else "a named pipe"
        raise FileError(f"{path} is {what}, and this file is written to: remove it") from None
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise FileError(f"{path} is {_kind(mode)}, and this file is written to: remove it")
    return handle


def _entries(folder: Path) -> Iterable[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return ()


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a named pipe" if stat.S_ISFIFO(mode) else "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "a socket"


def escapes(name: str) -> bool:
    """Say whether a path in a file, relative to the folder or archive that it belongs to, leads out of it."""
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts or "\0" in name
