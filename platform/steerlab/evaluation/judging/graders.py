"""The judge of a task with written grades: an API or a local language model, both with the same questions."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, Self

import torch
from pydantic import Field, model_validator

from steerlab.evaluation.judging import asking, scorers
from steerlab.evaluation.judging.asking import Ask
from steerlab.evaluation.judging.chat_api import CHARS_PER_TOKEN, Messages
from steerlab.evaluation.judging.endpoint import Endpoint
from steerlab.evaluation.statistics.metrics import about
from steerlab.job import Source, TaskConfig


class GradedConfig(TaskConfig):
    """Fields of tasks whose judge writes its grade."""

    api: Endpoint | None = None
    """The API of a judge."""
    judge_source: Source | None = None
    """A causal language model as the judge, instead of an API; its chat template formats the questions."""
    judge_tokens: int = Field(512, ge=1)
    """Longest answer of `judge_source` in tokens."""

    @model_validator(mode="after")
    def _check_judge(self) -> Self:
        if bool(self.api) == bool(self.judge_source):
            raise ValueError("exactly one judge is needed: set either api or judge_source")
        return self


class Grading(NamedTuple):
    """Texts with which a judge is asked for a grade."""

    template: str
    """Text of the question, with names in braces that `question` fills."""
    system: str = ""
    """System text; empty sends none."""

    def question(self, texts: Mapping[str, str]) -> Messages:
        """Return the question with its texts; names that `texts` lacks are not replaced."""
        # All names are replaced in one pass, because an answer may itself contain "{question}".
        text = re.sub(r"\{(\w+)\}", lambda place: texts.get(place[1], place[0]), self.template)
        user = {"role": "user", "content": text}
        return [{"role": "system", "content": self.system}, user] if self.system else [user]


def judge_of(config: GradedConfig, device: torch.device | str) -> Ask:
    """Return the judge of a task, with its model loaded."""
    if config.api is not None:
        return asking.Asker(config.api)
    assert config.judge_source is not None
    return asking.local(config.judge_source, config.judge_tokens, device)


def check(config: GradedConfig, question_chars: Sequence[int]) -> None:
    """Announce the questions to a judge's API; refuse a missing key or model. Raises ValueError.

    Args:
        config: config of the task.
        question_chars: estimated characters of each question at one strength.
    """
    if config.api is not None:
        with about("api"):
            asking.announce(config.api, config, [chars // CHARS_PER_TOKEN for chars in question_chars])
    if config.judge_source is not None:
        with about("judge_source"):
            scorers.check_model(config.judge_source)


class _Answers(Protocol):
    """Config of a task whose own model writes answers."""

    @property
    def max_new_tokens(self) -> int: ...


def answer_chars(config: _Answers) -> int:
    """Estimate the number of characters of the longest answer of the task's own model."""
    return config.max_new_tokens * CHARS_PER_TOKEN
