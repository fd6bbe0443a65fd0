"""Word problems: is the last number of the answer the right one?

Cobbe et al., "Training Verifiers to Solve Math Word Problems" (GSM8K), arXiv 2110.14168: a solution ends in `#### 18`, and an
answer counts when its final number is that of the solution. The final number of a text is the one that stands behind `####`
if there is one, else the last in it. A sign, thousands separators and decimals are read, `$` and `%` are not; numbers are
compared as exact decimals (18.0 is 18).

    math/accuracy   right answers among those with a number                    higher is better
    math/solved     right answers among all, the published accuracy of GSM8K    higher is better
    math/empty      empty answers

An answer without a number cannot be judged, and is no part of accuracy; it is not solved. Where the two differ the model has
stopped to answer with numbers: one that refuses everything has no accuracy, and has solved 0.

Answers are greedy and the prompt is the problem alone (Safety-WaRP: sampled at temperature 0.7, numbers behind `####` only).

The default needs no hub: problems that reasoning-gym (arXiv 2505.24760) makes from the templates of GSM-Symbolic (Mirzadeh et
al., arXiv 2410.05229), without those among the first 8000, which are left to training:

    data: {train: {source: "gym:gsm_symbolic?seed=0&size=10000", distinct: true, limit: 8000}}

All its templates are in both parts; what is new to the model are the numbers and names. GSM8K itself:

    prompts: {source: "hf:openai/gsm8k#main/test", rename: {question: instruction, answer: output}}
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from steerlab.evaluation.asking.answers import answers, with_empty
from steerlab.evaluation.asking.items import Numbered, data_rows
from steerlab.evaluation.statistics.measures import Measure, empty, share
from steerlab.evaluation.statistics.metrics import Observation, Result, Task, spread
from steerlab.job import DataSet, TaskConfig
from steerlab.steered.language import SteeredModel

PROBLEMS = "gym:gsm_symbolic?seed=0&size=10000"

_SIGN = r"(?:(?<![\w)])[+-])?"
"""A sign, unless it stands between two numbers (10-3, 2024-11-21) and subtracts."""
_NUMBER = re.compile(_SIGN + r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)")
_MARKED = re.compile(rf"####\s*((?>{_NUMBER.pattern}))(?![.):][ \t]+\S)")
"""A number behind `####`; `#### 1. First` is a heading."""


def require_solutions(data: DataSet) -> DataSet:
    """Return a data set of problems with solutions.

    Raises:
        ValueError: when its format is another.
    """
    if data.format != "instruction":
        raise ValueError(f"problems have solutions: set prompts.format to instruction, not {data.format}")
    return data


class Config(TaskConfig):
    """Share of problems solved."""

    task: Literal["math"] = "math"
    """This task."""
    prompts: Annotated[DataSet, AfterValidator(require_solutions)] = DataSet.model_validate(
        {"source": PROBLEMS, "distinct": True, "offset": 8000}
    )
    """Problems (instruction and, where there is one, input) with solutions (output) that end in a number."""
    max_new_tokens: int = Field(512, ge=1)
    """Longest answer in tokens."""


def measures(config: Config) -> tuple[Measure, ...]:
    """Return what is measured."""
    return (share("accuracy", "higher"), share("solved", "higher"), empty())


def run(model: SteeredModel, config: Config) -> Result:
    """Answer every problem at every strength."""
    items = data_rows(config.prompts, config.limit, config.seed)
    solutions = [_solution(item, config.prompts) for item in items]
    prompts = [model.encoder.conversation(str(item.row["instruction"]), str(item.row.get("input") or "")) for item in items]
    observations, samples = [], []
    for strength, outputs in answers(model, prompts, config):
        for item, solution, output in zip(items, solutions, outputs, strict=True):
            found = final_number(output.text)
            observations += with_empty("math/empty", item.id, [output], judge(item.id, solution, found, strength), strength)
            samples.append(_sample(item, solution, output.text, found, strength))
    return Result(observations, spread(samples), measures(config))


def judge(item_id: str, solution: Decimal, found: Decimal | None, strength: float = 1.0) -> list[Observation]:
    """Compare an answer's final number, None where there is none, with the solution's."""
    solved = float(found == solution)
    return [
        Observation("math/accuracy", item_id, None if found is None else solved, 1.0, strength),
        Observation("math/solved", item_id, solved, 1.0, strength),
    ]


def final_number(text: str) -> Decimal | None:
    """Return the number behind `####`, or else the last one of a text; None when it holds none."""
    text = text.replace("$", "").replace("\N{MINUS SIGN}", "-")
    marked = _MARKED.search(text)
    numbers = [marked.group(1)] if marked else _NUMBER.findall(text)
    return Decimal(numbers[-1].replace(",", "")) if numbers else None


def _solution(item: Numbered, data: DataSet) -> Decimal:
    found = final_number(str(item.row["output"]))
    if found is None:
        raise ValueError(f"row {item.id} of {', '.join(data.sources)} has no number in its solution: {item.row['output']!r}")
    return found


def _sample(item: Numbered, solution: Decimal, text: str, found: Decimal | None, strength: float) -> dict[str, object]:
    return {
        "id": item.id,
        "strength": strength,
        "instruction": item.row["instruction"],
        "data": item.row.get("input") or "",
        "solution": str(solution),
        "output": text,
        "final_number": None if found is None else str(found),
        "solved": found == solution,
    }


TASK = Task(Config, run, measures)
