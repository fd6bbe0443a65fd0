"""Low-rank adapters in PEFT's folder: `adapter_config.json` and `adapter_model.safetensors`.

    W -> W + scale B A      scale = lora_alpha / r, or lora_alpha / sqrt(r) with rslora

Tensors are called `base_model.model.<module>.lora_A.weight` (R, N) and `.lora_B.weight` (M, R), for outputs M and inputs N
also where the model stores the transposed weight. Variants that are more than a sum (DoRA, trained biases, whole modules) are
refused by name. Nothing of a folder is unpickled: `adapter_model.bin` is not read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import Field
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from steerlab import models
from steerlab.guards import expressions, files, saved
from steerlab.patches.saving import SavedPatch
from steerlab.patches.weight import WeightPatch

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"
_KEY = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
# No model is that wide; without a bound a config of a few bytes could require any amount of memory.
_MOST_RANK = 2**16


class NoAdapter(ValueError):
    """A patch is not a low-rank change of linear layers; the message gives the reason."""


class Config(saved.Shape):
    """Fields of `adapter_config.json` that decide what an adapter computes."""

    peft_type: str
    r: int = Field(8, ge=1, le=_MOST_RANK)
    # The field is not strict, because peft writes whole numbers.
    lora_alpha: float = Field(8.0, strict=False)
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    # The other fields must be absent, or have the value that means the plain method.
    use_dora: bool | None = None
    bias: str | None = "none"
    lora_bias: bool | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: object = None
    target_parameters: object = None
    layer_replication: object = None
    megatron_config: object = None
    use_qalora: bool | None = None
    alora_invocation_tokens: object = None
    arrow_config: object = None

    @property
    def unsupported(self) -> str | None:
        """The first setting with which the adapter is more than a low-rank change of linear layers; None without one."""
        if self.peft_type != "LORA":
            return f"peft_type {self.peft_type!r:.40}"
        if self.bias not in (None, "none"):
            return f"bias {self.bias!r:.40}"
        flags = (
            "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "layer_replication",
            "megatron_config", "use_qalora", "alora_invocation_tokens", "arrow_config",
        )  # fmt: skip
        return next((name for name in flags if getattr(self, name)), None)

    def scale(self, module: str, rank: int) -> float:
        """Return the factor of B A in a module whose matrices have this rank."""
        alpha = self.lora_alpha
        for pattern, value in (self.alpha_pattern or {}).items():
            # The pattern matches the end of a path after a dot, or the whole path, as in peft.
            if expressions.whole(rf"(.*\.)?({pattern})", [module]):
                alpha = value
                break
        # rsLoRA divides by the root of the rank.
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)


def read_config(directory: Path) -> Config:
    """Read an adapter's config. Raises ValueError if it is damaged, or of a variant that is not a low-rank change."""
    config = saved.read(directory / CONFIG, Config)
    if (reason := config.unsupported) is not None:
        raise ValueError(
            f"{directory / CONFIG}: {reason} is more than a low-rank change of linear layers; merge the adapter into its model "
            "with peft, and use the merged model"
        )
    if not (directory / TENSORS).is_file():
        raise ValueError(f"{directory} has no {TENSORS} (a .bin file is not read, since unpickling runs code): save it again")
    return config


