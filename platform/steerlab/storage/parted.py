"""A file of lines on an object store, which cannot append: the file, and beside it objects with the lines that follow.

    metrics.jsonl                      lines 0 to 99
    metrics.jsonl.parts/000000100      the lines from number 100 on that one call has appended

An object is named by the number of its first line. `merge` writes all lines into the file and then removes the objects; an
object that remains because the process died in between is recognised by its number, which is less than the file's lines. Only
one process appends.
"""

from __future__ import annotations

from typing import Protocol

MOST_PARTS = 64
"""Number of objects after which the next call merges them, because reading costs a request for each."""


class _Files(Protocol):
    """The required operations on the files below a ROOT."""

    def list(self, relpath: str) -> list[str]: ...
    def read_bytes(self, relpath: str) -> bytes: ...
    def write_bytes(self, relpath: str, content: bytes) -> None: ...
    def remove(self, relpath: str) -> None: ...


class Parted:
    """One file of lines with its parts."""

    def __init__(self, files: _Files, relpath: str) -> None:
        self._files, self._path, self._folder = files, relpath, f"{relpath}.parts"
        self._num_lines: int | None = None
        """Number of all lines; None before they were counted."""
        self._num_parts = 0

    def read(self) -> list[bytes]:
        """Return the lines; [] if the file does not exist."""
        try:
            lines = self._files.read_bytes(self._path).splitlines()
        except FileNotFoundError:
            lines = []
        for name in self._names():
            if int(name) >= len(lines):
                lines += self._files.read_bytes(f"{self._folder}/{name}").splitlines()
        return lines

    def append(self, lines: list[bytes]) -> None:
        """Append lines, with one request once the file has been read by this process."""
        if self._num_lines is None:
            self._num_lines, self._num_parts = len(self.read()), len(self._names())
        if self._num_parts >= MOST_PARTS:
            self.merge()
        self._files.write_bytes(f"{self._folder}/{self._num_lines:09d}", b"".join(line + b"\n" for line in lines))
        self._num_lines += len(lines)
        self._num_parts += 1

    def merge(self) -> None:
        """Merge the parts into the file, for readers that do not handle parts."""
        names = self._names()
        if names:
            self._files.write_bytes(self._path, b"".join(line + b"\n" for line in self.read()))
        for name in names:
            self._files.remove(f"{self._folder}/{name}")
        self._num_parts = 0

    def _names(self) -> list[str]:
        return [name for name in self._files.list(self._folder) if name.isascii() and name.isdigit()]
