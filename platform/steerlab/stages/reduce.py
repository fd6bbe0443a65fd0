"""The stage that reduces activations to moments: it runs texts through the model as the extraction does, and stores sums."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from steerlab.data import rows
from steerlab.guards.json_values import Json, JsonObject
from steerlab.job import ExtractConfig, Job
from steerlab.stages import extract, extraction_size
from steerlab.stages.spread import shard_worker, shards
from steerlab.stages.spread.shard_plan import Shard
from steerlab.stages.spread.subject import Subject
from steerlab.storage.plan import Stage, Work
from steerlab.storage.whole import size_and_sha256

if TYPE_CHECKING:
    from steerlab.activations.moments import Sums
    from steerlab.activations.reading import TextReader
    from steerlab.inputs.tokens import Encoded
    from steerlab.steered.language import SteeredModel


def stage(job: Job, role: str, model: Subject, config: ExtractConfig) -> Stage:
    """Return the stage that sums a model's activations on one of the job's data sets."""
    # Sums are always float64, so the dtype of extracted rows must not change the key.
    return Stage(
        "moments",
        1,
        extract.params(job, role, model, config, exclude={"dtype"}),
        run,
        model.inputs,
        label=f"{role}: {rows.describe(job.data.by_role[role])}",
        paths=model.paths,
    )


class SumFacts(extract.ReadFacts):
    """Counts of one shard, and a description of its sums."""

    about: JsonObject
    """The model, the places, and the width of each column; the same for all shards of a stage."""


def run(work: Work) -> None:
    """Sum each missing shard in a pool of actors, then merge the sums of all shards."""
    from steerlab.activations import moments

    start_s, params = time.monotonic(), extract.Params.model_validate(work.params)
    parts = shards.run(
        work,
        partial(SumsOfShard, params),
        SumFacts,
        params.data,
        params.extract.rows_per_shard,
        lambda num_rows, some: extraction_size.check_disk(work, params, num_rows, some),
    )
    work.directory.mkdir(parents=True, exist_ok=True)
    # The sums are merged in the order of the shards: floating-point addition is not associative, and the artifact must not
    # depend on which actor was faster.
    with shards.parts(work) as paths:
        widths = moments.Columns.model_validate(parts[0].about).widths
        moments.save(((name, moments.merge_files(paths, name)) for name in widths), work.directory, _summary(parts, start_s))


def _summary(parts: Sequence[SumFacts], start_s: float) -> JsonObject:
    return {
        **parts[0].about,
        "count": sum(part.rows for part in parts),
        "texts": sum(part.texts for part in parts),
        "tokens": sum(part.tokens for part in parts),
        "cut": sum(part.cut for part in parts),
        "seconds": round(time.monotonic() - start_s, 3),
        "actor_seconds": round(sum(part.seconds for part in parts), 3),
    }


@dataclass
class _Counts:
    """Counts of a shard, filled while its sums are written."""

    num_vectors: int = 0
    num_tokens: int = 0
    num_cut: int = 0


class SumsOfShard(shard_worker.Maker):
    """Make the safetensors file with the sums of a shard.

    Second moments of all places may need more memory than the model itself. Then several passes over the texts are made,
    each of which sums some of the places.
    """

    suffix = ".safetensors"

    def __init__(self, params: extract.Params, model: SteeredModel) -> None:
        from steerlab.activations import reading

        self._model, self._config, self._format = model, params.extract, params.data.format
        # This reader only lists the columns; each pass creates another one, with hooks on its own places.
        reader = reading.TextReader(model, self._config)
        self._widths, self._modules = reader.widths, reader.modules
        reader.close()
        self._about: JsonObject = {
            **reading.about_model(model, self._config),
            "widths": dict[str, Json](self._widths),
            "second_moment": self._config.second_moment,
            "label": params.role,
        }

    def make(self, shard: Shard, path: Path, tell: Callable[[int], None]) -> SumFacts:
        """Write the sums to `path` atomically."""
        from steerlab.activations import moments

        start_s = time.monotonic()
        # `save_sums` takes one column at a time from the generator, so that only one pass is in memory. The counts are
        # therefore complete only after it returns.
        counts = _Counts()
        moments.save_sums(self._sums(shard, counts, tell), self._widths, self._config.second_moment, path)
        return SumFacts(
            path=path.name,
            rows=counts.num_vectors,
            **size_and_sha256(path),
            texts=len(shard.rows),
            tokens=counts.num_tokens,
            cut=counts.num_cut,
            seconds=time.monotonic() - start_s,
            about=self._about,
        )

    def _sums(self, shard: Shard, counts: _Counts, tell: Callable[[int], None]) -> Iterator[tuple[str, Sums]]:
        """Yield the sums of every column, pass after pass, and fill `counts`."""
        from steerlab.activations import reading

        # Columns are ordered by place and then by pooling; all columns of a place have the same width.
        poolings = len(self._config.pooling)
        sizes = list(self._widths.values())[::poolings]
        groups = list(
            extraction_size.spans([poolings * self._num_bytes(size) for size in sizes], extraction_size.SUMS_HELD_BYTES)
        )
        for number, (start, end) in enumerate(groups):
            reader = reading.TextReader(self._model, self._config, self._modules[start:end])
            texts, counts.num_cut = reader.encode(shard.rows, self._format, shard.first)
            counts.num_tokens = sum(len(text) for text in texts)
            total: dict[str, Sums] = {}
            for done in self._pass(reader, texts, shard.first, total):
                # Progress is scaled to the rows of the shard over all passes, so that it does not start again with each pass.
                tell((number * len(texts) + done) // len(groups))
            reader.close()
            counts.num_vectors = next(iter(total.values())).num_vectors
            # `pop` frees the memory of a column as soon as it is written.
            yield from ((name, total.pop(name)) for name in list(total))

    def _pass(self, reader: TextReader, texts: Sequence[Encoded], first: int, total: dict[str, Sums]) -> Iterator[int]:
        """Run the texts through the model once, add their sums to `total`, and yield the number of finished texts per batch."""
        from steerlab.activations import moments

        num_done = 0
        for vectors in reader.read(texts, first):
            for name, z_MD in vectors.values.items():
                # A NaN makes the whole sum useless, so it is refused here; in extracted rows, readers can name the bad row.
                moments.check_finite(name, z_MD, vectors.row_M, first)
                batch = moments.sums(z_MD, self._config.second_moment)
                total[name] = moments.merged(total[name], batch) if name in total else batch
            num_done += vectors.num_texts
            yield num_done

    def _num_bytes(self, width: int) -> int:
        from steerlab.activations import moments

        return moments.num_bytes(width, self._config.second_moment)
