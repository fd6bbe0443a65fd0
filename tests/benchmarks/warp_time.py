"""What Safety-WaRP costs a training step, against plain training of the same layers and against its explicit form.

    python tests/benchmarks/warp_time.py [--write]

One Llama block of d = 1024 with q, k, v, up and down trained by Adam, micro-batches of 4 x 256 tokens; then, for one layer, the
symmetric eigendecomposition against a full SVD. Ratios of medians of one run.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from steerlab import models
from steerlab.methods.math import orthonormal, rotation
from steerlab.methods.warp import PAPER_TYPES

D, LAYERS, ROWS, TOKENS, REPEATS = 1024, 2, 4, 256, 5
SIZES = {"hidden_size": D, "intermediate_size": 2752, "num_attention_heads": 16, "num_hidden_layers": LAYERS, "vocab_size": 512}


class Explicit(nn.Module):
    """W~ as the parameter, and a product with the basis in every forward pass (the authors' module)."""

    def __init__(self, linear: nn.Module, frozen_MN: torch.Tensor, vectors_NN: torch.Tensor) -> None:
        super().__init__()
        weight: Any = linear.weight
        self.frozen_MN, self.vectors_NN = frozen_MN, vectors_NN
        self.rotated_MN = nn.Parameter(weight.detach() @ vectors_NN)
        linear.forward = lambda x: nn.functional.linear(x, self.weight())  # type: ignore[method-assign]

    def weight(self) -> torch.Tensor:
        kept_MN = (self.rotated_MN * self.frozen_MN).detach()
        return (kept_MN + self.rotated_MN * ~self.frozen_MN) @ self.vectors_NN.T


class Step:
    """Steps of one kind on a model of its own."""

    def __init__(self, kind: str, basis: dict[int, torch.Tensor]) -> None:
        torch.manual_seed(0)
        self.model = LlamaForCausalLM(LlamaConfig(**SIZES)).requires_grad_(False)  # type: ignore[arg-type]
        places = models.weight_places(self.model, PAPER_TYPES, range(LAYERS))
        outputs = Counter[str]()
        for place in places:
            outputs[place.input_of] += place.shape[0]
        sizes = {place.input_of: place.shape[1] for place in places}
        shared = {name: rotation.SharedInput(basis[size], outputs[name]) for name, size in sizes.items()}
        self.rotated: list[rotation.RotatedLayer] = []
        trained: list[Any] = []
        for place in places:
            linear = self.model.get_submodule(place.module)
            frozen_MN = torch.rand(place.shape) < 0.1
            if kind == "plain":
                trained.append(linear.weight.requires_grad_(True))  # type: ignore[operator]
            elif kind == "explicit":
                trained.append(Explicit(linear, frozen_MN, basis[place.shape[1]]).rotated_MN)
            else:
                self.rotated.append(rotation.RotatedLayer(linear, frozen_MN, shared[place.input_of]))
                trained.append(self.rotated[-1].change_MN)
        self.optimizer = torch.optim.Adam(trained, lr=1e-4)
        self.ids = torch.randint(0, SIZES["vocab_size"], (ROWS, TOKENS))

    def run(self, passes: int) -> float:
        """Take one step and return its seconds."""
        start_s = time.perf_counter()
        for layer in self.rotated:
            layer.start_step()
        for number in range(passes):
            for layer in self.rotated:
                layer.start_pass(number == passes - 1)
            logits = self.model(input_ids=self.ids, use_cache=False).logits
            nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return time.perf_counter() - start_s


def medians(kinds: dict[str, Callable[[], float]]) -> dict[str, float]:
    """Interleave the kinds, so that what else the machine does falls on all of them."""
    found: dict[str, list[float]] = {name: [] for name in kinds}
    for turn in range(REPEATS + 1):
        for name, run in kinds.items():
            seconds = run()
            if turn:  # the first one is warm-up
                found[name].append(seconds)
    return {name: statistics.median(values) for name, values in found.items()}


def timed(work: Callable[[], Any]) -> Callable[[], float]:
    def run() -> float:
        start_s = time.perf_counter()
        work()
        return time.perf_counter() - start_s

    return run


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true", help="keep the numbers under results/")
    write = parser.parse_args().write
    torch.set_num_threads(os.cpu_count() or 1)
    basis = {size: orthonormal.random_basis(size, 0, "benchmark") for size in (D, SIZES["intermediate_size"])}
    found: dict[str, Any] = {}
    for passes in (1, 8):
        steps = {kind: Step(kind, basis) for kind in ("plain", "warp", "explicit")}
        seconds = medians({kind: partial(step.run, passes) for kind, step in steps.items()})
        found[f"accumulation {passes}"] = {
            "plain step, s": seconds["plain"],
            "warp / plain": seconds["warp"] / seconds["plain"],
            "explicit module / plain": seconds["explicit"] / seconds["plain"],
        }
    x = torch.randn(4 * D, D)
    second_moment = (x.T @ x).double()
    seconds = medians(
        {
            "basis": timed(lambda: orthonormal.eigenbasis(second_moment)),
            "eigh": timed(lambda: torch.linalg.eigh(second_moment)),
            "svd": timed(lambda: torch.linalg.svd(second_moment)),
        }
    )
    found["basis, n = 1024"] = {"seconds": seconds["basis"], "full SVD / basis": seconds["svd"] / seconds["basis"]}
    for name, values in found.items():
        print(name, {key: round(value, 3) for key, value in values.items()})
    if write:
        path = Path(__file__).parent / "results" / "cpu2__warp.json"
        path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
