"""Generation against plain `generate` of transformers: python tests/benchmarks/generation.py [--write]

A Llama of random weights, one thread. Both sides take turns; a line is the ratio of new tokens for each second of CPU,
SteeredModel / transformers, of each turn: median and range. Transformers runs without patches, in one batch of all prompts or
in batches of 32 in the order of the prompts, whichever was faster in the turn before the first, which is not counted.

one length    prompts of 64 tokens, 32 new ones each, greedily
mixed         prompts of 8 to 128 tokens, sampled; one token in 32 ends a text: 32 tokens in the mean, 96 at most
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, GPT2Config, LlamaConfig, LlamaForCausalLM

from steerlab import models
from steerlab.data.worlds import tiny_checkpoint
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import Conversation
from steerlab.patches import ActivationPatch, EmbeddingPatch, LogitPatch, RewardPatch, SecondModelPatch, WeightPatch
from steerlab.steered.language import SteeredModel

ROWS = 64
BATCH = 32
VOCABULARY = 8192
RESULT = Path(__file__).parent / "results" / "generation.json"


def config(layers: int = 6) -> LlamaConfig:
    """Return the shape of the model: 9.6 M parameters."""
    return LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=768, num_hidden_layers=layers, num_attention_heads=8,
        num_key_value_heads=4, tie_word_embeddings=True, eos_token_id=None, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip


def patches(folder: Path) -> dict[str, Any]:
    """Return a stack of patches of each kind."""
    width, norms = 256, [f"model.layers.{i}.post_attention_layernorm" for i in range(6)]
    up = "model.layers.0.mlp.up_proj.weight"
    reward = GPT2Config(n_layer=2, n_embd=64, n_head=2, n_positions=512, vocab_size=VOCABULARY, num_labels=1, pad_token_id=0)
    AutoModelForSequenceClassification.from_config(reward).save_pretrained(folder)
    return {
        "none": (),
        "embedding": (EmbeddingPatch(width, 1.2),),
        "activation": (ActivationPatch(dict.fromkeys(norms, width)),),
        "logit": (LogitPatch(width, VOCABULARY, "low_rank", 16),),
        "weight": (WeightPatch({up: [768, width]}),),
        "second model": (SecondModelPatch(models.config_of(LlamaForCausalLM(config(layers=2)))),),
        "reward": (RewardPatch(str(folder), None, 1.0, 8),),
    }


def prompts(encoder: Encoder, sizes: list[int]) -> list[Conversation]:
    """Return prompts of so many tokens."""
    words = random.Random(0).choices(["cow", "mouse", "duck", "horse", "lamp", "list"], k=200)
    # What the prompt format adds is the same for all.
    added = len(next(encoder.encode_all([encoder.conversation(words[0], "")], continued=True))) - 1
    return [encoder.conversation(" ".join(words[: max(1, size - added)]), "") for size in sizes]


def of_transformers(model: Any, rows: list[list[int]], size: int, ends: list[int] | None, num: int) -> int:
    """Continue rows in batches; return the number of new tokens."""
    written = 0
    for start in range(0, len(rows), size):
        batch = rows[start : start + size]
        longest = max(map(len, batch))
        ids_BT = torch.tensor([[0] * (longest - len(row)) + row for row in batch])
        mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch])
        sampled = {} if ends is None else {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        out_BT = model.generate(
            input_ids=ids_BT, attention_mask=mask_BT, max_new_tokens=num, eos_token_id=ends, pad_token_id=0,
            **(sampled or {"do_sample": False}),
        )[:, longest:]  # fmt: skip
        for row in out_BT.tolist():
            end = next((i for i, token in enumerate(row) if ends and token in ends), len(row) - 1)
            written += end + 1
    return written


def rate(run: Callable[[], int]) -> float:
    """Return the tokens for each second of CPU of a run."""
    # CPU time: what else runs on the machine slows both sides, and not evenly.
    start_s = time.process_time()
    return run() / (time.process_time() - start_s)


def main() -> None:
    """Print the table, and write it with `--write`."""
    options = argparse.ArgumentParser()
    options.add_argument("--write", action="store_true")
    options.add_argument("--turns", type=int, default=3)
    options.add_argument("--kinds", nargs="*")
    asked = options.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny_checkpoint.write_model(folder / "tiny")
        encoder = Encoder(models.load_tokenizer(folder / "tiny"), prompt_style="plain")
        model: Any = LlamaForCausalLM(config()).eval()
        draw = random.Random(1)
        ends = list(range(3, VOCABULARY, 32))
        cases: dict[str, tuple[list[int], list[int] | None, int]] = {
            "one length": ([64] * ROWS, None, 32),
            "mixed": ([draw.randrange(8, 129) for _ in range(ROWS)], ends, 96),
        }
        for kind, stack in patches(folder / "reward").items():
            if asked.kinds and kind not in asked.kinds:
                continue
            for name, (sizes, ended, num) in cases.items():
                found[f"{name}, {kind}"] = ratios(model, encoder, stack, sizes, ended, num, asked.turns)
                numbers = found[f"{name}, {kind}"]["ratio"]
                print(f"{name}, {kind}: {statistics.median(numbers):.2f} ({min(numbers):.2f}-{max(numbers):.2f})", flush=True)
    if asked.write:
        RESULT.write_text(json.dumps({"torch": torch.__version__, "rows": ROWS, "cases": found}, indent=1))


def ratios(
    model: Any, encoder: Encoder, stack: Any, sizes: list[int], ends: list[int] | None, num: int, turns: int
) -> dict[str, list[float]]:
    """Return the rates of both sides and their ratio, turn by turn."""
    conversations = prompts(encoder, sizes)
    rows = [list(row.input_ids) for row in encoder.encode_all(conversations, continued=True)]
    model.generation_config.eos_token_id = ends

    def ours() -> int:
        out = steered.generate(conversations, max_new_tokens=num, temperature=0.0 if ends is None else 1.0, seed=turn)
        return sum(one.num_tokens for one in out[0])

    measured: dict[str, list[float]] = {"steerlab": [], "transformers": [], "ratio": []}
    batches = [BATCH, ROWS]
    for turn in range(turns + 1):
        steered = SteeredModel(model, encoder, stack)
        own = rate(ours)
        steered.detach()
        others = {size: rate(lambda size=size: of_transformers(model, rows, size, ends, num)) for size in batches}
        batches = [max(others, key=others.__getitem__)]
        other = others[batches[0]]
        if turn:
            for name, value in zip(measured, (own, other, own / other), strict=True):
                measured[name].append(value)
    return measured


if __name__ == "__main__":
    main()
