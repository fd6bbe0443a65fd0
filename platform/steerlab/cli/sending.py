"""Commands that send runs and workspaces to Weights & Biases."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from steerlab.cli.terminal import console, explained, say_line


def wandb_send(
    folders: Annotated[list[Path], typer.Argument(metavar="RUN_OR_SWEEP...", help="Their folders on this machine.")],
) -> None:
    """Send runs to W&B that were recorded offline or could not be sent; what W&B already has is not sent again.

    A sweep is sent with all its runs, and gets a page if it has none.
    """
    from steerlab.tracking.wandb_client import sweep_page

    with explained():
        for folder in map(Path.absolute, folders):
            if not sweep_page.is_sweep(folder):
                _send(folder)
                continue
            # The runs of ROOT/sweeps/NAME/ID are ROOT/runs/NAME/ID-*. ID-best-SEED evaluates the best trial and is not a trial.
            runs = sorted(folder.parents[2].glob(f"runs/{folder.parent.name}/{folder.name}-*"))
            ids = {run: _send(run) for run in runs}
            trials = [name for run, names in ids.items() if not run.name.startswith(f"{folder.name}-best-") for name in names]
            console.print(f"{folder}: on the page of sweep {sweep_page.send(folder, trials)}", soft_wrap=True, highlight=False)


def _send(folder: Path) -> list[str]:
    """Send a run, and the runs of its further strengths; return their ids in W&B."""
    from steerlab import tracking
    from steerlab.tracking import writer_process

    spools = tracking.spools_of(folder)
    if not spools:
        raise ValueError(f"{folder} is not the folder of a run that was tracked in W&B")
    settings = [tracking.spool.settings_of(path) for path in spools]
    owner = f"{settings[0].entity}/" if settings[0].entity else ""
    say_line(f"{folder}: sending to W&B project {owner}{settings[0].project}")
    for path in spools:
        status = writer_process.send(path)
        if status.get("state") != "online" or not status.get("done"):
            raise ValueError(f"{folder}: {status.get('reason') or 'W&B did not accept all of the run; try again'}")
    console.print(f"{folder}: sent", soft_wrap=True, highlight=False)
    return [one.id for one in settings]


dashboards = typer.Typer(no_args_is_help=True, help="W&B workspaces and a report, as code.")


@dashboards.command()
def push(
    project: Annotated[str, typer.Option(help="ENTITY/PROJECT in W&B.")],
    folder: Annotated[Path, typer.Option(help="Folder with the definitions.")] = Path("dashboards"),
    only: Annotated[list[str] | None, typer.Option(help="Names of the definitions to write; default: all.")] = None,
) -> None:
    """Write the workspaces and the report that a folder defines to a W&B project."""
    from steerlab.tracking.wandb_client import workspaces as boards

    with explained():
        for name, url in boards.push(boards.load(folder, only or ()), project).items():
            console.print(f"{name}: {url}", soft_wrap=True, highlight=False)
