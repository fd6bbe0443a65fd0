"""A job's plan: stages addressed by what made them, run at most once each, whoever else is running.

    key = SHA-256(stage name, stage version, declared parameters, keys of the inputs)

A stage is a pure function of its parameters and inputs that fills one directory. It is handed nothing else that could change
the result, so a field that it did not declare cannot reach it. How the work is spread (`scale`) is handed over apart and
never hashed.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

from steerlab.data import sources
from steerlab.guards import saved, texts
from steerlab.guards.json_values import Json, JsonObject
from steerlab.job import ScaleConfig
from steerlab.storage import bases, claims
from steerlab.storage.store import Store

Status = Literal["cached", "to run", "ran", "failed"]
Report = Callable[[dict[str, float]], None]


class StageError(RuntimeError):
    """A stage failed; the message names the stage, the cause and where to read on."""


@dataclass(frozen=True)
class Estimate:
    """What a stage is expected to need; rough, and said to be."""

    memory_bytes: int = 0
    """Peak of one worker."""
    disk_bytes: int = 0
    """Size of the artifact."""
    work_bytes: int = 0
    """Checkpoints while it runs."""


@dataclass(frozen=True)
class Work:
    """All that a running stage is handed."""

    store: Store
    stage: Stage
    directory: Path
    """The directory to fill; it becomes the artifact."""
    inputs: Mapping[str, Path]
    """Local directories of the input artifacts, under the names of `Stage.inputs`."""
    scale: ScaleConfig
    report: Report
    """Takes metrics and progress while the stage runs."""

    @property
    def params(self) -> JsonObject:
        """The declared parameters, with files on disk by their paths."""
        return {name: replaced(value, self.stage.places) for name, value in self.stage.params.items()}


@dataclass(frozen=True)
class Stage:
    """One node of a plan."""

    name: str
    version: int
    params: Mapping[str, Json]
    """Declared parameters: JSON values only. A file on disk stands there as the fingerprint of its content."""
    run: Callable[[Work], None]
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    """Stages whose artifacts this one reads, by what it takes them for. Their order is hashed; the names are not."""
    label: str = ""
    """What a person reads; not hashed."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of files on disk -> where they lie; not hashed, so that a file is one artifact however it is called."""

    @cached_property
    def key(self) -> str:
        """Address of the artifact."""
        made_of = [self.name, self.version, self.params, [stage.key for stage in self.inputs.values()]]
        return hashlib.sha256(json.dumps(made_of, sort_keys=True, allow_nan=False).encode()).hexdigest()


def replaced(value: Json, places: Mapping[str, str]) -> Json:
    """Return a JSON value with other texts in place of those that `places` has."""
    if isinstance(value, dict):
        return {name: replaced(one, places) for name, one in value.items()}
    if isinstance(value, list | tuple):  # tuples: what a method declares
        return [replaced(one, places) for one in value]
    return places.get(value, value) if isinstance(value, str) else value


@dataclass
class Record:
    """What became of a stage in one run: a line of plan.json."""

    stage: Stage
    status: Status
    seconds: float = 0.0

    def as_dict(self) -> JsonObject:
        """Return the line."""
        return {
            "name": self.stage.name,
            "label": texts.without_secrets(self.stage.label),
            "key": self.stage.key,
            "status": self.status,
            "seconds": round(self.seconds, 3),
            "inputs": [stage.key for stage in self.stage.inputs.values()],
        }


def ordered(targets: Sequence[Stage]) -> list[Stage]:
    """Return the targets and all they need, inputs first, each artifact once."""
    found: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        for needed in stage.inputs.values():
            visit(needed)
        found.setdefault(stage.key, stage)

    for target in targets:
        visit(target)
    return list(found.values())


def status(stages: Sequence[Stage], store: Store) -> list[Record]:
    """Say of each stage whether it is cached or to run."""
    return [Record(stage, "cached" if store.has(stage.name, stage.key) else "to run") for stage in stages]


@dataclass(frozen=True)
class ModelRef:
    """Where a model lies, valid on every node: a source, or an artifact of a store."""

    source: str | None = None
    artifact: tuple[str, str, str] | None = None
    """(ROOT, stage, key)"""
    subfolder: str = ""
    """Folder of the artifact that is meant; empty for all of it."""

    def locate(self) -> Path:
        """Return a local directory on this node."""
        if self.artifact is not None:
            root, stage, key = self.artifact
            return located(Store(root), stage, key) / self.subfolder
        assert self.source is not None
        return sources.fetch(self.source)


def located(store: Store, stage: str, key: str) -> Path:
    """Return the local directory of an artifact; those that it stands on (`base.json`) are then beside it."""
    directory = store.local(stage, key)
    seen, base = {(stage, key)}, bases.read(directory)
    while base is not None and base.source is None and (base.stage, base.key) not in seen:
        seen.add((base.stage, base.key))
        base = bases.read(store.local(base.stage, base.key))
    return directory


@dataclass
class Listener:
    """Who is told how a plan goes."""

    started: Callable[[Stage], None] = lambda stage: None
    ended: Callable[[Record], None] = lambda record: None
    reported: Callable[[Stage, dict[str, float]], None] = lambda stage, metrics: None


def run(stages: Sequence[Stage], store: Store, scale: ScaleConfig, listener: Listener, records: list[Record]) -> None:
    """Run a plan in order and append a record for each stage: skip what is cached, wait for what another process runs.

    Raises:
        StageError: when a stage fails; its record is the last.
    """
    for stage in stages:
        listener.started(stage)
        start_s = time.monotonic()
        record = Record(stage, "failed")
        records.append(record)
        try:
            record.status = _ensure(stage, store, scale, listener)
        finally:
            record.seconds = time.monotonic() - start_s
            listener.ended(record)


def _ensure(stage: Stage, store: Store, scale: ScaleConfig, listener: Listener) -> Status:
    if store.has(stage.name, stage.key):
        store.discard_work(stage.name, stage.key)  # left if a kill came between the commit and this line
        return "cached"
    with claims.hold(store, f"{stage.name}-{stage.key}", wait=True):
        # Whoever held the claim before may have finished it.
        if store.has(stage.name, stage.key):
            return "cached"
        _execute(stage, store, scale, listener)
    return "ran"


class Made(saved.Shape):
    """What the manifest of an artifact says of its making."""

    params: JsonObject
    seconds: float
    """Seconds that the stage took."""


def made(store: Store, stage: str, key: str) -> Made:
    """Return how an artifact was made. Raises ValueError where it is not there or its manifest is damaged."""
    return saved.checked(store.manifest(stage, key)["meta"], Made, f"the manifest of {stage}/{key} in {store.root}")


def _execute(stage: Stage, store: Store, scale: ScaleConfig, listener: Listener) -> None:
    inputs = {name: store.local(needed.name, needed.key) for name, needed in stage.inputs.items()}
    start_s = time.monotonic()
    with store.temporary(stage.name, stage.key) as directory:
        stage.run(Work(store, stage, directory, inputs, scale, lambda metrics: listener.reported(stage, metrics)))
        meta: JsonObject = {
            "params": dict(stage.params),
            "version": stage.version,
            "inputs": [[needed.name, needed.key] for needed in stage.inputs.values()],
            "seconds": round(time.monotonic() - start_s, 3),
            **({"places": dict(stage.places)} if stage.places else {}),
        }
        store.commit(stage.name, stage.key, directory, meta)
    store.discard_work(stage.name, stage.key)
