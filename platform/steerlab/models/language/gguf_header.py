"""Read the header of a GGUF file with bounds, before a library reads it.

The library `gguf` trusts the counts in a header, so a damaged or malicious file could fill the memory. Format:
https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass, field
from pathlib import Path

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of each number type, by its code in the file."""
_WHOLE = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 10: "<Q", 11: "<q"}
"""Formats (see `struct`) of the types of whole numbers."""
_TEXT, _ARRAY = 8, 9
"""Codes of the types text and array."""
_MOST_KEYS, _MOST_ITEMS, _MOST_TENSORS, _MOST_AXES = 10_000, 4_000_000, 100_000, 4
"""Largest counts in a header. Most items are tokens of the vocabulary, with a score and a type for each."""
_LONGEST_NAME = 2**16
"""Largest number of bytes of a key or of a tensor's name."""
_MAGIC, _SHORTEST = b"GGUF", 24
"""First bytes of a file, and the bytes of the fixed part of its header."""


@dataclass
class Header:
    """The parts of a GGUF header that the checks of `loadable.py` need."""

    numbers: dict[str, int] = field(default_factory=dict)
    """Values of the keys that hold whole numbers."""
    elements: dict[str, int] = field(default_factory=dict)
    """Number of elements of each tensor, by its name."""


def read(path: Path) -> Header:
    """Read the header of a GGUF file.

    Raises:
        ValueError: The header claims more than the file holds, or more than any model has.
    """
    if path.stat().st_size < _SHORTEST:
        raise ValueError(f"the GGUF file {path} cannot be read: it has {path.stat().st_size} bytes")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _Reader(path, content).header()


class _Reader:
    """Reads a file from its start; raises ValueError instead of reading beyond its end."""

    def __init__(self, path: Path, content: mmap.mmap) -> None:
        self._path, self._content = path, content
        self._at, self._items = 0, 0

    def header(self) -> Header:
        header = Header()
        # Version 1 has counts of 32 bits, and in a big-endian file the version is parsed as another number. Both are refused
        # here.
        if self._take(4) != _MAGIC or self._number("<I") not in (2, 3):
            raise self._error("is not a GGUF file of version 2 or 3")
        num_tensors, num_keys = self._number("<Q"), self._number("<Q")
        if num_tensors > _MOST_TENSORS or num_keys > _MOST_KEYS:
            raise self._error(f"claims {num_tensors:,} tensors and {num_keys:,} keys; no model has as many")
        seen: set[str] = set()
        for _ in range(num_keys):
            key = self._name()
            # If a key occurs twice, a library may take another value than the one that was checked.
            if key in seen:
                raise self._error(f"has the key {key!r:.80} twice")
            seen.add(key)
            self._value(key, header)
        self._tensors(num_tensors, header)
        return header

    def _error(self, what: str) -> ValueError:
        return ValueError(f"the GGUF file {self._path} cannot be read: it {what}")

    def _skip(self, count: int) -> None:
        if count > len(self._content) - self._at:
            raise self._error(
                f"ends at byte {len(self._content):,}; its header claims that {count:,} bytes follow {self._at:,}"
            )
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

    def _value(self, key: str, header: Header) -> None:
        """Read the value of a key: whole numbers are stored, all others skipped."""
        kind = self._number("<I")
        if kind in _WHOLE:
            header.numbers[key] = self._number(_WHOLE[kind])
        elif kind in _SIZES:
            self._skip(_SIZES[kind])
        elif kind == _TEXT:
            self._skip(self._number("<Q"))
        elif kind == _ARRAY:
            self._array(key)
        else:
            raise self._error(f"has {key!r:.80} of type {kind}, which is unknown")

    def _array(self, key: str) -> None:
        """Skip an array, item by item if its items have lengths of their own."""
        kind, count = self._number("<I"), self._number("<Q")
        # The items of all arrays are counted together, because many arrays of an allowed size would take as long as one that is
        # too large.
        self._items += count
        if self._items > _MOST_ITEMS:
            raise self._error(f"claims {count:,} items for {key!r:.80}; the maximum of a header is {_MOST_ITEMS:,}")
        if kind in _SIZES:
            self._skip(count * _SIZES[kind])
        elif kind == _TEXT:
            for _ in range(count):
                self._skip(self._number("<Q"))
        else:  # the format allows arrays of arrays, but no model uses them
            raise self._error(f"has {key!r:.80}, an array of type {kind}, which is unknown")

    def _tensors(self, count: int, header: Header) -> None:
        """Read the list of tensors, and raise ValueError if they would reach beyond the file."""
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

        ends: list[int] = []
        total = 0
        for _ in range(count):
            name, axes = self._name(), self._number("<I")
            if name in header.elements or axes > _MOST_AXES:
                raise self._error(f"has {name!r:.80} twice, or with {axes:,} axes; the maximum is {_MOST_AXES}")
            elements = math.prod(self._number("<Q") for _ in range(axes))
            kind, offset = self._number("<I"), self._number("<Q")
            if kind not in set(GGMLQuantizationType):
                raise self._error(f"has {name!r:.80} of type {kind}, which is unknown")
            # Quantised types store blocks of elements with a common scale.
            in_block, bytes_of_block = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            num_bytes = elements * bytes_of_block // in_block
            header.elements[name] = elements
            total += num_bytes
            ends.append(offset + num_bytes)
        # Offsets count from the end of the header, rounded up to the alignment; `left` contains that padding, so the bound is a
        # few bytes too generous. The total is also checked, because tensors could share the same bytes.
        left = len(self._content) - self._at
        if max(ends, default=0) > left or total > left:
            raise self._error(f"claims that its tensors have {total:,} bytes up to {max(ends):,}; {left:,} follow the header")
