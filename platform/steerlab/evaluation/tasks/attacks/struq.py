"""StruQ's benchmark over AlpacaFarm rows.

Chen, Piet, Sitawarin, Wagner, arXiv 2402.06363, as ASIDE (arXiv 2503.10566) runs it: the evaluation rows of AlpacaFarm with
a non-empty input (208; an input of one character counts), the attacks of `injection` with the word "Hacked", in distribution
(attack after the data) and out of distribution (before and after), seeds 42 to 44. `style` takes the spelling of ASIDE's
evaluation or of StruQ's repository, `criterion` defines a success, and `sentences` reads the published ignore sentences from a
file; without it they are this repository's.

`source` is the published list, for example a downloaded `davinci_003_outputs.json`, with the fields instruction, input and
output (the attack `completion` pretends that the output was the answer). Rows that contain the witness are included.

    struq/<attack>_id, struq/<attack>_ood   success rate of one attack, in and out of distribution    lower is better
    struq/asr_id, struq/asr_ood             means over the attacks                                    lower is better
    struq/empty_id, struq/empty_ood         empty answers; likewise unfinished, repetition and letters, see `legibility`
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from steerlab.evaluation.asking.items import check_rows, instruction_rows, not_empty
from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.metrics import Result, Task
from steerlab.evaluation.tasks.attacks.injection import measures_of, run_attacks
from steerlab.evaluation.tasks.attacks.injection_config import (
    InjectionConfig,
    Position,
    answers_of,
    check_sentences,
    scorer_of,
)
from steerlab.job import Seed, Source
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel

_SUFFIX: dict[Position, str] = {"end": "_id", "both": "_ood"}


class Config(InjectionConfig):
    """StruQ attack success rates."""

    task: Literal["struq"] = "struq"
    """This task."""
    source: Source
    """AlpacaFarm evaluation rows (instruction, input, output); rows without an input are not used."""
    positions: tuple[Position, ...] = Field(("end", "both"), min_length=1)
    """end: in distribution; both: out of distribution."""
    seed: Seed = 42
    """Seed of the attacks and of sampling (paper: 42, 43, 44)."""


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures of the numbers that the task reports."""
    return measures_of(config, [_SUFFIX[position] for position in config.positions])


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse a source that does not exist or whose rows lack fields. Raises ValueError."""
    check_rows("source", config.source)
    check_sentences(config)


def run(model: SteeredModel, config: Config) -> Result:
    """Attack the rows of the benchmark at every position and strength."""
    # Unlike `injection`, rows that contain the witness are attacked too, so that numbers compare with published ones.
    rows = instruction_rows(
        config.source, needs_input=True, offset=0, limit=config.limit, seed=config.rows_seed, is_input=not_empty
    )
    return run_attacks(model, config, rows, config.positions, _SUFFIX, "struq")


TASK = Task(
    Config,
    run,
    measures,
    version=2,
    check=check,
    scorer=scorer_of(lambda config: _SUFFIX),
    answers=answers_of(lambda config: _SUFFIX),
    example={"source": "alpaca_farm_evaluations.json"},
)
