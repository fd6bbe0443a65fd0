"""Files below one ROOT on a pyarrow filesystem: JSON, texts and lines, whole or not at all. Paths are relative to ROOT."""

from __future__ import annotations

import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from steerlab.data.sources import SourceError, cache_root, remote
from steerlab.guards import files
from steerlab.guards.json_values import Json

_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
_LONGEST = 2**30
"""Bytes of a file that is read whole."""


class StoreError(OSError):
    """An artifact or a record could not be written or read; the message is one line for people."""


class Records:
    """The files below one ROOT."""

    def __init__(self, root: str) -> None:
        """Point at `root`, an absolute path or a URI, without touching it. Raises ValueError if it is neither."""
        self.root = root.rstrip("/") if root.strip("/") else root
        self._fs, self._base = _filesystem(self.root)
        self.is_local = isinstance(self._fs, pafs.LocalFileSystem)

    def write_json(self, relpath: str, obj: object) -> None:
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
        """Read a JSON file, of whatever shape. Raises StoreError if it is not JSON, FileNotFoundError if it is absent."""
        return _parse(self._read(relpath), f"{self.root}/{relpath}")

    def read_bytes(self, relpath: str) -> bytes:
        """Read a file below ROOT whole."""
        return self._read(relpath)

    def append_line(self, relpath: str, obj: object) -> None:
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
        raise ValueError(f"ROOT '{root}' is not a URI that pyarrow can open: {one_line(error)}") from error


def _existing_parent(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _parse(content: bytes, where: str) -> Json:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{where} is not JSON: {one_line(error)}") from error


def _whole_values(line: bytes) -> list[Json]:
    try:
        return [json.loads(line)]
    except (ValueError, RecursionError):
        return []


def one_line(error: Exception) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(error).split())
