"""The stages that come before a method's training, as it asks for them: moments, sums over rows, tensors of each row, parts.

What is made is the method's business (methods/preparations.py), how it is spread over workers that of `spread/making.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from steerlab import models
from steerlab.data import rows, sources
from steerlab.inputs import encoding
from steerlab.inputs.encoded_rows import encode_data
from steerlab.job import ExtractConfig, Job, own_code
from steerlab.methods import TABLE
from steerlab.methods.preparations import MOMENTS, NOTHING, MakePart, Prepare, StartKeeper, StartSums
from steerlab.models import ModelFacts
from steerlab.stages import extract, reduce
from steerlab.stages.spread import making, subject
from steerlab.stages.spread.subject import Subject
from steerlab.storage.plan import Estimate, Stage, Work

_ROWS_JUDGED = 256
"""Rows that are tokenised to judge the length of all."""


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

    def moments(self, role: str, config: ExtractConfig, *, name: str = MOMENTS) -> None:
        """Add a stage of moments, which is that of any job that asks for the same."""
        super().moments(role, config, name=name)
        stage = reduce.stage(self._job, role, self._model, config)
        self.made[name] = Prepared(stage, partial(extract.estimate, self._job, role, config))

    def sum_over_rows(
        self,
        name: str,
        version: int,
        role: str,
        params: Mapping[str, Any],
        start: StartSums,
        *,
        needs: tuple[str, ...] = (),
        estimate: Estimate = NOTHING,
    ) -> None:
        """Add a stage that sums over the batches of a data set."""
        super().sum_over_rows(name, version, role, params, start, needs=needs, estimate=estimate)

        def estimated(facts: ModelFacts, directory: Path) -> Estimate:
            num_shards = -(-len(rows.read(self._job.data.by_role[role])) // params["rows_per_shard"])
            logits = 3 * 4 * params["rows_per_batch"] * params["max_tokens"] * facts.vocab_size
            memory_bytes = estimate.memory_bytes + self._weights(facts) + logits
            return replace(estimate, memory_bytes=memory_bytes, work_bytes=estimate.work_bytes * num_shards)

        self._add_over_rows(name, version, role, params, partial(making.sum_shards, own_code.portable(start)), estimated, needs)

    def keep_of_rows(
        self, name: str, version: int, role: str, params: Mapping[str, Any], start: StartKeeper, values_per_target: int
    ) -> None:
        """Add a stage that keeps tensors of every row of a data set."""
        super().keep_of_rows(name, version, role, params, start, values_per_target)
        assert self._job.train is not None
        cut = {"max_tokens": self._job.train.max_tokens}
        estimated = partial(self._estimated_rows, role, params["batch_tokens"], values_per_target)
        self._add_over_rows(
            name, version, role, {**params, **cut}, partial(making.keep_shards, own_code.portable(start)), estimated
        )

    def map_parts(
        self,
        name: str,
        version: int,
        params: Mapping[str, Any],
        parts: tuple[str, ...],
        make: MakePart,
        *,
        needs: tuple[str, ...] = (),
        reads_model: bool = False,
        estimate: Estimate = NOTHING,
    ) -> None:
        """Add a stage of parts, each made by itself."""
        super().map_parts(name, version, params, parts, make, needs=needs)
        of_model = self._model.params if reads_model else {}
        inputs = {**(self._model.inputs if reads_model else {}), **self._needed(needs)}
        label = ", ".join(parts[:1]) if len(parts) == 1 else f"{len(parts)} parts"
        run = partial(making.make_parts, own_code.portable(make), parts, reads_model)
        stage = Stage(name, version, {**params, **self._own, **of_model}, run, inputs, label, self._model.places)

        def estimated(facts: ModelFacts, directory: Path) -> Estimate:
            weights = self._weights(facts) if reads_model else 0
            return replace(estimate, memory_bytes=estimate.memory_bytes + weights)

        self.made[name] = Prepared(stage, estimated)

    def _add_over_rows(
        self,
        name: str,
        version: int,
        role: str,
        params: Mapping[str, Any],
        run: Callable[[Work], None],
        estimate: Callable[[ModelFacts, Path], Estimate],
        needs: tuple[str, ...] = (),
    ) -> None:
        data = self._job.data.by_role[role]
        of_rows = {"data": subject.dumped(data), "data_fingerprint": rows.fingerprint(data)}
        inputs = {**self._model.inputs, **self._needed(needs)}
        label = f"{role}: {rows.describe(data)}"
        whole = {**params, **of_rows, **self._own, **self._model.params}
        self.made[name] = Prepared(Stage(name, version, whole, run, inputs, label, self._model.places), estimate)

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
        found = rows.read(data)
        encoder = encoding.load(directory, job.prompt, job.model.trust_remote_code)
        some = found[:: -(-len(found) // _ROWS_JUDGED)]
        encoded = encode_data(encoder, some, data.format, job.train.max_tokens, skip_bad=data.skip_bad).rows
        values = values_per_target * sum(sum(row.targets(data.loss_on)) for row in encoded)
        value_bytes = models.DTYPES[job.model.dtype].itemsize
        disk_bytes = int(value_bytes * values / len(some) * len(found))
        return Estimate(self._weights(facts) + 16 * value_bytes * batch_tokens * values_per_target, disk_bytes)
