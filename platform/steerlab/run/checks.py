"""What is checked before anything starts: settings, rows and model, refused with the key and what would be right."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from steerlab import evaluation, models
from steerlab.data import rows, sources
from steerlab.inputs import encoded_rows, encoding, prompt_sources
from steerlab.inputs.drawings import check_data
from steerlab.inputs.encoding import Encoder
from steerlab.job import DataSet, Job
from steerlab.methods import TABLE
from steerlab.methods.contract import Fitted, SteeringConfig, Trained, check_masters
from steerlab.methods.preparations import Prepare
from steerlab.patches import taps
from steerlab.run.task_checks import check_named, check_reach, check_rows, check_tasks, tasks_of
from steerlab.stages import Plan

_ROWS_TRIED = 1000
"""Rows of a data set that are tokenised before the start: a template that refuses some texts shows it early."""


def facts_of(planned: Plan) -> models.ModelFacts:
    """Return the sizes of a job's model; a job that builds on another has the architecture of that one's source."""
    directory = sources.fetch(planned.source)
    return _facts(directory, _state(directory), planned.job.model.trust_remote_code)


def check(planned: Plan) -> models.ModelFacts:
    """Refuse what cannot work, before anything starts.

    Raises:
        ValueError: with one message for people.
    """
    job, below = planned.job, planned.below
    if below is not None:
        check(below)
        if below.model is None:
            raise ValueError(
                f"model.source: the job {below.job.name} leaves no model of its own, so there is none to start from"
            )
        _check_start(below.job)
    _check_method(planned)
    for role, data in job.data.by_role.items():
        check_rows(f"data.{role}", data)
    check_tasks(planned)
    found = facts_of(planned)
    _check_kind(planned, found)
    models.check_checkpoint(sources.fetch(planned.source), job.model.attention, job.model.trust_remote_code)
    check_named(job, found)
    check_reach(planned)
    _check_template(planned, found)
    _check_ids(planned, found)
    _check_settings(job, found)
    _check_places(planned)
    _warn_of_strengths(job)
    if job.train is not None and found.max_positions and job.train.max_tokens > found.max_positions:
        raise ValueError(
            f"train.max_tokens {job.train.max_tokens}: the context of {found.architecture} holds {found.max_positions} tokens"
        )
    return found


def _check_settings(job: Job, facts: models.ModelFacts) -> None:
    """Refuse what the method refuses. What a file of the user's own raises is told as what the platform's raise."""
    try:
        TABLE.of(job.method).check(job.method, facts, job)
    except ValueError as error:
        raise ValueError(str(error)) from error


def _check_start(below: Job) -> None:
    """Refuse a job below that says how it is evaluated: what builds on it takes the end of its training, at strength 1."""
    for name in ("snapshot", "strength"):
        if (value := getattr(below, name)) is not None and (name, value) != ("strength", 1):
            raise ValueError(
                f"model.source: the job {below.name} sets {name} {value:g}, which says how it is evaluated; a job that builds "
                f"on it starts from the end of its training, with its patch at strength 1: leave {name} out there"
            )


def _check_method(planned: Plan) -> None:
    """Refuse sections that the method lacks or has no use for."""
    job, method, name = planned.job, planned.method, planned.job.method.name
    if job.train is not None:
        _check_training(job)
    elif isinstance(method, Trained) and method.needs_training and (planned.below is None or not method.leaves_model):
        raise ValueError(f"train: this key is required by method {name}")
    if method.reads(job.method):
        if job.extract is None:
            raise ValueError(f"extract: this key is required by method {name}: it says where the model is read, and how")
        if job.extract.keep != "rows":
            raise ValueError(f"extract.keep {job.extract.keep}: method {name} is fitted on the rows")
        assert isinstance(job.method, SteeringConfig)
        wanted = job.method.pooling
        if wanted not in job.extract.pooling:
            raise ValueError(f"method.pooling {wanted}: extract.pooling is {list(job.extract.pooling)}; add it there")
    if not (job.train or job.evaluate or job.extract or isinstance(method, Fitted)):
        raise ValueError("the job has neither a train nor an extract nor an evaluate section, so there is nothing to do")


def _check_training(job: Job) -> None:
    assert job.train is not None
    method, name = TABLE.of(job.method), job.method.name
    if not isinstance(method, Trained):
        raise ValueError(f"train: method {name} trains nothing; remove this section")
    trains_on = method.module.trains_on
    if trains_on not in job.data.by_role:
        raise ValueError(f"data.{trains_on}: this key is required, because method {name} trains on it")
    trained, validation = job.data.by_role[trains_on], job.data.validation
    if validation is not None and (validation.format == "preference") != (trained.format == "preference"):
        raise ValueError(
            f"data.validation: rows of format {validation.format} have not the loss of method {name}, which trains on format "
            f"{trained.format}"
        )
    if job.train.keep == "best" and job.data.validation is None:
        raise ValueError("train.keep is best: that needs data.validation to measure the evaluation loss")
    if method.leaves_model:
        check_masters(job)
    if method.leaves_model and job.train.snapshots:
        raise ValueError(f"train.snapshots: method {name} trains the model itself, so a patch alone is no snapshot of it")


def _warn_of_strengths(job: Job) -> None:
    """Warn of strengths outside of the range that the method's maps are made for."""
    means = TABLE.of(job.method).strength_range
    asked = {*(job.choose.strengths if job.choose else ()), *(s for task in job.tasks for s in task.strengths)}
    outside = sorted(strength for strength in asked if means and not means[0] <= strength <= means[1])
    if outside:
        warnings.warn(
            f"strengths {outside} lie outside of {list(means or ())}, where method {job.method.name} is meant", stacklevel=2
        )


