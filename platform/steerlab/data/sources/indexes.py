"""Archives of packages, found in the indexes that pip is configured with, downloaded and compared with their pin.

Nothing of a package runs: pip itself would build an sdist to learn what it needs, also where only its files are wanted.
"""

from __future__ import annotations

import ast
import os
import ssl
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerlab.data.sources.cache import file_sha256
from steerlab.job.grammar import Source, SourceError

if TYPE_CHECKING:
    from unearth import Link, PackageFinder

_TIMEOUT_S = 60.0
"""Without a byte, or an answer, from an index."""
_SETTINGS = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "cert", "client-cert", "proxy")
"""Settings of pip that say where packages are found."""


def download(source: Source, pin: str, directory: Path) -> Path:
    """Download the archive of a wheel or sdist that has the pinned SHA-256 into `directory`, which is made.

    Raises:
        SourceError: no index has such an archive, one cannot be reached, or none has this hash.
    """
    import httpx2

    directory.mkdir()
    others = 0
    try:
        for link in _links(source):
            known = (link.hashes or link.hash_option or {}).get("sha256")
            if known and pin not in ([known] if isinstance(known, str) else known):
                others += 1
                continue
            path = _finder().download(link, directory, hashes={})
            if file_sha256(path, path.stat().st_size, path.stat().st_mtime_ns) == pin:
                return path
            path.unlink()
            others += 1
    except (httpx2.HTTPError, OSError) as error:
        raise SourceError(
            f"'{source.text}' could not be downloaded: {type(error).__name__}: {error}. Check the network and pip's settings "
            "(pip config list), or give a path to an unpacked copy."
        ) from None
    if others:
        raise SourceError(f"'{source.text}': no archive of it has the pinned SHA-256 {pin}; nothing was unpacked")
    raise SourceError(
        f"'{source.text}' is in none of the indexes that pip is configured with (pip config list); check name and version, or "
        "give a path to an unpacked copy"
    )


def _links(source: Source) -> Iterator[Link]:
    """Yield the archives of a version in the form that the source names."""
    from packaging.requirements import InvalidRequirement

    try:
        found = _finder().find_matches(f"{source.name}=={source.version}", allow_yanked=True, allow_prereleases=True)
    except InvalidRequirement:
        raise SourceError(f"'{source.text}': {source.name}=={source.version} is no name and version of a package") from None
    for package in found:
        if package.link.is_wheel == (source.kind == "wheel"):
            yield package.link


def _finder() -> PackageFinder:
    return _finder_of(tuple((name, tuple(values)) for name, values in pip_settings().items()))


@cache
def _finder_of(of: tuple[tuple[str, tuple[str, ...]], ...]) -> PackageFinder:
    """Return a finder over pip's indexes, for archives of any platform: they are files, and are never installed."""
    from unearth import PackageFinder
    from unearth.fetchers import PyPIClient

    settings = {name: list(values) for name, values in of}
    trusted = settings["trusted-host"]
    verify = ssl.create_default_context(cafile=settings["cert"][-1]) if settings["cert"] else True
    session: Any = PyPIClient(
        trusted_hosts=trusted,
        verify=verify,
        cert=settings["client-cert"][-1] if settings["client-cert"] else None,
        proxy=settings["proxy"][-1] if settings["proxy"] else None,
        timeout=_TIMEOUT_S,
    )
    without_index = bool(settings["no-index"]) and settings["no-index"][-1].lower() in ("1", "true", "yes", "on")
    indexes = [] if without_index else settings["index-url"][-1:]
    # A finder that is given no place takes the public index; with --no-index there is none.
    finder = PackageFinder(session, index_urls=indexes, trusted_hosts=trusted, ignore_compatibility=True)
    if without_index:
        finder.sources.clear()
    for url in () if without_index else settings["extra-index-url"]:
        finder.add_index_url(url)
    for place in settings["find-links"]:
        finder.add_find_links(place)
    return finder


def pip_settings() -> dict[str, list[str]]:
    """Return pip's settings of where packages are found, later ones over earlier: its files, then its environment."""
    found = {name: values.copy() for name, values in _in_files(os.environ.get("PIP_CONFIG_FILE")).items()}
    for name in found:
        if value := os.environ.get(f"PIP_{name.upper().replace('-', '_')}"):
            found[name] = value.split()
    return found


@cache
def _in_files(_of: str | None) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {name: [] for name in _SETTINGS}
    listed = subprocess.run(
        [sys.executable, "-P", "-m", "pip", "config", "list"], capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
    )
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in ("global", "download") and name in found:
            found[name] = str(ast.literal_eval(value)).split()
    return found
