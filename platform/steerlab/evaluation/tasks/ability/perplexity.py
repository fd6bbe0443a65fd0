"""Perplexity of held-out texts under the model.

Instruction rows are scored on their response given the prompt, plain texts on every token but the first. An observation is the
mean negative log-likelihood of a row, weighted by its number of scored tokens, so that long rows weigh more. Rows longer than
`max_tokens`, or than the model's context, are not scored and counted as too long.

    perplexity/value    exp of the mean negative log-likelihood in nats over all tokens     lower is better
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from steerlab.data import sources
from steerlab.data.values import Row
from steerlab.evaluation.asking.items import ALPACA, Numbered, check_rows, choose, data_rows, instruction_rows, number
from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.metrics import EVERY_TOKEN, Observation, Result, Task, TokenKinds, too_long
from steerlab.guards.json_values import Json, JsonObject
from steerlab.inputs.tokens import DATA, INSTRUCTION, Conversation, Message, Part
from steerlab.job import DataSet, Implied, Source, TaskConfig
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel
from steerlab.steered.token_scores import TokenLogProbs

_METRIC = "perplexity/value"


def _own_rows(config: Mapping[str, Json]) -> JsonObject:
    """Return the data set that a config without `data` describes by its other fields."""
    named = {name: config[name] for name in ("source", "format", "needs_input", "offset") if name in config}
    return {"source": ALPACA, **named}


class Config(TaskConfig):
    """Perplexity of held-out rows."""

    task: Literal["perplexity"] = "perplexity"
    """This task."""
    source: Source = ALPACA
    """Rows with `instruction`, `input` and `output` (format instruction) or `text` (format text)."""
    format: Literal["instruction", "text"] = "instruction"
    """instruction: score the response given the prompt; text: score the whole text."""
    role: Literal["instruction", "data"] = "instruction"
    """Role of the tokens of plain texts; instruction rows have their own roles."""
    needs_input: bool = False
    """Use only instruction rows with an input; they are filtered before `offset` is counted."""
    offset: int = Field(0, ge=0)
    """Number of rows to skip at the start, such as those that a job trained on."""
    data: Annotated[DataSet | None, Implied(_own_rows)] = None
    """The rows as a data set (several sources, filters, first sentences), instead of source, format, needs_input and offset."""
    max_tokens: int = Field(2048, ge=2)
    """Rows with more tokens are not scored."""


def chats(config: Config) -> bool:
    """Return whether the rows are conversations, which need a chat template."""
    return (config.format if config.data is None else config.data.format) != "text"


def runs_over(config: Config, metric: str | None) -> TokenKinds:
    """Return the kinds of tokens of the rows; all tokens of a plain text belong to the prompt."""
    if not chats(config):
        return frozenset({("prompt", config.role)})
    return EVERY_TOKEN


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures of the numbers that the task reports."""
    return (Measure("value", "lower", low=1.0, transform="exp"),)


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse a source that does not exist or whose rows lack fields, and formats without texts. Raises ValueError."""
    if config.data is None:
        fields = ("instruction", "output") if config.format == "instruction" else ("text",)
        check_rows("source", config.source, fields)
    elif config.data.format in ("preference", "image"):
        raise ValueError(f"data.format {config.data.format}: perplexity needs texts or responses, not pairs or images")


def run(model: SteeredModel, config: Config) -> Result:
    """Score the rows at every strength."""
    if config.data is not None:
        # With `data`, its format replaces the config's field `format`, which the code below uses.
        config = config.model_copy(update={"format": config.data.format})
    items = _rows(config)
    conversations = [conversation(model, item.row, config) for item in items]
    # The choice is made once, so that the same rows are scored at all strengths and these can be compared.
    fits = model.fits(conversations, config.max_tokens)
    observations, samples = [], []
    for strength in config.strengths:
        scored = iter(model.token_log_probs([c for c, fit in zip(conversations, fits, strict=True) if fit], strength=strength))
        for item, fit in zip(items, fits, strict=True):
            observation = (
                observe(item.id, next(scored), config.format, strength) if fit else too_long(_unscored(item.id, strength))
            )
            observations.append(observation)
            samples.append(_sample(item, observation))
    return Result(observations, samples, measures(config))


def observe(row_id: str, scores: TokenLogProbs, data_format: str, strength: float = 1.0) -> Observation:
    """Return a row's mean negative log-likelihood in nats, weighted by its scored tokens; its value is None without them."""
    scored = [
        log_prob
        for log_prob, inside in zip(scores.log_prob, scores.in_response, strict=True)
        if inside or data_format == "text"
    ]
    if not scored:
        return _unscored(row_id, strength)
    # The weight makes the mean over rows the mean over tokens, while rows remain the independent items of the interval.
    return Observation(_METRIC, row_id, -sum(scored) / len(scored), float(len(scored)), strength)


def conversation(model: SteeredModel, row: Row, config: Config) -> Conversation:
    """Return a row as a conversation."""
    if config.format != "text":
        return model.encoder.from_row(row, config.format)
    return (Message("text", (Part(str(row["text"]), DATA if config.role == "data" else INSTRUCTION),)),)


def _rows(config: Config) -> list[Numbered]:
    """Return the rows that are scored: those of a data set, the outputs of instructions, or plain texts that are not empty."""
    if config.data is not None:
        return data_rows(config.data, config.limit, config.rows_seed)
    if config.format == "instruction":
        return instruction_rows(
            config.source,
            needs_input=config.needs_input,
            offset=config.offset,
            limit=config.limit,
            seed=config.rows_seed,
            fields=("instruction", "output"),
        )
    # Rows are numbered before empty texts are dropped, since an id is the row's position in the file.
    texts = [
        item for item in number(sources.rows(config.source, fields=["text"], texts=["text"])) if str(item.row["text"]).strip()
    ]
    if config.offset >= len(texts):
        raise ValueError(f"offset {config.offset} leaves no text of {config.source}, which has {len(texts)}")
    return choose(texts[config.offset :], config.limit, config.rows_seed)


def _unscored(row_id: str, strength: float) -> Observation:
    return Observation(_METRIC, row_id, None, 1.0, strength)


def _sample(item: Numbered, observation: Observation) -> dict[str, object]:
    texts = {name: item.row[name] for name in ("instruction", "input", "output", "text") if name in item.row}
    tokens = None if observation.value is None else int(observation.weight)
    return {"id": item.id, "strength": observation.strength, **texts, "nll_nats_per_token": observation.value, "tokens": tokens}


TASK = Task(Config, run, measures, check=check, runs_over=runs_over, chats=chats)
