"""The stages that prepare a method's training: moments, sums over rows, tensors of each row, or named parts.

A method requests preparations (methods/preparations.py) and defines their mathematics; `spread/making.py` distributes the work.
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
from steerlab.stages import extraction_size, reduce
from steerlab.stages.spread import making, named_parts, subject
from steerlab.stages.spread.subject import Subject
from steerlab.storage.plan import Estimate, Stage, Work

_ROWS_JUDGED = 256
"""Number of rows that are tokenised to estimate the mean length of all."""


class _SumSizes(Frozen, extra="ignore"):
    """Parameters of a sum over rows that determine its memory and disk."""

    rows_per_batch: int
    rows_per_shard: int
    max_tokens: int


class _RowSizes(Frozen, extra="ignore"):
    """Parameters of tensors of each row that determine their memory."""

    batch_tokens: int


class Prepared(NamedTuple):
    """The stage of a preparation, and its cost."""

    stage: Stage
    estimate: Callable[[ModelFacts, Path], Estimate]
    """Function (facts of the model, directory with its config and tokenizer) -> memory and disk of the stage."""


class Stages(Prepare):
    """Make a stage for each preparation that a job's method requests before its training."""

    def __init__(self, job: Job, model: Subject, source: str) -> None:
        """Let the job's method request its preparations.

        Args:
            job: A job; one that neither trains nor changes trained weights has no preparations.
            model: The model from which the job starts.
            source: Source of that model's architecture: the source from which the chain of jobs starts.

        Raises:
            ValueError: the method cannot be prepared on this model or with this data.
        """
        super().__init__(job.data.by_role)
        self._job, self._model, self._own = job, model, TABLE.version(job.method)
        self.made: dict[str, Prepared] = {}
        """Stages by the name of their preparation, in the order in which the method requested them."""
        read: tuple[str, ...] = ()
        method = TABLE.of(job.method)
        if method.is_prepared and (job.train is not None or method.changes_trained):
            # The skeleton has no weights: methods need only names and shapes, and planning must not take the memory of a model.
            skeleton = models.skeleton(sources.fetch(source), job.model.trust_remote_code)
            read = method.prepares(job.method, skeleton, self)
        self.used: dict[str, Stage] = {name: self.made[name].stage for name in read}
        """The stages whose artifacts the training loads; the others are inputs of these."""

    def make(self, preparation: Preparation) -> None:
        """Add the stage of a preparation."""
        match preparation:
            case Moments(name, role, config):
                # A job that only extracts these moments has the same stage, so both share one artifact.
                stage = reduce.stage(self._job, role, self._model, config)
                self.made[name] = Prepared(stage, partial(extraction_size.estimate, self._job, role, config))
            case SumOverRows():
                self._sum_over_rows(preparation)
            case KeepOfRows():
                self._keep_of_rows(preparation)
            case MapParts():
                self._map_parts(preparation)

    def _sum_over_rows(self, request: SumOverRows) -> None:
        """Plan a stage of sums. The memory is that of the model, of one batch's logits and of the method itself."""
        params = _SumSizes.model_validate(request.params)

        def estimated(facts: ModelFacts, directory: Path) -> Estimate:
            num_shards = -(-len(rows.read(self._job.data.by_role[request.role])) // params.rows_per_shard)
            # Logits, their log-softmax and their gradient take 4 bytes per value; small models have no larger activation.
            logits = 3 * 4 * params.rows_per_batch * params.max_tokens * facts.vocab_size
            memory_bytes = request.estimate.memory_bytes + self._weights(facts) + logits
            return replace(request.estimate, memory_bytes=memory_bytes, work_bytes=request.estimate.work_bytes * num_shards)

        run = partial(making.sum_shards, own_code.portable(request.start))
        self._add_over_rows(request, request.params, run, estimated, self._needed(request.needs))

    def _keep_of_rows(self, request: KeepOfRows) -> None:
        assert self._job.train is not None
        batch_tokens = _RowSizes.model_validate(request.params).batch_tokens
        estimated = partial(self._estimated_rows, request.role, batch_tokens, request.values_per_target)
        run = partial(making.keep_shards, own_code.portable(request.start))
        self._add_over_rows(request, {**request.params, "max_tokens": self._job.train.max_tokens}, run, estimated, {})

    def _map_parts(self, request: MapParts) -> None:
        """Plan a stage of parts."""
        # A preparation without a model has the same key for all models, so that jobs on different models share its artifact.
        of_model = subject.dumped(self._model.params) if request.reads_model else {}
        inputs = {**(self._model.inputs if request.reads_model else {}), **self._needed(request.needs)}
        # The label is the name of a single part, or the number of several.
        label = ", ".join(request.parts[:1]) if len(request.parts) == 1 else f"{len(request.parts)} parts"
        run = partial(named_parts.make_parts, own_code.portable(request.make), request.parts, request.reads_model)
        params = {**request.params, **self._own, **of_model}
        stage = Stage(request.name, request.version, params, run, inputs, label, self._model.paths)

        def estimated(facts: ModelFacts, directory: Path) -> Estimate:
            weights = self._weights(facts) if request.reads_model else 0
            return replace(request.estimate, memory_bytes=request.estimate.memory_bytes + weights)

        self.made[request.name] = Prepared(stage, estimated)

    def _add_over_rows(
        self,
        request: SumOverRows | KeepOfRows,
        params: Mapping[str, Json],
        run: Callable[[Work], None],
        estimate: Callable[[ModelFacts, Path], Estimate],
        needed: Mapping[str, Stage],
    ) -> None:
        """Plan a stage that reads the rows of a data set; `params` are the method's own parameters."""
        data = self._job.data.by_role[request.role]
        inputs = {**self._model.inputs, **needed}
        label = f"{request.role}: {rows.describe(data)}"
        of_rows = making.OnRows(data=data, data_fingerprint=rows.fingerprint(data), **self._model.fields)
        # The method's parameters come first, so that they cannot overwrite the platform's, which describe the data.
        all_params = {**params, **self._own, **subject.dumped(of_rows)}
        stage = Stage(request.name, request.version, all_params, run, inputs, label, self._model.paths)
        self.made[request.name] = Prepared(stage, estimate)

    def _needed(self, names: tuple[str, ...]) -> dict[str, Stage]:
        return {name: self.made[name].stage for name in names}

    def _weights(self, facts: ModelFacts) -> int:
        return facts.num_parameters * (4 if self._job.model.dtype == "float32" else 2)

    def _estimated_rows(
        self, role: str, batch_tokens: int, values_per_target: int, facts: ModelFacts, directory: Path
    ) -> Estimate:
        """Estimate the disk of tensors of each row from the length of some rows, and the memory of one batch of them."""
        job = self._job
        assert job.train is not None
        data = job.data.by_role[role]
        read = rows.read(data)
        encoder = encoding.load(directory, job.prompt, job.model.trust_remote_code)
        # Evenly spaced over the data set, which may be sorted by length or topic.
        some = read[:: -(-len(read) // _ROWS_JUDGED)]
        encoded = encode_data(encoder, some, data.format, job.train.max_tokens, skip_bad=data.skip_bad).rows
        values = values_per_target * sum(sum(row.targets(data.loss_on)) for row in encoded)
        value_bytes = models.DTYPES[job.model.dtype].itemsize
        disk_bytes = int(value_bytes * values / len(some) * len(read))
        # As a rough allowance, a forward pass holds 16 tensors of the size of the stored values.
        return Estimate(self._weights(facts) + 16 * value_bytes * batch_tokens * values_per_target, disk_bytes)
