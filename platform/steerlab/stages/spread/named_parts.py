"""Compute the named parts of a preparation, each in a separate Ray task."""

from __future__ import annotations

import hashlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from steerlab.guards import late
from steerlab.guards.json_values import JsonObject
from steerlab.methods.preparations import MakePart, Source
from steerlab.stages.spread import calls, reserved, subject
from steerlab.stages.spread.making import located, references
from steerlab.stages.spread.shard_plan import Done, Facts, Planned, WorkFolder
from steerlab.stages.spread.subject import Loading
from steerlab.storage.plan import ModelRef, Work
from steerlab.storage.tensors import INDEX, Parts
from steerlab.storage.whole import size_and_sha256

if TYPE_CHECKING:
    import ray

else:
    ray = late.module("ray")


class _NamedPart(Facts):
    """Record of a part that is identified by a name instead of rows."""

    name: str
    facts: dict[str, object]
    """What the method's function returned about the part; "note" is a warning for the user."""


def make_parts(make: MakePart, parts: tuple[str, ...], reads_model: bool, work: Work) -> None:
    """Make the missing parts, each in a separate Ray task.

    `make` is the method's function that writes one part; the tasks load the model if `reads_model`.
    """
    folder = WorkFolder(work.store.root, work.stage.name, work.stage.key)
    entries = [
        Planned(number=number, first=number, rows=1, name=name, sha256=hashlib.sha256(name.encode()).hexdigest())
        for number, name in enumerate(parts)
    ]
    # The plan is always rewritten: parts have no rows that could have changed, and the stage's key covers their names.
    folder.plan = entries
    done = {entry.name: row for entry in entries if (row := folder.done(entry, verify=True)) is not None}
    loading = subject.of(work) if reads_model else None
    request = (make, work.params, references(work), folder.address, loading)
    # The reservation is limited to the cluster's CPUs: a task that reserves more would wait forever instead of failing.
    num_cpus = min(work.scale.cpus_per_worker, reserved.present()["CPU"])
    arguments = [(*request, entry) for entry in entries if entry.name not in done]
    for name, row in calls.results(_make_part, arguments, num_cpus):
        done[name] = row
        work.report({"done": len(done), "total": len(entries)})
    work.directory.mkdir(parents=True, exist_ok=True)
    folder.copy_parts(work.directory)
    records = {name: _NamedPart.model_validate(done[name].model_dump()) for name in parts}
    notes = [str(part.facts["note"]) for part in records.values() if "note" in part.facts]
    if notes:
        # Only one warning is given, since a method that warns of a module tends to warn of all modules of the model.
        warnings.warn(notes[0] + (f" (and {len(notes) - 1} more like this)" if len(notes) > 1 else ""), stacklevel=2)
    facts = {name: part.facts for name, part in records.items()}  # in the method's order, not that of the finished tasks
    Parts.write_index(work.directory, facts, {name: part.path for name, part in records.items()})


def remove_parts(directory: Path) -> None:
    """Remove the files of `make_parts` from a directory, for a stage that has copied their content."""
    parts = Parts.open(directory)
    for path in {*parts.files, directory / INDEX}:
        path.unlink()


def _make_part(
    make: MakePart,
    params: JsonObject,
    needed: dict[str, ModelRef],
    address: tuple[str, str, str],
    loading: Loading | None,
    entry: Planned,
) -> tuple[str, Done]:
    """Make one part and return its name and its record."""
    # PyTorch starts a thread for every core of the node, not for the CPUs that Ray reserved for this task.
    torch.set_num_threads(reserved.threads())
    source = Source(params, located(needed), None if loading is None else subject.load(loading))

    def keep(path: Path) -> _NamedPart:
        facts = make(source, entry.name, path)
        return _NamedPart(path=path.name, name=entry.name, facts=dict(facts), **size_and_sha256(path))

    return entry.name, WorkFolder(*address).keep(entry, ".safetensors", keep)
