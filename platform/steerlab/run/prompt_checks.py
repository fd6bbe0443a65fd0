"""Check the tokenizer, the chat template and the first rows of the data before anything starts."""

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
"""Number of rows of a data set that are tokenised before the start: enough to show that a template refuses some texts."""


def check_ids(planned: Plan, facts: models.ModelFacts) -> None:
    """Refuse a tokenizer with token ids for which the model has no embedding. Raises ValueError."""
    if planned.job.model.kind != "causal_lm":
        return
    encoder = _encoder_of(planned)
    tokenizer = encoder.tokenizer
    # Special tokens within a text are split into ordinary ones, so the ids of special tokens that no prompt uses (such as
    # Gemma 3's image token) never reach the embedding and may lie beyond it.
    named = {
        token_id for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id, encoder.pad_id) if isinstance(token_id, int)
    }
    unused = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} - named
    ids = {number: token for token, number in tokenizer.get_vocab().items() if number not in unused}
    beyond = sorted(number for number in ids if number >= facts.num_embeddings)
    if beyond:
        raise ValueError(
            f"model.source: {len(beyond)} ids of the tokenizer, such as {beyond[0]} for {ids[beyond[0]]!r}, lie beyond the "
            f"{facts.num_embeddings} rows of the embedding of {facts.architecture}"
        )


def check_template(planned: Plan, facts: models.ModelFacts) -> None:
    """Refuse a chat template that cannot represent the job's prompts and rows; warn of what is unusual about it.

    A job that uses plain texts only never applies the template, so it is not checked.

    Raises:
        ValueError: the template changes a prompt once the answer is added, prints a token without an embedding, or refuses
            rows of the job.
    """
    job = planned.job
    if job.model.kind != "causal_lm":
        return
    chats = any(evaluation.TABLE.of(task).chats(task) for _, task in tasks_of(job))
    # Plain texts have no template. The parts of a data set may have several formats.
    trained = [(role, part) for role, data in job.data.by_role.items() for part in data.parts if part.format != "text"]
    if not chats and not trained:
        return
    encoder = _encoder_of(planned)
    # Templates of reasoning models treat the text between <think> tags differently from the rest of an answer.
    answer = "<think>\nthought\n</think>\n\nresponse" if job.data.thinking else "response"
    prompt, whole = (encoder.encode(encoder.conversation("instruction", "data", end)) for end in (None, answer))
    # A training row is prompt + answer, and the loss starts after the prompt's tokens. If a template writes the prompt
    # differently when an answer follows, the model would be trained on prompts that it never sees in generation.
    if whole.input_ids[: len(prompt)] != prompt.input_ids:
        raise ValueError(
            "the chat template writes a prompt differently in generation and in training: the tokens of the prompt alone are "
            "not the first tokens of the prompt with its answer; give another template (model.chat_template)"
        )
    beyond = [number for number in whole.input_ids if number >= facts.num_embeddings]
    if beyond:
        raise ValueError(
            f"the chat template prints {encoder.tokenizer.convert_ids_to_tokens(beyond[0])!r}, whose id {beyond[0]} lies "
            f"beyond the {facts.num_embeddings} rows of the embedding of {facts.architecture}"
        )
    extracted = planned.method.reads(job.method)
    for role, data in trained:
        longest = None if job.train is None or role in extracted else job.train.max_tokens
        # The key holds all that the result depends on: a sweep over `train.max_tokens` checks each value, one over `lr` only
        # once.
        is_all, content = not job.data.by_role[role].also, json.dumps(rows.fingerprint(data))
        key = (encoder.identity, json.dumps(encoder.spec), data.model_dump_json(), content, longest, is_all)
        if key not in _encoded:
            _check_encoded(f"data.{role}", encoder, data, longest, is_all=is_all)
            _encoded.add(key)
    # A job that starts from another job's model shares that job's template, of which the other job's check has warned.
    if isinstance(job.model.source, str):
        for remark in encoder.remarks():
            warnings.warn(remark, stacklevel=2)


_encoded: set[tuple[Hashable, ...]] = set()
"""Data sets whose first rows this process has already checked: the trials of a sweep share theirs."""


