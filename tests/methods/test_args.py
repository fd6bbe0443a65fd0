"""ARGS against a naive search: whole passes of both models for every token and every candidate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, GPT2Config, MistralConfig, PreTrainedModel

from steerlab import job, models, patches
from steerlab.data.worlds import tiny
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Conversation, collate
from steerlab.job import Job
from steerlab.methods import args
from steerlab.patches import ActivationPatch, CannotFold, RewardPatch
from steerlab.stages import JobType, Plan
from steerlab.steered.language import SteeredModel
from steerlab.steered.sampling import Sampling, choose, uniforms

K, W = 4, 30.0
"""Few candidates, and a weight that makes the rewards of a random model decide."""


def classifier(config: Any, num_labels: int = 1) -> Any:
    torch.manual_seed(7)
    config.num_labels, config.pad_token_id = num_labels, 0
    return AutoModelForSequenceClassification.from_config(config).eval()


@pytest.fixture(scope="session")
def reward_dir(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reward model of the tiny world's vocabulary, of another architecture than the model."""
    directory = tmp_path_factory.mktemp("reward")
    base = models.load_model(tiny_dir, seed=0)
    config = GPT2Config(
        n_layer=2, n_embd=16, n_head=2, n_positions=128, vocab_size=base.config.vocab_size, bos_token_id=1, eos_token_id=1
    )
    classifier(config).save_pretrained(directory)
    models.load_tokenizer(tiny_dir).save_pretrained(directory)
    return directory


@pytest.fixture
def steered(tiny_model: PreTrainedModel, encoder: Encoder, reward_dir: Path) -> SteeredModel:
    return SteeredModel(tiny_model, encoder, (RewardPatch(str(reward_dir), None, W, K),))


def plain(tiny_dir: Path) -> PreTrainedModel:
    return models.load_model(tiny_dir, seed=0)


def naive_scores(model: PreTrainedModel, reward: Any, ids: list[int], alpha: float) -> torch.Tensor:
    """Scores of all tokens after a text: -inf for those that are no candidates."""
    with torch.no_grad():
        logits_V = model(torch.tensor([ids])).logits[0, -1]
        if alpha == 0:
            return logits_V
        scores_V = torch.full_like(logits_V, -torch.inf)
        for token in logits_V.argsort(descending=True)[:K].tolist():
            scores_V[token] = logits_V[token] + alpha * W * reward(torch.tensor([[*ids, token]]))
    return scores_V


def of_model(directory: Path) -> Any:
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    return lambda ids: float(model(ids, attention_mask=torch.ones_like(ids)).logits[0, 0])


def prompts(encoder: Encoder) -> list[Conversation]:
    rows = tiny.rows("instructions/train", 3)
    return [encoder.conversation(row["instruction"], row["input"] * (1 + i)) for i, row in enumerate(rows)]


@pytest.mark.parametrize("temperature", [0.0, 1.3], ids=["greedy", "stochastic"])
def test_decoding_is_the_naive_search(
    temperature: float, steered: SteeredModel, encoder: Encoder, tiny_dir: Path, reward_dir: Path
) -> None:
    """Prompts of several lengths in one padded batch, with a strength for each row."""
    asked, strengths, base, reward = prompts(encoder), (0.0, 1.0, 2.0), plain(tiny_dir), of_model(reward_dir)
    found = steered.generate(asked, max_new_tokens=5, temperature=temperature, strengths=strengths)
    drawn, differ = uniforms(range(3), 5, 0), 0
    for alpha, outputs in zip(strengths, found, strict=True):
        for number, (prompt, output) in enumerate(zip(asked, outputs, strict=True)):
            start = list(encoder.encode(prompt, continued=True).input_ids)
            ids = start.copy()
            for step in range(output.num_tokens):
                scores_1V = naive_scores(base, reward, ids, alpha)[None]
                uniform = drawn[number, step : step + 1] if temperature else None
                ids += choose(scores_1V, None, Sampling(temperature), uniform)[1]
            assert encoder.decode(ids[len(start) :]) == output.text
            differ += output.text != found[0][number].text
    assert differ >= 4, "the rewards decide"


def test_scores_of_complete_rows_are_the_naive_ones(
    steered: SteeredModel, encoder: Encoder, tiny_dir: Path, reward_dir: Path
) -> None:
    rows = encode_data(encoder, tiny.rows("instructions/train", 2), "instruction", 48).rows
    batch = collate(rows, encoder.pad_id, loss_on="response")
    base, reward = plain(tiny_dir), of_model(reward_dir)
    places = [(0, 3), (1, 3), (1, 5)]
    row_N, column_N = (torch.tensor(values) for values in zip(*places, strict=True))
    whole, some = steered.logits(batch, 1.0), steered.logits(batch, 1.0, (row_N, column_N))[0]
    for number, (row, column) in enumerate(places):
        scores_V = naive_scores(base, reward, batch.input_ids[row, : column + 1].tolist(), 1.0)
        kept = scores_V.isfinite()
        for found_V in (whole[row, column], some[number]):
            torch.testing.assert_close(found_V[kept], scores_V[kept], rtol=1e-4, atol=1e-3)
            # The others cannot be drawn, and no sum over the vocabulary becomes NaN.
            assert found_V[~kept].max() < found_V[kept].min() - 1_000 and found_V.isfinite().all()
    with torch.no_grad():
        assert torch.equal(steered.logits(batch, 0.0), base(**batch.model_inputs).logits)


