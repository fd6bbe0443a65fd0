"""Distance between the instruction form and the data form of a token's embedding, and the change of embeddings by training.

The analysis of embeddings of ASIDE, Zverev et al., arXiv 2503.10566. The rotation by pi/2 makes the two forms of every token
orthogonal, while the segment vectors of ISE move all data forms by one short vector. Items are tokens of the vocabulary without
the special ones. E_i and E_d are the instruction and the data form of a token, E_0 is its embedding in the base model:

    embedding_shift/role_cosine             cos(E_i, E_d): 1 if roles make no difference, cos(angle) under a rotation
    embedding_shift/role_distance           |E_i - E_d| / |E_i|
    embedding_shift/norm_instruction        |E_i|, and norm_data: |E_d|; a rotation preserves norms
    embedding_shift/rank_instruction        effective rank of the matrix of all E_i, and rank_data of all E_d
    embedding_shift/base_cosine_instruction cos(E_0, E_i), and base_cosine_data: cos(E_0, E_d); only with `base`
    embedding_shift/base_distance           |E_i - E_0| / |E_0|, how far the training moved a token
    embedding_shift/base_rank               effective rank of the matrix of all E_i - E_0: directions of the change

The effective rank is exp(H(p)) of the singular values as shares of their sum, p_k = s_k / sum s (Roy and Vetterli, EUSIPCO
2007): 1 if all rows are multiples of one vector, D if all directions have equal weight.

Axes in addition to the legend of `tokens`: N tokens of the vocabulary.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import cosine_similarity

from steerlab import models
from steerlab.data import sources
from steerlab.evaluation.asking.items import choose
from steerlab.evaluation.statistics.measures import Measure, likeness
from steerlab.evaluation.statistics.metrics import (
    Observation,
    Result,
    Task,
    TokenKinds,
    about,
    plain_texts,
)
from steerlab.inputs.tokens import DATA, INSTRUCTION
from steerlab.job import Source, TaskConfig
from steerlab.models import ModelFacts
from steerlab.steered import stacks
from steerlab.steered.language import SteeredModel


class Config(TaskConfig):
    """Geometry of the embeddings of instruction and data tokens."""

    task: Literal["embedding_shift"] = "embedding_shift"
    """This task."""
    limit: int | None = Field(2000, ge=2, le=2**53)
    """Number of tokens of the vocabulary, drawn at random; null takes all."""
    base: Source | None = None
    """Model from which the training started, whose embeddings are compared with this model's; null skips the comparison."""


def measures(config: Config) -> tuple[Measure, ...]:
    """Return the measures; more distance between the roles is better, as intended by methods with roles."""
    roles = (
        likeness("role_cosine", "lower"),
        Measure("role_distance", "higher", low=0.0),
        *(Measure(f"norm_{form}", None, low=0.0, transform="mean") for form in ("instruction", "data")),
        *(Measure(f"rank_{form}", None, unit="dimensions", low=1.0) for form in ("instruction", "data")),
    )
    if config.base is None:
        return roles
    cosines = (likeness(f"base_cosine_{form}", None) for form in ("instruction", "data"))
    return (*roles, *cosines, Measure("base_distance", None, low=0.0), Measure("base_rank", None, unit="dimensions", low=1.0))


def runs_over(config: Config, metric: str | None) -> TokenKinds:
    """Return the kinds of tokens that are embedded."""
    return frozenset({("prompt", "instruction"), ("prompt", "data")})


def check(config: Config, facts: ModelFacts) -> None:
    """Refuse a base that does not exist, or has embeddings of another width. Raises ValueError."""
    if config.base is None:
        return
    with about("base"):
        own = models.facts(_directory(config.base))
        if own.hidden_size != facts.hidden_size:
            raise ValueError(
                f"{config.base} has embeddings of width {own.hidden_size}, but the job's model of {facts.hidden_size}"
            )


