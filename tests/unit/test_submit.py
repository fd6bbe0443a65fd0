"""Sending jobs: the entry point, what is uploaded, the runtime environment, refusals. No cluster is started here."""

import asyncio
import io
import json
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from threading import Thread
from types import SimpleNamespace
from typing import Any
from zipfile import ZipFile

import pytest

from steerlab import job
from steerlab.run.submit import _exit_code, _follow, entrypoint, submit
from steerlab.run.upload import SubmitError, check_upload, left_behind, runtime_env, upload_sizes
from steerlab.stages import JobType, Plan


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working directory with a job, a search space and things that are not for the cluster."""
    for name in ("jobs/a b.yaml", "spaces/s.py", "keep/data.bin", "skip/data.bin", "keep/deep/out.tmp", "x.gguf", ".git/big"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"0" * 1000)
    (tmp_path / ".gitignore").write_text("skip/\n")
    (tmp_path / ".rayignore").write_text("*.gguf\n")
    (tmp_path / "keep" / ".gitignore").write_text("*.tmp\n")
    return tmp_path


def test_entrypoint_of_a_job(folder: Path) -> None:
    command = entrypoint(
        folder / "jobs" / "a b.yaml", root="s3://b/r", overrides=("train.lr=1e-5", "name=x y"), working_dir=folder
    )
    expected = "python -P -m steerlab run 'jobs/a b.yaml' --root s3://b/r --set train.lr=1e-5 --set 'name=x y'"
    assert command == expected
    assert shlex.split(command)[-1] == "name=x y"


def test_entrypoint_of_a_sweep(folder: Path) -> None:
    command = entrypoint(folder / "jobs" / "a b.yaml", root="/r", space=folder / "spaces" / "s.py", working_dir=folder)
    assert command == "python -P -m steerlab sweep 'jobs/a b.yaml' spaces/s.py --root /r"
    again = entrypoint(
        folder / "jobs" / "a b.yaml",
        root="/r",
        space=folder / "spaces" / "s.py",
        overrides=("train.lr=1",),
        options=("--seeds", "2", "--resume"),
        working_dir=folder,
    )
    assert again == f"{command} --seeds 2 --resume --set train.lr=1"


def test_options_of_a_sweep_need_a_space(folder: Path) -> None:
    with pytest.raises(SubmitError, match="--resume: these options are for a sweep; name its search space with --space"):
        entrypoint(folder / "jobs" / "a b.yaml", root="/r", options=("--resume",), working_dir=folder)


@pytest.mark.parametrize("root", ["out", "./out", "~/out", ""])
def test_relative_root_is_refused(folder: Path, root: str) -> None:
    with pytest.raises(SubmitError, match=r"is relative: on the cluster it would be deleted"):
        submit(folder / "jobs" / "a b.yaml", address="http://127.0.0.1:9", root=root, working_dir=folder)


def test_job_that_is_not_uploaded_is_refused(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    outside = tmp_path_factory.mktemp("outside") / "job.yaml"
    outside.touch()
    with pytest.raises(SubmitError, match="is outside the working directory"):
        entrypoint(outside, root="/r", working_dir=folder)
    with pytest.raises(SubmitError, match=r"no.yaml does not exist"):
        entrypoint(folder / "no.yaml", root="/r", working_dir=folder)


def test_upload_obeys_the_ignore_files(folder: Path) -> None:
    names = {str(path) for path in upload_sizes(folder)}
    assert names == {".gitignore", ".rayignore", "jobs/a b.yaml", "spaces/s.py", "keep/data.bin", "keep/.gitignore"}
    assert upload_sizes(folder)[PurePosixPath("keep/data.bin")] == 1000


def test_upload_is_what_ray_packs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    from ray._private.runtime_env.packaging import create_package

    target = tmp_path_factory.mktemp("zip") / "package.zip"
    create_package(str(folder), target, include_gitignore=True, excludes=[".git"])
    with ZipFile(target) as archive:
        packed = {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}
    assert packed == {str(path): size for path, size in upload_sizes(folder).items()}
    assert target.stat().st_size <= check_upload(folder)


def test_too_big_upload_names_the_biggest_folders(folder: Path) -> None:
    (folder / "keep" / "data.bin").write_bytes(b"0" * 3 * 2**20)
    assert check_upload(folder) > 3 * 2**20
    expected = r"3\.0 MiB to upload, a cluster accepts 1 MiB\. Biggest: keep/data.bin 3\.0 MiB, .*\.rayignore"
    with pytest.raises(SubmitError, match=expected):
        check_upload(folder, limit_bytes=2**20)


def test_runtime_env_stops_gently(folder: Path) -> None:
    plain = runtime_env(folder)
    assert plain["working_dir"] == str(folder)
    assert plain["env_vars"] == {
        "PYTHONPATH": "platform",
        "RAY_JOB_STOP_SIGNAL": "SIGINT",
        "RAY_JOB_STOP_WAIT_TIME_S": "60",
    }


def test_runtime_env_of_the_working_directory_wins(folder: Path) -> None:
    (folder / "cluster").mkdir()
    (folder / "cluster" / "runtime_env.yaml").write_text("pip: [x]\nenv_vars: {A: 1, RAY_JOB_STOP_WAIT_TIME_S: '9'}\n")
    given = runtime_env(folder)
    assert given["pip"] == ["x"]
    assert given["env_vars"]["A"] == "1"
    assert given["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"] == "9"
    assert given["env_vars"]["RAY_JOB_STOP_SIGNAL"] == "SIGINT"


def test_repository_s_runtime_env_agrees_with_the_defaults() -> None:
    given = runtime_env(Path(__file__).parents[2])
    assert {"PYTHONPATH", "RAY_JOB_STOP_SIGNAL", "RAY_JOB_STOP_WAIT_TIME_S"} <= set(given["env_vars"])
    assert given["env_vars"]["RAY_JOB_STOP_SIGNAL"] == "SIGINT"


# Clusters that do not answer as they should


@pytest.fixture
def server(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that answers every request with one status; yields its URL."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(request.param)
            self.end_headers()
            self.wfile.write(b"Unauthorized: Missing authentication token")

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as httpd:
        thread = Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def _send(folder: Path, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    submit(folder / "jobs" / "a b.yaml", address=address, root="/r", working_dir=folder)


def test_no_answer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SubmitError, match=r"no Ray cluster answers at http://127.0.0.1:9 .*cluster/local.sh start"):
        _send(folder, "127.0.0.1:9", monkeypatch)


@pytest.mark.parametrize("server", [401, 403], indirect=True)
def test_missing_token(folder: Path, monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    with pytest.raises(SubmitError, match=r"asks for a token, .*RAY_AUTH_MODE=token \(now disabled\).*auth_token"):
        _send(folder, server, monkeypatch)


@pytest.mark.parametrize("server", [404, 500], indirect=True)
def test_something_else_answers(folder: Path, monkeypatch: pytest.MonkeyPatch, server: str) -> None:
    with pytest.raises(SubmitError, match=r"answers with HTTP \d+: it is not the dashboard"):
        _send(folder, server, monkeypatch)


def test_address_that_is_no_url(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SubmitError, match="'ray://head:10001' is not the URL of a dashboard"):
        _send(folder, "ray://head:10001", monkeypatch)


# What follows a job


class Cluster:
    """A stand-in for Ray's client: logs in pieces, a connection that drops, a status at the end."""

    def __init__(self, calls: list[list[str | Exception]], status: str, code: int | None = None) -> None:
        self.calls, self.status, self.code = calls, status, code

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        for text in self.calls.pop(0):
            if isinstance(text, Exception):
                raise text
            yield text

    def get_job_status(self, job_id: str) -> Any:
        return SimpleNamespace(is_terminal=lambda: not self.calls)

    def get_job_info(self, job_id: str) -> Any:
        return SimpleNamespace(status=self.status, driver_exit_code=self.code, message="out of memory")


