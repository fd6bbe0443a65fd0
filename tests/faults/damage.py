"""Ways in which a file is damaged, and how often a test does it."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def flip(path: Path, chance: random.Random) -> None:
    """Change one bit of one byte of a file; its size and the time of its last change stay."""
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)
    import os

    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut(path: Path, chance: random.Random) -> None:
    """Cut a file short."""
    content = path.read_bytes()
    path.write_bytes(content[: chance.randrange(len(content))])


def gone(path: Path, chance: random.Random) -> None:
    """Remove a file."""
    path.unlink()


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (flip, cut, gone)


def files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def copied(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    return to


def times(number: int) -> Any:
    """Parametrise a test: number 0 belongs to the default run, all others to `-m faults`."""
    marks = [pytest.param(0)] + [pytest.param(i, marks=pytest.mark.faults) for i in range(1, number + 1)]
    return pytest.mark.parametrize("number", marks)
