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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from steerlab.data import sources
from steerlab.guards import files, saved, texts
from steerlab.job import ScaleConfig
from steerlab.storage import bases
from steerlab.storage.store import Store

Status = Literal["cached", "to run", "ran", "failed"]
Report = Callable[[dict[str, Any]], None]
_POLL_S = 0.2


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
    inputs: tuple[Path, ...]
    """Local directories of the input artifacts, in the order of `Stage.inputs`."""
    scale: ScaleConfig
    report: Report
    """Takes metrics and progress while the stage runs."""

    @property
    def params(self) -> Mapping[str, Any]:
        """The declared parameters, with files on disk by their paths."""
        return replaced(self.stage.params, self.stage.places)


@dataclass(frozen=True)
class Stage:
    """One node of a plan."""

    name: str
    version: int
    params: Mapping[str, Any]
    """Declared parameters: JSON values only. A file on disk stands there as the fingerprint of its content."""
    run: Callable[[Work], None]
    inputs: tuple[Stage, ...] = ()
    label: str = ""
    """What a person reads; not hashed."""
    places: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints of files on disk -> where they lie; not hashed, so that a file is one artifact however it is called."""

    @cached_property
    def key(self) -> str:
        """Address of the artifact."""
        made_of = [self.name, self.version, self.params, [stage.key for stage in self.inputs]]
        return hashlib.sha256(json.dumps(made_of, sort_keys=True, allow_nan=False).encode()).hexdigest()


def replaced(value: Any, places: Mapping[str, str]) -> Any:
    """Return JSON values with other texts in place of those that `places` has."""
    if isinstance(value, Mapping):
        return {name: replaced(one, places) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [replaced(one, places) for one in value]
    return places.get(value, value) if isinstance(value, str) else value


@dataclass
class Record:
    """What became of a stage in one run: a line of plan.json."""

    stage: Stage
    status: Status
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return the line."""
        return {
            "name": self.stage.name,
            "label": texts.without_secrets(self.stage.label),
            "key": self.stage.key,
            "status": self.status,
            "seconds": round(self.seconds, 3),
            "inputs": [stage.key for stage in self.stage.inputs],
        }


def ordered(targets: Sequence[Stage]) -> list[Stage]:
    """Return the targets and all they need, inputs first, each artifact once."""
    found: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        for needed in stage.inputs:
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
    reported: Callable[[Stage, dict[str, Any]], None] = lambda stage, metrics: None


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
    with claim(store, stage):
        # Whoever held the claim before may have finished it.
        if store.has(stage.name, stage.key):
            return "cached"
        _execute(stage, store, scale, listener)
    return "ran"


class Made(saved.Shape):
    """What the manifest of an artifact says of its making."""

    params: dict[str, Any]
    seconds: float
    """Seconds that the stage took."""


def made(store: Store, stage: str, key: str) -> Made:
    """Return how an artifact was made. Raises ValueError where it is not there or its manifest is damaged."""
    return saved.checked(store.manifest(stage, key)["meta"], Made, f"the manifest of {stage}/{key} in {store.root}")


def _execute(stage: Stage, store: Store, scale: ScaleConfig, listener: Listener) -> None:
    inputs = tuple(store.local(needed.name, needed.key) for needed in stage.inputs)
    start_s = time.monotonic()
    with store.temporary(stage.name, stage.key) as directory:
        stage.run(Work(store, stage, directory, inputs, scale, lambda metrics: listener.reported(stage, metrics)))
        meta = {
            "params": dict(stage.params),
            "version": stage.version,
            "inputs": [[needed.name, needed.key] for needed in stage.inputs],
            "seconds": round(time.monotonic() - start_s, 3),
            **({"places": dict(stage.places)} if stage.places else {}),
        }
        store.commit(stage.name, stage.key, directory, meta)
    store.discard_work(stage.name, stage.key)


class Held(RuntimeError):
    """Somebody else holds a claim that nobody wants to wait for."""


def claim(store: Store, stage: Stage) -> AbstractContextManager[None]:
    """Hold the only right to run a stage; wait for whoever has it."""
    return hold(store, f"{stage.name}-{stage.key}", wait=True)


@contextmanager
def hold(store: Store, name: str, *, wait: bool) -> Iterator[None]:
    """Hold a claim; it ends with the process that holds it, however that dies. Raises Held if it is taken and not waited for.

    On a local ROOT it is a file lock, which the kernel gives back; elsewhere the name of a Ray actor, which Ray gives back when
    the driver that made it is gone. Two Ray clusters on one bucket are not kept apart.
    """
    if store.is_local:
        path = Path(store.root.removeprefix("file://")) / "claims" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(files.locked(path, wait=wait))
            except BlockingIOError:
                raise Held(name) from None
            yield
        return
    actor = _claim_actor(f"claim-{name}", wait)
    try:
        yield
    finally:
        import ray

        ray.kill(actor)


def _claim_actor(name: str, wait: bool) -> Any:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Claim:
        def held(self) -> bool:
            return True

    beside_the_driver: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    make: Any = ray.remote(num_cpus=0, scheduling_strategy=beside_the_driver)(Claim)
    while True:
        try:
            actor = make.options(name=name, namespace="steerlab").remote()
            ray.get(actor.held.remote())
            return actor
        except ValueError:  # the name is taken: somebody else is running this stage
            if not wait:
                raise Held(name) from None
            time.sleep(_POLL_S)
