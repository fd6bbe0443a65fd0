"""Check what `steerlab submit` sends to a cluster: the working directory, and Ray's runtime environment for it.

The folder may come from another person. When Ray packs it, Ray follows every link, opens every pipe and uploads all files that
`runtime_env.yaml` names, so the folder is checked before.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import subprocess
import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from steerlab.guards import files, private_parts, saved, yaml12
from steerlab.job import described, grammar, own_code

if TYPE_CHECKING:
    from steerlab.stages import Plan

UPLOAD_LIMIT_BYTES = 100 * 2**20
"""Largest working directory that a cluster accepts. For a larger one, it answers with an HTTP error without a reason."""
_ZIP_ENTRY_BYTES = 256
"""Estimated overhead of one file in the uploaded zip archive."""
_RUNTIME_ENV = Path("cluster", "runtime_env.yaml")
_ENV_VARS = {"PYTHONPATH": "platform", "RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
_IGNORING = (".gitignore", ".rayignore")
_PRIVATE = re.compile(
    r"(?i)\.env(\..*)?|\.netrc|\.pypirc|\.npmrc|id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|key|p12|pfx)|credentials(\.json)?"
)
"""Names of files that usually hold secrets."""
_SECRET = re.compile(r"(?i)(.*_)?(key|keys|token|secret|password|passwd|pwd|credentials?|auth)(_id)?")
"""Names of environment variables that usually hold secrets."""


class SubmitError(ValueError):
    """A job could not be sent to a cluster; the message says why."""


_Packages = list[str]


class _RuntimeEnv(BaseModel):
    """Allowed content of runtime_env.yaml. Keys with which Ray reads or uploads files outside the folder are missing."""

    model_config = ConfigDict(extra="forbid", strict=True)

    env_vars: dict[str, str | int | float | bool] = {}
    pip: _Packages | dict[str, object] | None = None
    uv: _Packages | dict[str, object] | None = None
    conda: Annotated[str, Field(pattern=r"^[\w-]+$")] | dict[str, object] | None = None
    excludes: list[str] | None = None
    config: dict[str, object] | None = None


def left_behind(planned: Plan, written: str, working_dir: Path) -> dict[str, str]:
    """Return the local files and folders that a plan's jobs name and that will not be found on the cluster.

    Args:
        planned: the plan of the job to send.
        written: the text of the job file and of the settings beside it.
        working_dir: the folder to upload.

    Returns:
        Path -> why it will not be there.
    """
    named: list[str] = []
    for plan in planned.chain:
        # Every field of the job that holds a source, under any name, and the user's own files of code.
        described(plan.job, named.append)
        named += [code.path for code in own_code.codes_in(plan.job.model_dump(mode="json", exclude={"model"}))]
    folder = working_dir.resolve()
    uploaded = [path.resolve() for path in _uploaded(folder)]
    reasons: dict[str, str] = {}
    for source in dict.fromkeys(named):
        parsed = grammar.parse(source)
        if parsed.kind != "path":
            continue
        path = Path(parsed.name).resolve()
        if not path.is_relative_to(folder):
            reasons[parsed.name] = f"it is outside of {folder}"
        elif not any(file.is_relative_to(path) for file in uploaded):
            reasons[parsed.name] = ".gitignore or .rayignore excludes it" if path.exists() else "it does not exist"
        elif parsed.name in written:
            reasons[parsed.name] = "it is given as an absolute path, but the uploaded copy is elsewhere"
    return reasons


def runtime_env(working_dir: Path) -> dict[str, object]:
    """Return Ray's runtime environment for a job: the platform's own settings, then those of cluster/runtime_env.yaml.

    Raises:
        SubmitError: the file cannot be read, has keys or values that are not allowed, or sets a variable that holds a secret.
    """
    path = working_dir / _RUNTIME_ENV
    requested = _RuntimeEnv()
    if path.exists() or path.is_symlink():
        try:
            tree = yaml12.load(files.read_text(path))
            requested = saved.checked({} if tree is None else tree, _RuntimeEnv, str(path))
        except FileNotFoundError:
            raise SubmitError(f"{path} is a link to nothing") from None
        except yaml12.YamlError as error:
            raise SubmitError(f"{path}:{error.line or 1}: cannot be read as YAML: {error}") from None
        except (files.FileError, saved.SavedError) as error:
            allowed = ", ".join(_RuntimeEnv.model_fields)
            raise SubmitError(f"{error}; a runtime environment has the keys {allowed}, and lists instead of files") from None
    # Ray stores the variables of a job and shows them on its dashboard, to everyone who can see it.
    shown = [name for name, value in requested.env_vars.items() if _SECRET.fullmatch(name) and str(value)]
    if shown:
        raise SubmitError(
            f"{path}: env_vars sets {shown[0]}, which Ray would show on its dashboard and keep in its logs: set it in the "
            "environment of the cluster's nodes (jobs/README.md, Keys and passwords)"
        )
    # In this order, so that a variable of the user replaces one of the platform.
    env_vars = _ENV_VARS | _commit(working_dir) | {name: str(value) for name, value in requested.env_vars.items()}
    return requested.model_dump(exclude_unset=True) | {"working_dir": str(working_dir), "env_vars": env_vars}


def _commit(working_dir: Path) -> dict[str, str]:
    """Return the environment variable with the job's git commit, with `-dirty` if the uploaded files differ from the commit.

    The upload has no .git, so the job cannot find the commit itself. Empty if the folder is not in a repository.
    """
    # Not `git status`: to compare files, git would run monitors and filters, which are programs that the folder's own
    # configuration names. Git gives only names and hashes, and the files are hashed here.
    commit = _git(working_dir, "rev-parse", "HEAD").strip()
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        return {}
    hashes = {}
    for entry in _git(working_dir, "ls-tree", "-r", "-z", "--full-tree", commit).split("\0"):
        about, _, name = entry.partition("\t")
        hashes[name] = about.split()[-1] if about else ""
    top = Path(_git(working_dir, "rev-parse", "--show-toplevel").strip() or working_dir)
    # Only uploaded files count: a changed file that stays here has no influence on the job.
    dirty = any(_blob(path, len(commit)) != hashes.get(os.path.relpath(path, top)) for path in _uploaded(working_dir))
    return {"STEERLAB_GIT_COMMIT": f"{commit}-dirty" if dirty else commit}


def _git(working_dir: Path, *arguments: str) -> str:
    """Return the output of a git command that runs no program of the folder's configuration; empty if the command fails."""
    # The folder may come from another person, and its .git/config may name programs that git would run.
    command = ["git", "-C", str(working_dir), "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return done.stdout if done.returncode == 0 else ""


def _blob(path: Path, digits: int) -> str:
    """Return the hash that git gives to a file's content: SHA-1 or SHA-256, by the number of hexadecimal digits."""
    # Git stores a symbolic link as a file that holds its target.
    content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
    algorithm = hashlib.sha1 if digits == 40 else hashlib.sha256
    return algorithm(b"blob %d\0" % len(content) + content).hexdigest()


def upload_sizes(working_dir: Path) -> dict[PurePosixPath, int]:
    """Return the size in bytes of each file to upload, by its path in the working directory. Raises SubmitError."""
    return {PurePosixPath(path.relative_to(working_dir)): path.stat().st_size for path in _uploaded(working_dir)}


def _uploaded(working_dir: Path) -> list[Path]:
    """Return the files to upload.

    Raises:
        SubmitError: a link leads to a folder or out of the directory, or an entry is neither a file nor a folder (a pipe).
    """
    paths: list[Path] = []

    def note(path: Path) -> None:
        if path.is_symlink():
            _check_link(path, working_dir)
        if path.is_dir():
            _check_ignoring(path)
        elif path.is_file():
            paths.append(path)
        elif path.exists():
            raise SubmitError(f"{path} is neither a file nor a folder: name it in .rayignore (as in .gitignore)")

    # The ignore files of a folder are checked when its parent is visited; the top folder's parent never is.
    _check_ignoring(working_dir, itself=True)
    obeys_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    quiet = logging.Logger("steerlab.upload", logging.CRITICAL + 1)  # Ray would warn of each file; errors here are more precise
    private_parts.walk_upload(working_dir, note, quiet, obeys_gitignore=obeys_gitignore)
    return paths


def _check_link(path: Path, working_dir: Path) -> None:
    """Refuse a link out of the working directory or to a folder: Ray uploads the target of a link."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError):
        raise SubmitError(f"{path} is a link to itself: remove it, or name it in .rayignore") from None
    if not target.is_relative_to(working_dir):
        raise SubmitError(f"{path} is a link to {target}, which would be uploaded: remove it, or name it in .rayignore")
    if target.is_dir():
        raise SubmitError(f"{path} is a link to a folder, which would be uploaded twice: remove it, or name it in .rayignore")


def _check_ignoring(folder: Path, *, itself: bool = False) -> None:
    """Refuse a .gitignore or .rayignore that is not a regular file in the subfolders, and with `itself` in the folder too."""
    # Ray opens the ignore files of a folder before it calls back for the folder, and a pipe would block it forever.
    try:
        children = [child for child in folder.iterdir() if child.is_dir() and not child.is_symlink()]
    except OSError as error:
        raise SubmitError(f"{folder}: {error.strerror}") from None
    for place in [*([folder] if itself else []), *children]:
        for name in _IGNORING:
            if (place / name).exists() and not (place / name).is_file():
                raise SubmitError(f"{place / name} is not a regular file: remove it")


def check_upload(working_dir: Path, limit_bytes: int = UPLOAD_LIMIT_BYTES) -> int:
    """Return the number of bytes to upload. Raises SubmitError, which names the largest folders, above `limit_bytes`."""
    sizes = upload_sizes(working_dir)
    _warn_of_secrets(sizes)
    # The uncompressed sizes are an upper bound; the size of the archive is known only after packing.
    total = sum(sizes.values()) + _ZIP_ENTRY_BYTES * len(sizes)
    if total <= limit_bytes:
        return total
    folders: Counter[str] = Counter()
    for path, size in sizes.items():
        # Sizes are shown for two levels of folders, since the first is often just `platform` or `data`.
        folders[str(PurePosixPath(*path.parts[:2])) if len(path.parts) > 1 else path.name] += size
    biggest = ", ".join(f"{name} {size / 2**20:.1f} MiB" for name, size in folders.most_common(5))
    raise SubmitError(
        f"{working_dir} has {total / 2**20:.1f} MiB to upload, a cluster accepts {limit_bytes / 2**20:.0f} MiB."
        f" Biggest: {biggest}. Name what the job does not need in .rayignore (as in .gitignore)."
    )


def _warn_of_secrets(sizes: Mapping[PurePosixPath, int]) -> None:
    private = [str(path) for path in sizes if _PRIVATE.fullmatch(path.name)]
    if private:
        more = f" and {len(private) - 3} more" if len(private) > 3 else ""
        warnings.warn(
            f"{', '.join(private[:3])}{more}: uploaded like any other file; name in .rayignore what is secret", stacklevel=2
        )
