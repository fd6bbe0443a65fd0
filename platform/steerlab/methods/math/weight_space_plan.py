"""The stages that a config of Safety-WaRP (methods/warp.py) needs before its training, with their inputs, memory and outputs.

math/weight_space.py has the computations of these stages. Axes: M outputs, N inputs of a linear layer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal

from steerlab.guards.json_values import Json
from steerlab.job import ExtractConfig, Job, Selection
from steerlab.methods.math import weight_space
from steerlab.methods.preparations import MOMENTS, MakePart, Prepare, StartSums
from steerlab.models import WeightPlace
from steerlab.storage.plan import Estimate

if TYPE_CHECKING:
    # The import is for annotations only, because the method imports this file.
    from steerlab.methods.warp import Config


def declare_basis(config: Config, chosen: list[WeightPlace], prepare: Prepare) -> None:
    """Declare the bases of the layers' inputs, and the moments of the activations that they are made from (step 1)."""
    # Layers that read the same input (queries, keys and values) share one basis. The dict takes the width of the last of them;
    # they all have the same width.
    sizes = {place.input_of: place.shape[1] for place in chosen}
    # eigh holds the float64 matrix, its eigenvectors and its workspace, about four float64 matrices.
    estimate = Estimate(memory_bytes=32 * max(sizes.values()) ** 2, disk_bytes=4 * sum(size**2 for size in sizes.values()))
    if config.rotation == "random":
        params = weight_space.RandomBasis(seed=config.seed, sizes=sizes).model_dump(mode="json")
        # A random basis needs no moments, and so no safety rows.
        return prepare.map_parts("basis", 1, params, tuple(sizes), weight_space.random_basis, estimate=estimate)
    # The uncentred second moment of the inputs on every chosen token is C of step 1, up to the count. The selection of tokens
    # excludes padding.
    phases = {"all": ("prompt", "generation"), "prompt": ("prompt",), "response": ("generation",)}[config.basis_tokens]
    select = Selection(modules="|".join(re.escape(name) for name in sizes), side="input", phases=phases)
    limits = {"max_tokens": config.max_tokens, "rows_per_shard": config.rows_per_shard}
    # pooling none: every token of a text is one vector of C, so that a text counts by its tokens.
    reads = {"select": select, "pooling": ("none",), "keep": "moments", "second_moment": True, **limits}
    role = "basis" if prepare.has("basis") else "safety"
    prepare.moments(role, ExtractConfig.model_validate(reads))
    # The role is named only where it is not the usual one, so that bases of earlier versions keep their keys.
    params = {"rotation": "safety"} if role == "safety" else {"rotation": "safety", "role": role}
    # Each input is one part, because the decompositions do not depend on each other and can run on different nodes.
    return prepare.map_parts("basis", 1, params, tuple(sizes), weight_space.eigenbasis, needs=(MOMENTS,), estimate=estimate)


def declare_magnitude(make: MakePart, config: Config, chosen: list[WeightPlace], prepare: Prepare) -> None:
    """Declare the scores of the control that ranks coefficients by their size, which `make` computes from the weights."""
    sizes = [4 * place.shape[0] * place.shape[1] for place in chosen]
    # The name is that of the importance, because the mask reads its scores under this name, whichever they are.
    layers, needs = _layers(config, "magnitude"), () if config.rotation == "none" else ("basis",)
    estimate = Estimate(memory_bytes=max(sizes), disk_bytes=sum(sizes))
    prepare.map_parts("importance", 1, layers, ("magnitude",), make, needs=needs, reads_model=True, estimate=estimate)


def _layers(config: Config, of: Literal["gradients", "magnitude"]) -> dict[str, Json]:
    # The layers are texts, because 3 and "3" would give one stage two keys.
    target_layers = tuple(str(item) for item in config.target_layers)
    # The size of a weight does not depend on tokens, so its key must not change with an option that it does not read.
    tokens = "labelled" if of == "magnitude" else config.importance_tokens
    return weight_space.SelectedLayers(
        of=of, layer_type=config.layer_type, target_layers=target_layers, tokens=tokens
    ).model_dump(mode="json")


def declare_sums(name: str, role: str, start: StartSums, config: Config, chosen: list[WeightPlace], prepare: Prepare) -> None:
    """Declare sums over batches of the rows of a role, which `start` begins at zero (step 2)."""
    sizes = [4 * place.shape[0] * place.shape[1] for place in chosen]
    needs = () if config.rotation == "none" else ("basis",)
    # A shard holds whole batches: a batch split over two shards would be two terms of the sum of absolute values.
    per_shard = max(1, config.rows_per_shard // config.rows_per_batch) * config.rows_per_batch
    limits = {"rows_per_batch": config.rows_per_batch, "rows_per_shard": per_shard, "max_tokens": config.max_tokens}
    # The memory is that of the sums; the disk holds a file of sums for each shard, and the result.
    estimate = Estimate(memory_bytes=sum(sizes), disk_bytes=sum(sizes), work_bytes=sum(sizes))
    prepare.sum_over_rows(name, 1, role, _layers(config, "gradients") | limits, start, needs=needs, estimate=estimate)


def declare_mask(config: Config, chosen: list[WeightPlace], prepare: Prepare) -> None:
    """Declare the masks of frozen coefficients (step 3)."""
    params = weight_space.Masks(
        keep_ratio=config.keep_ratio,
        scope=config.scope,
        places={place.module: (place.shape, place.outputs) for place in chosen},
        seed=config.seed if config.mask == "random" else None,  # seeds of a sweep otherwise share one mask
        unit=config.mask_unit,
        spare_ratio=config.spare_ratio,
    )
    sizes = [place.shape[0] * place.shape[1] for place in chosen]
    # The memory is that of one layer: scores, their bits as int32 and int64, and masks.
    estimate = Estimate(memory_bytes=24 * max(sizes), disk_bytes=sum(-(-size // 8) for size in sizes))
    needs = () if config.mask == "random" else ("importance",)
    needs += () if config.spare_ratio is None else ("utility_importance",)
    prepare.map_parts("mask", 1, params.model_dump(mode="json"), ("mask",), weight_space.mask, needs=needs, estimate=estimate)


def check_rows(config: Config, job: Job) -> None:
    """Raise ValueError if a data set that the settings need is missing, or would not be read."""
    data = job.data.by_role
    # The basis may come from rows of its own; the importance cannot.
    reads_safety = config.mask == "importance" or (config.rotation == "safety" and "basis" not in data)
    if "safety" not in data and reads_safety:
        raise ValueError("data.safety: method warp needs these rows: they determine which coefficients are frozen")
    if "basis" in data and config.rotation != "safety":
        raise ValueError(f"data.basis: method.rotation {config.rotation} makes no basis of rows; remove these rows")
    if (config.spare_ratio is None) != ("utility" not in data):
        raise ValueError(
            "data.utility and method.spare_ratio belong together: the rows show which coefficients matter for an ability, the "
            "ratio how many of these are not frozen; give both or neither"
        )
    reads_loss = {"safety": config.mask == "importance", "utility": config.spare_ratio is not None}
    # L_b of step 2 is over response tokens: labels on the question would rank coefficients by their effect on asking it.
    for role, reads in reads_loss.items():
        if reads and role in data and config.importance_tokens == "labelled" and data[role].loss_on != "response":
            raise ValueError(
                f"data.{role}.loss_on: set response; the importance is that of the safe answers, not of the questions"
            )
