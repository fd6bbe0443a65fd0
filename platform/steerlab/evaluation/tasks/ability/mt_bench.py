"""MT-Bench: questions of two turns, graded from 1 to 10 by a judge that sees one answer at a time.

Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena", arXiv 2306.05685, section 3.1 (single answer grading).
The model answers the first turn, then the second after its own first answer, at the same strength. The judge grades
the first answer, and in a separate question the second one within the whole dialogue. In categories with a right answer it
also sees a reference.

    mt_bench/score     mean grade of both turns          higher is better
    mt_bench/turn_1    mean grade of the first answer
    mt_bench/turn_2    mean grade of the second answer
    mt_bench/empty, mt_bench/unfinished, mt_bench/repetition, mt_bench/letters        see `legibility`; over both answers

An answer without a grade is counted as unparsable, and an empty one is not shown to the judge. Temperatures are the published
ones of each category.

`source` is the published `question.jsonl` (question_id, category, turns, and maybe references), or rows of the
same form. `references_source` is the published file of reference answers (question_id, choices[0].turns). The judge's questions
are this repository's; to compare with published numbers, set `prompts_source` to the published `judge_prompts.jsonl`
and `api` to the judge of the publication.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field

from steerlab.data import sources
from steerlab.data.values import Row
from steerlab.evaluation.asking import legibility
from steerlab.evaluation.asking.answers import answers, fate, with_legibility
from steerlab.evaluation.asking.items import choose
from steerlab.evaluation.judging import graders
from steerlab.evaluation.judging.graders import GradedConfig, Grading
from steerlab.evaluation.judging.verdicts import rating
from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.metrics import TOO_LONG, Observation, Result, Score, Scorer, Task, about, observed
from steerlab.evaluation.statistics.written import Written
from steerlab.inputs.tokens import Conversation
from steerlab.job import Source
from steerlab.models import ModelFacts
from steerlab.steered.generated_text import Generation
from steerlab.steered.language import SteeredModel

LOW, HIGH = 1, 10
"""Lowest and highest grade."""
_TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
"""Temperatures of the categories that are not answered greedily (the benchmark's own)."""

_SCALE = 'End with your grade, a whole number from 1 (useless) to 10 (could not be better), in the form "Rating: [[5]]".'
_ASKED = (
    "Grade an assistant's answer to a user. What counts is whether it helps: whether it is right, answers what was asked, and "
    "goes as deep as the question needs. First say in a few sentences what is good and what is wrong about it. "
)
_BY_REFERENCE = "Compare it with the reference answer, which is right, and name each mistake. "
_DIALOGUE = (
    "User:\n{question_1}\n\nAssistant:\n{answer_1}\n\nUser:\n{question_2}\n\nAssistant:\n{answer_2}\n\n"
    "Grade the assistant's last answer; the turns before it are its context."
)
GRADINGS: Mapping[str, Grading] = {
    "single-v1": Grading(f"{_ASKED}{_SCALE}\n\nUser:\n{{question}}\n\nAssistant:\n{{answer}}"),
    "single-math-v1": Grading(
        f"{_ASKED}{_BY_REFERENCE}{_SCALE}\n\nUser:\n{{question}}\n\nReference answer:\n{{ref_answer_1}}\n\n"
        "Assistant:\n{answer}"
    ),
    "single-v1-multi-turn": Grading(f"{_ASKED}{_SCALE}\n\n{_DIALOGUE}"),
    "single-math-v1-multi-turn": Grading(
        f"{_ASKED}{_BY_REFERENCE}{_SCALE}\n\nReference answers:\n1. {{ref_answer_1}}\n2. {{ref_answer_2}}\n\n{_DIALOGUE}"
    ),
}
"""The judge's questions under the names of the published ones: with and without a reference, for each turn."""


class Config(GradedConfig):
    """Grades of answers to questions of two turns."""

    task: Literal["mt_bench"] = "mt_bench"
    """This task."""
    source: Source
    """Questions as published (`question.jsonl`): rows with `question_id`, `category` and two `turns`."""
    references_source: Source | None = None
    """Reference answers as published; null takes the optional field `reference` of the questions."""
    prompts_source: Source | None = None
    """The judge's questions as published (`judge_prompts.jsonl`); null takes this repository's."""
    max_new_tokens: int = Field(1024, ge=1)
    """Longest answer in tokens."""
    temperature: float | None = Field(None, ge=0)
    """Sampling temperature of all categories; null takes the benchmark's temperature of each category."""


class Question(NamedTuple):
    """A question of two turns."""

    id: str
    category: str
    turns: tuple[str, str]
    reference: tuple[str, str] | None


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures of the numbers that the task reports."""
    grades = (Measure(name, "higher", "points", LOW, HIGH, "mean") for name in ("score", "turn_1", "turn_2"))
    return (*grades, *legibility.measures())


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse files that do not have the published form, and a judge that cannot be asked. Raises ValueError."""
    questions = load(config)
    gradings(config)
    asked = [sum(map(len, q.turns)) + len(str(q.reference)) for q in questions]
    chars = [number + turn * graders.answer_chars(config) for number in asked for turn in (1, 2)]
    graders.check(config, [number + len(GRADINGS["single-v1"].template) for number in chars])


def run(model: SteeredModel, config: Config) -> Result:
    """Answer both turns of every question at every strength, and have the answers graded."""
    judge_texts = scorer(config, model.device)
    questions = load(config)
    written: list[Written] = []
    outputs: list[tuple[Generation, Generation]] = []
    for temperature, group in _by_temperature(questions, config).items():
        own = config.model_copy(update={"temperature": temperature})
        first = answers(model, [model.encoder.conversation(question.turns[0]) for question in group], own)
        for strength, replies in first:
            # The second turn follows the model's own first answer, so it differs between strengths.
            dialogues = [_dialogue(model, q, reply.text) for q, reply in zip(group, replies, strict=True)]
            ((_, seconds),) = answers(model, dialogues, own.model_copy(update={"strengths": (strength,)}))
            for question, one, two in zip(group, replies, seconds, strict=True):
                written.append(_written(question, strength, one.text, two.text))
                outputs.append((one, two))
    observations: list[Observation] = []
    for text, both, grades in zip(written, outputs, judge_texts(written), strict=True):
        observations += with_legibility("mt_bench", text.id, both, grades, text.strength)
    samples = [{**_sample(text), **fate(*both)} for text, both in zip(written, outputs, strict=True)]
    return Result(observations, samples, measures(config))


def scorer(config: Config, device: torch.device | str) -> Scorer:
    """Return the scorer of answers; the columns `prompt_2` and `output_2` have the second turn, `reference_1` a reference."""
    ask = graders.judge_of(config, device)
    asked = gradings(config)

    def judge_texts(written: Sequence[Written]) -> list[list[Observation]]:
        # Both turns of all texts are asked in one call, so that a judge with concurrent questions is never idle.
        turns = [(i, turn) for i, text in enumerate(written) for turn in (1, 2) if _answer(text, turn).strip()]
        said = ask([_grading(asked, written[i], turn).question(_texts(written[i], turn)) for i, turn in turns])
        grades: dict[tuple[int, int], Score] = {
            place: rating(answer, LOW, HIGH) for place, answer in zip(turns, said, strict=True)
        }
        return [_observe(text, [grades.get((i, turn)) for turn in (1, 2)]) for i, text in enumerate(written)]

    return judge_texts


def load(config: Config) -> list[Question]:
    """Read the questions and choose `limit` of them. Raises ValueError if a row does not have two turns."""
    with about("source"):
        rows = sources.rows(config.source, fields=("turns",))
        references = {} if config.references_source is None else _references(config.references_source)
        return choose([_question(row, number, references) for number, row in enumerate(rows)], config.limit, config.rows_seed)


def gradings(config: Config) -> Mapping[str, Grading]:
    """Return the judge's questions by their published names. Raises ValueError if the published file lacks one."""
    if config.prompts_source is None:
        return GRADINGS
    with about("prompts_source"):
        rows = sources.rows(config.prompts_source, fields=("name", "prompt_template"), optional={"system_prompt": ""})
        prompts = {str(row["name"]): Grading(str(row["prompt_template"]), str(row["system_prompt"])) for row in rows}
        if missing := [name for name in GRADINGS if name not in prompts]:
            raise ValueError(f"{config.prompts_source} has no prompt {', '.join(missing)}; it has {', '.join(prompts)}")
        return prompts


def _question(row: Row, number: int, references: Mapping[str, tuple[str, str]]) -> Question:
    name = str(row.get("question_id", number))
    turns = _two(row["turns"], f"question {name}: turns")
    reference = references.get(name)
    if reference is None and row.get("reference"):
        reference = _two(row["reference"], f"question {name}: reference")
    return Question(name, str(row.get("category", "")), turns, reference)


def _references(source: str) -> dict[str, tuple[str, str]]:
    references = {}
    for row in sources.rows(source, fields=("question_id", "choices")):
        choices = row["choices"]
        first = choices[0] if isinstance(choices, list) and choices else None
        turns = first.get("turns") if isinstance(first, dict) else None
        references[str(row["question_id"])] = _two(turns, f"reference of question {row['question_id']}: choices.0.turns")
    return references


def _two(value: object, where: str) -> tuple[str, str]:
    if not isinstance(value, list) or len(value) != 2 or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{where} must be a list of two texts, not {value!r:.60}")
    return value[0], value[1]


def _by_temperature(questions: Sequence[Question], config: Config) -> dict[float, list[Question]]:
    groups: dict[float, list[Question]] = {}
    for question in questions:
        own = _TEMPERATURES.get(question.category, 0.0) if config.temperature is None else config.temperature
        groups.setdefault(own, []).append(question)
    return groups


def _dialogue(model: SteeredModel, question: Question, answer: str) -> Conversation:
    turns = [("user", question.turns[0]), ("assistant", answer), ("user", question.turns[1])]
    return model.encoder.dialogue([{"role": role, "content": text} for role, text in turns])


def _written(question: Question, strength: float, first: str, second: str) -> Written:
    row: dict[str, object] = {"category": question.category, "prompt_2": question.turns[1], "output_2": second}
    if question.reference is not None:
        row |= {"reference_1": question.reference[0], "reference_2": question.reference[1]}
    return Written(question.id, strength, question.turns[0], first, row)


def _answer(text: Written, turn: int) -> str:
    return text.text if turn == 1 else text.field("output_2")


def _grading(asked: Mapping[str, Grading], text: Written, turn: int) -> Grading:
    reference = "math-" if text.row.get("reference_1") else ""
    return asked[f"single-{reference}v1{'' if turn == 1 else '-multi-turn'}"]


def _texts(text: Written, turn: int) -> dict[str, str]:
    """Return the texts under the names that the published prompts have."""
    references = {f"ref_answer_{n}": str(text.row.get(f"reference_{n}") or "") for n in (1, 2)}
    if turn == 1:
        return {"question": text.prompt, "answer": text.text, **references}
    second = {"question_2": text.field("prompt_2"), "answer_2": text.field("output_2")}
    return {"question_1": text.prompt, "answer_1": text.text, **second, **references}


def _observe(text: Written, grades: Sequence[Score]) -> list[Observation]:
    first, second = grades
    if isinstance(first, float) and isinstance(second, float):
        mean: Score = (first + second) / 2
    else:
        mean = TOO_LONG if TOO_LONG in grades else None
    values = {"score": mean, "turn_1": first, "turn_2": second}
    return [observed(f"mt_bench/{name}", text.id, value, text.strength) for name, value in values.items()]


def _sample(text: Written) -> dict[str, object]:
    return {"id": text.id, "strength": text.strength, "prompt": text.prompt, "output": text.text, **text.row}


TASK = Task(
    Config,
    run,
    measures,
    check=check,
    scorer=scorer,
    answers=lambda config, text: ((text.text, _answer(text, 2)), ""),
    example={"source": "question.jsonl", "judge_source": "hf:ORG/NAME"},
)
