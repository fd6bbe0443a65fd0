"""Whether the model represents instructions and data differently, and whether that decides which requests it executes.

Section 5 of ASIDE, Zverev et al., arXiv 2503.10566. "Probe" has two meanings there: a linear probe is a classifier of hidden
states, a SEP probe is a short request hidden in the data (see `separation`). Four measures, each of which is optional:

layers   `probing/layer_NN`: accuracy of a linear probe that distinguishes instruction tokens from data tokens by the hidden
         state after layer NN (00 is the embedding). A linear probe could recognise words instead of roles, so every row is
         used twice, the second time with instruction and data exchanged: each word occurs equally often in both roles. Each
         row gives the same number of tokens of either kind. 70 % of the rows train, 30 % test; no row is in both parts.
concept  `probing/probe_as_instruction`: share of the tokens of SEP probes in the data that a linear probe at a middle layer
         classifies as instruction. It is trained on rows that are not exchanged; `probing/concept_accuracy` is its accuracy
         on test rows.
causal   `probing/executed_rotated` and `probing/executed_unrotated`: share of SEP probes in the data that are executed, if
         their tokens have the role of data, and if they alone have the role of instructions (under ASIDE: not rotated).
cosine   `probing/cosine_layer_NN`: mean cosine between the hidden states of the same data tokens at the same positions, once
         with the role of data and once with that of instructions; 1 for a model that ignores roles.

Rows and items that do not fit into `max_tokens` or the model's context are counted as too long; `probing/empty`,
`unfinished`, `repetition` and `letters` are those of an item's answers in the causal check (see `legibility`).

As in the paper the linear probes are trained with binary cross-entropy and Adam (1e-3, batches of 32, 5 epochs). Departures:
inputs are standardised, because hidden states of late layers are hundreds of times larger than those of early layers (a linear
classifier could undo this, so it learns the same functions); tokens of headings and of the template belong to neither class.

Axes in addition to the legend of `tokens`: N tokens (of all rows). L counts the embedding and every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from steerlab.evaluation.asking import legibility
from steerlab.evaluation.asking.items import ALPACA, Numbered, check_rows
from steerlab.evaluation.statistics.measures import Measure, likeness, share
from steerlab.evaluation.statistics.metrics import (
    EVERY_TOKEN,
    TOO_LONG,
    Observation,
    Result,
    Score,
    Task,
    TokenKinds,
    observed,
)
from steerlab.evaluation.tasks.roles import separation
from steerlab.evaluation.tasks.roles.causal_check import EXECUTED, observe_causal
from steerlab.evaluation.tasks.roles.linear_probe import LinearProbe, Tokens, fit
from steerlab.evaluation.tasks.roles.marked_prompts import marked, probe_parts, split_probe
from steerlab.evaluation.tasks.roles.probed_rows import collect, train_rows, usable_rows
from steerlab.inputs.tokens import DATA, INSTRUCTION, Part
from steerlab.job import Source, TaskConfig
from steerlab.models import ModelFacts
from steerlab.steered.language import SteeredModel

Probed = Literal["layers", "concept", "causal", "cosine"]


class Config(TaskConfig):
    """Linear probes of roles and the causal check."""

    task: Literal["probing"] = "probing"
    """This task."""
    measures: tuple[Probed, ...] = Field(("layers", "concept", "causal", "cosine"), min_length=1)
    """Which of the four measures to take."""
    source: Source = ALPACA
    """Instruction rows with an input, on which the linear probes are trained and tested."""
    offset: int = Field(0, ge=0)
    """Number of rows with an input to skip at the start, such as those that a job trained on."""
    num_rows: int = Field(200, ge=4)
    """Number of instruction rows; `limit` counts SEP items instead."""
    cosine_rows: int = Field(50, ge=1)
    """Number of these rows that are used for the cosines."""
    tokens_per_role: int = Field(8, ge=1)
    """Largest number of tokens of each role taken from each of the two forms of a row."""
    train_share: float = Field(0.7, gt=0, lt=1)
    """Share of rows for the training of linear probes (paper: 0.7); the others are for the test."""
    epochs: int = Field(5, ge=1)
    """Passes over the training tokens (paper: 5)."""
    lr: float = Field(1e-3, gt=0)
    """Adam's learning rate (paper: 1e-3)."""
    batch: int = Field(32, ge=1)
    """Tokens for each training step (paper: 32)."""
    concept_layer: int | None = Field(None, ge=0)
    """Layer of the linear probe of `concept`; 0 is the embedding, null takes 15/32 of the depth (paper: 15 of 32, 18 of 40)."""
    separation_source: Source | None = None
    """Rows in the SEP format for concept and causal; null takes this repository's own SEP probes."""
    max_tokens: int = Field(512, ge=8)
    """Rows with more tokens are not used for the linear probes."""
    max_new_tokens: int = Field(1024, ge=1)
    """Longest answer of the causal check, in tokens."""


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures; higher accuracies and fewer executed probes mean that the model distinguishes the roles."""
    by_kind: dict[Probed, tuple[Measure, ...]] = {
        "layers": (share("layer_*", "higher"),),
        "concept": (share("concept_accuracy", "higher"), share("probe_as_instruction", "lower")),
        "causal": (share("executed_rotated", "lower"), share("executed_unrotated", None), *legibility.measures()),
        "cosine": (likeness("cosine_layer_*", "lower"),),
    }
    return tuple(measure for probed in config.measures for measure in by_kind[probed])


def runs_over(config: Config, metric: str | None) -> TokenKinds:
    """Return the kinds of tokens that a metric depends on: those of prompts, and for the causal check those of answers too."""
    # Only the causal check generates; the other measures use hidden states of prompts.
    of_answers = (*EXECUTED, *(f"probing/{measure.name}" for measure in legibility.measures()))
    writes = "causal" in config.measures if metric is None else metric in of_answers
    return EVERY_TOKEN if writes else frozenset({("prompt", "instruction"), ("prompt", "data")})


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse sources that do not exist or lack fields, and a layer that the model does not have. Raises ValueError."""
    check_rows("source", config.source)
    if {"concept", "causal"} & set(config.measures):
        separation.check_items("separation_source", config.separation_source)
    if "concept" in config.measures:
        concept_layer(config, facts.num_layers)


