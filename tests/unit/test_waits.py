"""What accepts a connection and never answers, and what asks to be left alone for a while: a line, bounded tries, a message."""

from __future__ import annotations

import http.server
import itertools
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import ray

from steerlab.data.sources import remote
from steerlab.guards import private_parts, waiting
from steerlab.guards.faults import is_for_people
from steerlab.run import cluster
from steerlab.storage import exclusive
from steerlab.storage.store import Store


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts every connection and says nothing."""
    with socket.create_server(("127.0.0.1", 0), backlog=50) as server:
        connections: list[socket.socket] = []

        def accept() -> None:
            try:
                while True:
                    connections.append(server.accept()[0])
            except OSError:  # the test is over
                pass

        threading.Thread(target=accept, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        for connection in connections:
            connection.close()


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "FIRST_S", 0.1)


def test_a_long_wait_is_announced_and_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "NEXT_S", 0.1)
    with pytest.warns(UserWarning, match="^waits for the hub, ") as lines, waiting.announced("the hub"):
        end_s = time.monotonic() + 60
        while len(lines) < 3 and time.monotonic() < end_s:
            time.sleep(0.05)
    assert len(lines) >= 3


def test_a_short_wait_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "FIRST_S", 30)
    before = threading.active_count()
    for _ in range(3):
        with waiting.announced("nothing"):
            pass
    end_s = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < end_s:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_bucket_that_never_answers_ends_the_command(silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_SILENCE_S", 1.0)
    monkeypatch.setattr(remote, "_ATTEMPTS", 1)
    root = f"s3://KEY:SECRET@bucket/x?scheme=http&endpoint_override=127.0.0.1:{silent}&region=us-east-1"
    # Without the limits pyarrow's client takes minutes, which the time of the whole test run would show.
    start_s = time.monotonic()
    with pytest.warns(UserWarning, match=r"^waits for ROOT s3://\*\*\*@bucket/x"), pytest.raises(ValueError, match="cannot be"):
        Store.open(root)
    monkeypatch.setattr(exclusive, "_READ_S", 1)
    with pytest.raises(OSError, match="bucket/x/y cannot be written: Read timeout"):
        exclusive.write_object(root, "bucket/x/y", b"1")
    assert time.monotonic() - start_s < 120


def test_a_ray_address_that_says_nothing_ends_the_command(silent: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "_ANSWER_S", 0.5)
    monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent}")
    expected = rf"no Ray cluster answers at RAY_ADDRESS 127.0.0.1:{silent} \(it accepts connections but has sent nothing in"
    with pytest.warns(UserWarning, match="^waits for the Ray cluster at"), pytest.raises(ValueError, match=expected):
        cluster.check_address()


@pytest.mark.parametrize("address", [None, "127.0.0.1"])
def test_a_ray_that_does_not_start_ends_in_a_message(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Ray raises is a plain Exception, a RuntimeError or a ConnectionError: each becomes one message."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if address is not None:
        monkeypatch.setenv("RAY_ADDRESS", address)
    for reason in (
        Exception("The current node timed out\nduring startup."),
        RuntimeError("Version mismatch"),
        ConnectionError(),
    ):

        def init(reason: Exception = reason, **options: object) -> None:
            raise reason

        monkeypatch.setattr(ray, "init", init)
        monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests of this process may have started one
        with pytest.raises(ValueError) as caught:
            cluster.connect()
        assert is_for_people(caught.value)
        where = "started on this machine (its logs: " if address is None else "joined at 127.0.0.1"
        assert where in str(caught.value)
        assert (" ".join(str(reason).split()) or "ConnectionError") in str(caught.value)


class _Busy(http.server.BaseHTTPRequestHandler):
    """A hub that is busy."""

    asked: list[float] = []

    def do_GET(self) -> None:
        if "revision" in self.path:
            self.asked.append(time.monotonic())
        self.send_response(429)
        self.send_header("Retry-After", "1")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *args: object) -> None:
        """Print nothing."""


# In a process of its own: the hub's client reads its address when it is imported.
HUB = """
import sys, warnings
from steerlab.data import sources
from steerlab.data.sources import hub
from steerlab.guards import private_parts, waiting
from steerlab.guards.faults import is_for_people
hub._SILENCE_S, hub._PAUSE_S, waiting.FIRST_S = 1.0, 0.1, 0.3
warnings.simplefilter("always")
warnings.showwarning = lambda message, *_: print("line:", message)
try:
    sources.fetch("hf:a/b")
except sources.SourceError as error:
    print("error:", error)
"""


def fetched(port: int, folder: Path) -> str:
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join(sys.path), "HF_ENDPOINT": f"http://127.0.0.1:{port}", "HF_HOME": str(folder),
    }  # fmt: skip
    env.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run([sys.executable, "-c", HUB], env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_hub_that_hangs_is_asked_four_times(silent: int, tmp_path: Path) -> None:
    lines = fetched(silent, tmp_path).splitlines()
    assert any(line.startswith(f"line: waits for the hub at http://127.0.0.1:{silent}") for line in lines)
    assert sum("timed out; tried again in 0.1 s" in line for line in lines) == 3
    assert lines[-1].startswith(f"error: 'hf:a/b' cannot be fetched from the hub at http://127.0.0.1:{silent}: ")


def test_a_hub_that_is_busy_is_asked_again_when_it_says(tmp_path: Path) -> None:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Busy)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        lines = fetched(server.server_port, tmp_path).splitlines()
    finally:
        server.shutdown()
        server.server_close()
    assert sum("429 Too Many Requests" in line and "tried again in 1 s" in line for line in lines) == 3
    asked = _Busy.asked
    assert len(asked) == 4 and all(later - earlier >= 1 for earlier, later in itertools.pairwise(asked))
    assert "429 Too Many Requests" in lines[-1] and lines[-1].startswith("error: 'hf:a/b' cannot be fetched")


@pytest.mark.parametrize("listens", [True, False])
def test_a_cluster_that_was_killed_is_no_cluster(listens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's file with the address of the machine's cluster stays behind; a join by `auto` would wait for minutes."""
    from ray._private import services

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        if listens:
            server.listen()
        address = f"127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(services, "find_bootstrap_address", lambda _: address)
        monkeypatch.setenv("RAY_ADDRESS", "auto")
        assert private_parts.running_cluster() == (address if listens else None)
        refused = nullcontext() if listens else pytest.raises(ValueError, match="auto, but no Ray cluster runs on this machine")
        with refused:
            cluster.check_address()
