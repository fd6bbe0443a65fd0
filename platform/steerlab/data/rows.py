"""Read the rows of a job's data set, and filter, order and cut them according to its `DataSet`.

Each row goes through the same steps in this order: rename fields (`rename`), add constant fields (`fill`), filter (`subset`,
`equals`, `where`), replace values by names (`map`), compose fields (`compose`), bring the row into its format (forms.py).
Shuffling, `offset` and `limit` come last.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import islice

from steerlab.data import forms, mixing, pairs, sources, values
from steerlab.data.row_order import distinct, shuffled, with_tags_and_seeds
from steerlab.data.seen_rows import Seen, is_absent
from steerlab.data.sources import SourceError
from steerlab.data.values import Row
from steerlab.job import DataSet, compositions

_FIRST_LOOKS = (1, 256, None)
"""Numbers of rows of a generated data set that are made to find one that passes the filters; None makes all of them."""
_GENERATED = ("tiny", "gym", "pixels")
_checked: set[tuple[str, str]] = set()
"""(Data set, fingerprint of its files) without bad rows: a sweep checks the same data sets for each of its points."""


def read(data: DataSet) -> list[dict[str, object]]:
    """Return the rows of a data set and of those in `also`, in the fields that its format defines.

    Format text: `text`, and `seed` if the data set draws each prompt several times. Format instruction: `instruction` and
    `output`, optionally `input`, `system` and `history`. Format preference: the fields of pairs.py. Format conversation:
    `messages`. Format image: `image` and `text`. Other fields of a row are retained.

    Raises:
        ValueError: a source is wrong, a row lacks a field or has a value of the wrong type, no row remains, or `also` has rows
            of another format (only training reads such a data set, part by part).
    """
    check_one_format(data)
    parts = [_read_own(data), *map(read, data.also)]
    if not is_mixture(data):
        return [row for part in parts for row in part]
    return mixing.mixed(parts, _portions(data, list(map(len, parts))))


def is_mixture(data: DataSet) -> bool:
    """Return whether a data set is mixed with others by weights."""
    return bool(data.also) and data.weight is not None


def portions(data: DataSet) -> dict[str, mixing.Portion]:
    """Return the part of each data set of a mixture, by a short name; reads all of their rows. Raises as `read` does."""
    shares = _portions(data, list(map(len, [_read_own(data), *map(read, data.also)])))
    names = [describe(part) for part in (data, *data.also)]
    # Two parts of one file have the same name.
    named = [name if names.count(name) == 1 else f"{name} ({number})" for number, name in enumerate(names, 1)]
    return dict(zip(named, shares, strict=True))


def _portions(data: DataSet, sizes: Sequence[int]) -> list[mixing.Portion]:
    weights = [part.weight for part in (data, *data.also)]
    return mixing.portions(sizes, [weight for weight in weights if weight is not None], data.mixed_rows)


def _read_own(data: DataSet) -> list[dict[str, object]]:
    """Return the rows of a data set without those of `also`."""
    seen, passed = Seen.before(data, describe(data)), 0

    def counted() -> Iterator[dict[str, object]]:
        nonlocal passed
        for row in distinct(_each(data, seen, _needed(data)), data) if data.distinct else _each(data, seen, _needed(data)):
            passed += 1
            yield row

    end = None if data.limit is None else data.offset + data.limit
    # The rows are read lazily up to here: without a filter or a shuffle, `limit: 100` reads 100 rows of a file of millions.
    selected = list(islice(shuffled(counted(), data.shuffle), data.offset, end))
    seen.check_names(data)
    if not selected:
        raise seen.nothing_left(data, passed)
    seen.warn(data)
    return with_tags_and_seeds(selected, data)


def check_one_format(data: DataSet) -> None:
    """Refuse a data set that mixes formats, where each row must have the same fields. Raises ValueError."""
    formats = dict.fromkeys(part.format for part in data.parts)
    if len(formats) > 1:
        raise ValueError(
            f"also mixes rows of formats {' and '.join(formats)}: only data.train and data.validation can mix formats"
        )


def check(data: DataSet) -> None:
    """Check the rows of a data set before any work starts, and warn about rows that are skipped.

    From files, every row that the job reads is checked, once per process; from a generator (tiny, gym, pixels), the first row.

    Raises:
        ValueError: a row does not fit the data set's format, or no row remains.
    """
    generated = all(sources.parse(source).kind in _GENERATED for source in data.sources)
    if generated and data.subset is None:
        for source in data.sources:
            _check_first(data.model_copy(update={"source": source}))
    else:
        _check_all(data)
    for other in data.also:
        check(other)
    if is_mixture(data):
        _check_portions(data)


def _check_portions(data: DataSet) -> None:
    """Raise ValueError for a mixture without a row of one of its data sets."""
    if data.mixed_rows is not None:
        # Only the number of rows of the mixture matters; a data set that is too small is repeated.
        _portions(data, [1] * (1 + len(data.also)))
        return
    # The size of a generated data set may be anything, and is known only after all of its rows are made.
    if any(sources.parse(source).kind in _GENERATED for part in data.parts for source in part.sources):
        return
    key = "mixture " + data.model_dump_json(), json.dumps([fingerprint(part) for part in data.parts])
    if key not in _checked:
        portions(data)
        _checked.add(key)


def _check_first(data: DataSet) -> None:
    """Check the first row of a generated data set that passes the filters; if no row passes, check all rows for the reason."""
    for look in _FIRST_LOOKS:
        seen = Seen.before(data, describe(data))
        if next(_each(data, seen, look), None) is not None and not seen.absent:
            return
    _check_all(data.model_copy(update={"offset": 0}))


def _check_all(data: DataSet) -> None:
    """Read the rows that the job would use, once for each data set and process, and raise or warn about faults."""
    key = data.model_dump_json(), json.dumps(fingerprint(data))
    if key in _checked:
        return
    seen, passed = Seen.before(data, describe(data)), 0
    # With `distinct` or `shuffle`, any row may be among those that the limit selects.
    end = None if data.limit is None or data.distinct or data.shuffle is not None else data.offset + data.limit
    for _ in islice(_each(data, seen, _needed(data)), end):
        passed += 1
    seen.check_names(data)
    if passed <= data.offset:
        raise seen.nothing_left(data, passed)
    seen.warn(data)
    _checked.add(key)


def count(data: DataSet) -> int:
    """Return the number of rows of a data set, with those of `also`; each data set is counted once in a process."""
    return _counted(data.model_dump_json(), json.dumps(fingerprint(data)), type(data))


@lru_cache(maxsize=64)
def _counted(data: str, fingerprints: str, kind: type[DataSet]) -> int:
    # `fingerprints` is only part of the cache's key: it changes when the content of a source does.
    whole = kind.model_validate_json(data)
    # Training data may hold several formats, which are read part by part.
    parts = (whole,) if is_mixture(whole) else whole.parts
    return sum(len(read(part)) for part in parts)


def describe(data: DataSet) -> str:
    """Return a short name of a data set for messages: the file of its first source, and how many more sources it has."""
    first = data.sources[0]
    name = re.split(r"[/#!]", first)[-1] if first.startswith(("wheel:", "sdist:", "/")) else first
    more = len(data.sources) - 1
    return f"{name} and {more} more" if more else name


def fingerprint(data: DataSet) -> str | list[str]:
    """Return a value that changes when the content of the sources changes; part of a stage's key."""
    fingerprints = [sources.fingerprint(source) for source in data.sources]
    if data.also:
        return [*fingerprints, *(json.dumps(fingerprint(other)) for other in data.also)]
    # Keys of existing artifacts hold the fingerprint of a single source as a text, not as a list of one.
    return fingerprints[0] if isinstance(data.source, str) else fingerprints


