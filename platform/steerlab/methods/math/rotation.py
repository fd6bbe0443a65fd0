"""Linear layers that train coefficients of their weights: W = W_0 + D U^T, of which the unfrozen entries of D train.

A linear layer y = W x with W of shape (M, N) has the coefficients W U in an orthonormal basis U of its inputs: column j is the
response of all outputs to the basis direction u_j. Axes besides those of tokens.py: M outputs, N inputs of a linear layer.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from steerlab import models
from steerlab.methods.math import lora


class SharedInput:
    """An orthonormal basis U of the input of several layers, and the product x U, computed once for all of them."""

    def __init__(self, vectors_NN: Tensor, num_outputs: int) -> None:
        # The basis is memory-mapped from disk. A GPU with room holds a copy, because sending the bases of a model of 7B
        # parameters in every use would take longer than its passes.
        self._vectors_NN = models.Kept(vectors_NN)
        self.num_outputs = num_outputs
        """Number of outputs of all these layers together."""
        # The reference is weak, so that the input itself is freed after the pass.
        self._read: weakref.ref[Tensor] | None = None
        # The product is held, because no variable holds it between the calls of the layers that share it.
        self._rotated: Tensor | None = None

    def vectors(self, like: Tensor) -> Tensor:
        """Return the basis, (N, N), on the device and in the dtype of a tensor."""
        return self._vectors_NN.like(like)

    def rotated(self, x: Tensor) -> Tensor:
        """Return x U; layers that are called with the same tensor share the product and its gradient."""
        # Tensors are compared by identity: a block passes queries, keys and values the same tensor, and comparing values would
        # take a pass over it. A dead reference is None, so that memory that is used again is not mistaken for the old input.
        if self._rotated is None or self._read is None or self._read() is not x:
            self._read, self._rotated = weakref.ref(x), x @ self.vectors(x)
        return self._rotated

    def forget(self) -> None:
        """Free the last input and its product."""
        # The product holds the graph of its pass, which a second backward pass could not use again.
        self._read = self._rotated = None


class RotatedLayer(nn.Module):
    """A linear layer with the weight W = W_0 + D U^T, of which the unfrozen entries of D train.

    The gradient is dL/dD = ((dL/dW) U) * free. It is computed in one of two ways, whichever needs fewer multiplications:

    - from dL/dW, summed over the passes of a step and rotated once at the end; W, too, is computed once a step;
    - from rotated inputs, y = (x U)(W_0 U + D)^T, without rotating a matrix: in a step of a single pass that has fewer tokens
      than all layers with this input have outputs.
    """

    start_MN: Tensor
    """W_0."""
    free_MN: Tensor
    """True where D trains."""

    def __init__(self, linear: nn.Module, frozen_MN: Tensor, shared: SharedInput | None) -> None:
        super().__init__()
        start_MN = models.linear_weight(linear).detach()
        # D is float32 also under bfloat16 weights: it is its own master copy, and bfloat16 would round away steps below 1/256
        # of an entry. It starts at zero, so that W = W_0 bit for bit before the first step.
        self.change_MN = nn.Parameter(torch.zeros(start_MN.shape, dtype=_wide(start_MN.dtype)))
        # The buffers are not persistent: both are inputs of the training, and a checkpoint would copy data that is on disk
        # already.
        self.register_buffer("start_MN", start_MN, persistent=False)
        self.register_buffer("free_MN", ~frozen_MN, persistent=False)
        self.shared = shared
        self._matrices: dict[bool, Tensor] = {}
        """W_0 + D U^T under False, W_0 U + D under True, for the present D."""
        self._pending_MN: Tensor | None = None
        """Sum of dL/dW over the passes of the running step, before the last one."""
        self._begun = self._is_alone = False
        self._is_last = True
        bias = linear.bias
        # The plain weight is neither trained nor saved: the module stays in the model, but computes with this layer's matrix.
        del linear._parameters["weight"]
        # Replacing `forward` instead of the module keeps the module paths, and `__call__` still runs the hooks of patches.
        linear.forward = lambda x: self._apply_to(x, bias)  # type: ignore[method-assign]

    def start_step(self) -> None:
        """Drop the matrices of the last step, because the optimizer or a checkpoint has changed D."""
        # ZeRO writes into D without autograd, so that no version counter shows that the matrices are stale.
        self._begun = self._is_alone = False
        self._matrices.clear()
        if self.shared is not None:
            self.shared.forget()

    # The loop announces each pass, because autograd does not know that a step has several.
    def start_pass(self, is_last: bool) -> None:
        """Begin a forward and backward pass of a step; the step's gradients are complete after the last pass."""
        # A step of several passes uses W several times, so that computing it pays off.
        self._is_alone = is_last and not self._begun
        self._begun, self._is_last = True, is_last

    def _apply_to(self, x: Tensor, bias: Tensor | None) -> Tensor:
        # Rotating inputs costs T N^2 for x U, rotating the gradient M N^2 for (dL/dW) U; the product x U is shared.
        by_inputs = self._takes_rotated(x)
        # The function is applied in both cases, because its backward pass sets the gradient of a frozen entry to 0.
        matrix_MN = _Effective.apply(self.change_MN, self, by_inputs)
        if by_inputs:
            assert self.shared is not None
            x = self.shared.rotated(x)
        return nn.functional.linear(x, matrix_MN, bias)  # type: ignore[arg-type]

    def _takes_rotated(self, x: Tensor) -> bool:
        # T counts all rows of the pass, because the product x U costs T N^2 multiplications.
        num_tokens = x.numel() // x.shape[-1]
        fits = self.shared is not None and num_tokens < self.shared.num_outputs
        # Rotated inputs are not used in bfloat16, because a basis rounded to 8 bits is not orthonormal any more, and not
        # without gradients, because W is computed once and serves every pass of an evaluation.
        return fits and self._is_alone and torch.is_grad_enabled() and x.dtype == self.change_MN.dtype

    @torch.no_grad()
    def matrix(self, rotated: bool = False) -> Tensor:
        """Return W or, with `rotated`, W U = W_0 U + D, (M, N), for the present D."""
        if rotated not in self._matrices:
            if rotated:
                assert self.shared is not None
                # `add` instead of `add_`, because W_0 U is used again in the next step.
                self._matrices[rotated] = self._start_rotated().add(self.change_MN)
            else:
                # The sum is computed in float32 and rounded once: rounding D U^T to bfloat16 by itself would lose changes that
                # are small next to W_0.
                self._matrices[rotated] = (self.start_MN + self._in_weights(self.change_MN)).to(self.start_MN.dtype)
        # Each call returns a new tensor on the same memory, because autograd ties the tensor that a Function returns to that
        # call's graph.
        return self._matrices[rotated].detach()

    def _start_rotated(self) -> Tensor:
        """Return W_0 U, which is computed once."""
        # W_0 U is computed on demand: it is as large as W_0, and a training of several passes a step, or in bfloat16, never
        # needs it.
        if not hasattr(self, "start_rotated_MN"):
            assert self.shared is not None
            product_MN = self.start_MN @ self.shared.vectors(self.start_MN)
            self.register_buffer("start_rotated_MN", product_MN, persistent=False)
        return self.start_rotated_MN  # type: ignore[return-value]

    def difference(self, change_MN: Tensor) -> Tensor:
        """Return W - W_0 = D U^T for a change D, (M, N), on the CPU."""
        # The product is computed on the CPU, where the basis is memory-mapped; on the GPU every layer would need a further copy
        # of it.
        return self._in_weights(change_MN.cpu())

    def gradient_of_change(self, grad_MN: Tensor, by_inputs: bool) -> Tensor:
        """Return dL/dD from the gradient of the matrix that the forward pass used.

        Args:
            grad_MN: dL/dW, or dL/d(W U) with `by_inputs`.
            by_inputs: whether the forward pass used rotated inputs.

        Returns:
            The gradient, (M, N). Before the last pass of a step it is zero, and the last pass returns the sum of all passes.
        """
        if by_inputs:
            return grad_MN * self.free_MN  # d(W U)/dD is the identity
        # The gradient is converted before the sum over passes, because in bfloat16 a small gradient would add nothing to it.
        grad_MN = grad_MN.to(self.change_MN.dtype)
        # (dL/dW) U is linear in the gradient, so the sum over passes is rotated once (step 4 of methods/warp.py).
        if self._pending_MN is not None:
            grad_MN = self._pending_MN.add_(grad_MN)
        if not self._is_last:
            self._pending_MN = grad_MN
            return grad_MN.new_zeros(()).expand_as(grad_MN)  # one number in memory for any shape
        self._pending_MN = None
        # The gradient is rotated before it is masked, because the mask belongs to coefficients; masking first would freeze
        # entries of W.
        rotated_MN = grad_MN if self.shared is None else grad_MN @ self.shared.vectors(grad_MN)
        return rotated_MN * self.free_MN

    def _in_weights(self, change_MN: Tensor) -> Tensor:
        # U is orthonormal, so that its transpose is its inverse: D = D U^T U.
        return change_MN if self.shared is None else change_MN @ self.shared.vectors(change_MN).T


