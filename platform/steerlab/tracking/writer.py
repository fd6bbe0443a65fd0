"""The writer: a separate process that sends runs to Weights & Biases, so that a slow server never delays a run.

`python -m steerlab.tracking.writer` reads spool directories from its standard input, one per line, and sends each as one W&B
run with W&B's client. When the input ends, because the driver has finished or died, the writer sends the rest of the spools
and exits after at most GRACE_S seconds. If the server refuses a run or does not answer when it begins, the run is written
offline. If the server is lost later, W&B's client retries; lines that it could not send stay in its files and in the spool.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from steerlab.guards import files
from steerlab.tracking import spool
from steerlab.tracking.run_history import History

if TYPE_CHECKING:
    import wandb

INIT_S = 30.0
"""Longest wait for a server when a run begins."""
FINISH_S = 60.0
"""Longest wait for the upload when a run ends."""
GRACE_S = 90.0
"""Longest time that the writer lives after the driver's end."""
_POLL_S = 0.1


def main() -> None:
    """Serve the spools that standard input names until it ends; with `--detach`, in a forked process."""
    # Ray kills the child processes of a worker that ends, but the trial of a sweep ends before its metrics are sent. After the
    # fork, the parent exits and the writer is no longer a child of the worker.
    if "--detach" in sys.argv and os.fork():
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the driver, but the writer must still send the end of the run
    ended = threading.Event()
    threads = []
    for line in sys.stdin:
        # The threads are daemons, so that one that hangs in a call to the server does not keep the process alive.
        threads.append(threading.Thread(target=_guarded, args=(Path(line.rstrip("\n")), ended.is_set), daemon=True))
        threads[-1].start()
    ended.set()
    deadline_s = time.monotonic() + GRACE_S
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    sys.stdout.flush()
    # With sys.exit, W&B would wait for its own uploads again, without a limit.
    os._exit(0)


def _guarded(directory: Path, ended: Callable[[], bool]) -> None:
    """Send a spool; any error is recorded as the spool's status."""
    try:
        write(directory, ended)
    except BaseException as error:
        traceback.print_exc()
        spool.write_json(directory / spool.STATUS, {"state": "failed", "reason": f"{type(error).__name__}: {error}"})


def write(directory: Path, ended: Callable[[], bool]) -> None:
    """Send one spool as a W&B run, from the first line that the server lacks on; offline if the server refuses the run."""
    import wandb

    settings = spool.settings_of(directory)
    # A resumed run starts a new writer while the old one may still send the same spool.
    with _alone(directory):
        try:
            run = _open(settings, directory)
        except (wandb.Error, OSError) as error:
            if settings.mode == "offline":
                raise
            traceback.print_exc()
            refusal = f"{settings.url or 'the server'} answered: {' '.join(str(error).split())[:300]}"
        else:
            return _send(run, settings, directory, ended)
    _write_offline({**spool.read_settings(directory), "mode": "offline", "reason": refusal}, directory, ended)


def _send(run: wandb.Run, settings: spool.Settings, directory: Path, ended: Callable[[], bool]) -> None:
    """Send the events of a spool to an open run, and close the run."""
    status: spool.Status = {"state": settings.mode, "reason": settings.reason, "files": run.settings.sync_dir}
    spool.write_json(directory / spool.STATUS, status)
    run.finish(exit_code=History(run, directory).send(ended))
    if run.offline:
        _drop_older(run)
    spool.write_json(directory / spool.STATUS, {**status, "done": True})


def _write_offline(settings: Mapping[str, object], directory: Path, ended: Callable[[], bool]) -> None:
    """Write a spool offline, in a separate process."""
    # W&B's client in this process still holds the refused run, and would not open it a second time.
    spool.write_json(directory / spool.SETTINGS, settings)
    # The variable refers to the service process of this process's W&B client, which the new process must not use.
    environment = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "steerlab.tracking.writer"], stdin=subprocess.PIPE, env=environment, cwd=files.OWN_FOLDER
    )
    assert process.stdin is not None
    process.stdin.write(f"{directory}\n".encode())
    process.stdin.flush()
    while process.poll() is None and not ended():
        time.sleep(_POLL_S)
        if spool.read_status(directory).get("done"):
            break
    process.stdin.close()
    process.wait()


@contextmanager
def _alone(directory: Path) -> Iterator[None]:
    """Hold the lock of a spool, so that only one process sends it. The kernel releases the lock when the process dies."""
    with files.locked(directory / "writer.lock"):
        yield


def _open(settings: spool.Settings, directory: Path) -> wandb.Run:
    """Open the W&B run, or continue it if an earlier process has opened it."""
    import wandb

    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        id=settings.id,
        name=settings.name,
        group=settings.group,
        job_type=settings.job_type,
        tags=settings.tags,
        config=settings.config,
        dir=str(directory),
        mode=settings.mode,
        resume="allow",  # continue the run of this id if the server has it
        reinit="create_new",  # each thread of this process has one open run
        settings=wandb.Settings(
            silent=True,
            console="off",  # the output of the writer does not belong to the run
            # `sweep_page.send` puts offline runs on the sweep's page.
            sweep_id=settings.sweep_id if settings.mode == "online" else None,
            init_timeout=INIT_S,
            finish_timeout=FINISH_S,
            x_stats_pid=settings.pid or os.getpid(),
            program=settings.program,
            # Retries are few and short: if the server does not answer, the run becomes an offline run, which can be sent later.
            x_graphql_retry_max=4,
            x_graphql_timeout_seconds=10,
        ),
    )


def _drop_older(run: wandb.Run) -> None:
    """Remove the offline files that earlier processes of this run wrote: the new files contain the whole run."""
    import shutil

    # An offline run cannot be continued, so each process of a run writes the whole run again, into a new folder.
    newest = Path(run.settings.sync_dir)
    for older in newest.parent.glob(f"offline-run-*-{run.id}"):
        if older != newest:
            shutil.rmtree(older, ignore_errors=True)


if __name__ == "__main__":
    main()
