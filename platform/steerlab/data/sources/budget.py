"""Bound the memory that the tables of a file take, before they are decoded: a few bytes on disk can expand to gigabytes."""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from steerlab.job.grammar import SourceError

_AT_ONCE = 2**26
"""Bytes of rows that are turned into Python values together."""
_MOST_DECODED = 2**30
"""Bytes that the rows of any file may take, however small the file is."""
_MOST_RATIO = 1_000
"""Bytes that the rows may take for each byte of the file, if that is more than `_MOST_DECODED`."""
_DEEPEST = 64
"""Levels of nested lists and structs that a column may have."""
_POINTER, _NUMBER, _TEXT, _LIST, _OBJECT = 8, 40, 64, 64, 200
"""Overhead in bytes of a Python value: of true, false and null; of numbers and times; of texts; of lists; of dicts."""
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3
"""Types of the Arrow messages that hold values (`MessageHeader` in Arrow's format/Message.fbs)."""


class Budget:
    """The bytes that the rows of one file may still take in memory."""

    def __init__(self, path: Path) -> None:
        self._path = path
        # The limit is a generous ratio with a minimum, because real tables of repetitive text compress a hundredfold.
        self._left = self._most = max(_MOST_DECODED, _MOST_RATIO * path.stat().st_size)

    def check_schema(self, schema: pa.Schema) -> None:
        """Refuse column types, such as run-length encoding, that repeat a value without storing it. Raises SourceError."""
        for field in schema:
            if (refused := _refused(field.type)) is not None:
                raise SourceError(
                    f"{self._path.name}: the column {field.name!r:.80} is of type {str(refused)[:80]}, which is not read here; "
                    "save it as plain texts, numbers, lists or structs"
                )

    def check_parquet(self, file: pq.ParquetFile) -> None:
        """Refuse a file that is too large when decoded, according to its own metadata. Raises SourceError."""
        # A dictionary stores a fixed-length value once and refers to it many times, so every value is counted at its full
        # width.
        widths = [2 * _POINTER + max(0, file.schema.column(i).length or 0) for i in range(len(file.schema))]
        total = 0
        for number in range(file.metadata.num_row_groups):
            group = file.metadata.row_group(number)
            chunks = (group.column(i) for i in range(group.num_columns))
            total += sum(max(chunk.num_values * width, chunk.total_uncompressed_size, 0)
                         for chunk, width in zip(chunks, widths, strict=False))  # fmt: skip
            self._check(total)

    def check_messages(self, source: pa.NativeFile, begin: int) -> None:
        """Refuse an Arrow stream that starts at byte `begin` if its buffers are too large uncompressed. Raises SourceError."""
        source.seek(begin)
        total = 0
        for message in pa.ipc.MessageReader.open_stream(source):
            try:
                total += sum(_unpacked_sizes(message))
            except (struct.error, IndexError):
                return  # damaged: pyarrow raises its own error when it reads the stream
            self._check(total)

    def _check(self, total: int) -> None:
        if total <= self._most:
            return
        size = self._path.stat().st_size
        raise SourceError(
            f"{self._path.name} has {size:,} bytes, and more than {self._most:,} when it is decoded; "
            "it may have been made to fill the memory"
        )

    def rows(self, batch: pa.RecordBatch) -> Iterator[dict[str, object]]:
        """Yield the rows of a batch, split into parts if it is large. Raises SourceError when the budget is used up."""
        size = _OBJECT * batch.num_rows + sum(_python_bytes(column) for column in batch.columns)
        if size > _AT_ONCE and batch.num_rows > 1:
            # Slices share the batch's memory, so only the Python values of one half exist at a time.
            half = batch.num_rows // 2
            yield from self.rows(batch.slice(0, half))
            yield from self.rows(batch.slice(half))
            return
        self._left -= size
        self._check(self._most - self._left)
        try:
            yield from batch.to_pylist()
        except (pa.ArrowException, ValueError, OverflowError) as error:
            raise SourceError(f"{self._path.name}: {_bad_column(batch)}: {' '.join(str(error).split())[:300]}") from error


def is_text(kind: pa.DataType) -> bool:
    """Return whether a type is a text or bytes of variable length."""
    types = pa.types
    return types.is_string(kind) or types.is_large_string(kind) or types.is_binary(kind) or types.is_large_binary(kind)


def _refused(kind: pa.DataType, depth: int = 0) -> pa.DataType | None:
    """Return the first unsupported type inside a type; None if all of it is supported."""
    types = pa.types
    # An extension type (arrays of `datasets`) is stored as another type, which decides.
    if isinstance(kind, pa.BaseExtensionType):
        return _refused(kind.storage_type, depth)
    if types.is_dictionary(kind):
        return None if _is_leaf(kind.value_type) else kind
    is_nested = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not is_nested and not types.is_struct(kind) and not types.is_map(kind):
        return None if _is_leaf(kind) else kind
    # Nested types are read recursively, here and in Arrow.
    if depth > _DEEPEST:
        return kind
    inner = (_refused(kind.field(i).type, depth + 1) for i in range(kind.num_fields))
    return next((refused for refused in inner if refused is not None), None)


