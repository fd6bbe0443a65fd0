"""Step time and peak memory: ASIDE against vanilla at d = 2048, and the loop under Ray Train against the loop without Ray.

    python tests/benchmarks/step_time.py [--steps 30] [--write]

Both sides of a ratio come from this one run: the steps of ASIDE, vanilla and a second vanilla, the control, alternate in one
process, so that a busy machine slows all. What the control's ratio misses 1 by is noise; where that hides what is looked for,
the rotation timed by itself says what it can cost at most. Memory is the peak resident set of a process of its own.
`--write` keeps the numbers in results/ as JSON.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
D, LAYERS, ROWS, TOKENS, VOCABULARY = 2048, 2, 2, 128, 8192
LOOP_STEPS, LOOP_PAIRS = 60, 6


def build(name: str) -> tuple[Any, Any, Any]:
    """Return (module, optimizer, batch) of one method on a Llama of width 2048."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from steerlab.inputs.tokens import Batch
    from steerlab.methods import METHODS, trained
    from steerlab.methods.contract import Inputs

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=D, intermediate_size=4 * D, num_hidden_layers=LAYERS, num_attention_heads=16
    )
    module = trained({"name": name}).module(LlamaForCausalLM(config).train(), METHODS[name].Config(), Inputs())
    ids = torch.randint(VOCABULARY, (ROWS, TOKENS))
    roles = (torch.arange(TOKENS) >= 2 * TOKENS // 5).long().expand(ROWS, TOKENS)
    batch = Batch(ids, roles, torch.ones_like(ids), torch.arange(TOKENS).expand(ROWS, TOKENS), ids, torch.zeros_like(ids))
    return module, torch.optim.SGD(module.parameters(), lr=1e-4), batch


def one_step(module: Any, optimizer: Any, batch: Any) -> float:
    """Take one optimizer step; return its seconds."""
    start_s = time.perf_counter()
    module(batch).total.backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return time.perf_counter() - start_s


def alternate(steps: int) -> dict[str, list[float]]:
    """Time the steps of both methods and of the control in turn."""
    made = {name: build(method) for name, method in (("vanilla", "vanilla"), ("aside", "aside"), ("control", "vanilla"))}
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for step in range(steps + 1):
        names = list(made)
        order = names[step % 3 :] + names[: step % 3]
        for name in order:
            took_s = one_step(*made[name])
            if step:  # the first step of each warms up
                seconds[name].append(took_s)
    return seconds


def rotation_s() -> float:
    """Return the median seconds that the rotation alone takes in one step, forward and backward."""
    import torch

    module, _, batch = build("aside")
    seconds = []
    for _ in range(100):
        e_BTD = torch.randn(ROWS, TOKENS, D, requires_grad=True)
        start_s = time.perf_counter()
        module.patch(e_BTD, batch.roles).backward(torch.ones(ROWS, TOKENS, D))
        seconds.append(time.perf_counter() - start_s)
    return statistics.median(seconds)


def peak(process: int | str = "self") -> int:
    """Return the peak resident memory of a process; `ru_maxrss` would hold its parent's as well."""
    (line,) = (line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def peak_bytes(name: str, queue: Any) -> None:
    """Report the peak resident memory of two steps."""
    made = build(name)
    for _ in range(2):
        one_step(*made)
    queue.put(peak())


def training_request(model_dir: str) -> Any:
    """Return a training on the tiny world, as its stage hands it over."""
    from steerlab.job import DataConfig, ModelConfig, TrainConfig
    from steerlab.storage.plan import ModelRef
    from steerlab.training.request import Request

    train = {"source": "tiny:instructions/train", "limit": 500}
    return Request(
        start=ModelRef(source=model_dir),
        model=ModelConfig.model_validate({"source": model_dir}),
        method={"name": "aside"},
        data=DataConfig.model_validate({"prompt_style": "plain", "train": train}),
        train=TrainConfig.model_validate({"steps": LOOP_STEPS, "lr": 1e-3, "micro_batch": 32, "max_tokens": 64}),
    )


def loop_without_ray(model_dir: str, queue: Any) -> None:
    """Run the loop in a plain process; report seconds a step and peak memory."""
    import torch

    from steerlab.job import ScaleConfig
    from steerlab.training import loop
    from steerlab.training.link import Link
    from steerlab.training.request import received

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        torch.distributed.init_process_group("gloo", init_method=f"file://{scratch}/group", rank=0, world_size=1)
        request = received(training_request(model_dir))
        told: list[dict[str, float]] = []
        link = Link(0, 1, torch.device("cpu"), lambda metrics, directory: None, Path(scratch) / "checkpoints", tell=told.append)
        loop.run(request, ScaleConfig.model_validate({"checkpoint_every": LOOP_STEPS}), link, Path(scratch) / "output")
    queue.put((1 / told[-1]["steps_per_s"], peak()))


def loop_under_ray(model_dir: str) -> tuple[float, int, float]:
    """Run the same loop in a Ray Train worker; return seconds a step, its peak memory and the wall seconds of the whole run."""
    import logging

    import psutil
    import ray

    from steerlab.job import ScaleConfig
    from steerlab.stages.spread import launch

    ray.init(address="local", num_cpus=1, logging_level=logging.ERROR, log_to_driver=False)
    told: list[dict[str, Any]] = []
    peaks: list[int] = []

    def report(metrics: dict[str, Any]) -> None:
        told.append(metrics)
        children = psutil.Process().children(recursive=True)
        peaks.extend(peak(child.pid) for child in children if "RayTrainWorker" in " ".join(child.cmdline()))

    start_s = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        scale = ScaleConfig.model_validate({"checkpoint_every": LOOP_STEPS})
        launch.fit(training_request(model_dir), scale, storage=scratch, report=report)
    wall_s = time.perf_counter() - start_s
    ray.shutdown()
    return 1 / told[-1]["steps_per_s"], max(peaks), wall_s


def in_process(function: Any, *arguments: Any) -> Any:
    """Call a function in a fresh process and return what it puts into its queue."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=function, args=(*arguments, queue))
    process.start()
    result = queue.get()
    process.join()
    return result


def spread(values: list[float]) -> dict[str, float]:
    """Summarise repeated measurements."""
    return {
        "median": statistics.median(values),
        "mean": statistics.mean(values),
        "stderr": statistics.stdev(values) / math.sqrt(len(values)),
        "min": min(values),
        "max": max(values),
    }


def said(ratio: dict[str, float]) -> str:
    """Write a ratio with its standard error."""
    return f"{ratio['mean']:.4f} +- {ratio['stderr']:.4f} (median {ratio['median']:.4f})"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()

    from steerlab.data.worlds import tiny_checkpoint

    seconds = alternate(arguments.steps)
    ratios = {name: [a / v for a, v in zip(seconds[name], seconds["vanilla"], strict=True)] for name in ("aside", "control")}
    rotation = rotation_s()
    memory = {name: in_process(peak_bytes, name) for name in ("vanilla", "aside")}
    with tempfile.TemporaryDirectory() as model_dir:
        tiny_checkpoint.write_model(Path(model_dir))
        pairs = []
        for _ in range(LOOP_PAIRS):
            plain_s, plain_bytes = in_process(loop_without_ray, model_dir)
            ray_s, ray_bytes, wall_s = loop_under_ray(model_dir)
            pairs.append((ray_s / plain_s, plain_s, ray_s, wall_s, plain_bytes, ray_bytes))
    found = {
        "aside_to_vanilla_step": {
            **{f"{name}_to_vanilla": spread(found) for name, found in ratios.items()},
            **{f"{n}_s": spread(s) for n, s in seconds.items()},
            "rotation_s": rotation,
            "rotation_to_vanilla": rotation / statistics.median(seconds["vanilla"]),
        },
        "aside_to_vanilla_peak_memory": {
            "ratio": memory["aside"] / memory["vanilla"],
            **{f"{n}_bytes": b for n, b in memory.items()},
        },
        "ray_train_to_plain_loop_step": {
            **spread([p[0] for p in pairs]),
            "plain_s": [p[1] for p in pairs],
            "ray_s": [p[2] for p in pairs],
            "ray_run_wall_s": [p[3] for p in pairs],
            "plain_peak_bytes": [p[4] for p in pairs],
            "ray_peak_bytes": [p[5] for p in pairs],
            "peak_memory": spread([p[5] / p[4] for p in pairs]),
        },
    }
    step, memory_found, under_ray = found.values()
    for name in ("aside", "control"):
        print(f"{name} / vanilla, step at d = {D}: {said(step[f'{name}_to_vanilla'])}, {arguments.steps} pairs")
    print(f"rotation alone, forward and backward / vanilla step: {step['rotation_to_vanilla']:.5f}")
    print(f"aside / vanilla, peak memory: {memory_found['ratio']:.4f}")
    print(f"Ray Train / plain loop, step: {said(under_ray)}, {LOOP_PAIRS} pairs")
    print(f"Ray Train / plain loop, peak memory: {said(under_ray['peak_memory'])}")
    if arguments.write:
        import torch

        config = {"d": D, "layers": LAYERS, "rows": ROWS, "tokens": TOKENS, "vocabulary": VOCABULARY, "loop_steps": LOOP_STEPS}
        hardware = f"{os.cpu_count()} CPU cores, {platform.machine()}"
        record = {
            "config": config,
            "hardware": hardware,
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "metrics": found,
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "cpu2__aside__llama_d2048.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
