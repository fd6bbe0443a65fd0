"""All weights of a model as trained parameters, saved as a patch of their differences to the start of the training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor, nn

from steerlab import patches

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Whole(nn.Module):
    """Every weight of the model, as a module whose state is saved."""

    # The kind is that of the resulting patch, because stacks and checks ask for it.
    kind = "weight"

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        # A ParameterList names its entries by number, so the weights' names are stored separately.
        self.names = [name for name, _ in model.named_parameters()]
        # The list holds the parameters themselves, not copies, because the optimizer updates the model in place. Tied weights
        # are in it once.
        self.weights = nn.ParameterList(model.parameters())

    def finished(self, state: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> patches.WeightPatch:
        """Return the differences between trained weights and those at the start as a patch.

        Args:
            state: A trained state dict of this module.
            start: The weights at the start of the training, by name.
        """
        # The differences are computed on the CPU one weight at a time, so that policy, start and differences need not fit on
        # the GPU together. The numbers follow `names`, whose order the state dict of a ParameterList has.
        return patches.WeightPatch.of(
            {name: state[f"weights.{i}"].cpu() - start[name].detach().cpu() for i, name in enumerate(self.names)}
        )
