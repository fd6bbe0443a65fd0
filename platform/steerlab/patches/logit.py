"""The patch that adds a vector to the logits, computed by a second head: IAV."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from steerlab import models
from steerlab.patches import taps
from steerlab.patches.attaching import CannotFold, Forward

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LogitPatch(nn.Module):
    """A second head on a hidden state h, added to the logits: z = z_base + alpha a(h) with a(h) = up f(h) (IAV).

    alpha is the strength. `up` is zero at the start, so that the patch has no effect before it is trained.

    Args:
        hidden_size: width D of h.
        vocab_size: number V of logits.
        head: linear: f(h) = h, `up` is a V x D matrix; low_rank: f(h) = down h; mlp: f(h) = gelu(down h + bias).
        rank: number of features f(h) of low_rank and mlp; 0 for linear.
        layer: number of the decoder layer, from 0, whose output is h; None: the input of the language modelling head.
        strength_range: lowest and highest meaningful strength; None: any.
    """

    kind: ClassVar[str] = "logit"

    def __init__(
        self,
        hidden_size: int,
        vocab_size: int,
        head: Literal["linear", "low_rank", "mlp"] = "linear",
        rank: int = 0,
        layer: int | None = None,
        strength_range: tuple[float, float] | list[float] | None = None,
    ) -> None:
        super().__init__()
        # The rank is refused instead of ignored, because the saved spec would name a rank that no tensor has.
        if (rank > 0) == (head == "linear"):
            raise ValueError(f"a {head} head of rank {rank}: low_rank and mlp need a rank, linear needs rank 0")
        self.hidden_size, self.vocab_size, self.rank, self.layer = hidden_size, vocab_size, rank, layer
        self.head: Literal["linear", "low_rank", "mlp"] = head
        self.strength_range = None if strength_range is None else (strength_range[0], strength_range[1])
        # Only one factor is zero, because with both at zero neither would get a gradient.
        self.up = nn.Parameter(torch.zeros(vocab_size, rank or hidden_size))
        self.down = nn.Parameter(torch.randn(rank, hidden_size) / math.sqrt(hidden_size)) if rank else None
        self.bias = nn.Parameter(torch.zeros(rank)) if head == "mlp" else None

    def features(self, h: Tensor) -> Tensor:
        """Return f(h), (..., K), in the dtype of h."""
        if self.down is None:
            return h
        # (..., rank).
        inner = nn.functional.linear(h, self.down.to(h.dtype), None if self.bias is None else self.bias.to(h.dtype))
        return inner if self.bias is None else nn.functional.gelu(inner)

    def forward(self, h: Tensor) -> Tensor:
        """Return a(h), (..., V)."""
        # a(h) has the dtype of h, as the model's own head: float32 for a vocabulary would double the memory of the logits.
        return nn.functional.linear(self.features(h), self.up.to(h.dtype))

    def hook(self, model: PreTrainedModel, forward: Forward, number: int) -> list[RemovableHandle]:
        """Register a hook on the output of the language modelling head.

        Raises:
            ValueError: the model's head has another width or vocabulary.
        """
        self._check_fits(model)
        tapped: list[Tensor] = []
        handles = []
        # The layer runs before the head in every pass, and its output is in `tapped` until the head's hook takes it.
        if self.layer is not None:
            layer = model.get_submodule(models.layer_names(model)[self.layer])
            # The list has one entry at most: if a pass ended before the head, the next pass replaces its value.
            handles.append(layer.register_forward_hook(lambda _m, _i, output: _keep_only(tapped, output)))

        def edit(_module: nn.Module, inputs: tuple[Tensor, ...], logits_BTV: Tensor) -> Tensor:
            alpha = forward.strength_of_logits(number)
            # transformers passes only the last tokens to the head if `logits_to_keep` is set. `only` has been applied to the
            # head's input already, but not to the output of an earlier layer.
            h_BTD = forward.picked(tapped.pop())[:, -logits_BTV.shape[1] :] if tapped else inputs[0]
            vector_BTV = self(h_BTD)
            return logits_BTV + (vector_BTV if alpha is None else alpha.to(vector_BTV.dtype) * vector_BTV)

        return [*handles, models.head(model).register_forward_hook(edit)]

    def _check_fits(self, model: PreTrainedModel) -> None:
        vocab_size, hidden_size = models.linear_shape(models.head(model))
        if (vocab_size, hidden_size) != (self.vocab_size, self.hidden_size):
            raise ValueError(
                f"the logit patch has {self.vocab_size} tokens and width {self.hidden_size}, the head of "
                f"{type(model).__name__} has {vocab_size} and {hidden_size}"
            )

    def spec(self) -> dict[str, object]:
        """Return the constructor's arguments as JSON values."""
        names = ("hidden_size", "vocab_size", "head", "rank", "layer", "strength_range")
        return {name: getattr(self, name) for name in names}

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters of the second head."""
        return self.state_dict()

    def fold(self, model: PreTrainedModel, strength: float) -> None:
        """Add the second head, times the strength, to the model's own; tied embeddings are untied first.

        Raises:
            CannotFold: the vector is not a linear function of the head's input.
        """
        # A gelu is not linear, and an earlier layer's output is not a function of the head's input.
        if self.head == "mlp" or self.layer is not None:
            raise CannotFold("the vector is not a linear function of the input of the language modelling head")
        self._check_fits(model)
        head = models.head(model)
        # (V, K) @ (K, D).
        matrix_VD = self.up if self.down is None else self.up @ self.down
        # The sum is computed in float64 and rounded once: two roundings in bfloat16 would change the logits of a small vector.
        folded_VD = models.linear_weight(head).detach().double() + strength * matrix_VD.detach().double()
        # A new parameter is made instead of a change in place, because a tied embedding shares the old one.
        head.weight = nn.Parameter(models.linear_weight(head, folded_VD).to(head.weight.dtype), requires_grad=False)  # type: ignore[arg-type, union-attr]
        model.config.tie_word_embeddings = False


def _keep_only(values: list[Tensor], output: object) -> None:
    values[:] = [taps.value_at(output, None, "a decoder layer's output")]
