"""The shards of a data set: planned once, kept in the stage's work directory, each with the part that was made of it.

work/plan/00000.json, plan.json     the texts of each shard; where each begins, how many rows, SHA-256
work/parts/part-00000.*             what was made of a shard: written to another name, synced, renamed
work/done/00000.json                its manifest row, written last: a shard without one is missing
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
from steerlab.data.sources import remote
from steerlab.data.values import Row
from steerlab.guards import saved
from steerlab.job import DataSet
from steerlab.storage.store import Store, StoreError

_TEXT_FIELDS = {
    "text": ("text",),
    "instruction": ("instruction", "input", "output"),
    "preference": pairs.FIELDS,
    "conversation": ("messages",),
}
_FIELDS_BESIDE = {"text": ("seed",), "instruction": ("system", "history"), "preference": pairs.BESIDE}
"""Kept where a row has them."""


class Shard(NamedTuple):
    """Consecutive rows of a data set."""

    number: int
    first: int
    """Number of its first row in the data set."""
    rows: Sequence[Row]


class Planned(saved.Shape):
    """A planned shard, an entry of plan.json."""

    number: int
    first: int
    rows: int
    sha256: str
    """Of its texts, or of its name."""
    name: str = Field(default="", exclude_if=lambda name: not name)
    """Of a part that is made of no rows."""


class Facts(saved.Shape):
    """What is known of a part that was made; those who make one know more of it."""

    path: saved.Inside
    bytes: int
    sha256: str


class Done(Facts):
    """The manifest row of a part, with all its facts."""

    number: int
    planned: str
    """The hash of the shard that it was made of."""


class Place:
    """The work directory of a stage, as every node sees it."""

    def __init__(self, root: str, stage: str, key: str) -> None:
        self.address = (root, stage, key)
        self._store = Store(root)
        self._folder = f"work/{stage}/{key}"
        uri = self._store.work(stage, key)
        self._fs, self._base = (pafs.LocalFileSystem(), uri) if uri.startswith("/") else remote.opened(uri)

    @property
    def plan(self) -> list[Planned] | None:
        """The planned shards, or None when there is no whole plan yet."""
        try:
            return saved.checked(self._store.read_json(f"{self._folder}/plan.json"), list[Planned], self._folder)
        except (FileNotFoundError, StoreError, saved.SavedError):
            return None

    @plan.setter
    def plan(self, entries: list[Planned]) -> None:
        self._store.write_json(f"{self._folder}/plan.json", [entry.model_dump() for entry in entries])

    def write_texts(self, number: int, texts: str) -> None:
        """Keep the texts of a shard."""
        self._store.write_text(f"{self._folder}/plan/{number:05d}.json", texts)

    def texts(self, number: int) -> str | None:
        """Return the texts of a shard, None where there are none."""
        try:
            return self._store.read_text(f"{self._folder}/plan/{number:05d}.json")
        except FileNotFoundError:
            return None

    def shard(self, entry: Planned) -> Shard:
        """Read a planned shard."""
        texts = self.texts(entry.number)
        assert texts is not None and _sha256(texts) == entry.sha256, "the plan was verified before"
        return Shard(entry.number, entry.first, json.loads(texts))

    def done(self, entry: Planned, verify: bool = False) -> Done | None:
        """Return a shard's manifest row if its part is as it says, with `verify` down to the last byte."""
        try:
            row = saved.checked(self._store.read_json(f"{self._folder}/done/{entry.number:05d}.json"), Done, self._folder)
        except (FileNotFoundError, StoreError, saved.SavedError):
            return None
        path = self._part(row.path)
        if row.planned != entry.sha256 or self._fs.get_file_info(path).size != row.bytes:
            return None
        if verify:
            with self._fs.open_input_stream(path) as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != row.sha256:  # type: ignore[arg-type]
                    return None
        return row

    def attempts(self, number: int, run: str) -> int:
        """Count an attempt of one run at a shard; return how many there were before."""
        path = f"{self._folder}/attempts/{run}-{number:05d}.json"
        try:
            before = saved.checked(self._store.read_json(path), int, path)
        except FileNotFoundError:
            before = 0
        self._store.write_json(path, before + 1)
        return before

    def keep(self, entry: Planned, suffix: str, make: Callable[[Path], Facts]) -> Done:
        """Have `make` leave a part, then write its manifest row."""
        name = f"part-{entry.number:05d}{suffix}"
        self._fs.create_dir(f"{self._base}/parts", recursive=True)
        if isinstance(self._fs, pafs.LocalFileSystem):
            facts = make(Path(self._base, "parts", name))
        else:
            with tempfile.TemporaryDirectory() as scratch:
                facts = make(Path(scratch, name))
                with Path(scratch, name).open("rb") as source, self._fs.open_output_stream(self._part(name)) as target:
                    shutil.copyfileobj(source, target, 1 << 22)
        row = {"number": entry.number, "first": entry.first, "planned": entry.sha256, **facts.model_dump()}
        self._store.write_json(f"{self._folder}/done/{entry.number:05d}.json", row)
        return Done.model_validate(row)

    def _part(self, name: str) -> str:
        return f"{self._base}/parts/{name}"

    def copy_parts(self, directory: Path) -> None:
        """Put all planned parts into a local directory: links on a disk, copies from an object store."""
        for entry in self.plan or []:
            row = self.done(entry)
            assert row is not None, "every part was made"
            source, target = self._part(row.path), directory / row.path
            if isinstance(self._fs, pafs.LocalFileSystem):
                # A link, not a move: a kill before the commit must not cost the parts.
                os.link(source, target)
            else:
                pafs.copy_files(source, str(target), source_filesystem=self._fs, destination_filesystem=pafs.LocalFileSystem())


def planned(place: Place, data: DataSet, rows_per_shard: int) -> list[Planned]:
    """Return the planned shards: those of an extraction that was cut short, if their texts are whole."""
    entries = place.plan
    if entries is not None and all(_is_whole(place.texts(entry.number), entry) for entry in entries):
        return entries
    entries = []
    read = rows.read(data)
    for number, first in enumerate(range(0, len(read), rows_per_shard)):
        chosen = read[first : first + rows_per_shard]
        taken = [
            {name: row.get(name) for name in _TEXT_FIELDS[data.format]}
            | {name: row[name] for name in _FIELDS_BESIDE.get(data.format, ()) if name in row}
            for row in chosen
        ]
        texts = json.dumps(taken, ensure_ascii=False)
        place.write_texts(number, texts)
        entries.append(Planned(number=number, first=first, rows=len(taken), sha256=_sha256(texts)))
    place.plan = entries
    return entries


def _is_whole(texts: str | None, entry: Planned) -> bool:
    return texts is not None and _sha256(texts) == entry.sha256


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