def _each(data: DataSet, seen: Seen, limit: int | None) -> Iterator[dict[str, object]]:
    """Yield the formed rows of all sources, without skipped rows; reads the first `limit` rows of each source (None: all)."""
    judged, own = [], _own_fields(data)

    def is_row(content: Row) -> bool:
        return forms.is_row(content, data) and all(values.look_up(content, name) is not values.MISSING for name in own)

    for source in data.sources:
        rows = sources.each_row(source, limit=limit, columns=data.columns, rows_at=data.rows_at, is_row=is_row)
        number = 0
        for number, row in enumerate(rows, 1):
            try:
                formed = _formed(row, data, seen)
            except ValueError as error:
                seen.leave_out(str(error) if error is row else f"{_place(source, number, error)}{error}", data)
                continue
            if isinstance(formed, pairs.Judged):
                judged.append(formed)
            elif formed is not None:
                yield formed
        # An empty source among several would otherwise pass unnoticed.
        if not number:
            raise SourceError(f"{source} has no rows")
    # Pairs are matched after all rows are read, because the two responses of a KTO pair may be far apart, or in two sources.
    for pair in pairs.matched(judged):
        if isinstance(pair, ValueError):
            seen.leave_out(f"{describe(data)}: {pair}", data)
        else:
            yield pair


