"""Sums over batches of a function of the gradients of selected linear layers, with one gradient in memory at a time.

Axes besides those of tokens.py: M outputs, N inputs of a linear layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from steerlab import models
from steerlab.inputs.tokens import GENERATION, IGNORED, Batch
from steerlab.methods.contract import language_modelling_loss
from steerlab.models import WeightPlace
from steerlab.steered.language import SteeredModel
from steerlab.storage.tensors import Shape

Tokens = Literal["labelled", "prompt"]
"""Tokens whose loss is differentiated: those that the data set labels, or those of the prompt."""


class GradientSums:
    """Sums of `of(place, dL_b/dW)` over batches b, float32 on the CPU; L_b is the mean loss of the chosen tokens of batch b.

    It implements `methods.preparations.Sums`.
    """

    def __init__(
        self,
        model: SteeredModel,
        places: Sequence[WeightPlace],
        of: Callable[[WeightPlace, Tensor], Tensor],
        rows: str,
        tokens: Tokens = "labelled",
    ) -> None:
        """Prepare the model for gradients of the selected weights alone.

        Args:
            model: the model; its weights outside of `places` are frozen.
            places: the linear layers.
            of: (place, gradient (M, N) float32) -> the term to sum, (M, N).
            rows: the data set, as messages name it.
            tokens: tokens whose loss is differentiated.
        """
        self._model, self._places, self._of, self._rows, self._tokens = model, places, of, rows, tokens
        # The sums are float32 and as large as the weights. They are held beside the model if a GPU has room, since copying
        # every term would take longer than the passes, else on the CPU.
        num_bytes = sum(4 * place.shape[0] * place.shape[1] for place in places)
        device = model.device if models.has_room(num_bytes, model.device) else torch.device("cpu")
        self._sums = {place.module: torch.zeros(place.shape, device=device) for place in places}
        self._finite: dict[str, Tensor] = {}
        """Whether the loss, under "", and the gradient of each place of the batch are finite."""
        # All weights are frozen first: gradients of the others would take as much memory as the model, and nothing reads them.
        model.model.requires_grad_(False)
        # The model's own parameters are used: autograd then computes dL/dW once per layer, and nothing is copied.
        weights = [model.model.get_parameter(f"{place.module}.weight").requires_grad_(True) for place in places]
        self._handles = [
            # This hook runs after `grad` is written and may clear it; an ordinary tensor hook runs before, so that all
            # gradients would pile up.
            weight.register_post_accumulate_grad_hook(self._adder(place))
            for weight, place in zip(weights, places, strict=True)
        ]

    @property
    def shapes(self) -> dict[str, Shape]:
        """Names and shapes of the sums: (M, N) by module path."""
        return {place.module: Shape(torch.float32, place.shape) for place in self._places}

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the sums by module."""
        yield from self._sums.items()

    def close(self) -> None:
        """Remove the hooks from the weights."""
        # A remaining hook would add the gradients of a later training to these sums.
        for handle in self._handles:
            handle.remove()

    def add(self, batch: Batch, number: int) -> None:
        """Add the term of one batch. Raises ValueError if its loss or a gradient is NaN or infinite."""
        labels_BT = batch.labels if self._tokens == "labelled" else prompt_labels(batch)
        # Position 0 is never predicted, and labels that are not targets are negative. The loss is a mean over the batch's
        # targets (the paper's L_b), so that a batch of long answers counts no more than one of short answers.
        num_targets = (labels_BT[:, 1:] >= 0).sum().clamp(min=1)
        # `use_cache=False`, because nothing is generated and a key-value cache would only take memory.
        logits_BTV = self._model.model(**batch.patched_inputs, use_cache=False).logits
        # The sum over targets is divided by their number in this batch alone, because |.| is taken batch by batch.
        loss = language_modelling_loss(logits_BTV, labels_BT) / num_targets
        self._finite = {"": loss.detach().isfinite()}
        loss.backward()  # the hooks of `_adder` add the gradients
        self._check(f"{self._rows}, batch {number}", loss.detach())

    def _check(self, where: str, loss: Tensor) -> None:
        """Raise ValueError if the batch had a loss or a gradient that is NaN or infinite."""
        # All places are checked together after the backward pass, so that the program waits for a GPU once and not for every
        # weight.
        good = torch.stack(list(self._finite.values())).tolist()
        # The entries are in the order of the backward pass, after the loss, so the first bad one is nearest to the cause.
        wrong = next((name for name, is_finite in zip(self._finite, good, strict=True) if not is_finite), None)
        if wrong == "":
            raise ValueError(f"{where}: the loss is {float(loss)}, so there is no gradient")
        if wrong is not None:
            raise ValueError(f"{where}: the gradient of {wrong} holds a NaN or infinite value")

    def _adder(self, place: WeightPlace) -> Callable[[Tensor], None]:
        """Return a hook that adds the term of one weight and frees its gradient."""

        # The hook runs during the backward pass, as soon as a gradient is complete, so that the gradients of all layers never
        # exist at once.

        def take(weight: Tensor) -> None:
            assert weight.grad is not None
            module = self._model.model.get_submodule(place.module)
            # The gradient is converted to (M, N), because GPT-2 stores weights transposed, and to float32, because in bfloat16
            # the terms of later batches would vanish in the sum.
            grad_MN = models.linear_weight(module, weight.grad).float()
            weight.grad = None  # or the next batch would be added to it
            self._finite[place.module] = grad_MN.isfinite().all()
            sum_MN = self._sums[place.module]
            sum_MN += self._of(place, grad_MN).to(sum_MN.device)

        return take


def prompt_labels(batch: Batch) -> Tensor:
    """Return labels, (B, T), that make the tokens of the prompt the targets instead of those of the response."""
    # IGNORED is negative, as is every label that is not a target; position 0 is never predicted, whatever its label.
    is_prompt_BT = batch.attention_mask.bool() & (batch.phases != GENERATION)
    return batch.input_ids.masked_fill(~is_prompt_BT, IGNORED)
