"""Perplexity of held-out texts under the model.

exp of the mean negative log-likelihood in nats over tokens: long rows weigh more. Instruction rows are scored on their
response given the prompt, plain texts on every token but the first.

Metric: `perplexity/value`. Its observations are the rows' mean negative log-likelihoods, weighted by tokens; rows longer than
`max_tokens`, or than the model's context, are not scored and counted as too long.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from steerlab.data import sources
from steerlab.data.values import Row
from steerlab.evaluation.asking.items import ALPACA, Numbered, check_rows, choose, data_rows, instruction_rows, number
from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.metrics import EVERY_TOKEN, Observation, Result, Task, TokenKinds, spread, too_long
from steerlab.guards.json_values import Json, JsonObject
from steerlab.inputs.tokens import DATA, INSTRUCTION, Conversation, Message, Part
from steerlab.job import DataSet, Implied, Source, TaskConfig
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel, TokenLogProbs

_METRIC = "perplexity/value"


def _own_rows(config: Mapping[str, Json]) -> JsonObject:
    """Return the rows that a config without `data` names, as a data set."""
    named = {name: config[name] for name in ("source", "format", "needs_input", "offset") if name in config}
    return {"source": ALPACA, **named}


class Config(TaskConfig):
    """Perplexity of held-out rows."""

    task: Literal["perplexity"] = "perplexity"
    """This task."""
    source: Source = ALPACA
    """Rows with instruction, input, output (format instruction) or text (format text)."""
    format: Literal["instruction", "text"] = "instruction"
    """instruction: the response given the prompt; text: the whole text."""
    role: Literal["instruction", "data"] = "instruction"
    """Role of the tokens of plain texts; instruction rows have their own roles."""
    needs_input: bool = False
    """Only rows that have an input; decided before `offset` (instruction rows)."""
    offset: int = Field(0, ge=0)
    """Rows skipped first: those a job trained on."""
    data: Annotated[DataSet | None, Implied(_own_rows)] = None
    """The rows as a job's data sets name them (several sources, filters, first sentences); takes the place of source, format,
    needs_input and offset."""
    max_tokens: int = Field(2048, ge=2)
    """Longer rows are not scored."""


def chats(config: Config) -> bool:
    """Say whether the rows are conversations."""
    return (config.format if config.data is None else config.data.format) != "text"


def runs_over(config: Config, metric: str | None) -> TokenKinds:
    """Return the tokens of the rows: a plain text is one prompt."""
    if not chats(config):
        return frozenset({("prompt", config.role)})
    return EVERY_TOKEN


def measures(config: Config) -> tuple[Measure, ...]:
    """Return what is measured."""
    return (Measure("value", "lower", low=1.0, transform="exp"),)


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse rows that are not there or lack fields. Raises ValueError."""
    if config.data is None:
        fields = ("instruction", "output") if config.format == "instruction" else ("text",)
        check_rows("source", config.source, fields)
    elif config.data.format in ("preference", "image"):
        raise ValueError(f"data.format {config.data.format}: perplexity is that of texts or responses, not of pairs or images")


def run(model: SteeredModel, config: Config) -> Result:
    """Score the rows at every strength."""
    if config.data is not None:
        config = config.model_copy(update={"format": config.data.format})
    items = _rows(config)
    conversations = [conversation(model, item.row, config) for item in items]
    fits = model.fits(conversations, config.max_tokens)
    observations, samples = [], []
    for strength in config.strengths:
        scored = iter(model.token_log_probs([c for c, fit in zip(conversations, fits, strict=True) if fit], strength=strength))
        for item, fit in zip(items, fits, strict=True):
            found = observe(item.id, next(scored), config.format, strength) if fit else too_long(_unscored(item.id, strength))
            observations.append(found)
            samples.append(_sample(item, found))
    return Result(observations, spread(samples), measures(config))


def observe(row_id: str, scores: TokenLogProbs, data_format: str, strength: float = 1.0) -> Observation:
    """Return a row's mean negative log-likelihood, weighted by its tokens; None when it has none to score."""
    scored = [
        log_prob
        for log_prob, inside in zip(scores.log_prob, scores.in_response, strict=True)
        if inside or data_format == "text"
    ]
    if not scored:
        return _unscored(row_id, strength)
    return Observation(_METRIC, row_id, -sum(scored) / len(scored), float(len(scored)), strength)


def conversation(model: SteeredModel, row: Row, config: Config) -> Conversation:
    """Make the conversation of a row."""
    if config.format != "text":
        return model.encoder.from_row(row, config.format)
    return (Message("text", (Part(str(row["text"]), DATA if config.role == "data" else INSTRUCTION),)),)


def _rows(config: Config) -> list[Numbered]:
    if config.data is not None:
        return data_rows(config.data, config.limit, config.seed)
    if config.format == "instruction":
        return instruction_rows(
            config.source,
            needs_input=config.needs_input,
            offset=config.offset,
            limit=config.limit,
            seed=config.seed,
            fields=("instruction", "output"),
        )
    texts = [
        item for item in number(sources.rows(config.source, fields=["text"], texts=["text"])) if str(item.row["text"]).strip()
    ]
    if config.offset >= len(texts):
        raise ValueError(f"offset {config.offset} leaves no text of {config.source}, which has {len(texts)}")
    return choose(texts[config.offset :], config.limit, config.seed)


def _unscored(row_id: str, strength: float) -> Observation:
    return Observation(_METRIC, row_id, None, 1.0, strength)


def _sample(item: Numbered, found: Observation) -> dict[str, object]:
    texts = {name: item.row[name] for name in ("instruction", "input", "output", "text") if name in item.row}
    tokens = None if found.value is None else int(found.weight)
    return {"id": item.id, "strength": found.strength, **texts, "nll_nats_per_token": found.value, "tokens": tokens}


TASK = Task(Config, run, measures, check=check, runs_over=runs_over, chats=chats)
