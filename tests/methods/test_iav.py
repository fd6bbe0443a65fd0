"""IAV and DPO: what training promises, the cache, folding, and how an alpha for each row behaves."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig, PreTrainedModel

from steerlab import models, patches
from steerlab.data.worlds import tiny, tiny_words
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Batch, collate
from steerlab.methods import dpo, iav
from steerlab.methods.contract import Inputs, trained_parameters
from steerlab.methods.preparations import Prepare
from steerlab.patches import ActivationPatch, CannotFold, LogitPatch
from steerlab.steered.language import SteeredModel
from steerlab.storage.tensors import Parts

PAIRS = tiny.rows("preferences/train", 40)
HEADS: list[dict[str, Any]] = [{}, {"head": "low_rank", "rank": 4}, {"head": "mlp", "rank": 6}, {"layer": 1}]
each_head = pytest.mark.parametrize("settings", HEADS, ids=lambda s: "-".join(map(str, s.values())) or "linear")


def batches(encoder: Encoder, size: int = 8, max_tokens: int = 64, pairs: Any = PAIRS) -> list[Batch]:
    found = encode_data(encoder, pairs, "preference", max_tokens)
    return [
        collate(found.rows[i : i + size], encoder.pad_id, loss_on="response", numbers=found.numbers[i : i + size])
        for i in range(0, len(found.rows), size)
    ]


def module(model: PreTrainedModel, prepared: Any = None, **settings: Any) -> iav.Iav:
    torch.manual_seed(0)
    return iav.Iav(model, iav.Config.model_validate(settings), Inputs(prepared=prepared or {})).train()


def train(module: torch.nn.Module, found: list[Batch], lr: float = 1e-2) -> list[float]:
    """Take a step for each batch; return the mean losses."""
    optimizer = torch.optim.Adam(trained_parameters(module).values(), lr=lr)
    losses = []
    for batch in found:
        loss = module(batch).total / (len(batch.labels) / 2)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def accuracy(module: torch.nn.Module, found: list[Batch]) -> float:
    with torch.no_grad():
        return sum(float(module(b).metrics["accuracy"]) for b in found) / sum(len(b.labels) / 2 for b in found)


@each_head
def test_the_estimate_counts_what_trains(settings: dict[str, Any], tiny_model: PreTrainedModel) -> None:
    trained = trained_parameters(module(tiny_model, **settings))
    config = iav.Config.model_validate(settings)
    assert iav.Iav.size(config, tiny_model).trained == sum(p.numel() for p in trained.values())


@each_head
def test_the_loss_at_the_start_is_log_2(settings: dict[str, Any], tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    fresh = module(tiny_model, **settings)
    (batch,) = batches(encoder, 40)
    assert fresh(batch).total.item() == pytest.approx(40 * math.log(2), abs=1e-5)
    assert set(trained_parameters(fresh)) == {f"patch.{name}" for name in fresh.patch.state_dict()}
    metrics = {name: float(value) for name, value in fresh(batch).metrics.items()}
    at_rest = ("margin", "accuracy", "kl", "square", "chosen_reward", "rejected_reward")
    assert {name: metrics[name] for name in at_rest} == dict.fromkeys(at_rest, 0.0)


@each_head
@pytest.mark.parametrize("average", [False, True])
def test_the_loss_is_that_of_the_model_that_generates(
    settings: dict[str, Any], average: bool, tiny_model: PreTrainedModel, encoder: Encoder
) -> None:
    """Against whole logits at alpha 1 and 0, pair by pair."""
    trained = module(tiny_model, length_average=average, beta=0.2, lambda_kl=0.3, lambda_l2=0.02, **settings)
    found = batches(encoder)
    train(trained, found)
    batch, expected = found[0], 0.0
    mask_BT = batch.labels[:, 1:] >= 0
    with torch.no_grad():
        z, base = (tiny_model(**batch.patched_inputs, strengths=torch.full((16,), a)).logits[:, :-1] for a in (1.0, 0.0))
    log_p, log_q = z.log_softmax(-1), base.log_softmax(-1)
    ratio_BT = (log_p - log_q).gather(2, batch.input_ids[:, 1:, None])[..., 0]
    kl_BT, square_BT = (log_p.exp() * (log_p - log_q)).sum(-1), (z - base).square().sum(-1)
    for c in range(0, 16, 2):
        own = [ratio_BT[s][mask_BT[s]] for s in (c, c + 1)]
        chosen, rejected = (x.mean() if average else x.sum() for x in own)
        tokens = mask_BT[c : c + 2]
        distance = 0.3 * kl_BT[c : c + 2][tokens].mean() + 0.02 * square_BT[c : c + 2][tokens].mean()
        expected += float(-torch.log(torch.sigmoid(0.2 * (chosen - rejected))) + distance)
    assert trained(batch).total.item() == pytest.approx(expected, rel=1e-4)


@each_head
def test_held_out_preferences_rise_within_a_few_steps(
    settings: dict[str, Any], tiny_model: PreTrainedModel, encoder: Encoder
) -> None:
    fresh = module(tiny_model, lambda_l2=0.0, **settings)
    held_out = batches(encoder, pairs=tiny.rows("preferences/test", 32))
    losses = train(fresh, 2 * batches(encoder))
    assert losses[-1] < 0.8 * losses[0]
    assert accuracy(fresh, held_out) > 0.9
    assert all(p.grad is None for p in fresh.model.parameters())


def test_the_weights_of_the_loss_do_what_they_say(tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    """More weight on the KL or on the norm leaves less of either; alone they leave nothing to learn."""
    found, results = batches(encoder), {}
    for name, settings in {"plain": {}, "kl": {"lambda_kl": 20.0}, "l2": {"lambda_l2": 1.0}, "beta": {"beta": 0.0}}.items():
        one = module(copy.deepcopy(tiny_model), **{"lambda_kl": 0.0, "lambda_l2": 0.0, **settings})
        train(one, 2 * found)
        results[name] = {key: float(value) for key, value in one(found[0]).metrics.items()}
    assert results["kl"]["kl"] < 0.2 * results["plain"]["kl"]
    assert results["l2"]["square"] < 0.2 * results["plain"]["square"]
    assert results["beta"]["square"] == 0


@each_head
def test_the_cache_gives_the_weights_of_the_uncached_run(
    settings: dict[str, Any], tiny_model: PreTrainedModel, encoder: Encoder, prepared: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several shards and with a pair that was dropped; while it trains, the model does not run."""
    long = {**PAIRS[0], "prompt": "the sky " * 40}
    pairs = [*PAIRS[:5], long, *PAIRS[5:]]
    config = iav.Config.model_validate({"cache": True, "rows_per_shard": 16, "batch_tokens": 100, **settings})
    found = batches(encoder, max_tokens=24, pairs=pairs)
    hidden = prepared(iav.METHOD, config, tiny_model, pairs, max_tokens=24)
    parts = Parts.open(hidden["hidden"])
    assert [facts["rows"] for facts in parts.facts.values()] == [15, 16, 9]
    assert sum(facts["dropped"] for facts in parts.facts.values()) == 1
    plain = module(copy.deepcopy(tiny_model), **settings)
    losses = train(plain, found)
    cached = module(tiny_model, hidden, **{"cache": True, **settings})
    forward = type(tiny_model).forward
    monkeypatch.setattr(type(tiny_model), "forward", lambda *a, **k: pytest.fail("the model ran"))
    assert train(cached, found) == pytest.approx(losses, abs=1e-5)
    monkeypatch.setattr(type(tiny_model), "forward", forward)
    for name, value in cached.patch.state_dict().items():
        torch.testing.assert_close(value, plain.patch.state_dict()[name], atol=1e-5, rtol=1e-5)
    cached.eval()
    foreign = batches(encoder, pairs=tiny.rows("preferences/validation", 8))
    with torch.no_grad():
        assert cached(foreign[0]).total.item() == pytest.approx(plain(foreign[0]).total.item(), abs=1e-4), "rows of no cache"


