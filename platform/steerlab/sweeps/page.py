"""A sweep's page in Weights & Biases, and where its trials stand on it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path

from steerlab.job import Job
from steerlab.storage.store import Store
from steerlab.sweeps.entries import Entry, finite
from steerlab.sweeps.trials import SweepPlan
from steerlab.sweeps.units import Unit
from steerlab.tracking import Place
from steerlab.tracking.wandb_client import sweep_page
from steerlab.tracking.wandb_client.parameters import sweep_config


def begin(found: SweepPlan, store: Store, folder: str) -> str | None:
    """Make the sweep's page, or find it again; None where the job is not tracked online or W&B does not answer."""
    if found.job.track.wandb is None:
        return None
    local = Path(store.root.removeprefix("file://")) / folder
    directory = local if store.is_local else Path.home() / ".cache/steerlab/wandb" / folder.rpartition("/")[2]
    try:
        config = sweep_config(found.job.name, _apart(found.space.entries), found.metric, found.mode)
    except ValueError as error:
        warnings.warn(f"{error}: the sweep's page in W&B names no such parameter", stacklevel=2)
        config = sweep_config(found.job.name, {}, found.metric, found.mode)
    return sweep_page.begin(found.job.track, config, directory)


def _apart(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """Name each field that an entry sets by itself: that is how trials name them."""
    single: dict[str, Entry] = {}
    for entry, value in entries.items():
        keys, values = [key.strip() for key in entry.split(",")], finite(value)
        if len(keys) == 1 or values is None:
            single[entry] = value
            continue
        for number, key in enumerate(keys):
            distinct = {repr(one[number]): one[number] for one in values if isinstance(one, list)}
            single[key] = {"grid_search": list(distinct.values())}
    return single


def place_of(unit: Unit, job: Job, seed: int, *, sweep: str, page: str | None, wandb_run: str | None) -> Place:
    """Return where a trial's run stands: in the sweep's group and on its page, with what it varies.

    `page` is the id of W&B's sweep, `wandb_run` that of the run that it has asked for.
    """
    varied = {**unit.shared, **({"strength": [*unit.strengths]} if len(unit.strengths) > 1 else {})}
    first = seed == unit.seeds[0]
    return Place(
        group=sweep,
        sweep_id=page,
        job_type="trial",
        tags=(job.name,),
        parameters=tuple(varied.items()),
        run_id=wandb_run if first else None,
    )
