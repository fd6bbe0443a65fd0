"""Low-rank adapters, for methods that can train them in place of whole weights.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, https://arxiv.org/abs/2106.09685, eq. 3:

    W = W_0 + (alpha / rank) B A        B zero at the start, A random

The layers are those of `peft`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pydantic import Field
from torch import Tensor, nn

from steerlab import models, patches
from steerlab.job import Frozen
from steerlab.models import LayerType

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAME = "default"


class Lora(Frozen):
    """Which adapters."""

    rank: int = Field(8, ge=1)
    """Rank of the change of a weight."""
    alpha: float = Field(16.0, gt=0)
    """The change is scaled by alpha / rank."""
    layer_type: tuple[LayerType, ...] = Field(("attn_q", "attn_v"), min_length=1)
    """Linear layers that are adapted; the default is the paper's."""


class Adapters(nn.Module):
    """The adapters of a model, which are all of it that trains."""

    kind = "weight"

    def __init__(self, model: PreTrainedModel, config: Lora) -> None:
        from peft import LoraConfig, inject_adapter_in_model
        from peft.tuners.lora import LoraLayer

        super().__init__()
        self.config = config
        self.names = [place.module for place in places(model, config)]
        # Queries, keys and values of one fused layer are adapted together: an adapter has no span of outputs.
        self._transposed = models.stores_transposed(model.get_submodule(self.names[0]))
        asked = LoraConfig(
            r=config.rank,
            lora_alpha=config.alpha,  # type: ignore[arg-type]
            target_modules=self.names,
            fan_in_fan_out=self._transposed,
        )
        inject_adapter_in_model(asked, model.requires_grad_(False), _NAME)
        layers = [model.get_submodule(name) for name in self.names]
        self._layers = [layer for layer in layers if isinstance(layer, LoraLayer)]
        # peft gives them the type of the weights; an optimizer's steps are lost in bfloat16.
        for layer in self._layers:
            layer.lora_A[_NAME].float()
            layer.lora_B[_NAME].float()
        self.downs = nn.ParameterList([layer.lora_A[_NAME].weight for layer in self._layers])  # type: ignore[list-item]
        self.ups = nn.ParameterList([layer.lora_B[_NAME].weight for layer in self._layers])  # type: ignore[list-item]

    @contextmanager
    def off(self) -> Iterator[None]:
        """Let the model be what it was before, for a forward pass without gradients."""
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)

    def factors(self, state: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the change of each weight, as it is stored, as a product of two matrices, from a trained state."""
        scale = self.config.alpha / self.config.rank
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for number, name in enumerate(self.names):
            up_MR, down_RN = state[f"ups.{number}"].cpu() * scale, state[f"downs.{number}"].cpu()
            found[f"{name}.weight"] = (down_RN.T, up_MR.T) if self._transposed else (up_MR, down_RN)
        return found

    @staticmethod
    def plain_state(model: PreTrainedModel) -> dict[str, Tensor]:
        """Return the weights of an adapted model as they were before, by the names that they had."""
        return {
            name.replace(".base_layer.", "."): value.cpu() for name, value in model.state_dict().items() if "lora_" not in name
        }

    def finished(self, state: dict[str, Tensor]) -> patches.WeightPatch:
        """Return the changes of a trained state as a patch."""
        return patches.WeightPatch.of_factors(self.factors(state))


def places(model: PreTrainedModel, config: Lora) -> Sequence[models.WeightPlace]:
    """Return the linear layers that are adapted. Raises ValueError if the model lacks a type of layer."""
    return models.weight_places(model, config.layer_type, range(len(models.layer_names(model))))


def num_trained(model: PreTrainedModel, config: Lora) -> int:
    """Return the number of the adapters' weights."""
    return sum(config.rank * sum(place.shape) for place in places(model, config))
