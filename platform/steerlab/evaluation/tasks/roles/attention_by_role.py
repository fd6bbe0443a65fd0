"""Attention by role: the share of the response tokens' attention on the instruction, on the data and elsewhere.

Rows are instruction rows with an input and their own response. In every layer, and for each of its heads, the
attention weights of a response token sum to 1 over the tokens up to itself. The shares are their sums over parts of the prompt:

    attention_by_role/instruction_layer_NN   the instruction without its heading
    attention_by_role/data_layer_NN          the data without their heading
    attention_by_role/response_layer_NN      the response itself, up to the token
    attention_by_role/other_layer_NN         headings, the template and special tokens; a first token often gets most of it

They are means over the response tokens of a row and over heads, and sum to 1. `attention_by_role/instruction`, `data`,
`response` and `other` are their means over layers. NN counts layers from 1, as `probing` does, where
0 is the embedding. With `heads`, `..._layer_NN_head_MM` adds the shares of each head. `instruction_density_layer_NN` and
`data_density_layer_NN` divide a share by the share of the tokens up to the response that the part has: above 1, its tokens get
more attention than other tokens, independent of their number.

Only the eager kernel returns attention weights, so the task switches to it; models without attention are refused.

Axes in addition to the legend of `tokens`: H heads, R response tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from steerlab.evaluation.asking.items import ALPACA, Numbered, check_rows, instruction_rows
from steerlab.evaluation.statistics.measures import Measure, share
from steerlab.evaluation.statistics.metrics import EVERY_TOKEN, TOO_LONG, Observation, Result, Task, TokenKinds, observed
from steerlab.evaluation.tasks.roles.marked_prompts import of_row
from steerlab.inputs.tokens import Conversation, Encoded
from steerlab.job import Source, TaskConfig
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel

PARTS = ("instruction", "data", "response", "other")


class Config(TaskConfig):
    """Attention of response tokens to instruction and data."""

    task: Literal["attention_by_role"] = "attention_by_role"
    """This task."""
    source: Source = ALPACA
    """Instruction rows with `instruction`, `input` and `output`; only those with an input are used."""
    offset: int = Field(0, ge=0)
    """Number of rows with an input to skip at the start, such as those that a job trained on."""
    heads: bool = False
    """Also report each head of each layer."""
    max_tokens: int = Field(512, ge=8)
    """Rows with more tokens are skipped: the attention weights grow with the square of the length."""


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures; no direction is better in general."""
    # Each number is a mean of shares within rows, not a proportion of rows, so it has Student's interval.
    of_layers = tuple(share(f"{part}_layer_*", None, "mean") for part in PARTS)
    densities = tuple(Measure(f"{part}_density_layer_*", None, unit="times the mean", low=0.0) for part in PARTS[:2])
    return (*(share(part, None, "mean") for part in PARTS), *of_layers, *densities)


def runs_over(config: Config, metric: str | None) -> TokenKinds:
    """Return the kinds of tokens that are processed: those of prompts and of responses."""
    return EVERY_TOKEN


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse a model without attention, and a source that does not exist or lacks fields. Raises ValueError."""
    if not facts.attends:
        raise ValueError(f"task: {facts.architecture} has no attention weights; remove this task")
    check_rows("source", config.source, ("instruction", "output"))


def run(model: SteeredModel, config: Config) -> Result:
    """Measure the attention of every row at every strength."""
    rows = instruction_rows(
        config.source,
        needs_input=True,
        offset=config.offset,
        limit=config.limit,
        seed=config.rows_seed,
        fields=("instruction", "output"),
    )
    prompts = [answered(model, item) for item in rows]
    fits = model.fits(prompts, config.max_tokens)
    names = names_of(model.num_layers)
    left_out = [item.id for item, fit in zip(rows, fits, strict=True) if not fit]
    observations = [
        observed(f"attention_by_role/{name}", item_id, TOO_LONG, strength)
        for item_id in left_out
        for strength in config.strengths
        for name in names
    ]
    fitting = [(item, prompt) for item, prompt, fit in zip(rows, prompts, fits, strict=True) if fit]
    for strength in config.strengths:
        read = model.attention([prompt for _, prompt in fitting], strength=strength)
        for number, ((item, _), (weights_LHTT, encoded)) in enumerate(zip(fitting, read, strict=True), 1):
            values = _named(weights_LHTT, parts_of(encoded), config.heads)
            observations += [Observation(f"attention_by_role/{name}", item.id, value, 1.0, strength) for name, value in values]
            model.progress(number, len(fitting))
    return Result(observations, [], measures(config))


def names_of(num_layers: int) -> list[str]:
    """Return the names of a row's metrics, without those of single heads."""
    densities = [f"{part}_density" for part in PARTS[:2]]
    of_layers = [f"{name}_layer_{layer:02d}" for name in (*PARTS, *densities) for layer in range(1, num_layers + 1)]
    return [*PARTS, *of_layers]


def answered(model: SteeredModel, item: Numbered) -> Conversation:
    """Return a row with its response, split into parts that distinguish instruction and data from their headings."""
    prompt = of_row(model.encoder, item, exchanged=False)
    whole = model.encoder.conversation(str(item.row["instruction"]), str(item.row["input"]), str(item.row["output"]))
    return (*prompt, *whole[len(prompt) :])


def parts_of(encoded: Encoded) -> dict[str, Tensor]:
    """Return for each of PARTS a mask of the tokens, (T,) bool; every token is in one of them."""
    part_T = torch.tensor(encoded.parts)
    is_response_T = torch.tensor(encoded.in_response)
    # `of_row` makes the instruction part 1 and the data the last part of the prompt.
    last = int(part_T[~is_response_T].max())
    is_prompt_T = ~is_response_T
    masks = {"instruction": (part_T == 1) & is_prompt_T, "data": (part_T == last) & is_prompt_T, "response": is_response_T}
    return {**masks, "other": ~(masks["instruction"] | masks["data"] | is_response_T)}


def shares(weights_LHTT: Tensor, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the share of the response tokens' attention that goes to each part, (L, H), a mean over response tokens."""
    from_response_LHRT = weights_LHTT[:, :, parts["response"].to(weights_LHTT.device)]
    return {
        name: from_response_LHRT[..., mask_T.to(weights_LHTT.device)].sum(-1).mean(-1).cpu() for name, mask_T in parts.items()
    }


def _named(weights_LHTT: Tensor, parts: Mapping[str, Tensor], heads: bool) -> Iterator[tuple[str, float]]:
    """Yield the names and values of a row's metrics; nothing if the response has no token."""
    if not bool(parts["response"].any()):
        return
    num_before = int(parts["response"].nonzero()[0])
    for part, share_LH in shares(weights_LHTT, parts).items():
        yield part, float(share_LH.mean())
        for layer, share_H in enumerate(share_LH, 1):
            mean = float(share_H.mean())
            yield f"{part}_layer_{layer:02d}", mean
            num_tokens = int(parts[part].sum())
            if part in PARTS[:2] and num_tokens:
                yield f"{part}_density_layer_{layer:02d}", mean * num_before / num_tokens
            for head, value in enumerate(share_H.tolist() if heads else (), 1):
                yield f"{part}_layer_{layer:02d}_head_{head:02d}", value


TASK = Task(Config, run, measures, check=check, runs_over=runs_over)
