"""The writer: a separate process that sends runs to Weights & Biases, so that waiting for a server never slows a run.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from steerlab.guards import files, saved
from steerlab.tracking import spool
from steerlab.tracking.events import Line, StageEnded, step_of

if TYPE_CHECKING:
    import wandb

_E = TypeVar("_E", Line, StageEnded)

INIT_S = 30.0
"""Longest wait for a server when a run begins."""
FINISH_S = 60.0
"""Longest wait for the upload when a run ends."""
GRACE_S = 90.0
"""Longest time that the writer lives after the driver's end."""
_POLL_S = 0.1
_LINES = ("log", "table", "gallery", "images")
"""Kinds of events that become lines of the W&B run's history."""
_RESUMED = "a process of this run was lost before it could say that it ended"


def main() -> None:
    """Serve the spools that standard input names until it ends; with `--detach`, in a forked process."""
    # Ray kills the child processes of a worker that ends, and the trial of a sweep ends before its metrics are sent. After the
    # fork, the parent exits and the writer is no longer a child of the worker.
    if "--detach" in sys.argv and os.fork():
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the driver; the writer still has to send the end of the run
    ended = threading.Event()
    threads = []
    for line in sys.stdin:
        # Daemon threads, so that one that hangs in a call to the server does not keep the process alive.
        threads.append(threading.Thread(target=_guarded, args=(Path(line.rstrip("\n")), ended.is_set), daemon=True))
        threads[-1].start()
    ended.set()
    deadline_s = time.monotonic() + GRACE_S
    for thread in threads:
        thread.join(max(0.0, deadline_s - time.monotonic()))
    sys.stdout.flush()
    # Not sys.exit: W&B would wait for its own uploads again, without a bound.
    os._exit(0)


def _guarded(directory: Path, ended: Callable[[], bool]) -> None:
    """Send a spool; an error of any kind becomes its status."""
    try:
        write(directory, ended)
    except BaseException as error:
        traceback.print_exc()
        spool.write_json(directory / spool.STATUS, {"state": "failed", "reason": f"{type(error).__name__}: {error}"})


def write(directory: Path, ended: Callable[[], bool]) -> None:
    """Send one spool as a W&B run, from the first line that the server lacks; offline if the server refuses the run."""
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
    run.finish(exit_code=_History(run, directory).send(ended))
    if run.offline:
        _drop_older(run)
    spool.write_json(directory / spool.STATUS, {**status, "done": True})


def _write_offline(settings: Mapping[str, object], directory: Path, ended: Callable[[], bool]) -> None:
    """Write a spool offline, in a separate process."""
    # In this process, W&B's client still holds the run that the server refused, and would not open it a second time.
    spool.write_json(directory / spool.SETTINGS, settings)
    # The variable leads to the service process of this process's W&B client, which the new process must not join.
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
        reinit="create_new",  # several runs are open in this process at the same time, one in each thread
        settings=wandb.Settings(
            silent=True,
            console="off",  # the output of the writer is not that of the run
            # Runs that were offline are put on the sweep's page by `sweep_page.send`.
            sweep_id=settings.sweep_id if settings.mode == "online" else None,
            init_timeout=INIT_S,
            finish_timeout=FINISH_S,
            x_stats_pid=settings.pid or os.getpid(),
            program=settings.program,
            # Few and short retries: a server that does not answer makes the run an offline run, which can be sent later.
            x_graphql_retry_max=4,
            x_graphql_timeout_seconds=10,
        ),
    )


