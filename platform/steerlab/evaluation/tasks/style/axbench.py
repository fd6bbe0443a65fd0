"""AxBench: whether an answer shows a concept, still follows its instruction, and is still fluent, graded by a judge.

Wu et al., "AxBench: Steering LLMs? Even Simple Baselines Outperform Sparse Autoencoders", arXiv 2501.17148, section 3.2. A
model that is steered towards a concept answers unrelated instructions. A judge gives each answer three grades from 0 to 2, in
one question each, and the score is their harmonic mean: 0 if one of them is 0.

    axbench/score         harmonic mean of the three, mean over answers       higher is better
    axbench/concept       how clearly the concept is present
    axbench/instruction   how closely the answer is related to the instruction
    axbench/fluency       how fluent it is
    axbench/empty, axbench/unfinished, axbench/repetition, axbench/letters        see `legibility`

The paper chooses the strength of each concept on half of the instructions and reports the other half: give `choose` and
`evaluate` different rows (`offset`). The concept is given in the job, or by its id in the published `metadata.jsonl`. An
answer without a grade is counted as unparsable, while the authors' code counts it as 0. The questions are this repository's;
set them to the published ones to compare with published numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator

from steerlab.data import sources
from steerlab.evaluation.asking import legibility
from steerlab.evaluation.asking.answers import answers, fate, with_legibility
from steerlab.evaluation.asking.items import ALPACA, data_rows
from steerlab.evaluation.judging import graders
from steerlab.evaluation.judging.graders import GradedConfig, Grading
from steerlab.evaluation.judging.verdicts import rating
from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.metrics import TOO_LONG, Observation, Result, Score, Scorer, Task, about, observed
from steerlab.evaluation.statistics.written import Written
from steerlab.job import DataSet, Source
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel

BEST = 2.0
"""Largest grade; the smallest is 0."""
GRADES = ("concept", "instruction", "fluency")
_SCALE = 'End with your grade in the form "Rating: [[1]]".'


class Config(GradedConfig):
    """Concept, instruction and fluency of answers, and their harmonic mean."""

    task: Literal["axbench"] = "axbench"
    """This task."""
    concept: str | None = Field(None, min_length=1)
    """The concept, in the words of the judge's question; null reads it from `concepts_source`."""
    concepts_source: Source | None = None
    """Concepts as published (`metadata.jsonl`): rows with `concept_id` and `concept`, or with lists of `concepts`."""
    concept_id: int | None = Field(None, ge=0)
    """Number of the concept in `concepts_source`."""
    prompts: DataSet = DataSet.model_validate({"source": ALPACA, "limit": 10})
    """Instructions (paper: 10 for each concept, from AlpacaEval)."""
    max_new_tokens: int = Field(128, ge=1)
    """Longest answer in tokens."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 is greedy."""
    concept_question: str = (
        "Does this text show the concept below? Look for words, facts or turns of phrase that belong to it; grammar and sense "
        "do not matter. Say in a sentence what you found. Then grade: 0 if the concept is not there, 1 if it is hinted at or "
        f"forced in, 2 if it is clearly there. {_SCALE}\n\nConcept: {{concept}}\n\nText:\n{{sentence}}"
    )
    """Question about the concept; {concept}, {instruction} and {sentence} are replaced in each of the three."""
    instruction_question: str = (
        "Does this text belong to the instruction below? Whether it is right, complete or well written does not matter. Say in "
        "a sentence how it relates to the instruction. Then grade: 0 if it has nothing to do with it, 1 if it touches it, 2 if "
        f"it clearly answers it. {_SCALE}\n\nInstruction: {{instruction}}\n\nText:\n{{sentence}}"
    )
    """Question about the instruction."""
    fluency_question: str = (
        "How fluent is this text? What it is about, and whether it is complete, do not matter. Name what disturbs its reading: "
        "repetition, broken grammar, words that do not fit. Then grade: 0 if it can hardly be read, 1 if it can be read with "
        f"clear faults, 2 if it reads well. {_SCALE}\n\nText:\n{{sentence}}"
    )
    """Question about fluency."""

    @model_validator(mode="after")
    def _check(self) -> Config:
        if bool(self.concept) == bool(self.concepts_source):
            raise ValueError("exactly one concept is needed: set either concept, or concepts_source with concept_id")
        if bool(self.concepts_source) != (self.concept_id is not None):
            raise ValueError("concepts_source and concept_id belong together: one of them is missing")
        if self.prompts.format != "instruction":
            raise ValueError(f"prompts must be instructions: set prompts.format to instruction, not {self.prompts.format}")
        return self

    @property
    def gradings(self) -> tuple[Grading, ...]:
        """The judge's questions in the order of GRADES."""
        return tuple(map(Grading, (self.concept_question, self.instruction_question, self.fluency_question)))


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures of the numbers that the task reports."""
    grades = (Measure(name, "higher", "points", 0.0, BEST, "mean") for name in ("score", *GRADES))
    return (*grades, *legibility.measures())


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse a concept that the file does not have, and a judge that cannot be asked. Raises ValueError."""
    concept = concept_of(config)
    instructions = [str(item.row["instruction"]) for item in data_rows(config.prompts, config.limit, config.rows_seed)]
    answer = len(concept) + graders.answer_chars(config)
    graders.check(config, [len(grading.template) + len(text) + answer for text in instructions for grading in config.gradings])


