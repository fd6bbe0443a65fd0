"""What `steerlab submit` sends to a cluster: the working directory, and Ray's runtime environment for it.

The folder may have been somebody else's: it is looked through before Ray packs it, which follows every link, opens every pipe
and uploads whatever `runtime_env.yaml` names.
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
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from steerlab.guards import files, private_parts, saved, yaml12

UPLOAD_LIMIT_BYTES = 100 * 2**20
"""What a cluster accepts as working directory; beyond it, it answers with an HTTP error that names no reason."""
_ZIP_ENTRY_BYTES = 256
_RUNTIME_ENV = Path("cluster", "runtime_env.yaml")
_ENV_VARS = {"PYTHONPATH": "platform", "RAY_JOB_STOP_SIGNAL": "SIGINT", "RAY_JOB_STOP_WAIT_TIME_S": "60"}
_IGNORING = (".gitignore", ".rayignore")
_PRIVATE = re.compile(
    r"(?i)\.env(\..*)?|\.netrc|\.pypirc|\.npmrc|id_(rsa|dsa|ecdsa|ed25519)|.*\.(pem|key|p12|pfx)|credentials(\.json)?"
)
"""Names of files that hold secrets more often than not."""


class SubmitError(ValueError):
    """A job could not be sent; the message is for people."""


_Packages = list[str]


class _RuntimeEnv(BaseModel):
    """What a working directory may ask of Ray: nothing that uploads, or reads, what lies elsewhere on this machine."""

    model_config = ConfigDict(extra="forbid", strict=True)

    env_vars: dict[str, str | int | float | bool] = {}
    pip: _Packages | dict[str, object] | None = None
    uv: _Packages | dict[str, object] | None = None
    conda: Annotated[str, Field(pattern=r"^[\w-]+$")] | dict[str, object] | None = None
    excludes: list[str] | None = None
    config: dict[str, object] | None = None


def runtime_env(working_dir: Path) -> dict[str, object]:
    """Return Ray's runtime environment: the working directory's own cluster/runtime_env.yaml over what a job needs.

    Raises:
        SubmitError: the file cannot be read, or asks for what is not of the working directory.
    """
    path = working_dir / _RUNTIME_ENV
    asked = _RuntimeEnv()
    if path.exists() or path.is_symlink():
        try:
            tree = yaml12.load(files.read_text(path))
            asked = saved.checked({} if tree is None else tree, _RuntimeEnv, str(path))
        except FileNotFoundError:
            raise SubmitError(f"{path} is a link to nothing") from None
        except yaml12.YamlError as error:
            raise SubmitError(f"{path}:{error.line or 1}: cannot be read as YAML: {error}") from None
        except (files.FileError, saved.SavedError) as error:
            allowed = ", ".join(_RuntimeEnv.model_fields)
            raise SubmitError(f"{error}; a runtime environment has the keys {allowed}, and lists in place of files") from None
    env_vars = _ENV_VARS | _commit(working_dir) | {name: str(value) for name, value in asked.env_vars.items()}
    return asked.model_dump(exclude_unset=True) | {"working_dir": str(working_dir), "env_vars": env_vars}


def _commit(working_dir: Path) -> dict[str, str]:
    """Return the commit for the run's record, since the upload leaves .git behind; `-dirty` where the files are not its own.

    Git is asked for names and hashes alone: what compares files for it (monitors, filters) are programs that the folder's own
    configuration names.
    """
    commit = _git(working_dir, "rev-parse", "HEAD").strip()
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):
        return {}
    hashes = {}
    for entry in _git(working_dir, "ls-tree", "-r", "-z", "--full-tree", commit).split("\0"):
        about, _, name = entry.partition("\t")
        hashes[name] = about.split()[-1] if about else ""
    top = Path(_git(working_dir, "rev-parse", "--show-toplevel").strip() or working_dir)
    dirty = any(_blob(path, len(commit)) != hashes.get(os.path.relpath(path, top)) for path in _uploaded(working_dir))
    return {"STEERLAB_GIT_COMMIT": f"{commit}-dirty" if dirty else commit}


def _git(working_dir: Path, *arguments: str) -> str:
    """Return what git answers, with none of the folder's own programs; nothing where it is no repository."""
    command = ["git", "-C", str(working_dir), "-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", *arguments]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired, UnicodeDecodeError):
        return ""
    return found.stdout if found.returncode == 0 else ""