def read(directory: Path, model: PreTrainedModel) -> WeightPatch:
    """Read an adapter as a patch of a model's weights.

    Raises:
        ValueError: A file is damaged, the adapter is of a kind that is not a sum, or it is for another model.
    """
    config = read_config(directory)
    files.check(directory / TENSORS)
    try:
        tensors = load_file(directory / TENSORS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{directory / TENSORS} is damaged: {' '.join(str(error).split())[:200]}") from None
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise ValueError(
                f"{directory / TENSORS}: tensor {name!r:.120} is not a matrix of a low-rank adapter of a linear layer"
            )
        if not bool(tensor.isfinite().all()):
            raise ValueError(f"{directory / TENSORS}: {name:.120} holds a value that is NaN or infinite")
        # The matrices are converted to float32, because peft saves adapters in the dtype in which they trained and B A is
        # rounded once, in the weight.
        sides.setdefault(match["module"], {})[match["side"]] = tensor.float()
    if not sides:
        raise ValueError(f"{directory / TENSORS} holds no tensor")
    factors = {name: _factors(directory, config, model, name, matrices) for name, matrices in sides.items()}
    rank = max(down.shape[0] for _, down in factors.values())
    # A patch has one rank, so smaller ones get columns of zeros.
    return WeightPatch.of_factors({f"{name}.weight": _padded(*pair, rank) for name, pair in factors.items()})


def _factors(
    directory: Path, config: Config, model: PreTrainedModel, name: str, matrices: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return one layer's change as a product (up, down), in the layout in which the model stores the weight."""
    where = f"{directory / TENSORS}: {name:.120}"
    try:
        module = model.get_submodule(name)
    except AttributeError:
        raise ValueError(f"{where} is not a module of {type(model).__name__}: the adapter is for another model") from None
    if not isinstance(module, torch.nn.Linear) and not models.stores_transposed(module):
        raise ValueError(f"{where} is a {type(module).__name__}; an adapter changes linear layers")
    if set(matrices) != {"A", "B"} or any(matrix.dim() != 2 for matrix in matrices.values()):
        raise ValueError(f"{where} lacks one of its two matrices, lora_A and lora_B, or has another one")
    down_RN, up_MR = matrices["A"], matrices["B"]
    num_outputs, num_inputs = models.linear_shape(module)
    rank = len(down_RN)
    if (up_MR.shape[0], up_MR.shape[1], down_RN.shape[1]) != (num_outputs, rank, num_inputs) or rank == 0:
        raise ValueError(
            f"{where} has matrices of shapes {tuple(up_MR.shape)} and {tuple(down_RN.shape)}; the layer has {num_outputs} "
            f"outputs and {num_inputs} inputs: the adapter is for another model"
        )
    # Matrices of one huge rank would be padded in every other layer.
    if rank > num_outputs + num_inputs:
        raise ValueError(f"{where} has rank {rank:,}, more than its layer of {num_outputs} x {num_inputs} could use")
    # peft computes the scale from the rank of the config, and refuses tensors of another rank.
    ranks = {config.r, *(config.rank_pattern or {}).values()}
    if rank not in ranks:
        raise ValueError(f"{where} has rank {rank}; {CONFIG} has {', '.join(map(str, sorted(ranks)[:5]))}")
    # alpha / r is multiplied into one factor, so that strength 1 of the patch is the adapter as peft applies it.
    up_MR = up_MR * config.scale(name, rank)
    return (down_RN.T, up_MR.T) if models.stores_transposed(module) else (up_MR, down_RN)


def _padded(up: Tensor, down: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    # Columns of zeros on one side meet rows of zeros on the other, so the product does not change.
    more = rank - down.shape[0]
    return torch.nn.functional.pad(up, (0, more)), torch.nn.functional.pad(down, (0, 0, 0, more))


def write(directory: Path, stack: Sequence[SavedPatch], strength: float, model: PreTrainedModel, base: str | None) -> None:
    """Write a stack of low-rank patches as one adapter.

    Args:
        directory: Folder, which exists.
        stack: The patches, the oldest first.
        strength: Strength of the newest, which is part of the matrices; the others have strength 1.
        model: The model.
        base: Hub id or path of the model, for the config; None if it is not known.

    Raises:
        NoAdapter: A patch is not a low-rank change of linear layers.
    """
    from peft import LoraConfig

    joined: dict[str, tuple[Tensor, Tensor]] = {}
    for number, patch in enumerate(stack, 1):
        for name, (up, down) in _low_rank(patch, model).items():
            up = up * (strength if number == len(stack) else 1.0)
            older = joined.get(name)
            # The sum of two products is the product of the joined factors.
            joined[name] = (up, down) if older is None else (torch.cat([older[0], up], 1), torch.cat([older[1], down]))
    rank = max(down.shape[0] for _, down in joined.values())
    tensors: dict[str, Tensor] = {}
    transposed: set[bool] = set()
    for name, pair in joined.items():
        up, down = _padded(*pair, rank)
        transposed.add(models.stores_transposed(model.get_submodule(name)))
        up_MR, down_RN = (down.T, up.T) if models.stores_transposed(model.get_submodule(name)) else (up, down)
        # The names are peft's: a `PeftModel` holds the `LoraModel` as `base_model`, which holds the model as `model`.
        prefix = f"base_model.model.{name}"
        tensors |= {f"{prefix}.lora_A.weight": down_RN.contiguous(), f"{prefix}.lora_B.weight": up_MR.contiguous()}
    # alpha = r, because the scale is in the matrices.
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(joined),
        fan_in_fan_out=True in transposed,
        inference_mode=True,
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
    )
    config.save_pretrained(str(directory))
    written = json.loads((directory / CONFIG).read_text())
    # The names are sorted, because peft writes a set in another order each time.
    (directory / CONFIG).write_text(json.dumps({**written, "target_modules": sorted(joined)}, indent=2) + "\n")
    save_file(tensors, directory / TENSORS, metadata={"format": "pt"})


def _low_rank(patch: SavedPatch, model: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the factors (up, down) of a patch by the path of the linear layer."""
    if not isinstance(patch, WeightPatch):
        raise NoAdapter(f"a patch of kind {patch.kind} does not change weights, and an adapter is a change of weights")
    if not patch.rank:
        raise NoAdapter("the patch changes whole weights (its method trained no adapters): its differences have full rank")
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    for name, up, down in zip(patch.shapes, patch.ups, patch.downs, strict=True):
        module = name.removesuffix(".weight")
        if not isinstance(model.get_submodule(module), torch.nn.Linear) and not models.stores_transposed(
            model.get_submodule(module)
        ):
            raise NoAdapter(f"{name} is not a weight of a linear layer")
        factors[module] = (up.detach().float().cpu(), down.detach().float().cpu())
    return factors
