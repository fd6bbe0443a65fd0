"""The baselines of IAV that train low-rank adapters, or a second model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, PreTrainedModel

from steerlab import models, patches
from steerlab.data.worlds import tiny
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Batch, collate
from steerlab.methods import dpo, genarm
from steerlab.methods.contract import Inputs, trained_parameters
from steerlab.methods.math.lora import Lora, num_trained
from steerlab.patches import CannotFold, SecondModelPatch, WeightPatch
from steerlab.steered.language import SteeredModel

PAIRS = tiny.rows("preferences/train", 12)
LORA = {"rank": 3, "alpha": 6, "layer_type": ["attn_q", "attn_v", "ffn_down"]}


@pytest.fixture
def batch(encoder: Encoder) -> Batch:
    rows = encode_data(encoder, PAIRS, "preference", 64).rows
    return collate(rows, encoder.pad_id, loss_on="response")


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=256, n_positions=128)
    return AutoModelForCausalLM.from_config(config).eval()


def made(method: Any, model: PreTrainedModel, **settings: Any) -> Any:
    torch.manual_seed(0)
    return (dpo.Dpo if method is dpo else genarm.Genarm)(model, method.Config.model_validate(settings), Inputs()).train()


def train(module: torch.nn.Module, batch: Batch, steps: int = 4, lr: float = 3e-2) -> list[float]:
    optimizer = torch.optim.Adam(trained_parameters(module).values(), lr=lr)
    losses = []
    for _ in range(steps):
        loss = module(batch).total
        losses.append(float(loss.detach()) / (len(batch.labels) / 2))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def finished(module: Any, tmp_path: Path) -> Any:
    """Return the patch as it is after saving and loading."""
    patches.save(module.finished(module.patch.state_dict()), tmp_path / "patch", "")
    return patches.load(tmp_path / "patch")


# --- adapters ----------------------------------------------------------------------------------------------------------


def test_adapters_are_all_that_trains_and_the_loss_starts_at_log_2(tiny_model: PreTrainedModel, batch: Batch) -> None:
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    num = num_trained(tiny_model, Lora.model_validate(LORA))
    module = made(dpo, tiny_model, lora=LORA)
    assert sum(p.numel() for p in trained_parameters(module).values()) == num
    losses = train(module, batch)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    assert losses[-1] < losses[0] - 0.05
    after = {name.replace(".base_layer.", "."): value for name, value in tiny_model.state_dict().items() if "lora_" not in name}
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_patch_of_adapters_is_the_model_that_they_were_trained_in(
    family: str, tiny_dir: Path, encoder: Encoder, batch: Batch, tmp_path: Path
) -> None:
    """Also of a fused layer that stores its weight the other way round; and it is W + alpha / rank B A, multiplied by hand."""

    def fresh() -> PreTrainedModel:
        return models.load_model(tiny_dir, seed=0) if family == "llama" else gpt2()

    lora = {**LORA, "layer_type": ["attn_q", "attn_k", "attn_v", "ffn_down"]}
    module = made(dpo, fresh(), lora=lora)
    train(module, batch)
    module.eval()
    with torch.no_grad():
        expected = module.model(**batch.patched_inputs).logits
    patch = finished(module, tmp_path)
    assert isinstance(patch, WeightPatch) and patch.rank == 3
    plain = fresh()
    with torch.no_grad():
        base = plain(**batch.model_inputs).logits
    assert (expected - base).abs().max() > 1e-2
    steered = SteeredModel(plain, encoder, (patch,))
    torch.testing.assert_close(steered.logits(batch, 1.0), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(steered.logits(batch, 0.0), base)
    steered.detach()
    patch.fold(plain, 1.0)
    with torch.no_grad():
        torch.testing.assert_close(plain(**batch.model_inputs).logits, expected, rtol=1e-4, atol=1e-5)

    name = module.patch.names[0]
    state = module.patch.state_dict()
    by_hand = torch.zeros(models.linear_shape(plain.get_submodule(name)))
    for r in range(3):
        by_hand += 6 / 3 * torch.outer(state["ups.0"][:, r], state["downs.0"][r])
    difference = models.linear_weight(plain.get_submodule(name)) - models.linear_weight(fresh().get_submodule(name))
    torch.testing.assert_close(difference, by_hand, rtol=1e-4, atol=1e-6)


def test_adapters_of_a_bfloat16_model_train_and_are_kept_in_float32(tiny_dir: Path, batch: Batch, tmp_path: Path) -> None:
    module = made(dpo, models.load_model(tiny_dir, dtype="bfloat16", seed=0), lora=LORA)
    assert {p.dtype for p in trained_parameters(module).values()} == {torch.float32}
    assert {p.dtype for p in module.parameters() if not p.requires_grad} == {torch.bfloat16}
    # Steps far below the resolution of bfloat16 add up.
    start = [p.detach().clone() for p in module.patch.downs]
    losses = train(module, batch, steps=4, lr=1e-5)
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6)
    moved = torch.cat([(p.detach() - s).flatten() for p, s in zip(module.patch.downs, start, strict=True)])
    assert (moved != 0).float().mean() > 0.9
    patch = finished(module, tmp_path)
    assert {p.dtype for p in patch.parameters()} == {torch.float32}


def test_a_type_of_layer_that_the_model_lacks_is_named() -> None:
    with pytest.raises(ValueError, match="ffn_gate: GPT2LMHeadModel has no such linear layers; it has attn_q"):
        made(dpo, gpt2(), lora={"layer_type": ["ffn_gate"]})


# --- a second model ----------------------------------------------------------------------------------------------------


@pytest.fixture
def patch(tiny_dir: Path) -> SecondModelPatch:
    """A reward model that is another model than the base."""
    return SecondModelPatch.of(models.load_model(tiny_dir, seed=1)).eval()


def test_the_logits_are_those_of_the_base_and_alpha_log_probabilities(
    tiny_model: PreTrainedModel, patch: SecondModelPatch, encoder: Encoder, batch: Batch
) -> None:
    with torch.no_grad():
        base = tiny_model(**batch.model_inputs).logits
        second = patch.second(**batch.model_inputs).logits
    steered = SteeredModel(tiny_model, encoder, (patch,))
    for alpha in (0.5, 1.0, 3.0):
        expected = base + alpha * second.log_softmax(-1)
        torch.testing.assert_close(steered.logits(batch, alpha), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(steered.logits(batch, 0.0), base)
    with pytest.raises(CannotFold, match="second model"):
        patch.fold(tiny_model, 1.0)


def test_decoding_with_both_caches_is_decoding_without(
    tiny_model: PreTrainedModel, patch: SecondModelPatch, encoder: Encoder
) -> None:
    """Prompts of several lengths in one padded batch, a strength for each row, against whole passes one by one."""
    steered = SteeredModel(tiny_model, encoder, (patch,))
    rows = [tiny.rows("instructions/train", 4)[i] for i in range(4)]
    prompts = [encoder.conversation(row["instruction"], row["input"] * (1 + i)) for i, row in enumerate(rows)]
    strengths = (0.0, 0.7, 2.0)
    found = steered.generate(prompts, max_new_tokens=8, strengths=strengths)
    for strength, row in zip(strengths, found, strict=True):
        for prompt, generation in zip(prompts, row, strict=True):
            encoded = encoder.encode(prompt)
            ids = list(encoded.input_ids)
            for _ in range(generation.num_tokens):
                inputs = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.long)}
                with torch.no_grad():
                    own = tiny_model(**inputs, strengths=torch.zeros(1)).logits[0, -1]
                    added = patch.second(**inputs).logits[0, -1].log_softmax(-1)
                ids.append(int((own + strength * added).argmax()))
            assert encoder.decode(ids[len(encoded.input_ids) :]) == generation.text


def test_training_the_reward_model_leaves_the_base_alone_and_saves_what_it_trained(
    tiny_dir: Path, encoder: Encoder, batch: Batch, tmp_path: Path
) -> None:
    base = models.load_model(tiny_dir, seed=0)
    for number, settings in enumerate(({}, {"num_layers": 2}, {"lora": LORA})):
        model = models.load_model(tiny_dir, seed=0)
        module = made(genarm, model, **settings)
        losses = train(module, batch)
        assert losses[-1] < losses[0] - 0.05
        assert models.fingerprint(model) == models.fingerprint(base)
        patch = finished(module, tmp_path / str(number))
        module.eval()
        with torch.no_grad():
            expected = module.second(**batch.model_inputs).logits
            torch.testing.assert_close(patch.second(**batch.model_inputs).logits, expected, rtol=1e-4, atol=1e-5)
        assert len(models.layer_names(patch.second)) == settings.get("num_layers", 4)
        num, _ = genarm.Genarm.size(module.config, base)
        assert num == sum(p.numel() for p in trained_parameters(module).values())


def test_what_is_saved_of_a_second_model_names_no_folder_of_this_machine(tiny_dir: Path) -> None:
    model = models.load_model(tiny_dir, seed=0)
    assert str(tiny_dir) not in json.dumps(models.config_of(model))


def test_the_loss_is_that_of_summed_log_likelihoods(tiny_model: PreTrainedModel, batch: Batch) -> None:
    module = made(genarm, tiny_model, beta=0.3).eval()
    with torch.no_grad():
        total = float(module(batch).total)
        logits = tiny_model(**batch.model_inputs, strengths=torch.zeros(len(batch.labels))).logits
    expected = 0.0
    for pair in range(len(batch.labels) // 2):
        rewards = []
        for row in (2 * pair, 2 * pair + 1):
            rewards.append(0.0)
            for t in range(1, batch.labels.shape[1]):
                if batch.labels[row, t] >= 0:
                    rewards[-1] += float(logits[row, t - 1].double().log_softmax(-1)[batch.labels[row, t]])
        expected += math.log(1 + math.exp(-0.3 * (rewards[0] - rewards[1])))
    assert total == pytest.approx(expected, rel=1e-5)


def test_a_shorter_model_computes_what_the_whole_one_computes_at_its_last_layer(tiny_model: PreTrainedModel) -> None:
    short = models.first_layers(tiny_model, 2)
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        states = tiny_model(ids, output_hidden_states=True).hidden_states
        expected = models.head(tiny_model)(tiny_model.model.norm(states[2]))
        torch.testing.assert_close(short(ids).logits, expected)
    with pytest.raises(ValueError, match="4 layers: LlamaForCausalLM has 4"):
        models.first_layers(tiny_model, 4)


def test_another_vocabulary_is_refused(patch: SecondModelPatch, encoder: Encoder) -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel has 256"):
        SteeredModel(gpt2(), encoder, (patch,))
