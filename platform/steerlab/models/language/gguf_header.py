"""The header of a GGUF file, walked within the bounds of the file before a library reads it: counts there are only claims."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the types of numbers."""
_WHOLE = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
_TEXT, _ARRAY = 8, 9
_MOST_KEYS, _MOST_ITEMS, _MOST_TENSORS, _MOST_AXES = 10_000, 4_000_000, 100_000, 4
"""What a header may hold: its items are, above all, the words of a vocabulary with what belongs to each."""
_LONGEST_NAME = 2**16
_MAGIC, _SHORTEST = b"GGUF", 24


@dataclass
class Header:
    """What a file says of itself: whole numbers by their keys, and the number of elements of each tensor."""

    numbers: dict[str, int] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)


def read(path: Path) -> Header:
    """Walk the header of a GGUF file.

    Raises:
        ValueError: it claims more than the file holds, or than any model has.
    """
    if path.stat().st_size < _SHORTEST:
        raise ValueError(f"the GGUF file {path} cannot be read: it has {path.stat().st_size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Walk(path, content).header()


class _Walk:
    """A place in the file, which moves on; it never leaves the file."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content = path, content
        self._at, self._items = 0, 0

    def header(self) -> Header:
        found = Header()
        if self._take(4) != _MAGIC or self._number("<I") not in (2, 3):
            raise self._error("is no GGUF file of version 2 or 3")
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        if num_tensors > _MOST_TENSORS or num_keys > _MOST_KEYS:
            raise self._error(f"says that it has {num_tensors:,} tensors and {num_keys:,} keys; no model has as many")
        seen: set[str] = set()
        for _ in range(num_keys):
            key = self._name()
            if key in seen:
                raise self._error(f"has the key {key!r:.80} twice")
            seen.add(key)
            self._value(key, found)
        self._tensors(num_tensors, found)
        return found

    def _error(self, what: str) -> ValueError:
        return ValueError(f"the GGUF file {self._path} cannot be read: it {what}")

    def _skip(self, count: int) -> None:
        if count > len(self._content) - self._at:
            raise self._error(f"ends at byte {len(self._content):,}; its header says that {count:,} bytes follow {self._at:,}")
        self._at += count

    def _take(self, count: int) -> bytes:
        self._skip(count)
        return self._content[self._at - count : self._at]

    def _number(self, kind: str) -> int:
        return struct.unpack(kind, self._take(struct.calcsize(kind)))[0]

    def _name(self) -> str:
        length = self._number("<Q")
        if length > _LONGEST_NAME:
            raise self._error(f"has a name of {length:,} bytes; {_LONGEST_NAME:,} are enough")
        return self._take(length).decode(errors="replace")

    def _value(self, key: str, found: Header) -> None:
        kind = self._number("<I")
        if kind in _WHOLE:
            found.numbers[key] = self._number(_WHOLE[kind])
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _TEXT:
            self._skip(self._number("<Q"))
        elif kind == _ARRAY:
            self._array(key)
        else:
            raise self._error(f"has {key!r:.80} of type {kind}, which is unknown")

    def _array(self, key: str) -> None:
        kind, count = self._number("<I"), self._number("<Q")
        self._items += count
        if self._items > _MOST_ITEMS:
            raise self._error(f"says that {key!r:.80} has {count:,} items; a header has {_MOST_ITEMS:,} at most")
        if kind in _SIZES:
            self._skip(count * _SIZES[kind])
        elif kind == _TEXT:
            for _ in range(count):
                self._skip(self._number("<Q"))
        else:  # arrays of arrays are allowed by the format, and read by no library here
            raise self._error(f"has {key!r:.80}, an array of type {kind}, which is unknown")

    def _tensors(self, count: int, found: Header) -> None:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        ends: list[int] = []
        total = 0
        for _ in range(count):
            name, axes = self._name(), self._number("<I")
            if name in found.elements or axes > _MOST_AXES:
                raise self._error(f"has {name!r:.80} twice, or with {axes:,} axes; there are {_MOST_AXES} at most")
            elements = math.prod(self._number("<Q") for _ in range(axes))
            kind, offset = self._number("<I"), self._number("<Q")
            if kind not in set(GGMLQuantizationType):
                raise self._error(f"has {name!r:.80} of type {kind}, which is unknown")
            in_block, bytes_of_block = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            num_bytes = elements * bytes_of_block // in_block
            found.elements[name] = elements
            total += num_bytes
            ends.append(offset + num_bytes)
        left = len(self._content) - self._at
        if max(ends, default=0) > left or total > left:
            raise self._error(f"says that its tensors have {total:,} bytes up to {max(ends):,}; {left:,} follow the header")
