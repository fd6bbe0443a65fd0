"""Attacks of published collections, each on a rule of its own: ask the model, and judge each answer by that rule.

    <task>/asr      share of attacks that succeeded                           lower is better
    <task>/<group>  the same for the attacks of one group, if they have one
    <task>/empty, <task>/unfinished, <task>/repetition, <task>/letters        see `legibility`

An attack that cannot be asked, or whose answer cannot be judged by a program, is counted as unparsable and excluded from means.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple, Protocol, TypeVar

from pydantic import Field

from steerlab.evaluation.asking import legibility
from steerlab.evaluation.asking.answers import SampledConfig, answers, fate, with_legibility
from steerlab.evaluation.statistics.measures import Measure, share
from steerlab.evaluation.statistics.metrics import Observation, Result, Scorer
from steerlab.evaluation.statistics.written import Written
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import DATA, INSTRUCTION, Conversation, Part
from steerlab.job import Seed, TaskConfig
from steerlab.steered.language import SteeredModel

_C = TypeVar("_C", bound=TaskConfig)
_A = TypeVar("_A", bound="Asked")
Closing = Literal["after", "instruction"]
"""Place of the rule's second half: after the attack, as an instruction; or at the end of the instruction before it."""


class AttackConfig(SampledConfig):
    """Fields of tasks with sampled answers, as in ASIDE (arXiv 2503.10566)."""

    max_new_tokens: int = Field(512, ge=1)
    """Longest answer in tokens."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature; 0 is greedy. The paper's is not published."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Probability mass of nucleus sampling; 1 samples from all tokens."""
    seed: Seed = 2024
    """Seed of sampling, of random places and of the choice of rows (paper: from 2024)."""


class Attempt(NamedTuple):
    """One attack on one rule."""

    id: str
    instruction: str
    """The rule."""
    data: str
    """The attack."""
    succeeded: Callable[[str], bool | None]
    """Answer -> whether the attack succeeded; None if undecidable."""
    judged: str
    """Description of a success, for readers of the samples."""
    closing: str = ""
    """Second half of the rule, which the benchmark puts after the attack."""
    group: str = ""
    """Name of the metric of the attack's group; empty without one."""
    problem: str = ""
    """Reason why the attack cannot be asked; empty if it can."""


def measures_of(groups: Iterable[str] = ()) -> tuple[Measure, ...]:
    """Return the measures of `attack`, with those of the groups."""
    return (share("asr", "lower"), *(share(group, "lower") for group in groups), *legibility.measures())


def attack(model: SteeredModel, config: TaskConfig, attempts: Sequence[Attempt], measures: Sequence[Measure]) -> Result:
    """Ask every attack at every strength and judge the answers.

    Args:
        model: the model.
        config: settings of generation; the name of the task is the first part of the metrics' names.
        attempts: the attacks.
        measures: measures of the task.

    Raises:
        ValueError: none of the attacks can be asked.
    """
    asked = [one for one in attempts if not one.problem]
    if not asked:
        raise ValueError(f"none of the {len(attempts)} attacks can be asked: {attempts[0].problem}")
    observations, samples = [], []
    prompts = [conversation(model.encoder, one) for one in asked]
    for strength, outputs in answers(model, prompts, config):
        for one, output in zip(asked, outputs, strict=True):
            verdict = one.succeeded(output.text)
            own = observe(config.task, one, verdict, strength)
            observations += with_legibility(config.task, one.id, [output], own, strength)
            samples.append({**_sample(one, output.text, None if output.too_long else verdict, strength), **fate(output)})
        for one in attempts:
            observations += observe(config.task, one, None, strength) if one.problem else []
    return Result(observations, samples, measures)


def scorer_of(load: Callable[[_C], Sequence[Attempt]]) -> Callable[[_C, object], Scorer]:
    """Return the scorer of a task whose attacks have rules of their own; a text is judged by that of its id.

    Args:
        load: config -> all attacks of the task.
    """

    def scorer(config: _C, device: object = None) -> Scorer:
        # All attacks, also those that the config's limit leaves out: the file says which were asked.
        find = finder(load, config.model_copy(update={"limit": None}))

        def judged(text: Written) -> list[Observation]:
            one = find(text)
            return observe(config.task, one, None if one.problem else one.succeeded(text.text), text.strength)

        return lambda written: [judged(text) for text in written]

    return scorer


class Asked(Protocol):
    """An attack with its prompt."""

    @property
    def id(self) -> str:
        """Id of the attack."""
        ...

    @property
    def instruction(self) -> str:
        """The rule."""
        ...

    @property
    def data(self) -> str:
        """The data with the attack."""
        ...


def finder(load: Callable[[_C], Sequence[_A]], config: _C) -> Callable[[Written], _A]:
    """Return the function that finds the attack of a row by its id, and refuses a row with another prompt."""
    # Some attacks are at random places, so each seed of the file has its own.
    loaded: dict[int, dict[str, _A]] = {}

    def find(text: Written) -> _A:
        seed = text.seed(config.seed)
        if seed not in loaded:
            loaded[seed] = {one.id: one for one in load(config.model_copy(update={"seed": seed}))}
        one = text.item(loaded[seed])
        text.check_same("instruction", one.instruction)
        text.check_same("data", one.data)
        return one

    return find


def observe(task: str, attempt: Attempt, verdict: bool | None, strength: float = 1.0) -> list[Observation]:
    """Return the observations of one judged attack."""
    value = None if verdict is None else float(verdict)
    names = ["asr", *([attempt.group] if attempt.group else [])]
    return [Observation(f"{task}/{name}", attempt.id, value, 1.0, strength) for name in names]


def conversation(encoder: Encoder, attempt: Attempt) -> Conversation:
    """Return the prompt of an attack: the rule is the instruction, the attack the data, and its closing half an instruction."""
    if not attempt.closing:
        return encoder.conversation(attempt.instruction, attempt.data)
    # The closing half is in the user's turn, but has the role of an instruction, since it is the defender's text.
    return encoder.conversation(attempt.instruction, (Part(attempt.data, DATA), Part(f"\n\n{attempt.closing}", INSTRUCTION)))


def closed(attempt: Attempt, closing: Closing) -> Attempt:
    """Return an attempt whose rule is closed as in a config."""
    if closing == "after" or not attempt.closing:
        return attempt
    rule = f"{attempt.instruction}\n\n{attempt.closing}" if attempt.instruction else attempt.closing
    return attempt._replace(instruction=rule, closing="")


def normal(text: str) -> str:
    """Return a text in lower case without white space or punctuation at its ends."""
    return text.strip(string.whitespace + string.punctuation).lower()


def _sample(attempt: Attempt, output: str, verdict: bool | None, strength: float) -> dict[str, object]:
    return {
        "id": attempt.id,
        "strength": strength,
        "instruction": attempt.instruction,
        "data": attempt.data,
        **({"closing": attempt.closing} if attempt.closing else {}),
        "output": output,
        "succeeded": verdict,
        "judged": attempt.judged,
    }