def _blob(path: Path, digits: int) -> str:
    """Return the hash that git has of a file."""
    content = os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
    made = hashlib.sha1 if digits == 40 else hashlib.sha256
    return made(b"blob %d\0" % len(content) + content).hexdigest()


def upload_sizes(working_dir: Path) -> dict[PurePosixPath, int]:
    """Return the bytes of every file that would be uploaded, by its path in the working directory. Raises SubmitError."""
    return {PurePosixPath(path.relative_to(working_dir)): path.stat().st_size for path in _uploaded(working_dir)}


def _uploaded(working_dir: Path) -> list[Path]:
    """Return the files that would be uploaded.

    Raises:
        SubmitError: a link leads to a folder or out of the directory, or something is no file.
    """
    found: list[Path] = []

    def note(path: Path) -> None:
        if path.is_symlink():
            _check_link(path, working_dir)
        if path.is_dir():
            _check_ignoring(path)
        elif path.is_file():
            found.append(path)
        elif path.exists():
            raise SubmitError(f"{path} is no file: name it in .rayignore (as in .gitignore)")

    _check_ignoring(working_dir, itself=True)
    obeys_gitignore = os.environ.get("RAY_RUNTIME_ENV_IGNORE_GITIGNORE", "0") != "1"
    quiet = logging.Logger("steerlab.upload", logging.CRITICAL + 1)  # what is refused is said in our own words
    private_parts.walk_upload(working_dir, note, quiet, obeys_gitignore=obeys_gitignore)
    return found


def _check_link(path: Path, working_dir: Path) -> None:
    """Refuse a link of which Ray would upload what it leads to: from elsewhere, or a whole folder again."""
    try:
        target = path.resolve()
    except (OSError, RuntimeError):
        raise SubmitError(f"{path} is a link to itself: remove it, or name it in .rayignore") from None
    if not target.is_relative_to(working_dir):
        raise SubmitError(f"{path} is a link to {target}, which would be uploaded: remove it, or name it in .rayignore")
    if target.is_dir():
        raise SubmitError(f"{path} is a link to a folder, which would be uploaded twice: remove it, or name it in .rayignore")


def _check_ignoring(folder: Path, *, itself: bool = False) -> None:
    """Refuse ignore files that are none in the folders within a folder, before Ray opens them; `itself`: in it, too."""
    try:
        children = [child for child in folder.iterdir() if child.is_dir() and not child.is_symlink()]
    except OSError as error:
        raise SubmitError(f"{folder}: {error.strerror}") from None
    for place in [*([folder] if itself else []), *children]:
        for name in _IGNORING:
            if (place / name).exists() and not (place / name).is_file():
                raise SubmitError(f"{place / name} is no file")


def check_upload(working_dir: Path, limit_bytes: int = UPLOAD_LIMIT_BYTES) -> int:
    """Return the bytes to upload. Raises SubmitError, naming the biggest folders, if they exceed `limit_bytes`."""
    sizes = upload_sizes(working_dir)
    _warn_of_secrets(sizes)
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


def _warn_of_secrets(sizes: Mapping[PurePosixPath, int]) -> None:
    private = [str(path) for path in sizes if _PRIVATE.fullmatch(path.name)]
    if private:
        more = f" and {len(private) - 3} more" if len(private) > 3 else ""
        warnings.warn(
            f"{', '.join(private[:3])}{more}: uploaded like any other file; name in .rayignore what is secret", stacklevel=2
        )
