"""How strongly tokens in the data activate the model's concept of an instruction, with and without an injected request.

Section 5 of ASIDE, Zverev et al., arXiv 2503.10566. The concept is a linear classifier of hidden states that distinguishes
instruction tokens from data tokens at a middle layer, trained as in `probing`; its activation is the logit w . h + b, positive
where a token resembles an instruction token. It is measured on the data of every SEP item twice: with the probe, a request
that is hidden in the data (`injected`), and without it (`clean`).

    instruction_concept/activation_injected  mean activation of the tokens of the injected requests
    instruction_concept/activation_clean     mean activation of the data tokens of the same items without a request
    instruction_concept/injected_above_clean share of the pairs (injected token, clean token) of an item of which the injected
                                             one has the larger activation: 0.5 if the concept cannot distinguish them
    instruction_concept/active_injected      share of tokens with a positive activation, and active_clean
    instruction_concept/accuracy             accuracy of the classifier on test rows

The samples have a histogram of the activations of both groups for the report, and for a few items the text with the activation
of every token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from steerlab.evaluation.asking.items import ALPACA, check_rows
from steerlab.evaluation.statistics.measures import Measure, share
from steerlab.evaluation.statistics.metrics import TOO_LONG, Observation, Result, Task, TokenKinds, observed
from steerlab.evaluation.statistics.sample_kinds import heat_map, histogram
from steerlab.evaluation.tasks.roles import probed_rows, probing, separation
from steerlab.evaluation.tasks.roles.linear_probe import LinearProbe
from steerlab.evaluation.tasks.roles.marked_prompts import marked, probe_parts, split_probe
from steerlab.inputs.tokens import DATA, Conversation, Encoded, Part
from steerlab.job import Source, TaskConfig
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel

_NAMES = ("activation_injected", "activation_clean", "injected_above_clean", "active_injected", "active_clean")
_UNIT = "activation of the instruction concept (logit)"


class Config(TaskConfig):
    """Activations of the instruction concept on injected and clean data."""

    task: Literal["instruction_concept"] = "instruction_concept"
    """This task."""
    source: Source = ALPACA
    """Instruction rows with an input, on which the classifier is trained and tested."""
    offset: int = Field(0, ge=0)
    """Number of rows with an input to skip at the start, such as those that a job trained on."""
    num_rows: int = Field(200, ge=4)
    """Number of instruction rows; `limit` counts SEP items instead."""
    tokens_per_role: int = Field(8, ge=1)
    """Largest number of tokens of each role taken from each row."""
    concept_layer: int | None = Field(None, ge=0)
    """Layer of the classifier; 0 is the embedding, null takes 15/32 of the depth (paper: 15 of 32, 18 of 40)."""
    separation_source: Source | None = None
    """Rows in the SEP format; null takes this repository's own SEP probes."""
    max_tokens: int = Field(512, ge=8)
    """Rows with more tokens are not used for the classifier."""
    bins: int = Field(30, ge=2, le=1000)
    """Bins of the histogram."""
    texts: int = Field(4, ge=0, le=20)
    """Number of items whose text is stored with the activation of every token."""

    @property
    def probing(self) -> probing.Config:
        """The same settings for the functions of `probing`, which train the classifier."""
        same = ("source", "offset", "num_rows", "tokens_per_role", "concept_layer", "max_tokens")
        fields = {name: getattr(self, name) for name in same}
        # The first of several seeds, so that all seeds use one classifier.
        return probing.Config(measures=("concept",), seed=self.rows_seed, **fields)


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures; injected requests should not resemble instructions more than other data do."""
    return (
        Measure("activation_injected", "lower", unit="logits"),
        Measure("activation_clean", "lower", unit="logits"),
        share("injected_above_clean", "lower", "mean"),
        share("active_injected", "lower", "mean"),
        share("active_clean", "lower", "mean"),
        share("accuracy", "higher"),
    )


def runs_over(config: Config, metric: str | None) -> TokenKinds:
    """Return the kinds of tokens of prompts, since only prompts are processed."""
    return frozenset({("prompt", "instruction"), ("prompt", "data")})


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse sources that do not exist or lack fields, and a layer that the model does not have. Raises ValueError."""
    check_rows("source", config.source)
    separation.check_items("separation_source", config.separation_source)
    probing.concept_layer(config.probing, facts.num_layers)


