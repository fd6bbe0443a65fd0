"""Losses of IAV and its baselines against naive re-derivations of the originals: loops over tokens, in plain Python.

Nothing of the platform's mathematics is used on the side of the reference: it reads logits of whole forward passes and applies
the published formulas, pair by pair and token by token.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from steerlab import models
from steerlab.data.worlds import tiny
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Batch, Pair, collate
from steerlab.methods import dpo, iav, simpo
from steerlab.methods.contract import Inputs, trained_parameters
from steerlab.steered.language import SteeredModel

PAIRS = tiny.rows("preferences/train", 4)
Tokens = list[tuple[list[int], list[bool]]]
"""Of each sequence (chosen, rejected, chosen, ...): its ids, and which tokens belong to the response."""


@pytest.fixture
def rows(encoder: Encoder) -> list[Any]:
    return encode_data(encoder, PAIRS, "preference", 64).rows


@pytest.fixture
def batch(rows: list[Any], encoder: Encoder) -> Batch:
    return collate(rows, encoder.pad_id, loss_on="response", numbers=range(4))


def sequences(rows: list[Pair]) -> Tokens:
    return [(list(one.input_ids), list(one.in_response)) for pair in rows for one in pair.sequences]


def logits(model: Any, ids: list[int], **how: Any) -> list[list[float]]:
    """Logits after every token of one row, which is alone in its pass and has no padding."""
    ids_1T = torch.tensor([ids])
    with torch.no_grad():
        return model(ids_1T, **how).logits[0].double().tolist()


def log_softmax(values: list[float]) -> list[float]:
    top = max(values)
    total = top + math.log(sum(math.exp(value - top) for value in values))
    return [value - total for value in values]


def log_likelihoods(model: Any, ids: list[int], chosen: list[bool], **how: Any) -> list[float]:
    """Log-probability of each chosen token given those before it."""
    after = logits(model, ids, **how)
    return [log_softmax(after[t - 1])[ids[t]] for t in range(1, len(ids)) if chosen[t]]


def loss_of(margin: float) -> float:
    """-log sigmoid(margin)."""
    return math.log(1 + math.exp(-margin))


def moved(module: Any, scale: float = 0.02) -> Any:
    """The trainee away from its start, where every margin is 0."""
    generator = torch.Generator().manual_seed(1)
    for parameter in trained_parameters(module).values():
        parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return module.eval()


def roles(ids: list[int]) -> dict[str, Any]:
    return {"roles": torch.zeros(1, len(ids), dtype=torch.long)}


def test_dpo_is_the_published_loss(tiny_model: PreTrainedModel, rows: list[Any], batch: Batch) -> None:
    """Rafailov et al., eq. 7, with a second copy of the model as the reference."""
    reference = copy.deepcopy(tiny_model)
    module = moved(dpo.Dpo(tiny_model, dpo.Config(beta=0.3), Inputs()))
    ratios = []
    for ids, chosen in sequences(rows):
        policy = log_likelihoods(module.model, ids, chosen, **roles(ids))
        ratios.append(sum(policy) - sum(log_likelihoods(reference, ids, chosen)))
    expected = sum(loss_of(0.3 * (ratios[i] - ratios[i + 1])) for i in range(0, len(ratios), 2))
    assert module(batch).total.item() == pytest.approx(expected, rel=1e-4)


def iav_module(model: PreTrainedModel, **fields: Any) -> Any:
    torch.manual_seed(0)
    return moved(iav.Iav(model, iav.Config.model_validate(fields), Inputs()))


def test_iav_is_dpo_whose_reference_is_the_model_without_its_vector(
    tiny_model: PreTrainedModel, rows: list[Any], batch: Batch
) -> None:
    """The exact loss: both log-likelihoods from models of their own, plus KL(policy || base) and the squared norm."""
    base = copy.deepcopy(tiny_model)
    module = iav_module(tiny_model, beta=0.2, lambda_kl=0.3, lambda_l2=0.05)
    up_VD = module.patch.up.detach().double()
    expected = 0.0
    for pair in range(len(rows)):
        ratios, kl, square, count = [], 0.0, 0.0, 0
        for ids, chosen in sequences(rows)[2 * pair : 2 * pair + 2]:
            with torch.no_grad():
                states = base.model(torch.tensor([ids])).last_hidden_state[0].double()
            before = logits(base, ids)
            ratio = 0.0
            for t in range(1, len(ids)):
                if not chosen[t]:
                    continue
                vector = (up_VD @ states[t - 1]).tolist()
                q = log_softmax(before[t - 1])
                p = log_softmax([z + a for z, a in zip(before[t - 1], vector, strict=True)])
                ratio += p[ids[t]] - q[ids[t]]
                kl += sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True))
                square += sum(a * a for a in vector)
                count += 1
            ratios.append(ratio)
        expected += loss_of(0.2 * (ratios[0] - ratios[1])) + 0.3 * kl / count + 0.05 * square / count
    assert module(batch).total.item() == pytest.approx(expected, rel=1e-4)


def test_the_seeds_preference_loss_on_response_tokens(tiny_dir: Path, rows: list[Any], batch: Batch) -> None:
    """-log sigmoid(beta [mean log pi(y_w) - mean log pi(y_l)]), with `reference_free` and `length_average`."""
    settings = {"beta": 0.4, "lambda_kl": 0, "lambda_l2": 0, "length_average": True}
    module, other = (iav_module(models.load_model(tiny_dir, seed=0), **settings, reference_free=free) for free in (True, False))
    means = []
    for ids, chosen in sequences(rows):
        found = log_likelihoods(module.model, ids, chosen, **roles(ids))
        means.append(sum(found) / len(found))
    expected = sum(loss_of(0.4 * (means[i] - means[i + 1])) for i in range(0, len(means), 2))
    assert module(batch).total.item() == pytest.approx(expected, rel=1e-4)
    assert other(batch).total.item() != pytest.approx(expected, rel=1e-3), "the reference makes a difference"


@pytest.mark.parametrize("gamma", [0.0, 1.4])
def test_simpo_is_the_published_loss(gamma: float, tiny_model: PreTrainedModel, rows: list[Any], batch: Batch) -> None:
    """Meng et al., eq. 6: means of log-likelihoods, a margin, no reference."""
    module = moved(simpo.Simpo(tiny_model, simpo.Config(beta=2.0, gamma=gamma), Inputs()))
    rewards = []
    for ids, chosen in sequences(rows):
        found = log_likelihoods(module.model, ids, chosen, **roles(ids))
        rewards.append(2.0 / len(found) * sum(found))
    expected = sum(loss_of(rewards[i] - rewards[i + 1] - gamma) for i in range(0, len(rewards), 2))
    assert module(batch).total.item() == pytest.approx(expected, rel=1e-4)


def test_decoding_is_the_originals_loop_with_its_faults_mended(tiny_dir: Path, encoder: Encoder) -> None:
    """z = W h + alpha W_align h at every token, greedily, by whole passes: what its uncached loop computes for one row."""
    base, fresh = (models.load_model(tiny_dir, seed=0) for _ in range(2))
    module = iav_module(models.load_model(tiny_dir, seed=0))
    patch = module.finished(module.patch.state_dict())
    steered = SteeredModel(fresh, encoder, (patch,))
    prompt = encoder.conversation(str(PAIRS[0]["prompt"]))
    for alpha, (output,) in zip((0.0, 1.5), steered.generate([prompt], max_new_tokens=6, strengths=(0.0, 1.5)), strict=True):
        ids = list(encoder.encode(prompt, continued=True).input_ids)
        start = len(ids)
        for _ in range(output.num_tokens):
            with torch.no_grad():
                h = base.model(torch.tensor([ids])).last_hidden_state[0, -1]
                ids.append(int((base.lm_head(h) + alpha * (patch.up @ h)).argmax()))
        assert encoder.decode(ids[start:]) == output.text