def run(model: SteeredModel, config: Config) -> Result:
    """Answer every instruction at every strength, and have the answers graded."""
    judge_texts = scorer(config, model.device)
    concept = concept_of(config)
    items = data_rows(config.prompts, config.limit, config.rows_seed)
    prompts = [model.encoder.conversation(str(item.row["instruction"]), str(item.row.get("input") or "")) for item in items]
    observations: list[Observation] = []
    samples: list[dict[str, object]] = []
    drawn = answers(model, prompts, config)
    written = [
        Written(item.id, strength, str(item.row["instruction"]), output.text, {"concept": concept})
        for strength, outputs in drawn
        for item, output in zip(items, outputs, strict=True)
    ]
    # All strengths are judged in one call, so that a judge with concurrent questions is never idle.
    flat = [output for _, outputs in drawn for output in outputs]
    for text, output, grades in zip(written, flat, judge_texts(written), strict=True):
        observations += with_legibility("axbench", text.id, [output], grades, text.strength)
        shown = {"id": text.id, "strength": text.strength, "prompt": text.prompt, "output": text.text}
        samples.append({**shown, **text.row, **fate(output)})
    return Result(observations, samples, measures(config))


def scorer(config: Config, device: torch.device | str) -> Scorer:
    """Return the scorer of answers; the concept of a text is in its column `concept`, or else in the config."""
    ask = graders.judge_of(config, device)

    def judge_texts(written: Sequence[Written]) -> list[list[Observation]]:
        full = [text for text in written if text.text.strip()]
        said = ask([grading.question(_texts(text, config)) for text in full for grading in config.gradings])
        ratings: list[Score] = [rating(answer, 0, BEST) for answer in said]
        grades = iter(ratings)
        # An empty text is not shown to the judge; it has no grades.
        return [_observe(text, [next(grades) if text.text.strip() else None for _ in GRADES]) for text in written]

    return judge_texts


def harmonic_mean(grades: Sequence[float]) -> float:
    """Return the harmonic mean of grades, 0 if one of them is 0 (section 3.2)."""
    return 0.0 if 0 in grades else len(grades) / sum(1 / grade for grade in grades)


def concept_of(config: Config) -> str:
    """Return the concept of a config. Raises ValueError if the file does not have it."""
    if config.concept is not None:
        return config.concept
    assert config.concepts_source is not None
    with about("concepts_source"):
        concepts = dict(_concepts(config.concepts_source))
        if config.concept_id not in concepts:
            raise ValueError(f"{config.concepts_source} has no concept_id {config.concept_id}; it has {len(concepts)} concepts")
        return concepts[config.concept_id]


def _concepts(source: str) -> Iterator[tuple[int, str]]:
    count = 0
    for number, row in enumerate(sources.rows(source), 1):
        # Earlier files of the benchmark have the concepts of a group in one row; concepts are numbered across rows.
        own = row.get("concepts", [row.get("concept")])
        if not isinstance(own, list) or not all(isinstance(concept, str) for concept in own):
            raise ValueError(f"{source} row {number} has neither a text `concept` nor a list of `concepts`")
        for concept in own:
            given = row.get("concept_id")
            yield (given if isinstance(given, int) else count), str(concept)
            count += 1


def _texts(text: Written, config: Config) -> dict[str, str]:
    concept = text.row.get("concept") or concept_of(config)
    return {"concept": str(concept), "instruction": text.prompt, "sentence": text.text}


def _observe(text: Written, grades: Sequence[Score]) -> list[Observation]:
    numbers = [grade for grade in grades if isinstance(grade, float)]
    missing: Score = TOO_LONG if TOO_LONG in grades else None
    score: Score = harmonic_mean(numbers) if len(numbers) == len(GRADES) else missing
    values = dict(zip(("score", *GRADES), (score, *grades), strict=True))
    return [observed(f"axbench/{name}", text.id, value, text.strength) for name, value in values.items()]


TASK = Task(Config, run, measures, check=check, scorer=scorer, example={"concept": "the sea", "judge_source": "hf:ORG/NAME"})
