"""Read the lines and bytes of files, compressed or not.

Compression is recognised by the first bytes of a file, not by its ending: HTTP clients and file systems may have unpacked a
`.jsonl.gz` without renaming it.
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
"""Endings of compressed files, which follow the ending of their content: `.jsonl.gz`."""


_LONGEST_LINE = 2**28
"""Characters of a line."""
_LONGEST_BYTES = 2**31
"""Bytes that any compressed file may unpack to; a decompression bomb unpacks to more."""
_MOST_RATIO = 1_000
"""Bytes that a file may unpack to for each of its own, if that is more than `_LONGEST_BYTES`."""
_LINE = 60
"""Overhead of a line in bytes: a file of empty lines takes memory too."""


_Opener: TypeAlias = Callable[[Path], Any]
"""Opens a file of uncompressed bytes. Its result is Any: the file objects of the libraries share no class."""


def _zstd(path: Path) -> pa.CompressedInputStream:
    # Python 3.11 has no zstd in its standard library; pyarrow is a dependency anyway.
    return pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")


_OPENERS: tuple[tuple[re.Pattern[bytes], _Opener], ...] = (
    (re.compile(rb"\x1f\x8b"), gzip.open),
    (re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"), bz2.open),
    (re.compile(rb"\xfd7zXZ\x00"), lzma.open),
    (re.compile(rb"\x28\xb5\x2f\xfd"), _zstd),
)
# `errors="surrogateescape"` decodes bytes that are not UTF-8 to these characters, which valid UTF-8 cannot contain.
_NO_UTF8 = re.compile("[\udc80-\udcff]+")


def data_suffix(path: Path) -> tuple[str, str]:
    """Return the endings of a file's content and of its compression ('' if none), in lower case: ('.jsonl', '.gz')."""
    name = Path(path.name.lower())
    return (Path(name.stem).suffix, name.suffix) if name.suffix in SUFFIXES else (name.suffix, "")


def is_compressed(path: Path) -> bool:
    """Return whether the first bytes of a file are those of a compressed one."""
    return _opener(path) is not None


def _opener(path: Path) -> _Opener | None:
    with path.open("rb") as file:
        begin = file.read(16)
    return next((opener for magic, opener in _OPENERS if magic.match(begin)), None)


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file of uncompressed bytes. Raises SourceError, also while the caller reads, if the archive is damaged."""
    opener = _opener(path)
    try:
        with path.open("rb") if opener is None else opener(path) as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, OSError) as error:
        if opener is None:
            raise
        raise SourceError(f"{path.name} is damaged or incomplete: {' '.join(str(error).split())}") from error


def lines(path: Path) -> Iterator[str]:
    """Yield the lines of a file with their line breaks, without byte order marks.

    Raises:
        SourceError: a line is not UTF-8 or too long, or a small file unpacks to too many lines.
    """
    # An uncompressed file cannot be larger than the disk, so only compressed ones are limited.
    left = max(_LONGEST_BYTES, _MOST_RATIO * path.stat().st_size) if is_compressed(path) else math.inf
    with opened(path) as file, io.TextIOWrapper(file, "utf-8", errors="surrogateescape", newline="") as decoded:
        # `readline` has a limit; iterating over the file would read a line of any length into memory.
        for number, line in enumerate(iter(lambda: decoded.readline(_LONGEST_LINE), ""), 1):
            if len(line) >= _LONGEST_LINE:
                raise SourceError(f"{path.name} line {number} has more than {_LONGEST_LINE:,} characters")
            left -= len(line) + _LINE
            if left < 0:
                raise SourceError(
                    f"{path.name} unpacks to more than {number - 1:,} lines, which is the limit: give the unpacked file"
                )
            if not line.isascii() and (bad := _NO_UTF8.search(line)):
                raise SourceError(f"{path.name} line {number} is not UTF-8: {_bytes(line, bad)}; save the file as UTF-8")
            # Files that were concatenated may have a byte order mark in the middle.
            yield line.lstrip("\ufeff")


def whole(path: Path, longest: int = 2**30) -> str:
    """Return the text of a file. Raises SourceError if it is damaged or has more than `longest` characters."""
    all_lines, length = [], 0
    for line in lines(path):
        all_lines.append(line)
        length += len(line)
        if length > longest:
            raise SourceError(
                f"{path.name} has more than {longest:,} characters, and is read into memory as a whole: write JSON lines"
            )
    return "".join(all_lines)


def in_memory(path: Path) -> bytes:
    """Return the uncompressed bytes of a file. Raises SourceError if it is damaged or they are more than 2 GiB."""
    with opened(path) as file:
        content = file.read(_LONGEST_BYTES + 1)
    if len(content) > _LONGEST_BYTES:
        raise SourceError(f"{path.name} has more than {_LONGEST_BYTES:,} bytes when it is unpacked: give the unpacked file")
    return content


def _bytes(line: str, bad: re.Match[str]) -> str:
    bad_bytes = bad.group().encode("utf-8", "surrogateescape")
    if bad.start() == 0 and bad_bytes[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "it begins as UTF-16 does"
    return f"the byte {bad_bytes[:1].hex()} after {line[max(0, bad.start() - 20) : bad.start()]!r}"
