"""What listens where: clusters that are started here answer on the loopback address alone, and nothing without the token."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.ray
REPOSITORY = Path(__file__).parents[2]
PLACES = """
import json, sys
import psutil

def listening(process):
    for one in [process, *process.children(recursive=True)]:
        try:
            for socket in one.net_connections(kind="tcp"):
                if socket.status == psutil.CONN_LISTEN:
                    yield [socket.laddr.ip.removeprefix("::ffff:"), socket.laddr.port, one.name()]
        except psutil.Error:
            continue
"""
TASK = """
import ray

@ray.remote
def task():
    return 1

assert ray.get(task.remote()) == 1
"""


def without_ray() -> dict[str, str]:
    names = ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER")
    keep = {name: value for name, value in os.environ.items() if name not in names}
    return {**keep, "PYTHONPATH": str(REPOSITORY / "platform")}


def test_a_commands_own_cluster_listens_on_loopback_and_its_files_are_the_users(tmp_path: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="sl-"))  # the names of Ray's sockets must be short
    (tmp_path / "triton_of_a_stranger.py").touch()
    program = f"""{PLACES}
import os
from steerlab.run import connect
os.chdir({str(tmp_path)!r})
connect()
{TASK}
@ray.remote
def found():
    import importlib.util
    return importlib.util.find_spec("triton_of_a_stranger") is not None

there = ray.get(found.remote())
session = ray._private.worker._global_node.get_session_dir_path()
print(json.dumps({{"ports": list(listening(psutil.Process())), "session": session, "found": there, "at": os.getcwd()}}))
"""
    try:
        done = tried(without_ray(), program, TMPDIR=str(folder))
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert len(found["ports"]) > 5
        assert {address for address, _, _ in found["ports"]} <= {"127.0.0.1", "::1"}
        assert found["found"] is False, "workers import nothing from the folder in which the command runs"
        assert found["at"] == str(tmp_path)
        own = Path(found["session"]).parent.parent
        assert own.parent == folder
        assert stat.S_IMODE(own.stat().st_mode) == 0o700
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def cluster() -> Iterator[dict[str, str]]:
    """A cluster of cluster/local.sh, with token authentication; yields what points at it."""
    folder = Path(tempfile.mkdtemp(prefix="sl-"))
    own = {"STEERLAB_CLUSTER_DIR": str(folder / "state"), "STEERLAB_RAY_TMP": str(folder / "ray"), "PYTHON": sys.executable}
    variables = without_ray() | own
    script = ["bash", str(REPOSITORY / "cluster/local.sh")]
    started = subprocess.run([*script, "start", "--num-cpus", "1"], env=variables, capture_output=True, text=True, timeout=150)
    try:
        assert started.returncode == 0, started.stdout + started.stderr
        state = folder / "state"
        addresses = {name: (state / name).read_text().strip() for name in ("address", "dashboard", "pid")}
        yield variables | addresses | {"folder": str(folder)}
    finally:
        subprocess.run([*script, "stop"], env=variables, capture_output=True, text=True, timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def answer(url: str) -> str:
    """What a port says over HTTP to somebody without the token."""
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=5) as reply:
            return f"HTTP {reply.status}, {len(reply.read())} bytes"
    except urllib.error.HTTPError as error:
        return f"HTTP {error.code}"
    except (OSError, ValueError, http.client.HTTPException) as error:
        return f"no HTTP ({type(error).__name__})"


def tried(variables: dict[str, str], program: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", program], env=variables | more, capture_output=True, text=True, timeout=90)


@pytest.mark.slow
def test_nothing_of_the_quickstarts_cluster_is_reached_from_outside_or_without_the_token(cluster: dict[str, str]) -> None:
    """A table of the ports and of what each answers; metrics of a node are numbers about the machine, on loopback."""
    program = f"import ray\nray.init(address='{cluster['address']}', log_to_driver=False, logging_level=50)\n{TASK}"
    alone = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # as `cluster/local.sh env` says
    with_token = tried(cluster, program, RAY_AUTH_MODE="token", **alone)
    assert with_token.returncode == 0, with_token.stderr[-2000:]
    joins = f"from steerlab.run import connect\nconnect()\n{TASK}"
    joined = tried(cluster, joins, RAY_AUTH_MODE="token", RAY_ADDRESS=cluster["address"])
    assert joined.returncode == 0, joined.stderr[-2000:]
    places: Any = {}
    exec(PLACES, places)
    ports = sorted(places["listening"](psutil.Process(int(cluster["pid"]))))
    print()
    for address, port, name in ports:
        said = "; ".join(
            f"{path}: {answer(f'http://127.0.0.1:{port}{path}')}" for path in ("/api/version", "/api/jobs/", "/metrics")
        )
        print(f"{address}:{port} {name}: {said}")
    assert len(ports) > 5
    assert {address for address, _, _ in ports} <= {"127.0.0.1", "::1"}
    for path in ("/api/jobs/", "/api/version", "/nodes", "/logs"):
        assert answer(f"{cluster['dashboard']}{path}") == "HTTP 401", path
    for mode in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "wrong" * 10}):
        assert tried(cluster, program, **alone, **mode).returncode != 0
    client = next(port for _, port, name in ports if 20001 <= port < 21001)
    by_client = program.replace(cluster["address"], f"ray://127.0.0.1:{client}")
    assert tried(cluster, by_client, RAY_AUTH_MODE="token").returncode == 0
    assert tried(cluster, by_client).returncode != 0
    for name in ("state", "ray"):
        assert stat.S_IMODE((Path(cluster["folder"]) / name).stat().st_mode) == 0o700


def test_a_folder_of_somebody_else_is_not_taken(tmp_path: Path) -> None:
    """A link of the name that the sessions' folder has, which anybody could leave in a shared folder."""
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"steerlab-ray-{os.getuid()}").symlink_to(tmp_path / "theirs")
    program = "from steerlab.run import connect; connect()"
    done = tried(without_ray(), program, TMPDIR=str(tmp_path))
    assert done.returncode != 0 and "belongs to another user" in done.stderr
    (tmp_path / "link").symlink_to(tmp_path / "theirs")
    own = {
        "STEERLAB_CLUSTER_DIR": str(tmp_path / "state"),
        "STEERLAB_RAY_TMP": str(tmp_path / "link"),
        "PYTHON": sys.executable,
    }
    script = ["bash", str(REPOSITORY / "cluster/local.sh"), "start"]
    started = subprocess.run(script, env=without_ray() | own, capture_output=True, text=True, timeout=60)
    assert started.returncode != 0 and "belongs to another user" in started.stderr
