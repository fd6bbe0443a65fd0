"""Compare a policy with its reference on response tokens, in pieces, so that a large vocabulary does not fill the memory.

If the policy adds a vector a to the logits of the reference, z = z_ref + a, both come from one hidden state, and

    KL(pi || pi_ref) = E_pi[a] - logsumexp(z) + logsumexp(z_ref)

Axes besides those of tokens.py: N response tokens of a batch, K features of a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from steerlab import models
from steerlab.inputs.tokens import Batch
from steerlab.patches import taps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHUNK_LOGITS = 1 << 23
"""Number of logits in one piece: 32 MB in float32. About five tensors of this size exist at once."""
# On the CPU, pieces of 64 MB took 1.1 to 1.6 times as long: glibc returns blocks of more than 32 MB to the kernel each time,
# which clears the memory before it provides it again.


class Predicted(NamedTuple):
    """The response tokens of a batch, sequence by sequence."""

    sequence_N: Tensor
    """Row of the batch of each token."""
    position_N: Tensor
    """Position whose hidden state predicts the token: the one before the token."""
    target_N: Tensor
    """Id of each token."""
    num_sequences: int | None = None
    """Number of rows of the batch; None for the number of the last row that has a token, plus one."""

    @property
    def sequences(self) -> int:
        """Number of sequences of the batch."""
        # The number is passed where it is known, because reading the last token's row would wait for a GPU.
        return int(self.sequence_N[-1]) + 1 if self.num_sequences is None else self.num_sequences

    @property
    def places(self) -> tuple[Tensor, Tensor]:
        """Rows and positions that predict the tokens."""
        return self.sequence_N, self.position_N

    def at(self, values_BTX: Tensor) -> Tensor:
        """Return the values at the positions that predict the tokens, (N, X)."""
        # (B, T, X) is indexed by two (N,) tensors.
        return values_BTX[self.places]


def predicted(batch: Batch) -> Predicted:
    """Return the tokens of a batch that have labels, and the positions that predict them."""
    sequence_N, position_N = batch.predicting
    return Predicted(sequence_N, position_N, batch.labels[sequence_N, position_N + 1], len(batch.labels))


def log_probs(model: nn.Module, batch: Batch, tokens: Predicted) -> Tensor:
    """Return the log-probabilities (nats) of tokens under a model with its patches, (N,)."""
    # `only` skips the logits of prompts and padding, which would take most of the memory.
    logits_NV = model(**batch.patched_inputs, only=tokens.places, use_cache=False).logits[0]
    # The values are not summed here: a caller takes sums or means over the tokens of each response.
    return -nn.functional.cross_entropy(wide(logits_NV), tokens.target_N, reduction="none")


class States(NamedTuple):
    """Hidden states of response tokens, at the two places where a logit patch and the model's head read them."""

    last_ND: Tensor
    """Input of the language modelling head."""
    tapped_ND: Tensor
    """Input of the logit patch: the same, or the output of an earlier layer."""


class StateReader:
    """Runs a model with its patches up to its head and returns hidden states; holds hooks until `close`.

    `layer` is the number of the layer whose output the logit patch reads; None for the input of the head.
    """

    def __init__(self, model: PreTrainedModel, layer: int | None) -> None:
        head = next(name for name, module in model.named_modules() if module is models.head(model))
        self._head = taps.Tap(head)
        # The pass ends at the head's input, so that logits of the whole batch are never computed.
        self._reader = taps.Reader(model, [self._head], side="input")
        self._tapped: list[Tensor] = []
        self._handles = []
        if layer is not None:
            module = model.get_submodule(models.layer_names(model)[layer])
            # The layer has a hook of its own, because the reader records inputs of modules, and this is an output.
            self._handles.append(module.register_forward_hook(lambda _m, _i, output: self._keep(output)))

    @torch.no_grad()
    def __call__(self, batch: Batch, tokens: Predicted) -> States:
        """Return the hidden states that predict some tokens of a batch."""
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
    """Comparison of a policy with its reference at each token, (N,), in nats."""

    log_prob_N: Tensor
    """Log-probability of the token under the policy."""
    reference_N: Tensor
    """Log-probability of the token under the reference."""
    kl_N: Tensor
    """KL(policy || reference) of the distributions of the token."""
    square_N: Tensor
    """Squared Euclidean norm of the difference of the logits (no unit)."""