def test_a_head_scores_the_models_own_states(
    tiny_model: PreTrainedModel, encoder: Encoder, tiny_dir: Path, tmp_path: Path
) -> None:
    weight = torch.randn(1, tiny_model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    save_file({"v_head.weight": weight, "v_head.bias": torch.tensor([0.5])}, tmp_path / "head.safetensors")
    config = args.Config(head=str(tmp_path / "head.safetensors"), weight=0.2, candidates=K)
    patch = args.assemble(config, SteeredModel(plain(tiny_dir), encoder))
    patches.save(patch, tmp_path / "patch", "")
    loaded = patches.load(tmp_path / "patch")
    base = plain(tiny_dir)

    def reward(ids: torch.Tensor) -> float:
        return 0.2 / W * float(base.model(ids).last_hidden_state[0, -1] @ weight[0] + 0.5)

    model, (prompt, *_) = SteeredModel(tiny_model, encoder, (loaded,)), prompts(encoder)
    (output,) = model.generate([prompt], max_new_tokens=6)[0]
    start = list(encoder.encode(prompt, continued=True).input_ids)
    ids = start.copy()
    for _ in range(output.num_tokens):
        ids.append(int(naive_scores(base, reward, ids, 1.0).argmax()))
    assert encoder.decode(ids[len(start) :]) == output.text
    with pytest.raises(CannotFold, match="not a weight of the model"):
        loaded.fold(base, 1.0)


def test_more_candidates_than_fit_one_pass_are_scored_in_pieces(
    steered: SteeredModel, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = collate(encode_data(encoder, tiny.rows("instructions/train", 3), "instruction", 48).rows, encoder.pad_id)
    whole = steered.logits(batch, 1.0)
    monkeypatch.setattr(models.language.rewards, "_SIDE_BY_SIDE", 3 * K)
    torch.testing.assert_close(steered.logits(batch, 1.0), whole, rtol=1e-4, atol=1e-4)


def test_a_job_has_a_stage_of_its_own_whose_key_is_that_of_the_content(tmp_path: Path) -> None:
    def planned(name: str, fill: float, **method: Any) -> Plan:
        save_file({"weight": torch.full((1, 128), fill)}, tmp_path / name)
        tree = {"name": "a", "model": {"source": "tiny:model"}, "data": {"prompt_style": "plain"}}
        settings = {"name": "args", "head": str(tmp_path / name), **method}
        return Plan.of(job.validate({**tree, "method": settings}, JobType, tmp_path / "a.yaml"))

    first = planned("a.safetensors", 1.0)
    assert [stage.name for stage in first.stages] == ["assemble"] and first.leaves_patch and first.makes_model
    keys = [first, planned("moved.safetensors", 1.0), planned("a.safetensors", 2.0), planned("a.safetensors", 2.0, weight=2)]
    same, moved, changed, heavier = (plan.stages[0].key for plan in keys)
    assert same == moved and len({same, changed, heavier}) == 3


def test_what_does_not_go_together_is_refused(
    tiny_model: PreTrainedModel, tiny_dir: Path, reward_dir: Path, encoder: Encoder, tmp_path: Path
) -> None:
    facts, any_job = models.facts(tiny_dir), Job.model_construct()

    def refused(match: str, **fields: Any) -> None:
        with pytest.raises(ValueError, match=match):
            args.check(args.Config(**fields), facts, any_job)

    refused("method.reward: this key is required")
    refused(r"method.candidates 999: the model has \d+ tokens", reward=str(reward_dir), candidates=999)
    refused(r"method.reward: .*nowhere.* does not exist", reward=str(tmp_path / "nowhere"))
    vocab = tiny_model.config.vocab_size
    small = {
        "vocab_size": vocab,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    for name, match, config, num_labels in (
        ("two", r"has 2 classes; a reward model has one output", MistralConfig(**small, sliding_window=None), 2),
        ("window", r"full attention in every layer", MistralConfig(**small, sliding_window=8), 1),
        ("few", r"has 20 tokens, the model", MistralConfig(**{**small, "vocab_size": 20}, sliding_window=None), 1),
    ):
        classifier(config, num_labels).save_pretrained(tmp_path / name)
        models.load_tokenizer(tiny_dir).save_pretrained(tmp_path / name)
        refused(match, reward=str(tmp_path / name))
    with pytest.raises(ValueError, match=r"not both"):
        args.Config(reward="a", head="b")

    steered = SteeredModel(tiny_model, encoder)
    other = models.load_tokenizer(tiny_dir)
    other.add_tokens(["more"])
    AutoModelForSequenceClassification.from_pretrained(reward_dir).save_pretrained(tmp_path / "other")
    other.save_pretrained(tmp_path / "other")
    args.assemble(args.Config(reward=str(tmp_path / "other")), steered)  # further tokens are its own affair
    steered.encoder = Encoder(other, prompt_style="plain")
    with pytest.raises(ValueError, match=r"has another tokenizer: 'more' and 0 other tokens"):
        args.assemble(args.Config(reward=str(reward_dir)), steered)
    save_file({"weight": torch.zeros(1, 5)}, tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match=r"holds weight \(1, 5\); it should hold a weight \(1, \d+\)"):
        args.assemble(args.Config(head=str(tmp_path / "narrow.safetensors")), steered)
    below = ActivationPatch({"model.norm": tiny_model.config.hidden_size}, {"modules": "model.norm"})
    steered.detach()
    with pytest.raises(ValueError, match=r"a patch below steers"):
        args.assemble(args.Config(head="x.safetensors"), SteeredModel(tiny_model, encoder, (below,)))
