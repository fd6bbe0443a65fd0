"""What language models and pipelines answer differently, so that nobody else asks which of them a model is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from steerlab.models.diffusion.passes import Pass
from steerlab.models.diffusion.pipelines import Diffusion
from steerlab.models.language import decoding
from steerlab.models.language.decoding import accepted, empty_cache
from steerlab.models.language.weight_places import head

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    Model: TypeAlias = PreTrainedModel | Diffusion
    """Every model is one of these two."""

DRY_SHAPE_BT = (3, 11)
"""Rows and tokens of a pass without weights: sizes that no other axis is likely to have."""


def steered_part(model: nn.Module) -> str | None:
    """Return the part of a pipeline that is read and steered; None where that is all of the model."""
    return model.denoiser_name if isinstance(model, Diffusion) else None


def running(model: nn.Module) -> Pass | None:
    """Return the pass of a drawing that runs in this thread; None in a language model."""
    return model.now if isinstance(model, Diffusion) else None


def unsteered_share(model: nn.Module) -> str | None:
    """Say on which part of what a model computes patches do not act; None where they act on all of it."""
    return model.unsteered_share() if isinstance(model, Diffusion) else None


def num_reads(model: nn.Module) -> int:
    """Return how often a module is read in one call of the model."""
    return model.num_reads if isinstance(model, Diffusion) else 1


def max_positions(model: Model) -> float:
    """Return how many tokens a model's context holds; infinity where its config names no limit, or it reads no tokens."""
    return math.inf if isinstance(model, Diffusion) else decoding.max_positions(model)


def alike_up_to(model: Model) -> float:
    """Return the number of tokens up to which a row is computed alike in every batch; infinity for most models."""
    return math.inf if isinstance(model, Diffusion) else decoding.alike_up_to(model)


def modules_that_run(skeleton: Model) -> dict[str, object] | None:
    """Return the modules that take part in a forward pass over `DRY_SHAPE_BT` tokens with what they return.

    No weights are needed. None where that cannot be said.
    """
    if isinstance(skeleton, Diffusion):
        return None
    outputs: dict[str, object] = {}
    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: outputs.update({name: output}))
        for name, module in skeleton.named_modules()
    ]
    ids_BT = torch.zeros(DRY_SHAPE_BT, dtype=torch.long, device=skeleton.device)
    inputs = accepted(skeleton, {"input_ids": ids_BT, "position_ids": ids_BT})
    return None if _dry_run(skeleton, handles, inputs) is None else outputs


def check_head(skeleton: PreTrainedModel) -> None:
    """Refuse a model whose logits are not what its head makes of the last hidden state, found without weights.

    Raises:
        ValueError: the logits are scaled or capped after the head, or the head is no linear layer.
    """
    output_head = head(skeleton)
    if not isinstance(output_head, nn.Linear):
        raise ValueError(f"the head of {type(skeleton).__name__} is a {type(output_head).__name__}, not a linear layer")
    if _changes_logits(skeleton):
        raise ValueError(
            f"{type(skeleton).__name__} scales or caps its logits after its head, so they are no linear function of the last "
            "hidden state"
        )


@lru_cache(maxsize=16)
def _changes_logits(skeleton: PreTrainedModel) -> bool:
    """Say whether a skeleton returns other logits than its head makes. Plans of one model share its skeleton."""
    of_head: list[object] = []
    handle = head(skeleton).register_forward_hook(lambda _m, _i, logits: of_head.append(logits))
    out = _dry_run(skeleton, [handle], small_inputs(skeleton))
    return out is not None and not any(out.logits is logits for logits in of_head)


def _dry_run(skeleton: PreTrainedModel, handles: Sequence[RemovableHandle], inputs: Mapping[str, object]) -> Any:
    """Return the output of a short call of a model without weights, and take hooks off; None where it cannot be called."""
    try:
        # Given a cache, transformers does not look at the positions for several rows in one.
        with _WithoutValues():
            return skeleton(**inputs, **empty_cache(skeleton), use_cache=True)
    except (RuntimeError, NotImplementedError, TypeError):  # more looks at values than `_WithoutValues` knows
        return None
    finally:
        for handle in handles:
            handle.remove()


class _WithoutValues(TorchDispatchMode):
    """Lets a model without weights answer where it looks at a value, or calls a kernel that is picky about types."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False
        if func is torch.ops.aten._grouped_mm.default:
            return args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        return func(*args, **(kwargs or {}))


def small_inputs(model: Model) -> dict[str, object]:
    """Return arguments of a short call of the model, by which the widths of modules are found."""
    if isinstance(model, Diffusion):
        return {"prompts": [model.small_prompt], "seeds": [0]}
    return {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=model.device)}
