"""What all commands print through, and how errors become one message and an exit code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from rich.text import Text

from steerlab.guards import texts
from steerlab.guards.faults import gave_up, is_for_people

if TYPE_CHECKING:
    from steerlab.run import MetricNumbers


class PlainConsole(Console):
    """A console on which no text moves the cursor or sets a colour: generations, names and fields are strangers' texts."""

    def render_str(self, text: str, **how: Any) -> Text:
        """Render a text without what moves a cursor."""
        return super().render_str(texts.plain(text), **how)


console = PlainConsole()


errors = PlainConsole(stderr=True)


JobArgument = Annotated[Path, typer.Argument(help="Job file (YAML).")]


SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one value, written in YAML: train.steps=50. Paths start from the current folder."),
]


RootOption = Annotated[
    str | None,
    typer.Option("--root", help="Where artifacts and runs live: a path or URI. Default: $STEERLAB_ROOT or ~/steerlab."),
]


JsonOption = Annotated[bool, typer.Option("--json", help="Print machine-readable results.")]


@contextmanager
def explained(how_to_go_on: str = "run the same command again to continue from the last checkpoint") -> Iterator[None]:
    """Turn errors for people into one message and an exit code, and warnings into a line each."""
    from steerlab.storage.plan import StageError

    said: set[str] = set()

    def say(message: Warning | str, category: type[Warning], *_: object) -> None:
        # Libraries warn in words of their own; those are for developers. What is checked and then read would be said twice.
        if category is UserWarning and str(message) not in said:
            said.add(str(message))
            errors.print(f"[yellow]warning[/yellow] {escape(texts.shown(str(message)))}", soft_wrap=True)

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = say
            yield
    except (StageError, FloatingPointError) as error:
        errors.print(f"[red]failed[/red] {escape(texts.shown(str(error)))}", soft_wrap=True)
        raise typer.Exit(1) from None
    except (ValueError, OSError) as error:
        if isinstance(error, ValueError) and not is_for_people(error):
            raise
        errors.print(f"[red]error[/red] {escape(texts.shown(_in_words(error)))}", soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        errors.print(f"interrupted; {how_to_go_on}")
        raise typer.Exit(1) from None
    except BaseException as error:
        if not gave_up(error):
            raise
        errors.print(f"[red]error[/red] a tokenizer gave up on a text: {escape(texts.shown(str(error)))}", soft_wrap=True)
        raise typer.Exit(2) from None


def _in_words(error: ValueError | OSError) -> str:
    """Return what is said of an error: the system's and the libraries' own in a line, with the file that it is about."""
    if is_for_people(error) or not isinstance(error, OSError):
        return str(error)
    if error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def say_line(line: str) -> None:
    """Print a line as it is, without markup."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def cell(metric: MetricNumbers | None) -> str:
    """Return a metric as a cell of a table: value, interval, items, and what was left out."""
    from steerlab.evaluation.statistics.metrics import left_out

    if metric is None:
        return "-"
    items = ", ".join(part for part in (str(metric["n"]), left_out(metric)) if part)
    if metric["value"] is None:
        return f"- ({items})" if left_out(metric) else "-"
    interval = "" if metric["low"] is None else f" \\[{metric['low']:.3f}, {metric['high']:.3f}]"
    # A training's loss has no items.
    return f"{metric['value']:.3f}{interval}" + ("" if metric["n"] is None else f" ({items})")


def folding_table(*headers: str, title: str | None = None) -> Table:
    """Return a table that folds what is wider than its column: half a metric's name is none."""
    return Table(*(Column(header, overflow="fold") for header in headers), title=title)
