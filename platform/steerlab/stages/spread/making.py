"""How what a method prepares is computed on workers: sums over rows, tensors of each row, parts; continued after a kill.

All leave a directory that `tensors.Parts` opens.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray
import torch
from safetensors import safe_open

from steerlab import models
from steerlab.activations import reading
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.tokens import collate
from steerlab.methods.preparations import MakePart, Source, StartKeeper, StartSums
from steerlab.stages.spread import reserved, shards, subject
from steerlab.stages.spread.shard_plan import Place, Shard
from steerlab.stages.spread.subject import Loading
from steerlab.storage.plan import ModelRef, Work
from steerlab.storage.tensors import Parts, Shape, writing
from steerlab.storage.whole import size_and_sha256

if TYPE_CHECKING:
    from steerlab.steered.language import SteeredModel

_POLL_S = 0.5
_WHOLE = "all"
"""Name of the only part of a sum."""


def _needed(work: Work) -> dict[str, ModelRef]:
    """Return where the artifacts of the preparations before lie, valid on every node."""
    needed = {name: stage for name, stage in work.stage.inputs.items() if name != subject.MODEL}
    return {name: ModelRef(artifact=(work.store.root, stage.name, stage.key)) for name, stage in needed.items()}


def _located(needed: Mapping[str, ModelRef]) -> dict[str, Path]:
    return {name: ref.locate() for name, ref in needed.items()}


def sum_shards(start: StartSums, work: Work) -> None:
    """Sum the shards that are missing in a pool of actors, then add them up in the order of the shards."""
    maker = partial(SumOfShard, start, _needed(work))
    made = shards.run(work, maker, work.params["rows_per_shard"], lambda num_rows, some: None)
    work.directory.mkdir(parents=True, exist_ok=True)
    name = "part-00000.safetensors"
    with shards.parts(work) as paths:
        _add_up(paths, work.directory / name)
    facts = {fact: sum(row[fact] for row in made) for fact in ("rows", "batches", "tokens", "cut", "dropped")}
    Parts.write_index(work.directory, {_WHOLE: facts}, {_WHOLE: name})


def _add_up(paths: list[Path], target: Path) -> None:
    """Write the sum of each tensor over some files, holding one of it at once."""
    with safe_open(paths[0], "pt") as first:
        shapes = {name: Shape(torch.float32, first.get_slice(name).get_shape()) for name in first.offset_keys()}
    with writing(target, shapes) as writer:
        for name in shapes:
            total: torch.Tensor | None = None
            for path in paths:
                with safe_open(path, "pt") as file:
                    tensor = file.get_tensor(name)
                total = tensor if total is None else total + tensor
            assert total is not None
            writer.write(name, total)


class SumOfShard(shards.Maker):
    """Makes the sum over a shard's batches; a shard holds whole batches, so that the shards change no batch."""

    suffix = ".safetensors"

    def __init__(
        self, start: StartSums, needed: Mapping[str, ModelRef], model: SteeredModel, params: Mapping[str, Any]
    ) -> None:
        """Sum what `start` begins; `needed` refers to the artifacts of the preparations before."""
        self._start, self._needed, self._model, self._params = start, _located(needed), model, params

    def make(self, shard: Shard, path: Path, tell: Callable[[int], None]) -> dict[str, Any]:
        """Leave the sums at `path`."""
        encoder, size = self._model.encoder, self._params["rows_per_batch"]
        data, max_tokens = self._params["data"], self._params["max_tokens"]
        found = encode_data(encoder, shard.rows, data["format"], max_tokens, skip_bad=data.get("skip_bad", False))
        found.check(self._params["max_tokens"])
        sums = self._start(self._model, self._params, self._needed)
        try:
            for first in range(0, len(found.rows), size):
                batch = collate(found.rows[first : first + size], encoder.pad_id, loss_on=self._params["data"]["loss_on"])
                sums.add(batch.to(self._model.device), (shard.first + first) // size)
                tell(first)
        finally:
            sums.close()
        with writing(path, sums.shapes) as writer:
            for name, tensor in sums.tensors():
                writer.write(name, tensor)
        return {
            "path": path.name,
            **size_and_sha256(path),
            "rows": len(found.rows),
            "batches": -(-len(found.rows) // size),
            "tokens": sum(len(row) for row in found.rows),
            "cut": found.num_cut,
            "dropped": found.num_dropped,
            "refused": found.num_refused,
        }


def keep_shards(start: StartKeeper, work: Work) -> None:
    """Make the shards that are missing in a pool of actors, and index the tensors of all."""
    maker = partial(TensorsOfShard, start)
    made = shards.run(work, maker, work.params["rows_per_shard"], lambda num_rows, some: None)
    shards.collect(work)
    facts = {row["path"]: {name: row[name] for name in TensorsOfShard.facts} for row in made}
    Parts.write_index(work.directory, facts, {path: path for path in facts})


class TensorsOfShard(shards.Maker):
    """Keeps tensors of a shard's rows, those of a batch at a time in memory."""

    suffix = ".safetensors"
    facts = ("rows", "cut", "dropped", "fingerprint")

    def __init__(self, start: StartKeeper, model: SteeredModel, params: Mapping[str, Any]) -> None:
        self._start, self._model, self._params = start, model, params

    def make(self, shard: Shard, path: Path, tell: Callable[[int], None]) -> dict[str, Any]:
        """Leave the tensors at `path`, in the order of the batches; rows of similar length go together."""
        encoder, data = self._model.encoder, self._params["data"]
        max_tokens = self._params["max_tokens"]
        found = encode_data(encoder, shard.rows, data["format"], max_tokens, skip_bad=data.get("skip_bad", False))
        numbers = [shard.first + number for number in found.numbers]
        lengths, alike = [len(row) for row in found.rows], models.alike_up_to(self._model.model)
        chunks = list(reading.batches(lengths, self._params["batch_tokens"], reading.PADDING_SHARE, alike=alike))
        keeper = self._start(self._model, self._params)
        shapes = {
            name: shape for chunk in chunks for i in chunk for name, shape in keeper.shapes(numbers[i], found.rows[i]).items()
        }
        num_done = 0
        try:
            with writing(path, shapes) as writer, torch.no_grad():
                for chunk in chunks:
                    chosen = [numbers[i] for i in chunk]
                    batch = collate([found.rows[i] for i in chunk], encoder.pad_id, loss_on=data["loss_on"], numbers=chosen)
                    for name, tensor in keeper.keep(batch.to(self._model.device)):
                        writer.write(name, tensor)
                    num_done += len(chunk)
                    tell(num_done)
        finally:
            keeper.close()
        return {
            "path": path.name,
            **size_and_sha256(path),
            "rows": len(found.rows),
            "cut": found.num_cut,
            "dropped": found.num_dropped,
            "refused": found.num_refused,
            "fingerprint": models.fingerprint(self._model.model),
        }


def make_parts(make: MakePart, parts: tuple[str, ...], reads_model: bool, work: Work) -> None:
    """Make the parts that are missing, one task each."""
    place = Place(work.store.root, work.stage.name, work.stage.key)
    entries = [
        {"number": number, "first": number, "rows": 1, "name": name, "sha256": hashlib.sha256(name.encode()).hexdigest()}
        for number, name in enumerate(parts)
    ]
    place.plan = entries
    done = {entry["name"]: row for entry in entries if (row := place.done(entry, verify=True)) is not None}
    loading = subject.of(work) if reads_model else None
    request = (make, dict(work.params), _needed(work), place.address, loading)
    num_cpus = min(work.scale.cpus_per_worker, ray.cluster_resources().get("CPU", 1))
    left = [_make_part.options(num_cpus=num_cpus).remote(*request, entry) for entry in entries if entry["name"] not in done]  # type: ignore[attr-defined]
    while left:
        ended, left = ray.wait(left, timeout=_POLL_S)
        done |= {row["name"]: row for row in ray.get(ended)}
        work.report({"done": len(done), "total": len(entries)})
    work.directory.mkdir(parents=True, exist_ok=True)
    place.copy_parts(work.directory)
    facts = {name: done[name]["facts"] for name in parts}
    notes = [known["note"] for known in facts.values() if "note" in known]
    if notes:
        warnings.warn(notes[0] + (f" (and {len(notes) - 1} more like this)" if len(notes) > 1 else ""), stacklevel=2)
    Parts.write_index(work.directory, facts, {name: done[name]["path"] for name in parts})


@ray.remote(scheduling_strategy=reserved.ANYWHERE)
def _make_part(
    make: MakePart,
    params: dict[str, Any],
    needed: dict[str, ModelRef],
    address: tuple[str, str, str],
    loading: Loading | None,
    entry: dict[str, Any],
) -> dict[str, Any]:
    """Make one part and return its manifest row."""
    torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    source = Source(params, _located(needed), None if loading is None else subject.load(loading))

    def keep(path: Path) -> dict[str, Any]:
        facts = make(source, entry["name"], path)
        return {"path": path.name, "name": entry["name"], "facts": facts, **size_and_sha256(path)}

    return Place(*address).keep(entry, ".safetensors", keep)
