"""Copies of a bucket's artifacts on the disk of a node: the most recently used ones remain, up to STEERLAB_CACHE_GB."""

from __future__ import annotations

import os
import shutil
from collections import OrderedDict
from pathlib import Path

from steerlab.guards import files

_DEFAULT_GB = 200.0
_MOST_PINS = 256
"""Maximum number of copies that a process protects from removal, its most recently used ones; each needs an open file."""
_pins: OrderedDict[Path, int] = OrderedDict()


def most_bytes() -> int:
    """Return $STEERLAB_CACHE_GB in bytes, 200 GB by default. Raises ValueError if it is not a positive number."""
    text = os.environ.get("STEERLAB_CACHE_GB") or str(_DEFAULT_GB)
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError(f"STEERLAB_CACHE_GB is {text!r:.40}: give the gigabytes that copies of artifacts may take")
    return int(number * 1e9)


def pin(copy: Path) -> None:
    """Protect a copy, which may not exist yet, from removal while this process runs, and record its use."""
    copy.parent.mkdir(parents=True, exist_ok=True)
    lock = _lock_of(copy)
    if copy not in _pins:
        # The lock waits while another process removes the copy.
        _pins[copy] = files.shared_lock(lock)
    _pins.move_to_end(copy)
    os.utime(lock)
    while len(_pins) > _MOST_PINS:
        os.close(_pins.popitem(last=False)[1])


def trim(folder: Path) -> None:
    """Remove the copies below a folder that were used longest ago until the others fit, except those in use."""
    copies = [path for path in folder.glob("*/*/*") if path.is_dir() and not path.is_symlink()]
    sizes = {copy: sum(file.lstat().st_size for file in copy.rglob("*")) for copy in copies}
    total = sum(sizes.values())
    # All times come from this node's clock, or from that of one file server.
    for copy in sorted(copies, key=_used_s):
        if total <= most_bytes():
            return
        try:
            with files.locked(_lock_of(copy), wait=False):
                # The copy is renamed before it is removed, so that a reader sees it whole or not at all.
                going = copy.with_name(f".{copy.name}.going")
                shutil.rmtree(going, ignore_errors=True)
                os.rename(copy, going)
                shutil.rmtree(going, ignore_errors=True)
        except BlockingIOError:  # a process uses it
            continue
        total -= sizes[copy]


def _used_s(copy: Path) -> float:
    try:
        return _lock_of(copy).stat().st_mtime
    except FileNotFoundError:  # made by an earlier version
        return 0.0


def _lock_of(copy: Path) -> Path:
    return copy.with_name(f"{copy.name}.lock")