class RotatedLayers(nn.Module):
    """The trained parameters of a method: the changes D of some layers, and other weights or adapters that train with them."""

    kind = "weight"

    def __init__(
        self,
        layers: Mapping[str, RotatedLayer],
        others: Mapping[str, nn.Parameter] | None = None,
        adapters: lora.Adapters | None = None,
    ) -> None:
        super().__init__()
        others = others or {}
        # The adapters are registered before the layers, because the optimizer's state in a checkpoint numbers parameters in the
        # order of registration.
        self.adapters = adapters
        self.names, self.other_names = list(layers), list(others)
        self.layers = nn.ModuleList(layers.values())  # not a ModuleDict, which refuses the dots of module paths
        self.others = nn.ParameterList(others.values())

    def rotated(self) -> list[RotatedLayer]:
        """Return the rotated layers, in the order of `names`."""
        return [layer for layer in self.layers if isinstance(layer, RotatedLayer)]

    def start_step(self) -> None:
        """Drop matrices that were computed from D before the optimizer, or a checkpoint, changed it."""
        for layer in self.rotated():
            layer.start_step()

    def start_pass(self, is_last: bool) -> None:
        """Pass on to the layers whether this is the step's last pass, in which the summed gradients are rotated once."""
        for layer in self.rotated():
            layer.start_pass(is_last)


class _Effective(torch.autograd.Function):
    """The matrix of a layer as a function of D, with `RotatedLayer.gradient_of_change` as its backward pass.

    Autograd would rotate the gradient in every pass, and keep the intermediate matrices.
    """

    @staticmethod
    def forward(ctx: Any, change_MN: Tensor, layer: RotatedLayer, by_inputs: bool) -> Tensor:
        # `change_MN` is an argument only because autograd sends the gradient that `backward` returns to the arguments. Nothing
        # is saved for the backward pass, which needs the output's gradient alone.
        ctx.layer, ctx.by_inputs = layer, by_inputs
        return layer.matrix(by_inputs)

    @staticmethod
    def backward(ctx: Any, grad_MN: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        return ctx.layer.gradient_of_change(grad_MN, ctx.by_inputs), None, None


def _wide(dtype: torch.dtype) -> torch.dtype:
    # float64 is retained, because tests compare the layer with finite differences in it.
    return torch.float64 if dtype == torch.float64 else torch.float32
