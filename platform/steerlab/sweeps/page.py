"""A sweep in Weights & Biases: its page, where its trials stand on it, and sweeps whose values W&B chooses.

With `--backend wandb` the points come from a sweep that was defined in its page (`steerlab wandb-sweep` writes the YAML); they
become units like any others, so stages are shared, and a restart goes on with the trials that the history has.
"""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

from steerlab.job import Job, JobError
from steerlab.store import Store
from steerlab.sweeps.history import History
from steerlab.sweeps.search import with_strengths
from steerlab.sweeps.space import Space, finite
from steerlab.sweeps.trials import Plan, Trial, Unit, trial_id
from steerlab.tracking import Place, sweeps
from steerlab.wandb_space import sweep_config

RUNS = "wandb_runs.json"
_POLL_S = 3.0


def begin(found: Plan, store: Store, folder: str) -> str | None:
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
    return sweeps.begin(found.job.track, config, directory)


def _apart(entries: dict[str, Any]) -> dict[str, Any]:
    """Name each field that an entry sets by itself: that is how trials name them."""
    single: dict[str, Any] = {}
    for entry, value in entries.items():
        keys, values = [key.strip() for key in entry.split(",")], finite(value)
        if len(keys) == 1 or values is None:
            single[entry] = value
            continue
        for number, key in enumerate(keys):
            distinct = {repr(one[number]): one[number] for one in values}
            single[key] = {"grid_search": list(distinct.values())}
    return single


def place_of(request: dict[str, Any], unit: Unit, job: Job, seed: int) -> Place:
    """Return where a trial's run stands: in the sweep's group and on its page, with what it varies."""
    varied = {**unit.shared, **({"strength": list(unit.strengths)} if len(unit.strengths) > 1 else {})}
    first = seed == unit.seeds[0]
    return Place(
        group=request["sweep"],
        sweep_id=request["page"],
        job_type="trial",
        tags=(job.name,),
        parameters=tuple(varied.items()),
        run_id=request["wandb_run"] if first else None,
    )


class Agent:
    """Makes units of what a W&B sweep asks for; stands where Optuna would."""

    def __init__(self, path: str, found: Plan, seeds: tuple[int, ...], store: Store, folder: str) -> None:
        self._agent = sweeps.Agent(path)
        self._space, self._strengths, self._seeds = found.space, found.strengths, seeds
        self._store, self._file = store, f"{folder}/{RUNS}"
        self._asked_s = 0.0
        try:
            self.runs: dict[str, str] = store.read_json(self._file)
        except FileNotFoundError:
            self.runs = {}

    @property
    def waiting(self) -> bool:
        """Whether more may come."""
        return not self._agent.ended or bool(self._agent.suggestions)

    def next(self, history: History) -> Unit | None:
        """Return the next unit; None where W&B has none now."""
        if not self._agent.suggestions and not self._agent.ended and time.monotonic() - self._asked_s > _POLL_S:
            running = [course.unit.name for course in history.courses.values() if not course.settled]
            self._agent.poll([self.runs[name] for name in running if name in self.runs])
            self._asked_s = time.monotonic()
        if not self._agent.suggestions:
            return None
        suggestion = self._agent.suggestions.pop(0)
        point = point_of(self._space, suggestion.parameters)
        trials = tuple(Trial(trial_id(one), one) for one in with_strengths(point, self._strengths))
        unit = Unit(len(history.courses) + 1, trials, self._seeds)
        self.runs[unit.name] = suggestion.run_id
        self._store.write_json(self._file, self.runs)
        return unit


def point_of(space: Space, parameters: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that W&B's values set.

    Raises:
        JobError: W&B's sweep has a parameter that the space lacks: they were not made of the same file.
    """
    point: dict[str, Any] = {}
    for entry, value in parameters.items():
        if entry not in space.entries:
            raise JobError(f"W&B's sweep varies {entry}, which {space.path} does not: {json.dumps(sorted(space.entries))}")
        point |= space.spread(entry, value)
    return point
