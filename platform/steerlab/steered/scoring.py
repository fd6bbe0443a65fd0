"""Preference losses on the tokens of responses, in pieces, so that a large vocabulary does not fill the memory.

Rafailov et al., "Direct Preference Optimization", NeurIPS 2023, https://arxiv.org/abs/2305.18290, eq. 7:

    L = -log sigmoid( beta [ r(y_w) - r(y_l) ] ),    r(y) = sum over the tokens of y of log pi(y_t) - log pi_ref(y_t)

Where the policy is the reference plus a vector on its logits, z = z_ref + a, both come from one hidden state, and

    KL(pi || pi_ref) = E_pi[a] - logsumexp(z) + logsumexp(z_ref)

Axes besides those of tokens.py: N response tokens of a batch, S its sequences (chosen, rejected, chosen, ...), P its pairs,
K features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steerlab import models
from steerlab.inputs.tokens import IGNORED, Batch
from steerlab.patches import taps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_LOGITS = 1 << 23
"""Logits of one piece: 32 MB in float32; a handful of such tensors are held at once, whatever the batch and the vocabulary.
On the CPU pieces of 64 MB took 1.1 to 1.6 times as long: the C library gives their memory back each time, and the kernel clears
it again."""


class Predicted(NamedTuple):
    """The response tokens of a batch, sequence by sequence."""

    sequence_N: Tensor
    position_N: Tensor
    """Position whose state predicts the token: the one before it."""
    target_N: Tensor
    """The token."""

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Rows and positions that predict the tokens."""
        return self.sequence_N, self.position_N

    def at(self, values_BTX: Tensor) -> Tensor:
        """Pick what stands at the positions, (N, X)."""
        return values_BTX[self.places]


def predicted(batch: Batch) -> Predicted:
    """Return the tokens of a batch that are labelled, and where they are predicted."""
    target_BT = batch.labels[:, 1:]
    sequence_N, position_N = (target_BT != IGNORED).nonzero(as_tuple=True)
    return Predicted(sequence_N, position_N, target_BT[sequence_N, position_N])


def log_probs(model: nn.Module, batch: Batch, tokens: Predicted) -> Tensor:
    """Return the log-probabilities (nats) of tokens under a model with its patches, (N,); no other logits are made."""
    logits_NV = model(**batch.patched_inputs, only=tokens.places, use_cache=False).logits[0]
    return -nn.functional.cross_entropy(wide(logits_NV), tokens.target_N, reduction="none")


class States(NamedTuple):
    """Hidden states of response tokens."""

    last_ND: Tensor
    """What the language modelling head takes."""
    tapped_ND: Tensor
    """What the vector is a function of: the same, or the output of an earlier layer."""


class StateReader:
    """Runs a model, with what is attached to it, as far as its head; holds hooks until `close`."""

    def __init__(self, model: PreTrainedModel, layer: int | None) -> None:
        head = next(name for name, module in model.named_modules() if module is models.head(model))
        self._head = taps.Tap(head)
        self._reader = taps.Reader(model, [self._head], side="input")
        self._tapped: list[Tensor] = []
        self._handles = []
        if layer is not None:
            module = model.get_submodule(models.layer_names(model)[layer])
            self._handles.append(module.register_forward_hook(lambda _m, _i, output: self._keep(output)))

    @torch.no_grad()
    def __call__(self, batch: Batch, tokens: Predicted) -> States:
        """Return the states that predict some tokens of a batch."""
        last_ND = tokens.at(self._reader(**batch.patched_inputs, use_cache=False)[self._head.name])
        return States(last_ND, tokens.at(self._tapped.pop()) if self._handles else last_ND)

    def close(self) -> None:
        """Remove the hooks."""
        self._reader.close()
        for handle in self._handles:
            handle.remove()

    def _keep(self, output: object) -> None:
        self._tapped[:] = [taps.value_at(output, None, "a decoder layer's output")]


class Scores(NamedTuple):
    """What a policy and its reference say of each token, (N,), in nats."""

    log_prob_N: Tensor
    reference_N: Tensor
    """Log-probability under the reference."""
    kl_N: Tensor
    """KL(policy || reference)"""
    square_N: Tensor
    """Squared norm of the vector between the logits."""


