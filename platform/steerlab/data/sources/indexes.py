"""Find the archives of packages in pip's configured indexes, download them and compare their SHA-256 with the pin.

No code of a package runs. `pip download` is not used, because it builds an sdist to find its dependencies, which are not needed
here.
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
"""Seconds without a byte or an answer from an index."""
_SETTINGS = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "cert", "client-cert", "proxy")
"""Settings of pip that determine where packages are found."""


def download(source: Source, pin: str, directory: Path) -> Path:
    """Download the archive of a wheel or sdist with the pinned SHA-256 into `directory`, which must not exist yet.

    Raises:
        SourceError: an index cannot be reached, none has the package, or no archive has this hash.
    """
    import httpx2

    directory.mkdir()
    others = 0
    try:
        for link in _links(source):
            listed = (link.hashes or link.hash_option or {}).get("sha256")
            # The hashes that an index lists avoid downloads of the wheels for other platforms.
            if listed and pin not in ([listed] if isinstance(listed, str) else listed):
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
    """Yield the archives of a version that are of the source's kind, wheel or sdist."""
    from packaging.requirements import InvalidRequirement

    try:
        packages = _finder().find_matches(f"{source.name}=={source.version}", allow_yanked=True, allow_prereleases=True)
    except InvalidRequirement:
        raise SourceError(
            f"'{source.text}': {source.name}=={source.version} is not the name and version of a package"
        ) from None
    for package in packages:
        if package.link.is_wheel == (source.kind == "wheel"):
            yield package.link


def _finder() -> PackageFinder:
    return _finder_of(tuple((name, tuple(values)) for name, values in pip_settings().items()))


@cache
def _finder_of(of: tuple[tuple[str, tuple[str, ...]], ...]) -> PackageFinder:
    """Return a finder over pip's indexes for archives of any platform, which are read as files and never installed.

    `of` are the settings of `pip_settings` as tuples, so that they can be the key of the cache.
    """
    from unearth import PackageFinder
    from unearth.fetchers import PyPIClient

    settings = {name: list(values) for name, values in of}
    trusted = settings["trusted-host"]
    verify = ssl.create_default_context(cafile=settings["cert"][-1]) if settings["cert"] else True
    # httpx2 reads proxies and certificates from the environment, but not from pip's configuration.
    session: Any = PyPIClient(
        trusted_hosts=trusted,
        verify=verify,
        cert=settings["client-cert"][-1] if settings["client-cert"] else None,
        proxy=settings["proxy"][-1] if settings["proxy"] else None,
        timeout=_TIMEOUT_S,
    )
    without_index = bool(settings["no-index"]) and settings["no-index"][-1].lower() in ("1", "true", "yes", "on")
    indexes = [] if without_index else settings["index-url"][-1:]
    # Without any index unearth 0.19 falls back on pypi.org, which `no-index` forbids.
    finder = PackageFinder(session, index_urls=indexes, trusted_hosts=trusted, ignore_compatibility=True)
    if without_index:
        finder.sources.clear()
    for url in () if without_index else settings["extra-index-url"]:
        finder.add_index_url(url)
    for place in settings["find-links"]:
        finder.add_find_links(place)
    return finder


def pip_settings() -> dict[str, list[str]]:
    """Return pip's settings for the places of packages; environment variables take precedence over its files."""
    settings = {name: values.copy() for name, values in _in_files(os.environ.get("PIP_CONFIG_FILE")).items()}
    for name in settings:
        if value := os.environ.get(f"PIP_{name.upper().replace('-', '_')}"):
            settings[name] = value.split()
    return settings


@cache
def _in_files(_config_file: str | None) -> dict[str, list[str]]:
    """Return the settings in pip's files; `_config_file` ($PIP_CONFIG_FILE) is only the key of the cache."""
    settings: dict[str, list[str]] = {name: [] for name in _SETTINGS}
    # pip has no API; -P prevents a folder `pip` in the current one from being run instead of it.
    result = subprocess.run(
        [sys.executable, "-P", "-m", "pip", "config", "list"], capture_output=True, text=True, check=False, timeout=_TIMEOUT_S
    )
    for line in result.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in ("global", "download") and name in settings:
            settings[name] = str(ast.literal_eval(value)).split()  # `pip config list` prints values as Python literals
    return settings