def _is_leaf(kind: pa.DataType) -> bool:
    types = pa.types
    return is_text(kind) or any(
        is_kind(kind)
        for is_kind in (
            types.is_null, types.is_boolean, types.is_integer, types.is_floating, types.is_decimal, types.is_temporal,
            types.is_interval, types.is_fixed_size_binary,
        )
    )  # fmt: skip


def _bad_column(batch: pa.RecordBatch) -> str:
    """Name the column with a value that Python cannot hold, such as a time beyond the year 9999, for a message."""
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        try:
            column.to_pylist()
        except (pa.ArrowException, ValueError, OverflowError):
            return f"the column {name!r:.80}, of type {column.type}, cannot be read"
    return "a column cannot be read"


def _python_bytes(column: pa.Array) -> int:
    """Estimate the bytes of an array as Python values; each entry of a dictionary array counts as a full copy."""
    count = len(column)
    if isinstance(column, pa.ExtensionArray):
        return _python_bytes(column.storage)
    if isinstance(column, pa.DictionaryArray):
        # `to_pylist` makes a Python value for every entry, although the dictionary stores each value once.
        values = column.dictionary
        if not is_text(values.type):
            return (_NUMBER + int(values.nbytes // max(1, len(values)))) * count
        lengths = pc.take(pc.binary_length(values), column.indices)  # type: ignore[attr-defined]
        return _TEXT * count + int(pc.sum(lengths).as_py() or 0)  # type: ignore[attr-defined]
    if isinstance(column, pa.StructArray):
        return _OBJECT * count + sum(_python_bytes(part) for part in column.flatten())
    if isinstance(column, pa.MapArray):
        # `keys` and `items` of a slice are those of the whole array (pyarrow 26), so they are cut by the slice's own offsets.
        begin, end = (column.offsets[at].as_py() for at in (0, -1))
        items = _python_bytes(column.keys[begin:end]) + _python_bytes(column.items[begin:end])
        return _LIST * (count + end - begin) + items
    if isinstance(column, pa.ListArray | pa.LargeListArray | pa.FixedSizeListArray):
        return _LIST * count + _python_bytes(column.flatten())
    if pa.types.is_null(column.type) or pa.types.is_boolean(column.type):
        return _POINTER * count
    return (_TEXT if is_text(column.type) else _NUMBER) * count + int(column.nbytes)


def _unpacked_sizes(message: pa.Message) -> Iterator[int]:
    """Yield the uncompressed sizes of the compressed buffers of an Arrow message.

    pyarrow has no function for them, so the message's header is read here: a FlatBuffers table (format/Message.fbs). Each
    compressed buffer begins with its uncompressed size in 8 bytes.
    """
    # Field numbers below are the positions of fields in Message.fbs: header type 1, header 2, and so on.
    content, body = memoryview(message.metadata), message.body
    table = _number(content, "I", 0)
    kind, header = _field(content, table, 1), _field(content, table, 2)
    if body is None or kind is None or header is None or content[kind] not in (_DICTIONARY_BATCH, _RECORD_BATCH):
        return
    batch: int | None = header + _number(content, "I", header)
    if content[kind] == _DICTIONARY_BATCH:
        inner = _field(content, batch, 1)
        batch = None if inner is None else inner + _number(content, "I", inner)
    if batch is None or _field(content, batch, 3) is None or (listed := _field(content, batch, 2)) is None:
        return  # not compressed
    start, packed = listed + _number(content, "I", listed), memoryview(body)
    for at in range(start + 4, start + 4 + 16 * _number(content, "I", start), 16):
        offset, length = _number(content, "q", at), _number(content, "q", at + 8)
        if length >= 8:
            yield max(length - 8, _number(packed, "q", offset))  # a size of -1 means that this buffer is not compressed


def _number(content: memoryview, kind: str, at: int) -> int:
    """Read a little-endian number; `kind` is its format character of `struct`."""
    return struct.unpack_from(f"<{kind}", content, at)[0]


def _field(content: memoryview, table: int, number: int) -> int | None:
    """Return the position of a field of a FlatBuffers table; None if the field is absent."""
    # A table begins with the distance back to its vtable: two sizes of 2 bytes, then the offset of each field or 0.
    fields = table - _number(content, "i", table)
    if 4 + 2 * number >= _number(content, "H", fields):
        return None
    offset = _number(content, "H", fields + 4 + 2 * number)
    return table + offset if offset else None