class _History:
    """Sends the events of a spool to an open run. Line k of the spool is step k of the run's history."""

    def __init__(self, run: wandb.Run, directory: Path) -> None:
        self.run = run
        self.events, self.folder = directory / spool.EVENTS, directory.parent
        self.online = not run.offline
        self.held = run.starting_step if self.online else 0
        """Number of lines of the history that the server has."""
        self.number = 0
        """Step of the next line on the server."""
        self.seen = 0
        """Number of lines of the spool that were read."""
        self.axes: set[str] = set()
        """Step axes that were defined in the run."""
        self.first = directory / spool.FIRST
        self.lost_after: int | None = None
        """Number of lines of the spool after which lines are missing that the server has; None if none are."""
        earlier = [event["kind"] for event in spool.read(self.events)]
        # Those of earlier processes of the run: in between, the file was lost with its machine, or cut short.
        num_earlier = sum(kind in _LINES for kind in earlier[: _last(earlier, "open")])
        if self.first.exists():
            self.number = saved.read(self.first, spool.First).step
            if self.held > self.number + sum(kind in _LINES for kind in earlier):
                self.lost_after = num_earlier
        elif self.held and not num_earlier:
            # The spool has lines of this process only, yet the server has some.
            self.lost_after = 0

    def send(self, ended: Callable[[], bool]) -> int:
        """Send events until the run ends, and return its exit code; 1 if its process died without a `finish`."""
        for event in spool.follow(self.events, ended):
            if event["kind"] == "log" or event["kind"] == "table" or event["kind"] == "gallery" or event["kind"] == "images":
                self._line(event)
            elif event["kind"] == "stage":
                _keep(event, lambda event: _link(self.run, event, self.online))
            elif event["kind"] == "finish":
                self.run.summary.update(event["summary"])
                self.run.config.update(event.get("config", {}), allow_val_change=True)
                self.run.name = event.get("name", self.run.name)
                return int(event["exit_code"])
        print(_RESUMED, flush=True)
        return 1

    def _line(self, event: Line) -> None:
        if event["kind"] == "log" and event["axis"] not in self.axes:
            self.axes.add(event["axis"])
            # W&B's own step counts all lines of the run; each stage gets an axis that starts at its own first step.
            self.run.define_metric(event["axis"])
            self.run.define_metric(event["axis"].rpartition("/")[0] + "/*", step_metric=event["axis"])
        if self.seen == self.lost_after:
            # The lines of this process continue after those that the server has.
            self.number = self.held
            self.first.unlink(missing_ok=True)
        # Lines before `held` were sent by an earlier process. They are counted, so that line k keeps step k.
        if self.number >= self.held and not self._is_known(event):
            if self.online and not self.first.exists():
                spool.write_json(self.first, {"step": self.number - self.seen})
            _keep(event, self._log)
        self.number += 1
        self.seen += 1

    def _log(self, event: Line) -> None:
        self.run.log({**self._content(event), "_timestamp": event.get("time")}, self.number, commit=True)

    def _content(self, event: Line) -> dict[str, Any]:
        """Return the content of a line in W&B's types. Raises ValueError for an image outside the run's folder."""
        import wandb

        if event["kind"] == "table":
            listed: list[Any] = [*event["rows"]]
            table = wandb.Table(columns=[*event["columns"]], data=listed, allow_mixed_types=True)
            return {event["key"]: table}
        if event["kind"] == "gallery":
            rows: list[Any] = [[*row, self._image(path)] for row, path in zip(event["rows"], event["paths"], strict=True)]
            return {event["key"]: wandb.Table(columns=[*event["columns"], "image"], data=rows, allow_mixed_types=True)}
        if event["kind"] == "images":
            pairs = zip(event["paths"], event["captions"], strict=True)
            return {event["key"]: [self._image(path, caption) for path, caption in pairs]}
        return event["data"]

    def _image(self, path: str, caption: str | None = None) -> wandb.Image:
        import wandb

        # A spool may come from somebody else: its paths must not send other images of this machine to W&B.
        if not Path(path).resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"{path} is no image of the run in {self.folder}")
        files.check(Path(path))
        return wandb.Image(path, caption=caption)

    def _is_known(self, event: Line) -> bool:
        """Say whether the server already has this line from a spool that is lost."""
        if not self.held or event["kind"] != "log" or self.number > self.held:
            return False
        last = self.run.summary.get(event["axis"])
        is_known = last is not None and step_of(event) <= last
        self.number -= is_known  # the caller counts the line, which must not take a step of its own
        return is_known


def _last(kinds: Sequence[str], kind: str) -> int:
    return max((number for number, other in enumerate(kinds) if other == kind), default=0)


def _keep(event: _E, send: Callable[[_E], None]) -> None:
    """Send one event. An event that W&B refuses is left out and named in the log, so that the rest of the run is sent."""
    import wandb

    try:
        send(event)
    except (OSError, ValueError, TypeError, wandb.Error) as error:
        print(f"left out {event['kind']} {event.get('key', '')}: {error}", flush=True)


def _link(run: wandb.Run, event: StageEnded, online: bool) -> None:
    """Record in W&B that the run used or made an artifact. Only a reference to its URI is sent, not its content."""
    import wandb

    def reference(stage: str, key: str, uri: str, **facts: object) -> wandb.Artifact:
        artifact = wandb.Artifact(f"{stage}-{key[:16]}", type=stage, metadata={"key": key, **facts})
        artifact.add_reference(uri, name="artifact", checksum=False)
        return artifact

    facts = {
        "label": event["label"],
        "seconds": event["seconds"],
        "inputs": [f"{name}-{key[:16]}" for name, key, _ in event["inputs"]],
    }
    artifact = reference(event["stage"], event["key"], event["uri"], **facts)
    if event["status"] == "ran":
        run.log_artifact(artifact)
    if not online:
        return  # W&B's client cannot use artifacts offline; the metadata of the artifact names its inputs
    for name, key, uri in event["inputs"] if event["status"] == "ran" else []:
        run.use_artifact(reference(name, key, uri))
    if event["status"] == "cached":
        run.use_artifact(artifact)


def _drop_older(run: wandb.Run) -> None:
    """Remove the offline files that earlier processes of this run wrote: the new files hold the run from its first line."""
    import shutil

    # An offline run cannot be continued, so each process of a run writes all of it again, into a new folder.
    newest = Path(run.settings.sync_dir)
    for older in newest.parent.glob(f"offline-run-*-{run.id}"):
        if older != newest:
            shutil.rmtree(older, ignore_errors=True)


if __name__ == "__main__":
    main()
