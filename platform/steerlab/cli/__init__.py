"""The command line `steerlab`: thin typer commands over jobs, sweeps and runs, with one file for each group of commands.

Modules import torch, Ray and the rest of the package inside the commands, so that `steerlab --help` answers at once.

Exit codes: 0 success, 1 a stage failed or Ctrl-C, 2 the request was wrong, 70 a bug of steerlab, with its traceback.
"""

from __future__ import annotations

import sys
import traceback

import typer

from steerlab.cli import (
    comparing,
    describing,
    exporting,
    housekeeping,
    judge,
    running,
    sending,
    serve,
    showing,
    starting,
    sweeping,
    trying,
)
from steerlab.cli.terminal import errors

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Rotate and steer a model's representations: run jobs, compare and try their results.",
)
app.callback()(showing.versioned)
# In the order of `steerlab --help`.
app.command()(starting.init)
app.command()(running.run)
app.command()(sweeping.sweep)
app.command("plan")(running.show_plan)
app.command()(trying.generate)
app.command()(trying.explain)
app.command()(exporting.export)
app.command()(serve.serve)
app.command()(judge.judge)
app.command()(showing.show)
app.command()(comparing.compare)
app.command()(comparing.report)
app.command()(housekeeping.ls)
app.command()(housekeeping.gc)
app.command("wandb-sweep")(sweeping.wandb_sweep)
app.command("wandb-send")(sending.wandb_send)
app.add_typer(sending.dashboards, name="dashboards")
app.command()(running.submit)
app.command()(describing.describe)
app.command()(running.schema)
app.command()(running.doctor)

_INTERNAL = 70
"""Exit code of an internal error (EX_SOFTWARE of sysexits.h)."""


def main() -> None:
    """Run the command line."""
    # Both options take a list of numbers.
    for option in ("--strength", "--guidance"):
        sys.argv[1:] = repeated(sys.argv[1:], option)
    try:
        app()
    except Exception:  # `terminal.explained` has handled all errors that users cause, so the rest are bugs of steerlab
        traceback.print_exc()
        errors.print("[red]internal error[/red] the traceback above shows where; this is a bug of steerlab, please report it")
        sys.exit(_INTERNAL)


def repeated(arguments: list[str], option: str) -> list[str]:
    """Expand `--strength 0 0.5 1` to `--strength 0 --strength 0.5 --strength 1`.

    Args:
        arguments: the command line.
        option: the option to expand.
    """
    # Click, on which typer is built, takes one value for each occurrence of an option.
    expanded: list[str] = []
    for argument in arguments:
        is_next_value = len(expanded) > 1 and expanded[-2] == option and _is_number(expanded[-1])
        expanded += [option, argument] if is_next_value and _is_number(argument) else [argument]
    return expanded


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
