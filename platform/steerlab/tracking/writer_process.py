"""Start the process that sends spools to W&B with the first run, pass each spool to it, and wait for it at the end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import IO

from steerlab.guards import files
from steerlab.tracking import spool
from steerlab.tracking.spool import Spool
from steerlab.tracking.wandb_mode import NO_KEY, OFFLINE_REASONS, has_key

POLL_S = 0.05
_writer: IO[bytes] | None = None
"""Standard input of this process's writer; None before the first run."""
open_spools: list[Spool] = []
"""Spools of this process whose writer may not have finished: see `drain` and `close`."""


def drain(wait_s: float) -> None:
    """Wait at most `wait_s` seconds for the writer of all finished runs, and warn of those that were not sent."""
    deadline_s = time.monotonic() + wait_s
    # All runs share one deadline: if the server is unreachable, a sweep of many runs should not wait for each run.
    for run_spool in open_spools:
        while not is_settled(run_spool) and time.monotonic() < deadline_s:
            time.sleep(POLL_S)
        explain(run_spool)
    open_spools.clear()


def close(wait_s: float) -> None:
    """End this process's writer, and wait at most `wait_s` seconds until it has sent its spools.

    Without this call, the writer ends by itself some time after this process.
    """
    global _writer
    # The writer ends when its standard input does.
    if _writer is not None:
        _writer.close()
    _writer = None
    deadline_s = time.monotonic() + wait_s
    while not all(map(is_settled, open_spools)) and time.monotonic() < deadline_s:
        time.sleep(POLL_S)
    open_spools.clear()


def send(directory: Path) -> spool.Status:
    """Send the run of a spool directory to W&B; lines that the server already has are not sent again.

    Returns:
        The writer's last status.

    Raises:
        ValueError: no API key is set.
    """
    if not has_key():
        raise ValueError(NO_KEY)
    settings = spool.read_settings(directory)
    spool.write_json(directory / spool.SETTINGS, {**settings, "mode": "online", "reason": None})
    # Otherwise, if the writer dies before it writes a status, that of an earlier attempt would be returned.
    (directory / spool.STATUS).unlink(missing_ok=True)
    started(directory).communicate(f"{directory}\n".encode())
    return spool.read_status(directory)


def serve(directory: Path) -> None:
    """Pass a spool to this process's writer, which is started with the first spool and restarted if it has died."""
    global _writer
    line = f"{directory}\n".encode()
    if _writer is not None:
        try:
            _writer.write(line)
            return
        except BrokenPipeError:
            # The writer died, for example because the machine ran out of memory.
            _writer = None
    starter = started(directory, "--detach")
    starter.wait()  # it forks and exits at once; without `wait` it would remain as a zombie process
    assert starter.stdin is not None
    _writer = starter.stdin
    _writer.write(line)


def started(directory: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start a writer process that logs to writer.log in `directory`."""
    # It gets its own session, since Ctrl-C goes to all processes of the terminal's session. -P and `cwd` keep modules of the
    # current folder from being imported.
    paths = [str(files.SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    with files.appending(directory / "writer.log") as log:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "steerlab.tracking.writer", *options],
            stdin=subprocess.PIPE, stdout=log, stderr=log, bufsize=0, start_new_session=True, cwd=files.OWN_FOLDER,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip


def is_settled(run_spool: Spool) -> bool:
    """Return whether the writer has finished a spool or given it up."""
    status = run_spool.status()
    return bool(status.get("done")) or status.get("state") == "failed"


def explain(run_spool: Spool) -> None:
    """Warn if a run was not sent to W&B although its job tracks it."""
    status = run_spool.status()
    reason = status.get("reason")
    again = f"send it again with `steerlab wandb-send {run_spool.directory.parent}`"
    if status.get("state") == "failed":
        warnings.warn(f"W&B: {reason}; {again}", stacklevel=3)
    elif status.get("state") == "offline" and reason not in OFFLINE_REASONS:
        # A missing key caused a warning at the start of the run, and an offline job needs no warning.
        warnings.warn(f"W&B: {reason}; the run is written offline; {again}", stacklevel=3)
    elif not is_settled(run_spool) and run_spool.mode == "online":
        warnings.warn(
            f"W&B has not received all of the run yet; its writer continues for a while. If it fails, {again}", stacklevel=3
        )