def test_a_pair_may_be_in_a_step_twice(tiny_model: PreTrainedModel, encoder: Encoder, prepared: Any) -> None:
    """Where one epoch ends and the next begins."""
    hidden = prepared(iav.METHOD, iav.Config(cache=True), tiny_model, PAIRS[:3])
    rows = encode_data(encoder, PAIRS[:3], "preference", 64).rows
    batch = collate([rows[i] for i in (1, 2, 2)], encoder.pad_id, loss_on="response", numbers=[1, 2, 2])
    cached = module(tiny_model, hidden)
    torch.nn.init.normal_(cached.patch.up, std=0.1)
    total = cached(batch).total.item()
    cached.eval()
    assert total == pytest.approx(cached(batch).total.item(), rel=1e-5)


def test_the_cache_keeps_the_models_type_and_refuses_another_model(tiny_dir: Path, prepared: Any) -> None:
    model = models.load_model(tiny_dir, dtype="bfloat16", seed=0)
    hidden = prepared(iav.METHOD, iav.Config(cache=True), model, PAIRS[:3])
    parts = Parts.open(hidden["hidden"])
    assert parts.tensor("2/last").dtype == torch.bfloat16
    before = module(model, hidden)
    with pytest.raises(ValueError, match="computed by another model"):
        module(models.load_model(tiny_dir, seed=1), hidden)
    assert before.patch.up.dtype == torch.float32, "what trains keeps all digits"


