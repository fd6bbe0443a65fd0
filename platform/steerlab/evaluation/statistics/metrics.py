"""Interface of tasks, and their results: observations of items, and samples.

An item that could not be judged has the value None: it is counted by its reason and excluded from means.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, NamedTuple, TypeVar, get_args

from pydantic import JsonValue

from steerlab.evaluation.statistics.measures import Measure, find
from steerlab.evaluation.statistics.written import Written
from steerlab.job import Phase, Role, TaskConfig
from steerlab.models import ModelFacts

_M = TypeVar("_M")
_C = TypeVar("_C", bound=TaskConfig)

TOO_LONG: Literal["too_long"] = "too_long"
"""Replaces the score of an item that does not fit into a model's context."""
Score = float | None | Literal["too_long"]
"""Output of a scorer or a judge: a number, None if it cannot decide, `TOO_LONG` if the text exceeds its context."""
Reason = Literal["too_long", "cut"]
"""too_long: the item did not fit and has no value; cut: it has a value, from a truncated prompt."""

MAX_SAMPLES = 20
"""Number of a task's samples that pages show; a file has all of them (`generations`)."""


TokenKinds = frozenset[tuple[Phase, Role]]
"""Kinds of tokens as (phase, role); the role `response` means the job's `data.response_role`."""
EVERY_TOKEN: TokenKinds = frozenset(itertools.product(get_args(Phase), get_args(Role)))


def plain_texts(config: TaskConfig) -> bool:
    """Return False: a task that works on plain texts needs no chat template. Used as `Task.chats`."""
    return False


@contextmanager
def about(field: str) -> Iterator[None]:
    """Prefix the message of a ValueError with the config's field that caused it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


class Observation(NamedTuple):
    """One judged item of one metric at one strength."""

    metric: str
    """Full name, `task/name`."""
    id: str
    """Id of the item. It is the same in every run over the same data, so that two runs can be compared item by item."""
    value: float | None
    """None if the output could not be judged."""
    weight: float = 1.0
    """Weight in the mean; 0 excludes the item."""
    strength: float = 1.0
    """Strength of the patch at which the item was evaluated."""
    reason: Reason | None = None
    """Whether an item that does not fit into the context was skipped or cut; None if it fits."""


def observed(metric: str, item_id: str, score: Score, strength: float = 1.0, weight: float = 1.0) -> Observation:
    """Return the observation of an item from the score of a scorer or a judge."""
    if isinstance(score, str):
        return too_long(Observation(metric, item_id, None, 1.0, strength))
    return Observation(metric, item_id, score, weight, strength)


def score_of(observations: Sequence[Observation], metric: str) -> Score:
    """Return the value of a metric in an item's observations; None if it could not be judged or is missing."""
    found = next((o for o in observations if o.metric == metric), None)
    return None if found is None else TOO_LONG if found.reason == TOO_LONG else found.value


def too_long(observation: Observation) -> Observation:
    """Return the observation without its value, marked as not fitting into the context."""
    return observation._replace(value=None, weight=1.0, reason=TOO_LONG)


Scorer = Callable[[Sequence[Written]], list[list[Observation]]]
"""Function that judges texts without the model that wrote them; returns the observations of each text, in order."""


@dataclass(frozen=True)
class Result:
    """Output of a task: observations, samples, and the measures that define how each metric is summarised."""

    observations: list[Observation]
    samples: Sequence[Mapping[str, object]]
    """Inputs with the model's outputs as JSON objects: one for each item and strength, with its `id` and `strength`."""
    measures: Sequence[Measure] = ()
    """Measures that the task declares for its config."""
    files: dict[str, bytes] = field(default_factory=dict)
    """Images to be stored with the metrics: path below the task's folder -> content."""
    num_shown: int | None = MAX_SAMPLES
    """Number of samples that pages show, evenly spaced; None shows all. All samples are stored in any case."""

    def measure(self, metric: str) -> Measure:
        """Return the measure of a metric (`task/name`); if the task declares none, a mean without direction, unit or range."""
        name = metric.partition("/")[2] or metric
        return find(self.measures, name) or Measure(name, None)


class Task(NamedTuple, Generic[_M, _C]):
    """An evaluation: its config, the function that runs it on a model, and functions that the platform calls before it runs."""

    Config: type[_C]
    run: Callable[[_M, _C], Result]
    """(`SteeredModel` or `SteeredPipeline`, config) -> the task's observations and samples."""
    measures: Callable[[_C], Sequence[Measure]]
    """config -> the numbers that the task reports."""
    version: int = 1
    """Increased when the task's own data or scoring changes, so that results of older versions are not reused."""
    kinds: tuple[str, ...] = ("causal_lm",)
    """Kinds of model that the task evaluates."""
    chats: Callable[[_C], bool] = lambda config: True
    """config -> whether the task's prompts are conversations, which need the model's chat template."""
    check: Callable[[_C, ModelFacts], None] = lambda config, facts: None
    """Refuses, before the start, a config that names missing rows, models or packages, or that does not fit
    the model. Raises ValueError with the field and the reason. Data sets are checked elsewhere for all tasks."""
    runs_over: Callable[[_C, str | None], TokenKinds] = lambda config, metric: EVERY_TOKEN
    """(config, metric) -> kinds of tokens that the patched model processes for that metric, or for any metric if it is
    None. A patch that acts on none of these tokens cannot change the metric."""
    scorer: Callable[[_C, Any], Scorer] | None = None
    """(config, device) -> the scorer of the task's texts, with its models loaded; `run` uses the same one. None if the
    task does not judge texts, or needs more than the columns of a file."""
    answers: Callable[[_C, Written], tuple[Sequence[str], str]] = lambda config, text: ((text.text,), "")
    """(config, row of a file) -> the model's answers in it, and the end of the names of their `legibility` metrics."""
    example: Mapping[str, JsonValue] = {}
    """Values of the config's fields without a default, for the catalogue."""


def contains(text: str, witness: str) -> bool:
    """Return whether the witness occurs in the text, ignoring case."""
    return witness.lower() in text.lower()


def spread(samples: Sequence[Mapping[str, object]], most: int | None = MAX_SAMPLES) -> list[Mapping[str, object]]:
    """Return at most `most` samples, evenly spaced; None returns all."""
    if most is None or len(samples) <= most:
        return list(samples)
    # The samples are evenly spaced, so that every strength, attack and category of a task is among them.
    return [samples[i * len(samples) // most] for i in range(most)]
