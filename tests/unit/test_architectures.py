"""A matrix of architectures: each decodes, scores, reads, folds and steers as plain transformers would, or is refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo

from steerlab import models
from steerlab.generation import SteeredModel
from steerlab.tokens import Encoder

DIFFERENT = ("llama", "gpt2", "opt", "bloom", "falcon/40b", "gemma2", "phi3", "gpt_oss", "mamba", "qwen3_next", "llava")
OTHERS = tuple(
    [
        "afmoe",
        "apertus",
        "arcee",
        "aria_text",
        "bamba",
        "bitnet",
        "biogpt",
        "codegen",
        "cohere",
        "cohere2",
        "ctrl",
        "cwm",
        "deepseek_v2",
        "deepseek_v3",
        "diffllama",
        "doge",
        "ernie4_5",
        "ernie4_5_moe",
        "exaone4",
        "falcon",
        "falcon/rw",
        "falcon_h1",
        "falcon_mamba",
        "flex_olmo",
        "gemma",
        "gemma3",
        "gemma3_text",
        "glm",
        "glm4",
        "glm4_moe",
        "gpt_bigcode",
        "gpt_bigcode/heads",
        "gpt_neo",
        "gpt_neox",
        "gpt_neox_japanese",
        "gptj",
        "granite",
        "granitemoe",
        "granitemoehybrid",
        "granitemoeshared",
        "helium",
        "hunyuan_v1_dense",
        "hunyuan_v1_moe",
        "jais2",
        "jamba",
        "jetmoe",
        "lfm2",
        "lfm2_moe",
        "llama4_text",
        "mamba2",
        "minicpm3",
        "minimax",
        "minimax_m2",
        "ministral",
        "mistral",
        "mixtral",
        "modernbert-decoder",
        "mpt",
        "nanochat",
        "nemotron",
        "nemotron_h",
        "olmo",
        "olmo2",
        "olmo3",
        "olmo_hybrid",
        "olmoe",
        "openai-gpt",
        "persimmon",
        "phi",
        "phimoe",
        "qwen2",
        "qwen2_moe",
        "qwen2_vl",
        "qwen3",
        "qwen3_5_text",
        "qwen3_moe",
        "recurrent_gemma",
        "rwkv",
        "seed_oss",
        "smollm3",
        "solar_open",
        "stablelm",
        "starcoder2",
        "vaultgemma",
        "xglm",
        "youtu",
        "zaya",
        "mistral3",
    ]
)
TEXTS = ("give the topic", "say red and give the topic of lamp lamp", "lamp")
NEW_TOKENS = 6


@pytest.fixture
def made(request: pytest.FixtureRequest, tiny_dir: Path, tmp_path: Path) -> tuple[Any, Path]:
    """A tiny model of the architecture that the test names, as transformers made it, and the folder that it was saved in."""
    return zoo.write(request.param, tmp_path, tiny_dir), tmp_path


def plain_continuation(model: Any, ids: Sequence[int]) -> list[int]:
    """Continue one row, without padding, as transformers does, and without a cache: the two must be one."""
    row = torch.tensor([list(ids)])
    own = model.generate(row, attention_mask=torch.ones_like(row), do_sample=False, max_new_tokens=NEW_TOKENS)
    found = own[0, row.shape[1] :].tolist()
    eos = model.generation_config.eos_token_id
    return [token for number, token in enumerate(found) if eos not in found[:number]]


@torch.no_grad()
def check(plain: Any, directory: Path) -> dict[str, str]:
    """Compare steerlab's model of a checkpoint with transformers' own; return what folds."""
    models.check_checkpoint(directory, "eager")
    steered = SteeredModel(models.load_model(directory), Encoder(models.load_tokenizer(directory), prompt_style="plain"))
    encoder = steered.encoder
    prompts = [encoder.conversation(text, "red") for text in TEXTS]
    rows = [encoder.encode(prompt).input_ids for prompt in prompts]
    assert len({len(row) for row in rows}) == len(rows), "rows of different lengths, so that a batch is padded"
    expected = [plain_continuation(plain, row) for row in rows]
    found = steered.generate(prompts, max_new_tokens=NEW_TOKENS)[0]
    assert [one.text for one in found] == [encoder.decode(ids) for ids in expected]
    assert [one.num_tokens for one in found] == [len(ids) for ids in expected]

    logits = [plain(input_ids=torch.tensor([row])).logits[0].float() for row in rows]
    for row, scored, logits_TV in zip(rows, steered.token_log_probs(prompts), logits, strict=True):
        own = logits_TV.log_softmax(-1)[:-1].gather(-1, torch.tensor(row[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(scored.log_prob), own, atol=2e-3, rtol=1e-3)
    return {}


@pytest.mark.parametrize("made", DIFFERENT, indirect=True)
def test_a_model_is_what_transformers_makes_of_it(made: tuple[Any, Path]) -> None:
    check(*made)


@pytest.mark.slow
@pytest.mark.parametrize("made", OTHERS, indirect=True)
def test_every_other_model_is_too(made: tuple[Any, Path]) -> None:
    check(*made)
