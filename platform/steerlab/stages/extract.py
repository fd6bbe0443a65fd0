"""The stage that extracts activations of a model on texts into Parquet files (described in activations/parquet.py)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from steerlab.activations import parquet, part_writing
from steerlab.data import rows
from steerlab.data.values import Row
from steerlab.guards.json_values import JsonObject
from steerlab.job import DataSet, ExtractConfig, Job
from steerlab.stages.extraction_size import GROUP_BYTES, check_disk, spans
from steerlab.stages.spread import shard_worker, shards, subject
from steerlab.stages.spread.shard_plan import Facts, Shard
from steerlab.stages.spread.subject import Subject
from steerlab.storage.plan import Stage, Work

if TYPE_CHECKING:
    from steerlab.activations.reading import Vectors
    from steerlab.inputs.tokens import Encoded
    from steerlab.steered.language import SteeredModel


def read_by(roles: Mapping[str, Stage]) -> dict[str, Stage]:
    """Return extractions by data role as inputs of the stage that uses them."""
    # Sorted, because the order of a stage's inputs is part of its key.
    return {read_as(role): roles[role] for role in sorted(roles)}


def read_as(role: str) -> str:
    """Return the name of the input that holds the activations of a role."""
    return f"{role} activations"


class Params(subject.OnModel):
    """Parameters of the stages that extract activations: the texts, the places in the model, and the model."""

    role: str
    """Key of the data set in the job's `data` section; the label of every row that is written."""
    data: DataSet
    data_fingerprint: str | list[str]
    extract: ExtractConfig


def stage(job: Job, role: str, model: Subject, config: ExtractConfig) -> Stage:
    """Return the stage that extracts a model's activations on one data set of the job."""
    return Stage(
        "extract",
        1,
        params(job, role, model, config, exclude={"keep", "second_moment"}),
        run,
        model.inputs,
        label=f"{role}: {rows.describe(job.data.by_role[role])}",
        paths=model.paths,
    )


def params(job: Job, role: str, model: Subject, config: ExtractConfig, exclude: set[str]) -> JsonObject:
    """Return the parameters of a stage that extracts activations.

    `exclude` names the fields of the extract config that do not change this stage's result and must not change its key.
    """
    data = job.data.by_role[role]
    declared = Params(role=role, data=data, data_fingerprint=rows.fingerprint(data), extract=config, **model.fields)
    # `loss_on` affects training only, so jobs that train on other tokens of the same rows share the extraction.
    return subject.dumped(declared, exclude={"data": {"loss_on"}, "extract": exclude})


class ReadFacts(Facts):
    """Counts of one part of the extracted activations."""

    rows: int
    """Number of vectors: one for each text, or one for each token with pooling none."""
    texts: int
    tokens: int
    cut: int
    """Number of texts that were cut to `max_tokens`."""
    seconds: float


class PartFacts(ReadFacts):
    """Counts and columns of one Parquet part."""

    nan: int
    """Number of values that are NaN or infinite."""
    bad_module: str | None
    """Column of the first value that is NaN or infinite; None if every value is finite."""
    bad_row: int | None
    """Row of that value; None if every value is finite."""
    widths: dict[str, int]
    """Number of neurons of each column."""


_LINE = ("path", "rows", "bytes", "sha256", "nan", "bad_module", "bad_row", "seconds")
"""Fields of `PartFacts` that are written into `parts.json`."""


def run(work: Work) -> None:
    """Extract the missing parts in a pool of actors, then put all parts and their summary into the artifact."""
    start_s, declared = time.monotonic(), Params.model_validate(work.params)
    parts = shards.run(
        work,
        partial(RowsOfShard, declared),
        PartFacts,
        declared.data,
        declared.extract.rows_per_shard,
        lambda num_rows, some: check_disk(work, declared, num_rows, some),
    )
    shards.collect(work)
    lines = [part.model_dump() for part in parts]
    (work.directory / parquet.PARTS).write_text(json.dumps([{name: line[name] for name in _LINE} for line in lines], indent=1))
    # A value that is not finite does not stop the extraction, which may take days: the summary names it, and readers refuse it.
    bad = next((part for part in parts if part.nan), None)
    summary = {
        "texts": sum(part.texts for part in parts),
        "rows": sum(part.rows for part in parts),
        "tokens": sum(part.tokens for part in parts),
        "cut": sum(part.cut for part in parts),
        "nan": sum(part.nan for part in parts),
        "bytes": sum(part.bytes for part in parts),
        "first_bad": None if bad is None else {"module": bad.bad_module, "row": bad.bad_row},
        "seconds": round(time.monotonic() - start_s, 3),
        "actor_seconds": round(sum(part.seconds for part in parts), 3),
        "widths": parts[0].widths,
    }
    (work.directory / parquet.SUMMARY).write_text(json.dumps(summary, indent=1))


