"""Send a job or a sweep to a cluster through Ray's job API and follow its logs."""

import asyncio
import os
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

UPLOAD_LIMIT_BYTES = 100 * 2**20
"""What a cluster accepts as working directory; beyond it, it answers with an HTTP error that names no reason."""

_ZIP_ENTRY_BYTES = 256
_RUNTIME_ENV = Path("cluster", "runtime_env.yaml")
_ENV_VARS = {"PYTHONPATH": "platform", "RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
_INTERRUPTED = 130


class SubmitError(ValueError):
    """A job could not be sent; the message is for people."""


def submit(
    job_path: Path,
    *,
    address: str,
    root: str,
    space: Path | None = None,
    overrides: Sequence[str] = (),
    options: Sequence[str] = (),
    working_dir: Path = Path("."),
    follow: bool = True,
) -> int:
    """Send the job (with `space`: the sweep) in `job_path` to the cluster at `address`, an http(s) URL.

    The working directory is uploaded without what .gitignore and .rayignore name; the entry point runs in its copy on the
    cluster. `overrides` are `key=value`, `options` those of `steerlab sweep`. With `follow`, logs are printed until the job
    ends; Ctrl-C leaves it running.

    Returns:
        The entry point's exit code; 0 as soon as the job is accepted if it is not followed; 130 after Ctrl-C.

    Raises:
        SubmitError: a path outside the working directory, a relative ROOT, an upload above 100 MiB, or a cluster that does
            not answer (any more) or asks for a token that is missing or wrong.
    """
    working_dir = working_dir.resolve()
    command = entrypoint(job_path, root=root, space=space, overrides=overrides, options=options, working_dir=working_dir)
    check_upload(working_dir)
    client = _connect(address if "://" in address else f"http://{address}")
    job_id = client.submit_job(entrypoint=command, runtime_env=runtime_env(working_dir), metadata={"job": str(job_path)})
    print(f"sent as {job_id}: {command}", flush=True)
    print(f"dashboard: {client.get_address()}/#/jobs/{job_id}   to stop it: ray job stop {job_id}", flush=True)
    if not follow:
        return 0
    try:
        asyncio.run(_follow(client, job_id))
    except KeyboardInterrupt:
        print(f"\n{job_id} goes on; to see it again: ray job logs --follow {job_id}", flush=True)
        return _INTERRUPTED
    return _exit_code(client, job_id)


def entrypoint(
    job_path: Path,
    *,
    root: str,
    space: Path | None = None,
    overrides: Sequence[str] = (),
    options: Sequence[str] = (),
    working_dir: Path = Path("."),
) -> str:
    """Return the command that the cluster runs in its copy of the working directory. Raises SubmitError."""
    if not (root.startswith("/") or "://" in root):
        raise SubmitError(
            f"ROOT '{root}' is relative: on the cluster it would vanish with the uploaded copy."
            " Give a URI (s3://bucket/folder, or file:///folder that all nodes see), or an absolute path on a one-node cluster."
        )
    if options and space is None:
        raise SubmitError(f"{' '.join(options)}: that is for a sweep; name its search space with --space")
    files = [_inside(path, working_dir.resolve()) for path in (job_path, space) if path is not None]
    arguments = ["run" if space is None else "sweep", *files, "--root", root, *options]
    for override in overrides:
        arguments += ["--set", override]
    return shlex.join(["python", "-m", "steerlab", *arguments])


def runtime_env(working_dir: Path) -> dict[str, Any]:
    """Return Ray's runtime environment: the working directory's own cluster/runtime_env.yaml over what a job needs."""
    path = working_dir / _RUNTIME_ENV
    given: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) if path.is_file() else {}
    env_vars = _ENV_VARS | _commit(working_dir) | {name: str(value) for name, value in given.get("env_vars", {}).items()}
    return given | {"working_dir": str(working_dir), "env_vars": env_vars}


def _commit(working_dir: Path) -> dict[str, str]:
    """Return the commit for the run's record: the upload leaves .git behind."""
    found = subprocess.run(
        ["git", "-C", str(working_dir), "describe", "--always", "--dirty", "--abbrev=40"], capture_output=True, text=True
    )
    return {"STEERLAB_GIT_COMMIT": found.stdout.strip()} if found.returncode == 0 else {}