def _check_encoded(key: str, encoder: Encoder, data: DataSet, longest: int | None, *, is_all: bool) -> None:
    """Encode the first rows of a data set; refuse or warn of rows that the template or the tokenizer cannot represent.

    Args:
        key: key of the data set in the job, for messages.
        encoder: tokenizer and chat template.
        data: the data set, or a part of it with one format.
        longest: number of tokens to which training truncates rows; None when the rows are not trained on.
        is_all: whether no other rows are trained on.

    Raises:
        ValueError: a row cannot be encoded, or no row would be left to train on.
    """
    limit = _ROWS_TRIED if data.limit is None else min(data.limit, _ROWS_TRIED)
    tried = rows.read(data.model_copy(update={"limit": limit}))
    try:
        # `sys.maxsize` prevents truncation here, so that the lengths of prompts can be compared with `longest` below.
        encoded = encoder.encode_data(tried, data.format, sys.maxsize, skip_bad=data.skip_bad)
    except ValueError as error:
        where = f"{key}: {rows.describe(data)}, counted from the job's first row"
        raise ValueError(f"{where}: {error}" + ("" if data.skip_bad else "; skip_bad: true skips such rows")) from None
    prefix = f"{key}: of the first {len(tried)} rows,"
    if encoded.num_refused:
        warnings.warn(f"{prefix} {encoded.num_refused} are skipped: the chat template refuses or changes them", stacklevel=2)
    if encoded.num_dropped:
        reason = "the answers of a pair are the same tokens" if data.format == "preference" else "they hold no answer to learn"
        warnings.warn(f"{prefix} {encoded.num_dropped} are skipped: {reason}", stacklevel=2)
    if longest is not None:
        _check_lengths(prefix, encoded, longest, is_all=is_all and len(tried) < _ROWS_TRIED)
    num_changed = encoded_rows.asked_otherwise(encoder, [tried[number] for number in encoded.numbers], data.format)
    if num_changed:
        warnings.warn(
            f"{prefix} the answers of {num_changed} change the tokens of their prompts (usually by white space at the start "
            "of the answer), so the model is trained on prompts that it does not see in generation",
            stacklevel=2,
        )


def _check_lengths(prefix: str, encoded: encoded_rows.Rows, longest: int, is_all: bool) -> None:
    """Warn of prompts that leave no room for an answer in a training row.

    Args:
        prefix: beginning of the message.
        encoded: the rows.
        longest: number of tokens to which training truncates rows.
        is_all: whether these are all rows of the data set rather than its first ones.

    Raises:
        ValueError: no row of the whole data set has room for an answer.
    """
    # Rows are truncated at the end, so a prompt of `longest` tokens leaves no token of the answer to compute a loss on.
    num_long = sum(encoded_rows.prompt_length(row) >= longest for row in encoded.rows)
    if num_long and num_long == len(encoded.rows) and is_all:
        raise ValueError(f"{prefix} no prompt has fewer than {longest} tokens (train.max_tokens): nothing would be trained")
    if num_long:
        warnings.warn(f"{prefix} {num_long} have prompts of {longest} tokens or more (train.max_tokens): skipped", stacklevel=3)


def _encoder_of(planned: Plan) -> Encoder:
    """Load the tokenizer and chat template of a job's model."""
    # The settings of the last job of the chain apply: it names the model's source, and the other jobs build on it.
    job = planned.chain[-1].job
    directory = sources.fetch(planned.source)
    named = {"tokenizer": job.model.tokenizer, "chat_template": job.model.chat_template}
    elsewhere = [prompt_sources.fingerprint(name, source) for name, source in named.items() if source is not None]
    settings, state = json.dumps(job.prompt, sort_keys=True), (*state_of(directory), *elsewhere)
    return _encoder(directory, state, settings, job.model.trust_remote_code).preceded_by(planned.preamble)


@lru_cache(maxsize=16)
def _encoder(directory: Path, state: Hashable, prompt: str, trust_remote_code: bool) -> Encoder:
    return encoding.load(directory, json.loads(prompt), trust_remote_code)


def state_of(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """Return names, sizes and times of the files in a model's folder: a cache key that changes with the files."""
    files = sorted(directory.iterdir()) if directory.is_dir() else [directory]
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())
