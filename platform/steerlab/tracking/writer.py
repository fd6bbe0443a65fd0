"""The process that talks to Weights & Biases, so that nothing it waits for can stop or slow a run.

`python -m steerlab.tracking.writer` reads directories of spools from its standard input, one a line, and writes each as one
W&B run with the real client. When the input ends, because the driver is done or dead, what is left in the spools is sent and
the process ends, after GRACE_S at the latest. A server that refuses or does not answer when a run begins makes it an offline
run; one that is lost later is retried by W&B's own client, and what it could not send is in its files and in the spool.
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
"""Longest life after the driver's end."""
_POLL_S = 0.1
_LINES = ("log", "table", "images")
"""Kinds of events that are lines of the history."""
_RESUMED = "a process of this run was lost before it could say that it ended"


def main() -> None:
    """Serve the spools named on standard input until it ends; with `--detach`, as nobody's child.

    Ray kills the children of a worker that ends, and a sweep's trials end before all of them is sent.
    """
    if "--detach" in sys.argv and os.fork():
        os._exit(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    ended = threading.Event()
    threads = []
    for line in sys.stdin:
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
    """Write a spool; whatever goes wrong is said in its status."""
    try:
        write(directory, ended)
    except BaseException as error:
        traceback.print_exc()
        spool.write_json(directory / spool.STATUS, {"state": "failed", "reason": f"{type(error).__name__}: {error}"})


def write(directory: Path, ended: Callable[[], bool]) -> None:
    """Write one spool as a W&B run, from the first line that the server lacks."""
    import wandb

    settings = spool.settings_of(directory)
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
    """Send a spool to an open run and close it."""
    status: spool.Status = {"state": settings.mode, "reason": settings.reason, "files": run.settings.sync_dir}
    spool.write_json(directory / spool.STATUS, status)
    run.finish(exit_code=_History(run, directory).send(ended))
    if run.offline:
        _drop_older(run)
    spool.write_json(directory / spool.STATUS, {**status, "done": True})


def _write_offline(settings: Mapping[str, object], directory: Path, ended: Callable[[], bool]) -> None:
    """Write a spool in a process of its own: in this one, W&B's client holds the run that could not begin."""
    spool.write_json(directory / spool.SETTINGS, settings)
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
    """Hold the only right to write a spool; the kernel gives it back when the process dies."""
    with files.locked(directory / "writer.lock"):
        yield


def _open(settings: spool.Settings, directory: Path) -> wandb.Run:
    """Open the run, in the state in which its last process left it."""
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
        resume="allow",
        reinit="create_new",
        settings=wandb.Settings(
            silent=True,
            console="off",
            sweep_id=settings.sweep_id if settings.mode == "online" else None,
            init_timeout=INIT_S,
            finish_timeout=FINISH_S,
            x_stats_pid=settings.pid or os.getpid(),
            program=settings.program,
            x_graphql_retry_max=4,
            x_graphql_timeout_seconds=10,
        ),
    )


class _History:
    """Sends events to an open run; line k of the spool is step k there."""

    def __init__(self, run: wandb.Run, directory: Path) -> None:
        self.run = run
        self.events, self.folder = directory / spool.EVENTS, directory.parent
        self.online = not run.offline
        self.held = run.starting_step if self.online else 0
        """Lines of the history that the server holds."""
        self.number = 0
        self.seen = 0
        """Lines of the spool so far."""
        self.axes: set[str] = set()
        self.first = directory / spool.FIRST
        if self.first.exists():
            self.number = saved.read(self.first, spool.First).step
            return
        earlier = [event["kind"] for event in spool.read(self.events)]
        if self.held and not any(kind in _LINES for kind in earlier[: _last(earlier, "open")]):
            self.number = self.held  # the machine that held the spool's first lines is gone

    def send(self, ended: Callable[[], bool]) -> int:
        """Send events until the run ends; returns its exit code."""
        for event in spool.follow(self.events, ended):
            if event["kind"] == "log" or event["kind"] == "table" or event["kind"] == "images":
                self._line(event)
            elif event["kind"] == "stage":
                _keep(event, lambda event: _link(self.run, event, self.online))
            elif event["kind"] == "finish":
                self.run.summary.update(event["summary"])
                return int(event["exit_code"])
        print(_RESUMED, flush=True)
        return 1

    def _line(self, event: Line) -> None:
        if event["kind"] == "log" and event["axis"] not in self.axes:
            self.axes.add(event["axis"])
            self.run.define_metric(event["axis"])
            self.run.define_metric(event["axis"].rpartition("/")[0] + "/*", step_metric=event["axis"])
        if self.number >= self.held and not self._is_known(event):
            if self.online and not self.first.exists():
                spool.write_json(self.first, {"step": self.number - self.seen})
            _keep(event, self._log)
        self.number += 1
        self.seen += 1

    def _log(self, event: Line) -> None:
        self.run.log({**self._content(event), "_timestamp": event.get("time")}, self.number, commit=True)

    def _content(self, event: Line) -> dict[str, Any]:
        """Return what a line of the history holds, in W&B's own types. Raises ValueError for an image of another folder."""
        import wandb

        if event["kind"] == "table":
            table = wandb.Table(columns=[*event["columns"]], data=[*event["rows"]], allow_mixed_types=True)
            return {event["key"]: table}
        if event["kind"] != "images":
            return event["data"]
        images = []
        for path, caption in zip(event["paths"], event["captions"], strict=True):
            # A stranger's run must not send other images of this machine to a stranger's project.
            if not Path(path).resolve().is_relative_to(self.folder.resolve()):
                raise ValueError(f"{path} is no image of the run in {self.folder}")
            files.check(Path(path))
            images.append(wandb.Image(path, caption=caption))
        return {event["key"]: images}

    def _is_known(self, event: Line) -> bool:
        """Say whether a line of a lost spool is in the server's summary already."""
        if not self.held or event["kind"] != "log" or self.number > self.held:
            return False
        last = self.run.summary.get(event["axis"])
        known = last is not None and step_of(event) <= last
        self.number -= known
        return known


def _last(kinds: Sequence[str], kind: str) -> int:
    return max((number for number, found in enumerate(kinds) if found == kind), default=0)


def _keep(event: _E, send: Callable[[_E], None]) -> None:
    """Send one event; one that W&B cannot take is named in the log and left out."""
    import wandb

    try:
        send(event)
    except (OSError, ValueError, TypeError, wandb.Error) as error:
        print(f"left out {event['kind']} {event.get('key', '')}: {error}", flush=True)


def _link(run: wandb.Run, event: StageEnded, online: bool) -> None:
    """Record that the run used an artifact, or made it from others: references and facts, no bytes."""
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
    made = reference(event["stage"], event["key"], event["uri"], **facts)
    if event["status"] == "ran":
        run.log_artifact(made)
    if not online:
        return  # the client refuses to use artifacts there; what was made names its inputs
    for name, key, uri in event["inputs"] if event["status"] == "ran" else []:
        run.use_artifact(reference(name, key, uri))
    if event["status"] == "cached":
        run.use_artifact(made)


def _drop_older(run: wandb.Run) -> None:
    """Remove offline files of earlier processes of this run: the new ones hold all of it, from the first line."""
    import shutil

    newest = Path(run.settings.sync_dir)
    for older in newest.parent.glob(f"offline-run-*-{run.id}"):
        if older != newest:
            shutil.rmtree(older, ignore_errors=True)


if __name__ == "__main__":
    main()
