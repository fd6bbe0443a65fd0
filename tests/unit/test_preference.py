"""Preference losses against plain autograd over whole logits, in pieces and at once."""

from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import PreTrainedModel

from steerlab.data.worlds import tiny
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Batch, collate
from steerlab.methods.math import pair_losses
from steerlab.steered import scoring
from steerlab.steered.scoring import Predicted, Scores

SIZES = (5, 3, 2, 6)
V, D, K, BETA = 50, 8, 4, 0.3
TOKENS = Predicted(
    torch.arange(4).repeat_interleave(torch.tensor(SIZES)), torch.zeros(16, dtype=torch.long), torch.arange(16) * 3
)


def inputs(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(D, V).to(dtype).requires_grad_(False)
    for parameter in head.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    last_ND, features_NK, up_VK = (torch.randn(*size, generator=generator).to(dtype) for size in ((16, D), (16, K), (V, K)))
    return head, last_ND, features_NK.requires_grad_(), up_VK.requires_grad_()


def naive(head: nn.Module, last_ND: Tensor, features_NK: Tensor, up_VK: Tensor) -> Scores:
    """The definitions, token by token."""
    found: list[Any] = []
    for last_D, features_K, target in zip(last_ND, features_NK, TOKENS.target_N, strict=True):
        vector_V = up_VK @ features_K
        base_V = head(last_D).log_softmax(0)
        policy_V = (head(last_D) + vector_V).log_softmax(0)
        kl = (policy_V.exp() * (policy_V - base_V)).sum()
        found.append((policy_V[target], base_V[target], kl, (vector_V**2).sum()))
    return Scores(*(torch.stack(column) for column in zip(*found, strict=True)))


def naive_dpo(log_ratio_N: Tensor, average: bool) -> Tensor:
    """Equation 7, pair by pair."""
    sums = [part.mean() if average else part.sum() for part in log_ratio_N.split(SIZES)]
    return torch.stack([-torch.log(torch.sigmoid(BETA * (sums[i] - sums[i + 1]))) for i in (0, 2)])


def loss(scores: Scores, average: bool) -> Tensor:
    pairs = pair_losses.compare(scores.log_prob_N, scores.reference_N, TOKENS, BETA, average)
    losses_P = pair_losses.loss(pairs.margin_P, BETA)
    kl_P, square_P = (pair_losses.mean_of_pairs(x_N, TOKENS) for x_N in (scores.kl_N, scores.square_N))
    return (losses_P + 0.7 * kl_P + 0.2 * square_P).sum()


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("chunk", [1, 3 * V, 5 * V + 1, 10**6])
def test_the_loss_in_pieces_is_the_naive_one_with_its_gradients(chunk: int, average: bool) -> None:
    head, last_ND, features_NK, up_VK = inputs()
    reference = naive(head, last_ND, features_NK, up_VK)
    pairs = [slice(0, 8), slice(8, 16)]
    further = sum(0.7 * reference.kl_N[of].mean() + 0.2 * reference.square_N[of].mean() for of in pairs)
    expected = naive_dpo(reference.log_prob_N - reference.reference_N, average).sum() + further
    wanted = torch.autograd.grad(expected, (features_NK, up_VK))
    scores = scoring.scores(head, last_ND, features_NK, up_VK, TOKENS.target_N, chunk)
    for ours, theirs in zip(scores, reference, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)
    total = loss(scores, average)
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-12)
    for ours, theirs in zip(torch.autograd.grad(total, (features_NK, up_VK)), wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_pieces_change_float32_by_rounding_alone() -> None:
    head, last_ND, features_NK, up_VK = inputs(torch.float32)
    found = []
    for chunk in (2 * V, 10**6):
        total = loss(scoring.scores(head, last_ND, features_NK, up_VK, TOKENS.target_N, chunk), False)
        found.append((total, *torch.autograd.grad(total, (features_NK, up_VK))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_without_a_vector_the_loss_is_log_2_and_the_distance_0() -> None:
    head, last_ND, features_NK, up_VK = inputs(torch.float32)
    scores = scoring.scores(head, last_ND, features_NK, torch.zeros_like(up_VK), TOKENS.target_N)
    margin_P = pair_losses.compare(scores.log_prob_N, scores.reference_N, TOKENS, BETA).margin_P
    losses_P = pair_losses.loss(margin_P, BETA)
    assert losses_P.tolist() == pytest.approx([math.log(2)] * 2, abs=1e-7)
    assert not margin_P.any() and not scores.kl_N.any() and not scores.square_N.any()


class _Peak(TorchDispatchMode):
    """Counts the bytes of tensors that are made and not yet let go."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs or {})) if isinstance(t, Tensor)}
        for tensor in tree_iter(out):
            if isinstance(tensor, Tensor) and (at := tensor.untyped_storage().data_ptr()) not in given | self._known:
                self._take(tensor.untyped_storage(), at)
        return out

    def _take(self, storage: Any, at: int) -> None:
        size = storage.nbytes()
        self.now += size
        self.most = max(self.most, self.now)
        self._known.add(at)

        def let_go() -> None:
            self.now -= size
            self._known.discard(at)

        weakref.finalize(storage, let_go)


@pytest.mark.parametrize("num", [64, 512])
def test_memory_is_that_of_a_piece_whatever_the_batch(num: int) -> None:
    """Forward and backward of 64 and of 512 tokens hold no more than the gradients and a few pieces of 16 tokens."""
    vocabulary, width, chunk = 4000, 8, 16 * 4000
    head = nn.Linear(width, vocabulary, bias=False).requires_grad_(False)
    last_ND, up_VK = torch.randn(num, width), torch.zeros(vocabulary, width, requires_grad=True)
    tokens = Predicted(torch.arange(2).repeat_interleave(num // 2), torch.zeros(num), torch.randint(0, vocabulary, (num,)))
    with _Peak() as peak:
        scores = scoring.scores(head, last_ND, last_ND, up_VK, tokens.target_N, chunk)
        losses_P = pair_losses.loss(pair_losses.compare(scores.log_prob_N, scores.reference_N, tokens, 0.1).margin_P, 0.1)
        (losses_P.sum() + 0.1 * pair_losses.mean_of_pairs(scores.kl_N + scores.square_N, tokens).sum()).backward()
    whole, piece = 4 * num * vocabulary, 4 * chunk
    assert peak.most < 8 * piece + 3 * up_VK.nbytes + 200 * num
    assert peak.most > 2 * piece, "the measurement sees the pieces"
    assert num < 512 or peak.most < whole / 2


@pytest.fixture
def batch(encoder: Encoder) -> Batch:
    rows = encode_data(encoder, tiny.rows("preferences/train", 4), "preference", 64).rows
    return collate(rows, encoder.pad_id, loss_on="response")


@pytest.mark.parametrize("layer", [None, 1, 3])
def test_the_states_are_those_that_transformers_returns(layer: int | None, tiny_model: PreTrainedModel, batch: Batch) -> None:
    from steerlab import patches

    with torch.no_grad():
        out = tiny_model(**batch.model_inputs, output_hidden_states=True)
    tokens = scoring.predicted(batch)
    patches.attach(tiny_model, [])
    reader = scoring.StateReader(tiny_model, layer)
    states = reader(batch, tokens)
    reader.close()
    assert not tiny_model.lm_head._forward_pre_hooks
    mask_BT = batch.labels[:, 1:] >= 0
    assert torch.equal(states.last_ND, out.hidden_states[-1][:, :-1][mask_BT])
    assert torch.equal(tokens.target_N, batch.input_ids[:, 1:][mask_BT])
    if layer is None:
        assert states.tapped_ND is states.last_ND
    elif layer < 3:  # of the last layer transformers returns what the norm makes of it
        assert torch.equal(states.tapped_ND, out.hidden_states[layer + 1][:, :-1][mask_BT])
    else:
        normed = tiny_model.get_submodule("model.norm")(states.tapped_ND)
        torch.testing.assert_close(normed, states.last_ND)
