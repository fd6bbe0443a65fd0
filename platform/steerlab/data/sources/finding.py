"""Fetch the files of a source, compute its fingerprint, and read its rows."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from steerlab.data import values
from steerlab.data.sources.cache import cache_root
from steerlab.data.sources.compressed import data_suffix
from steerlab.data.sources.documents import ReadOptions, RowOrError
from steerlab.data.sources.file_sets import is_pattern, matches, matches_sha256, of_folder
from steerlab.data.sources.generated import GYM, GYM_ROWS, fetch_gym, fetch_pixels, fetch_tiny, pixel_rows
from steerlab.data.sources.hub import fetch_hub, hub_rows, known_commit
from steerlab.data.sources.packages import fetch_deb, fetch_package
from steerlab.data.sources.paths import content_sha256, existing, fetch_path, fetch_uri, listing_sha256
from steerlab.data.sources.readers import READ, file_rows
from steerlab.data.values import Row
from steerlab.data.worlds import pixels, tiny
from steerlab.job.grammar import PINS, Kind, Source, SourceError, parse, pin_of


def fetch(source: str, cache: Path | None = None) -> Path:
    """Return the local file or directory of a source, downloaded if it is not in the cache yet.

    Several processes may fetch the same source at once.

    Args:
        source: A source as in job/grammar.py.
        cache: Folder of downloads; None takes $STEERLAB_CACHE or ~/.cache/steerlab. Downloads from the hub go to the hub's own
            cache ($HF_HOME).

    Raises:
        SourceError: the source does not exist, cannot be reached, or has another SHA-256 than its pin.
    """
    parsed = parse(source)
    cache = cache or cache_root()
    return _FETCH[parsed.kind](parsed, cache)


_FETCH: dict[Kind, Callable[[Source, Path], Path]] = {
    "hf": fetch_hub,
    "path": fetch_path,
    "uri": fetch_uri,
    "wheel": fetch_package,
    "sdist": fetch_package,
    "gym": fetch_gym,
    "tiny": fetch_tiny,
    "pixels": fetch_pixels,
    "deb": fetch_deb,
}


def fingerprint(source: str) -> str:
    """Return a text that changes when the content of a source changes; part of a stage's key.

    It holds the SHA-256 pin of a package, the pin of the generator of `gym:` problems, the version of `tiny:` and `pixels:`
    data, the SHA-256 of the content of a path (in any folder), the file sizes and times of a URI, and the commit of a
    hub repository; if the commit cannot be found, only the source.
    """
    parsed = parse(source)
    # The pin is used instead of the archive, because fingerprints must be available without a download.
    if parsed.kind in ("wheel", "sdist"):
        inside = f"#{parsed.inside}" if parsed.inside else ""
        return f"{parsed.kind}:{parsed.name}=={parsed.version}@sha256:{pin_of(parsed)}{inside}"
    if parsed.kind == "hf":
        commit = known_commit(parsed)
        inside = f"#{parsed.inside}" if parsed.inside else ""
        return f"hf:{parsed.name}@{commit}{inside}" if commit else source
    if parsed.kind == "gym":
        return f"{source}@{GYM}@sha256:{PINS[GYM]}@{GYM_ROWS}"
    if parsed.kind == "tiny":
        return f"{source}@{tiny.VERSION}"
    if parsed.kind == "pixels":
        return f"{source}@{pixels.VERSION}"
    if parsed.kind == "deb":
        return f"deb:{parsed.name}@sha256:{pin_of(parsed)}{f'#{parsed.inside}' if parsed.inside else ''}"
    if parsed.kind == "uri":
        return f"{source}@{listing_sha256(parsed)}"
    if is_pattern(parsed):
        return f"files@sha256:{matches_sha256(parsed)}"
    # The fingerprint contains the content without the path, so that moving a data set does not change its artifacts.
    path = existing(parsed)
    return f"file{'' if path.is_dir() else _ending(path)}@sha256:{content_sha256(path)}"


def _ending(path: Path) -> str:
    """Return the ending that decides how a file is read: `.JSONL` counts as `.jsonl`, and `.csv.gz` keeps both parts."""
    ending = data_suffix(path)
    return "".join(ending) if ending[0] in READ else path.suffix


def rows(
    source: str,
    *,
    limit: int | None = None,
    fields: Sequence[str] = (),
    optional: Mapping[str, str] | None = None,
    columns: Sequence[str] | None = None,
    texts: Sequence[str] = (),
) -> list[dict[str, object]]:
    """Read rows of a source as dictionaries and check their fields. `each_row` lists the files that can be read.

    Args:
        source: A source as in job/grammar.py.
        limit: Number of rows, from the first; None reads all.
        fields: Fields that every row must have and that must not be null.
        optional: Field -> the value that a row gets if it lacks the field or has null in it.
        columns: Names of the columns of a text file without a header; None if rows have names.
        texts: Fields whose values must be texts, or null.

    Raises:
        SourceError: the source does not exist, has no rows or cannot be read, or a row (counted from 1) fails a check.
    """
    all_rows: list[dict[str, object]] = []
    for row in each_row(source, limit=limit, columns=columns):
        if isinstance(row, SourceError):
            raise row
        all_rows.append(row)
    if not all_rows:
        raise SourceError(f"{source} has no rows")
    for number, row in enumerate(all_rows, 1):
        for field in fields:
            if field not in row:
                raise SourceError(f"{short(source)} row {number} has no field '{field}' (it has: {', '.join(row)})")
            if values.is_null(row[field]):
                raise SourceError(
                    f"{short(source)} row {number} has nothing in its field '{field}' ({values.kind(row[field])})"
                )
        for field in texts:
            try:
                if not values.is_null(row.get(field)):
                    values.text(row[field], f"field '{field}'")
            except ValueError as error:
                raise SourceError(f"{short(source)} row {number}: {error}") from None
    defaults = dict(optional or {})
    return [row | {field: value for field, value in defaults.items() if values.is_null(row.get(field))} for row in all_rows]


def each_row(
    source: str,
    *,
    limit: int | None = None,
    columns: Sequence[str] | None = None,
    rows_at: str | None = None,
    is_row: Callable[[Row], bool] | None = None,
) -> Iterator[RowOrError]:
    """Yield the rows of a source; a bad row yields a SourceError with the reason, and the rows after it follow.

    A source is a file, a folder with the shards of one data set, a pattern, a hub data set, or a generator (gym, tiny, pixels).
    Files may be compressed with gzip, bzip2, xz or zstd:

    - .json, .jsonl, .ndjson: a list of objects; objects one per line or one after another; an object that holds one list of
      objects; or subsets {name: [texts]}, whose rows are {"text": ..., "subset": ...}
    - .yaml, .yml, .prompt: a list of objects, or an object that holds one
    - .parquet, .arrow, .csv, .tsv
    - .txt: a row {"text": ...} for each line that is not empty

    Args:
        source: A source as in job/grammar.py.
        limit: Number of rows, from the first; None yields all.
        columns: Names of the columns of a text file without a header, separated by commas in .csv and by tabs in others.
        rows_at: Path of the list of rows in an object that holds several lists.
        is_row: Returns whether the only object in a file is itself a row.

    Raises:
        SourceError: the source does not exist or cannot be read.
    """
    parsed = parse(source)
    options = ReadOptions(None if columns is None else tuple(columns), rows_at, is_row)
    return itertools.islice(_iterate(parsed, options, limit), limit)


def _iterate(source: Source, options: ReadOptions, limit: int | None) -> Iterator[RowOrError]:
    """Yield the rows of a source of any kind; `limit` only prevents generated sources from making more rows."""
    if source.kind == "tiny":
        return iter(tiny.rows(source.name, limit))
    if source.kind == "pixels":
        return pixel_rows(source, fetch, limit)
    if source.kind == "hf":
        return hub_rows(source, options)
    if is_pattern(source):
        return file_rows(matches(source), options)
    path = fetch(source.text)
    return file_rows(of_folder(path) if path.is_dir() else [path], options)


def short(source: str) -> str:
    """Return the file name of a source, for a message about one of its rows."""
    return re.split(r"[/#]", source.rstrip("/"))[-1]
