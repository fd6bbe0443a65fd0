"""Estimate the memory and disk of an extraction of activations, and check that ROOT's disk has room for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from steerlab.data import rows
from steerlab.data.values import Row
from steerlab.job import ExtractConfig, Job
from steerlab.models import ModelFacts
from steerlab.stages.spread import subject
from steerlab.storage.plan import Estimate, Work

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from steerlab.inputs.encoding import Encoder
    from steerlab.stages.extract import Params

GROUP_BYTES = 1 << 28
"""Bytes of activations that are collected for one row group; a whole part may be larger than the memory."""
SUMS_HELD_BYTES = 4 << 30
"""Bytes of moments that an actor holds at once; if all modules together need more, several passes over the texts are made."""
_SAFETY = 1.1
"""Free disk that an extraction must have, as a multiple of its estimate."""
_TEXTS_JUDGED = 256
"""Texts that are tokenised to estimate the mean length of all."""


def spans(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Yield ranges [start, end) of consecutive items whose sizes add up to at most `limit`; a larger item is a range alone."""
    start, held = 0, 0
    for i, size in enumerate(sizes):
        if i > start and held + size > limit:
            yield start, i
            start, held = i, 0
        held += size
    yield start, len(sizes)


def estimate(job: Job, role: str, config: ExtractConfig, facts: ModelFacts, directory: Path) -> Estimate:
    """Estimate the memory and disk of extracting one of the job's data sets.

    Args:
        job: A job whose data set this call reads and partly tokenises.
        role: Key of the data set in the job's `data` section.
        config: Settings of the extraction.
        facts: Sizes of the model.
        directory: Directory with the model's config and tokenizer; no weights are read.
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
        artifact_bytes, num_parts = _moment_bytes(widths, config), -(-len(texts) // config.rows_per_shard)
        # A pass holds the moments of its modules and, in float32, what they compute for one batch.
        held = max(
            _moment_bytes(widths[start:end], config) + 4 * config.batch_tokens * sum(widths[start:end])
            for start, end in spans([_moment_bytes([width], config) for width in widths], SUMS_HELD_BYTES)
        )
        return Estimate(memory_bytes=weights + held, disk_bytes=artifact_bytes, work_bytes=artifact_bytes * num_parts)
    batch_bytes = 4 * config.batch_tokens * sum(widths)
    disk_bytes = int(vectors * sum(widths) * _value_bytes(config))
    # A row group exists three times while it is written: as tensors, as Arrow columns and as encoded Parquet pages.
    return Estimate(memory_bytes=weights + batch_bytes + 3 * min(GROUP_BYTES, disk_bytes), disk_bytes=disk_bytes)


def check_disk(work: Work, params: Params, num_rows: int, some: Sequence[Row]) -> None:
    """Refuse an extraction for which ROOT's disk is too small.

    Args:
        work: The running stage.
        params: Its parameters.
        num_rows: Number of rows that are still to be read.
        some: Some of these rows, by whose lengths the length of all is estimated.

    Raises:
        ValueError: ROOT has too little free space; the message says how much is needed and which setting lowers it.
    """
    # `free_bytes` is None for an object store, which has no limit.
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
        # The sums of all shards stay on the disk until their total, as large as those of one shard, is committed.
        needed = (1 + -(-num_rows // config.rows_per_shard)) * _moment_bytes(widths, config)
        less = "raise extract.rows_per_shard or select fewer modules"
    else:
        encoder = partial(encoding.load, directory, loading.prompt_settings, loading.model.trust_remote_code)
        vectors = num_rows * _vectors_per_text(encoder, config, params.data.format, some)
        needed = int(vectors * sum(widths) * _value_bytes(config))
        less = "select fewer modules, pool, or set extract.dtype: float16"
    if needed * _SAFETY > free:
        raise ValueError(
            f"ROOT '{work.store.root}' has {free / 1e9:.1f} GB free; {num_rows:,} rows and {len(widths)} columns of "
            f"{max(widths)} neurons need about {needed / 1e9:.1f} GB: {less}"
        )


def _widths(skeleton: PreTrainedModel, config: ExtractConfig) -> list[int]:
    """Estimate the width of every column from the shapes of the modules' weights.

    A linear layer has `in_features` and `out_features`, a norm a weight of one axis; other modules count as wide as the model.
    """
    from steerlab.patches import taps

    name, other = ("out_features", "weight") if config.select.side == "output" else ("in_features", "weight")
    widths = []
    for tap in taps.select(skeleton, config.select):
        module = skeleton.get_submodule(tap.module)
        weight = getattr(module, other, None)
        vector = weight.shape[0] if weight is not None and weight.dim() == 1 else skeleton.config.hidden_size
        widths.append(getattr(module, name, vector))
    return widths * len(config.pooling)


def _vectors_per_text(
    load: Callable[[], Encoder],
    config: ExtractConfig,
    data_format: str,
    texts: Sequence[Row],
) -> float:
    """Return the mean number of vectors of a text: one, or with pooling none its number of tokens, estimated from a sample."""
    if config.pooling != ("none",):
        return 1
    encoder = load()
    # Evenly spaced, because a data set may be sorted by length or by topic.
    some = [encoder.from_row(row, data_format) for row in texts[:: max(1, len(texts) // _TEXTS_JUDGED)]]
    lengths = [min(len(text), config.max_tokens) for text in encoder.encode_all(some)]
    return sum(lengths) / len(lengths)


def _value_bytes(config: ExtractConfig) -> int:
    return 2 if config.dtype == "float16" else 4


def _moment_bytes(widths: Sequence[int], config: ExtractConfig) -> int:
    # In float64: mean and squares of each column, (D,) each, and the second moment, (D, D), if it is configured.
    return 8 * sum(2 * width + config.second_moment * width**2 for width in widths)