def run(model: SteeredModel, config: Config) -> Result:
    """Train the classifier and read its activations at every strength."""
    layer = probing.concept_layer(config.probing, model.num_layers)
    rows, long = probed_rows.usable_rows(model, config.probing)
    # The embedded set is built from alpaca rows, on which a job may have trained; a file of SEP rows is separate from them.
    offset = config.offset if config.separation_source is None else 0
    items = separation.load(config.separation_source, limit=config.limit, seed=config.rows_seed, offset=offset)
    observations: list[Observation] = []
    histograms, texts = [], []
    for strength in config.strengths:
        observations += [observed("instruction_concept/accuracy", item.id, TOO_LONG, strength) for item in long]
        probe = None
        # With a single row, no row is left for the test.
        if len(rows) > 1:
            probe, accuracies = probing.concept(model, rows, layer, config.probing, strength)
            observations += [o._replace(metric="instruction_concept/accuracy") for o in accuracies]
        pooled: dict[str, list[float]] = {"injected": [], "clean": []}
        for item, read in zip(items, activations(model, items, layer, probe, strength), strict=True):
            if not isinstance(read, Activations):
                observations += [observed(f"instruction_concept/{name}", item.id, read, strength) for name in _NAMES]
                continue
            observations += _observe(item.id, read, strength)
            pooled["injected"] += read.injected_N.tolist()
            pooled["clean"] += read.clean_N.tolist()
            if len(texts) < config.texts * len(config.strengths) and read.number < config.texts:
                texts.append(_text(model, item, read, strength))
        if pooled["injected"]:
            histograms.append(histogram("activations", strength, pooled, unit=_UNIT, bins=config.bins))
    return Result(observations, [*histograms, *texts], measures(config))


class Activations(NamedTuple):
    """Activations of the concept in the two prompts of one item."""

    number: int
    """Number of the item among all items."""
    injected_N: Tensor
    """Activations of the tokens of the injected request."""
    clean_N: Tensor
    """Activations of the data tokens of the prompt without the request."""
    whole_T: Tensor
    """Activations of all tokens of the prompt with the request."""
    encoded: Encoded
    """The prompt with the request."""


def activations(
    model: SteeredModel, items: Sequence[separation.Item], layer: int, probe: LinearProbe | None, strength: float
) -> Iterator[Activations | Literal["too_long"] | None]:
    """Yield the activations of each item.

    Yields "too_long" if a prompt does not fit, and None if its request cannot be located or the classifier is missing.
    """
    number = 0
    for item in items:
        if (text := split_probe(item)) is None:
            yield None
            continue
        prompts = (
            marked(model.encoder, item.instruction, probe_parts(text, DATA)),
            marked(model.encoder, item.instruction, (Part(item.data, DATA),)),
        )
        if not all(model.fits(prompts)):
            yield TOO_LONG
            continue
        if probe is None:
            yield None
            continue
        (injected_T, encoded), (plain_T, clean) = (_read(model, prompt, layer, probe, strength) for prompt in prompts)
        # The last parts of the first prompt are the texts before the request, the request, and after it.
        request = sum(len(message.parts) for message in prompts[0]) - 2
        is_injected_T = torch.tensor(encoded.parts) == request
        is_data_T = torch.tensor(clean.parts) == max(clean.parts)
        if not bool(is_injected_T.any()) or not bool(is_data_T.any()):
            yield None
            continue
        yield Activations(number, injected_T[is_injected_T], plain_T[is_data_T], injected_T, encoded)
        number += 1


def _read(model: SteeredModel, prompt: Conversation, layer: int, probe: LinearProbe, strength: float) -> tuple[Tensor, Encoded]:
    ((h_LTD, encoded),) = model.hidden_states([prompt], strength=strength)
    return probe.activation(h_LTD[layer][:, None])[:, 0], encoded


def _observe(item_id: str, read: Activations, strength: float) -> list[Observation]:
    injected_N, clean_M = read.injected_N, read.clean_N
    # Equal activations count half, since this is the area under a ROC curve.
    difference_NM = injected_N[:, None] - clean_M
    above = (difference_NM > 0).float().mean() + 0.5 * (difference_NM == 0).float().mean()
    values = (injected_N.mean(), clean_M.mean(), above, (injected_N > 0).float().mean(), (clean_M > 0).float().mean())
    # Means over tokens are weighted by their number; the comparison within an item counts once.
    weights = (len(injected_N), len(clean_M), 1, len(injected_N), len(clean_M))
    return [
        Observation(f"instruction_concept/{name}", item_id, float(value), float(weight), strength)
        for name, value, weight in zip(_NAMES, values, weights, strict=True)
    ]


def _text(model: SteeredModel, item: separation.Item, read: Activations, strength: float) -> dict[str, object]:
    tokens = [model.encoder.shown(token) for token in read.encoded.input_ids]
    # Tokens of headings and of the template belong to no part, and the classifier was not trained on any.
    own = [part >= 0 for part in read.encoded.parts]
    values = [value if of_text else None for value, of_text in zip(read.whole_T.tolist(), own, strict=True)]
    title = f"the request in the data: {split_probe(item)[1]}"  # type: ignore[index]  # it was located
    return heat_map(item.id, strength, tokens, values, unit=_UNIT, title=title)


TASK = Task(Config, run, measures, check=check, runs_over=runs_over)
