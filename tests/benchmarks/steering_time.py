"""What steering costs: a LinEAS step against the frozen model alone, and closed-form fits against a loop over neurons.

    python tests/benchmarks/steering_time.py [--steps 12] [--write]

Both sides of a ratio come from this one run and alternate, with a control: the frozen model against itself. The frozen model
runs forward and backward over the same batch of 32 real texts, from the first steered place to the last measured one, as the
step does; the step adds the maps, the pooling, the distance of 17,280 neurons, Adam, and the support.
`--write` keeps the numbers in results/ as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from step_time import RESULTS, said, spread

from steerlab import job, models
from steerlab.activations import parquet, part_writing, reading
from steerlab.data import rows, sources
from steerlab.inputs import encoding, tokens
from steerlab.job import ExtractConfig, TrainConfig
from steerlab.methods.contract import Inputs
from steerlab.methods.lineas import Config, Lineas
from steerlab.methods.transport import linear_map
from steerlab.patches import taps
from steerlab.stages import JobType
from steerlab.steered import language
from steerlab.training.optimizer import make_optimizer

JOB = Path(__file__).parents[2] / "jobs" / "lineas.yaml"
D, SAMPLES = 4096, 512
LOOP_NEURONS = 256
CONSTANT_NEURONS = 5


def texts_of(data: Any, encoder: encoding.Encoder, max_tokens: int) -> list[tokens.Encoded]:
    """Tokenise a data set of the job."""
    conversations = [encoder.from_row(row, data.format) for row in rows.read(data)]
    return [row.cut(max_tokens) for row in encoder.encode_all(conversations)]


def extracted(model: language.SteeredModel, texts: list[tokens.Encoded], config: ExtractConfig, folder: Path) -> Any:
    """Extract the target's activations in this process."""
    reader = reading.TextReader(model, config)
    found = reading.in_order([vectors.cpu() for vectors in reader.read(texts)])
    widths = {name: values.shape[1] for name, values in found.values.items()}
    of = part_writing.schema(widths, config.dtype, False, reading.about_model(model, config))
    about = {"sample_id": range(len(texts)), "label": ["target"] * len(texts), "text_sha256": [""] * len(texts)}
    table = part_writing.table(about, {name: values.numpy() for name, values in found.values.items()}, of)
    (folder / parquet.PARTS).write_text(json.dumps([part_writing.write_part([table], folder / "part-00000.parquet")]))
    reader.close()
    return parquet.Activations.open(folder)


class FrozenAlone:
    """Forward and backward of the frozen model over a batch, between the same places as the step."""

    def __init__(self, model: Any, places: list[taps.Tap], batch: tokens.Batch) -> None:
        self._batch = batch
        model.get_submodule(places[0].module).register_forward_hook(lambda _m, _i, z: z.requires_grad_())
        self._reader = taps.Reader(model, places[-1:])

    def step(self) -> None:
        """Run once."""
        (last_BTD,) = self._reader(**self._batch.model_inputs).values()
        last_BTD.mean().backward()