def _own_fields(data: DataSet) -> list[str]:
    """Return the fields that every row of the file must have, by their names in the file."""
    old = {new: name for name, new in data.rename.items()}
    added = data.fill.keys() | data.compose.keys()
    composed = [name for template in data.compose.values() for name in compositions.fields(template)]
    # Preference rows come in several forms, so no field is needed in all of them.
    needed = [name for name in data.needed_fields if name not in added and data.format != "preference"]
    return [old.get(name, name) for name in (*needed, *composed)]


def _place(source: str, number: int, error: ValueError) -> str:
    return f"{sources.short(source)} row {number}{' ' if str(error).startswith('has ') else ': '}"


def _formed(row: dict[str, object] | SourceError, data: DataSet, seen: Seen) -> dict[str, object] | pairs.Judged | None:
    """Return a row in its format; None if a filter excludes it. Raises ValueError for a bad row."""
    seen.read += 1
    if isinstance(row, SourceError):
        raise row
    own = row
    seen.names = seen.names or values.names(own)
    if data.rename:
        row = forms.renamed(row, data.rename)
    row = row | data.fill
    seen.new_names = seen.new_names or values.names(row)
    if seen.absent:
        seen.absent = [key for key in seen.absent if is_absent(key, own, row)]
    if data.subset is not None and row.setdefault("subset", None) not in data.subsets:
        seen.subsets[row["subset"]] = None
        return None
    if data.subset is not None:
        seen.taken[row["subset"]] = None
    if not forms.passes(row, data):
        return None
    _check_renamed(own, data)
    row = forms.mapped(row, data)
    if data.needs_input and (values.is_null(row.get("input")) or not row["input"]):
        return None
    formed = forms.formed(row, data)
    if isinstance(formed, pairs.Judged):
        return formed
    seen.unused.update(forms.unused(row, formed, data))
    return None if data.format == "text" and len(str(formed["text"])) < max(1, data.min_chars) else formed


def _check_renamed(row: Row, data: DataSet) -> None:
    """Check that a row has the needed fields that `rename` takes. Raises ValueError with the field's name in the file."""
    for old in _own_fields(data):
        if old in data.rename and values.look_up(row, old) is values.MISSING:
            raise ValueError(f"has no field '{old}' (it has: {values.names(row)})")


def _needed(data: DataSet) -> int | None:
    """Return how many rows of a source are enough; None if a step may skip some, so that all have to be read."""
    filters = (
        data.where
        or data.equals
        or data.subset is not None
        or data.needs_input
        or data.distinct
        or data.skip_bad
        or data.format in ("text", "preference")
    )
    passes_all = not filters and data.shuffle is None
    return data.offset + data.limit if passes_all and data.limit is not None else None
