"""Compute the preparations of a method over the rows of a data set on workers: sums, or tensors of each row.

Each writes a directory that `tensors.Parts` opens, and resumes with the missing shards after a kill.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open

from steerlab import models
from steerlab.activations import reading
from steerlab.guards import late
from steerlab.guards.json_values import JsonObject
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.tokens import collate
from steerlab.job import DataSet, Frozen
from steerlab.methods.preparations import StartKeeper, StartSums
from steerlab.stages.spread import shard_worker, shards, subject
from steerlab.stages.spread.shard_plan import Facts, Shard
from steerlab.storage.plan import ModelRef, Work
from steerlab.storage.tensors import Parts, Shape, writing
from steerlab.storage.whole import size_and_sha256

if TYPE_CHECKING:
    import ray

    from steerlab.steered.language import SteeredModel
else:
    ray = late.module("ray")

_WHOLE = "all"
"""Name of the single part of a sum in its index."""


def references(work: Work) -> dict[str, ModelRef]:
    """Return references, valid on every node, to the artifacts of the preparations that this one needs."""
    # The worker loads the model itself (subject.py), so no reference to the model is needed.
    stages = {name: stage for name, stage in work.stage.inputs.items() if name != subject.MODEL}
    return {name: ModelRef(artifact=(work.store.root, stage.name, stage.key)) for name, stage in stages.items()}


def located(needed: Mapping[str, ModelRef]) -> dict[str, Path]:
    """Return the local folders of the artifacts of `references`."""
    return {name: ref.locate() for name, ref in needed.items()}


class OnRows(subject.OnModel):
    """Parameters that the platform adds to the method's own in a preparation over the rows of a data set."""

    data: DataSet
    data_fingerprint: str | list[str]


class _OverRows(Frozen, extra="ignore"):
    """Parameters of a preparation over rows that determine the rows and their encoding."""

    data: DataSet
    rows_per_shard: int
    max_tokens: int


class RowFacts(Facts):
    """Counts of the rows of one shard after tokenisation."""

    rows: int
    """Number of rows that were read."""
    cut: int
    """Number of rows that were truncated to `max_tokens`."""
    dropped: int
    """Number of rows that were dropped because their prompt alone is longer than `max_tokens`."""
    refused: int
    """Number of rows that were dropped because they could not be encoded (`skip_bad`)."""


class _SumFacts(RowFacts):
    """Counts of the sums over one shard."""

    batches: int
    tokens: int


def sum_shards(start: StartSums, work: Work) -> None:
    """Sum the missing shards in a pool of actors, then write the total of all shards."""
    params = _OverRows.model_validate(work.params)
    maker = partial(SumOfShard, start, references(work), work.params)
    parts = shards.run(work, maker, _SumFacts, params.data, params.rows_per_shard)
    work.directory.mkdir(parents=True, exist_ok=True)
    name = "part-00000.safetensors"
    # Summed in the order of the shards: floating-point addition is not associative, and the result must not depend on workers.
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
    """Write the sum of each tensor over some files; memory holds one tensor's sum and one summand."""
    with safe_open(paths[0], "pt") as first:
        # `offset_keys` has the order of the file, so that the disk is read sequentially; `keys` is sorted by name.
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


class SumOfShard(shard_worker.Maker):
    """Make the sums over a shard's batches."""

    suffix = ".safetensors"

    def __init__(self, start: StartSums, needed: Mapping[str, ModelRef], params: JsonObject, model: SteeredModel) -> None:
        """Sum with the method's function `start`; `needed` refers to the artifacts of the preparations that it needs."""
        self._start, self._needed, self._model, self._params = start, located(needed), model, params
        self._over = _Summed.model_validate(params)

    def make(self, shard: Shard, path: Path, tell: Callable[[int], None]) -> _SumFacts:
        """Write the sums to `path` atomically."""
        encoder, size, data = self._model.encoder, self._over.rows_per_batch, self._over.data
        read = encode_data(encoder, shard.rows, data.format, self._over.max_tokens, skip_bad=data.skip_bad)
        # A sum over no rows would be zero, which looks like a valid result, so it is refused.
        read.check(self._over.max_tokens)
        sums = self._start(self._model, self._params, self._needed)
        try:
            for first in range(0, len(read.rows), size):
                # `rows_per_shard` is a multiple of `rows_per_batch`, so the shards change neither batches nor their numbers.
                batch = collate(read.rows[first : first + size], encoder.pad_id, loss_on=data.loss_on)
                sums.add(batch.to(self._model.device), (shard.first + first) // size)
                tell(first)
        finally:
            # The process may retain this model for the next stage, so no hook may remain on it.
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


class _TensorFacts(RowFacts):
    """Counts of the tensors of one shard's rows."""

    fingerprint: str
    """Fingerprint of the model that processed the rows."""


_INDEXED = ("rows", "cut", "dropped", "fingerprint")
"""Fields of `_TensorFacts` that the index contains."""


def keep_shards(start: StartKeeper, work: Work) -> None:
    """Make the tensors of the missing shards in a pool of actors, and write an index of the tensors of all shards."""
    params = _OverRows.model_validate(work.params)
    parts = shards.run(work, partial(TensorsOfShard, start, work.params), _TensorFacts, params.data, params.rows_per_shard)
    shards.collect(work)
    lines = {part.path: part.model_dump() for part in parts}
    facts = {path: {name: line[name] for name in _INDEXED} for path, line in lines.items()}
    Parts.write_index(work.directory, facts, {path: path for path in facts})


class _InBatches(_OverRows):
    batch_tokens: int


class TensorsOfShard(shard_worker.Maker):
    """Make the file with the tensors of a shard's rows; memory holds those of one batch."""

    suffix = ".safetensors"

    def __init__(self, start: StartKeeper, params: JsonObject, model: SteeredModel) -> None:
        self._start, self._model, self._params = start, model, params
        self._over = _InBatches.model_validate(params)

    def make(self, shard: Shard, path: Path, tell: Callable[[int], None]) -> _TensorFacts:
        """Write the tensors to `path`, in the order of the batches, which hold rows of similar length."""
        encoder, data = self._model.encoder, self._over.data
        read = encode_data(encoder, shard.rows, data.format, self._over.max_tokens, skip_bad=data.skip_bad)
        # Tensors are named by the row's number in the data set, so that the size of the shards does not change their names.
        numbers = [shard.first + number for number in read.numbers]
        lengths, alike = [len(row) for row in read.rows], models.alike_up_to(self._model.model)
        chunks = list(reading.batches(lengths, self._over.batch_tokens, reading.PADDING_SHARE, alike=alike))
        keeper = self._start(self._model, self._params)
        # A safetensors file begins with the shapes of all its tensors, so they are needed before the first batch is computed.
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
        return _TensorFacts(
            path=path.name,
            **size_and_sha256(path),
            rows=len(read.rows),
            cut=read.num_cut,
            dropped=read.num_dropped,
            refused=read.num_refused,
            fingerprint=models.fingerprint(self._model.model),
        )
