"""Connect to a Ray cluster, or start one on this machine that nobody else can reach."""

from __future__ import annotations

import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, chdir, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from steerlab.guards import files, late, private_parts, waiting

if TYPE_CHECKING:
    import ray
else:
    ray = late.module("ray")

_CONNECT_S = 5.0
"""Longest wait for a connection to $RAY_ADDRESS."""
_ANSWER_S = 60.0
"""Longest wait for the first answer of the server there."""
_LONGEST_REASON = 500
"""Characters of Ray's own message that are shown."""
_IDLE_MS = 60_000
"""Milliseconds that an idle worker process of Ray stays alive."""


def check_address() -> None:
    """Refuse a $RAY_ADDRESS where no server listens, or where the server does not answer.

    Raises:
        ValueError: no connection within _CONNECT_S seconds, no answer within _ANSWER_S seconds, or `auto` without a cluster.
    """
    # Without this check, Ray would retry for many minutes before it fails.
    if os.environ.get("RAY_ADDRESS") == "auto" and private_parts.running_cluster() is None:
        raise ValueError(
            "RAY_ADDRESS is auto, but no Ray cluster runs on this machine; start it, or unset RAY_ADDRESS: one is then started "
            "for the command"
        )
    host, _, port = os.environ.get("RAY_ADDRESS", "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return
    try:
        with socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S) as connection:
            _greet(connection, f"{host}:{port}")
    except OSError as error:
        raise ValueError(
            f"no Ray cluster answers at RAY_ADDRESS {host}:{port} ({error}); start it, or unset RAY_ADDRESS: then one is "
            "started for the command"
        ) from None


def _greet(connection: socket.socket, address: str) -> None:
    """Raise TimeoutError if the server at an address sends nothing; `ray.init` would wait for it for minutes."""
    connection.settimeout(_ANSWER_S)
    # This is the start of HTTP/2 (gRPC) with an empty frame of settings. Ray's servers answer with their own settings.
    # A server with TLS expects something else, and answers with an error or closes the connection.
    connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00")
    with waiting.announced(f"the Ray cluster at RAY_ADDRESS {address}"):
        try:
            connection.recv(1)
        except TimeoutError:
            raise TimeoutError(f"it accepts connections but has sent nothing in {_ANSWER_S:.0f} s") from None


def connect() -> str:
    """Join the cluster that $RAY_ADDRESS names, or start one for this process; return a line that says which.

    `RAY_ADDRESS=auto` names the cluster of this machine. A cluster that is started here listens on the loopback address only,
    and only this user can read its files.

    Raises:
        ValueError: nothing answers at $RAY_ADDRESS, Ray cannot be joined or started, or the folder for its sessions belongs to
            another user.
    """
    check_address()
    # Ray ends a worker process one second after its task. That is shorter than the pauses between the stages of a job, so each
    # stage would import torch again.
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", str(_IDLE_MS))
    if ray.is_initialized():
        return f"Ray: this process is in a cluster already: {_size()}"
    # The output of the workers would interrupt the progress bars, so it goes to Ray's log files only.
    join = partial(ray.init, logging_level=logging.ERROR, log_to_driver=False)
    address = os.environ.get("RAY_ADDRESS")
    # With "local", Ray starts a new cluster.
    if address and address != "local":
        with _on_loopback() if _answers_on_loopback_alone() else nullcontext(), _away(), _explained(f"joined at {address}"):
            join()
        place = f" at {ray.get_runtime_context().gcs_address}" if address == "auto" else ""
        return f"Ray: joined the cluster{place} that RAY_ADDRESS names ({address}): {_size()}"
    # A cluster that already runs here is joined only on request: it may be another user's, or busy for days.
    other = None if address else private_parts.running_cluster()
    session = _session_folder()
    with _on_loopback(), _away(), _explained(f"started on this machine (its logs: {session}/session_latest/logs)"):
        join(address="local", _temp_dir=str(session))
    hint = "" if other is None else f"; another cluster runs on this machine, at {other}: RAY_ADDRESS=auto joins it"
    return f"Ray: started a cluster for this command: {_size()}{hint}"


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn Ray's errors while it starts or is joined into one ValueError for the user."""
    try:
        yield
    # Ray raises plain `Exception` where a node does not start in time (ray 2.60, _private/node.py), RuntimeError for another
    # version of Ray or Python on the cluster, and ConnectionError: all of them concern the machine, not this code.
    except Exception as error:
        reason = " ".join(str(error).split())[:_LONGEST_REASON] or type(error).__name__
        raise ValueError(f"Ray cannot be {what}: {reason}") from error


def _size() -> str:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    resources = ray.cluster_resources()
    gpus = f", {resources['GPU']:g} GPUs" if "GPU" in resources else ""
    return f"{len(nodes)} {'node' if len(nodes) == 1 else 'nodes'}, {resources.get('CPU', 0):g} CPUs{gpus}"


def _answers_on_loopback_alone() -> bool:
    """Return whether $RAY_ADDRESS is a cluster of this machine that other machines cannot reach (started by `_on_loopback`)."""
    host, _, port = os.environ.get("RAY_ADDRESS", "").rpartition(":")
    if host not in ("127.0.0.1", "localhost") or not port.isdigit():
        return False
    from ray.util import get_node_ip_address

    try:
        # A cluster of several nodes also listens on the address of the node; `_on_loopback` must not be used for it.
        socket.create_connection((get_node_ip_address(), int(port)), timeout=1).close()
    except OSError:
        return True
    return False


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Make a cluster that is started in this context listen on the loopback address only."""
    # Ray binds to 127.0.0.1 when clusters of several nodes are turned off; else all who reach its ports could run code.
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
    """Change to another folder while Ray starts."""
    # Ray puts the driver's current folder at the front of its workers' sys.path: a `torch.py` in it would be imported.
    return chdir(files.SOURCE_ROOT)


def _session_folder() -> Path:
    """Return a folder for Ray's sessions that only this user can access.

    Raises:
        ValueError: a folder of this name belongs to another user.
    """
    # Ray makes its session folder readable and writable for all users, hence the private folder around it. Its name is known,
    # so another user could have created it first to read what is written there.
    folder = Path(tempfile.gettempdir()) / f"steerlab-ray-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    if folder.is_symlink() or folder.stat().st_uid != os.getuid():
        raise ValueError(f"{folder}, which would hold Ray's sessions, belongs to another user: set TMPDIR to another folder")
    folder.chmod(0o700)
    return folder / "ray"