def timed(
    functions: dict[str, Callable[[], Any]], steps: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Time functions in turn, the order changing from step to step; the first step of each warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for step in range(steps + 1):
        names = list(functions)
        for name in names[step % len(names) :] + names[: step % len(names)]:
            start_s = clock()
            functions[name]()
            if step:
                seconds[name].append(clock() - start_s)
    return seconds


def lineas_step(steps: int) -> dict[str, Any]:
    """Time the step of jobs/lineas.yaml and the frozen model."""
    wanted = job.read(JOB, JobType)
    assert wanted.extract is not None and wanted.train is not None and isinstance(wanted.model.source, str)
    directory = sources.fetch(wanted.model.source)
    with tempfile.TemporaryDirectory() as folder:
        loaded = language.SteeredModel(models.load_model(directory), encoding.Encoder(models.load_tokenizer(directory)))
        max_tokens = wanted.train.max_tokens
        target = extracted(loaded, texts_of(wanted.data.target, loaded.encoder, max_tokens), wanted.extract, Path(folder))
        loaded._attached.detach()
        batch = tokens.collate(texts_of(wanted.data.source, loaded.encoder, max_tokens), loaded.encoder.pad_id)
        trainee = Lineas(
            loaded.model, Config.model_validate(wanted.method.model_dump()), Inputs(activations={"target": target})
        )
    optimizer = make_optimizer(trainee, TrainConfig(steps=1, lr=1e-2, optimizer="adam", betas=(0.9, 0.9)))

    def step() -> None:
        trainee.on_step(0, 1.0)
        optimizer.zero_grad()
        trainee(batch).total.backward()
        optimizer.step()
        trainee.after_step(1e-2)

    places = taps.select(trainee.model, wanted.extract.select)
    alone = [FrozenAlone(models.load_model(directory).requires_grad_(False), places, batch) for _ in range(2)]
    seconds = timed({"lineas": step, "frozen": alone[0].step, "control": alone[1].step}, steps)
    ratios = {name: [a / b for a, b in zip(seconds[name], seconds["frozen"], strict=True)] for name in ("lineas", "control")}
    return {
        **{f"{name}_to_frozen": spread(found) for name, found in ratios.items()},
        **{f"{name}_s": spread(found) for name, found in seconds.items()},
        "batch": list(batch.input_ids.shape),
        "neurons": len(trainee.target_SM),
    }


def fit_by_loop(source_ND: torch.Tensor, target_ND: torch.Tensor) -> list[tuple[float, float]]:
    """Fit one neuron after another, as the authors' code does."""
    found = []
    for j in range(source_ND.shape[1]):
        a, b = source_ND[:, j].sort().values, target_ND[:, j].sort().values
        slope = ((a - a.mean()) * (b - b.mean())).sum() / (a - a.mean()).square().sum()
        found.append((float(slope), float(b.mean() - slope * a.mean())))
    return found


def closed_form() -> dict[str, Any]:
    """Time Linear-AcT at d = 4096 with 512 + 512 samples, and the loop on some of the neurons."""
    generator = torch.Generator().manual_seed(0)
    source, target = (torch.randn(SAMPLES, D, generator=generator) for _ in range(2))
    source[:, :CONSTANT_NEURONS] = 1.0
    some = slice(CONSTANT_NEURONS, CONSTANT_NEURONS + LOOP_NEURONS)
    seconds = timed(
        {
            "vectorised": lambda: _ignore(linear_map(source, target)),
            "loop": lambda: _ignore(fit_by_loop(source[:, some], target[:, some])),
        },
        10,
    )
    whole_loop_s = statistics.median(seconds["loop"]) * D / LOOP_NEURONS
    fitted, looped = linear_map(source, target), torch.tensor(fit_by_loop(source[:, some], target[:, some]))
    return {
        "vectorised_s": spread(seconds["vectorised"]),
        "loop_s_scaled_to_all_neurons": whole_loop_s,
        "loop_to_vectorised": whole_loop_s / statistics.median(seconds["vectorised"]),
        "largest_difference": float((torch.stack([fitted.scale_D, fitted.shift_D], 1)[some] - looped).abs().max()),
        "slopes_of_constant_neurons": fitted.scale_D[:CONSTANT_NEURONS].tolist(),
    }


def _ignore(_: Any) -> None:
    """Take a result that only its time matters of."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    fit, step = closed_form(), lineas_step(arguments.steps)
    print(f"Linear-AcT, d = {D}, {SAMPLES} + {SAMPLES}: {fit['vectorised_s']['median'] * 1e3:.1f} ms a place")
    print(
        f"loop over neurons / vectorised: {fit['loop_to_vectorised']:.1f}; largest difference {fit['largest_difference']:.1e}"
    )
    print(f"LinEAS step / frozen model alone: {said(step['lineas_to_frozen'])}, {arguments.steps} pairs")
    print(f"control (frozen model / frozen model): {said(step['control_to_frozen'])}")
    if arguments.write:
        record = {
            "config": {"job": JOB.name, "batch": step["batch"], "d": D, "samples": SAMPLES},
            "hardware": f"{os.cpu_count()} CPU cores, {platform.machine()}",
            "torch": torch.__version__,
            "date": time.strftime("%Y-%m-%d"),
            "metrics": {"lineas_step": step, "closed_form": fit},
        }
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "cpu2__steering__smollm2.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
