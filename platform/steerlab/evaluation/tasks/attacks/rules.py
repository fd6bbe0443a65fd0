"""RuLES: whether a user's message makes the model break a rule that a program can check.

Mu, Chen, Wang and others, "Can LLMs Follow Simple Rules?", arXiv 2311.04235; run by ASIDE, arXiv 2503.10566. The rule of the
scenario is the instruction, the user's message the data. `source` is a folder of the benchmark's files (`manual`, `systematic`,
...), one or several of its files, or one file whose rows name their `scenario`. A file of the benchmark is called
<scenario>.jsonl or <scenario>_<behaviour>.jsonl, and its rows have the fields `params` and `messages`.

A case with several messages of the user is a dialogue in which the model answers in between, so a single answer cannot decide
it: it is counted as unparsable. Files of scenarios that are not in `scenarios` are skipped.

    rules/asr            share of cases in which a rule was broken      lower is better
    rules/<scenario>     the same for each scenario
    rules/empty          empty answers
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field

from steerlab.data import sources, values
from steerlab.data.values import Row
from steerlab.evaluation.asking.items import choose
from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.metrics import Result, Task, about
from steerlab.evaluation.tasks.attacks import wordings
from steerlab.evaluation.tasks.attacks.attempts import AttackConfig, Attempt, attack, measures_of, scorer_of
from steerlab.evaluation.tasks.attacks.rules_scenarios import SCENARIOS, Case
from steerlab.job import Source
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel

Name = Literal[
    "AccessControl", "AnimalSounds", "Authentication", "BinarySearch", "Commitment", "Confidentiality", "DiningCryptographers",
    "Encryption", "ForbiddenWord", "Hodor", "Integrity", "Millionaires", "Questions", "RockPaperScissors", "SimonSays",
]  # fmt: skip
_ALL: tuple[Name, ...] = get_args(Name)


class Config(AttackConfig):
    """How often a rule of RuLES is broken."""

    task: Literal["rules"] = "rules"
    """This task."""
    source: Source | Annotated[tuple[Source, ...], Field(min_length=1)]
    """The benchmark's folder, or its files; on the hub, single files: `hf:normster/RuLES#systematic/Encryption.jsonl`."""
    scenarios: tuple[Name, ...] = Field(_ALL, min_length=1)
    """Scenarios to run."""
    rules: Source | None = None
    """Rows {scenario, instruction} with the wording of the rules, such as the benchmark's; parameters in braces are filled in.
    null takes this repository's wording."""


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures of the numbers that the task reports."""
    return measures_of(config.scenarios)


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse rules or cases that do not exist, or do not have the benchmark's form. Raises ValueError."""
    with about("rules"):
        wordings.read(config.rules, _own(), config.scenarios)
    with about("source"):
        load(config)


def run(model: SteeredModel, config: Config) -> Result:
    """Ask every case at every strength."""
    return attack(model, config, choose(load(config), config.limit, config.rows_seed), measures(config))


def load(config: Config) -> list[Attempt]:
    """Read the cases of the scenarios.

    Raises:
        ValueError: a file does not exist, a row does not have the benchmark's form, or no file belongs to a scenario.
    """
    rules = wordings.read(config.rules, _own(), config.scenarios)
    attempts = [
        _attempt(name, f"{place}/{number}", row, rules[name])
        for place, known, rows in _files(config)
        for number, row in enumerate(rows)
        if (name := known or _scenario(row, place, number)) in config.scenarios
    ]
    if not attempts:
        raise ValueError(f"{config.source} has no file or row of the scenarios {', '.join(config.scenarios)}")
    return attempts


def _own() -> Mapping[str, str]:
    return {name: scenario.rule for name, scenario in SCENARIOS.items()}


def _files(config: Config) -> Iterator[tuple[str, str | None, list[dict[str, object]]]]:
    """Yield the name of each file, the scenario in its name (None: its rows name it), and its rows."""
    for source in _expanded(config):
        # The name is the last part of a path, or of a file in a repository of the hub.
        place = Path(source.rpartition("#")[2]).name.partition(".")[0]
        known = place.partition("_")[0] if place.partition("_")[0] in SCENARIOS else None
        if known is None or known in config.scenarios:
            yield place, known, sources.rows(source, fields=("params", "messages"))


def _expanded(config: Config) -> list[str]:
    given = (config.source,) if isinstance(config.source, str) else config.source
    expanded: list[str] = []
    for source in given:
        parsed = sources.parse(source)
        folder = sources.fetch(source) if parsed.kind == "path" else None
        expanded += sorted(map(str, folder.glob("*.jsonl"))) if folder is not None and folder.is_dir() else [source]
    return expanded


def _scenario(row: Row, place: str, number: int) -> str:
    name = values.text(row.get("scenario"), f"{place} row {number + 1}: field 'scenario'").partition("_")[0]
    if name not in SCENARIOS:
        raise ValueError(f"{place} row {number + 1}: unknown scenario {name!r} (known: {', '.join(SCENARIOS)})")
    return name


def _attempt(name: str, case_id: str, row: Row, rule: str) -> Attempt:
    params, where = row["params"], f"the case {case_id}"
    if not isinstance(params, Mapping):
        raise ValueError(f"{where} has {values.kind(params)} as params, not an object")
    messages = _messages(row["messages"], where)
    case = Case({key: value for key, value in params.items() if value is not None}, messages[-1])
    breaks = SCENARIOS[name].breaks
    try:
        # Judged once before the model is asked, so that missing parameters are found at the start.
        breaks(case, "")
        rule = wordings.fill(rule, case.params, "its params")
    except ValueError as error:
        raise ValueError(f"{where} ({name}): {error}") from None
    problem = "" if len(messages) == 1 else f"it has {len(messages)} messages of the user, and the model answers in between"
    said = "success means that the output breaks the rule"
    return Attempt(case_id, rule, messages[-1], partial(breaks, case), said, group=name, problem=problem)


def _messages(listed: object, where: str) -> list[str]:
    """Return the user's messages of a case."""
    if not isinstance(listed, list | tuple):
        raise ValueError(f"{where} has {values.kind(listed)} as messages, not a list")
    turns = [turn for turn in listed if isinstance(turn, Mapping) and str(turn.get("role")).lower() == "user"]
    if not turns:
        raise ValueError(f"{where} has no message of the user")
    return [values.text(turn.get("content"), f"{where}: content of a message") for turn in turns]


TASK = Task(Config, run, measures, check=check, scorer=scorer_of(load), example={"source": "RuLES/systematic"})
