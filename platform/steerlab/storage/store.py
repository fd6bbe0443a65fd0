"""Keep artifacts on a pyarrow filesystem: whole or absent, whoever is killed and whenever.

    ROOT/artifacts/<stage>/<key>/   files and manifest.json; a directory without a manifest does not exist
    ROOT/work/<stage>/<key>/        what must survive a kill (training checkpoints), until the artifact is committed
    ROOT/tmp/                       directories being filled (a local ROOT only; otherwise they lie in the cache)

On a local ROOT a commit is one rename. Object stores have no rename: the manifest is uploaded last, and two writers of
one key at once are kept apart by the claims of the plan, not here.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.fs as pafs

from steerlab.data.sources import SourceError, cache_root, remote
from steerlab.guards import files
from steerlab.guards.files import FileError, check_links, escapes

MANIFEST = "manifest.json"
SCHEMA = 1
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


_LONGEST = 2**30
"""Bytes of a file that is read whole."""
_MADE_HERE = re.compile(r"^[a-z_]+-[0-9a-z]{1,12}(-[0-9a-f]{12})?$")
"""Names of temporary directories: of what lies in ROOT/tmp, nothing else is removed."""


class StoreError(OSError):
    """An artifact could not be written or read; the message is one line for people."""


class Store:
    """The artifacts, work directories and run records below one ROOT."""

    def __init__(self, root: str) -> None:
        """Point at `root`, an absolute path or a URI, without touching it. Raises ValueError if it is neither."""
        self.root = root.rstrip("/") if root.strip("/") else root
        self._fs, self._base = _filesystem(self.root)
        self.is_local = isinstance(self._fs, pafs.LocalFileSystem)

    @classmethod
    def open(cls, root: str) -> Self:
        """Return the store at `root`, made if it is not there. Raises ValueError if it cannot be written."""
        store = cls(root)
        probe = f"tmp/probe-{uuid.uuid4().hex}"
        try:
            store.write_json(probe, {})
            store._fs.delete_file(store._at(probe))
        except OSError as error:
            raise ValueError(f"ROOT '{root}' cannot be written: {_one_line(error)}") from error
        return store

    # Artifacts

    def path(self, stage: str, key: str) -> str:
        """Return where the artifact lies (or would lie), as a path on the filesystem."""
        if escapes(stage) or escapes(key):
            raise StoreError(f"{stage!r:.40}/{key!r:.80} is no artifact: it lies outside of {self.root}")
        return self._at("artifacts", stage, key)

    def has(self, stage: str, key: str) -> bool:
        """Say whether the artifact is there, whole."""
        return self._is_file(f"{self.path(stage, key)}/{MANIFEST}")

    def manifest(self, stage: str, key: str) -> dict[str, Any]:
        """Return stage, key, meta, files (path, bytes, sha256), schema.

        Raises:
            StoreError: there is no artifact, or its manifest is none: one whose paths lead out of the artifact among them.
        """
        if not self.has(stage, key):
            raise StoreError(f"there is no artifact {stage}/{key} in {self.root}")
        manifest = self.read_json(f"artifacts/{stage}/{key}/{MANIFEST}")
        _check_manifest(manifest, self.path(stage, key))
        return manifest

    def local(self, stage: str, key: str) -> Path:
        """Return a local directory with the artifact: itself, or a verified copy in the cache.

        Sizes are compared with the manifest each time, SHA-256 sums when a copy is downloaded.

        Raises:
            StoreError: the artifact is absent, or a file of it is missing or differs from the manifest.
        """
        manifest = self.manifest(stage, key)
        if self.is_local:
            directory = Path(self.path(stage, key))
            _check_sizes(directory, manifest)
            return directory
        name = hashlib.sha256(self.root.encode()).hexdigest()[:16]
        copy = cache_root() / "artifacts" / name / stage / key
        if not copy.exists():
            self._download(manifest, copy)
        _check_sizes(copy, manifest)
        return copy

    def commit(self, stage: str, key: str, directory: Path, meta: dict[str, Any]) -> None:
        """Make `directory` the artifact, with `meta` in its manifest, in one step that cannot be seen half done.

        A directory from `temporary` is moved, not copied. If another process has committed the same key in the
        meantime, its artifact stays and this one is discarded.

        Raises:
            StoreError: the disk is full.
        """
        if self.has(stage, key):
            return
        manifest = {"stage": stage, "key": key, "meta": meta, "files": _listing(directory), "schema": SCHEMA}
        num_bytes = sum(file["bytes"] for file in manifest["files"])
        with self._explain_full_disk(f"artifact {stage}/{key}", num_bytes):
            if self.is_local:
                self._commit_by_rename(directory, Path(self.path(stage, key)), manifest)
            else:
                self._commit_by_upload(directory, self.path(stage, key), manifest)

    @contextmanager
    def temporary(self, stage: str, key: str) -> Iterator[Path]:
        """Give an empty local directory, on ROOT's own disk if ROOT is local; it is removed on any exit.

        Raises:
            StoreError: the disk filled up while the directory was being filled.
        """
        directory = self._temporary_folder() / f"{stage}-{key[:12]}-{uuid.uuid4().hex[:12]}"
        try:
            with self._explain_full_disk(f"artifact {stage}/{key}", None):
                directory.mkdir(parents=True)
                yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def sweep_temporary(self, older_than_s: float) -> int:
        """Remove temporary directories in which nothing was written for `older_than_s`; return how many."""
        limit_s = time.time() - older_than_s
        old = [
            path
            for path in self._temporary_folder().glob("*")
            if _MADE_HERE.search(path.name) and path.is_dir() and not path.is_symlink() and _last_write_s(path) < limit_s
        ]
        for path in old:
            shutil.rmtree(path)
        return len(old)

    # Work that survives a kill

    def work(self, stage: str, key: str) -> str:
        """Return the work directory of a stage as an absolute path or a URI; made if it is not there.

        Raises:
            SourceError: on an object store, a name in it leads out of it; libraries copy checkpoints from there as they lie.
            FileError: on a disk, it is a link or holds one; libraries write, read and remove what lies there.
        """
        path = self._at("work", stage, key)
        if self.is_local:
            if Path(path).parent.is_symlink():
                raise FileError(f"{Path(path).parent} is a link, and files are written and removed below it: remove it")
            check_links(Path(path))
        self._fs.create_dir(path, recursive=True)
        if not self.is_local:
            remote.files_below(self._fs, path)
        return _join(self.root, "work", stage, key)

    def move_from_work(self, stage: str, key: str, folder: str, directory: Path) -> None:
        """Move what workers left in a folder of the work directory into a local directory (a copy from an object store)."""
        path = self._at("work", stage, key, folder)
        with self._explain_full_disk(f"artifact {stage}/{key}", None):
            if not self.is_local:
                return remote.copy(self._fs, path, remote.files_below(self._fs, path), directory)
            for item in Path(path).iterdir():
                shutil.move(item, directory / item.name)

    def discard_work(self, stage: str, key: str) -> None:
        """Remove the work directory of a stage, if there is one."""
        path = self._at("work", stage, key)
        if self._fs.get_file_info(path).type == pafs.FileType.Directory:
            self._fs.delete_dir(path)

    # Records: paths are relative to ROOT

    def write_json(self, relpath: str, obj: Any) -> None:
        """Write `obj` as JSON; a reader sees the old file or the new one, never a part."""
        self._write(relpath, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False).encode())

    def write_text(self, relpath: str, text: str) -> None:
        """Write a text file, whole or not at all."""
        self._write(relpath, text.encode())

    def write_bytes(self, relpath: str, content: bytes) -> None:
        """Write a file, whole or not at all."""
        self._write(relpath, content)

    def read_text(self, relpath: str) -> str:
        """Read a text file. Raises StoreError if it is not UTF-8, FileNotFoundError if it is absent."""
        try:
            return self._read(relpath).decode()
        except UnicodeDecodeError as error:
            raise StoreError(f"{self.root}/{relpath} is no UTF-8 text (byte {error.start})") from None

    def read_json(self, relpath: str) -> Any:
        """Read a JSON file. Raises StoreError if it is not JSON, FileNotFoundError if it is absent."""
        return _parse(self._read(relpath), f"{self.root}/{relpath}")

    def read_bytes(self, relpath: str) -> bytes:
        """Read a file below ROOT whole."""
        return self._read(relpath)

    def append_line(self, relpath: str, obj: Any) -> None:
        """Append `obj` as one line of JSON. An object store rewrites the file: keep one writer a file there."""
        line = json.dumps(obj, ensure_ascii=False, allow_nan=False).encode() + b"\n"
        if not self.is_local:
            before = self._read(relpath) if self._is_file(self._at(relpath)) else b""
            return self._write(relpath, before + line)
        path = Path(self._at(relpath))
        path.parent.mkdir(parents=True, exist_ok=True)
        with self._explain_full_disk(relpath, len(line)), files.appending(path) as file:
            # A writer that was killed may have left half a line: it must not swallow this one.
            if file.tell() and not _ends_in_newline(path):
                line = b"\n" + line
            file.write(line)

    def read_lines(self, relpath: str) -> list[Any]:
        """Read what `append_line` wrote, without a line that a killed writer left unfinished; [] if absent."""
        if not self._is_file(self._at(relpath)):
            return []
        return [value for line in self._read(relpath).splitlines() for value in _whole_values(line)]

    def list(self, relpath: str) -> list[str]:
        """Return the sorted names of what lies directly in a directory; [] if it is absent."""
        selector = pafs.FileSelector(self._at(relpath), allow_not_found=True)
        return sorted(PurePosixPath(info.path).name for info in self._fs.get_file_info(selector))

    def free_bytes(self) -> int | None:
        """Return the free bytes on ROOT's disk; None where that has no meaning (an object store)."""
        return shutil.disk_usage(_existing_parent(Path(self._base))).free if self.is_local else None

    # Inner parts

    def _at(self, *parts: str) -> str:
        return str(PurePosixPath(self._base, *parts))

    def _is_file(self, path: str) -> bool:
        return self._fs.get_file_info(path).type == pafs.FileType.File

    def _read(self, relpath: str) -> bytes:
        path = self._at(relpath)
        info = self._fs.get_file_info(path)
        if info.type not in (pafs.FileType.File, pafs.FileType.NotFound):
            raise StoreError(f"{self.root}/{relpath} is not a file")
        if (info.size or 0) > _LONGEST:
            raise StoreError(f"{self.root}/{relpath} has {info.size:,} bytes; such a file has {_LONGEST:,} at most")
        with self._fs.open_input_stream(path) as stream:
            return stream.read()

    def _write(self, relpath: str, content: bytes) -> None:
        path = self._at(relpath)
        self._fs.create_dir(str(PurePosixPath(path).parent), recursive=True)
        # An object appears when its upload ends; a file needs the detour over another name.
        written = f"{path}.{uuid.uuid4().hex[:12]}" if self.is_local else path
        with self._explain_full_disk(relpath, len(content)):
            try:
                with self._fs.open_output_stream(written) as stream:
                    stream.write(content)
                if self.is_local:
                    os.replace(written, path)
            except OSError:
                if self.is_local:
                    Path(written).unlink(missing_ok=True)
                raise

    def _temporary_folder(self) -> Path:
        folder = Path(self._at("tmp")) if self.is_local else cache_root() / "tmp"
        if folder.is_symlink():
            raise StoreError(
                f"{folder} is a link; what lies there is written and removed, so it has to be a folder of ROOT's own"
            )
        return folder

    def _commit_by_rename(self, directory: Path, target: Path, manifest: dict[str, Any]) -> None:
        if not directory.is_relative_to(self._temporary_folder()):
            with self.temporary(manifest["stage"], manifest["key"]) as staging:
                for file in manifest["files"]:
                    (staging / file["path"]).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(directory / file["path"], staging / file["path"])
                return self._commit_by_rename(staging, target, manifest)
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False))
        for path in (*(path for path in directory.rglob("*")), directory):
            _sync(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(directory, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if self.has(manifest["stage"], manifest["key"]):
                return shutil.rmtree(directory)
            # Left by a copy that was cut short: it has no manifest, so it does not count.
            os.rename(target, self._temporary_folder() / f"incomplete-{uuid.uuid4().hex[:12]}")
            os.rename(directory, target)
        _sync(target.parent)

    def _commit_by_upload(self, directory: Path, target: str, manifest: dict[str, Any]) -> None:
        for file in manifest["files"]:
            destination = f"{target}/{file['path']}"
            self._fs.create_dir(str(PurePosixPath(destination).parent), recursive=True)
            with (directory / file["path"]).open("rb") as source, self._fs.open_output_stream(destination) as stream:
                shutil.copyfileobj(source, stream, 1 << 22)
        self.write_json(f"artifacts/{manifest['stage']}/{manifest['key']}/{MANIFEST}", manifest)

    def _download(self, manifest: dict[str, Any], copy: Path) -> None:
        stage, key = manifest["stage"], manifest["key"]
        with self.temporary(stage, key) as staging:
            for file in manifest["files"]:
                self._download_file(self.path(stage, key), file, staging / file["path"])
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(staging, copy)
            except OSError as error:  # another process was faster
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise

    def _download_file(self, artifact: str, file: dict[str, Any], local: Path) -> None:
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._fs.open_input_stream(f"{artifact}/{file['path']}") as stream, local.open("wb") as target:
                shutil.copyfileobj(stream, target, 1 << 22)
        except FileNotFoundError as error:
            raise _damaged(artifact, file["path"], "is missing") from error
        if _sha256(local) != file["sha256"]:
            raise _damaged(artifact, file["path"], "has another SHA-256 than its manifest says")

    @contextmanager
    def _explain_full_disk(self, what: str, num_bytes: int | None) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in _FULL_DISK:
                raise
            free = shutil.disk_usage(_existing_parent(self._temporary_folder())).free
            needed = "" if num_bytes is None else f"{num_bytes:,} bytes needed, "
            raise StoreError(f"no space left for {what} in {self.root}: {needed}{free:,} bytes free") from error


def _filesystem(root: str) -> tuple[pafs.FileSystem, str]:
    if root.startswith("/"):
        return pafs.LocalFileSystem(), root
    if "://" not in root:
        raise ValueError(
            f"ROOT '{root}' is a relative path: give an absolute path ('{Path(root).expanduser().absolute()}')"
            " or a URI (s3://bucket/folder)"
        )
    try:
        return remote.opened(root)
    except SourceError as error:
        raise ValueError(f"ROOT {error}") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"ROOT '{root}' is not a URI that pyarrow can open: {_one_line(error)}") from error


def _join(root: str, *parts: str) -> str:
    if root.startswith("/"):
        return str(PurePosixPath(root, *parts))
    # Options such as ?endpoint_override=... stand behind the path.
    uri = urlsplit(root)
    return urlunsplit(uri._replace(path="/".join((uri.path.rstrip("/"), *parts))))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _listing(directory: Path) -> list[dict[str, Any]]:
    paths = sorted(path for path in directory.rglob("*") if path.is_file() and path != directory / MANIFEST)
    return [
        {"path": path.relative_to(directory).as_posix(), "bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in paths
    ]


def _check_manifest(manifest: Any, artifact: str) -> None:
    """Refuse what is no manifest: whoever may write into ROOT may have left it there."""
    files = manifest.get("files") if isinstance(manifest, dict) else None
    if not isinstance(files, list) or not isinstance(manifest.get("meta"), dict):
        raise StoreError(f"artifact {artifact} is damaged: its {MANIFEST} names neither files nor meta")
    for file in files:
        types = {"path": str, "bytes": int, "sha256": str}
        if not isinstance(file, dict) or not all(isinstance(file.get(name), kind) for name, kind in types.items()):
            raise StoreError(f"artifact {artifact} is damaged: its {MANIFEST} describes a file by {file!r:.100}")
        if escapes(file["path"]) or not file["path"]:
            raise StoreError(f"artifact {artifact} is damaged: its {MANIFEST} names {file['path']!r:.100}, outside of it")


def _check_sizes(directory: Path, manifest: dict[str, Any]) -> None:
    for file in manifest["files"]:
        path = directory / file["path"]
        if not path.is_file():
            raise _damaged(directory, file["path"], "is missing")
        if (size := path.stat().st_size) != file["bytes"]:
            raise _damaged(directory, file["path"], f"has {size:,} bytes, its manifest says {file['bytes']:,}")


def _damaged(directory: Path | str, file: str, what: str) -> StoreError:
    return StoreError(f"artifact {directory} is damaged: {file} {what}; remove the directory and it is made again")


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _last_write_s(path: Path) -> float:
    times_s = [0.0]
    for entry in (path, *path.rglob("*")):
        try:
            times_s.append(entry.lstat().st_mtime)
        except FileNotFoundError:  # its owner is at work: not old
            return time.time()
    return max(times_s)


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _parse(content: bytes, where: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where} is not JSON: {_one_line(error)}") from error


def _whole_values(line: bytes) -> list[Any]:
    try:
        return [json.loads(line)]
    except (ValueError, RecursionError):
        return []


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
