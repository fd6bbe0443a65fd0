"""What is checked of a tokenizer, a chat template and the rows that go through them, before anything starts."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Hashable
from functools import lru_cache
from pathlib import Path

from steerlab import evaluation, models
from steerlab.data import rows, sources
from steerlab.inputs import encoded_rows, encoding, prompt_sources
from steerlab.inputs.encoding import Encoder
from steerlab.job import DataSet
from steerlab.run.task_checks import tasks_of
from steerlab.stages import Plan

_ROWS_TRIED = 1000
"""Rows of a data set that are tokenised before the start: a template that refuses some texts shows it early."""


def check_ids(planned: Plan, found: models.ModelFacts) -> None:
    """Refuse a tokenizer that makes ids for which the model has no embedding."""
    if planned.job.model.kind != "causal_lm":
        return
    encoder = _encoder_of(planned)
    tokenizer = encoder.tokenizer
    # Special tokens in a text are broken up, so those that no prompt has (Gemma 3's for images) may lie beyond.
    named = {one for one in (tokenizer.bos_token_id, tokenizer.eos_token_id, encoder.pad_id) if isinstance(one, int)}
    unused = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} - named
    ids = {number: token for token, number in tokenizer.get_vocab().items() if number not in unused}
    beyond = sorted(number for number in ids if number >= found.num_embeddings)
    if beyond:
        raise ValueError(
            f"model.source: {len(beyond)} ids of the tokenizer, such as {beyond[0]} for {ids[beyond[0]]!r}, lie beyond the "
            f"{found.num_embeddings} rows of the embedding of {found.architecture}"
        )


def check_template(planned: Plan, found: models.ModelFacts) -> None:
    """Refuse a chat template that cannot hold what the job asks or trains, and say what is surprising about one that can.

    A job that works on plain texts alone never looks at the template. A model that another job makes was looked at there.
    """
    job = planned.job
    if job.model.kind != "causal_lm":
        return
    chats = any(evaluation.TABLE.of(task).chats(task) for _, task in tasks_of(job))
    trained = {role: data for role, data in job.data.by_role.items() if data.format != "text"}
    if not chats and not trained:
        return
    encoder = _encoder_of(planned)
    answer = "<think>\nthought\n</think>\n\nresponse" if job.data.thinking else "response"
    prompt, whole = (encoder.encode(encoder.conversation("instruction", "data", end)) for end in (None, answer))
    if whole.input_ids[: len(prompt)] != prompt.input_ids:
        raise ValueError("the chat template asks otherwise than it trains: a prompt's tokens are not the first ones of its row")
    beyond = [number for number in whole.input_ids if number >= found.num_embeddings]
    if beyond:
        raise ValueError(
            f"the chat template prints {encoder.tokenizer.convert_ids_to_tokens(beyond[0])!r}, whose id {beyond[0]} lies "
            f"beyond the {found.num_embeddings} rows of the embedding of {found.architecture}"
        )
    extracted = planned.method.reads(job.method)
    for role, data in trained.items():
        longest = None if job.train is None or role in extracted else job.train.max_tokens
        key = (encoder.identity, json.dumps(encoder.spec), data.model_dump_json(), json.dumps(rows.fingerprint(data)), longest)
        if key not in _encoded:
            _check_encoded(f"data.{role}", encoder, data, longest)
            _encoded.add(key)
    if isinstance(job.model.source, str):
        for remark in encoder.remarks():
            warnings.warn(remark, stacklevel=2)


_encoded: set[tuple[Hashable, ...]] = set()
"""Data sets whose first rows were encoded in this process: the trials of a sweep share theirs."""


def _check_encoded(key: str, encoder: Encoder, data: DataSet, longest: int | None) -> None:
    """Refuse rows that the template or the tokenizer cannot hold, by the first ones that the job reads. Raises ValueError.

    `longest` is the number of tokens at which training cuts rows; None where nothing is trained.
    """
    limit = _ROWS_TRIED if data.limit is None else min(data.limit, _ROWS_TRIED)
    tried = rows.read(data.model_copy(update={"limit": limit, "also": ()}))
    try:
        found = encoder.encode_data(tried, data.format, sys.maxsize, skip_bad=data.skip_bad)
    except ValueError as error:
        where = f"{key}: {rows.describe(data)}, counted from the job's first row"
        raise ValueError(f"{where}: {error}" + ("" if data.skip_bad else "; skip_bad: true leaves such rows out")) from None
    said = f"{key}: of the first {len(tried)} rows,"
    if found.num_refused:
        warnings.warn(f"{said} {found.num_refused} are left out: the chat template refuses or changes them", stacklevel=2)
    if found.num_dropped:
        reason = "the answers of a pair are the same tokens" if data.format == "preference" else "they hold no answer to learn"
        warnings.warn(f"{said} {found.num_dropped} are left out: {reason}", stacklevel=2)
    if longest is not None:
        _check_lengths(said, found, longest, is_all=len(tried) < _ROWS_TRIED and not data.also)
    otherwise = encoded_rows.asked_otherwise(encoder, [tried[number] for number in found.numbers], data.format)
    if otherwise:
        warnings.warn(
            f"{said} the answers of {otherwise} change the tokens of their prompts (by white space at their beginning, as a "
            "rule), so that the model is asked otherwise than it is trained there",
            stacklevel=2,
        )


def _check_lengths(said: str, found: encoded_rows.Rows, longest: int, is_all: bool) -> None:
    """Say how many prompts do not fit into a training row. Raises ValueError where none of all rows fits."""
    num_long = sum(encoded_rows.prompt_length(row) >= longest for row in found.rows)
    if num_long and num_long == len(found.rows) and is_all:
        raise ValueError(f"{said} no prompt has fewer than {longest} tokens (train.max_tokens): nothing would be trained")
    if num_long:
        warnings.warn(f"{said} {num_long} have prompts of {longest} tokens or more (train.max_tokens): left out", stacklevel=3)


def _encoder_of(planned: Plan) -> Encoder:
    """Load the encoder of a job's model, with the prompt settings of the job at the bottom, which names the model's source."""
    job = planned.chain[-1].job
    directory = sources.fetch(planned.source)
    named = {"tokenizer": job.model.tokenizer, "chat_template": job.model.chat_template}
    elsewhere = [prompt_sources.fingerprint(name, source) for name, source in named.items() if source is not None]
    return _encoder(
        directory, (*state_of(directory), *elsewhere), json.dumps(job.prompt, sort_keys=True), job.model.trust_remote_code
    )


@lru_cache(maxsize=16)
def _encoder(directory: Path, state: Hashable, prompt: str, trust_remote_code: bool) -> Encoder:
    return encoding.load(directory, json.loads(prompt), trust_remote_code)


def state_of(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what changes when a file of a model's folder does: the checks of a sweep read each model once."""
    files = sorted(directory.iterdir()) if directory.is_dir() else [directory]
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())
