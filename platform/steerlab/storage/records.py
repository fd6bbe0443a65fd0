"""Read and write small files below one ROOT on a pyarrow filesystem: JSON, texts and lines of JSON.

Paths are relative to ROOT. A write is atomic: readers see the old file or the new one, also if the writer is killed.
"""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path, PurePosixPath
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from steerlab.data.sources import SourceError, cache_root, remote
from steerlab.guards import files, texts, waiting
from steerlab.guards.json_values import Json
from steerlab.storage import exclusive
from steerlab.storage.errors import NotTextError, StoreError, existing_parent, explained_full_disk
from steerlab.storage.parted import Parted

_WITHOUT_FOLDERS = ("s3", "gcs", "abfs")
"""Types of file systems that write an object without a folder for it; making one costs several requests."""
_LONGEST = 2**30
"""Maximum size in bytes of a file that is read into memory."""


class Records:
    """The files below one ROOT."""

    def __init__(self, root: str) -> None:
        """Open the files below `root` without reading or writing there.

        Raises:
            ValueError: `root` is neither an absolute path nor a URI that pyarrow can open.
        """
        # ROOT has one spelling, because the cache of artifacts is named by it: "/a/" becomes "/a", but "/" stays.
        self.root = remote.joined(root) if root.strip("/") else root
        self._fs, self._base = _filesystem(self.root)
        self.is_local = isinstance(self._fs, pafs.LocalFileSystem)
        self._parted: dict[str, Parted] = {}

    def where(self, *parts: str) -> str:
        """Return the path or URI of something below ROOT, for messages and for libraries that open it themselves."""
        return remote.joined(self.root, *parts)

    def opened(self, *parts: str) -> tuple[pafs.FileSystem, str]:
        """Return ROOT's file system and the path of something on it, for libraries that read and write there themselves."""
        return self._fs, self._at(*parts)

    def on_disk(self, *parts: str) -> Path:
        """Return the path of something below a local ROOT."""
        assert self.is_local, "an object store has no paths"
        return Path(self._at(*parts))

    def write_json(self, relpath: str, obj: object) -> None:
        """Write `obj` as JSON. Raises ValueError if it holds a NaN or infinite number."""
        # Python would write NaN as a word that is not JSON and that browsers and other libraries refuse.
        self._write(relpath, json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False).encode())

    def write_text(self, relpath: str, text: str) -> None:
        """Write a text file in UTF-8."""
        self._write(relpath, text.encode())

    def write_bytes(self, relpath: str, content: bytes) -> None:
        """Write a file."""
        self._write(relpath, content)

    def create_json(self, relpath: str, obj: object) -> bool:
        """Write `obj` as JSON if the file does not exist; return whether this call wrote it. Of several callers one succeeds.

        Raises:
            ValueError: the package that an object store needs for it is not installed.
        """
        content = json.dumps(obj, allow_nan=False).encode()
        if self.is_local:
            return exclusive.write_file(self.on_disk(relpath), content)
        with self._answering():
            return exclusive.write_object(self.root, self._at(relpath), content)

    def remove(self, relpath: str) -> None:
        """Remove a file; nothing happens if it is absent."""
        with self._answering(), suppress(FileNotFoundError):
            self._fs.delete_file(self._at(relpath))

    def read_text(self, relpath: str) -> str:
        """Read a text file. Raises NotTextError if it is not UTF-8, FileNotFoundError if it is absent."""
        try:
            return self._read(relpath).decode()
        except UnicodeDecodeError as error:
            raise NotTextError(f"{self.where(relpath)} is not UTF-8 text (byte {error.start})") from None

    def read_json(self, relpath: str) -> Any:
        """Read a JSON file. Raises StoreError if it is not JSON, FileNotFoundError if it is absent."""
        return _parse(self._read(relpath), self.where(relpath))

    def read_bytes(self, relpath: str) -> bytes:
        """Read a file. Raises FileNotFoundError if it is absent, StoreError if it is not a file or is too large."""
        return self._read(relpath)

    def append_line(self, relpath: str, obj: object) -> None:
        """Append `obj` as one line of JSON. On a local ROOT several processes may append to a file, on an object store one."""
        self.append_lines(relpath, [obj])

    def append_lines(self, relpath: str, objects: Sequence[object]) -> None:
        """Append each object as a line of JSON. On an object store this is one request, however many lines there are."""
        lines = [json.dumps(obj, ensure_ascii=False, allow_nan=False).encode() for obj in objects]
        if not self.is_local:
            return self._parted_file(relpath).append(lines)
        path = Path(self._at(relpath))
        path.parent.mkdir(parents=True, exist_ok=True)
        content = b"".join(line + b"\n" for line in lines)
        with self._explain_full_disk(relpath, len(content)), files.appending(path) as file:
            # A killed writer may have written half a line. Without a line break, this line would be lost with it.
            if file.tell() and not _ends_in_newline(path):
                content = b"\n" + content
            files.write_all(file, content)

    def merge_lines(self, relpath: str) -> None:
        """Merge the appended lines into one file on an object store, which has them in several."""
        if not self.is_local:
            self._parted_file(relpath).merge()

    def read_lines(self, relpath: str) -> list[Any]:
        """Return the values that `append_line` wrote; [] if the file is absent.

        Lines that are not JSON are skipped: a killed writer may have written half a line.
        """
        if not self.is_local:
            lines = Parted(self, relpath).read()
        else:
            lines = self._read(relpath).splitlines() if self._is_file(self._at(relpath)) else []
        return [value for line in lines for value in _whole_values(line)]

    def _parted_file(self, relpath: str) -> Parted:
        return self._parted.setdefault(relpath, Parted(self, relpath))

    def list(self, relpath: str) -> list[str]:
        """Return the sorted names of the files and folders directly in a directory; [] if it is absent."""
        selector = pafs.FileSelector(self._at(relpath), allow_not_found=True)
        with self._answering():
            return sorted(PurePosixPath(info.path).name for info in self._fs.get_file_info(selector))

    def sizes(self, relpath: str) -> dict[str, int]:
        """Return the size in bytes of each file below a directory by its path relative to ROOT; {} if it is absent."""
        selector = pafs.FileSelector(self._at(relpath), recursive=True, allow_not_found=True)
        below = [info for info in self._fs.get_file_info(selector) if info.type == pafs.FileType.File]
        start = len(self._at().rstrip("/")) + 1
        return {info.path[start:]: info.size or 0 for info in below}

    def free_bytes(self) -> int | None:
        """Return the number of free bytes on ROOT's disk; None for an object store, which has no such limit."""
        return shutil.disk_usage(existing_parent(Path(self._base))).free if self.is_local else None

    def _at(self, *parts: str) -> str:
        return str(PurePosixPath(self._base, *parts))

    def _is_file(self, path: str) -> bool:
        with self._answering():
            return self._fs.get_file_info(path).type == pafs.FileType.File

    def _answering(self) -> AbstractContextManager[None]:
        """Announce in this context if an object store does not answer."""
        return nullcontext() if self.is_local else waiting.announced(f"ROOT {texts.without_secrets(self.root)}")

    def _read(self, relpath: str) -> bytes:
        path = self._at(relpath)
        with self._answering():
            info = self._fs.get_file_info(path)
        # Reading a pipe or a device would block or never end; a missing file raises FileNotFoundError below.
        if info.type not in (pafs.FileType.File, pafs.FileType.NotFound):
            raise StoreError(f"{self.where(relpath)} is not a file")
        if (info.size or 0) > _LONGEST:
            raise StoreError(f"{self.where(relpath)} has {info.size:,} bytes; the maximum is {_LONGEST:,}")
        with self._answering(), self._fs.open_input_stream(path) as stream:
            return stream.read()

    def _write(self, relpath: str, content: bytes) -> None:
        """Write a file that readers see whole or not at all."""
        path = self._at(relpath)
        if self._fs.type_name not in _WITHOUT_FOLDERS:
            with self._answering():
                self._fs.create_dir(str(PurePosixPath(path).parent), recursive=True)
        # An object appears when its upload ends. A file appears when it is opened, so it is written under another name.
        written = f"{path}.{uuid.uuid4().hex[:12]}" if self.is_local else path
        with self._explain_full_disk(relpath, len(content)):
            try:
                with self._answering(), self._fs.open_output_stream(written) as stream:
                    stream.write(content)
                if self.is_local:
                    os.replace(written, path)
            except OSError:
                # Half a file under a random name would otherwise never be removed.
                if self.is_local:
                    Path(written).unlink(missing_ok=True)
                raise

    def _temporary_folder(self) -> Path:
        # The folder is on ROOT's own disk, because a rename, which makes a commit atomic, does not work from one disk to
        # another.
        folder = Path(self._at("tmp")) if self.is_local else cache_root() / "tmp"
        if folder.is_symlink():
            raise StoreError(f"{folder} is a link; files in it are written and removed, so it has to be a folder inside ROOT")
        return folder

    def _explain_full_disk(self, what: str, num_bytes: int | None) -> AbstractContextManager[None]:
        """Turn the error of a full disk into a message (see `errors`)."""
        return explained_full_disk(what, self.root, self._temporary_folder(), num_bytes)


def _filesystem(root: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of a ROOT and the path on it. Raises ValueError for a relative path or an unknown scheme."""
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


def _ends_in_newline(path: Path) -> bool:
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"


def _parse(content: bytes, where: str) -> Json:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of nested brackets
        raise StoreError(f"{where} is not JSON: {one_line(error)}") from error


def _whole_values(line: bytes) -> list[Json]:
    try:
        return [json.loads(line)]
    except (ValueError, RecursionError):
        return []


def one_line(error: Exception) -> str:
    """Return the message of an error on one line."""
    return " ".join(str(error).split())
