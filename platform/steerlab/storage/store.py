"""Store artifacts on a pyarrow filesystem. An artifact is complete or absent, also if its writer is killed.

Folders below ROOT:

    artifacts/<stage>/<key>/   files and manifest.json; a directory without a manifest is not an artifact
    work/<stage>/<key>/        checkpoints and parts of a stage, until its artifact is committed
    tmp/                       directories that are being filled (on a local ROOT; otherwise they are in the local cache)

On a local ROOT a commit is one rename. Object stores have no rename, so the manifest is uploaded last. Two writers of one key
at the same time are excluded by the claims of the plan (claims.py), which are in ROOT/claims.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import uuid
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Self

import pyarrow.fs as pafs

from steerlab.data.sources import cache_root, remote
from steerlab.guards import files, texts, waiting
from steerlab.guards.files import FileError, check_links, escapes
from steerlab.guards.json_values import JsonObject
from steerlab.storage import copies, manifests, temporary
from steerlab.storage.manifests import MANIFEST, Manifest, StoredFile
from steerlab.storage.records import Records, StoreError, one_line
from steerlab.storage.whole import synced


class Store(Records):
    """The artifacts, work directories and run records below one ROOT."""

    @classmethod
    def open(cls, root: str) -> Self:
        """Return the store at `root`, a directory or bucket folder that is made if necessary.

        Raises:
            ValueError: `root` is not an absolute path or URI, or cannot be written.
        """
        store = cls(root)
        # A file is written now, so that a missing permission ends a run at its start instead of after the first hours.
        probe = f"tmp/probe-{uuid.uuid4().hex}"
        try:
            store.write_json(probe, {})
            store._fs.delete_file(store._at(probe))
        except OSError as error:
            shared = "; to share it, its owner runs chmod -R g+rwXs on it, and all users umask 002"
            hint = shared if store.is_local and isinstance(error, PermissionError) else ""
            raise ValueError(f"ROOT '{root}' cannot be written: {one_line(error)}{hint}") from error
        return store

    # Artifacts

    def path(self, stage: str, key: str) -> str:
        """Return the path of an artifact on the filesystem, whether it exists or not."""
        # Stage and key may come from a manifest or a `base.json` that somebody else wrote.
        if escapes(stage) or escapes(key):
            raise StoreError(f"{stage!r:.40}/{key!r:.80} is not an artifact: it is outside of {self.root}")
        return self._at("artifacts", stage, key)

    def has(self, stage: str, key: str) -> bool:
        """Return whether the artifact exists and is complete."""
        return self._is_file(f"{self.path(stage, key)}/{MANIFEST}")

    def manifest(self, stage: str, key: str) -> Manifest:
        """Return the manifest of an artifact: its parameters and inputs, and its files.

        Raises:
            StoreError: the artifact does not exist, or its manifest is damaged or names files outside of the artifact.
        """
        if not self.has(stage, key):
            raise StoreError(f"there is no artifact {stage}/{key} in {self.root}")
        return manifests.parsed(self.read_bytes(f"artifacts/{stage}/{key}/{MANIFEST}"), self.path(stage, key))

    def check(self, stage: str, key: str) -> None:
        """Raise StoreError if the manifest of an artifact is damaged or, on a disk, a file is missing or has another size."""
        manifest = self.manifest(stage, key)
        if self.is_local:
            manifests.check_sizes(Path(self.path(stage, key)), manifest)

    def local(self, stage: str, key: str) -> Path:
        """Return a local directory with the artifact: the artifact itself, or a copy in the cache of this node.

        The sizes of its files are compared with the manifest each time, their sums when this process reads the artifact for the
        first time. A copy that is damaged is downloaded again.

        Raises:
            StoreError: the artifact does not exist, or a file of it is missing or differs from the manifest.
        """
        manifest = self.manifest(stage, key)
        if self.is_local:
            directory = Path(self.path(stage, key))
            manifests.verify(directory, manifest)
            return directory
        # The cache is shared by all ROOTs, and the text of a URI is not a valid file name.
        name = hashlib.sha256(self.root.encode()).hexdigest()[:16]
        copy = cache_root() / "artifacts" / name / stage / key
        copies.pin(copy)
        try:
            if copy.exists():
                manifests.verify(copy, manifest)
                return copy
        except StoreError as error:
            warnings.warn(f"{error.args[0].partition(';')[0]}; it is downloaded again", stacklevel=2)
            self._discard(copy)
        self._download(stage, key, manifest["files"], copy)
        copies.trim(cache_root() / "artifacts")
        manifests.verify(copy, manifest)
        return copy

    def commit(self, stage: str, key: str, directory: Path, meta: JsonObject) -> None:
        """Turn a directory into an artifact, with `meta` in its manifest; readers see it complete or not at all.

        A directory from `temporary` is moved, others are copied. If another process has committed the same key in the
        meantime, that artifact is used and this directory is discarded.

        Raises:
            StoreError: the disk is full.
        """
        if self.has(stage, key):
            return
        # The files are listed before anything is copied; a file that is written later is not part of the artifact.
        files = manifests.listing(directory)
        manifest = manifests.made(stage, key, meta, files)
        with self._explain_full_disk(f"artifact {stage}/{key}", sum(file["bytes"] for file in files)):
            # Another process may commit the same key from here on; `_commit_by_rename` checks again when the rename fails.
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
        """Provide an empty local directory for an artifact, on ROOT's disk if ROOT is local; it is removed with the block.

        Raises:
            StoreError: the disk filled up while the directory was being filled.
        """
        made = temporary.directory(self._temporary_folder(), f"{stage}-{key[:12]}")
        with self._explain_full_disk(f"artifact {stage}/{key}", None), made as directory:
            yield directory

    def sweep_temporary(self) -> int:
        """Remove temporary directories of this machine whose process was killed; return their number."""
        return temporary.sweep(self._temporary_folder())

    def sweep_temporary_of(self, stage: str, key: str) -> None:
        """Remove the temporary directories of killed processes for one artifact, whose claim the caller holds."""
        # Only the holder of the claim fills such a directory, so those of any machine can be removed if they are in ROOT. A
        # cache serves other ROOTs as well.
        temporary.sweep(self._temporary_folder(), f"{stage}-{key[:12]}", of_any_machine=self.is_local)

    # Work that survives a kill

    def work(self, stage: str, key: str) -> str:
        """Return the work directory of a stage as an absolute path or a URI, after making it if necessary.

        Raises:
            SourceError: on an object store, the name of an object leads out of the directory.
            FileError: on a disk, the directory is a link or contains one.
        """
        # Ray Train and other libraries read, write and remove files here without checks of their own, so a link or a name with
        # ".." that somebody else made would direct them to files elsewhere.
        path = self._at("work", stage, key)
        if self.is_local:
            if Path(path).parent.is_symlink():
                raise FileError(f"{Path(path).parent} is a link, and files are written and removed below it: remove it")
            check_links(Path(path))
        self._fs.create_dir(path, recursive=True)
        if not self.is_local:
            remote.files_below(self._fs, path)
        return path if self.is_local else self.where("work", stage, key)

    def move_from_work(self, stage: str, key: str, folder: str, directory: Path) -> None:
        """Move the content of a folder of the work directory into a local directory; from an object store it is copied."""
        path = self._at("work", stage, key, folder)
        with self._explain_full_disk(f"artifact {stage}/{key}", None):
            if not self.is_local:
                return remote.copy(self._fs, path, remote.files_below(self._fs, path), directory)
            # The files are moved instead of copied, because weights of many gigabytes would be on the disk twice.
            for item in Path(path).iterdir():
                shutil.move(item, directory / item.name)

    def discard_work(self, stage: str, key: str) -> None:
        """Remove the work directory of a stage if it exists."""
        path = self._at("work", stage, key)
        if self._fs.get_file_info(path).type == pafs.FileType.Directory:
            # Two processes that find the artifact finished may remove its work directory at the same time.
            with suppress(FileNotFoundError):
                self._fs.delete_dir(path)

    # Removal, for `steerlab gc`

    def hide(self, stage: str, key: str) -> bytes:
        """Remove the manifest of an artifact, so that the artifact does not exist any more; return the manifest for `show`."""
        content = self.read_bytes(f"artifacts/{stage}/{key}/{MANIFEST}")
        self._fs.delete_file(f"{self.path(stage, key)}/{MANIFEST}")
        return content

    def show(self, stage: str, key: str, manifest: bytes) -> None:
        """Make an artifact that was hidden exist again."""
        if not self.has(stage, key):  # no process has made it again meanwhile
            self.write_bytes(f"artifacts/{stage}/{key}/{MANIFEST}", manifest)

    def discard(self, stage: str, key: str) -> None:
        """Remove the files of an artifact that was hidden."""
        if self.has(stage, key):  # made again meanwhile
            return
        if self.is_local:
            # The directory is moved first, so that a process that makes the artifact again does not find half of the old one.
            with suppress(FileNotFoundError):
                shutil.rmtree(self._put_aside(Path(self.path(stage, key))))
        elif self._fs.get_file_info(self.path(stage, key)).type == pafs.FileType.Directory:
            self._fs.delete_dir(self.path(stage, key))

    def _commit_by_rename(self, stage: str, key: str, directory: Path, manifest: Manifest) -> None:
        """Turn a directory on ROOT's disk into an artifact by one rename, with everything in it synced before."""
        target = Path(self.path(stage, key))
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2, allow_nan=False))
        files.share(directory, directory / MANIFEST)
        # Files are synced before the rename: after a power cut, filesystems such as XFS may hold a renamed directory with empty
        # files.
        for path in (*(path for path in directory.rglob("*")), directory):
            synced(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.rename(directory, target)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            if self.has(stage, key):
                return shutil.rmtree(directory)
            # The directory has no manifest, so it is not an artifact but an interrupted copy from another ROOT. It is moved
            # away instead of removed in place, so that no reader sees it half removed.
            self._put_aside(target)
            os.rename(directory, target)
        synced(target.parent)

    def _put_aside(self, directory: Path) -> Path:
        """Move a directory to a temporary name, under which no reader looks for it."""
        aside = self._temporary_folder() / f"{temporary.INCOMPLETE}{uuid.uuid4().hex[:12]}"
        aside.parent.mkdir(parents=True, exist_ok=True)
        os.rename(directory, aside)
        return aside

    def _discard(self, copy: Path) -> None:
        """Remove a copy of an artifact from the cache of this node."""
        # The copy is moved first, because a process that finds it half removed would report it as damaged again.
        with suppress(FileNotFoundError):  # another process of this node has removed it meanwhile
            shutil.rmtree(self._put_aside(copy))

    def _commit_by_upload(self, directory: Path, target: str, manifest: Manifest) -> None:
        size = sum(file["bytes"] for file in manifest["files"]) / 1e6
        with waiting.announced(f"the upload of {target[:40]} ({size:,.0f} MB) to {texts.without_secrets(self.root)}"):
            self._upload(directory, target, manifest["files"])
        # The manifest is the last object: until it exists, the others are not an artifact.
        self.write_json(f"{target}/{MANIFEST}", manifest)

    def _upload(self, directory: Path, target: str, files: Sequence[StoredFile]) -> None:
        for file in files:
            destination = self._at(target, file["path"])
            self._fs.create_dir(str(PurePosixPath(destination).parent), recursive=True)
            with (directory / file["path"]).open("rb") as source, self._fs.open_output_stream(destination) as stream:
                shutil.copyfileobj(source, stream, 1 << 22)

    def _download(self, stage: str, key: str, files: Sequence[StoredFile], copy: Path) -> None:
        size = sum(file["bytes"] for file in files) / 1e6
        what = f"the download of {stage}/{key[:12]} ({size:,.0f} MB) from {texts.without_secrets(self.root)}"
        with self.temporary(stage, key) as staging, waiting.announced(what):
            for file in files:
                self._download_file(self.path(stage, key), file, staging / file["path"])
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.rename(staging, copy)
            except OSError as error:  # another process of this node has downloaded it in the meantime
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise

    def _download_file(self, artifact: str, file: StoredFile, local: Path) -> None:
        local.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self._fs.open_input_stream(f"{artifact}/{file['path']}") as stream, local.open("wb") as target:
                shutil.copyfileobj(stream, target, 1 << 22)
        except FileNotFoundError as error:
            raise manifests.damaged(artifact, file["path"], "is missing") from error
        manifests.check_sum(artifact, local, file)
