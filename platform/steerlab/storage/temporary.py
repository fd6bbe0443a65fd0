"""Directories that are being filled: removed with their process, or swept after it was killed.

A lock of the kernel beside each directory shows whether its process lives. The age of the files would not show it: the clocks
of two machines on one disk may differ by any amount.
"""

from __future__ import annotations

import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from steerlab.guards import files

INCOMPLETE = "incomplete-"
"""Beginning of the names of artifacts without a manifest that were moved away and are not used."""
_MADE_HERE = re.compile(r"^[a-z_]+-[0-9a-z]{1,12}(-[0-9a-f]{12})?$")
"""Pattern of the names given here: nothing else is swept, since users may use the folder as well."""


@contextmanager
def directory(folder: Path, name: str) -> Iterator[Path]:
    """Provide an empty directory below a folder, named `name` and twelve random digits; it is removed with the block."""
    path = folder / f"{name}-{uuid.uuid4().hex[:12]}"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with _alive(path):
            path.mkdir()
            yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def shared(path: Path, *, removes: bool) -> Iterator[Path]:
    """Provide a directory that several processes of this machine fill; the process that `removes` it has to be the last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock_of(path)
    with ExitStack() as stack:
        # All of them hold a shared lock; `sweep` needs an exclusive one, so it does not remove the directory before the last
        # process has ended.
        stack.callback(os.close, files.shared_lock(lock))
        lock.write_text(files.kernel())
        path.mkdir(exist_ok=True)
        try:
            yield path
        finally:
            if removes:
                shutil.rmtree(path, ignore_errors=True)
                lock.unlink(missing_ok=True)


def sweep(folder: Path, name: str = "", *, of_any_machine: bool = False) -> int:
    """Remove the directories of killed processes; return their number.

    Args:
        folder: The folder that `directory` was called with.
        name: The name whose directories are removed; "" for all.
        of_any_machine: Whether those of other machines are removed too, because the caller knows that they are not in use.
    """
    folders = (path for path in folder.glob(f"{name}-*" if name else "*") if _MADE_HERE.search(path.name))
    return sum(_removed(path, sure=of_any_machine or path.name.startswith(INCOMPLETE)) for path in folders)


@contextmanager
def _alive(path: Path) -> Iterator[None]:
    """Hold the lock beside a directory, by which other processes of this machine see that it is in use."""
    lock = _lock_of(path)
    with ExitStack() as stack:
        try:
            stack.enter_context(files.locked(lock))
            lock.write_text(files.kernel())
        except OSError as error:
            if error.errno not in files.NO_LOCKS:
                raise
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)


def _removed(path: Path, *, sure: bool) -> bool:
    """Remove a directory, unless its process lives or, without `sure`, may live on another machine."""
    lock = _lock_of(path)
    if path.is_symlink() or not path.is_dir():
        return False
    try:
        is_ours = files.read_text(lock) == files.kernel()
    except (FileNotFoundError, files.FileError):
        is_ours = False
    if not is_ours and not sure:
        return False
    with ExitStack() as stack:
        if is_ours:
            try:
                stack.enter_context(files.locked(lock, wait=False))
            except OSError:  # held by a living process
                return False
        shutil.rmtree(path, ignore_errors=True)
        lock.unlink(missing_ok=True)
    return not path.exists()


def _lock_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.lock")
