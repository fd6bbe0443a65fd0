"""Keep artifacts on a pyarrow filesystem: whole or absent, whoever is killed and whenever.

    ROOT/artifacts/<stage>/<key>/   files and manifest.json; a directory without a manifest does not exist
    ROOT/work/<stage>/<key>/        what must survive a kill (training checkpoints), until the artifact is committed
    ROOT/tmp/                       directories being filled (a local ROOT only; otherwise they lie in the cache)

On a local ROOT a commit is one rename. Object stores have no rename: the manifest is uploaded last, and two writers of
one key at once are kept apart by the claims of the plan, not here.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Self
from urllib.parse import urlsplit, urlunsplit

import pyarrow.fs as pafs

from steerlab.data.sources import cache_root, remote
from steerlab.guards.files import FileError, check_links, escapes
from steerlab.guards.json_values import JsonObject
from steerlab.storage import manifests
from steerlab.storage.manifests import MANIFEST, SCHEMA, Manifest, StoredFile
from steerlab.storage.records import Records, StoreError, one_line

_MADE_HERE = re.compile(r"^[a-z_]+-[0-9a-z]{1,12}(-[0-9a-f]{12})?$")
"""Names of temporary directories: of what lies in ROOT/tmp, nothing else is removed."""


class Store(Records):
    """The artifacts, work directories and run records below one ROOT."""

    @classmethod
    def open(cls, root: str) -> Self:
        """Return the store at `root`, made if it is not there. Raises ValueError if it cannot be written."""
        store = cls(root)
        probe = f"tmp/probe-{uuid.uuid4().hex}"
        try:
            store.write_json(probe, {})
            store._fs.delete_file(store._at(probe))
        except OSError as error:
            raise ValueError(f"ROOT '{root}' cannot be written: {one_line(error)}") from error
        return store

    # Artifacts

    def path(self, stage: str, key: str) -> str:
        """Return where the artifact lies (or would lie), as a path on the filesystem."""
        if escapes(stage) or escapes(key):
            raise StoreError(f"{stage!r:.40}/{key!r:.80} is no artifact: it lies outside of {self.root}")
        return self._at("artifacts", stage, key)

    def has(self, stage: str, key: str) -> bool:
        """Say whether the artifact is there, whole."""
        return self._is_file(f"{self.path(stage, key)}/{MANIFEST}")

    def manifest(self, stage: str, key: str) -> Manifest:
        """Return what an artifact is made of, and its files.

        Raises:
            StoreError: there is no artifact, or its manifest is none: one whose paths lead out of the artifact among them.
        """
        if not self.has(stage, key):
            raise StoreError(f"there is no artifact {stage}/{key} in {self.root}")
        return manifests.check(self.read_json(f"artifacts/{stage}/{key}/{MANIFEST}"), self.path(stage, key))

    def local(self, stage: str, key: str) -> Path:
        """Return a local directory with the artifact: itself, or a verified copy in the cache.

        Sizes are compared with the manifest each time, SHA-256 sums when a copy is downloaded.

        Raises:
            StoreError: the artifact is absent, or a file of it is missing or differs from the manifest.
        """
        manifest = self.manifest(stage, key)
        if self.is_local:
            directory = Path(self.path(stage, key))
            manifests.check_sizes(directory, manifest)
            return directory
        name = hashlib.sha256(self.root.encode()).hexdigest()[:16]
        copy = cache_root() / "artifacts" / name / stage / key
        if not copy.exists():
            self._download(stage, key, manifest["files"], copy)
        manifests.check_sizes(copy, manifest)
        return copy

    def commit(self, stage: str, key: str, directory: Path, meta: JsonObject) -> None:
        """Make `directory` the artifact, with `meta` in its manifest, in one step that cannot be seen half done.

        A directory from `temporary` is moved, not copied. If another process has committed the same key in the
        meantime, its artifact stays and this one is discarded.

        Raises:
            StoreError: the disk is full.
        """
        if self.has(stage, key):
            return
        files = manifests.listing(directory)
        manifest = Manifest(stage=stage, key=key, meta=meta, files=files, schema=SCHEMA)
        with self._explain_full_disk(f"artifact {stage}/{key}", sum(file["bytes"] for file in files)):
            if not self.is_local:
                return self._commit_by_upload(directory, f"artifacts/{stage}/{key}", manifest)
            if directory.is_relative_to(self._temporary_folder()):
                return self._commit_by_rename(stage, key, directory, manifest)
            with self.temporary(stage, key) as staging:
                for file in files:
                    (staging / file["path"]).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(directory / file["path"], staging / file["path"])
                self._commit_by_rename(stage, key, staging, manifest)

    @contextmanager
    def temporary(self, stage: str, key: str) -> Iterator[Path]:
        """Give an empty local directory, on ROOT's own disk if ROOT is local; it is removed on any exit.

        Raises:
            StoreError: the disk filled up while the directory was being filled.
        """
        directory = self._temporary_folder() / f"{stage}-{key[:12]}-{uuid.uuid4().hex[:12]}"
        try:
            with self._explain_full_disk(f"artifact {stage}/{key}", None):
                directory.mkdir(parents=True)
                yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def sweep_temporary(self, older_than_s: float) -> int:
        """Remove temporary directories in which nothing was written for `older_than_s`; return how many."""
        limit_s = time.time() - older_than_s
        old = [
            path
            for path in self._temporary_folder().glob("*")
            if _MADE_HERE.search(path.name) and path.is_dir() and not path.is_symlink() and _last_write_s(path) < limit_s
        ]
        for path in old:
            shutil.rmtree(path)
        return len(old)

    # Work that survives a kill

    def work(self, stage: str, key: str) -> str:
        """Return the work directory of a stage as an absolute path or a URI; made if it is not there.

        Raises:
            SourceError: on an object store, a name in it leads out of it; libraries copy checkpoints from there as they lie.
            FileError: on a disk, it is a link or holds one; libraries write, read and remove what lies there.
        """
        path = self._at("work", stage, key)
        if self.is_local:
            if Path(path).parent.is_symlink():
                raise FileError(f"{Path(path).parent} is a link, and files are written and removed below it: remove it")
            check_links(Path(path))
        self._fs.create_dir(path, recursive=True)
        if not self.is_local:
            remote.files_below(self._fs, path)
        return _join(self.root, "work", stage, key)

    def move_from_work(self, stage: str, key: str, folder: str, directory: Path) -> None:
        """Move what workers left in a folder of the work directory into a local directory (a copy from an object store)."""
        path = self._at("work", stage, key, folder)
        with self._explain_full_disk(f"artifact {stage}/{key}", None):
            if not self.is_local:
                return remote.copy(self._fs, path, remote.files_below(self._fs, path), directory)
            for item in Path(path).iterdir():
                shutil.move(item, directory / item.name)

    def discard_work(self, stage: str, key: str) -> None:
        """Remove the work directory of a stage, if there is one."""
        path = self._at("work", stage, key)
        if self._fs.get_file_info(path).type == pafs.FileType.Directory:
            self._fs.delete_dir(path)

    def _commit_by_rename(self, stage: str, key: str, directory: Path, manifest: Manifest) -> None:
        target = Path(self.path(stage, key))
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False))
        for path in (*(path for path in directory.rglob("*")), directory):
            _sync(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(directory, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if self.has(stage, key):
                return shutil.rmtree(directory)
            # Left by a copy that was cut short: it has no manifest, so it does not count.
            os.rename(target, self._temporary_folder() / f"incomplete-{uuid.uuid4().hex[:12]}")
            os.rename(directory, target)
        _sync(target.parent)

    def _commit_by_upload(self, directory: Path, target: str, manifest: Manifest) -> None:
        for file in manifest["files"]:
            destination = self._at(target, file["path"])
            self._fs.create_dir(str(PurePosixPath(destination).parent), recursive=True)
            with (directory / file["path"]).open("rb") as source, self._fs.open_output_stream(destination) as stream:
                shutil.copyfileobj(source, stream, 1 << 22)
        self.write_json(f"{target}/{MANIFEST}", manifest)

    def _download(self, stage: str, key: str, files: Sequence[StoredFile], copy: Path) -> None:
        with self.temporary(stage, key) as staging:
            for file in files:
                self._download_file(self.path(stage, key), file, staging / file["path"])
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(staging, copy)
            except OSError as error:  # another process was faster
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise

    def _download_file(self, artifact: str, file: StoredFile, local: Path) -> None:
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._fs.open_input_stream(f"{artifact}/{file['path']}") as stream, local.open("wb") as target:
                shutil.copyfileobj(stream, target, 1 << 22)
        except FileNotFoundError as error:
            raise manifests.damaged(artifact, file["path"], "is missing") from error
        if manifests.sha256(local) != file["sha256"]:
            raise manifests.damaged(artifact, file["path"], "has another SHA-256 than its manifest says")


def _join(root: str, *parts: str) -> str:
    if root.startswith("/"):
        return str(PurePosixPath(root, *parts))
    # Options such as ?endpoint_override=... stand behind the path.
    uri = urlsplit(root)
    return urlunsplit(uri._replace(path="/".join((uri.path.rstrip("/"), *parts))))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _last_write_s(path: Path) -> float:
    times_s = [0.0]
    for entry in (path, *path.rglob("*")):
        try:
            times_s.append(entry.lstat().st_mtime)
        except FileNotFoundError:  # its owner is at work: not old
            return time.time()
    return max(times_s)