def followed(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def at_once(seconds: float) -> None:
        """Wait for nothing."""

    monkeypatch.setattr("steerlab.run.submit.asyncio.sleep", at_once)
    asyncio.run(_follow(cluster, "job-1"))


def test_a_connection_that_drops_is_taken_up_and_no_line_is_printed_twice(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ray's log begins from its start at each connection."""
    calls: list[list[str | Exception]] = [
        ["one\n", "tw", RuntimeError("gone")],
        [OSError("still gone")],
        ["one\n", "two\n", "three\n"],
    ]
    followed(Cluster(calls, "SUCCEEDED"), monkeypatch)
    assert capsys.readouterr().out == "one\ntwo\nthree\n"


def test_a_cluster_that_stays_away_ends_in_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SubmitError, match=r"no longer answers \(gone\); job-1 may still run"):
        followed(Cluster([[RuntimeError("gone")] for _ in range(40)], "RUNNING"), monkeypatch)


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        ("SUCCEEDED", None, 0),
        ("SUCCEEDED", 0, 0),
        ("FAILED", None, 1),
        ("STOPPED", None, 1),
        ("FAILED", 2, 2),
        ("FAILED", 70, 70),
    ],
)
def test_the_exit_code_is_the_jobs_and_a_failure_without_one_is_1(
    status: str, code: int | None, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _exit_code(Cluster([], status, code), "job-1") == expected  # type: ignore[arg-type]
    told = capsys.readouterr()
    assert told.out == f"job-1: {status.lower()}\n" and told.err == ("" if code is not None else "out of memory\n")


# Folders and clusters of strangers


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder, home: (folder / "data").symlink_to(home), r"data is a link to .*home\d*, which would be uploaded"),
        (
            lambda folder, home: (folder / "notes").symlink_to(home / "id_rsa"),
            r"notes is a link to .*id_rsa, which would be up",
        ),
        (lambda folder, home: (folder / "a").symlink_to("."), r"a is a link to a folder, which would be uploaded twice"),
        (lambda folder, home: (folder / "a").symlink_to("a"), r"a is a link to itself"),
        (lambda folder, home: os.mkfifo(folder / "pipe"), r"pipe is neither a file nor a folder: name it in \.rayignore"),
        (lambda folder, home: os.mkfifo(folder / "spaces/.gitignore"), r"spaces/\.gitignore is not a regular file"),
        (
            lambda folder, home: [(folder / ".gitignore").unlink(), os.mkfifo(folder / ".gitignore")],
            r"\.gitignore is not a regular file",
        ),
    ],
)
def test_what_lies_elsewhere_is_not_uploaded_and_nothing_hangs(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, make: Any, message: str
) -> None:
    home = tmp_path_factory.mktemp("home")
    (home / "id_rsa").write_text("PRIVATE")
    make(folder, home)
    with pytest.raises(SubmitError, match=message):
        check_upload(folder)