def _check_places(planned: Plan) -> None:
    """Refuse a selection of modules that the model does not have; no weight is loaded for that."""
    job = planned.job
    skeleton = models.skeleton(sources.fetch(planned.source), job.model.trust_remote_code)
    try:
        TABLE.of(job.method).prepares(job.method, skeleton, Prepare(job.data.by_role))
    except ValueError as error:
        raise ValueError(f"method: {error}") from None
    named = {
        "extract.select": job.extract.select if job.extract else None,
        "method.steer": TABLE.of(job.method).steers(job.method),
    }
    for key, selection in named.items():
        if selection is not None:
            try:
                _check_runs(taps.select(skeleton, selection), skeleton, selection.side == "output")
            except ValueError as error:
                raise ValueError(f"{key}: {error}") from None


def _check_runs(chosen: Sequence[taps.Tap], skeleton: Any, outputs: bool) -> None:
    """Refuse modules that never run, such as a dropout that the attention kernel does itself, or have no value for a token."""
    running = models.modules_that_run(skeleton)
    if running is None:
        return
    never = [tap.module for tap in chosen if tap.module not in running]
    if never:
        raise ValueError(f"{taps.did_not_run(never, len(chosen))}; take them out with exclude_modules")
    for tap in chosen if outputs else ():
        value = taps.value_at(running[tap.module], tap.element, f"the value of {tap.module}")
        if not tap.element and taps.per_token(value, models.DRY_SHAPE_BT).shape[:2] != models.DRY_SHAPE_BT:
            raise ValueError(
                f"the value of {tap.module} has the axes {tuple(value.shape)} where {models.DRY_SHAPE_BT[0]} rows of "
                f"{models.DRY_SHAPE_BT[1]} tokens are read: none for each token, so there is nothing to read or steer"
            )


def _check_kind(planned: Plan, found: models.ModelFacts) -> None:
    """Refuse a method, data or tasks that are not for the kind of model that there is."""
    job, kind = planned.job, planned.job.model.kind
    if found.kind != kind:
        raise ValueError(f"model.kind {kind}: the source holds a {found.architecture}; set kind: {found.kind}")
    method = planned.method
    if kind not in method.kinds:
        raise ValueError(f"method {job.method.name} works on models of kind {', '.join(method.kinds)}; this one is {kind}")
    for key, task in tasks_of(job):
        if kind not in evaluation.TABLE.of(task).kinds:
            fitting = ", ".join(name for name, other in evaluation.TASKS.items() if kind in other.kinds)
            raise ValueError(f"{key}: task {task.task} is none for a model of kind {kind}; there are {fitting}")
    if kind == "diffusion":
        _check_drawing(planned)


def _check_drawing(planned: Plan) -> None:
    job = planned.job
    for role, data in job.data.by_role.items():
        check_data(role, data)
    if job.extract is not None and "none" in job.extract.pooling:
        raise ValueError("extract.pooling none keeps tokens; an image has none: pool over its pixels")
    models.check_sampler(sources.fetch(planned.source), job.model.drawing)
    for one in planned.chain[1:] if job.model.drawing.denoiser is not None else ():
        if one.job.train is not None and one.method.leaves_model:
            raise ValueError(f"model.sampler.denoiser: the job {one.job.name} trains its denoiser; other weights belong there")
    method = planned.method
    if method.walks(job.method) and len(job.model.drawing.read) > 1:
        raise ValueError(
            f"model.sampler.read {list(job.model.drawing.read)}: method.incremental fits along one step; read one, or set "
            "method.incremental: false"
        )


def _check_ids(planned: Plan, found: models.ModelFacts) -> None:
    """Refuse a tokenizer that makes ids for which the model has no embedding."""
    if planned.job.model.kind != "causal_lm":
        return
    encoder = _encoder_of(planned)
    tokenizer = encoder.tokenizer
    # Special tokens in a text are broken up, so those that no prompt has (Gemma 3's for images) may lie beyond.
    named: Any = {tokenizer.bos_token_id, tokenizer.eos_token_id, encoder.pad_id}  # type: ignore[reportUnhashable]
    unused = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special} - named
    ids = {number: token for token, number in tokenizer.get_vocab().items() if number not in unused}
    beyond = sorted(number for number in ids if number >= found.num_embeddings)
    if beyond:
        raise ValueError(
            f"model.source: {len(beyond)} ids of the tokenizer, such as {beyond[0]} for {ids[beyond[0]]!r}, lie beyond the "
            f"{found.num_embeddings} rows of the embedding of {found.architecture}"
        )


def _check_template(planned: Plan, found: models.ModelFacts) -> None:
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


_encoded: set[tuple[Any, ...]] = set()
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
    directory, prompt = sources.fetch(planned.source), job.prompt
    elsewhere = [prompt_sources.fingerprint(name, prompt[name]) for name in ("tokenizer", "chat_template") if name in prompt]
    return _encoder(
        directory, (*_state(directory), *elsewhere), json.dumps(job.prompt, sort_keys=True), job.model.trust_remote_code
    )


@lru_cache(maxsize=16)
def _encoder(directory: Path, state: Any, prompt: str, trust_remote_code: bool) -> Encoder:
    return encoding.load(directory, json.loads(prompt), trust_remote_code)


@lru_cache(maxsize=16)
def _facts(directory: Path, state: Any, trust_remote_code: bool) -> models.ModelFacts:
    return models.facts(directory, trust_remote_code)


def _state(directory: Path) -> tuple[tuple[str, int, int], ...]:
    """Return what changes when a file of a model's folder does: the checks of a sweep read each model once."""
    files = sorted(directory.iterdir()) if directory.is_dir() else [directory]
    return tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files if file.is_file())
