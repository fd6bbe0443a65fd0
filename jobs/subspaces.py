"""The angle between what is learnt and what must be kept, in the tiny world, beside the refusals that are lost.

    python jobs/subspaces.py --root ROOT [--seeds 3]

Of each selected layer y = W x, let U hold the eigenvectors of the second moment of x over the safety rows (step 1 of
Safety-WaRP), and D the change of W by a training. Two numbers follow:

angle     arccos sqrt(|D U_k|^2 / |D|^2), summed over the layers: U_k are the first tenth of the eigenvectors. It is 0 where
          the training changes W in the directions of the safety rows alone, and 72 degrees for a random change
          (|D U_k|^2 / |D|^2 = 0.1).
moved     sqrt(sum_i v_i |D u_i|^2 / sum_i v_i |W u_i|^2), v_i the eigenvalues: by how much the outputs of the layers move on
          the safety rows, as a share of these outputs.

Predicted before the first run: the more of what is learnt is about harmful deeds (the dial `overlap`), the smaller is the angle
of a training without protection, and the more refusals it loses. At overlap 1, of all ways to freeze a tenth or a fifth of the
coefficients, those that move the outputs less lose fewer refusals.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table
from study import cell, console, execute, over_seeds
from torch import Tensor

from steerlab import job, models, patches, run
from steerlab.methods import warp
from steerlab.patches import WeightPatch
from steerlab.stages import JobType, Plan
from steerlab.storage import plan
from steerlab.storage.store import Store
from steerlab.storage.tensors import Parts

FILE = "jobs/tiny/warp.yaml"
OVERLAPS = (0.0, 0.25, 0.5, 0.75, 1.0)
FROZEN = {
    "eigenvectors": "method.rotation=safety",
    "no rotation": "method.rotation=none",
    "random rotation": "method.rotation=random",
    "eigenvectors, random mask": "method.mask=random",
}
"""Ways to choose what is frozen, by what they are called -> the setting."""
METRICS = ("refusal/attack_success", "math/solved")
FIRST = 0.1
"""Share of the eigenvectors that count as the directions of the safety rows."""


class Geometry(NamedTuple):
    """The two numbers of one training."""

    angle_deg: float
    moved: float


def wanted(overlap: float, keep_ratio: float, seed: int, setting: str = FROZEN["eigenvectors"]) -> job.Job:
    """Return the job of one training."""
    solved = [f"tiny:errands/{split}?overlap={overlap:g}" for split in ("test", "validation")]
    settings = [
        f"data.train.source=tiny:errands/train?overlap={overlap:g}", f"evaluate.1.prompts.source={solved}",
        f"method.keep_ratio={keep_ratio:g}", f"method.seed={seed}", f"train.seed={seed}", setting,
    ]  # fmt: skip
    return job.read(FILE, JobType, settings)


def basis_of(store: Store, planned: Plan) -> Parts:
    """Return the eigenvectors and eigenvalues of a job whose rotation is that of the safety rows."""
    stage = planned.preparing.made["basis"].stage
    return Parts.open(store.local(stage.name, stage.key))


def geometry(store: Store, planned: Plan, basis: Parts) -> Geometry:
    """Compute the angle and the movement of a training from its patch and the safety rows' eigenvectors."""
    assert planned.model is not None and planned.below is not None and planned.below.model is not None
    patch = patches.load(store.local(planned.model.name, planned.model.key) / "patch")
    assert isinstance(patch, WeightPatch)
    changes = dict(patch.differences())
    model = models.load_model(store.local(planned.below.model.name, planned.below.model.key) / "model")
    config: Any = planned.job.method
    within = whole = moved = output = 0.0
    for place in warp.places(model, config):
        vectors_NN, values_N = (basis.tensor(f"{place.input_of}/{name}") for name in ("vectors", "values"))
        change_N = energies(
            models.linear_weight(model.get_submodule(place.module), changes[f"{place.module}.weight"]), vectors_NN
        )
        weight_N = energies(model.get_parameter(f"{place.module}.weight"), vectors_NN)
        within += float(change_N[: round(FIRST * len(change_N))].sum())
        whole += float(change_N.sum())
        moved += float((values_N * change_N).sum())
        output += float((values_N * weight_N).sum())
    return Geometry(math.degrees(math.acos(math.sqrt(within / whole))), math.sqrt(moved / output))


def energies(matrix_MN: Tensor, vectors_NN: Tensor) -> Tensor:
    """Return |A u_i|^2 for each eigenvector, (N,), float64."""
    return (matrix_MN.detach().double() @ vectors_NN.double()).square().sum(0)


def main(
    root: Annotated[str, typer.Option(help="Where results go: an absolute path or a URI.")],
    seeds: Annotated[int, typer.Option(min=1)] = 3,
) -> None:
    """Run the trainings and print both tables."""
    store = Store.open(root)
    run.check(Plan.of(wanted(1.0, 0.1, 0)))
    run.connect()

    def done(name: str, of_seeds: list[job.Job]) -> list[dict[str, Any]]:
        return [execute(name, one, store, "jobs/subspaces.py").summary["metrics"] for one in of_seeds]

    def numbers(of_seeds: list[job.Job]) -> list[Geometry]:
        # One basis serves all: the rows and the model before the training are the same.
        basis = basis_of(store, Plan.of(wanted(1.0, 0.1, 0)))
        return [geometry(store, Plan.of(one), basis) for one in of_seeds]

    def said(values: list[float], digits: int) -> str:
        mean, half = over_seeds(values)
        return f"{mean:.{digits}f}" + ("" if math.isnan(half) else f" ± {half:.{digits}f}")

    try:
        done("basis", [wanted(1.0, 0.1, 0)])
        title = f"without protection, and with a tenth frozen; {seeds} seeds, 95 % intervals"
        by_overlap = Table(
            "overlap", "angle, degrees", *(f"{m}, keep_ratio {r}" for r in (0, 0.1) for m in METRICS), title=title
        )
        for overlap in OVERLAPS:
            trained = {ratio: [wanted(overlap, ratio, seed) for seed in range(seeds)] for ratio in (0.0, 0.1)}
            metrics = {ratio: done(f"overlap {overlap:g}, keep_ratio {ratio:g}", jobs) for ratio, jobs in trained.items()}
            cells = [cell([one[name] for one in metrics[ratio]]) for ratio in trained for name in METRICS]
            by_overlap.add_row(f"{overlap:g}", said([one.angle_deg for one in numbers(trained[0.0])], 1), *cells)
        by_choice = Table("frozen", "keep_ratio", "moved", *METRICS, title=f"overlap 1; {seeds} seeds, 95 % intervals")
        for ratio in (0.0, 0.1, 0.2):
            for name, setting in FROZEN.items() if ratio else [("nothing", FROZEN["eigenvectors"])]:
                trained_of = [wanted(1.0, ratio, seed, setting) for seed in range(seeds)]
                cells = [cell([one[metric] for one in done(f"{name} {ratio:g}", trained_of)]) for metric in METRICS]
                by_choice.add_row(name, f"{ratio:g}", said([one.moved for one in numbers(trained_of)], 3), *cells)
    except plan.StageError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    console.print(by_overlap)
    console.print(by_choice)


if __name__ == "__main__":
    typer.run(main)
