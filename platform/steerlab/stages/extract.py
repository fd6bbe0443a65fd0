"""The stage that extracts activations: from texts and a model to Parquet parts (activations.py says what is in them)."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from steerlab.activations import parquet
from steerlab.data import rows
from steerlab.data.values import Row
from steerlab.guards.json_values import JsonObject
from steerlab.job import DataSet, ExtractConfig, Job
from steerlab.models import ModelFacts
from steerlab.stages.spread import shards, subject
from steerlab.stages.spread.shard_plan import Facts, Shard
from steerlab.stages.spread.subject import Subject
from steerlab.storage.plan import Estimate, Stage, Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from steerlab.activations.reading import Vectors
    from steerlab.inputs.encoding import Encoder
    from steerlab.inputs.tokens import Encoded
    from steerlab.steered.language import SteeredModel

_GROUP_BYTES = 1 << 28
"""Activations held before they are written as a row group: a part may be larger than the memory."""
SUMS_HELD_BYTES = 4 << 30
"""Moments that an actor holds at once: there are as many passes over the texts as that takes."""
_SAFETY = 1.1
"""Free disk asked for, relative to the estimate."""
_TEXTS_JUDGED = 256
"""Texts that are tokenised to judge the length of all."""


def read_by(roles: Mapping[str, Stage]) -> dict[str, Stage]:
    """Return extractions by data role as inputs of the stage that reads them, in the order of the roles."""
    return {read_as(role): roles[role] for role in sorted(roles)}


def read_as(role: str) -> str:
    """Return the name of the input that holds the activations of a role."""
    return f"{role} activations"


class Params(subject.OnModel):
    """Parameters of the stages that read texts: which, how, and of which model."""

    role: str
    """What the data set is for in the job; a label in what is read."""
    data: DataSet
    data_fingerprint: str | list[str]
    extract: ExtractConfig


def stage(job: Job, role: str, model: Subject, config: ExtractConfig) -> Stage:
    """Return the stage that extracts the activations of one data set of the job from a model."""
    return Stage(
        "extract",
        1,
        params(job, role, model, config, exclude={"keep", "second_moment"}),
        run,
        model.inputs,
        label=f"{role}: {rows.describe(job.data.by_role[role])}",
        places=model.places,
    )


def params(job: Job, role: str, model: Subject, config: ExtractConfig, exclude: set[str]) -> JsonObject:
    """Return what decides which texts are read, how, and of which model; `exclude` names fields of the config that do not."""
    data = job.data.by_role[role]
    declared = Params(role=role, data=data, data_fingerprint=rows.fingerprint(data), extract=config, **model.fields)
    return subject.dumped(declared, exclude={"data": {"loss_on"}, "extract": exclude})


class ReadFacts(Facts):
    """What is known of a part that texts were read for."""

    rows: int
    """Vectors: texts, or tokens with pooling none."""
    texts: int
    tokens: int
    cut: int
    """Texts that were cut."""
    seconds: float


class PartFacts(ReadFacts):
    """What is known of a Parquet part."""

    nan: int
    """Values that are NaN or infinite."""
    bad_module: str | None
    """Column of the first of them."""
    bad_row: int | None
    widths: dict[str, int]
    """Neurons by column."""


_LINE = ("path", "rows", "bytes", "sha256", "nan", "bad_module", "bad_row", "seconds")
"""Facts that `parts.json` holds."""


def run(work: Work) -> None:
    """Extract what is missing in a pool of actors, then gather the parts."""
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


class RowsOfShard(shards.Maker):
    """Makes a Parquet part of a shard; its rows are in the order of the data set."""

    suffix = ".parquet"

    def __init__(self, params: Params, model: SteeredModel) -> None:
        from steerlab.activations import reading

        self._config, self._format, self._label = params.extract, params.data.format, params.role
        self._reader = reading.TextReader(model, self._config)
        about = reading.about_model(model, self._config)
        self._schema = parquet.schema(self._reader.widths, self._config.dtype, self._keeps_tokens, about)

    def close(self) -> None:
        """Remove the reader's hooks."""
        self._reader.close()

    @property
    def _keeps_tokens(self) -> bool:
        return self._config.pooling == ("none",)

    def make(self, shard: Shard, path: Path, tell: Callable[[int], None]) -> PartFacts:
        """Leave the part at `path`; hold no more than a row group of it at once."""
        start_s = time.monotonic()
        texts, num_cut = self._reader.encode(shard.rows, self._format, shard.first)
        facts = parquet.write_part(self._tables(shard, texts, tell), path)
        return PartFacts(
            **facts,
            texts=len(texts),
            tokens=sum(len(text) for text in texts),
            cut=num_cut,
            seconds=time.monotonic() - start_s,
            widths=self._reader.widths,
        )

    def _tables(self, shard: Shard, texts: Sequence[Encoded], tell: Callable[[int], None]) -> Iterator[pa.Table]:
        from steerlab.activations import reading

        vector_bytes = 4 * sum(self._reader.widths.values())
        sizes = [vector_bytes * (len(text) if self._keeps_tokens else 1) for text in texts]
        for start, end in spans(sizes, _GROUP_BYTES):
            read: list[Vectors] = []
            num_done = start
            for vectors in self._reader.read(texts[start:end], shard.first + start):
                read.append(vectors.cpu())
                num_done += vectors.num_texts
                tell(num_done)
            yield self._table(reading.in_order(read), shard, start)

    def _table(self, vectors: Vectors, shard: Shard, start: int) -> pa.Table:
        from steerlab.activations import reading

        rows_M = [start + row for row in vectors.row_M.tolist()]
        hashes = {row: text_sha256(shard.rows[row]) for row in set(rows_M)}
        about: dict[str, parquet.AboutColumn] = {
            "sample_id": [shard.first + row for row in rows_M],
            "label": [self._label] * len(rows_M),
            "text_sha256": [hashes[row] for row in rows_M],
        }
        if vectors.role_M is not None and vectors.token_index_M is not None and vectors.token_id_M is not None:
            about |= {"token_index": vectors.token_index_M.numpy(), "token_id": vectors.token_id_M.numpy()}
            about["role"] = reading.role_names(vectors.role_M)
        return parquet.table(about, {name: z_MD.numpy() for name, z_MD in vectors.values.items()}, self._schema)


