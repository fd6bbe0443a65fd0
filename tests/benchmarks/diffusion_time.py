"""What steering a diffusion model costs: a LinEAS step against the denoiser alone, eleven strengths against eleven runs.

    python tests/benchmarks/diffusion_time.py [--steps 12] [--model fashion-model] [--write]

Both sides of a ratio come from this one run and alternate, with a control: the denoiser against itself. The denoiser runs
forward and backward over the same noise, times and prompts as the step does, from the first steered place to the last measured
one; the step adds the pipeline around it, the maps, the pooling, the distances, Adam and the support. The weights are random,
which costs what trained ones do. Times are of the process (CPU seconds), which others on the machine disturb less than the
clock does. `--write` keeps the numbers in results/ as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from steering_time import extracted, timed
from step_time import RESULTS, said, spread

from steerlab import models
from steerlab.data.worlds import pixels
from steerlab.inputs.drawings import Drawing, Prompter
from steerlab.job import ExtractConfig, Selection, TrainConfig
from steerlab.methods.contract import Inputs
from steerlab.methods.lineas import Config, Lineas
from steerlab.patches import ActivationPatch, taps
from steerlab.steered.drawing import SteeredPipeline
from steerlab.training.optimizer import make_optimizer

NORMS = Selection(modules="unet.*norm.*")
ROWS, STRENGTHS, IMAGES = 32, 11, 8


class DenoiserAlone:
    """Forward and backward of the frozen denoiser over one batch, between the same places as the step."""

    def __init__(self, model: Any, prompts: list[str]) -> None:
        places = taps.select(model, NORMS)
        model.get_submodule(places[0].module).register_forward_hook(lambda _m, _i, z: z.requires_grad_())
        model.get_submodule(places[-1].module).register_forward_hook(self._end)
        self._denoiser, side = model.denoiser, model.config.sample_size
        self._noise = torch.randn(len(prompts), 1, side, side)
        self._condition = {name: value.detach() for name, value in model.pipeline.condition(prompts).items()}

    def _end(self, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
        raise _Ended(output)

    def step(self) -> None:
        """Run once."""
        try:
            self._denoiser(self._noise, 999, **self._condition)
        except _Ended as end:
            end.output.mean().backward()


class _Ended(Exception):
    def __init__(self, output: torch.Tensor) -> None:
        super().__init__()
        self.output = output


def lineas_step(directory: Path, steps: int) -> dict[str, Any]:
    """Time a step on 32 drawings that are read in the first step of the sampler, and the denoiser alone."""
    words = pixels.CLOTHES if "fashion" in directory.name else pixels.DIGITS
    drawings = [Drawing(words[i % len(words)], i, 1) for i in range(ROWS)]
    sampler = {"steps": 1}
    model = models.load_model(directory, sampler=sampler)
    loaded: Any = SteeredPipeline(model, Prompter(model))
    with tempfile.TemporaryDirectory() as folder:
        target = extracted(loaded, drawings, ExtractConfig(select=NORMS), Path(folder))  # type: ignore[arg-type]
        loaded.detach()
        trainee = Lineas(model, Config(steer=NORMS), Inputs(activations={"target": target}))  # type: ignore[arg-type]
    batch = loaded.encoder.collate(drawings)
    optimizer = make_optimizer(trainee, TrainConfig(steps=1, lr=1e-2, optimizer="adam", betas=(0.9, 0.9)))

    def step() -> None:
        trainee.on_step(0, 1.0)
        optimizer.zero_grad()
        trainee(batch).total.backward()
        optimizer.step()
        trainee.after_step(1e-2)

    prompts = [drawing.prompt for drawing in drawings]
    alone = [DenoiserAlone(models.load_model(directory, sampler=sampler).requires_grad_(False), prompts) for _ in range(2)]
    seconds = timed({"lineas": step, "denoiser": alone[0].step, "control": alone[1].step}, steps, time.process_time)
    ratios = {n: [a / b for a, b in zip(seconds[n], seconds["denoiser"], strict=True)] for n in ("lineas", "control")}
    return {
        **{f"{name}_to_denoiser": spread(found) for name, found in ratios.items()},
        **{f"{name}_cpu_s": spread(found) for name, found in seconds.items()},
        "rows": ROWS,
        "neurons": len(trainee.target_SM),
    }


def drawing(directory: Path, steps: int) -> dict[str, Any]:
    """Time eleven strengths in common batches, and one after another."""
    model = models.load_model(directory, sampler={"steps": 4})
    reader = taps.Reader(model, taps.select(model, NORMS))
    widths = {name: value.shape[-1] for name, value in reader(prompts=[""], seeds=[0]).items()}
    reader.close()
    steered = SteeredPipeline(model, Prompter(model), (ActivationPatch(widths, NORMS),))
    drawings = [Drawing("", i, 1) for i in range(IMAGES)]
    strengths = tuple(i / (STRENGTHS - 1) for i in range(STRENGTHS))

    def forget(draw: Callable[[], Any]) -> Callable[[], None]:
        def run() -> None:
            steered._last = None
            draw()

        return run

    functions = {
        "together": forget(lambda: steered.draw(drawings, strengths=strengths)),
        "apart": forget(lambda: [steered.draw(drawings, strengths=(strength,)) for strength in strengths]),
    }
    seconds = timed(functions, steps, time.process_time)
    ratio = [a / b for a, b in zip(seconds["together"], seconds["apart"], strict=True)]
    found: dict[str, Any] = {f"{name}_cpu_s": spread(values) for name, values in seconds.items()}
    return {**found, "together_to_apart": spread(ratio), "images": IMAGES, "strengths": STRENGTHS}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--model", default="fashion-model", choices=pixels.MODELS)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / arguments.model
        directory.mkdir()
        pixels.write_model(arguments.model, directory)
        step, drawn = lineas_step(directory, arguments.steps), drawing(directory, arguments.steps)
    print(f"LinEAS step / denoiser alone: {said(step['lineas_to_denoiser'])}, {arguments.steps} pairs")
    print(f"control (denoiser / denoiser): {said(step['control_to_denoiser'])}")
    print(f"{STRENGTHS} strengths together / apart, {IMAGES} images: {said(drawn['together_to_apart'])}")
    if arguments.write:
        record = {
            "config": {"model": arguments.model, "rows": ROWS, "threads": 1},
            "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "metrics": {"lineas_step": step, "drawing": drawn},
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / f"cpu2__diffusion__{arguments.model}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
