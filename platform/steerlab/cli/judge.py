"""The command that judges existing texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from steerlab.cli.opening import opened_store
from steerlab.cli.terminal import JsonOption, RootOption, asked_in_words, cell, console, explained, folding_table, say_line


def judge(
    file: Annotated[Path, typer.Argument(help="Rows with texts: samples/TASK.parquet of a run folder, or a file of your own.")],
    task: Annotated[
        str | None, typer.Option(help="Task whose scorer judges, a name or file:PATH. Default: the task that wrote the file.")
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="A field of the task, written in YAML: threshold=0.7. May be repeated.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="Column of the texts. Default: the first known name.")] = None,
    prompt: Annotated[str | None, typer.Option(help="Column of their prompts. Default: the first known name.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="File of verdicts. Default: FILE.TASK.parquet.")] = None,
    device: Annotated[str, typer.Option(help="Where the scorer's models run: cpu, cuda, cuda:1.")] = "cpu",
    root: RootOption = None,
    as_json: JsonOption = False,
) -> None:
    """Judge existing texts with the scorer of a task, without the model that wrote them."""
    from steerlab.run import texts_judged

    with explained("run the same command again"):
        config = texts_judged.task_of(file, task, set_ or ())
        written = texts_judged.read(file, texts_judged.Columns(text, prompt))
        judged = texts_judged.judge(file, config, written, output=output, device=device, store=opened_store(root))
        if as_json:
            numbers = {s: {name: metric._asdict() for name, metric in own.items()} for s, own in judged.metrics.items()}
            print(json.dumps({"verdicts": str(judged.verdicts), "strengths": numbers, "asked": judged.asked}, indent=1))
            return
        names = dict.fromkeys(name for own in judged.metrics.values() for name in own)
        table = folding_table("metric", *(f"strength {strength:g}" for strength in judged.metrics))
        for name in names:
            metrics = [own.get(name) for own in judged.metrics.values()]
            table.add_row(escape(name), *(cell(None if metric is None else metric._asdict()) for metric in metrics))
        console.print(table)
        console.print("value \\[95 % interval] (items scored)")
        if judged.asked:
            say_line(asked_in_words(judged.asked))
        console.print(f"verdicts: {judged.verdicts}", soft_wrap=True, highlight=False, markup=False)
