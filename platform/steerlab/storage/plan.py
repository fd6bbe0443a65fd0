"""A plan: stages, each addressed by a hash of its parameters and inputs, and each computed once.

    key = SHA-256(stage name, stage version, declared parameters, keys of the inputs)

A stage is a pure function that fills one directory from its parameters and inputs. It receives nothing else that could change
the result, so that a setting which is not part of its key cannot reach it. The size of the cluster (`scale`) is passed
separately and never hashed, since it must not change a result.

Runs on one ROOT share work: a stage whose artifact exists is skipped, and a stage that another run is computing is waited for,
on whichever machine that runs (claims.py).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

from steerlab.data import sources
from steerlab.guards import saved, texts
from steerlab.guards.json_values import Json, JsonObject
from steerlab.job import ScaleConfig
from steerlab.storage import bases, claims
from steerlab.storage.records import one_line
from steerlab.storage.store import Store, StoreError

Status = Literal["cached", "to run", "damaged", "ran", "failed"]
Report = Callable[[dict[str, float]], None]


class StageError(RuntimeError):
    """A stage failed; the message names the stage, the cause and the log file."""


@dataclass(frozen=True)
class Estimate:
    """Rough estimate of the memory and disk that a stage needs."""

    memory_bytes: int = 0
    """Peak memory of one worker, in bytes; 0 if unknown."""
    disk_bytes: int = 0
    """Size of the artifact, in bytes; 0 if unknown or small."""
    work_bytes: int = 0
    """Size of checkpoints and parts in the work directory while the stage runs, in bytes; 0 without these."""


@dataclass(frozen=True)
class Work:
    """The arguments of a running stage."""

    store: Store
    stage: Stage
    directory: Path
    """Empty local directory to fill; it becomes the artifact when the stage returns."""
    inputs: Mapping[str, Path]
    """Local directories of the input artifacts, under the names of `Stage.inputs`."""
    scale: ScaleConfig
    """Number and size of workers; must not change the result."""
    report: Report
    """Takes metrics and progress while the stage runs."""

    @property
    def params(self) -> JsonObject:
        """The declared parameters, in which the fingerprints of files on disk are replaced by their paths."""
        # The key contains the hash, and the running stage gets the path, so a file that moves has the same artifacts.
        return {name: replaced(value, self.stage.paths) for name, value in self.stage.params.items()}


@dataclass(frozen=True)
class Stage:
    """One node of a plan."""

    name: str
    version: int
    params: Mapping[str, Json]
    """Declared parameters: JSON values. A file on disk is represented by the fingerprint of its content."""
    run: Callable[[Work], None]
    """Fills `Work.directory`; after an exception the artifact does not exist."""
    inputs: Mapping[str, Stage] = field(default_factory=dict)
    """Stages whose artifacts this one reads, by their purpose here. Their order is hashed; the names are not."""
    label: str = ""
    """Description for users; not hashed."""
    paths: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of files on disk -> their paths; not hashed, so that a file that is moved or renamed keeps its artifacts."""

    @cached_property
    def key(self) -> str:
        """Address of the artifact: 64 hexadecimal digits."""
        # Keys are sorted, because the order in which a config lists its fields does not change its meaning. NaN is refused,
        # because it is not JSON and other readers of the manifest would refuse it.
        hashed = [self.name, self.version, self.params, [stage.key for stage in self.inputs.values()]]
        return hashlib.sha256(json.dumps(hashed, sort_keys=True, allow_nan=False).encode()).hexdigest()


def replaced(value: Json, replacements: Mapping[str, str]) -> Json:
    """Return a JSON value in which the texts that are keys of `replacements` are replaced by its values."""
    if isinstance(value, dict):
        return {name: replaced(item, replacements) for name, item in value.items()}
    if isinstance(value, list | tuple):  # methods declare some parameters as tuples
        return [replaced(item, replacements) for item in value]
    return replacements.get(value, value) if isinstance(value, str) else value


@dataclass
class Record:
    """Status of a stage in one run: an entry of plan.json."""

    stage: Stage
    status: Status
    seconds: float = 0.0
    damage: str = ""
    """Damage of a damaged artifact with the remedy; empty for others."""

    def as_dict(self) -> JsonObject:
        """Return the entry."""
        return {
            "name": self.stage.name,
            "label": texts.without_secrets(self.stage.label),
            "key": self.stage.key,
            "status": self.status,
            "seconds": round(self.seconds, 3),
            "inputs": [stage.key for stage in self.stage.inputs.values()],
            **({"damage": self.damage} if self.damage else {}),
        }


def ordered(targets: Sequence[Stage]) -> list[Stage]:
    """Return the targets and all stages that they need: inputs before the stages that read them, each artifact once."""
    stages: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        # A stage is made from stages that exist before it and cannot need itself, so that the recursion ends.
        for needed in stage.inputs.values():
            visit(needed)
        # Two stage objects with one key make the same artifact; the first one stays, with its label.
        stages.setdefault(stage.key, stage)

    for target in targets:
        visit(target)
    return list(stages.values())


def status(stages: Sequence[Stage], store: Store) -> list[Record]:
    """Return for each stage whether its artifact exists ("cached"), does not ("to run") or is damaged ("damaged")."""
    return [_looked_up(stage, store) for stage in stages]


def _looked_up(stage: Stage, store: Store) -> Record:
    if not store.has(stage.name, stage.key):
        return Record(stage, "to run")
    try:
        store.check(stage.name, stage.key)
    except StoreError as error:
        return Record(stage, "damaged", damage=str(error))
    return Record(stage, "cached")