def test_a_link_that_is_left_out_and_one_to_a_file_beside_it_are_no_matter(folder: Path, tmp_path: Path) -> None:
    (folder / "skip" / "far").symlink_to("/")
    (folder / "near").symlink_to(folder / "spaces/s.py")
    assert PurePosixPath("near") in upload_sizes(folder)


def test_files_that_hold_secrets_are_named(folder: Path) -> None:
    for name in (".env", "deploy.pem"):
        (folder / name).write_text("x")
    with pytest.warns(UserWarning, match=r"(\.env, deploy\.pem|deploy\.pem, \.env): uploaded like any other file"):
        check_upload(folder)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n", "is damaged"),
        ("hello", "is damaged"),
        ("env_vars: [1]\n", "env_vars"),
        ("{", "cannot be read as YAML"),
        ("py_modules: [/home/me/.ssh]\n", "py_modules: Extra inputs.*has the keys env_vars, pip, uv, conda, excludes, config"),
        ("pip: /home/me/.netrc\n", "pip.*lists instead of files"),
        ("conda: ../environment.yaml\n", "conda"),
        ("worker_process_setup_hook: os.system\n", "worker_process_setup_hook"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nenv_vars: {X: *b}\n", "is damaged"),
    ],
)
def test_a_runtime_env_asks_for_nothing_from_elsewhere(folder: Path, text: str, message: str) -> None:
    (folder / "cluster").mkdir()
    (folder / "cluster/runtime_env.yaml").write_text(text)
    with pytest.raises(SubmitError, match=message):
        runtime_env(folder)


