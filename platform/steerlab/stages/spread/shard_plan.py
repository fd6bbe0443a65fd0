"""The shards of a data set, planned once, and the part made from each, in the stage's work directory.

The files of the work directory:

        plan.json                 the plan: number, first row, number of rows and SHA-256 of each shard, with a checksum
        plan/00000.json           the texts of a shard
    parts/part-00000.*        the part made from a shard
    done/00000.json           the record of the part, written after it: a shard without one is missing
    attempts/RUN-00000.json   the number of times that a run has started on a shard
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow.fs as pafs
from pydantic import Field

from steerlab.data import pairs, rows
from steerlab.data.values import Row
from steerlab.guards import saved
from steerlab.job import DataSet
from steerlab.storage.errors import NotTextError, explained_full_disk
from steerlab.storage.store import Store, StoreError
from steerlab.storage.whole import is_intact, json_sum

_TEXT_FIELDS = {
    "text": ("text",),
    "instruction": ("instruction", "input", "output"),
    "preference": pairs.FIELDS,
    "conversation": ("messages",),
}
_FIELDS_BESIDE = {"text": ("seed",), "instruction": ("system", "history"), "preference": pairs.BESIDE}
"""Fields that a row may have; a field is stored only if the row has it, so that other rows keep their hash."""
_AGAIN = "run the same command again to recompute it"


class Shard(NamedTuple):
    """Consecutive rows of a data set."""

    number: int
    first: int
    """Number of the shard's first row in the data set."""
    rows: Sequence[Row]


class Planned(saved.Shape):
    """A planned shard, an entry of plan.json."""

    number: int
    first: int
    rows: int
    sha256: str
    """SHA-256 of the shard's texts, or of its name if it has no rows."""
    name: str = Field(default="", exclude_if=lambda name: not name)
    """Name of a part that is not made from rows; empty otherwise."""


class _Plan(saved.Shape):
    shards: list[Planned]


class Facts(saved.Shape):
    """File of a part; each kind of part adds counts of its own."""

    path: saved.Inside
    bytes: int
    sha256: str


class Done(Facts):
    """Record of a part that is complete, with the counts of its kind."""

    number: int
    planned: str
    """SHA-256 of the shard from which the part was made: a part of an older plan counts as missing."""


