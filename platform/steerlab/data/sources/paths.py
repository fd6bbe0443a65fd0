"""Sources that exist already: local paths, and URIs of the object stores that pyarrow can read."""

import hashlib
import json
import re
import shutil
from pathlib import Path, PurePosixPath

import pyarrow as pa
import pyarrow.fs as pafs

from steerlab.data.sources import remote
from steerlab.data.sources.cache import file_sha256, filled_once, nearby
from steerlab.job.grammar import Source, SourceError, local_path


def existing(source: Source) -> Path:
    """Return the local path of a source. Raises SourceError, which lists the nearest existing folder, if it does not exist."""
    path = local_path(source.name)
    if not path.exists():
        # A job's relative paths were made absolute when it was read, so the hint shows the relative form; the user may have
        # meant the name of a hub repository.
        here = Path.cwd()
        below = path.relative_to(here).as_posix() if path.is_relative_to(here) else ""
        hints = ["relative paths start from the folder in which the command runs"] if below else []
        hints += [f"for the hub write hf:{below}"] if re.fullmatch(r"[\w.-]+/[\w.-]+", below) else []
        hint = f" ({'; '.join(hints)})" if hints else ""
        raise SourceError(f"'{source.text}' does not exist{hint}; {nearby(path)}")
    if not path.is_file() and not path.is_dir():
        raise SourceError(f"'{source.text}' is neither a file nor a folder")
    return path


def fetch_path(source: Source, cache: Path) -> Path:
    """Return the path itself, which need not be copied. `cache` is unused."""
    return existing(source)


def _open(uri: str) -> tuple[pafs.FileSystem, str]:
    return remote.opened(uri)


def _remote(source: Source) -> tuple[pafs.FileSystem, str, list[pafs.FileInfo]]:
    """Return the file system of a URI, the path on it, and its files sorted by path."""
    try:
        filesystem, path = _open(source.name)
        info = filesystem.get_file_info(path)
        if info.type == pafs.FileType.File:
            return filesystem, path, [info]
        files = remote.files_below(filesystem, path)
    except (pa.ArrowInvalid, OSError) as error:
        raise SourceError(f"'{source.text}' cannot be read: {' '.join(str(error).split())}") from error
    if not files:
        raise SourceError(f"'{source.text}' does not exist")
    return filesystem, path, files


def listing_sha256(source: Source) -> str:
    """Return a SHA-256 over a URI and the names, sizes and modification times of its files."""
    listing = [(info.path, info.size, info.mtime_ns) for info in _remote(source)[2]]
    return hashlib.sha256(json.dumps([source.name, listing]).encode()).hexdigest()


def fetch_uri(source: Source, cache: Path) -> Path:
    """Return a local copy of the file or folder of a URI, downloaded again when its listing changes."""
    filesystem, path, files = _remote(source)
    root = cache / "uris" / listing_sha256(source)
    # The copy has the same name, because its ending decides how it is read.
    copy = root / PurePosixPath(path).name
    if not root.exists():
        with filled_once(root) as directory:
            target = directory / "content" / copy.name
            if files[0].path == path:
                target.parent.mkdir(parents=True)
                with filesystem.open_input_stream(path) as stream, target.open("wb") as file:
                    shutil.copyfileobj(stream, file, 1 << 22)
            else:
                remote.copy(filesystem, path, files, target)
    return copy


def content_sha256(path: Path) -> str:
    """Return a SHA-256 over the content of a file, or over the names and contents of a directory's files."""
    # The files are sorted, because the order of a directory differs between file systems.
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.sha256()
    for file in files:
        name = file.relative_to(path).as_posix() if path.is_dir() else ""
        state = file.stat()
        # The null character cannot be part of a name, so no two listings give the same bytes.
        digest.update(f"{name}\0{file_sha256(file, state.st_size, state.st_mtime_ns)}\n".encode())
    return digest.hexdigest()
