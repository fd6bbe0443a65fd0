"""Which tokens a patch promotes and demotes, summed over all places of the responses to many prompts.

At every token of a response the logits at strength alpha are compared with those at strength 0 of the same model:

    token_effect/norm    Euclidean norm of the change of the logits, a mean over the tokens
    token_effect/kl      KL(pi_alpha || pi_0) in nats per token

The samples contain, for every strength, the tokens whose logits rise and fall most in sum, relative to the mean over the
vocabulary (steered/explain.py); the report draws them as bars. A token that rises a little everywhere ranks above one that
rises far in one place: use `steerlab explain` for single places.

The responses are those of the rows, so that all strengths are compared on the same tokens; with `responses: own`, the model
generates them at each strength.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from steerlab.evaluation.asking.answers import answers
from steerlab.evaluation.asking.items import ALPACA, Numbered, data_rows
from steerlab.evaluation.statistics.measures import Measure
from steerlab.evaluation.statistics.metrics import TOO_LONG, Observation, Result, Task, observed
from steerlab.inputs.tokens import Conversation, Message, Part
from steerlab.job import UNPATCHED, DataSet, TaskConfig
from steerlab.steered import explain
from steerlab.steered.language import SteeredModel

NAMES = ("norm", "kl")


def require_responses(data: DataSet) -> DataSet:
    """Return the data set if its rows have responses. Raises ValueError otherwise."""
    if data.format not in ("instruction", "preference", "conversation"):
        raise ValueError(f"rows of format {data.format} have no response: set data.format to instruction or preference")
    return data


class Config(TaskConfig):
    """Promoted and demoted tokens."""

    task: Literal["token_effect"] = "token_effect"
    """This task."""
    data: Annotated[DataSet, AfterValidator(require_responses)] = DataSet.model_validate({"source": ALPACA, "limit": 50})
    """Rows with a prompt and a response; of a preference pair, the chosen one."""
    responses: Literal["data", "own"] = "data"
    """Responses to compare on: those of the rows, or the model's own greedy ones at each strength."""
    max_new_tokens: int = Field(64, ge=1)
    """Longest response in tokens with responses: own."""
    num_tokens: int = Field(20, ge=1, le=100)
    """Number of promoted and of demoted tokens in the samples."""


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures of the numbers that the task reports."""
    return (
        Measure("norm", None, low=0.0, transform="mean"),
        Measure("kl", "lower", "nats a token", low=0.0, transform="mean"),
    )


def run(model: SteeredModel, config: Config) -> Result:
    """Compare the predictions at every strength with those at strength 0."""
    items = data_rows(config.data, config.limit, config.rows_seed)
    given = [_conversation(model, item, config.data.format) for item in items]
    observations, samples = [], []
    for strength, spoken in _with_responses(model, given, config):
        fits = dict(zip(spoken, model.fits(list(spoken.values())), strict=True))
        chosen = {i: one for i, one in spoken.items() if fits[i]}
        for i, item in enumerate(items):
            if i not in chosen:
                score = TOO_LONG if i in fits else None
                observations += [observed(f"token_effect/{name}", item.id, score, strength) for name in NAMES]
        # Without a patch, or at strength 0, both sides are equal.
        compares = bool(model.patches) and strength != UNPATCHED and bool(chosen)
        summary = None
        if compares:
            summary = explain.summarise(model, list(chosen.values()), num=config.num_tokens, strength=strength)
            samples.append(_sample(summary, strength))
        observations += _observed([items[i].id for i in chosen], summary, strength)
    return Result(observations, samples, measures(config))


def _observed(ids: Sequence[str], summary: explain.Summary | None, strength: float) -> list[Observation]:
    """Return the observations of responses; without a summary, all changes are 0."""
    if summary is None:
        return [Observation(f"token_effect/{name}", one, 0.0, 1.0, strength) for one in ids for name in NAMES]
    # The metrics are means over tokens, so a response is weighted by its number of tokens.
    columns = {"norm": summary.norms, "kl": summary.kls}
    return [
        Observation(f"token_effect/{name}", one, value, float(size), strength)
        for name in NAMES
        for one, value, size in zip(ids, columns[name], summary.sizes, strict=True)
    ]


def _conversation(model: SteeredModel, item: Numbered, data_format: str) -> Conversation:
    if data_format == "preference":
        return model.encoder.from_pair(item.row)[0]
    return model.encoder.from_row(item.row, data_format)


def _with_responses(
    model: SteeredModel, given: Sequence[Conversation], config: Config
) -> list[tuple[float, dict[int, Conversation]]]:
    """Return the conversations to compare, by strength: number of the item -> conversation with a response."""
    if config.responses == "data":
        answered = {i: one for i, one in enumerate(given) if one[-1].speaker == "assistant"}
        spoken = {i: one for i, one in answered.items() if any(part.text.strip() for part in one[-1].parts)}
        return [(strength, spoken) for strength in config.strengths]
    prompts = [one[:-1] if one[-1].speaker == "assistant" else one for one in given]
    role = model.encoder.response_role_id
    return [
        (
            strength,
            {
                i: (*prompt, Message("assistant", (Part(output.text, role),)))
                for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
                # A prompt that does not fit has no response, but is included, so that it is counted as too long.
                if output.text.strip() or output.too_long
            },
        )
        for strength, outputs in answers(model, prompts, config)
    ]


def _sample(summary: explain.Summary, strength: float) -> dict[str, object]:
    """Return the promoted and demoted tokens as a sample, with the chart that the report draws (report/samples.py)."""
    # Demoted tokens go from the least to the most, so that the bars decrease from the top of the chart to its bottom.
    moved = [*summary.promoted, *reversed(summary.demoted)]
    places, prompts = sum(summary.sizes), len(summary.sizes)
    chart = {
        "title": f"tokens promoted and demoted, {places} places of {prompts} responses",
        "unit": "mean change of the logit, nats",
        "bars": [[one.token, one.mean] for one in moved],
    }
    tokens = {"promoted": summary.promoted, "demoted": summary.demoted}
    listed = {name: [one._asdict() for one in values] for name, values in tokens.items()}
    return {"id": f"strength {strength:g}", "strength": strength, "places": places, **listed, "chart": chart}


TASK = Task(Config, run, measures)
