"""How what a method prepares is computed on workers: sums over rows, tensors of each row, parts; continued after a kill.

All leave a directory that `tensors.Parts` opens.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import ray
import torch
from safetensors import safe_open

from steerlab import models
from steerlab.activations import reading
from steerlab.guards.json_values import JsonObject
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.tokens import collate
from steerlab.job import DataSet, Frozen
from steerlab.methods.preparations import MakePart, Source, StartKeeper, StartSums
from steerlab.stages.spread import reserved, shards, subject
from steerlab.stages.spread.shard_plan import Done, Facts, Place, Planned, Shard
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


class OnRows(subject.OnModel):
    """Parameters that the platform adds to those of a preparation over the rows of a data set."""

    data: DataSet
    data_fingerprint: str | list[str]


class _OverRows(Frozen, extra="ignore"):
    """Parameters of such a preparation that decide which rows are read, and how."""

    data: DataSet
    rows_per_shard: int
    max_tokens: int


class RowFacts(Facts):
    """What is known of a part that rows of a data set were encoded for."""

    rows: int
    cut: int
    dropped: int
    refused: int


class _SumFacts(RowFacts):
    """What is known of the sums over a shard."""

    batches: int
    tokens: int


def sum_shards(start: StartSums, work: Work) -> None:
    """Sum the shards that are missing in a pool of actors, then add them up in the order of the shards."""
    params = _OverRows.model_validate(work.params)
    maker = partial(SumOfShard, start, _needed(work), work.params)
    parts = shards.run(work, maker, _SumFacts, params.data, params.rows_per_shard)
    work.directory.mkdir(parents=True, exist_ok=True)
    name = "part-00000.safetensors"
    with shards.parts(work) as paths:
        _add_up(paths, work.directory / name)
    facts = {
        "rows": sum(part.rows for part in parts),
        "batches": sum(part.batches for part in parts),
        "tokens": sum(part.tokens for part in parts),
        "cut": sum(part.cut for part in parts),
        "dropped": sum(part.dropped for part in parts),
    }
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


class _Summed(_OverRows):
    rows_per_batch: int


class SumOfShard(shards.Maker):
    """Makes the sum over a shard's batches; a shard holds whole batches, so that the shards change no batch."""

    suffix = ".safetensors"

    def __init__(self, start: StartSums, needed: Mapping[str, ModelRef], params: JsonObject, model: SteeredModel) -> None:
        """Sum what `start` begins; `needed` refers to the artifacts of the preparations before."""
        self._start, self._needed, self._model, self._params = start, _located(needed), model, params
        self._over = _Summed.model_validate(params)

    def make(self, shard: Shard, path: Path, tell: Callable[[int], None]) -> _SumFacts:
        """Leave the sums at `path`."""
        encoder, size, data = self._model.encoder, self._over.rows_per_batch, self._over.data
        read = encode_data(encoder, shard.rows, data.format, self._over.max_tokens, skip_bad=data.skip_bad)
        read.check(self._over.max_tokens)
        sums = self._start(self._model, self._params, self._needed)
        try:
            for first in range(0, len(read.rows), size):
                batch = collate(read.rows[first : first + size], encoder.pad_id, loss_on=data.loss_on)
                sums.add(batch.to(self._model.device), (shard.first + first) // size)
                tell(first)
        finally:
            sums.close()
        with writing(path, sums.shapes) as writer:
            for name, tensor in sums.tensors():
                writer.write(name, tensor)
        return _SumFacts(
            path=path.name,
            **size_and_sha256(path),
            rows=len(read.rows),
            batches=-(-len(read.rows) // size),
            tokens=sum(len(row) for row in read.rows),
            cut=read.num_cut,
            dropped=read.num_dropped,
            refused=read.num_refused,
        )


class _KeptFacts(RowFacts):
    """What is known of the tensors of a shard's rows."""

    fingerprint: str
    """Of the model."""


_INDEXED = ("rows", "cut", "dropped", "fingerprint")
"""Facts of a part that the index holds."""


def keep_shards(start: StartKeeper, work: Work) -> None:
    """Make the shards that are missing in a pool of actors, and index the tensors of all."""
    params = _OverRows.model_validate(work.params)
    parts = shards.run(work, partial(TensorsOfShard, start, work.params), _KeptFacts, params.data, params.rows_per_shard)
    shards.collect(work)
    lines = {part.path: part.model_dump() for part in parts}
    facts = {path: {name: line[name] for name in _INDEXED} for path, line in lines.items()}
    Parts.write_index(work.directory, facts, {path: path for path in facts})


class _Kept(_OverRows):
    batch_tokens: int


class TensorsOfShard(shards.Maker):
    """Keeps tensors of a shard's rows, those of a batch at a time in memory."""

    suffix = ".safetensors"

    def __init__(self, start: StartKeeper, params: JsonObject, model: SteeredModel) -> None:
        self._start, self._model, self._params = start, model, params
        self._over = _Kept.model_validate(params)

    def make(self, shard: Shard, path: Path, tell: Callable[[int], None]) -> _KeptFacts:
        """Leave the tensors at `path`, in the order of the batches; rows of similar length go together."""
        encoder, data = self._model.encoder, self._over.data
        read = encode_data(encoder, shard.rows, data.format, self._over.max_tokens, skip_bad=data.skip_bad)
        numbers = [shard.first + number for number in read.numbers]
        lengths, alike = [len(row) for row in read.rows], models.alike_up_to(self._model.model)
        chunks = list(reading.batches(lengths, self._over.batch_tokens, reading.PADDING_SHARE, alike=alike))
        keeper = self._start(self._model, self._params)
        shapes = {
            name: shape for chunk in chunks for i in chunk for name, shape in keeper.shapes(numbers[i], read.rows[i]).items()
        }
        num_done = 0
        try:
            with writing(path, shapes) as writer, torch.no_grad():
                for chunk in chunks:
                    chosen = [numbers[i] for i in chunk]
                    batch = collate([read.rows[i] for i in chunk], encoder.pad_id, loss_on=data.loss_on, numbers=chosen)
                    for name, tensor in keeper.keep(batch.to(self._model.device)):
                        writer.write(name, tensor)
                    num_done += len(chunk)
                    tell(num_done)
        finally:
            keeper.close()
        return _KeptFacts(
            path=path.name,
            **size_and_sha256(path),
            rows=len(read.rows),
            cut=read.num_cut,
            dropped=read.num_dropped,
            refused=read.num_refused,
            fingerprint=models.fingerprint(self._model.model),
        )


class _NamedPart(Facts):
    """The manifest row of a part by name."""

    name: str
    facts: dict[str, object]
    """What the method knows of it."""


def make_parts(make: MakePart, parts: tuple[str, ...], reads_model: bool, work: Work) -> None:
    """Make the parts that are missing, one task each."""
    place = Place(work.store.root, work.stage.name, work.stage.key)
    entries = [
        Planned(number=number, first=number, rows=1, name=name, sha256=hashlib.sha256(name.encode()).hexdigest())
        for number, name in enumerate(parts)
    ]
    place.plan = entries
    done = {entry.name: row for entry in entries if (row := place.done(entry, verify=True)) is not None}
    loading = subject.of(work) if reads_model else None
    request = (make, work.params, _needed(work), place.address, loading)
    num_cpus = min(work.scale.cpus_per_worker, ray.cluster_resources().get("CPU", 1))
    task = _make_part.options(num_cpus=num_cpus)  # type: ignore[attr-defined]
    left: list[ray.ObjectRef] = [task.remote(*request, entry) for entry in entries if entry.name not in done]
    while left:
        ended, left = ray.wait(left, timeout=_POLL_S)
        rows: list[tuple[str, Done]] = ray.get(ended)
        done |= dict(rows)
        work.report({"done": len(done), "total": len(entries)})
    work.directory.mkdir(parents=True, exist_ok=True)
    place.copy_parts(work.directory)
    made = {name: _NamedPart.model_validate(done[name].model_dump()) for name in parts}
    notes = [str(part.facts["note"]) for part in made.values() if "note" in part.facts]
    if notes:
        warnings.warn(notes[0] + (f" (and {len(notes) - 1} more like this)" if len(notes) > 1 else ""), stacklevel=2)
    Parts.write_index(
        work.directory, {name: part.facts for name, part in made.items()}, {name: part.path for name, part in made.items()}
    )


@ray.remote(scheduling_strategy=reserved.ANYWHERE)
def _make_part(
    make: MakePart,
    params: JsonObject,
    needed: dict[str, ModelRef],
    address: tuple[str, str, str],
    loading: Loading | None,
    entry: Planned,
) -> tuple[str, Done]:
    """Make one part and return its name and its manifest row."""
    torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
    source = Source(params, _located(needed), None if loading is None else subject.load(loading))

    def keep(path: Path) -> _NamedPart:
        facts = make(source, entry.name, path)
        return _NamedPart(path=path.name, name=entry.name, facts=dict(facts), **size_and_sha256(path))

    return entry.name, Place(*address).keep(entry, ".safetensors", keep)
