"""Print to the terminal for all commands, define their shared options, and turn errors into a message and an exit code."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
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
    """A console that removes control characters from every text.

    Generated texts, names and fields of rows come from outside; an escape sequence in them could move the cursor and overwrite
    what was printed before.
    """

    def render_str(self, text: str, **how: Any) -> Text:
        """Render a text without control characters."""
        return super().render_str(texts.plain(text), **how)


console = PlainConsole()


errors = PlainConsole(stderr=True)


JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Job file (YAML): a path or a URI.")]


JobsArgument = Annotated[
    list[str], typer.Argument(metavar="JOB", help="Job files (YAML), paths or URIs, run one after another.")
]


SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", help="Override one value, written in YAML: train.steps=50. Paths start from the current folder."),
]


def typed_root(text: str) -> str:
    """Return a ROOT that was typed: a URI unchanged, a path made absolute, so that it is valid in every process.

    Raises:
        typer.BadParameter: the path begins with `~NAME` and this machine has no user of that name.
    """
    if "://" in text:
        return text
    try:
        return str(Path(text).expanduser().absolute())
    except RuntimeError as error:
        raise typer.BadParameter(f"{text}: {error}") from None


RootOption = Annotated[
    str | None,
    typer.Option(
        "--root",
        parser=typed_root,
        metavar="ROOT",
        help="Folder of artifacts and runs: a path or URI. Default: $STEERLAB_ROOT or ~/steerlab.",
    ),
]


JsonOption = Annotated[bool, typer.Option("--json", help="Print machine-readable results.")]


@contextmanager
def explained(how_to_go_on: str = "run the same command again to continue from the last checkpoint") -> Iterator[None]:
    """Turn errors that users cause into one message and an exit code, and print each warning once, as one line.

    Other errors (bugs) pass through. `how_to_go_on` is printed after Ctrl-C.

    Raises:
        typer.Exit: with code 1 for a failed stage or Ctrl-C, 2 for a wrong request.
    """
    from steerlab.storage.plan import StageError

    printed: set[str] = set()

    def say(message: Warning | str, category: type[Warning], *_: object) -> None:
        # The platform warns with UserWarning; other categories are for developers. The same warning may come twice, since some
        # files are read by a check and again by the run.
        if category is UserWarning and str(message) not in printed:
            printed.add(str(message))
            errors.print(f"[yellow]warning[/yellow] {escape(texts.shown(str(message)))}", soft_wrap=True)

    try:
        with warnings.catch_warnings():
            # By default, Python shows a warning once per line of code, but one line may warn of several data sets.
            warnings.simplefilter("always", UserWarning)
            warnings.showwarning = say
            yield
    except (StageError, FloatingPointError) as error:
        errors.print(f"[red]failed[/red] {escape(texts.shown(str(error)))}", soft_wrap=True)
        raise typer.Exit(1) from None
    except (ValueError, OSError) as error:
        # A ValueError from within a library or from `int("x")` is a bug of the platform and keeps its traceback.
        if isinstance(error, ValueError) and not is_for_people(error):
            raise
        errors.print(f"[red]error[/red] {escape(texts.shown(_in_words(error)))}", soft_wrap=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        errors.print(f"interrupted; {how_to_go_on}")
        raise typer.Exit(1) from None
    except BaseException as error:
        # A panic of the Rust library tokenizers is a BaseException; all other ones are raised again.
        if not gave_up(error):
            raise
        errors.print(f"[red]error[/red] the tokenizer failed on a text: {escape(texts.shown(str(error)))}", soft_wrap=True)
        raise typer.Exit(2) from None


def _in_words(error: ValueError | OSError) -> str:
    """Return the message of an error; an OSError of the system or a library is shortened to one line with the file's name."""
    if is_for_people(error) or not isinstance(error, OSError):
        return str(error)
    if error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def say_line(line: str) -> None:
    """Print a line as it is, without markup."""
    console.print(line, highlight=False, soft_wrap=True, markup=False)


def cell(metric: MetricNumbers | None) -> str:
    """Return a metric as text for a table: value, 95 % interval, number of items, and number of items that were skipped."""
    from steerlab.evaluation.statistics.seeds import between_seeds
    from steerlab.evaluation.statistics.summaries import left_out

    if metric is None:
        return "-"
    items = ", ".join(part for part in (str(metric["n"]), left_out(metric), between_seeds(metric)) if part)
    if metric["value"] is None:
        return f"- ({items})" if left_out(metric) else "-"
    interval = "" if metric["low"] is None else f" \\[{metric['low']:.3f}, {metric['high']:.3f}]"
    # The loss of a training is not a mean over items, so it has no count.
    return f"{metric['value']:.3f}{interval}" + ("" if metric["n"] is None else f" ({items})")


def asked_in_words(asked: Mapping[str, float | str]) -> str:
    """Describe the calls to a judge's API, and their cost."""
    price = f", {asked['price']:.4f} {asked['currency']}" if "price" in asked else ""
    return (
        f"judge: {asked['calls']:,.0f} calls, {asked['kept']:,.0f} answers kept from before, {asked['retries']:,.0f} tries "
        f"repeated, {asked['input_tokens']:,.0f} tokens read, {asked['output_tokens']:,.0f} written{price}"
    )


def folding_table(*headers: str, title: str | None = None) -> Table:
    """Return a table that wraps text wider than its column; rich would truncate it, which makes names useless."""
    return Table(*(Column(header, overflow="fold") for header in headers), title=title)
