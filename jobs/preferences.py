"""IAV against DPO, LoRA and GenARM on the same pairs: implicit accuracy and KL to the base over alpha.

    python jobs/preferences.py --root ROOT [--pair smollm2] [--seeds 3] [--only NAME] [--win-rate] [--output page.html]

All trainings see the same pairs in the same order for the same number of steps. With `--train-dtype bfloat16` they read the
model in bfloat16, which is faster; what they leave is evaluated in the job's type all the same. What is in ROOT is not run
again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from rich.table import Table
from study import Line, cell, console, draw, execute

from steerlab import job, run
from steerlab.job import UNPATCHED
from steerlab.run import capacity
from steerlab.stages import JobType, Plan
from steerlab.storage import plan
from steerlab.storage.store import Store

JOBS = Path(__file__).parent
FOLDERS = {"tiny": JOBS / "tiny", "smollm2": JOBS}
ALPHAS = (1.0, 0.5, 1.5, 2.0)
"""Unless `--set evaluate.0.strengths=[...]` says otherwise."""
METRICS = ("preference/accuracy", "preference/margin", "preference/kl")
CONTROL = "preference/shorter"
BEST_OF = 8
TITLES = (
    "What alpha buys and what it costs; the labels are alpha, the bars 95 % intervals over seeds",
    "KL to the base, nats a response token",
    "implicit accuracy on held-out pairs",
)


class Variant(NamedTuple):
    """A line of the table."""

    name: str
    file: str
    overrides: tuple[str, ...] = ()
    colour: str = "#6b7280"


VARIANTS = (
    Variant("IAV, linear", "iav.yaml", (), "#4269d0"),
    Variant("IAV, rank 16", "iav.yaml", ("method.head=low_rank", "method.rank=16"), "#97bbf5"),
    Variant("IAV, MLP 64", "iav.yaml", ("method.head=mlp", "method.rank=64"), "#6cc5b0"),
    Variant("DPO, all weights", "dpo.yaml", (), "#ff725c"),
    Variant("DPO, LoRA", "dpo.yaml", ("method.lora={}", "train.lr=LORA_LR"), "#efb118"),
    Variant("GenARM", "genarm.yaml", (), "#a463f2"),
)
LORA_LR = {"tiny": "5.0e-4", "smollm2": "2.0e-4"}


def wanted(pair: str, variant: Variant, seed: int, overrides: list[str], train_dtype: str | None) -> job.Job:
    """Return the job of a variant and seed; one that trains in another type is the base of one that evaluates."""
    own = [text.replace("LORA_LR", LORA_LR[pair]) for text in variant.overrides]
    alphas = f"evaluate.0.strengths={list(ALPHAS)}"
    file = FOLDERS[pair] / variant.file
    one = job.read(file, JobType, [*own, alphas, f"train.seed={seed}", *overrides])
    if train_dtype is None or train_dtype == one.model.dtype:
        return one
    asked = one.model_dump(mode="json")
    asked["scale"]["zero_stage"] = max(1, one.scale.zero_stage)  # for float32 copies; both jobs are spread as the last one says
    trains = {**asked, "model": {**asked["model"], "dtype": train_dtype}, "evaluate": []}
    evaluates = {**asked, "model": {**asked["model"], "source": trains}, "method": {"name": "none"}, "train": None}
    return job.validate(evaluates, JobType, file)


def win_rates(pair: str, runs: dict[str, list[run.Run]], store: Store, judge: str, overrides: list[str]) -> Table:
    """Let the base, its best answer of several, and every variant answer held-out prompts; the reward of one of them judges."""
    by_dpo = {"implicit_source": _left(store, runs[judge][0])}
    asked = {"task": "win_rate", "prompts": _pairs(pair), "temperature": 0.7, "max_new_tokens": 64, **by_dpo}
    table = Table("", "win rate", "longer", "tokens", title=f"answers against the base's; judge: the reward of {judge}")
    none = ["method={name: none}", "train=null", "choose=null"]
    best = {**asked, "best_of": BEST_OF, "best_by_source": _left(store, runs["IAV, linear"][0])}
    entries = [(f"best of {BEST_OF} by IAV's reward", VARIANTS[0].file, none, best)]
    chosen = [variant for variant in VARIANTS if variant.name in runs]
    entries += [(v.name, v.file, [text.replace("LORA_LR", LORA_LR[pair]) for text in v.overrides], asked) for v in chosen]
    for name, file, settings, task in entries:
        one = job.read(FOLDERS[pair] / file, JobType, [*settings, f"evaluate=[{json.dumps(task)}]", *overrides])
        run.check(Plan.of(one))
        metrics = execute(name, one, store, "jobs/preferences.py").summary["metrics"]
        columns = ("implicit", "longer", "answer_tokens")
        table.add_row(name, *(cell([metrics[f"win_rate/{column}"]]) for column in columns))
    return table


def _left(store: Store, done: run.Run) -> str:
    left = done.summary["model"]
    return str(store.local(left["stage"], left["key"]))


def _pairs(pair: str) -> dict[str, Any]:
    return job.read(FOLDERS[pair] / "iav.yaml", JobType).evaluate[0].model_dump(mode="json")["pairs"]


def alphas_of(strengths: list[dict[float, Any]]) -> list[float]:
    """Return the alphas that a variant was measured at, without that of the base."""
    return sorted(alpha for alpha in strengths[0] if alpha != UNPATCHED)


def lines(found: dict[str, list[dict[str, Any]]]) -> list[Line]:
    """Return implicit accuracy against KL to the base, a line over alpha for each variant."""
    chosen = [variant for variant in VARIANTS if variant.name in found]
    alphas = alphas_of(found[chosen[0].name])
    labels = [f"{float(alpha):g}" for alpha in alphas]

    def values(variant: Variant, metric: str) -> list[list[float]]:
        return [[seed[alpha][metric]["value"] for seed in found[variant.name]] for alpha in alphas]

    return [Line(v.name, labels, values(v, METRICS[2]), values(v, METRICS[0]), v.colour) for v in chosen]


def main(
    root: Annotated[str, typer.Option(help="Where results go: an absolute path or a URI.")],
    pair: Annotated[str, typer.Option(help=f"Jobs: {' or '.join(FOLDERS)}.")] = "tiny",
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    only: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(v.name for v in VARIANTS)}.")] = None,
    win_rate: Annotated[bool, typer.Option(help="Let every variant answer held-out prompts, too.")] = False,
    judge: Annotated[str, typer.Option(help="Variant whose implicit reward judges answers.")] = "DPO, all weights",
    train_dtype: Annotated[str | None, typer.Option(help="Type of the weights in training; default: the jobs'.")] = None,
    output: Annotated[Path | None, typer.Option(help="HTML page with the figure.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override one value in every job.")] = None,
) -> None:
    """Run the jobs, print the tables and draw the figure."""
    store = Store.open(root)
    unknown = [name for name in only or () if name not in {variant.name for variant in VARIANTS}]
    if unknown:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(variant.name for variant in VARIANTS)}")
    chosen = [variant for variant in VARIANTS if not only or variant.name in only]
    missing = [name for name in (judge, VARIANTS[0].name) if name not in {variant.name for variant in chosen}]
    if win_rate and missing:
        raise typer.BadParameter(f"--win-rate asks {missing[0]!r}, which --only leaves out")
    jobs = {v.name: [wanted(pair, v, seed, set_ or [], train_dtype) for seed in range(seeds)] for v in chosen}
    facts = {name: run.check(Plan.of(group[0])) for name, group in jobs.items()}
    run.connect()
    try:
        runs = {}
        for name, group in jobs.items():
            capacity.check_cluster(Plan.of(group[0]), store, facts[name])
            runs[name] = [execute(name, one, store, "jobs/preferences.py") for one in group]
        answers = win_rates(pair, runs, store, judge, set_ or []) if win_rate else None
    except plan.StageError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    found = {name: [done.summary["strengths"] for done in group] for name, group in runs.items()}
    table = Table("", "alpha", *METRICS, title=f"{pair}: held-out pairs, {seeds} seeds, 95 % intervals")
    for name, strengths in found.items():
        for number, alpha in enumerate(alphas_of(strengths)):
            cells = (cell([one[alpha][metric] for one in strengths]) for metric in METRICS)
            table.add_row("" if number else name, f"{float(alpha):g}", *cells)
    console.print(table)
    control = next(iter(next(iter(found.values()))[0].values()))[CONTROL]
    console.print(f"a policy that only likes brevity would reach an accuracy of {cell([control])} on these pairs")
    if answers is not None:
        console.print(answers)
    if output is not None:
        draw(lines(found), TITLES, output, log_x=True)


if __name__ == "__main__":
    typer.run(main)
