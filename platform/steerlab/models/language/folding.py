"""Merge affine maps of a module's output into the model's weights, so that a steered model needs no hooks.

Axes: D features of the output (channels for a convolution), N inputs, R rank of the map, V vocabulary. Sums are computed in
float64 and rounded once, to the type of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from steerlab.models.kinds import small_inputs
from steerlab.models.language.weight_places import layer_names, stores_transposed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BIAS_FLAGS = {"mlp": "mlp_bias", "self_attn": "attention_bias"}
"""Blocks of Llama-like models, with the flag of the config that gives their linear layers biases."""


def fold_affine(model: PreTrainedModel, name: str, scale_D: Tensor, shift_D: Tensor) -> None:
    """Replace a module's output z by scale * z + shift, by a change of weights in place.

    The map goes into the weights of the module. An RMSNorm has no bias, so its shift goes into the biases of the linear layers
    that read its output.

    Args:
        model: Model whose weights are changed.
        name: Path of the module.
        scale_D: Factor of each feature; each channel for a convolution and for norms of channels.
        shift_D: Term added to each feature.

    Raises:
        ValueError: The module or the architecture has no weights that can hold the map; the message gives the reason.
    """
    # A colon in the name selects an element of a module's output, which has no weights of its own.
    module: Any = model.get_submodule(name) if ":" not in name else None
    if isinstance(module, _WITH_GAINS) and module.weight is None:
        raise ValueError(f"{name} is a {type(module).__name__} without weights that could hold the map")
    with torch.no_grad():
        if isinstance(module, _BY_OUTPUT):
            # The output axis is moved to the end, where scale_D broadcasts against it, and back; convolutions have up to five
            # axes.
            by_output = module.weight.double().movedim(0, -1) * scale_D
            _scaled(model, name, by_output.movedim(-1, 0), scale_D, shift_D)
        # The gain of a norm has only the axis D, and a transposed weight (GPT-2's Conv1D) has its outputs last.
        elif module is not None and (_is_plain_norm(module) or stores_transposed(module)):
            _scaled(model, name, module.weight.double() * scale_D, scale_D, shift_D)
        elif isinstance(module, nn.LayerNorm) and module.bias is not None:
            _scale_gain(module, scale_D, shift_D)
        elif type(module).__name__.endswith("RMSNorm"):
            _fold_into_rms_norm(model, name, scale_D, shift_D)
        else:
            kind = "an element of a tuple" if module is None else f"a {type(module).__name__}"
            raise ValueError(f"{name} is {kind}: only the map of a linear layer, a convolution or a norm folds into weights")


def fold_low_rank(model: PreTrainedModel, name: str, up_DR: Tensor, down_RD: Tensor, bias_R: Tensor) -> None:
    """Replace a module's output z by z + up (down z + bias), by a change of its weights in place.

    Args:
        model: Model whose weights are changed.
        name: Path of a linear layer or an embedding.
        up_DR: Matrix from the R features of the map to the module's output.
        down_RD: Matrix from the module's output to these features.
        bias_R: Term added to the features.

    Raises:
        ValueError: The module has no weights that can hold the map; the message gives the reason.
    """
    module: Any = model.get_submodule(name) if ":" not in name else None
    shift_D = up_DR @ bias_R  # z + up (down z + bias) = (I + up down) z + up bias
    with torch.no_grad():
        if isinstance(module, nn.Embedding):
            # If weights are tied, the output head would change together with the embedding.
            if any(other.weight is module.weight for other in model.modules() if isinstance(other, nn.Linear)):
                raise ValueError(f"{name} shares its weights with another layer, which would change with it")
            rows_VD = module.weight.double()
            module.weight.copy_(rows_VD + rows_VD @ down_RD.T @ up_DR.T + shift_D)
            return
        if not isinstance(module, nn.Linear) and (module is None or not stores_transposed(module)):
            kind = "an element of a tuple" if module is None else f"a {type(module).__name__}"
            raise ValueError(f"{name} is {kind}: only a map of the output of a linear layer or an embedding folds into weights")
        weight_DN = module.weight.double().T if stores_transposed(module) else module.weight.double()
        if module.bias is None and bool(shift_D.any()):
            _declare_bias(model, name)
        # (I + up down) W is computed without the matrix of D x D.
        changed_DN = weight_DN + up_DR @ (down_RD @ weight_DN)
        module.weight.copy_(changed_DN.T if stores_transposed(module) else changed_DN)
        if module.bias is not None:
            bias_D = module.bias.double()
            _set_bias(module, bias_D + up_DR @ (down_RD @ bias_D) + shift_D)


_BY_OUTPUT = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
"""Layers whose weight has its outputs as first axis."""
_WITH_GAINS = nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase
"""Norms whose weight is a factor (gain) for each feature of the output."""


def _is_plain_norm(module: nn.Module) -> bool:
    """Return whether a norm is a class of torch itself, whose weight is the gain."""
    # A derived class may store the gain minus one.
    return isinstance(module, _WITH_GAINS) and type(module).__module__.startswith("torch.nn.")


def _scaled(model: PreTrainedModel, name: str, weight: Tensor, scale_D: Tensor, shift_D: Tensor) -> None:
    """Set a module's weight, which is scaled already, and scale and shift its bias."""
    module: Any = model.get_submodule(name)
    if module.bias is None and bool(shift_D.any()):
        _declare_bias(model, name)
    module.weight.copy_(weight)
    if module.bias is not None:
        _set_bias(module, scale_D * _bias(module) + shift_D)


