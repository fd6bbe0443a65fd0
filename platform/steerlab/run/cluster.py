"""The Ray cluster that a run uses."""

from __future__ import annotations

import logging
import os
import socket

import ray

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
    second is shorter than the pauses between the stages of a job.

    Raises:
        ValueError: nothing answers at $RAY_ADDRESS.
    """
    check_address()
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", str(_IDLE_MS))
    ray.init(logging_level=logging.ERROR, log_to_driver=False, ignore_reinit_error=True)