def test_a_runtime_env_that_is_a_pipe_is_refused(folder: Path) -> None:
    (folder / "cluster").mkdir()
    os.mkfifo(folder / "cluster/runtime_env.yaml")
    with pytest.raises(SubmitError, match=r"runtime_env\.yaml is a named pipe, not a file"):
        runtime_env(folder)


# Keys and passwords


PLANTED = {
    "WANDB_API_KEY": "planted0" * 5,
    "HF_TOKEN": "hf_planted1planted1",
    "AWS_SECRET_ACCESS_KEY": "planted2planted2planted2",
    "AWS_ACCESS_KEY_ID": "AKPLANTED3PLANTED3",
    "OPENAI_API_KEY": "sk-planted4planted4",
    "MLFLOW_TRACKING_PASSWORD": "planted5planted5",
    "GOOGLE_APPLICATION_CREDENTIALS": "/home/planted6/key.json",
}


@pytest.fixture
def dashboard(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, list[bytes]]]:
    """A stand-in for Ray's dashboard that takes a job, and everything that it was sent."""
    received: list[bytes] = []

    class Handler(BaseHTTPRequestHandler):
        def _take(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            received.append(f"{self.command} {self.path}\n{self.headers}".encode() + body)
            absent = self.command == "GET" and "/packages/" in self.path
            answer = {"/api/version": VERSION, "/api/jobs/": {"job_id": "j", "submission_id": "raysubmit_1"}}
            sent = json.dumps(answer.get(self.path, {})).encode()
            self.send_response(404 if absent else 200)
            self.send_header("Content-Length", str(len(sent)))
            self.end_headers()
            self.wfile.write(sent)

        do_GET = do_POST = do_PUT = _take

        def log_message(self, *_: object) -> None:
            """Print nothing."""

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}", received
    finally:
        httpd.shutdown()
        httpd.server_close()
        thread.join()


VERSION = {"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"}


