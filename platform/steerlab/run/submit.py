"""Send a job or a sweep to a cluster through Ray's job API and follow its logs."""

import asyncio
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from steerlab.guards import texts
from steerlab.run.upload import SubmitError, check_upload, runtime_env

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

_T = TypeVar("_T")
_INTERRUPTED = 130
"""Exit code after Ctrl-C (128 + SIGINT, as in a shell)."""
_LONGEST_ANSWER = 1 << 20
"""Largest number of bytes read of the answer about a cluster's version: any server may be at the address."""


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
    """Send a job, or a sweep over a search space, to a cluster, and print its log until it ends.

    The working directory is uploaded, except for the files that .gitignore and .rayignore name; the job runs in its copy on the
    cluster. Ctrl-C stops the printing and leaves the job running.

    Args:
        job_path: the job file, in the working directory.
        address: URL of the cluster's dashboard, such as http://HOST:8265.
        root: ROOT on the cluster: a URI, or an absolute path of a folder that all nodes share.
        space: the search space, for a sweep; None for a single job.
        overrides: `key=value` settings, as for `--set`.
        options: options of `steerlab sweep`.
        working_dir: the folder to upload.
        follow: print the log until the job ends; False returns as soon as the cluster accepts the job.

    Returns:
        Exit code of the job; 0 without `follow`; 130 after Ctrl-C.

    Raises:
        SubmitError: a path lies outside the working directory, ROOT is relative, the upload exceeds 100 MiB, or the cluster
            does not answer or refuses the token.
    """
    working_dir = working_dir.resolve()
    command = entrypoint(job_path, root=root, space=space, overrides=overrides, options=options, working_dir=working_dir)
    check_upload(working_dir)
    client = _connect(address if "://" in address else f"http://{address}")
    environment = runtime_env(working_dir)
    job_id = _answer(
        address, lambda: client.submit_job(entrypoint=command, runtime_env=environment, metadata={"job": str(job_path)})
    )
    # The id is printed within commands for the user's shell, so only a plain name is accepted.
    if not isinstance(job_id, str) or not re.fullmatch(r"[\w.-]{1,200}", job_id):
        raise SubmitError(f"{address} answers with the job id {texts.shown(repr(job_id))[:100]}, which is not a plain name")
    print(f"sent as {job_id}: {command}", flush=True)
    print(f"dashboard: {client.get_address()}/#/jobs/{job_id}   to stop it: ray job stop {job_id}", flush=True)
    if not follow:
        return 0
    try:
        asyncio.run(_follow(client, job_id))
    except KeyboardInterrupt:
        print(f"\n{job_id} continues; to see its log again: ray job logs --follow {job_id}", flush=True)
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
    """Return the command that the cluster runs in its copy of the working directory.

    Raises:
        SubmitError: ROOT is relative, a file lies outside, options do not fit, or an argument holds a password.
    """
    if not (root.startswith("/") or "://" in root):
        raise SubmitError(
            f"ROOT '{root}' is relative: on the cluster it would be deleted with the uploaded copy."
            " Give a URI (s3://bucket/folder), or the absolute path of a folder that all nodes share."
        )
    if options and space is None:
        raise SubmitError(f"{' '.join(options)}: these options are for a sweep; name its search space with --space")
    files = [_inside(path, working_dir.resolve()) for path in (job_path, space) if path is not None]
    arguments = ["run" if space is None else "sweep", *files, "--root", root, *options]
    for override in overrides:
        arguments += ["--set", override]
    secret = next((word for word in arguments if texts.without_secrets(word) != word), None)
    if secret is not None:
        raise SubmitError(
            f"{texts.without_secrets(secret)}: Ray shows the command of a job to everyone who can see its dashboard; give the "
            "address without the password, and the password in the environment of the cluster's nodes (jobs/README.md, Keys "
            "and passwords)"
        )
    # -P keeps the uploaded folder out of sys.path, so that a file in it does not hide a module of the same name.
    return shlex.join(["python", "-P", "-m", "steerlab", *arguments])


def _inside(path: Path, working_dir: Path) -> str:
    resolved = path.resolve()
    if not resolved.is_file():
        raise SubmitError(f"{path} does not exist")
    if not resolved.is_relative_to(working_dir):
        raise SubmitError(f"{path} is outside the working directory {working_dir}, and only that is uploaded")
    return resolved.relative_to(working_dir).as_posix()