def _fold_into_rms_norm(model: PreTrainedModel, name: str, scale_D: Tensor, shift_D: Tensor) -> None:
    """Scale the gain, and add the shift, through their weights, to the biases of the linear layers that read the norm."""
    norm = model.get_submodule(name)
    # The layers are found before the gain changes, so that a refused map does not change the model's weights.
    followers = _linear_followers(model, norm) if bool(shift_D.any()) else {}
    for path, linear in followers.items():
        if linear.bias is None:
            _declare_bias(model, path)
    _scale_gain(norm, scale_D)
    for linear in followers.values():
        _set_bias(linear, _bias(linear) + linear.weight.double() @ shift_D)


def _bias(module: nn.Module) -> Tensor | float:
    bias: Any = module.bias
    return 0.0 if bias is None else bias.double()


def _set_bias(module: nn.Module, bias_D: Tensor) -> None:
    weight: Any = module.weight
    module.bias = nn.Parameter(bias_D.to(weight), requires_grad=False)


def _scale_gain(norm: nn.Module, scale_D: Tensor, shift_D: Tensor | None = None) -> None:
    """Scale a norm's gain, whether its weight is the gain or the gain minus one, and change its bias."""
    weight: Any = norm.weight
    if weight is None:
        raise ValueError(f"a {type(norm).__name__} without weights that could hold the map")
    norm_any: Any = norm
    before, bias_before = weight.detach().clone(), getattr(norm_any, "bias", None)
    # A test input shows whether the norm stores the gain, or the gain minus one, as Gemma's does.
    probe = torch.linspace(-1, 1, len(weight), dtype=weight.dtype, device=weight.device)[None]
    wanted = scale_D.to(weight.device) * norm(probe).double()
    if shift_D is not None:
        wanted = wanted + shift_D.to(weight.device)
        _set_bias(norm, scale_D * _bias(norm) + shift_D)
    for offset in (0.0, 1.0):
        weight.copy_(scale_D * (before.double() + offset) - offset)
        # The tolerance is that of bfloat16, whose values have 8 significant bits.
        if torch.allclose(norm(probe).double(), wanted, rtol=1e-2, atol=1e-3):
            return
    weight.copy_(before)
    if shift_D is not None:
        norm_any.bias = bias_before
    raise ValueError(
        f"a {type(norm).__name__} stores neither its gain nor its gain minus one as weight, so no weight can hold the map"
    )


def _linear_followers(model: PreTrainedModel, norm: nn.Module) -> dict[str, nn.Linear]:
    """Return, by path, the linear layers whose input is the norm's output, observed in one short call of the model."""
    output: list[Tensor] = []
    followers: dict[str, nn.Module] = {}

    def follow(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def compare(module: nn.Module, args: tuple[object, ...]) -> None:
            # Tensors are compared by memory instead of identity, because a module may get a view of the output, such as all
            # tokens in one axis.
            if args and output and isinstance(args[0], Tensor) and args[0].data_ptr() == output[0].data_ptr():
                followers[name] = module

        return compare

    # The output is held until the end of the call, so that no other tensor can take its memory.
    def store(_module: nn.Module, _inputs: object, value: object) -> None:
        if isinstance(value, Tensor):
            output.append(value)

    handles = [norm.register_forward_hook(store)]
    # Containers without parameters of their own pass the output on, so only modules with parameters count as readers.
    weighted = [
        (name, module) for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None
    ]
    handles += [module.register_forward_pre_hook(follow(name)) for name, module in weighted]
    try:
        model(**small_inputs(model))
    finally:
        for handle in handles:
            handle.remove()
    linear = {name: module for name, module in followers.items() if isinstance(module, nn.Linear)}
    # The shift would be lost for a module without a bias that could hold it.
    others = [name for name in followers if name not in linear]
    if others:
        raise ValueError(
            f"{others[0]}, not a linear layer, also takes the output of a {type(norm).__name__}: no bias can hold the shift"
        )
    if not linear:
        raise ValueError(
            f"a {type(norm).__name__} has no bias, and no linear layer takes its output unchanged: no bias can hold the shift"
        )
    return linear


def _declare_bias(model: PreTrainedModel, path: str) -> None:
    """Add zero biases to the linear layers of a block, in all decoder layers, and set the flag of the config for them."""
    # The flag holds for all layers, and a saved checkpoint that lacked some of these biases could not be loaded. The config has
    # one flag for all linear layers of a block, and `save_pretrained` writes no other trace of a bias.
    parent, _, _ = path.rpartition(".")
    flag = _BIAS_FLAGS.get(parent.rpartition(".")[2], "")
    if not isinstance(model.get_submodule(path), nn.Linear) or not hasattr(model.config, flag):
        raise ValueError(
            f"{path} has no bias, and the config of {type(model).__name__} cannot give it one: no bias can hold the shift"
        )
    setattr(model.config, flag, True)
    for layer in layer_names(model):
        for child in model.get_submodule(f"{layer}.{parent.rpartition('.')[2]}").children():
            if isinstance(child, nn.Linear) and child.bias is None:
                _set_bias(child, torch.zeros(child.out_features))