class WorkFolder:
    """The work directory of a stage; `address` opens it again on any node."""

    def __init__(self, root: str, stage: str, key: str) -> None:
        # The address is three strings, which a worker uses to open its own file system.
        self.address = (root, stage, key)
        self._store = Store(root)
        self._folder = f"work/{stage}/{key}"
        self._store.work(stage, key)
        self._fs, self._base = self._store.opened(self._folder)

    @property
    def plan(self) -> list[Planned] | None:
        """The planned shards; None if the plan is missing or damaged."""
        # A damaged file is treated as missing only if making it again gives the same result.
        try:
            plan = saved.checked(self._store.read_json(f"{self._folder}/plan.json"), dict[str, object], self._folder)
            return saved.checked(plan, _Plan, self._folder).shards if is_intact(plan) else None
        except (FileNotFoundError, StoreError, saved.SavedError):
            return None

    @plan.setter
    def plan(self, entries: list[Planned]) -> None:
        plan = {"shards": [entry.model_dump() for entry in entries]}
        self._store.write_json(f"{self._folder}/plan.json", {**plan, "xxh3": json_sum(plan)})

    def write_texts(self, number: int, texts: str) -> None:
        """Write the texts of a shard."""
        self._store.write_text(f"{self._folder}/plan/{number:05d}.json", texts)

    def texts(self, number: int) -> str | None:
        """Return the texts of a shard; None if they were not written, "" if the file is damaged so that it is not text."""
        try:
            return self._store.read_text(f"{self._folder}/plan/{number:05d}.json")
        except FileNotFoundError:
            return None
        except NotTextError:
            return ""  # no shard has these texts, so their sum differs from the planned one

    def shard(self, entry: Planned) -> Shard:
        """Read a planned shard."""
        # The plan was verified when the stage began, but files may have been damaged since.
        texts = self.texts(entry.number)
        if texts is None or not _is_whole(texts, entry):
            raise ValueError(
                f"the texts of shard {entry.number} in {self._base}/plan {'are missing' if texts is None else 'are damaged'}; "
                f"{_AGAIN}"
            )
        return Shard(entry.number, entry.first, json.loads(texts))

    def done(self, entry: Planned, verify: bool = False) -> Done | None:
        """Return the record of a shard's part; None if the part is missing or does not match its record.

        `verify` compares the SHA-256 of the part; otherwise only its size is compared.
        """
        try:
            record = self._store.read_json(f"{self._folder}/done/{entry.number:05d}.json")
            row = saved.checked(record, Done, self._folder)
        except (FileNotFoundError, StoreError, saved.SavedError):
            return None
        # The counts of a part are copied into the artifact, where a change of them could not be detected.
        if not is_intact(record):
            return None
        path = self._part(row.path)
        # Reading the size is one request to an object store; reading the whole part is a download.
        if row.planned != entry.sha256 or self._fs.get_file_info(path).size != row.bytes:
            return None
        if verify:
            with self._fs.open_input_stream(path) as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != row.sha256:  # type: ignore[arg-type]
                    return None
        return row

    def attempts(self, number: int, run: str) -> int:
        """Count one more attempt of a run at a shard; return the number of attempts before it."""
        # The count is in a file, since a counter would die with its process. Only one process works on a shard at a time.
        path = f"{self._folder}/attempts/{run}-{number:05d}.json"
        try:
            before = saved.checked(self._store.read_json(path), int, path)
        except FileNotFoundError:
            before = 0
        self._store.write_json(path, before + 1)
        return before

    def keep(self, entry: Planned, suffix: str, make: Callable[[Path], Facts]) -> Done:
        """Call `make` with the path for a part, then write the part's record and return it."""
        # The name contains the shard's number only: another attempt replaces the part, and the newest record describes it.
        name = f"part-{entry.number:05d}{suffix}"
        self._fs.create_dir(f"{self._base}/parts", recursive=True)
        if isinstance(self._fs, pafs.LocalFileSystem):
            path = Path(self._base, "parts", name)
            with explained_full_disk(f"part {entry.number}", self.address[0], path):
                # The part is written on the disk of ROOT itself, so that it is not copied; its record marks it as complete.
                facts = make(path)
        else:
            # An object appears only when its upload is complete, so the part is made on the node's disk and then uploaded.
            here = Path(tempfile.gettempdir())
            with explained_full_disk(f"part {entry.number}", f"{here}", here), tempfile.TemporaryDirectory() as scratch:
                facts = make(Path(scratch, name))
                with Path(scratch, name).open("rb") as source, self._fs.open_output_stream(self._part(name)) as target:
                    shutil.copyfileobj(source, target, 1 << 22)
        # The record is written last: if the process is killed before, the shard counts as missing.
        row = {"number": entry.number, "first": entry.first, "planned": entry.sha256, **facts.model_dump()}
        self._store.write_json(f"{self._folder}/done/{entry.number:05d}.json", {**row, "xxh3": json_sum(row)})
        return Done.model_validate(row)

    def _part(self, name: str) -> str:
        return f"{self._base}/parts/{name}"

    def copy_parts(self, directory: Path) -> None:
        """Put all planned parts into a local directory: hard links on a disk, copies from an object store.

        Raises:
            ValueError: the plan or a part is damaged or missing.
        """
        entries = self.plan
        if entries is None:
            raise ValueError(f"{self._base}/plan.json is damaged or missing; {_AGAIN}")
        for entry in entries:
            # Each part is verified in full, because the artifact's manifest will record the checksum of whatever it contains.
            row = self.done(entry, verify=True)
            if row is None:
                raise ValueError(f"part {entry.number} in {self._base}/parts is damaged or missing; {_AGAIN}")
            source, target = self._part(row.path), directory / row.path
            if isinstance(self._fs, pafs.LocalFileSystem):
                # A hard link takes no space, and the part remains in the work directory if the process dies before the commit.
                os.link(source, target)
            else:
                pafs.copy_files(source, str(target), source_filesystem=self._fs, destination_filesystem=pafs.LocalFileSystem())


def planned(folder: WorkFolder, data: DataSet, rows_per_shard: int) -> list[Planned]:
    """Return the planned shards of a data set; a complete plan of a killed stage is reused."""
    entries = folder.plan
    # The data set is not read again: its fingerprint is part of the stage's key, which names this folder.
    # All texts are verified here, so that no worker fails on one hours later.
    if entries is not None and all(_is_whole(folder.texts(entry.number), entry) for entry in entries):
        return entries
    entries = []
    read = rows.read(data)
    # Shards are cut by number of rows, so that they, and with them the artifact, do not depend on the cluster.
    for number, first in enumerate(range(0, len(read), rows_per_shard)):
        chosen = read[first : first + rows_per_shard]
        taken = [
            {name: row.get(name) for name in _TEXT_FIELDS[data.format]}
            | {name: row[name] for name in _FIELDS_BESIDE.get(data.format, ()) if name in row}
            for row in chosen
        ]
        # Only the fields of the format are stored, since another column of the file must not change the plan.
        texts = json.dumps(taken, ensure_ascii=False)
        folder.write_texts(number, texts)
        entries.append(Planned(number=number, first=first, rows=len(taken), sha256=_sha256(texts)))
    # The plan is written after the texts, so that a plan never names missing texts.
    folder.plan = entries
    return entries


def _is_whole(texts: str | None, entry: Planned) -> bool:
    return texts is not None and _sha256(texts) == entry.sha256


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
