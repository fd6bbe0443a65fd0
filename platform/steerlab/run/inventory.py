"""List the content of a ROOT: its runs and sweeps with their status and sizes, and the artifacts that they name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from steerlab.evaluation.judging import kept_answers
from steerlab.guards.saved import SavedError
from steerlab.run import folder as folders
from steerlab.storage import claims
from steerlab.storage.manifests import MANIFEST
from steerlab.storage.store import Store, StoreError

Status = Literal["finished", "failed", "running", "unfinished", "damaged"]
Address = tuple[str, str]
"""Stage and key of an artifact."""
PAID = kept_answers.STAGE
"""Stage of the stored answers of judges' APIs. No run names them, but they cost money, so they are never removed."""
_STAGE_COLUMN = "key."
"""Prefix of the columns of trials.parquet that hold keys of artifacts."""


@dataclass(frozen=True)
class Entry:
    """A run or a sweep."""

    kind: Literal["run", "sweep"]
    folder: str
    """The entry's folder, relative to ROOT."""
    status: Status
    num_bytes: int
    """Size of the folder in bytes."""
    names: frozenset[Address] = frozenset()
    """Artifacts that the entry names."""
    problem: str = ""
    """Why the artifacts that it names cannot be determined; empty if they can."""


@dataclass(frozen=True)
class Inventory:
    """The content of a ROOT."""

    entries: list[Entry]
    artifacts: Mapping[Address, int]
    """Size in bytes of each complete artifact."""
    incomplete: Mapping[Address, int] = field(default_factory=dict)
    """Size of each directory of an artifact without its manifest, which counts as incomplete."""
    work: Mapping[Address, int] = field(default_factory=dict)
    """Size of each work directory: checkpoints and parts of stages that have not ended."""

    @property
    def named(self) -> set[Address]:
        """Artifacts that at least one run or sweep names."""
        return {address for entry in self.entries for address in entry.names}

    def bytes_of(self, entry: Entry) -> int:
        """Return the size of the artifacts that an entry names, which others may name as well."""
        return sum(self.artifacts.get(address, 0) for address in entry.names)


def take(store: Store) -> Inventory:
    """Read the content of a ROOT. A run or sweep with damaged files gets the status "damaged"; no error is raised."""
    sizes = store.sizes("artifacts")
    complete = {_address(path) for path in sizes if path.endswith(f"/{MANIFEST}") and path.count("/") == 3}
    directories, work = _summed(sizes), _summed(store.sizes("work"))
    artifacts = {address: size for address, size in directories.items() if address in complete}
    incomplete = {address: size for address, size in directories.items() if address not in complete}
    of_runs, of_sweeps = store.sizes("runs"), store.sizes("sweeps")
    entries = [_run(store, folder, size) for folder, size in _folders(of_runs).items()]
    entries += [_sweep(store, folder, size) for folder, size in _folders(of_sweeps).items()]
    return Inventory(entries, artifacts, incomplete, work)


def _address(path: str) -> Address:
    _, stage, key, *_ = path.split("/")
    return stage, key


def _summed(sizes: Mapping[str, int]) -> dict[Address, int]:
    """Return the bytes below each <folder>/<stage>/<key>."""
    sums: dict[Address, int] = {}
    for path, size in sizes.items():
        if path.count("/") >= 3:
            sums[_address(path)] = sums.get(_address(path), 0) + size
    return dict(sorted(sums.items()))


def _folders(sizes: Mapping[str, int]) -> dict[str, int]:
    """Return the bytes of each runs/<name>/<id> or sweeps/<name>/<id>, newest last."""
    sums: dict[str, int] = {}
    for path, size in sizes.items():
        if path.count("/") >= 3:
            folder = "/".join(path.split("/")[:3])
            sums[folder] = sums.get(folder, 0) + size
    return dict(sorted(sums.items(), key=lambda item: item[0].rpartition("/")[2]))


def _run(store: Store, folder: str, num_bytes: int) -> Entry:
    files = store.list(folder)
    try:
        stages = folders.stages(store, folder)
    except FileNotFoundError:
        # Earlier versions wrote the plan at the end, so the artifacts of a run that was killed then are unknown.
        return Entry("run", folder, "unfinished", num_bytes, problem="it has no plan.json")
    except (SavedError, StoreError) as error:
        return Entry("run", folder, "damaged", num_bytes, problem=str(error))
    names = frozenset((str(stage["name"]), str(stage["key"])) for stage in stages)
    if "summary.json" in files:
        status: Status = "finished"
    elif "error.txt" in files:
        status = "failed"
    else:
        status = "running" if any(claims.is_held(store, f"{stage}-{key}") for stage, key in names) else "unfinished"
    return Entry("run", folder, status, num_bytes, names)


def _sweep(store: Store, folder: str, num_bytes: int) -> Entry:
    files = store.list(folder)
    claimed = claims.is_held(store, f"sweep-{folder.rpartition('/')[2]}")
    status: Status = "finished" if "summary.json" in files else "running" if claimed else "unfinished"
    try:
        rows = folders.trials(store, folder) if "trials.parquet" in files else []
    except (ValueError, OSError) as error:
        return Entry("sweep", folder, "damaged", num_bytes, problem=" ".join(str(error).split())[:300])
    return Entry("sweep", folder, status, num_bytes, frozenset(_keys(rows)))


def _keys(rows: Iterable[Mapping[str, object]]) -> set[Address]:
    """Return the artifacts in the columns `key.<stage>`, `key.<stage>.<depth>` and `key.evaluate.<label>` of trials."""
    columns = ((name, key) for row in rows for name, key in row.items() if name.startswith(_STAGE_COLUMN))
    return {(name.split(".")[1], key) for name, key in columns if isinstance(key, str)}
