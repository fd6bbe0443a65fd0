"""Lines and bytes of files, compressed or not.

The first bytes say whether and how a file is compressed, not its ending: a `.jsonl.gz` that was unpacked on its way is read.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import math
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias

import pyarrow as pa

from steerlab.job.grammar import SourceError

SUFFIXES = (".gz", ".bz2", ".xz", ".zst")
"""Endings of compressed files, behind the one that says what they hold."""


_LONGEST_LINE = 2**28
_LONGEST_BYTES = 2**31
_MOST_RATIO = 1_000
"""What a small file may unpack to before it counts as one that was made to fill the memory, and any for each of its bytes."""
_LINE = 60
"""What a line takes beside its characters."""


_Opener: TypeAlias = Callable[[Path], Any]
"""Opens a file for its unpacked bytes; the files of the libraries have no class in common."""


def _zstd(path: Path) -> pa.CompressedInputStream:
    return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")


_OPENERS: tuple[tuple[re.Pattern[bytes], _Opener], ...] = (
    (re.compile(rb"\x1f\x8b"), gzip.open),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.open),
    (re.compile(rb"\xfd7zXZ\x00"), lzma.open),
    (re.compile(rb"\x28\xb5\x2f\xfd"), _zstd),
)
# Bytes that are no UTF-8 stand in a decoded line as these characters, which UTF-8 itself cannot write.
_NO_UTF8 = re.compile("[\udc80-\udcff]+")


def data_suffix(path: Path) -> tuple[str, str]:
    """Return the ending that says what a file holds, and that of its compression or '', both in lower case."""
    name = Path(path.name.lower())
    return (Path(name.stem).suffix, name.suffix) if name.suffix in SUFFIXES else (name.suffix, "")


def is_compressed(path: Path) -> bool:
    """Say whether a file begins as a compressed one does."""
    return _opener(path) is not None


def _opener(path: Path) -> _Opener | None:
    with path.open("rb") as file:
        begin = file.read(16)
    return next((opener for magic, opener in _OPENERS if magic.match(begin)), None)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file, unpacked. Raises SourceError, also while it is read, if it is damaged or ends too early."""
    opener = _opener(path)
    try:
        with path.open("rb") if opener is None else opener(path) as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, OSError) as error:
        if opener is None:
            raise
        raise SourceError(f"{path.name} is damaged or not whole: {' '.join(str(error).split())}") from error


def lines(path: Path) -> Iterator[str]:
    """Yield a file's lines with their ends, byte order marks left out.

    Raises:
        SourceError: bytes are no UTF-8, or a small file unpacks to lines without end.
    """
    left = max(_LONGEST_BYTES, _MOST_RATIO * path.stat().st_size) if is_compressed(path) else math.inf
    with opened(path) as file, io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="") as decoded:
        for number, line in enumerate(iter(lambda: decoded.readline(_LONGEST_LINE), ""), 1):
            if len(line) >= _LONGEST_LINE:
                raise SourceError(f"{path.name} line {number} has more than {_LONGEST_LINE:,} characters")
            left -= len(line) + _LINE
            if left < 0:
                raise SourceError(
                    f"{path.name} unpacks to more than {number - 1:,} lines, as if it had no end: give the unpacked file"
                )
            if not line.isascii() and (bad := _NO_UTF8.search(line)):
                raise SourceError(f"{path.name} line {number} is not UTF-8: {_bytes(line, bad)}; save the file as UTF-8")
            yield line.lstrip("\ufeff")


def whole(path: Path, longest: int = 2**30) -> str:
    """Return the text of a file. Raises SourceError where it is damaged, or has more characters than fit into memory."""
    found, length = [], 0
    for line in lines(path):
        found.append(line)
        length += len(line)
        if length > longest:
            raise SourceError(f"{path.name} has more than {longest:,} characters, and is read at once: write JSON lines")
    return "".join(found)


def in_memory(path: Path) -> bytes:
    """Return the unpacked bytes of a compressed file. Raises SourceError where it is damaged, or they are too many."""
    with opened(path) as file:
        content = file.read(_LONGEST_BYTES + 1)
    if len(content) > _LONGEST_BYTES:
        raise SourceError(f"{path.name} has more than {_LONGEST_BYTES:,} bytes when it is unpacked: give the unpacked file")
    return content


def _bytes(line: str, bad: re.Match[str]) -> str:
    found = bad.group().encode("utf-8", "surrogateescape")
    if bad.start() == 0 and found[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "it begins as UTF-16 does"
    return f"the byte {found[:1].hex()} behind {line[max(0, bad.start() - 20) : bad.start()]!r}"
