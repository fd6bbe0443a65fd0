"""Whether the model's answers to requests of the tiny world are right, and of the preferred kind.

Four answers to a request are right: the tool first or the deed first, in a polite or a rude tone. All other answers are broken
language or name a wrong tool. Answers are sampled, because preferences concern the texts that a model generates, not only their
likelihood:

    tiny_answers/right        answers that are one of the four
    tiny_answers/win_rate     answers that are right and polite
    tiny_answers/form         right answers in the form that the rule about owner and verb prefers (`tiny:preferences`)
    tiny_answers/empty, unfinished, repetition, letters        see `legibility`
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from steerlab.data.worlds import tiny_grammar
from steerlab.evaluation.asking import legibility
from steerlab.evaluation.asking.answers import answers, with_legibility
from steerlab.evaluation.asking.items import choose, data_rows
from steerlab.evaluation.statistics.measures import Measure, share
from steerlab.evaluation.statistics.metrics import Observation, Result, Task, observed
from steerlab.evaluation.tasks.preferences.preference import require_pairs
from steerlab.job import DataSet, TaskConfig
from steerlab.steered.language import SteeredModel


class Config(TaskConfig):
    """Answers to requests of the tiny world."""

    task: Literal["tiny_answers"] = "tiny_answers"
    """This task."""
    pairs: Annotated[DataSet, AfterValidator(require_pairs)] = DataSet.model_validate(
        {"source": "tiny:preferences/test", "format": "preference"}
    )
    """Held-out pairs, whose requests are answered."""
    max_new_tokens: int = Field(20, ge=1)
    """Longest answer in tokens; a right one has at most 14."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 is greedy."""


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures of the numbers that the task reports."""
    return (share("right", "higher"), share("win_rate", "higher"), share("form", "higher"), *legibility.measures())


def run(model: SteeredModel, config: Config) -> Result:
    """Answer the requests at every strength and judge the answers by the world's grammar."""
    # The two answers of a pair are not used, so each distinct request counts once.
    items = {str(item.row["prompt"]): item for item in data_rows(config.pairs, None, 0)}
    requests = choose(list(items), config.limit, config.rows_seed)
    prompts = [model.encoder.conversation(request, "", None) for request in requests]
    observations, samples = [], []
    for strength, outputs in answers(model, prompts, config):
        for request, output in zip(requests, outputs, strict=True):
            judged, item_id = tiny_grammar.answer(request, output.text), items[request].id
            own = observe(item_id, judged, strength)
            observations += with_legibility("tiny_answers", item_id, [output], own, strength)
            verdict = {} if judged is None else judged._asdict()
            samples.append({"id": item_id, "strength": strength, "prompt": request, "answer": output.text, **verdict})
    return Result(observations, samples, measures(config))


def observe(item_id: str, judged: tiny_grammar.Answer | None, strength: float) -> list[Observation]:
    """Turn the grammar's judgement of an answer into observations; a request unknown to the grammar cannot be judged."""
    if judged is None:
        return [observed(f"tiny_answers/{name}", item_id, None, strength) for name in ("right", "win_rate", "form")]
    return [
        observed("tiny_answers/right", item_id, float(judged.helps), strength),
        observed("tiny_answers/win_rate", item_id, float(judged.helps and judged.is_polite), strength),
        # The weight restricts the form to right answers, since a broken answer has none.
        Observation("tiny_answers/form", item_id, float(judged.is_preferred_form), float(judged.helps), strength),
    ]


TASK = Task(Config, run, measures)