def upload_sizes(working_dir: Path) -> dict[PurePosixPath, int]:
    """Return the bytes of every file that would be uploaded, by its path in the working directory."""
    # Ray's own walk, so that .gitignore, .rayignore and its default exclusions mean here what they mean to Ray.
    from ray._private.ray_constants import get_runtime_env_default_excludes
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    sizes: dict[PurePosixPath, int] = {}

    def note(path: Path) -> None:
        if path.is_file():
            sizes[PurePosixPath(path.relative_to(working_dir))] = path.stat().st_size

    excludes = [_get_excludes(working_dir, get_runtime_env_default_excludes())]
    include_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    _dir_travel(working_dir, excludes, note, include_gitignore=include_gitignore)
    return sizes


def check_upload(working_dir: Path, limit_bytes: int = UPLOAD_LIMIT_BYTES) -> int:
    """Return the bytes to upload. Raises SubmitError, naming the biggest folders, if they exceed `limit_bytes`."""
    sizes = upload_sizes(working_dir)
    total = sum(sizes.values()) + _ZIP_ENTRY_BYTES * len(sizes)
    if total <= limit_bytes:
        return total
    folders: Counter[str] = Counter()
    for path, size in sizes.items():
        folders[str(PurePosixPath(*path.parts[:2])) if len(path.parts) > 1 else path.name] += size
    biggest = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in folders.most_common(5))
    raise SubmitError(
        f"{working_dir} has {total / 2**20:.1f} MiB to upload, a cluster accepts {limit_bytes / 2**20:.0f} MiB."
        f" Biggest: {biggest}. Name what the job does not need in .rayignore (as in .gitignore)."
    )


def _inside(path: Path, working_dir: Path) -> str:
    resolved = path.resolve()
    if not resolved.is_file():
        raise SubmitError(f"{path} does not exist")
    if not resolved.is_relative_to(working_dir):
        raise SubmitError(f"{path} lies outside the working directory {working_dir}, which alone is uploaded")
    return resolved.relative_to(working_dir).as_posix()


def _connect(address: str) -> "JobSubmissionClient":
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        raise SubmitError(f"address '{address}' is not the URL of a dashboard, such as http://127.0.0.1:8265")
    # Ray's variables would win over the address that the user gave here.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        # Ray's client asks without a time limit.
        answer = requests.get(f"{address}/api/version", timeout=10)
    except requests.RequestException as error:
        raise SubmitError(
            f"no Ray cluster answers at {address} ({type(error).__name__}): is it running, and is this the dashboard's"
            " address? A local one: cluster/local.sh start"
        ) from error
    if answer.status_code not in (200, 401, 403):
        raise SubmitError(f"{address} answers with HTTP {answer.status_code}: it is not the dashboard of a Ray cluster")
    try:
        return JobSubmissionClient(address)
    except AuthenticationError as error:
        mode = os.environ.get("RAY_AUTH_MODE", "not set")
        raise SubmitError(
            f"the cluster at {address} asks for a token, which is missing or wrong: set RAY_AUTH_MODE=token (now {mode})"
            " and have its token in ~/.ray/auth_token, in the file RAY_AUTH_TOKEN_PATH or in RAY_AUTH_TOKEN."
            ' For a local one: eval "$(cluster/local.sh env)"'
        ) from error


async def _follow(client: "JobSubmissionClient", job_id: str) -> None:
    """Print the job's log until it ends; a lost connection is taken up where it broke, for about a minute."""
    import aiohttp

    num_printed, num_failures = 0, 0
    while True:
        num_seen = 0
        try:
            async for text in client.tail_job_logs(job_id):
                print(text[max(0, num_printed - num_seen) :], end="", flush=True)
                num_seen += len(text)
                num_printed, num_failures = max(num_printed, num_seen), 0
            if client.get_job_status(job_id).is_terminal():
                return
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            num_failures += 1
            if num_failures > 30:
                raise SubmitError(f"the cluster no longer answers ({error}); {job_id} may still run") from error
        await asyncio.sleep(2.0)


def _exit_code(client: "JobSubmissionClient", job_id: str) -> int:
    info = client.get_job_info(job_id)
    status = str(info.status)
    print(f"{job_id}: {status.lower()}", flush=True)
    if info.driver_exit_code is not None:
        return info.driver_exit_code
    if info.message:
        print(info.message, file=sys.stderr)
    return 0 if status == "SUCCEEDED" else 1
