"""Rows leave and enter a batch while it is continued: their texts are those that each of them has alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification, GPT2Config, LlamaConfig, PreTrainedModel

from steerlab import models
from steerlab.data.worlds import tiny
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Conversation
from steerlab.job import Selection
from steerlab.patches import ActivationPatch, EmbeddingPatch, LogitPatch, RewardPatch, SecondModelPatch, WeightPatch
from steerlab.steered import continuing, generated_text, sampling
from steerlab.steered.generated_text import Generation
from steerlab.steered.language import SteeredModel

NEW = 12
KINDS = ["none", "embedding", "activation", "logit", "weight", "second_model", "reward"]


def randomised(patch: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    for parameter in patch.parameters():
        parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return patch.eval()


def patches_of(kind: str, model: PreTrainedModel, folder: Path) -> tuple[Any, ...]:
    width, vocabulary = model.config.hidden_size, model.config.vocab_size
    if kind == "none":
        return ()
    if kind == "embedding":
        return (EmbeddingPatch(width, 1.2),)
    if kind == "activation":
        # On some tokens only: the mask depends on where a row's prompt ends.
        norm = "model.layers.1.post_attention_layernorm"
        return (randomised(ActivationPatch({norm: width}, Selection(modules=norm, roles=("data", "response")))),)
    if kind == "logit":
        return (randomised(LogitPatch(width, vocabulary, "low_rank", 4)),)
    if kind == "weight":
        name = "model.layers.0.mlp.up_proj.weight"
        return (randomised(WeightPatch({name: list(model.get_parameter(name).shape)})),)
    if kind == "second_model":
        return (randomised(SecondModelPatch(models.config_of(model))),)
    torch.manual_seed(7)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, n_positions=128, vocab_size=vocabulary, bos_token_id=1, eos_token_id=1)
    config.num_labels, config.pad_token_id = 1, 0
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    save_file({"weight": torch.randn(1, 16)}, folder / "head.safetensors")
    return (RewardPatch(str(folder), None, 30.0, 4),)


@pytest.fixture
def steered(request: pytest.FixtureRequest, tiny_model: PreTrainedModel, encoder: Encoder, tmp_path: Path) -> SteeredModel:
    """A model of random weights whose rows end early and late, because many tokens end a text."""
    assert tiny_model.generation_config is not None
    tiny_model.generation_config.eos_token_id = list(range(2, tiny_model.config.vocab_size, 6))
    return SteeredModel(tiny_model, encoder, patches_of(getattr(request, "param", "none"), tiny_model, tmp_path))


@pytest.fixture
def prompts(encoder: Encoder) -> list[Conversation]:
    """Prompts of many lengths."""
    rows = tiny.rows("separation/test", 8)
    long = [encoder.conversation(row["system_prompt_clean"], row["prompt_instructed"]) for row in rows]
    return [*long, *(encoder.conversation(word, "") for word in ("give", "the", "topic", "say"))]


def of_three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(continuing.Capacity, "num_rows", lambda self, decoding, new: 3)
    monkeypatch.setattr(continuing.Capacity, "num_prefilled", lambda self, waiting: min(2, len(waiting)))


def lengths(generations: list[Generation]) -> set[int]:
    return {generation.num_tokens for generation in generations}


@pytest.mark.parametrize("steered", KINDS, indirect=True)
def test_texts_are_those_of_each_row_alone(
    steered: SteeredModel, prompts: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"max_new_tokens": NEW, "repetition_penalty": 1.3}
    how |= {"strengths": (0.0, 0.5)} if steered.patches else {}
    alone = [steered.generate([prompt], **how) for prompt in prompts]
    assert len(lengths([one[0][0] for one in alone])) > 2, "rows that end together would prove nothing"
    for small in (False, True):
        if small:
            of_three_rows(monkeypatch)
        together = steered.generate(prompts, **how)
        assert together == [[one[s][0] for one in alone] for s in range(len(together))]


@pytest.mark.parametrize("steered", ["none", "embedding"], indirect=True)
def test_random_numbers_are_those_of_the_prompt_and_the_seed(
    steered: SteeredModel, prompts: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1}
    whole = {seed: steered.generate(prompts, seed=seed, **how)[0] for seed in (1, 2)}
    assert whole[1] != whole[2]
    of_three_rows(monkeypatch)
    assert {seed: steered.generate(prompts, seed=seed, **how)[0] for seed in (1, 2)} == whole


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma3_text", "mamba", "opt", "bloom"])
def test_caches_of_every_kind(
    name: str, encoder: Encoder, prompts: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Caches that cannot be taken apart (recurrent states), sliding windows, and models that read no padding."""
    fields = {"sliding_window": 8} if name in ("mistral", "gemma3_text") else {}
    model = zoo.model(zoo.config(name, vocab_size=len(encoder.tokenizer), **fields))  # type: ignore[arg-type]
    model.generation_config.eos_token_id = list(range(2, len(encoder.tokenizer), 6))  # type: ignore[arg-type]
    steered = SteeredModel(model, encoder)
    # Sampled: greedy decoding by random weights repeats a token for ever. Each row by itself gives the numbers to compare with.
    how: dict[str, Any] = {"max_new_tokens": NEW, "temperature": 3.0}
    together = continuing.Capacity.num_prefilled
    monkeypatch.setattr(continuing.Capacity, "num_prefilled", lambda self, waiting: 1)
    monkeypatch.setattr(continuing.Capacity, "num_rows", lambda self, decoding, new: 1)
    alone = steered.generate(prompts, **how)[0]
    assert len(lengths(alone)) > 2
    monkeypatch.setattr(continuing.Capacity, "num_prefilled", together)
    assert steered.generate(prompts, **how)[0] == alone
    of_three_rows(monkeypatch)
    assert steered.generate(prompts, **how)[0] == alone