class RowsOfShard(shard_worker.Maker):
    """Makes the Parquet part of a shard, with rows in the order of the data set."""

    suffix = ".parquet"

    def __init__(self, params: Params, model: SteeredModel) -> None:
        from steerlab.activations import reading

        self._config, self._format, self._label = params.extract, params.data.format, params.role
        self._reader = reading.TextReader(model, self._config)
        about = reading.about_model(model, self._config)
        self._schema = part_writing.schema(self._reader.widths, self._config.dtype, self._keeps_tokens, about)

    def close(self) -> None:
        """Remove the hooks that record activations."""
        self._reader.close()

    @property
    def _keeps_tokens(self) -> bool:
        return self._config.pooling == ("none",)

    def make(self, shard: Shard, path: Path, tell: Callable[[int], None]) -> PartFacts:
        """Write the part to `path`, with no more than one row group of it in memory."""
        start_s = time.monotonic()
        # All texts of the shard are tokenised first: their lengths decide the batches.
        texts, num_cut = self._reader.encode(shard.rows, self._format, shard.first)
        facts = part_writing.write_part(self._tables(shard, texts, tell), path)
        return PartFacts(
            **facts,
            texts=len(texts),
            tokens=sum(len(text) for text in texts),
            cut=num_cut,
            seconds=time.monotonic() - start_s,
            widths=self._reader.widths,
        )

    def _tables(self, shard: Shard, texts: Sequence[Encoded], tell: Callable[[int], None]) -> Iterator[pa.Table]:
        """Yield the row groups of a part, each with as many texts as fit into memory, in the order of the data set."""
        from steerlab.activations import reading

        vector_bytes = 4 * sum(self._reader.widths.values())
        sizes = [vector_bytes * (len(text) if self._keeps_tokens else 1) for text in texts]
        for start, end in spans(sizes, GROUP_BYTES):
            read: list[Vectors] = []
            num_done = start
            for vectors in self._reader.read(texts[start:end], shard.first + start):
                # Each batch is moved to the CPU, since a row group may be larger than the memory of the GPU.
                read.append(vectors.cpu())
                num_done += vectors.num_texts
                tell(num_done)
            # Batches hold texts of similar length, to save padding; the file has the order of the data set.
            yield self._table(reading.in_order(read), shard, start)

    def _table(self, vectors: Vectors, shard: Shard, start: int) -> pa.Table:
        """Return one row group; `start` is the number within the shard of its first text."""
        return table(vectors, shard.rows, self._label, self._schema, first=shard.first, start=start)


def table(
    vectors: Vectors, rows_read: Sequence[Row], label: str, schema: pa.Schema, *, first: int = 0, start: int = 0
) -> pa.Table:
    """Return the activations of some rows as a pyarrow table.

    Args:
        vectors: The activations, on the CPU.
        rows_read: The rows from which the activations come, or a range of a data set that contains these rows.
        label: Label of every row of the table.
        schema: Schema of the table, from `part_writing.schema`.
        first: Number in the data set of the first row of `rows_read`.
        start: Number in `rows_read` of the row with number 0 in `vectors`.
    """
    from steerlab.activations import reading

    rows_M = [start + row for row in vectors.row_M.tolist()]
    # With pooling none, a text has a row for each token, but is hashed once.
    hashes = {row: text_sha256(rows_read[row]) for row in set(rows_M)}
    about: dict[str, part_writing.AboutColumn] = {
        "sample_id": [first + row for row in rows_M],
        "label": [label] * len(rows_M),
        "text_sha256": [hashes[row] for row in rows_M],
    }
    if vectors.role_M is not None and vectors.token_index_M is not None and vectors.token_id_M is not None:
        about |= {"token_index": vectors.token_index_M.numpy(), "token_id": vectors.token_id_M.numpy()}
        about["role"] = reading.role_names(vectors.role_M)
    return part_writing.table(about, {name: z_MD.numpy() for name, z_MD in vectors.values.items()}, schema)


def text_sha256(row: Row) -> str:
    """Return the SHA-256 of the fields from which a row's text is made."""
    # The fields are hashed, since the rendered text depends on the tokenizer: so a row has one hash under all models.
    if "text" in row:
        text = str(row["text"])
    elif "messages" in row:
        text = json.dumps(row["messages"], ensure_ascii=False)
    else:
        # Optional fields are hashed only if the row has them, so that other rows keep the hashes of existing artifacts.
        more = [row[name] for name in ("system", "history") if name in row]
        text = json.dumps([row["instruction"], row["input"] or "", row["output"], *more], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()
