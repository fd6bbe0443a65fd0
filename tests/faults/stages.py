"""Small stages that are committed without a claim, which on an object store would start a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from steerlab.job import ScaleConfig
from steerlab.storage import plan
from steerlab.storage.plan import Stage, Work
from steerlab.storage.store import Store


def stage(name: str, number: float, *inputs: Stage, fill: Callable[[Path], None] | None = None) -> Stage:
    """Return a stage that writes a file with its name and number, or what `fill` writes."""

    def run(work: Work) -> None:
        if fill is not None:
            return fill(work.directory)
        (work.directory / "content").write_text(f"{name} {number}" * 100)

    return Stage(name, 1, {"number": number}, run, {f"{i}": needed for i, needed in enumerate(inputs)})


def made(store: Store, *stages: Stage) -> None:
    """Commit the artifacts of stages and of their inputs."""
    for one in plan.ordered(stages):
        with store.temporary(one.name, one.key) as directory:
            one.run(Work(store, one, directory, {}, ScaleConfig(), lambda metrics: None))
            inputs = [[needed.name, needed.key] for needed in one.inputs.values()]
            meta = {"params": dict(one.params), "version": one.version, "inputs": inputs, "seconds": 0.5}
            store.commit(one.name, one.key, directory, meta)