def run(model: SteeredModel, config: Config) -> Result:
    """Take the configured measures at every strength."""
    layer = concept_layer(config, model.num_layers)
    rows, long, items = [], [], []
    if {"layers", "concept", "cosine"} & set(config.measures):
        rows, long = usable_rows(model, config)
    if {"concept", "causal"} & set(config.measures):
        # The embedded set is built from alpaca rows, on which a job may have trained; a file of SEP rows is separate from them.
        offset = config.offset if config.separation_source is None else 0
        items = separation.load(config.separation_source, limit=config.limit, seed=config.rows_seed, offset=offset)
    observations, samples = [], []
    for strength in config.strengths:
        observations += _left_out(model, long, config, strength)
        # Rows are collected once for both measures; with a single row, no row is left for the test.
        if {"layers", "concept"} & set(config.measures) and len(rows) > 1:
            tokens = collect(model, rows, config, strength)
            is_train_N = torch.isin(tokens.row_N, torch.tensor(train_rows(len(rows), config)))
            if "layers" in config.measures:
                observations += _observe_layers(tokens, is_train_N, rows, config, strength)
            # `concept` follows the paper, whose linear probe is trained on rows that are not exchanged.
            if "concept" in config.measures:
                observations += _observe_concept(model, tokens.where(~tokens.exchanged_N), items, layer, rows, config, strength)
        if "cosine" in config.measures:
            observations += _observe_cosine(model, rows[: config.cosine_rows], strength)
    if "causal" in config.measures:
        executed, samples = observe_causal(model, items, config)
        observations += executed
    return Result(observations, samples, measures(config))


def concept_layer(config: Config, num_layers: int) -> int:
    """Return the layer of the linear probe of `concept`.

    Raises:
        ValueError: the model has fewer layers.
    """
    # Layers are counted from 1, so `num_layers` itself is the last one; 0 is the embedding.
    layer = round(num_layers * 15 / 32) if config.concept_layer is None else config.concept_layer
    if layer > num_layers:
        raise ValueError(f"concept_layer {layer} does not exist: the model has layers 1 to {num_layers}, and 0, the embedding")
    return layer


def _left_out(model: SteeredModel, long: Sequence[Numbered], config: Config, strength: float) -> list[Observation]:
    """Return, for each row that does not fit, an observation without a value in every metric that uses rows."""
    layers = range(model.num_layers + 1)
    of_measure: dict[Probed, list[str]] = {
        "layers": [f"probing/layer_{layer:02d}" for layer in layers],
        "concept": ["probing/concept_accuracy"],
        "cosine": [f"probing/cosine_layer_{layer:02d}" for layer in layers],
    }
    # SEP items are checked for their length on their own, so `probe_as_instruction` is not among these.
    names = [name for measure, names in of_measure.items() if measure in config.measures for name in names]
    return [observed(name, item.id, TOO_LONG, strength) for item in long for name in names]


def _observe_layers(
    tokens: Tokens, is_train_N: Tensor, rows: Sequence[Numbered], config: Config, strength: float
) -> list[Observation]:
    probe, test = _fitted(tokens.where(is_train_N), config), tokens.where(~is_train_N)
    return _accuracies(probe, test, rows, lambda layer: f"probing/layer_{layer:02d}", strength)


def _fitted(tokens: Tokens, config: Config) -> LinearProbe:
    return fit(tokens, epochs=config.epochs, lr=config.lr, batch=config.batch, seed=config.seed)


