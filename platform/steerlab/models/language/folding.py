"""Merge affine maps of what modules compute into weights."""

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
"""Blocks of Llama-like models whose linear layers have biases if the config says so."""


def fold_affine(model: PreTrainedModel, name: str, scale_D: Tensor, shift_D: Tensor) -> None:
    """Merge z -> scale * z + shift of a module's output into weights: its own, and for a shift that it cannot hold into the
    biases of the linear layers behind it.

    D counts the features of the last axis, or the channels of a convolution and of what normalises channels.

    Raises:
        ValueError: the module or the architecture has no place for it; the message says why.
    """
    module: Any = model.get_submodule(name) if ":" not in name else None
    if isinstance(module, _WITH_GAINS) and module.weight is None:
        raise ValueError(f"{name} is a {type(module).__name__} without weights: its map has no place")
    with torch.no_grad():
        if isinstance(module, _BY_OUTPUT):
            by_output = module.weight.double().movedim(0, -1) * scale_D
            _scaled(model, name, by_output.movedim(-1, 0), scale_D, shift_D)
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
    """Merge z -> z + up (down z + bias) of a module's output into its weights: those of a linear layer, or of an embedding.

    Raises:
        ValueError: the module has no weights that could hold it; the message says why.
    """
    module: Any = model.get_submodule(name) if ":" not in name else None
    shift_D = up_DR @ bias_R
    with torch.no_grad():
        if isinstance(module, nn.Embedding):
            if any(other.weight is module.weight for other in model.modules() if isinstance(other, nn.Linear)):
                raise ValueError(f"{name} shares its weights with another layer, which would change with it")
            rows_VD = module.weight.double()
            module.weight.copy_(rows_VD + rows_VD @ down_RD.T @ up_DR.T + shift_D)
            return
        if not isinstance(module, nn.Linear) and (module is None or not stores_transposed(module)):
            kind = "an element of a tuple" if module is None else f"a {type(module).__name__}"
            raise ValueError(
                f"{name} is {kind}: only the map of a linear layer or an embedding of such a kind folds into weights"
            )
        weight_DN = module.weight.double().T if stores_transposed(module) else module.weight.double()
        if module.bias is None and bool(shift_D.any()):
            _declare_bias(model, name)
        changed_DN = weight_DN + up_DR @ (down_RD @ weight_DN)
        module.weight.copy_(changed_DN.T if stores_transposed(module) else changed_DN)
        if module.bias is not None:
            bias_D = module.bias.double()
            _set_bias(module, bias_D + up_DR @ (down_RD @ bias_D) + shift_D)


_BY_OUTPUT = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
"""Layers whose weight has its outputs first."""
_WITH_GAINS = nn.LayerNorm | nn.GroupNorm | nn.modules.batchnorm._NormBase
"""Layers whose weight is a factor of each output."""


def _is_plain_norm(module: nn.Module) -> bool:
    """Say whether a norm is torch's own, whose weight is the gain: that of a class derived from it may be the gain less one."""
    return isinstance(module, _WITH_GAINS) and type(module).__module__.startswith("torch.nn.")


def _scaled(model: PreTrainedModel, name: str, weight: Tensor, scale_D: Tensor, shift_D: Tensor) -> None:
    """Give a module its scaled weight, and the bias that goes with it."""
    module: Any = model.get_submodule(name)
    if module.bias is None and bool(shift_D.any()):
        _declare_bias(model, name)
    module.weight.copy_(weight)
    if module.bias is not None:
        _set_bias(module, scale_D * _bias(module) + shift_D)


def _fold_into_rms_norm(model: PreTrainedModel, name: str, scale_D: Tensor, shift_D: Tensor) -> None:
    """Scale the gain; the shift goes into the biases of the linear layers that read the norm."""
    norm = model.get_submodule(name)
    followers = _linear_followers(model, norm) if bool(shift_D.any()) else {}
    _scale_gain(norm, scale_D)
    for path, linear in followers.items():
        if linear.bias is None:
            _declare_bias(model, path)
        _set_bias(linear, _bias(linear) + linear.weight.double() @ shift_D)


def _bias(module: nn.Module) -> Tensor | float:
    bias: Any = module.bias
    return 0.0 if bias is None else bias.double()


def _set_bias(module: nn.Module, bias_D: Tensor) -> None:
    weight: Any = module.weight
    module.bias = nn.Parameter(bias_D.to(weight), requires_grad=False)


def _scale_gain(norm: nn.Module, scale_D: Tensor, shift_D: Tensor | None = None) -> None:
    """Scale the gain of a norm, which some architectures keep as the gain and others as the gain less one, and its bias."""
    weight: Any = norm.weight
    if weight is None:
        raise ValueError(f"a {type(norm).__name__} without weights: the map has no place")
    before = weight.detach().clone()
    probe = torch.linspace(-1, 1, len(weight), dtype=weight.dtype, device=weight.device)[None]
    wanted = scale_D.to(weight.device) * norm(probe).double()
    if shift_D is not None:
        wanted = wanted + shift_D.to(weight.device)
        _set_bias(norm, scale_D * _bias(norm) + shift_D)
    for offset in (0.0, 1.0):
        weight.copy_(scale_D * (before.double() + offset) - offset)
        if torch.allclose(norm(probe).double(), wanted, rtol=1e-2, atol=1e-3):
            return
    weight.copy_(before)
    raise ValueError(f"the gain of a {type(norm).__name__} is not kept in a way that is known here")


def _linear_followers(model: PreTrainedModel, norm: nn.Module) -> dict[str, nn.Linear]:
    """Return, by their paths, the linear layers whose input is the norm's output itself, found by one short call."""
    output: list[Tensor] = []
    followers: dict[str, nn.Module] = {}

    def follow(name: str) -> Callable[[nn.Module, tuple[object, ...]], None]:
        def seen(module: nn.Module, args: tuple[object, ...]) -> None:
            # The same memory: a module may be given a view, such as all tokens in one axis.
            if args and output and isinstance(args[0], Tensor) and args[0].data_ptr() == output[0].data_ptr():
                followers[name] = module

        return seen

    def keep(_module: nn.Module, _inputs: object, value: object) -> None:
        if isinstance(value, Tensor):
            output.append(value)

    handles = [norm.register_forward_hook(keep)]
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
    others = [name for name in followers if name not in linear]
    if others:
        raise ValueError(
            f"{others[0]}, no linear layer, takes the output of a {type(norm).__name__} too: the shift has no place"
        )
    if not linear:
        raise ValueError(
            f"a {type(norm).__name__} has no bias, and no linear layer takes its output as it is: the shift has no place"
        )
    return linear


def _declare_bias(model: PreTrainedModel, path: str) -> None:
    """Give the linear layers of a block the biases that the saved config then promises."""
    parent, _, _ = path.rpartition(".")
    flag = _BIAS_FLAGS.get(parent.rpartition(".")[2], "")
    if not isinstance(model.get_submodule(path), nn.Linear) or not hasattr(model.config, flag):
        raise ValueError(
            f"{path} has no bias, and the config of {type(model).__name__} cannot give it one: the shift has no place"
        )
    setattr(model.config, flag, True)
    for layer in layer_names(model):
        for child in model.get_submodule(f"{layer}.{parent.rpartition('.')[2]}").children():
            if isinstance(child, nn.Linear) and child.bias is None:
                _set_bias(child, torch.zeros(child.out_features))
