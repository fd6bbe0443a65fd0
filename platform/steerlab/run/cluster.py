"""The Ray cluster that a run uses."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, chdir, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import ray
from ray.util import get_node_ip_address

from steerlab.guards import files, private_parts

_CONNECT_S = 5.0
_IDLE_MS = 60_000


def check_address() -> None:
    """Refuse a $RAY_ADDRESS where nothing listens; Ray itself would try for many minutes.

    Raises:
        ValueError: nothing answers there.
    """
    host, _, port = os.environ.get("RAY_ADDRESS", "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        raise ValueError(
            f"no Ray cluster answers at RAY_ADDRESS {host}:{port} ({error}); start it, or unset RAY_ADDRESS to use a cluster "
            "of this machine or one made for the command"
        ) from None


def connect() -> None:
    """Join the cluster that is there ($RAY_ADDRESS or one started on this machine), else start one for this process.

    Processes of a cluster that is started here stay a while after their task: the next one then pays for no imports. Ray's own
    second is shorter than the pauses between the stages of a job. It listens on the loopback address, and its files are this
    user's alone.

    Raises:
        ValueError: nothing answers at $RAY_ADDRESS, or somebody else made the folder of the sessions.
    """
    check_address()
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", str(_IDLE_MS))
    if ray.is_initialized():
        return
    join = partial(ray.init, logging_level=logging.ERROR, log_to_driver=False)
    if os.environ.get("RAY_ADDRESS") or private_parts.running_cluster() is not None:
        with _on_loopback() if _answers_on_loopback_alone() else nullcontext(), _away():
            join()
        return
    with _on_loopback(), _away():
        join(address="local", _temp_dir=str(_session_folder()))


def _answers_on_loopback_alone() -> bool:
    """Say whether $RAY_ADDRESS is a cluster of this machine that nothing else can reach: one that `_on_loopback` started."""
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdigit():
        return False
    try:
        socket.create_connection((get_node_ip_address(), int(port)), timeout=1).close()
    except OSError:
        return True
    return False


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Let a cluster that is started listen on the loopback address alone."""
    with private_parts.no_clusters_of_several_nodes() as name:
        before = os.environ.get(name)
        os.environ[name] = "0"
        try:
            yield
        finally:
            if before is None:
                del os.environ[name]
            else:
                os.environ[name] = before


def _away() -> AbstractContextManager[None]:
    """Leave the current folder while Ray notes it: its workers would take modules from there before all others."""
    return chdir(files.SOURCE_ROOT)


def _session_folder() -> Path:
    """Return the folder of this user's sessions, which nobody else may enter: Ray's own are open to all.

    Raises:
        ValueError: somebody else made a folder of this name.
    """
    folder = Path(tempfile.gettempdir()) / f"steerlab-ray-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ValueError(f"{folder}, where Ray's sessions would lie, belongs to somebody else: set TMPDIR to a folder of yours")
    folder.chmod(0o700)
    return folder / "ray"  # which Ray opens to all