def spans(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Cut a sequence into stretches [start, end) whose sizes add up to at most `limit`, one item at least."""
    start, held = 0, 0
    for i, size in enumerate(sizes):
        if i > start and held + size > limit:
            yield start, i
            start, held = i, 0
        held += size
    yield start, len(sizes)


def text_sha256(row: Row) -> str:
    """Hash what a row's text was made from."""
    if "text" in row:
        text = str(row["text"])
    elif "messages" in row:
        text = json.dumps(row["messages"], ensure_ascii=False)
    else:
        beside = [row[name] for name in ("system", "history") if name in row]
        text = json.dumps([row["instruction"], row["input"] or "", row["output"], *beside], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def estimate(job: Job, role: str, config: ExtractConfig, facts: ModelFacts, directory: Path) -> Estimate:
    """Estimate memory and disk of extracting one of the job's data sets; reads the data, and tokenises some of it.

    `directory` holds the model's config and tokenizer.

    A worker holds the weights, what the taps give for one batch and, for rows, a row group in three copies while it is written.
    """
    from steerlab import models
    from steerlab.inputs import encoding

    data = job.data.by_role[role]
    texts = rows.read(data)
    widths = _widths(models.skeleton(directory, job.model.trust_remote_code), config)
    encoder = partial(encoding.load, directory, job.prompt, job.model.trust_remote_code)
    vectors = len(texts) * _vectors_per_text(encoder, config, data.format, texts)
    weights = facts.num_parameters * (4 if job.model.dtype == "float32" else 2)
    if config.keep == "moments":
        one, parts = _moment_bytes(widths, config), -(-len(texts) // config.rows_per_shard)
        held = max(
            _moment_bytes(widths[start:end], config) + 4 * config.batch_tokens * sum(widths[start:end])
            for start, end in spans([_moment_bytes([width], config) for width in widths], SUMS_HELD_BYTES)
        )
        return Estimate(memory_bytes=weights + held, disk_bytes=one, work_bytes=one * parts)
    batch_bytes = 4 * config.batch_tokens * sum(widths)
    disk_bytes = int(vectors * sum(widths) * _value_bytes(config))
    return Estimate(memory_bytes=weights + batch_bytes + 3 * min(_GROUP_BYTES, disk_bytes), disk_bytes=disk_bytes)


def check_disk(work: Work, params: Params, num_rows: int, some: Sequence[Row]) -> None:
    """Refuse an extraction of `num_rows` more rows for which ROOT's disk is too small; `some` are rows to judge by.

    Raises:
        ValueError: with what is needed and what would need less.
    """
    free = work.store.free_bytes()
    if free is None:
        return
    from steerlab import models
    from steerlab.inputs import encoding
    from steerlab.steered import stacks

    config, loading = params.extract, subject.of(work)
    directory = stacks.model_directory(loading.ref.locate())
    widths = _widths(models.skeleton(directory, loading.model.trust_remote_code), config)
    if config.keep == "moments":
        needed = (1 + -(-num_rows // config.rows_per_shard)) * _moment_bytes(widths, config)
        less = "raise extract.rows_per_shard or read fewer modules"
    else:
        encoder = partial(encoding.load, directory, loading.prompt_settings, loading.model.trust_remote_code)
        vectors = num_rows * _vectors_per_text(encoder, config, params.data.format, some)
        needed = int(vectors * sum(widths) * _value_bytes(config))
        less = "read fewer modules, pool, or set extract.dtype: float16"
    if needed * _SAFETY > free:
        raise ValueError(
            f"ROOT '{work.store.root}' has {free / 1e9:.1f} GB free; {num_rows:,} rows and {len(widths)} columns of "
            f"{max(widths)} neurons need about {needed / 1e9:.1f} GB: {less}"
        )


def _widths(skeleton: PreTrainedModel, config: ExtractConfig) -> list[int]:
    """Guess the width of every column from the modules' weights; what has none is taken to be as wide as the model."""
    from steerlab.patches import taps

    name, other = ("out_features", "weight") if config.select.side == "output" else ("in_features", "weight")
    found = []
    for tap in taps.select(skeleton, config.select):
        module = skeleton.get_submodule(tap.module)
        weight = getattr(module, other, None)
        vector = weight.shape[0] if weight is not None and weight.dim() == 1 else skeleton.config.hidden_size
        found.append(getattr(module, name, vector))
    return found * len(config.pooling)


def _vectors_per_text(
    load: Callable[[], Encoder],
    config: ExtractConfig,
    data_format: str,
    texts: Sequence[Row],
) -> float:
    """Return how many vectors a text gives: one, or the mean number of tokens of some texts."""
    if config.pooling != ("none",):
        return 1
    encoder = load()
    some = [encoder.from_row(row, data_format) for row in texts[:: max(1, len(texts) // _TEXTS_JUDGED)]]
    lengths = [min(len(text), config.max_tokens) for text in encoder.encode_all(some)]
    return sum(lengths) / len(lengths)


def _value_bytes(config: ExtractConfig) -> int:
    return 2 if config.dtype == "float16" else 4


def _moment_bytes(widths: Sequence[int], config: ExtractConfig) -> int:
    return 8 * sum(2 * width + config.second_moment * width**2 for width in widths)