def _connect(address: str) -> "JobSubmissionClient":
    """Return Ray's client for the dashboard at an address. Raises SubmitError if another server answers there."""
    import requests
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        raise SubmitError(f"address '{address}' is not the URL of a dashboard, such as http://127.0.0.1:8265")
    # Ray's client prefers this variable to its argument, so a value from the user's shell would replace the given address.
    os.environ["RAY_API_SERVER_ADDRESS"] = address
    try:
        # Checked before Ray's client connects, which limits neither the time nor the length of an answer.
        with requests.get(f"{address}/api/version", timeout=10, stream=True) as answer:
            status, content = answer.status_code, answer.raw.read(_LONGEST_ANSWER, decode_content=True)
    except requests.RequestException as error:
        raise SubmitError(
            f"no Ray cluster answers at {address} ({type(error).__name__}): is it running, and is this the dashboard's"
            " address? A local one: cluster/local.sh start"
        ) from error
    # 401 and 403 ask for a token; Ray's client below raises AuthenticationError for them.
    if status not in (200, 401, 403):
        raise SubmitError(f"{address} answers with HTTP {status}: it is not the dashboard of a Ray cluster")
    if status == 200 and not _is_version(content):
        raise SubmitError(f"{address} does not answer as the dashboard of a Ray cluster does")
    try:
        return _answer(address, lambda: JobSubmissionClient(address))
    except AuthenticationError as error:
        mode = os.environ.get("RAY_AUTH_MODE", "not set")
        raise SubmitError(
            f"the cluster at {address} asks for a token, which is missing or wrong: set RAY_AUTH_MODE=token (now {mode})"
            " and put its token into ~/.ray/auth_token, in the file RAY_AUTH_TOKEN_PATH or in RAY_AUTH_TOKEN."
            ' For a local one: eval "$(cluster/local.sh env)"'
        ) from error


def _is_version(content: bytes) -> bool:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(tree, dict) and re.fullmatch(r"[\w.+-]{1,50}", str(tree.get("ray_version", ""))) is not None


def _answer(address: str, ask: Callable[[], _T]) -> _T:
    """Call Ray's client, and turn its errors into SubmitError. AuthenticationError passes; the caller handles it."""
    from ray.exceptions import AuthenticationError

    try:
        return ask()
    except (AuthenticationError, SubmitError):
        raise
    except Exception as error:  # Ray's client does not validate an answer, so a wrong one may raise any error
        reason = " ".join(str(error).split())[:300]
        raise SubmitError(
            f"{address} refuses the request, or does not answer as a Ray cluster does: {type(error).__name__}: {reason}"
        ) from error


async def _follow(client: "JobSubmissionClient", job_id: str) -> None:
    """Print the job's log until the job ends; after a lost connection, try again for about a minute."""
    import aiohttp

    num_printed, num_failures = 0, 0
    while True:
        num_seen = 0  # characters in this connection; each one sends the log from its beginning again
        try:
            async for text in client.tail_job_logs(job_id):
                print(_shown(text[max(0, num_printed - num_seen) :]), end="", flush=True)
                num_seen += len(text)
                num_printed, num_failures = max(num_printed, num_seen), 0
            if client.get_job_status(job_id).is_terminal():
                return
        except (ValueError, TypeError, KeyError) as error:
            raise SubmitError(f"the cluster's answer about {job_id} cannot be read ({_shown(str(error))[:300]})") from error
        except (RuntimeError, OSError, aiohttp.ClientError) as error:
            # Ray's client raises RuntimeError for an HTTP error. 30 attempts every 2 s give a dashboard time to restart.
            num_failures += 1
            if num_failures > 30:
                raise SubmitError(
                    f"the cluster no longer answers ({_shown(str(error))[:300]}); {job_id} may still run"
                ) from error
        await asyncio.sleep(2.0)


def _shown(text: str) -> str:
    """Return a cluster's text without control characters of the terminal; each state of a progress bar becomes a line."""
    return texts.plain(text.replace("\r\n", "\n").replace("\r", "\n"))


def _exit_code(client: "JobSubmissionClient", job_id: str) -> int:
    info = _answer("the cluster", lambda: client.get_job_info(job_id))
    status = texts.plain(str(info.status))
    print(f"{job_id}: {status.lower()}", flush=True)
    if isinstance(info.driver_exit_code, int):
        return info.driver_exit_code
    if info.message:
        print(_shown(str(info.message)), file=sys.stderr)
    return 0 if status == "SUCCEEDED" else 1