def run(model: SteeredModel, config: Config) -> Result:
    """Compare the forms of every token at every strength."""
    ids = vocabulary(model, config)
    base_ND = None if config.base is None else _embeddings(config.base, ids)
    observations, samples = [], []
    for strength in config.strengths:
        forms = [model.embeddings(ids, role, strength=strength) for role in (INSTRUCTION, DATA)]
        by_token, of_all = compared(forms[0], forms[1], base_ND)
        names = [f"embedding_shift/{name}" for name in by_token]
        for token, values in zip(ids, zip(*by_token.values(), strict=True), strict=True):
            observations += [Observation(n, str(token), v, 1.0, strength) for n, v in zip(names, values, strict=True)]
            sample = {"id": str(token), "strength": strength, "token": model.encoder.shown(token)}
            samples.append(sample | dict(zip(by_token, values, strict=True)))
        observations += [Observation(f"embedding_shift/{n}", "all", rank, 1.0, strength) for n, rank in of_all.items()]
    return Result(observations, samples, measures(config))


def vocabulary(model: SteeredModel, config: Config) -> list[int]:
    """Return the ids of the tokens to compare, in ascending order."""
    tokenizer, num_embeddings = model.encoder.tokenizer, models.embedding_shape(model.model)[0]
    special = {*tokenizer.all_special_ids}
    # Tables of embeddings are often padded to a round size with rows that belong to no token.
    usable = [token for token in range(min(len(tokenizer), num_embeddings)) if token not in special]
    return choose(usable, config.limit, config.rows_seed)


def compared(
    instruction_ND: Tensor, data_ND: Tensor, base_ND: Tensor | None = None
) -> tuple[dict[str, list[float]], dict[str, float | None]]:
    """Compare the forms of N tokens.

    Args:
        instruction_ND: embeddings with the role of instructions.
        data_ND: embeddings of the same tokens with the role of data.
        base_ND: embeddings of the same tokens in the base model; None skips the metrics that need them.

    Returns:
        The measures by name: a value for each token, and the effective ranks of the matrices (None for a matrix of zeros).
    """
    norm_N, data_norm_N = instruction_ND.norm(dim=1), data_ND.norm(dim=1)
    by_token = {
        "role_cosine": cosine_similarity(instruction_ND, data_ND, dim=1),
        "role_distance": (instruction_ND - data_ND).norm(dim=1) / norm_N.clamp_min(1e-12),
        "norm_instruction": norm_N,
        "norm_data": data_norm_N,
    }
    ranks = {"rank_instruction": effective_rank(instruction_ND), "rank_data": effective_rank(data_ND)}
    if base_ND is not None:
        by_token["base_cosine_instruction"] = cosine_similarity(base_ND, instruction_ND, dim=1)
        by_token["base_cosine_data"] = cosine_similarity(base_ND, data_ND, dim=1)
        by_token["base_distance"] = (instruction_ND - base_ND).norm(dim=1) / base_ND.norm(dim=1).clamp_min(1e-12)
        ranks["base_rank"] = effective_rank(instruction_ND - base_ND)
    return {name: values_N.tolist() for name, values_N in by_token.items()}, ranks


def effective_rank(x_ND: Tensor) -> float | None:
    """Return exp(H(p)) of the singular values as shares of their sum (Roy and Vetterli 2007, eq. 3); None if all are 0."""
    # Eigenvalues of the smaller Gram matrix are used, in float64: a singular value decomposition of a whole vocabulary takes
    # minutes, and squares of small singular values would be lost in float32.
    x_ND = x_ND.double()
    gram = x_ND.T @ x_ND if len(x_ND) > x_ND.shape[1] else x_ND @ x_ND.T
    singular = torch.linalg.eigvalsh(gram).clamp_min(0).sqrt()
    # Singular values below the rounding error of the largest one are noise, whose long tail would count.
    singular = singular[singular > singular.max() * 1e-7]
    if not len(singular):
        return None
    share = singular / singular.sum()
    return float(torch.exp(-(share * share.log()).sum()))


def _directory(source: str) -> str:
    return str(stacks.model_directory(sources.fetch(source)))


def _embeddings(source: str, ids: list[int]) -> Tensor:
    """Return the input embeddings of tokens in another model, (N, D) in float32.

    Raises:
        ValueError: the model has no embedding for one of the tokens.
    """
    model = models.load_model(_directory(source))
    if ids[-1] >= (num := models.embedding_shape(model)[0]):
        raise ValueError(f"base {source} has embeddings of {num} tokens, but the vocabulary of this model goes up to {ids[-1]}")
    with torch.inference_mode():
        # The module is called, since some models scale the embeddings in it.
        return models.embedding(model)(torch.tensor(ids)).float()


TASK = Task(Config, run, measures, chats=plain_texts, check=check, runs_over=runs_over)
