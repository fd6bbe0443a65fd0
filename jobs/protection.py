"""Safety against utility over keep_ratio, with the controls and baselines of Safety-WaRP: one table, one figure.

    python jobs/protection.py --root ROOT [--pair smollm2] [--seeds 3] [--others train] [--output page.html]

Moments, basis and importance are computed once, whatever the number of ratios and seeds; what is in ROOT is not run again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table
from study import Line, cell, console, draw, execute

from steerlab import job, run
from steerlab.run import capacity
from steerlab.stages import JobType, Plan
from steerlab.storage import plan
from steerlab.storage.store import Store

JOBS = Path(__file__).parent
PAIRS = {"tiny": ("tiny/safety.yaml", "tiny/warp.yaml"), "smollm2": ("safety.yaml", "warp.yaml")}
SAFETY = ("refusal/attack_success", "refusal/over_refusal")
UTILITY = {"tiny": ("math/solved", "problems solved (higher is better)"), "smollm2": ("perplexity/value", "perplexity (lower)")}
RATIOS = (0.0, 0.01, 0.05, 0.1, 0.2)
COLOURS = {"eigenvectors": "#4269d0", "no rotation": "#efb118", "random rotation": "#ff725c"}


class Variant(NamedTuple):
    """A line of the table."""

    group: str
    ratio: float | None
    overrides: tuple[str, ...]
    strength: float = 1.0
    """Of the metrics that are shown."""
    trains: bool = True
    baseline: bool = False
    """Plain training, which has no settings of the method."""


def variants(ratios: tuple[float, ...], control_ratio: float) -> list[Variant]:
    """Return the method at every ratio, its controls and the baselines."""
    rotations = {"eigenvectors": "safety", "no rotation": "none", "random rotation": "random"}
    plain = ("method={name: vanilla}", "data.safety=null")
    found = [Variant("before", None, (), trains=False)]
    found += [
        Variant("full fine-tuning", None, plain, baseline=True),
        Variant("safety rows mixed in", None, (*plain, "data.train.also=MIXED"), baseline=True),
        Variant("selected layers, half way", None, ("method.keep_ratio=0", "method.rotation=none"), strength=0.5),
    ]
    for name, rotation in rotations.items():
        found += [Variant(name, ratio, (f"method.rotation={rotation}", f"method.keep_ratio={ratio}")) for ratio in ratios]
    for mask in ("random", "magnitude"):
        found.append(Variant(f"{mask} mask", control_ratio, (f"method.mask={mask}", f"method.keep_ratio={control_ratio}")))
    return found


def wanted(pair: str, variant: Variant, seed: int, others: str, overrides: list[str]) -> job.Job:
    """Return the job of a variant and seed; `others` says what weights outside of the selected layers do."""
    before, tuned = (JOBS / name for name in PAIRS[pair])
    plain = job.read(tuned, JobType)
    if not variant.trains:
        tasks = [task.model_dump(mode="json") for task in plain.evaluate]
        return job.read(before, JobType, [f"evaluate={json.dumps(tasks)}"])
    safety = plain.data.by_role["safety"].model_dump(mode="json")
    mixed = json.dumps([{**safety, "limit": max(1, (safety["limit"] or 100) // 2)}])
    settings = [text.replace("MIXED", mixed) for text in variant.overrides]
    # Strength 0.5 of a patch is half way between the weights before and after.
    strengths = [f"evaluate.{number}.strengths=[1, 0.5]" for number in range(2)] if variant.strength != 1 else []
    own = [] if variant.baseline else [f"method.seed={seed}", f"method.others={others}"]
    return job.read(tuned, JobType, [*settings, *strengths, f"train.seed={seed}", *own, *overrides])


def lines(found: dict[Variant, list[dict[str, Any]]], utility: str) -> list[Line]:
    """Return attack success against utility: a line over keep_ratio for each rotation, a point for each other variant."""
    groups: dict[str, list[Variant]] = {}
    for variant in found:
        groups.setdefault(variant.group, []).append(variant)

    def values(members: list[Variant], metric: str) -> list[list[float]]:
        return [[seed[metric]["value"] for seed in found[variant]] for variant in members]

    return [
        Line(
            group,
            [f"{v.ratio:g}" if v.ratio is not None else "" for v in members],
            values(members, utility),
            values(members, SAFETY[0]),
            COLOURS.get(group),
        )
        for group, members in groups.items()
    ]


def main(
    root: Annotated[str, typer.Option(help="Where results go: an absolute path or a URI.")],
    pair: Annotated[str, typer.Option(help=f"Jobs: {' or '.join(PAIRS)}.")] = "tiny",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    ratios: Annotated[str, typer.Option(help="Values of keep_ratio.")] = ",".join(map(str, RATIOS)),
    control_ratio: Annotated[float, typer.Option(help="keep_ratio of the random and the magnitude mask.")] = 0.1,
    only: Annotated[list[str] | None, typer.Option(help="Lines of the table to run, by name; all if not given.")] = None,
    others: Annotated[str, typer.Option(help="Weights outside of the selected layers: frozen or train.")] = "frozen",
    output: Annotated[Path | None, typer.Option(help="HTML page with the figure.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override one value in every job but phase 0's.")] = None,
) -> None:
    """Run the jobs, print the table and draw the figure."""
    store = Store.open(root)
    asked = variants(tuple(float(ratio) for ratio in ratios.split(",")), control_ratio)
    unknown = set(only or []) - {variant.group for variant in asked}
    if unknown:
        raise typer.BadParameter(f"{unknown.pop()} is no line; lines are {', '.join(dict.fromkeys(v.group for v in asked))}")
    asked = [variant for variant in asked if variant.group in (only or [variant.group])]
    jobs = {v: [wanted(pair, v, seed, others, set_ or []) for seed in range(seeds if v.trains else 1)] for v in asked}
    facts = {variant: run.check(Plan.of(group[0])) for variant, group in jobs.items()}
    run.connect()
    found: dict[Variant, list[dict[str, Any]]] = {}
    try:
        for variant, group in jobs.items():
            capacity.check_cluster(Plan.of(group[0]), store, facts[variant])
            done = [execute(f"{variant.group} {variant.ratio or ''}", one, store, "jobs/protection.py") for one in group]
            summaries = [one.summary["strengths"] for one in done]
            found[variant] = [strengths[variant.strength] for strengths in summaries]
    except plan.StageError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    shown = (*SAFETY, UTILITY[pair][0])
    table = Table("", "keep_ratio", *shown, title=f"{pair}: held-out rows, {seeds} seeds, 95 % intervals")
    for variant, metrics in found.items():
        ratio = "" if variant.ratio is None else f"{variant.ratio:g}"
        table.add_row(variant.group, ratio, *(cell([one[name] for one in metrics]) for name in shown))
    console.print(table)
    if output is not None:
        title = "Safety against utility; the labels are keep_ratio, the bars 95 % intervals over seeds"
        draw(lines(found, UTILITY[pair][0]), (title, UTILITY[pair][1], "attack success (lower is better)"), output)


if __name__ == "__main__":
    typer.run(main)
