"""Low-rank adapters, for methods that can train them instead of whole weights.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, https://arxiv.org/abs/2106.09685, eq. 3:

    W = W_0 + (alpha / rank) B A        B zero at the start, A random

The adapted layers are those of the library `peft`. A method whose result is the model's own weights offers the setting by
deriving its config from `Adaptable`. Axes besides those of tokens.py: M outputs, N inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor, nn

from steerlab import models, patches
from steerlab.job import Frozen, MethodConfig
from steerlab.models import LayerType

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "default"
"""Name of the adapter within peft, which can hold several in one layer."""


class Lora(Frozen):
    """Settings of the adapters."""

    rank: int = Field(8, ge=1)
    """Rank R of the change of a weight."""
    # alpha is divided by the rank, so that another rank needs little tuning of the learning rate (section 4.1).
    alpha: float = Field(16.0, gt=0)
    """The change B A is scaled by alpha / rank."""
    layer_type: tuple[LayerType, ...] = Field(("attn_q", "attn_v"), min_length=1)
    """Linear layers that are adapted; the default is the paper's."""


class Adaptable(MethodConfig):
    """Base of the configs of methods that train the model's own weights, or low-rank adapters of them."""

    # The field is excluded from a key where it is null, so that artifacts from before the setting existed keep their keys.
    lora: Lora | None = Field(None, exclude_if=lambda lora: lora is None)
    """Train low-rank adapters, which the result holds folded into its weights; {} takes their defaults. Null trains all
    weights."""


def adapts(config: object) -> bool:
    """Return whether a method's config trains adapters instead of the model's own weights."""
    return isinstance(config, Adaptable) and config.lora is not None


class Adapters(nn.Module):
    """Low-rank adapters in a model whose own weights are frozen; only the adapters train."""

    kind = "weight"

    def __init__(self, model: PreTrainedModel, config: Lora) -> None:
        # peft takes seconds to import, and most jobs train no adapters.
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        super().__init__()
        self.config = config
        self.names = [place.module for place in places(model, config)]
        # An adapter changes all outputs of a layer, so that in a fused layer queries, keys and values are adapted together.
        # GPT-2 stores weights as (inputs, outputs): peft needs this flag, and `factors` transposes them.
        self._transposed = models.stores_transposed(model.get_submodule(self.names[0]))
        # peft's defaults apply otherwise: no dropout, no biases, no rank-stabilised scaling.
        lora_config = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            # peft compares full paths as a whole or as suffixes; the name of a type alone would also match layers of other
            # parts.
            target_modules=self.names,
            fan_in_fan_out=self._transposed,
        )
        # The adapters are injected into the model: `get_peft_model` would wrap it and change all module paths.
        inject_adapter_in_model(lora_config, model.requires_grad_(False), _NAME)
        layers = [model.get_submodule(name) for name in self.names]
        self._layers = [layer for layer in layers if isinstance(layer, LoraLayer)]
        # peft creates adapters in the dtype of the weights; in bfloat16 small steps of the optimizer would be rounded away.
        for layer in self._layers:
            # `Module.float` works in place: it converts the parameters of the module that it is called on.
            layer.lora_A[_NAME].float()
            layer.lora_B[_NAME].float()
        # The parameters inside the model are listed again, so that this module's state dict is exactly what the patch is made
        # of. A of eq. 3 is drawn (Kaiming uniform) and B is zero (peft 0.21), so that the first forward pass is that of the
        # model without adapters.
        self.downs = nn.ParameterList([layer.lora_A[_NAME].weight for layer in self._layers])  # type: ignore[list-item]
        self.ups = nn.ParameterList([layer.lora_B[_NAME].weight for layer in self._layers])  # type: ignore[list-item]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Turn the adapters off within a `with` block, so that the model computes what it did before the training."""
        for layer in self._layers:
            # peft 0.21 also removes `requires_grad` from the adapters here, and restores it below. The `finally` does so after
            # an exception too, because a training would otherwise continue without trained parameters.
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)

    def factors(self, state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the change of each weight as the factors of a matrix product, in the layout in which the weight is stored.

        Args:
            state: a trained state dict of this module.

        Returns:
            By the weight's name: up (M, R), scaled by alpha / rank, and down (R, N); swapped and transposed for weights that
            are stored as (N, M).
        """
        # The product is (alpha / rank) B A of eq. 3, with the scale in the first factor.
        scale = self.config.alpha / self.config.rank
        factors: dict[str, tuple[Tensor, Tensor]] = {}
        for number, name in enumerate(self.names):
            # The factors are copied to the CPU, where patches are saved. B is (M, R), A is (R, N).
            up_MR, down_RN = state[f"ups.{number}"].cpu() * scale, state[f"downs.{number}"].cpu()
            # The pair is (M, R) and (R, N), or (N, R) and (R, M) for weights that are stored as (N, M).
            factors[f"{name}.weight"] = (down_RN.T, up_MR.T) if self._transposed else (up_MR, down_RN)
        return factors

    @staticmethod
    def plain_state(model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the weights of an adapted model without the adapters, by the names that they had before."""
        return _without_adapters(model.state_dict())

    def folded(self, model_state: Mapping[str, Tensor], state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights of the adapted model with the adapters folded in, by the names that they had before.

        Args:
            model_state: a trained state dict of the model.
            state: a trained state dict of this module.
        """
        weights = _without_adapters(model_state)
        for name, (up, down) in self.factors(state).items():
            # The sum is computed in float32 and rounded once to the type of the weight.
            weights[name] = (weights[name].float() + up.float() @ down.float()).to(weights[name].dtype)
        return weights

    def finished(self, state: dict[str, Tensor]) -> patches.WeightPatch:
        """Return the weight changes of a trained state dict as a patch."""
        return patches.WeightPatch.of_factors(self.factors(state))


def _without_adapters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    # peft moves a layer's weight to `<layer>.base_layer.weight`, and names its own weights with the prefix `lora_`.
    return {name.replace(".base_layer.", "."): value.cpu() for name, value in state.items() if "lora_" not in name}


def places(model: PreTrainedModel, config: Lora) -> Sequence[models.WeightPlace]:
    """Return the linear layers that are adapted. Raises ValueError if the model lacks a type of layer."""
    # Adapters are in every decoder layer, as in the paper; the rank, not the choice of layers, sets the size of the change.
    return models.weight_places(model, config.layer_type, range(len(models.layer_names(model))))


def check_apart(model: PreTrainedModel, config: Lora, others: Sequence[models.WeightPlace]) -> None:
    """Refuse adapters in layers of which single coefficients are frozen (`others`), since a low-rank change moves all of them.

    Raises:
        ValueError: a layer is named twice, as happens where a model computes several types of layer in one.
    """
    # Layers are compared by module and not by type, because a fused layer has several types.
    both = {place.module for place in others} & {place.module for place in places(model, config)}
    if both:
        raise ValueError(f"lora.layer_type: {min(both)} also computes a type of layer with frozen coefficients; leave it out")


def num_trained(model: PreTrainedModel, config: Lora) -> int:
    """Return the number of trained parameters: R (M + N) for each adapted layer."""
    # The two factors have M R and R N numbers, where the weight has M N.
    return sum(config.rank * sum(place.shape) for place in places(model, config))