def test_what_is_sent_to_a_cluster_holds_no_key_of_this_environment(
    folder: Path, dashboard: tuple[str, list[bytes]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the request of the job nor the folder that is packed; what is printed says none, too."""
    address, received = dashboard
    for name, value in PLANTED.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:9")
    job = folder / "jobs" / "a b.yaml"
    assert submit(job, address=address, root="s3://bucket/r", working_dir=folder, follow=False) == 0
    (asked,) = [one for one in received if one.startswith(b"POST /api/jobs/")]
    packed = [one for one in received if one.startswith(b"PUT /api/packages/")]
    assert b"s3://bucket/r" in asked and packed, "the job and its folder were sent"
    told = capsys.readouterr()
    everything = b"".join([*received, *map(_unpacked, packed), told.out.encode(), told.err.encode()])
    assert [name for name, value in PLANTED.items() if value.encode() in everything] == []
    sent = json.loads(asked.partition(b"\r\n\r\n")[2] or asked[asked.index(b"{") :])
    assert not set(sent["runtime_env"]["env_vars"]) & set(PLANTED)


def _unpacked(request: bytes) -> bytes:
    """The contents of an uploaded archive: compressed, a key would not be found."""
    with ZipFile(io.BytesIO(request[request.index(b"PK") :])) as archive:
        return b"".join(archive.read(name) for name in archive.namelist())


@pytest.mark.parametrize("name", [*PLANTED, "hf_token", "JUDGE_KEY", "DB_PASSWORD", "AZURE_STORAGE_KEY", "TOKEN"])
def test_a_runtime_env_with_a_key_is_refused(folder: Path, name: str) -> None:
    (folder / "cluster").mkdir()
    (folder / "cluster/runtime_env.yaml").write_text(f"env_vars: {{{name}: planted}}\n")
    with pytest.raises(SubmitError, match=f"env_vars sets {name}, which Ray would show on its dashboard") as caught:
        runtime_env(folder)
    assert "planted" not in str(caught.value)


@pytest.mark.parametrize("name", ["TOKENIZERS_PARALLELISM", "KEYBOARD", "AUTHOR", "PYTHONPATH", "TOKEN_LIMIT", "MONKEYS"])
def test_names_that_only_look_like_keys_are_sent(folder: Path, name: str) -> None:
    (folder / "cluster").mkdir()
    (folder / "cluster/runtime_env.yaml").write_text(f"env_vars: {{{name}: x}}\n")
    assert runtime_env(folder)["env_vars"][name] == "x"  # type: ignore[index]


@pytest.mark.parametrize(
    "given",
    [
        {"root": "s3://me:hunter2@bucket/r"},
        {"root": "s3://bucket/r?secret_key=hunter2"},
        {"root": "/r", "overrides": ("data.train.source=https://me:hunter2@host/a.jsonl",)},
        {"root": "/r", "overrides": ("track.mlflow.uri=http://me:hunter2@host:5000",)},
    ],
)
def test_a_command_with_a_password_is_not_sent(folder: Path, given: dict[str, Any]) -> None:
    with pytest.raises(SubmitError, match="Ray shows the command of a job") as caught:
        entrypoint(folder / "jobs" / "a b.yaml", working_dir=folder, **given)
    assert "hunter2" not in str(caught.value)


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], cwd=folder, check=True, capture_output=True
    )


def test_the_commit_is_that_of_the_files_and_nothing_of_the_folder_runs_for_it(folder: Path) -> None:
    """`git describe --dirty`, `status` and `diff` run the monitor and the filters that the folder's own configuration names."""
    shutil.rmtree(folder / ".git")
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "x")
    marker = folder.parent / f"{folder.name}-ran"
    with (folder / ".git/config").open("a") as config:
        config.write(f'[core]\n\tfsmonitor = "touch {marker}; false"\n[filter "f"]\n\tclean = "touch {marker}; cat"\n')
    (folder / ".git/info/attributes").write_text("* filter=f\n")
    clean = runtime_env(folder)["env_vars"]["STEERLAB_GIT_COMMIT"]
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (folder / "spaces/s.py").write_text("other")
    assert runtime_env(folder)["env_vars"]["STEERLAB_GIT_COMMIT"] == f"{clean}-dirty"
    git(folder, "-c", "core.fsmonitor=false", "checkout", "--", "spaces/s.py")
    marker.unlink(missing_ok=True)
    (folder / "new.py").write_text("not added")
    assert runtime_env(folder)["env_vars"]["STEERLAB_GIT_COMMIT"] == f"{clean}-dirty"
    assert not marker.exists()


@pytest.fixture
def speaking(request: pytest.FixtureRequest) -> Iterator[str]:
    """A server that speaks as a dashboard does, with one answer of its own; yields its URL."""
    given: dict[str, bytes] = {"version": b'{"version": "4", "ray_version": "2.60.0", "ray_commit": "x"}', **request.param}

    class Answer(BaseHTTPRequestHandler):
        def answer(self) -> None:
            if length := int(self.headers.get("Content-Length") or 0):
                self.rfile.read(length)
            name = "version" if "version" in self.path else "package" if "packages" in self.path else "job"
            code, body = (404, b"") if name == "package" and self.command == "GET" else (200, given.get(name, b"{}"))
            self.send_response(500 if body == b"broken" else code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PUT = answer

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as httpd:
        thread = Thread(target=httpd.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("speaking", "message"),
    [
        ({"version": b"<html>login</html>"}, "does not answer as the dashboard"),
        ({"version": b"[1]"}, "does not answer as the dashboard"),
        ({"version": b'{"ray_version": "\\u001b[31mx"}'}, "does not answer as the dashboard"),
        ({"version": b" " * (2 << 20) + b"{}"}, "does not answer as the dashboard"),
        ({"job": b"broken"}, "refuses the request, or does not answer as a Ray cluster does"),
        ({"job": b'{"foo": 1}'}, "refuses the request, or does not answer as a Ray cluster does"),
        (
            {"job": b'{"job_id": "\\u001b[2J", "submission_id": "\\u001b[2J"}'},
            r"answers with the job id '\\x1b\[2J', which is not a plain name",
        ),
    ],
    indirect=["speaking"],
)
def test_whatever_a_server_answers_ends_in_a_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch, speaking: str, message: str
) -> None:
    with pytest.raises(SubmitError, match=message):
        _send(folder, speaking, monkeypatch)


def test_a_status_that_ray_does_not_have_ends_in_a_message(monkeypatch: pytest.MonkeyPatch) -> None:
    cluster: Any = Cluster([["a"]], "WAT")
    cluster.get_job_status = lambda job_id: {}["WAT"]
    with pytest.raises(SubmitError, match=r"answer about job-1 cannot be read"):
        followed(cluster, monkeypatch)


def test_a_cluster_s_texts_move_no_cursor(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    followed(Cluster([["a \x1b]0;owned\x07\x1b[2J b\r10 %\r\n"]], "SUCCEEDED"), monkeypatch)
    shown = capsys.readouterr().out
    assert "\x1b" not in shown and "\\x1b]0;owned\\x07" in shown and shown.endswith("b\n10 %\n")
    cluster: Any = Cluster([], "FAILED")
    cluster.get_job_info = lambda job_id: SimpleNamespace(status="FAILED", driver_exit_code=None, message="boo \x1b[2J")
    _exit_code(cluster, "job-1")
    assert "\x1b" not in capsys.readouterr().err


def test_every_module_of_this_repository_is_uploaded() -> None:
    """A line of an ignore file names folders at any depth: `wandb/` once left a package of that name behind."""
    root = Path(__file__).parents[2]
    sent = set(map(str, upload_sizes(root)))
    own = {
        str(path.relative_to(root)) for place in ("platform", "jobs", "search_spaces") for path in (root / place).rglob("*.py")
    }
    assert own and own <= sent


OWN_METHOD = """\
from typing import Literal
from steerlab.job import MethodConfig
from steerlab.methods.contract import Plain

class Config(MethodConfig):
    name: Literal["own"] = "own"

METHOD = Plain(Config)
"""


def test_files_that_stay_behind_are_named(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Data outside of the folder, ignored, absolute, missing; a method's file; also those of the job below."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for file in (elsewhere / "own.py", folder / "own.py"):
        file.write_text(OWN_METHOD)
    for file in (elsewhere / "rows.jsonl", folder / "rows.jsonl", folder / "absolute.jsonl", folder / "skip/rows.jsonl"):
        file.write_text("")
    monkeypatch.chdir(folder)

    def job_of(train: str, own: str, source: str = "tiny:model") -> str:
        data = {"train": {"source": train}, "safety": {"source": "rows.jsonl"}, "utility": {"source": "hf:a/b"}}
        return json.dumps({"name": "a", "model": {"source": source}, "method": {"file": own}, "data": data})

    def left(text: str) -> dict[str, str]:
        (folder / "job.yaml").write_text(text)
        return left_behind(Plan.of(job.read(folder / "job.yaml", JobType)), text, folder)

    assert left(job_of("rows.jsonl", "own.py")) == {}
    assert "is outside" in left(job_of(f"{elsewhere}/rows.jsonl", "own.py"))[f"{elsewhere}/rows.jsonl"]
    assert left(job_of("rows.jsonl", f"{elsewhere}/own.py")).keys() == {f"{elsewhere}/own.py"}
    assert "ignore" in left(job_of("skip/rows.jsonl", "own.py"))[f"{folder}/skip/rows.jsonl"]
    assert "absolute" in left(job_of(f"{folder}/absolute.jsonl", "own.py"))[f"{folder}/absolute.jsonl"]
    assert "not exist" in left(job_of("missing.jsonl", "own.py"))[f"{folder}/missing.jsonl"]
    (folder / "below.yaml").write_text(job_of(f"{elsewhere}/rows.jsonl", "own.py"))
    assert left(job_of("rows.jsonl", "own.py", "job:below.yaml")).keys() == {f"{elsewhere}/rows.jsonl"}
