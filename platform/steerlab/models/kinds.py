"""Questions that language models and diffusion pipelines answer differently.

Other folders call these functions and need not know the kind of the model.
"""

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
    """A language model of transformers, or a diffusion pipeline."""

DRY_SHAPE_BT = (3, 11)
"""Rows and tokens of a forward pass on the meta device: sizes that no other axis of a model is likely to have."""


def steered_part(model: nn.Module) -> str | None:
    """Return the name of the denoiser, the part of a pipeline that is read and steered; None for a language model."""
    return model.denoiser_name if isinstance(model, Diffusion) else None


def running(model: nn.Module) -> Pass | None:
    """Return the denoiser's pass that runs in this thread (see `Diffusion.now`); None for a language model."""
    return model.now if isinstance(model, Diffusion) else None


def unsteered_share(model: nn.Module) -> str | None:
    """Describe the steps or rows of a pipeline on which patches do not act; None if they act on all."""
    return model.unsteered_share() if isinstance(model, Diffusion) else None


def num_reads(model: nn.Module) -> int:
    """Return how often the activations of a module are recorded in one call of the model."""
    return model.num_reads if isinstance(model, Diffusion) else 1


def max_positions(model: Model) -> float:
    """Return the length of a model's context in tokens; infinity for a pipeline, or if the config names no limit."""
    return math.inf if isinstance(model, Diffusion) else decoding.max_positions(model)


def alike_up_to(model: Model) -> float:
    """Return the length in tokens up to which a row's result does not depend on its batch; infinity for most models."""
    return math.inf if isinstance(model, Diffusion) else decoding.alike_up_to(model)


def modules_that_run(skeleton: Model) -> dict[str, object] | None:
    """Return the outputs of all modules, by path, that run in a forward pass over `DRY_SHAPE_BT` tokens on the meta device.

    None for a pipeline, and for a model whose forward pass needs the values of tensors.
    """
    if isinstance(skeleton, Diffusion):
        return None
    outputs: dict[str, object] = {}
    # `name=name` binds the value of this iteration; without it every hook would use the last name.
    handles = [
        module.register_forward_hook(lambda _m, _i, output, name=name: outputs.update({name: output}))
        for name, module in skeleton.named_modules()
    ]
    ids_BT = torch.zeros(DRY_SHAPE_BT, dtype=torch.long, device=skeleton.device)
    inputs = accepted(skeleton, {"input_ids": ids_BT, "position_ids": ids_BT})
    return None if _dry_run(skeleton, handles, inputs) is None else outputs


def check_head(skeleton: PreTrainedModel) -> None:
    """Check, without weights, that a model's logits are a linear function of the last hidden state.

    Raises:
        ValueError: The model scales or caps its logits after the head, or its head is not a linear layer.
    """
    output_head = head(skeleton)
    if not isinstance(output_head, nn.Linear):
        raise ValueError(f"the head of {type(skeleton).__name__} is a {type(output_head).__name__}, not a linear layer")
    if _changes_logits(skeleton):
        raise ValueError(
            f"{type(skeleton).__name__} scales or caps its logits after its head, so they are not linear in the last "
            "hidden state"
        )


@lru_cache(maxsize=16)
def _changes_logits(skeleton: PreTrainedModel) -> bool:
    """Return whether the model changes the logits after its head; cached, because plans of one model share its skeleton."""
    head_outputs: list[object] = []
    handle = head(skeleton).register_forward_hook(lambda _m, _i, logits: head_outputs.append(logits))
    out = _dry_run(skeleton, [handle], small_inputs(skeleton))
    # Tensors on the meta device have no values to compare; the same object means that nothing was computed after the head.
    return out is not None and not any(out.logits is logits for logits in head_outputs)


def _dry_run(skeleton: PreTrainedModel, handles: Sequence[RemovableHandle], inputs: Mapping[str, object]) -> Any:
    """Call a model on the meta device, remove the hooks, and return its output; None if the call needs values of tensors."""
    try:
        # Without a cache, transformers (5.23) reads the positions' values to see whether a row packs several sequences.
        with _WithoutValues():
            return skeleton(**inputs, **empty_cache(skeleton), use_cache=True)
    except (RuntimeError, NotImplementedError, TypeError):  # an operation that reads values
        return None
    finally:
        for handle in handles:
            handle.remove()


class _WithoutValues(TorchDispatchMode):
    """Replaces operations that fail on the meta device, where tensors have shapes but no values."""

    def __torch_dispatch__(
        self, func: OpOverload, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, object] | None = None
    ) -> object:
        # `tensor.item()` and `if tensor:` come here; the branch that the model then takes does not matter for the shapes.
        if func is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False
        # The implementation of the experts' grouped product for the meta device takes bfloat16 only (torch 2.13).
        if func is torch.ops.aten._grouped_mm.default:
            return args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        return func(*args, **(kwargs or {}))


def small_inputs(model: Model) -> dict[str, object]:
    """Return the arguments of a short call of the model, which is made to find the shapes of modules' outputs."""
    if isinstance(model, Diffusion):
        return {"prompts": [model.small_prompt], "seeds": [0]}
    return {"input_ids": torch.zeros(1, 1, dtype=torch.long, device=model.device)}