@each_head
def test_alpha_0_is_the_base_model_bit_for_bit_and_rows_have_their_own(
    settings: dict[str, Any], tiny_model: PreTrainedModel, encoder: Encoder
) -> None:
    batch = batches(encoder, 2)[0]
    with torch.no_grad():
        base = tiny_model(**batch.model_inputs).logits
    trained = module(tiny_model, **settings)
    train(trained, batches(encoder))
    steered = copy.copy(tiny_model)

    def logits(*alphas: float) -> torch.Tensor:
        with torch.no_grad():
            return steered(**batch.patched_inputs, strengths=torch.tensor(alphas)).logits

    assert torch.equal(logits(0, 0, 0, 0), base)
    mixed = logits(0, 0.5, 1, 2)
    assert torch.equal(mixed[0], base[0])
    for row, alpha in enumerate((0, 0.5, 1, 2)):
        assert torch.equal(mixed[row], logits(*[alpha] * 4)[row])
    assert not torch.allclose(mixed[3], base[3], atol=1e-2)


@each_head
def test_an_alpha_for_each_row_generates_what_separate_runs_do(
    settings: dict[str, Any], tiny_model: PreTrainedModel, encoder: Encoder
) -> None:
    trained = module(copy.deepcopy(tiny_model), **settings)
    train(trained, 2 * batches(encoder))
    steered = SteeredModel(tiny_model, encoder, (trained.patch,))
    prompts = [encoder.conversation(row["prompt"]) for row in PAIRS[:4]]
    together = steered.generate(prompts, max_new_tokens=6, strengths=(0.0, 0.5, 2.0))
    for number, alpha in enumerate((0.0, 0.5, 2.0)):
        assert together[number] == steered.generate(prompts, max_new_tokens=6, strengths=(alpha,))[0]
    steered.detach()
    plain = SteeredModel(tiny_model, encoder).generate(prompts, max_new_tokens=6)[0]
    assert together[0] == plain and together[2] != plain


