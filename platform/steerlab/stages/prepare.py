"""The stages that come before a method's training, as it asks for them: moments, sums over rows, tensors of each row, parts.

What is made is the method's business (methods/preparations.py), how it is spread over workers that of `spread/making.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from steerlab import models
from steerlab.data import rows, sources
from steerlab.guards.json_values import Json
from steerlab.inputs import encoding
from steerlab.inputs.encoded_rows import encode_data
from steerlab.job import Frozen, Job, own_code
from steerlab.methods import TABLE
from steerlab.methods.preparations import KeepOfRows, MapParts, Moments, Preparation, Prepare, SumOverRows
from steerlab.models import ModelFacts
from steerlab.stages import extract, reduce
from steerlab.stages.spread import making, subject
from steerlab.stages.spread.subject import Subject
from steerlab.storage.plan import Estimate, Stage, Work

_ROWS_JUDGED = 256
"""Rows that are tokenised to judge the length of all."""


class _Batches(Frozen, extra="ignore"):
    """Parameters of a sum that decide what it needs."""

    rows_per_batch: int
    rows_per_shard: int
    max_tokens: int


class _Kept(Frozen, extra="ignore"):
    """Parameters of what is kept of rows that decide what it needs."""

    batch_tokens: int


class Prepared(NamedTuple):
    """The stage of a preparation."""

    stage: Stage
    estimate: Callable[[ModelFacts, Path], Estimate]
    """(facts of the model, directory with its config and tokenizer) -> what it needs."""


class Stages(Prepare):
    """Makes a stage of everything that a job's method asks for before its training."""

    def __init__(self, job: Job, model: Subject, source: str) -> None:
        """Ask the method; `model` is what the job starts from, `source` that of the model at the bottom. Raises ValueError."""
        super().__init__(job.data.by_role)
        self._job, self._model, self._own = job, model, TABLE.version(job.method)
        self.made: dict[str, Prepared] = {}
        """By name, in the order in which they were asked for."""
        read: tuple[str, ...] = ()
        if job.train is not None:
            skeleton = models.skeleton(sources.fetch(source), job.model.trust_remote_code)
            read = TABLE.of(job.method).prepares(job.method, skeleton, self)
        self.used: dict[str, Stage] = {name: self.made[name].stage for name in read}
        """Those that the training reads."""

    def make(self, preparation: Preparation) -> None:
        """Add the stage of a preparation."""
        match preparation:
            case Moments(name, role, config):
                # That of any job that asks for the same.
                stage = reduce.stage(self._job, role, self._model, config)
                self.made[name] = Prepared(stage, partial(extract.estimate, self._job, role, config))
            case SumOverRows():
                self._sum_over_rows(preparation)
            case KeepOfRows():
                self._keep_of_rows(preparation)
            case MapParts():
                self._map_parts(preparation)

    def _sum_over_rows(self, asked: SumOverRows) -> None:
        params = _Batches.model_validate(asked.params)

        def estimated(facts: ModelFacts, directory: Path) -> Estimate:
            num_shards = -(-len(rows.read(self._job.data.by_role[asked.role])) // params.rows_per_shard)
            logits = 3 * 4 * params.rows_per_batch * params.max_tokens * facts.vocab_size
            memory_bytes = asked.estimate.memory_bytes + self._weights(facts) + logits
            return replace(asked.estimate, memory_bytes=memory_bytes, work_bytes=asked.estimate.work_bytes * num_shards)

        run = partial(making.sum_shards, own_code.portable(asked.start))
        self._add_over_rows(asked, asked.params, run, estimated, self._needed(asked.needs))

    def _keep_of_rows(self, asked: KeepOfRows) -> None:
        assert self._job.train is not None
        batch_tokens = _Kept.model_validate(asked.params).batch_tokens
        estimated = partial(self._estimated_rows, asked.role, batch_tokens, asked.values_per_target)
        run = partial(making.keep_shards, own_code.portable(asked.start))
        self._add_over_rows(asked, {**asked.params, "max_tokens": self._job.train.max_tokens}, run, estimated, {})

    def _map_parts(self, asked: MapParts) -> None:
        of_model = subject.dumped(self._model.params) if asked.reads_model else {}
        inputs = {**(self._model.inputs if asked.reads_model else {}), **self._needed(asked.needs)}
        label = ", ".join(asked.parts[:1]) if len(asked.parts) == 1 else f"{len(asked.parts)} parts"
        run = partial(making.make_parts, own_code.portable(asked.make), asked.parts, asked.reads_model)
        params = {**asked.params, **self._own, **of_model}
        stage = Stage(asked.name, asked.version, params, run, inputs, label, self._model.places)

        def estimated(facts: ModelFacts, directory: Path) -> Estimate:
            weights = self._weights(facts) if asked.reads_model else 0
            return replace(asked.estimate, memory_bytes=asked.estimate.memory_bytes + weights)

        self.made[asked.name] = Prepared(stage, estimated)

    def _add_over_rows(
        self,
        asked: SumOverRows | KeepOfRows,
        params: Mapping[str, Json],
        run: Callable[[Work], None],
        estimate: Callable[[ModelFacts, Path], Estimate],
        needed: Mapping[str, Stage],
    ) -> None:
        data = self._job.data.by_role[asked.role]
        inputs = {**self._model.inputs, **needed}
        label = f"{asked.role}: {rows.describe(data)}"
        of_rows = making.OnRows(data=data, data_fingerprint=rows.fingerprint(data), **self._model.fields)
        whole = {**params, **self._own, **subject.dumped(of_rows)}
        stage = Stage(asked.name, asked.version, whole, run, inputs, label, self._model.places)
        self.made[asked.name] = Prepared(stage, estimate)

    def _needed(self, names: tuple[str, ...]) -> dict[str, Stage]:
        return {name: self.made[name].stage for name in names}

    def _weights(self, facts: ModelFacts) -> int:
        return facts.num_parameters * (4 if self._job.model.dtype == "float32" else 2)

    def _estimated_rows(
        self, role: str, batch_tokens: int, values_per_target: int, facts: ModelFacts, directory: Path
    ) -> Estimate:
        """Estimate the disk of kept rows from the length of some of them; a batch of them is held beside the model."""
        job = self._job
        assert job.train is not None
        data = job.data.by_role[role]
        read = rows.read(data)
        encoder = encoding.load(directory, job.prompt, job.model.trust_remote_code)
        some = read[:: -(-len(read) // _ROWS_JUDGED)]
        encoded = encode_data(encoder, some, data.format, job.train.max_tokens, skip_bad=data.skip_bad).rows
        values = values_per_target * sum(sum(row.targets(data.loss_on)) for row in encoded)
        value_bytes = models.DTYPES[job.model.dtype].itemsize
        disk_bytes = int(value_bytes * values / len(some) * len(read))
        return Estimate(self._weights(facts) + 16 * value_bytes * batch_tokens * values_per_target, disk_bytes)