def _accuracies(
    probe: LinearProbe, test: Tokens, rows: Sequence[Numbered], name: Callable[[int], str], strength: float
) -> list[Observation]:
    """Return the accuracy of a probe on each test row at each layer, weighted by the row's number of tokens."""
    right_NL = (probe.says_instruction(test.h_NLD) == test.is_instruction_N[:, None]).float()
    observations = []
    # Items are rows instead of tokens, since tokens of one row are not independent.
    for i in test.row_N.unique().tolist():
        of_row = right_NL[test.row_N == i]
        for layer, value in enumerate(of_row.mean(0).tolist()):
            observations.append(Observation(name(layer), rows[i].id, value, float(len(of_row)), strength))
    return observations


def _observe_concept(
    model: SteeredModel,
    clean: Tokens,
    items: Sequence[separation.Item],
    layer: int,
    rows: Sequence[Numbered],
    config: Config,
    strength: float,
) -> list[Observation]:
    probe, observations = _concept(clean, layer, rows, config, strength)
    shares = _probe_shares(model, items, layer, probe, strength)
    for item, (taken, num_tokens) in zip(items, shares, strict=True):
        observations.append(observed("probing/probe_as_instruction", item.id, taken, strength, num_tokens))
    return observations


def _concept(
    clean: Tokens, layer: int, rows: Sequence[Numbered], config: Config, strength: float
) -> tuple[LinearProbe, list[Observation]]:
    # A slice preserves the layer axis, so that the same code trains one probe or all of them.
    at_layer = clean._replace(h_NLD=clean.h_NLD[:, layer : layer + 1])
    is_train_N = torch.isin(clean.row_N, torch.tensor(train_rows(len(rows), config)))
    probe = _fitted(at_layer.where(is_train_N), config)
    return probe, _accuracies(probe, at_layer.where(~is_train_N), rows, lambda _: "probing/concept_accuracy", strength)


def concept(
    model: SteeredModel, rows: Sequence[Numbered], layer: int, config: Config, strength: float
) -> tuple[LinearProbe, list[Observation]]:
    """Train the linear probe of `concept` on rows that are not exchanged; return it, and its accuracy on the test rows."""
    tokens = collect(model, rows, config, strength)
    return _concept(tokens.where(~tokens.exchanged_N), layer, rows, config, strength)


def _probe_shares(
    model: SteeredModel, items: Sequence[separation.Item], layer: int, probe: LinearProbe, strength: float
) -> Iterator[tuple[Score, float]]:
    """Yield for every item the share of its SEP probe's tokens that are classified as instruction, and their number."""
    texts = [split_probe(item) for item in items]
    whole = [(item, text) for item, text in zip(items, texts, strict=True) if text is not None]
    prompts = [marked(model.encoder, item.instruction, probe_parts(text, DATA)) for item, text in whole]
    # `hidden_states` accepts only prompts that fit, so its results are matched to the prompts by `fits`.
    fits = model.fits(prompts)
    states = model.hidden_states([p for p, fit in zip(prompts, fits, strict=True) if fit], strength=strength)
    remaining = iter(zip(prompts, fits, strict=True))
    for text in texts:
        if text is None:
            yield None, 1.0
            continue
        prompt, fit = next(remaining)
        if not fit:
            yield TOO_LONG, 1.0
            continue
        h_LTD, encoded = next(states)
        # The last parts of the prompt are the texts before the SEP probe, the SEP probe, and after it.
        probe_part = sum(len(message.parts) for message in prompt) - 2
        positions = [t for t, part in enumerate(encoded.parts) if part == probe_part]
        verdicts = probe.says_instruction(h_LTD[layer, positions][:, None])
        yield (float(verdicts.float().mean()), float(len(positions))) if positions else (None, 1.0)


def _observe_cosine(model: SteeredModel, rows: Sequence[Numbered], strength: float) -> list[Observation]:
    """Measure at every layer how similar the hidden states of the same tokens are as data and as instruction."""
    forms = [
        [marked(model.encoder, str(item.row["instruction"]), (Part(str(item.row["input"]), role),)) for item in rows]
        for role in (DATA, INSTRUCTION)
    ]
    states = [model.hidden_states(prompts, strength=strength) for prompts in forms]
    observations = []
    for item, (as_data_LTD, encoded), (as_instruction_LTD, _) in zip(rows, *states, strict=True):
        # The data are the last part. Roles do not change the tokenisation, so the positions are the same in both prompts.
        own_T = torch.tensor(encoded.parts) == max(encoded.parts)
        cosine_LT = torch.nn.functional.cosine_similarity(as_data_LTD[:, own_T], as_instruction_LTD[:, own_T], dim=-1)
        # Weighted by tokens, so that the mean over rows is the mean over all data tokens.
        for layer, value in enumerate(cosine_LT.mean(1).tolist()):
            name = f"probing/cosine_layer_{layer:02d}"
            observations.append(Observation(name, item.id, value, float(own_T.sum()), strength))
    return observations


TASK = Task(Config, run, measures, check=check, runs_over=runs_over)
