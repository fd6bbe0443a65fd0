"""Write runs and sweeps to one static HTML page, from Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

from steerlab import report as reports
from steerlab.cli.opening import split
from steerlab.interactive.opened_run import Run, read_run
from steerlab.interactive.opened_sweep import Sweep, read_sweep

AnyResult: TypeAlias = Run | Sweep | str | Path


def report(results: Sequence[AnyResult] | AnyResult, path: str | Path = "report.html", *, root: str | None = None) -> Path:
    """Write runs and sweeps to one static HTML page, and return its path.

    Args:
        results: Runs and sweeps, or their names or folders.
        path: The file to write.
        root: ROOT in which names are looked up.

    Raises:
        ValueError: something is neither a finished run nor a sweep.
    """
    listed = [results] if isinstance(results, Run | Sweep | str | Path) else list(results)
    opened = [_opened(one, root) for one in listed]
    entries = [reports.read(one.store, one.below) for one in opened if isinstance(one, Run)]
    reports.write(entries, Path(path), [one.read for one in opened if isinstance(one, Sweep)])
    return Path(path)


def _opened(result: AnyResult, root: str | None) -> Run | Sweep:
    if isinstance(result, Run | Sweep):
        return result
    own_root, below = split(str(result), root, or_sweep=True)
    kind = read_sweep if below.startswith("sweeps/") else read_run
    return kind(f"{root or own_root}/{below}" if root or own_root else str(result), root=root)