@pytest.mark.parametrize("settings", HEADS[:2], ids=["linear", "low_rank"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_folded_head_is_the_dual_head_and_loads_in_plain_transformers(
    settings: dict[str, Any], tied: bool, encoder: Encoder, tmp_path: Path
) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=len(tiny_words.VOCABULARY), tie_word_embeddings=tied, **sizes)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    plain, folded = copy.deepcopy(model), copy.deepcopy(model)
    trained = module(model, **settings)
    train(trained, batches(encoder))
    batch = batches(encoder, 2)[0]
    with torch.no_grad():
        dual = model(**batch.patched_inputs, strengths=torch.full((4,), 1.5)).logits
        trained.patch.fold(folded, 1.5)
        torch.testing.assert_close(folded(**batch.model_inputs).logits, dual, atol=1e-5, rtol=1e-5)
        assert torch.equal(folded.get_input_embeddings().weight, plain.get_input_embeddings().weight), "only the head moves"
        folded.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(loaded(**batch.model_inputs).logits, dual, atol=1e-5, rtol=1e-5)
        assert torch.equal(loaded.get_input_embeddings().weight, plain.get_input_embeddings().weight)


@pytest.mark.parametrize("settings", HEADS[2:], ids=["mlp", "layer"])
def test_other_heads_do_not_fold(settings: dict[str, Any], tiny_model: PreTrainedModel) -> None:
    with pytest.raises(CannotFold, match="not a linear function of the input of the language modelling head"):
        module(tiny_model, **settings).patch.fold(tiny_model, 1.0)


def test_the_saved_patch_warns_of_alphas_that_it_is_not_made_for(tiny_dir: Path, encoder: Encoder, tmp_path: Path) -> None:
    patches.save(module(models.load_model(tiny_dir, seed=0), **HEADS[2], layer=1).patch, tmp_path, "")
    loaded = patches.load(tmp_path)
    assert (loaded.head, loaded.rank, loaded.layer, loaded.strength_range) == ("mlp", 6, 1, (0.0, 2.0))
    steered = SteeredModel(models.load_model(tiny_dir, seed=0), encoder, (loaded,))
    with pytest.warns(UserWarning, match=r"strengths \[3.0\] are outside of \[0.0, 2.0\]"):
        steered.check_strengths((1.0, 3.0))


def test_it_stands_on_other_patches_but_not_on_another_vector(tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    """The reference is the model below: a steered one, if it is steered."""
    name = "model.layers.1"
    below = ActivationPatch({name: 128}, {"modules": r"model\.layers\.1"})
    below.maps[0].scale.data *= 1.5
    fresh = iav.Iav(tiny_model, iav.Config(), Inputs(below=(below,)))
    (batch,) = batches(encoder, 40)
    assert fresh(batch).total.item() == pytest.approx(40 * math.log(2), abs=1e-5)
    with pytest.raises(ValueError, match="carries a vector on its logits already"):
        iav.Iav(models.load_model(tiny_model.name_or_path, seed=0), iav.Config(), Inputs(below=(fresh.patch,)))


def test_what_cannot_be_trained_is_refused(tiny_model: PreTrainedModel) -> None:
    for name in ("beta", "lambda_kl", "lambda_l2"):
        with pytest.raises(ValueError, match=f"{name}\n.*greater than or equal to 0"):
            iav.Config.model_validate({name: -0.1})
    with pytest.raises(ValueError, match="layer 4: LlamaForCausalLM has the layers 0 to 3"):
        iav.prepares(iav.Config(layer=4), tiny_model, Prepare())
    with pytest.raises(ValueError, match="has 10 tokens and width 128, the head of LlamaForCausalLM has"):
        patches.attach(tiny_model, [LogitPatch(128, 10)])
    with pytest.raises(ValueError, match="a linear head of rank 3"):
        LogitPatch(128, 10, rank=3)
    capped = Gemma2Config(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
        num_key_value_heads=2, final_logit_softcapping=0.05,
    )  # fmt: skip
    with pytest.raises(ValueError, match="logits of Gemma2ForCausalLM are not the output of its head"):
        module(AutoModelForCausalLM.from_config(capped))


# --- DPO of the whole model ------------------------------------------------------------------------------------------


def whole(model: PreTrainedModel, **settings: Any) -> dpo.Dpo:
    return dpo.Dpo(model, dpo.Config.model_validate(settings), Inputs()).train()


@pytest.mark.parametrize("average", [False, True])
def test_dpo_is_equation_7(average: bool, tiny_dir: Path, encoder: Encoder) -> None:
    policy, reference = models.load_model(tiny_dir, seed=1), models.load_model(tiny_dir, seed=0)
    trainee = whole(models.load_model(tiny_dir, seed=0), beta=0.2, length_average=average)
    trainee.model.load_state_dict(policy.state_dict())
    (batch,) = batches(encoder, 40)
    expected = 0.0
    with torch.no_grad():
        for row in encode_data(encoder, PAIRS, "preference", 64).rows:
            ratios = []
            for sequence in row.sequences:
                ids = torch.tensor([sequence.input_ids])
                chosen = torch.tensor(sequence.in_response[1:])
                logs = [m(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0] for m in (policy, reference)]
                ratio = (logs[0] - logs[1])[chosen]
                ratios.append(float(ratio.mean() if average else ratio.sum()))
            expected += -math.log(1 / (1 + math.exp(-0.2 * (ratios[0] - ratios[1]))))
        assert trainee(batch).total.item() == pytest.approx(expected, rel=1e-5)


def test_dpo_starts_at_log_2_and_learns_the_pairs(tiny_model: PreTrainedModel, encoder: Encoder) -> None:
    trainee, found = whole(tiny_model), batches(encoder)
    start = {name: value.clone() for name, value in trainee.reference.state_dict().items()}
    assert trainee(found[0]).total.item() == pytest.approx(8 * math.log(2), abs=1e-5)
    losses = train(trainee, 2 * found, lr=1e-3)
    assert losses[-1] < 0.5 * losses[0]
    assert accuracy(trainee, batches(encoder, pairs=tiny.rows("preferences/test", 32))) > 0.9
    assert all(torch.equal(value, start[name]) for name, value in trainee.reference.state_dict().items())


def test_dpo_leaves_a_patch_from_the_reference_to_the_policy(
    tiny_model: PreTrainedModel, tiny_dir: Path, encoder: Encoder
) -> None:
    trainee = whole(tiny_model)
    train(trainee, batches(encoder), lr=1e-3)
    patch = trainee.finished(trainee.patch.state_dict())
    batch = batches(encoder, 2)[0]
    base = models.load_model(tiny_dir, seed=0)
    with torch.no_grad():
        before = base(**batch.model_inputs).logits
        patches.attach(base, [patch])
        torch.testing.assert_close(base(**batch.patched_inputs).logits, tiny_model(**batch.patched_inputs).logits)
        assert torch.equal(base(**batch.patched_inputs, strengths=torch.zeros(4)).logits, before)
    with pytest.raises(ValueError, match="weights are patched already"):
        dpo.Dpo(tiny_model, dpo.Config(), Inputs(below=(patch,)))
