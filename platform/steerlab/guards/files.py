"""Read, append to and lock files in folders that other users may write to.

Reading a named pipe blocks until somebody writes, reading a device such as /dev/zero never ends, and a symbolic link may lead
to any file. Files are therefore checked to be regular files of limited size.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path, PurePosixPath
from typing import BinaryIO

SOURCE_ROOT = Path(__file__).parents[2]
"""Folder from which this package is imported, for the PYTHONPATH of processes that it starts."""
OWN_FOLDER = Path(__file__).parent
"""Working folder for processes that talk to a service. Libraries read settings from the current folder (`wandb/settings` names
the server that gets the API key), and the user's may contain files of somebody else; this one holds only the package."""
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems that have no locks."""
_LONGEST = 2**30
"""Default of the largest file that is read into memory, in bytes."""


class FileError(ValueError):
    """A path is not a regular file, or the file is too large; the message is for users."""


def read(path: Path, longest: int = _LONGEST) -> bytes:
    """Return the content of a file.

    Raises:
        FileError: the path is a pipe, a device or a folder, or the file has more than `longest` bytes.
        FileNotFoundError: the file does not exist.
    """
    # The size is checked first, because reading before checking would fill the memory.
    check(path, longest)
    return path.read_bytes()


def read_text(path: Path, longest: int = _LONGEST) -> str:
    """Return the text of a file. Raises FileError if it is not UTF-8, and as `read` does."""
    try:
        return read(path, longest).decode()
    except UnicodeDecodeError as error:
        raise FileError(f"{path} is not UTF-8 text (byte {error.start})") from None


def check(path: Path, longest: int | None = None) -> None:
    """Raise FileError if a path, or the target of a link, is not a regular file of at most `longest` bytes (None: any size).

    Raises:
        FileNotFoundError: the path does not exist.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise FileError(f"{path} is {_kind(status.st_mode)}, not a file")
    if longest is not None and status.st_size > longest:
        raise FileError(f"{path} has {status.st_size:,} bytes; the maximum is {longest:,}")


def check_folder(folder: Path, depth: int = 1) -> None:
    """Raise FileError for the first pipe or device in a folder, before a library opens it.

    Folders are searched down to `depth` levels below. Entries that do not exist or cannot be inspected are skipped.
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
    """Raise FileError for the first symbolic link in a folder, at any depth, or if the folder is one itself.

    Writing and removing below the folder must not reach files elsewhere. Entries that disappear meanwhile are skipped.
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
    """Open a file for appending, unbuffered. Raises FileError if the path is a link, which could lead to any file."""
    return os.fdopen(_opened(path, os.O_WRONLY | os.O_APPEND), "ab", buffering=0)


def write_all(file: BinaryIO, content: bytes) -> None:
    """Write all of `content` to a file from `appending`, which on a full disk writes a part of it without an error."""
    left = memoryview(content)
    while left:
        left = left[file.write(left) :]


def shared_lock(path: Path) -> int:
    """Hold a lock on a file that several processes may share, but which excludes `locked`; closing the result ends it."""
    handle = _opened(path, os.O_RDWR)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            os.close(handle)
            raise
    return handle


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold an exclusive lock on a file during the block; the file is made if it does not exist.

    Raises:
        FileError: the path is a link, which could lead to any file.
        BlockingIOError: another process has the lock, and `wait` is false.
    """
    # flock is used instead of a lock file, because the kernel releases it when the process dies, also by SIGKILL.
    try:
        handle = _opened(path, os.O_RDWR)
    except PermissionError:
        # The file is another user's. To lock it, it need not be written, except on NFS, where the lock fails below.
        handle = _opened(path, os.O_RDONLY, make=False)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(handle)


@cache
def kernel() -> str:
    """Return the id of the running kernel: processes that share it see the same locks."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except FileNotFoundError:  # macOS
        return f"{uuid.getnode():012x}"


def share(folder: Path, like: Path) -> None:
    """Give a folder and everything below it the permissions of a file that was made with the user's umask.

    safetensors 0.8 and `tempfile` make files and folders that only their owner can read, regardless of the umask.
    """
    mode = stat.S_IMODE(like.stat().st_mode)
    for path in (folder, *folder.rglob("*")):
        status = path.lstat()
        wanted = mode | (mode & 0o444) >> 2 if stat.S_ISDIR(status.st_mode) else mode
        if not stat.S_ISLNK(status.st_mode) and wanted & ~status.st_mode:
            # Another user's file cannot be changed; it has been read, so that its permissions suffice.
            with suppress(PermissionError):
                path.chmod(stat.S_IMODE(status.st_mode) | wanted)


def is_locked(path: Path) -> bool:
    """Return whether a process has a lock on a file, also where this user may not write to it; False if it does not exist."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        # The lock is shared, so that two processes that ask at the same time do not take each other for the holder.
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(handle)
    return False


def _opened(path: Path, flags: int, *, make: bool = True) -> int:
    """Open a file and return its descriptor. Raises FileError for a link, a pipe or a device."""
    try:
        # With O_NONBLOCK, opening a pipe for writing does not wait until somebody reads from it.
        handle = os.open(path, flags | (os.O_CREAT if make else 0) | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.ENXIO):
            raise
        what = "a link" if error.errno == errno.ELOOP else "a named pipe"
        raise FileError(f"{path} is {what}, and this file is written to: remove it") from None
    # The mode is that of the open file instead of its path, which may have been replaced since.
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise FileError(f"{path} is {_kind(mode)}, and this file is written to: remove it")
    return handle


def _entries(folder: Path) -> Iterable[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError:
        return ()


def _kind(mode: int) -> str:
    if stat.S_ISDIR(mode):
        return "a folder"
    return "a named pipe" if stat.S_ISFIFO(mode) else "a device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else "a socket"


def escapes(name: str) -> bool:
    """Return whether a relative path, read from a file or an archive, leads outside the folder it belongs to."""
    path = PurePosixPath(name.replace("\\", "/"))  # archives that were made on Windows may use backslashes
    return path.is_absolute() or ".." in path.parts or "\0" in name
