"""All methods of activation steering, and prompts, on the same texts and places: one table, one page.

    python jobs/steering.py --root ROOT [--pair sentiment] [--only NAME] [--seed 0 --seed 1 --seed 2] [--output page.html]

A seed shuffles the texts before they are divided: each has other texts to fit on, to choose on and to report on, and no text is
in two parts of one seed. Activations are extracted once a seed; a method whose results are in ROOT already is not run again.

The wording of a prompt is chosen on the development rows, by the metric of the job's `choose`; if none is better than no
prompt, none is taken, as the strength of a map may be 0. The bound of `choose` is not asked: a prompt stands before the texts
that the model continues, not before those whose perplexity is measured, which is therefore that of the model without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from study import cell, console, execute, say

from steerlab import job, report, run
from steerlab.data import rows
from steerlab.run import capacity
from steerlab.stages import JobType, Plan
from steerlab.storage import plan
from steerlab.storage.store import Store

JOBS = Path(__file__).parent
PAIRS = {"toxicity": ("lineas.yaml", "act.yaml"), "sentiment": ("lineas_sentiment.yaml", "act_sentiment.yaml")}
EARLY = "lineas, 30 steps"
AT_ONCE = "method.incremental=false"
WRITERS = "extract.select.modules=.*(embed_tokens|o_proj|down_proj)"
"""The places that write into the residual stream, from which the paper of directional ablation removes its direction."""
VARIANTS = {
    "mean_act": (AT_ONCE,),
    "linear_act": (AT_ONCE,),
    "linear_act, incremental": (),
    "linear_act, incremental to the plain target": ("method.incremental_target=plain",),
    "linear_act, incremental on o_proj": ("extract.select.modules=.*self_attn\\.o_proj",),  # the place of its paper
    "gaussian_act": (AT_ONCE,),
    "aura": (),
    "caa": (),
    "iti": (),
    # SmolLM2-135M has 9 heads in each of 30 blocks; the paper's 48 of 1,024 heads are 13 of these 270.
    "iti_heads": ("extract.select={modules: .*o_proj, side: input}", "method.heads=9", "method.top_k=13"),
    # Reading vectors have the length 1. At strength 1, at 30 places, the perplexity of the toxicity pair was 388 (RESULTS.md).
    "repe": ("choose.strengths=[0.05, 0.1, 0.2, 0.4]",),
    "ablation": (WRITERS,),
}
INVERSE = "mean_act, inverse"
"""The map that removes, applied the other way round: its strength is the one that induces most within the same bound."""
PROMPTS = {
    "toxicity": (
        "The following text is polite, friendly and respectful.\n\n",
        "A kind person, who never uses offensive words, wrote this:\n\n",
        "Everybody in this conversation is treated with respect. ",
    ),
    "sentiment": (
        "The following review is very positive.\n\n",
        "A happy critic, who loved the film, wrote this:\n\n",
        "This is a wonderful, moving and funny film. ",
    ),
}
"""Wordings of the prompting baseline; they are put before each text that the model continues."""
EXAMPLES = (2, 4, 8)
"""Numbers of target texts before each text in the few-shot baseline."""
PROMPTED, FEW_SHOT = "prompt", "few-shot"
OPPOSITE = {"min": "max", "max": "min"}


def split(seed: int) -> list[str]:
    """Return the settings by which a seed divides the texts."""
    places = (
        "data.source",
        "data.target",
        "choose.tasks.0.prompts",
        "choose.tasks.1.data",
        "evaluate.0.prompts",
        "evaluate.1.data",
    )
    return [f"{place}.shuffle={seed}" for place in places]


def wanted(pair: str, overrides: list[str]) -> dict[str, job.Job]:
    """Return the jobs of a pair of texts, the paper's method first; those of prompts are made after their wording is chosen."""
    lineas, act = (JOBS / name for name in PAIRS[pair])
    found = {"lineas": job.read(lineas, JobType, overrides)}
    # The maps after 30 of the 100 steps: kept by the same training, so they cost their evaluation alone.
    early = ["snapshot=30", f"name=lineas-{pair}-30-steps", *overrides]
    found[EARLY] = job.read(lineas, JobType, early)
    for name, more in VARIANTS.items():
        method, _, variant = name.partition(", ")
        own = [f"name=act-{pair}-{variant.replace(' ', '-')}"] if variant else []
        found[name] = job.read(act, JobType, [f"method.name={method}", *more, *own, *overrides])
    mode = "min" if pair == "toxicity" else "max"
    other_way = ["method.name=mean_act", AT_ONCE, "inverse=true", f"choose.mode={OPPOSITE[mode]}", f"name=act-{pair}-inverse"]
    found[INVERSE] = job.read(act, JobType, [*other_way, *overrides])
    return found


def prefixes(pair: str, kind: str, fitted: job.Job) -> list[str]:
    """Return the texts of a baseline without maps: instructions in words, or the first texts of the target sample."""
    if kind == PROMPTED:
        return list(PROMPTS[pair])
    target = fitted.data.target
    assert target is not None
    texts = [str(row["text"]) for row in rows.read(target)]
    return ["".join(f"{text}\n\n" for text in texts[:number]) for number in EXAMPLES]


