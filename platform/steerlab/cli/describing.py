"""The command that describes methods, tasks, sections of a job and sources."""

from __future__ import annotations

import sys
from typing import Annotated

import typer
from rich.markdown import Markdown

from steerlab.cli.terminal import console, explained


def _completed(begun: str) -> list[str]:
    """Return the names that begin with the text typed so far."""
    from steerlab.cli import catalogue

    return [name for name in catalogue.names() if name.startswith(begun)]


def describe(
    name: Annotated[
        str | None,
        typer.Argument(
            help="A method, a task, a section such as train or 'data set', a field such as train.lr, or source.",
            autocompletion=_completed,
        ),
    ] = None,
    all_of_it: Annotated[bool, typer.Option("--all", help="Print the whole catalogue as Markdown.")] = False,
) -> None:
    """Describe a method, a task, a section or a field of a job: what it is, the paper, ranges and defaults."""
    from steerlab.cli import catalogue

    with explained():
        if all_of_it:
            print(catalogue.catalogue(), end="")
        elif name is None:
            for kind in ("method", "task", "section"):
                console.print(f"{kind}s: {', '.join(one.name for one in catalogue.entries() if one.kind == kind)}")
        else:
            text = catalogue.describe(name)
            if sys.stdout.isatty():
                console.print(Markdown(text))
            else:
                print(text)
