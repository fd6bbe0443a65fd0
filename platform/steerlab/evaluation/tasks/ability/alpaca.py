"""Answers in AlpacaEval's format, to be judged outside the platform.

AlpacaEval 1.0 compares a model's answers to 805 prompts with those of text-davinci-003. Its judge is a language model that is
called over an API, so this task only generates the answers. All of them are stored as the task's samples, a JSON list of
{id, strength, instruction, output, generator, dataset} that AlpacaEval reads. To judge them as ASIDE (arXiv 2503.10566) does,
save the list as `outputs.json` and run

    pip install alpaca-eval
    IS_ALPACA_EVAL_2=False alpaca_eval --model_outputs outputs.json

with `source` set to the 805 published prompts (a downloaded `alpaca_eval.json`). With several strengths the generator's name
includes the strength; split the list by it. If a row has an input, the model gets it as data, and the judge gets it appended
to `instruction`.

    alpaca/response_tokens   mean length of an answer in tokens
    alpaca/empty, alpaca/unfinished, alpaca/repetition, alpaca/letters        see `legibility`
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steerlab.evaluation.asking import legibility
from steerlab.evaluation.asking.answers import answers, with_legibility
from steerlab.evaluation.asking.items import ALPACA, Numbered, check_rows, has_input, instruction_rows, not_empty
from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.metrics import Observation, Result, Task
from steerlab.job import Source, TaskConfig
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel


class Config(TaskConfig):
    """Answers for AlpacaEval."""

    task: Literal["alpaca"] = "alpaca"
    """This task."""
    source: Source = ALPACA
    """Rows with `instruction` and optionally `input`; a field `dataset` is copied into the answers."""
    needs_input: bool = False
    """Use only rows with an input (the paper's second set, 208 rows of AlpacaFarm)."""
    offset: int = Field(0, ge=0)
    """Number of rows to skip at the start, such as those that a job trained on."""
    generator: str = "steerlab"
    """Name of the model in the leaderboard."""
    max_new_tokens: int = Field(512, ge=1)
    """Longest answer in tokens."""


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures of the numbers that the task reports."""
    return (Measure("response_tokens", None, "tokens", low=0.0), *legibility.measures())


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse a source that does not exist or whose rows lack fields. Raises ValueError."""
    check_rows("source", config.source)


def run(model: SteeredModel, config: Config) -> Result:
    """Answer every prompt at every strength; the run folder has all answers, not a selection."""
    rows = instruction_rows(
        config.source,
        needs_input=config.needs_input,
        offset=config.offset,
        limit=config.limit,
        seed=config.rows_seed,
        is_input=not_empty,
    )
    prompts = [model.encoder.conversation(str(item.row["instruction"]), _data(item)) for item in rows]
    observations, samples = [], []
    for strength, outputs in answers(model, prompts, config):
        # AlpacaEval accepts one generator per list, so the generators' names contain the strength.
        name = config.generator if len(config.strengths) == 1 else f"{config.generator}_strength_{strength:g}"
        for item, output in zip(rows, outputs, strict=True):
            length = Observation("alpaca/response_tokens", item.id, float(output.num_tokens), 1.0, strength)
            observations += with_legibility("alpaca", item.id, [output], [length], strength)
            samples.append({"id": item.id, "strength": strength} | entry(item, output.text, name))
    # AlpacaEval reads the samples, so all of them are stored.
    return Result(observations, samples, measures(config), num_shown=None)


def entry(item: Numbered, output: str, generator: str) -> dict[str, str]:
    """Write one answer in AlpacaEval's format."""
    data = _data(item)
    instruction = str(item.row["instruction"])
    return {
        # AlpacaEval has no field for the input of a row.
        "instruction": f"{instruction}\n\n{data}" if data else instruction,
        "output": output,
        "generator": generator,
        "dataset": str(item.row.get("dataset") or "steerlab"),
    }


def _data(item: Numbered) -> str:
    # A single letter or digit is an input too, as in AlpacaFarm's 208 rows; a single mark is a placeholder.
    single = not_empty(item.row) and str(item.row["input"]).strip().isalnum()
    return str(item.row["input"]) if has_input(item.row) or single else ""


TASK = Task(Config, run, measures, version=2, check=check)