def prompted(pair: str, name: str, prefix: str, overrides: list[str], *, development: bool) -> job.Job:
    """Return the job that puts a text before each prompt, none for "", on the rows of `choose` or on those of `evaluate`."""
    tree: dict[str, Any] = job.read(JOBS / PAIRS[pair][1], JobType, overrides).model_dump(mode="json")
    tasks = tree["choose"]["tasks"] if development else tree["evaluate"]
    kept = {part: tree[part] for part in ("model", "scale", "track")}
    method = {"name": "prompt", "prefix": prefix} if prefix else {"name": "none"}
    own = {"name": f"{name}-{pair}", "data": {}, "method": method, "evaluate": tasks}
    return job.validate({**kept, **own}, JobType, JOBS / PAIRS[pair][1])


def best(measured: Mapping[str, float | None], mode: str) -> str:
    """Return the text with the best value; of equal ones the first. Texts whose answers could not be judged are left out."""
    known = {text: value for text, value in measured.items() if value is not None}
    return (min if mode == "min" else max)(known, key=lambda text: known[text])


def chosen_prompt(pair: str, kind: str, fitted: job.Job, store: Store, overrides: list[str]) -> job.Job:
    """Measure every wording on the development rows, and return the job of the best one on the rows that report."""
    assert fitted.choose is not None
    mode, metric = "min" if pair == "toxicity" else "max", fitted.choose.metric
    measured: dict[str, float | None] = {}
    for number, prefix in enumerate(["", *prefixes(pair, kind, fitted)]):
        one = prompted(pair, f"{kind}-{number}", prefix, overrides, development=True)
        measured[prefix] = execute(f"{kind} {number}", one, store, "jobs/steering.py").summary["metrics"][metric]["value"]
    text = best(measured, mode)
    values = ", ".join("-" if value is None else f"{value:.3f}" for value in measured.values())
    say(f"{kind}: {metric} without a prompt, then of each wording: {values}; number {list(measured).index(text)} is taken")
    return prompted(pair, kind, text, overrides, development=False)


def main(
    root: Annotated[str, typer.Option(help="Where results go: an absolute path or a URI.")],
    pair: Annotated[str, typer.Option(help=f"Texts: {' or '.join(PAIRS)}.")] = "toxicity",
    only: Annotated[
        list[str] | None, typer.Option(help=f"Of lineas, {EARLY}, {', '.join(VARIANTS)}, {INVERSE}, {PROMPTED}, {FEW_SHOT}.")
    ] = None,
    seed: Annotated[list[int] | None, typer.Option(help="Seeds by which the texts are divided; one if none is given.")] = None,
    output: Annotated[Path | None, typer.Option(help="HTML page to write, of the first seed.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override one value in every job.")] = None,
) -> None:
    """Run the jobs, print the table and write the page."""
    known = [*wanted(pair, set_ or []), PROMPTED, FEW_SHOT]
    unknown = [name for name in only or () if name not in known]
    if unknown:
        raise typer.BadParameter(f"--only {unknown[0]!r}: there are {', '.join(known)}")
    names = [name for name in known if not only or name in only]
    store = Store.open(root)
    run.connect()
    runs: dict[str, list[run.Run]] = {name: [] for name in names}
    try:
        for number in seed or [0]:
            overrides = [*split(number), *(set_ or [])]
            jobs = wanted(pair, overrides)
            for one in (jobs[name] for name in names if name in jobs):
                capacity.check_cluster(Plan.of(one), store, run.check(Plan.of(one)))
            for name in names:
                one = jobs[name] if name in jobs else chosen_prompt(pair, name, jobs["mean_act"], store, overrides)
                runs[name].append(execute(f"{name}, seed {number}", one, store, "jobs/steering.py"))
    except plan.StageError as error:
        console.print(str(error), style="red", markup=False)
        raise typer.Exit(1) from None
    console.print(table(pair, runs))
    for done in (done for own in runs.values() for done in own):
        console.print(f"{store.root}/{done.folder}", highlight=False)
    if output is not None:
        entries = [replace(report.read(store, own[0].folder), name=name) for name, own in runs.items()]
        report.write(entries, output)
        console.print(f"{output}", highlight=False)


def table(pair: str, runs: Mapping[str, list[run.Run]]) -> Table:
    """Return the table of the reported rows: the mean over seeds and its interval, or that over items with one seed."""
    shown = {
        "toxicity": ("toxicity/share", "toxicity/score", "perplexity/value", "toxicity/base_perplexity", "toxicity/distinct_2"),
        "sentiment": (
            "sentiment/score",
            "sentiment/positive",
            "sentiment/negative",
            "perplexity/value",
            "sentiment/base_perplexity",
        ),
    }[pair]
    drawn = Table("method", "strengths", *shown, title=f"{pair}: held-out rows, value and 95 % interval")
    first = next(iter(runs.values()))
    without = [done.summary["strengths"].get(0.0) for done in first]
    if all(without):
        drawn.add_row("none", "0", *(cell([own[name] for own in without]) for name in shown))
    for method, own in runs.items():
        strengths = ", ".join(f"{strength:g}" for done in own for strength in list(done.summary["reported"].values())[:1])
        drawn.add_row(method, strengths, *(cell([done.summary["metrics"][name] for done in own]) for name in shown))
    return drawn


if __name__ == "__main__":
    typer.run(main)
