"""Run a sweep from its job and space to its table: begin or go on, let Ray Tune run the units, say what came out.

ROOT/sweeps/<job>/<sweep id>/   job.yaml, space.json, history.jsonl, units/, trials.parquet, summary.json, best.yaml, tune/
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from steerlab import job as jobs
from steerlab import run, tracking
from steerlab.guards import saved
from steerlab.guards.json_values import Json, JsonObject
from steerlab.job import JobError, own_code
from steerlab.run import folder as folders
from steerlab.storage import claims, plan
from steerlab.storage.store import Store
from steerlab.sweeps import conclusion, tuner
from steerlab.sweeps.agent import Agent
from steerlab.sweeps.history import History
from steerlab.sweeps.sweep_request import SweepRequest, SweepRun, concurrency
from steerlab.sweeps.trials import Say
from steerlab.sweeps.units import Unit


@dataclass(frozen=True)
class Outcome:
    """What a sweep left."""

    folder: str
    """Path below ROOT."""
    summary: conclusion.SweepSummary
    interrupted: bool


@own_code.held()
def sweep(
    request: SweepRequest,
    store: Store,
    *,
    resume: bool,
    command: str,
    say: Say = lambda line: None,
    at_once: int | None = None,
    wandb_sweep: str | None = None,
) -> Outcome:
    """Run what is left of a sweep and write what it found; Ray must be connected.

    `at_once` trials run at a time at most, None for as many as the cluster fits. `wandb_sweep` (ENTITY/PROJECT/ID) is a sweep
    of W&B that chooses the points, in place of the space's own search.

    Raises:
        ValueError: there is nothing to go on with, another process runs it, or a trial does not fit.
    """
    num_at_once = min(concurrency(request), at_once or sys.maxsize)
    agent = Agent(wandb_sweep, request.plan, request.seeds, num_at_once) if wandb_sweep is not None else None
    folder = _to_resume(request, store) if resume else f"sweeps/{request.plan.job.name}/{run.new_id()}"
    try:
        with claims.hold(store, f"sweep-{folder.rpartition('/')[2]}", wait=False):
            history = _begin(request, store, folder)
            left = len(history.pending)
            say(f"{folder}: {len(history.courses)} units, {left} left, {num_at_once} at once" if request.units else f"{folder}")
            running = SweepRun(request, store, folder, history, command, say)
            interrupted = tuner.run_units(running, num_at_once, agent)
            tracking.drain(tracking.FINISH_WAIT_S)
            return Outcome(folder, conclusion.conclude(running, interrupted), interrupted)
    except claims.Held:
        raise ValueError(f"{store.root}/{folder} is run by another process; wait for it or stop it first") from None


def _begin(request: SweepRequest, store: Store, folder: str) -> History:
    """Write down what the sweep is, or read how far it came."""
    history = History(store, folder)
    _check_units(request, [course.unit for course in history.courses.values()], f"{store.root}/{folder}/history.jsonl")
    if history.started:
        history.add("resume")
    else:
        store.write_text(f"{folder}/job.yaml", jobs.dump(request.plan.job))
        store.write_json(f"{folder}/space.json", request.described())
        store.write_json(f"{folder}/environment.json", run.environment(""))
        history.add("begin", sweep=folder.rpartition("/")[2], job=request.plan.job.name)
    for unit in request.units:
        if unit.number not in history.courses:
            history.suggest(unit)
    return history


def _check_units(request: SweepRequest, units: Iterable[Unit], where: str) -> None:
    """Refuse units of an earlier run of the sweep that this space does not give: they would set other fields of the job.

    Raises:
        ValueError: a unit is not that of its number where all are known, or sets what is no entry of the space.
    """
    known = {unit.number: json.loads(json.dumps(unit.as_dict())) for unit in request.units}
    entries = request.plan.space.fields
    for unit in units:
        if known and known.get(unit.number) != json.loads(json.dumps(unit.as_dict())):
            raise saved.SavedError(f"{where} is damaged: unit {unit.number} is none of this job, space and seeds")
        foreign = [key for trial in unit.trials for key in trial.params if key not in entries]
        if foreign:
            raise saved.SavedError(
                f"{where} is damaged: unit {unit.number} sets {foreign[0]!r:.80}, which is no entry of SPACE"
            )
        for trial in unit.trials if not known else ():
            try:
                request.plan.space.check(trial.params, f"{where} is damaged: unit {unit.number}")
            except JobError as error:
                raise saved.SavedError(str(error)) from None


def latest(request: SweepRequest, store: Store) -> str | None:
    """Return the folder of the newest sweep of the same job over the same space, None if there is none."""
    name = request.plan.job.name
    wanted = _identity(json.loads(json.dumps(request.described())), request.plan.job.model_dump(mode="json"))
    for sweep_id in reversed(store.list(f"sweeps/{name}")):
        folder = f"sweeps/{name}/{sweep_id}"
        try:
            if _identity(folders.space(store, folder), folders.job(store, folder)) == wanted:
                return folder
        except (FileNotFoundError, saved.SavedError):  # killed before it had begun, or not what was asked for
            continue
    return None


def _to_resume(request: SweepRequest, store: Store) -> str:
    found = latest(request, store)
    if found is None:
        raise ValueError(
            f"--resume: {store.root}/sweeps/{request.plan.job.name} has no sweep of this job over this space "
            "(same files, --set, --samples, --seeds)"
        )
    return found


def _identity(space: JsonObject, tree: JsonObject) -> tuple[JsonObject, Json]:
    """Return what must be equal for a sweep to be gone on with: not where space and files lie, nor how the work is spread."""
    files = space.get("files")
    places = {sha256: path for sha256, path in files.items() if isinstance(path, str)} if isinstance(files, dict) else {}
    return (
        {name: value for name, value in space.items() if name not in ("path", "files")},
        plan.replaced({name: value for name, value in tree.items() if name not in ("scale", "track")}, places),
    )