def test_rows_that_have_ended_are_not_computed(steered: SteeredModel, prompts: list[Conversation]) -> None:
    """Two rows go on to the end; all others leave, and cost at most an eighth of the batch."""
    read: list[tuple[int, int]] = []
    steered.model.register_forward_pre_hook(
        lambda _m, _args, kwargs: read.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    generations = steered.generate(prompts, max_new_tokens=NEW)[0]
    steps = [rows for rows, num in read if num == 1]
    needed = sum(generation.num_tokens - 1 for generation in generations)
    assert needed <= sum(steps) <= needed + (len(prompts) // 8) * len(steps) < len(prompts) * (NEW - 1)
    # Padding that only rows needed which have left leaves with them.
    assert steps[-1] < len(prompts)


@pytest.mark.parametrize("steered", KINDS, indirect=True)
def test_a_step_waits_for_the_device_at_most_twice(
    steered: SteeredModel, encoder: Encoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: Counter[str] = Counter()
    for name in ("tolist", "item", "__bool__", "__int__", "__float__", "cpu", "numpy", "nonzero"):
        original = getattr(torch.Tensor, name)

        def counted(self: torch.Tensor, *args: Any, of: Any = original, name: str = name, **kwargs: Any) -> Any:
            waits[name] += 1
            return of(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    steered.model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    monkeypatch.setattr(SteeredModel, "end_ids", set())
    # Fewer than the vocabulary, as with a real one, and enough for the nucleus.
    monkeypatch.setattr(sampling, "_NUCLEUS", 240)
    prompts = [encoder.conversation(text, "") for text in ("give the topic", "say")]
    own: dict[str, Any] = {"strengths": (0.5,)} if steered.patches else {}
    for how in (own, {**own, "temperature": 1.0, "top_p": 0.8, "repetition_penalty": 1.2}):
        found = []
        for num in (4, 24):
            waits.clear()
            steered.generate(prompts, max_new_tokens=num, **how)
            found.append(sum(waits.values()))
        # For the tokens, and in transformers for the padding of the model and of a patch that is one.
        others = steered.patches and steered.patches[0].kind in ("second_model", "reward")
        assert found[1] - found[0] <= (3 if others else 2) * 20, waits


def test_a_stop_text_is_found_across_tokens_without_decoding_everything(
    steered: SteeredModel, prompts: list[Conversation], monkeypatch: pytest.MonkeyPatch
) -> None:
    steered.model.generation_config.eos_token_id = None  # type: ignore[union-attr]
    monkeypatch.setattr(SteeredModel, "end_ids", set())
    monkeypatch.setattr(generated_text, "_BEFORE_STOP", 2)
    how: dict[str, Any] = {"max_new_tokens": 60, "temperature": 1.0}
    whole = steered.generate(prompts[:1], **how)[0][0]
    # The word that first occurs last.
    stop = max(whole.text.split(), key=whole.text.index)
    cut = whole.text.index(stop)
    decoded: list[int] = []
    decode = steered.encoder.decode
    monkeypatch.setattr(steered.encoder, "decode", lambda ids: decoded.append(len(ids)) or decode(ids))
    stopped = steered.generate(prompts[:1], stop=(stop, "zz"), **how)[0][0]
    assert stopped.text == whole.text[:cut] and stopped.finished
    bound = 4 * len(stop) + 2
    assert stopped.num_tokens > bound + 5, "the text is too short to tell"
    # Whole texts are decoded twice: where the tail shows the stop text, and for the result.
    assert sum(num > bound for num in decoded) <= 2


def test_no_new_tokens_are_empty_texts(steered: SteeredModel, prompts: list[Conversation]) -> None:
    assert steered.generate(prompts[:2], max_new_tokens=0) == [[Generation("", 0, False)] * 2]


def test_the_memory_of_keys_and_values_is_measured(encoder: Encoder) -> None:
    config = LlamaConfig(
        vocab_size=len(encoder.tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    steered = SteeredModel(zoo.model(config), encoder)
    row = encoder.encode(encoder.conversation("give the topic", "lamp"))
    waiting = [continuing.Waiting((0, 0), row, 1.0, None, sampling.Sampling(), 7)] * 5
    decoding = steered.read_prompts(waiting)
    per_token = 2 * 3 * 2 * 8 * 4  # keys and values, layers, heads of 8, float32
    assert decoding.num_bytes == 5 * len(row) * per_token
    capacity = continuing.Capacity(batch_tokens=4096, mixes=True)
    of_row = per_token * (len(row) + 7) + 6 * 4 * len(encoder.tokenizer)  # type: ignore[arg-type]
    assert capacity.num_rows(decoding, 7) == 2**30 // of_row