@dataclass(frozen=True)
class ModelRef:
    """Reference to a source or an artifact that is valid on every node. It may refer to a model or to any other artifact."""

    source: str | None = None
    """The source; None for an artifact."""
    artifact: tuple[str, str, str] | None = None
    """(ROOT, stage, key); None for a source."""
    subfolder: str = ""
    """Folder inside the artifact; empty for the artifact itself."""

    def locate(self) -> Path:
        """Return a local directory on this node, after downloading it if necessary."""
        if self.artifact is not None:
            root, stage, key = self.artifact
            return located(Store(root), stage, key) / self.subfolder
        assert self.source is not None
        return sources.fetch(self.source)


def located(store: Store, stage: str, key: str) -> Path:
    """Return the local directory of an artifact, after making sure that the models of its patches are local too."""
    # A patch names its model by stage and key (`base.json`), which is looked up beside it; from an object store, each of these
    # artifacts has to be downloaded first. `seen` ends the loop on a damaged chain, which `bases.chain` then reports.
    directory = store.local(stage, key)
    seen, base = {(stage, key)}, bases.read(directory)
    while base is not None and base.source is None and (base.stage, base.key) not in seen:
        seen.add((base.stage, base.key))
        base = bases.read(store.local(base.stage, base.key))
    return directory


@dataclass
class Listener:
    """Functions that are called while a plan runs: before a stage, after it, with its metrics, and while it waits."""

    started: Callable[[Stage], None] = lambda stage: None
    ended: Callable[[Record], None] = lambda record: None
    reported: Callable[[Stage, dict[str, float]], None] = lambda stage, metrics: None
    waiting: Callable[[Stage, str], None] = lambda stage, line: None
    """Called with a line for users while a stage waits for another run that computes it."""


def run(stages: Sequence[Stage], store: Store, scale: ScaleConfig, listener: Listener, records: list[Record]) -> None:
    """Run a plan: skip stages whose artifact exists, and wait for stages that another process is computing.

    Args:
        stages: The stages, inputs before the stages that read them (see `ordered`).
        store: The store of the artifacts.
        scale: Number and size of the workers.
        listener: Called as the plan proceeds.
        records: Filled with a record of each stage that was reached. If a stage raises, its record is the last one.
    """
    for stage in stages:
        listener.started(stage)
        start_s = time.monotonic()
        # The stage is recorded as failed first, so that the status is right whatever exception ends it, including Ctrl-C.
        record = Record(stage, "failed")
        records.append(record)
        try:
            record.status = _ensure(stage, store, scale, listener)
        finally:
            record.seconds = time.monotonic() - start_s
            listener.ended(record)


def _ensure(stage: Stage, store: Store, scale: ScaleConfig, listener: Listener) -> Status:
    say = partial(listener.waiting, stage)
    while not store.has(stage.name, stage.key):
        with claims.hold(store, f"{stage.name}-{stage.key}", wait=True, say=say) as claim:
            # The store is checked again, because the process that held the claim before may have finished the artifact.
            if store.has(stage.name, stage.key):
                break
            try:
                _execute(stage, store, scale, listener, claim)
                return "ran"
            except Exception as error:
                # After the claim was lost any error may be a consequence: the new holder may have removed files that this
                # process was reading.
                if not claim.lost:
                    raise
                say(f"{one_line(error)}; waits for the artifact")
    # The artifact is checked before it is used, so that a damaged one is refused instead of counted as cached.
    store.check(stage.name, stage.key)
    store.discard_work(stage.name, stage.key)  # it remains if a kill came between the commit and this line
    return "cached"


class Made(saved.Shape):
    """Origin of an artifact, according to its manifest."""

    params: JsonObject
    seconds: float
    """Seconds that the stage took."""


def made(store: Store, stage: str, key: str) -> Made:
    """Return the origin of an artifact.

    Raises:
        ValueError: the manifest is damaged.
        StoreError: the artifact does not exist.
    """
    return saved.checked(store.manifest(stage, key)["meta"], Made, f"the manifest of {stage}/{key} in {store.root}")


def _execute(stage: Stage, store: Store, scale: ScaleConfig, listener: Listener, claim: claims.Claim) -> None:
    """Run a stage into a temporary directory, commit that as its artifact, and discard its work directory."""
    # Inputs are fetched before the clock starts, because a download is not part of the stage's own time, from which later runs
    # are estimated.
    inputs = {name: store.local(needed.name, needed.key) for name, needed in stage.inputs.items()}
    start_s = time.monotonic()

    def report(metrics: dict[str, float]) -> None:
        if claim.lost:  # this flag needs no request, and every step is too often for one
            claim.check()
        listener.reported(stage, metrics)

    store.sweep_temporary_of(stage.name, stage.key)
    with store.temporary(stage.name, stage.key) as directory:
        stage.run(Work(store, stage, directory, inputs, scale, report))
        meta: JsonObject = {
            "params": dict(stage.params),
            "version": stage.version,
            "inputs": [[needed.name, needed.key] for needed in stage.inputs.values()],
            "seconds": round(time.monotonic() - start_s, 3),
            # "places" is the name of `Stage.paths` in the file format.
            **({"places": dict(stage.paths)} if stage.paths else {}),
        }
        claim.check()
        # The commit is inside the block, because `temporary` removes its directory at the end; after a commit it has been moved
        # already.
        store.commit(stage.name, stage.key, directory, meta)
    # The work directory is discarded after the commit, because until then its checkpoints and parts are needed if this process
    # dies. A process that has lost the claim does not discard it, because the new holder needs it and removes it itself.
    claim.check()
    store.discard_work(stage.name, stage.key)