def compared(reference_NV: Tensor, vector_NV: Tensor, target_N: Tensor, reference_lse_N: Tensor | None = None) -> Scores:
    """Compare the policy with logits `reference + vector` with its reference, whose logsumexp may be known."""
    policy_NV = reference_NV + vector_NV
    policy_lse_N = policy_NV.logsumexp(-1)
    reference_lse_N = reference_NV.logsumexp(-1) if reference_lse_N is None else reference_lse_N
    mean_N = ((policy_NV - policy_lse_N[:, None]).exp() * vector_NV).sum(-1)
    return Scores(
        policy_NV.gather(1, target_N[:, None])[:, 0] - policy_lse_N,
        reference_NV.gather(1, target_N[:, None])[:, 0] - reference_lse_N,
        mean_N - policy_lse_N + reference_lse_N,
        vector_NV.square().sum(-1),
    )


def scores(
    head: nn.Module, last_ND: Tensor, features_NK: Tensor, up_VK: Tensor, target_N: Tensor, chunk: int = CHUNK_LOGITS
) -> Scores:
    """Compare the model's head, the reference, with itself plus the vector `up features`.

    The logits are made in pieces of `chunk`, in float32 or wider, and made again in the backward pass: none outlives its piece.
    """
    size = max(1, chunk // len(up_VK))
    pieces = [
        checkpoint(_piece, head, *piece, up_VK, use_reentrant=False, preserve_rng_state=False)
        for piece in zip(last_ND.split(size), features_NK.split(size), target_N.split(size), strict=True)
    ]
    return Scores(*(torch.cat(found) for found in zip(*pieces, strict=True)))


@torch.inference_mode()
def scores_at(
    head: nn.Module,
    states: tuple[Tensor, Tensor],
    up_VK: Tensor,
    target_N: Tensor,
    strengths: Sequence[float],
    chunk: int = CHUNK_LOGITS,
) -> list[Scores]:
    """Return what `scores` says of the vector times each strength, without gradients; states are (last_ND, features_NK).

    Both logits are made once for all strengths.
    """
    size = max(1, chunk // len(up_VK))
    found: list[list[Scores]] = [[] for _ in strengths]
    for last_ND, features_NK, targets in zip(*(values.split(size) for values in (*states, target_N)), strict=True):
        vector_NV = nn.functional.linear(features_NK, up_VK)
        reference_NV = head.forward(last_ND).to(vector_NV.dtype)  # without the head's own hooks, as in `_piece`
        lse_N = reference_NV.logsumexp(-1)
        for pieces, strength in zip(found, strengths, strict=True):
            pieces.append(compared(reference_NV, strength * vector_NV, targets, lse_N))
    return [Scores(*(torch.cat(values) for values in zip(*pieces, strict=True))) for pieces in found]


def _piece(head: nn.Module, last_ND: Tensor, features_NK: Tensor, target_N: Tensor, up_VK: Tensor) -> Scores:
    # The head's own hooks would add the vector a second time.
    reference_NV = head.forward(last_ND)
    vector_NV = nn.functional.linear(features_NK, up_VK)
    return compared(reference_NV.to(vector_NV.dtype), vector_NV, target_N)


def wide(values: Tensor) -> Tensor:
    """Return values in float32, or in the wider type that they have."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def dpo(log_ratio_N: Tensor, tokens: Predicted, beta: float, length_average: bool = False) -> tuple[Tensor, Tensor]:
    """Return the losses (nats) and the margins, beta times the difference of the two sums of log-ratios, of the pairs, (P,).

    `length_average` takes means over the tokens of a response in place of sums.
    """
    num = int(tokens.sequence_N[-1]) + 1
    sum_S = log_ratio_N.new_zeros(num).index_add(0, tokens.sequence_N, log_ratio_N)
    if length_average:
        sum_S = sum_S / tokens.sequence_N.bincount(minlength=num)
    margin_P = beta * (sum_S[0::2] - sum_S[1::2])
    return -nn.functional.logsigmoid(margin_P), margin_P


def mean_of_pairs(values_N: Tensor, tokens: Predicted) -> Tensor:
    """Return the mean over the response tokens of each pair, (P,)."""
    pair_N = tokens.sequence_N // 2
    num = int(pair_N[-1]) + 1
    return values_N.new_zeros(num).index_add(0, pair_N, values_N) / pair_N.bincount(minlength=num)
