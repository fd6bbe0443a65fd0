"""The page of a sweep in Weights & Biases, and the place of its trials on that page."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from steerlab.job import Job
from steerlab.storage.store import Store
from steerlab.sweeps.space_entries import Entry, finite
from steerlab.sweeps.trials import SweepPlan
from steerlab.sweeps.units import Unit
from steerlab.tracking import Place
from steerlab.tracking.wandb_client import sweep_page
from steerlab.tracking.wandb_client.parameters import sweep_config


def begin(sweep_plan: SweepPlan, store: Store, folder: str) -> str | None:
    """Create the sweep's page in W&B, or reuse the one that it already has.

    Returns:
        Id of the page. None when the job is not tracked online or W&B does not answer.
    """
    if sweep_plan.job.track.wandb is None:
        return None
    # W&B's client writes local files, which are in the user's cache folder if ROOT is an object store.
    directory = store.on_disk(folder) if store.is_local else Path.home() / ".cache/steerlab/wandb" / folder.rpartition("/")[2]
    try:
        config = sweep_config(sweep_plan.job.name, _apart(sweep_plan.space.entries), sweep_plan.metric, sweep_plan.mode)
    except ValueError as error:
        # W&B cannot describe a function of the space. Its page works without the list of parameters, only with fewer plots.
        warnings.warn(f"{error}: the sweep's page in W&B does not list the parameters", stacklevel=2)
        config = sweep_config(sweep_plan.job.name, {}, sweep_plan.metric, sweep_plan.mode)
    return sweep_page.begin(sweep_plan.job.track, config, directory)


def _apart(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Split entries that set several fields into one entry for each field, as trials report each field separately."""
    single: dict[str, Entry] = {}
    for entry, value in entries.items():
        keys, values = [key.strip() for key in entry.split(",")], finite(value)
        if len(keys) == 1 or values is None:
            single[entry] = value
            continue
        for number, key in enumerate(keys):
            # Values are compared by repr, because lists cannot be members of a set.
            distinct = {repr(choice[number]): choice[number] for choice in values if isinstance(choice, list)}
            single[key] = {"grid_search": list(distinct.values())}
    return single


def place_of(unit: Unit, job: Job, seed: int, *, sweep: str, page: str | None, wandb_run: str | None) -> Place:
    """Return the place of a unit's run in W&B: the sweep's group and page, and the parameters that the sweep varies.

    Args:
        unit: the unit that runs.
        job: its job.
        seed: the training seed of this run.
        sweep: id of the sweep, which groups its runs.
        page: id of the sweep's page in W&B; None when it has none.
        wandb_run: id of the run that W&B handed out; None when W&B does not choose the points.
    """
    # W&B hands out one run for each suggestion, so the other seeds of a unit get new runs.
    first = seed == unit.seeds[0]
    return Place(
        group=sweep,
        sweep_id=page,
        job_type="trial",
        tags=(job.name,),
        # The strength is not one of them: each strength has its own run, whose config contains it.
        parameters=tuple(unit.shared.items()),
        run_id=wandb_run if first else None,
        label=_label(unit, seed),
        strengths=unit.strengths,
    )


def _label(unit: Unit, seed: int) -> str:
    """Return a short label that distinguishes a unit's run from others of the sweep: `angle_rad=1.57 seed=0`."""
    # A path is shortened to its last part, unless two paths end in the same one.
    ends = [path.rpartition(".")[2] for path in unit.shared]
    short = {path: end if ends.count(end) == 1 else path for path, end in zip(unit.shared, ends, strict=True)}
    said = [f"{short[path]}={_short(value)}" for path, value in unit.shared.items() if path != "train.seed"]
    return " ".join([*said, f"seed={unit.shared.get('train.seed', seed)}"])


def _short(value: object) -> str:
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
