"""Directories that are being filled: they go with their process, or are swept after it was killed.

A lock of the kernel beside each directory tells whether its process lives. The age of the files would not: the clocks of two
machines on one disk may differ by any time.
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
"""Beginning of the names of artifacts without a manifest that were moved out of the way, which nobody uses."""
_MADE_HERE = re.compile(r"^[a-z_]+-[0-9a-z]{1,12}(-[0-9a-f]{12})?$")
"""Names that are given here: nothing else is swept, since users may use the folder as well."""


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
    """Provide a directory that several processes of this machine fill; the one that `removes` it has to be the last."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock_of(path)
    with ExitStack() as stack:
        # A lock that all of them hold: `sweep`, which asks for one of its own, leaves the directory until the last has gone.
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
        name: The name, to remove those of this name alone; "" for all.
        of_any_machine: Whether those of other machines are removed too, because the caller knows that nobody uses them.
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
    """Remove a directory, unless its process lives or, where that is not `sure`, may live on another machine."""
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
