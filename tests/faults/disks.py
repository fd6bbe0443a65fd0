"""A small disk of its own, which is filled, emptied and made read-only."""

from __future__ import annotations

import errno
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


class Disk:
    """A disk in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._filler = path / "filler"

    def fill(self, left: int = 0) -> None:
        """Fill the disk up to `left` bytes, rounded down to whole pages."""
        with self._filler.open("ab", buffering=0) as file:
            number = max(0, shutil.disk_usage(self.path).free - left)
            try:
                while number > 0:
                    number -= file.write(b"\0" * min(number, 1 << 20))
            except OSError as error:
                assert error.errno == errno.ENOSPC

    def make_room(self) -> None:
        """Remove what `fill` wrote."""
        self._filler.unlink(missing_ok=True)

    @contextmanager
    def read_only(self) -> Iterator[None]:
        """Refuse every write during the block."""
        self._mount("remount,ro")
        try:
            yield
        finally:
            self._mount("remount,rw")

    def _mount(self, options: str) -> None:
        subprocess.run(["mount", "-o", options, str(self.path)], check=True, capture_output=True)


@contextmanager
def mounted(path: Path, num_bytes: int) -> Iterator[Disk]:
    """Mount a disk of `num_bytes` bytes; skips the test where this user may mount none."""
    path.mkdir()
    try:
        options = ["-t", "tmpfs", "-o", f"size={num_bytes}", "tmpfs", str(path)]
        done = subprocess.run(["mount", *options], capture_output=True, text=True)
    except FileNotFoundError:
        pytest.skip("no `mount` on this machine")
    if done.returncode:
        pytest.skip(f"this user may not mount a disk: {done.stderr.strip()}")
    try:
        yield Disk(path)
    finally:
        # Lazily: a process that is ending may still have a file open.
        subprocess.run(["umount", "--lazy", str(path)], check=True)