def compared(reference_NV: Tensor, vector_NV: Tensor, target_N: Tensor, reference_lse_N: Tensor | None = None) -> Scores:
    """Compare a policy that adds a vector to the logits of its reference with that reference.

    Args:
        reference_NV: Logits of the reference, in float32 or wider.
        vector_NV: The vector that the policy adds.
        target_N: Ids of the tokens.
        reference_lse_N: logsumexp of the reference's logits, if the caller has computed it.
    """
    # Tensors of (N, V) are the largest of the comparison; there are two besides the inputs.
    policy_NV = reference_NV + vector_NV
    policy_lse_N = policy_NV.logsumexp(-1)
    reference_lse_N = reference_NV.logsumexp(-1) if reference_lse_N is None else reference_lse_N
    # E_pi[a] is the first term of the KL divergence. This form needs no difference of two log-probabilities of the whole
    # vocabulary, which would be a further tensor (N, V) and would cancel where policy and reference are close.
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
    """Compare a policy that adds the vector `up_VK features_K` to the logits of a head with that head, differentiably.

    Args:
        head: Language modelling head of the reference.
        last_ND: Inputs of the head.
        features_NK: Features of the logit patch.
        up_VK: Matrix from features to logits.
        target_N: Ids of the tokens.
        chunk: Number of logits that are computed at once.
    """
    # Each piece is checkpointed: the backward pass computes its logits again, so that no (n, V) tensor outlives its piece. A
    # piece has no dropout, so the state of the random generators need not be saved.
    size = max(1, chunk // len(up_VK))
    pieces = [
        checkpoint(_piece, head, *piece, up_VK, use_reentrant=False, preserve_rng_state=False)
        for piece in zip(last_ND.split(size), features_NK.split(size), target_N.split(size), strict=True)
    ]
    return Scores(*(torch.cat(values) for values in zip(*pieces, strict=True)))


@torch.inference_mode()
def scores_at(
    head: nn.Module,
    states: tuple[Tensor, Tensor],
    up_VK: Tensor,
    target_N: Tensor,
    strengths: Sequence[float],
    chunk: int = CHUNK_LOGITS,
) -> list[Scores]:
    """Return the result of `scores` for the vector times each strength, without gradients.

    `states` are (last_ND, features_NK); the other arguments are those of `scores`.
    """
    size = max(1, chunk // len(up_VK))
    scored: list[list[Scores]] = [[] for _ in strengths]
    # The loop over pieces is outside that over strengths, so that the logits of a piece, which cost the most, are computed
    # once.
    for last_ND, features_NK, targets in zip(*(values.split(size) for values in (*states, target_N)), strict=True):
        # The vector is linear in its strength and is computed once; everything after it is not linear.
        vector_NV = nn.functional.linear(features_NK, up_VK)
        reference_NV = head.forward(last_ND).to(vector_NV.dtype)  # without the head's hooks, as in `_piece`
        lse_N = reference_NV.logsumexp(-1)
        for pieces, strength in zip(scored, strengths, strict=True):
            pieces.append(compared(reference_NV, strength * vector_NV, targets, lse_N))
    return [Scores(*(torch.cat(values) for values in zip(*pieces, strict=True))) for pieces in scored]


def _piece(head: nn.Module, last_ND: Tensor, features_NK: Tensor, target_N: Tensor, up_VK: Tensor) -> Scores:
    # `forward` is used instead of a call, because the hook of an attached patch on the head would add the vector a second time.
    reference_NV = head.forward(last_ND)
    vector_NV = nn.functional.linear(features_NK, up_VK)
    return compared(reference_NV.to(vector_NV.dtype), vector_NV, target_N)


def wide(values: Tensor) -> Tensor:
    """Return values in float32, or unchanged if their type is wider."""
    # float64 is retained, because tests compare gradients with finite differences in it.
    return values.to(torch.promote_types(values.dtype, torch.float32))
