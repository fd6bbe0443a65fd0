"""Run a sweep: start or resume it, let Ray Tune run its units, and write the table and summary.

ROOT/sweeps/<job>/<sweep id>/   job.yaml, space.json, history.jsonl, units/, trials.parquet, summary.json, best.yaml, tune/
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from steerlab import run, tracking
from steerlab.guards import saved
from steerlab.guards.json_values import Json, JsonObject
from steerlab.job import JobError, own_code
from steerlab.run import folder as folders
from steerlab.run import job_files
from steerlab.storage import claims, plan
from steerlab.storage.store import Store
from steerlab.sweeps import conclusion, tuner
from steerlab.sweeps.agent import Agent
from steerlab.sweeps.history import History
from steerlab.sweeps.sweep_request import SweepRequest, SweepRun, concurrency
from steerlab.sweeps.trials import Say
from steerlab.sweeps.units import Unit
from steerlab.tracking import writer_process


@dataclass(frozen=True)
class Outcome:
    """Result of `sweep`, complete or interrupted, for the command that prints it."""

    folder: str
    """The sweep's folder, relative to ROOT."""
    summary: conclusion.SweepSummary
    interrupted: bool
    """True if units are still pending, for example after Ctrl-C."""


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
    """Run the pending units of a sweep and write its results; Ray must be connected.

    Args:
        request: the checked sweep.
        store: ROOT.
        resume: continue the newest sweep of the same job over the same space instead of starting a new one.
        command: the command line, for the record.
        say: prints a line for the user.
        at_once: largest number of trials that run at the same time; None for as many as fit on the cluster.
        wandb_sweep: ENTITY/PROJECT/ID of a W&B sweep that chooses the points instead of the space's own search; None for
            the space's own search.

    Raises:
        ValueError: no sweep can be resumed, another process runs it, or a trial does not fit on the cluster.
    """
    # Checked before the sweep has a folder, since a trial that can never fit on the cluster should not create files.
    num_at_once = min(concurrency(request), at_once or sys.maxsize)
    agent = Agent(wandb_sweep, request.plan, request.seeds, num_at_once) if wandb_sweep is not None else None
    folder = _to_resume(request, store) if resume else f"sweeps/{request.plan.job.name}/{run.new_id()}"
    try:
        # Two processes that resume one sweep would both append to its history.
        with claims.hold(store, f"sweep-{folder.rpartition('/')[2]}", wait=False, say=say):
            history = _begin(request, store, folder)
            left = len(history.pending)
            say(f"{folder}: {len(history.courses)} units, {left} left, {num_at_once} at once" if request.units else f"{folder}")
            running = SweepRun(request, store, folder, history, command, say)
            interrupted = tuner.run_units(running, num_at_once, agent)
            # The trials do not wait until W&B has their metrics, so the sweep waits once for all of them.
            writer_process.drain(tracking.FINISH_WAIT_S)
            return Outcome(folder, conclusion.conclude(running, interrupted), interrupted)
    except claims.Held as held:
        raise ValueError(f"{store.where(folder)} is run by another process ({held}); wait for it or stop it first") from None


def _begin(request: SweepRequest, store: Store, folder: str) -> History:
    """Record the start of a sweep, or its resumption; return the history."""
    history = History(store, folder)
    _check_units(request, [course.unit for course in history.courses.values()], store.where(folder, "history.jsonl"))
    if history.started:
        history.add("resume")
    else:
        job_files.write(store, f"{folder}/job.yaml", request.plan.job)
        store.write_json(f"{folder}/space.json", request.described())
        store.write_json(f"{folder}/environment.json", run.environment(""))
        history.add("begin", sweep=folder.rpartition("/")[2], job=request.plan.job.name)
    # If the process dies in the middle of this loop, the resumed sweep adds the remaining units.
    for unit in request.units:
        if unit.number not in history.courses:
            history.suggest(unit)
    return history


def _check_units(request: SweepRequest, units: Iterable[Unit], where: str) -> None:
    """Refuse units in the history that do not come from this job and space.

    Raises:
        ValueError: a unit differs from the request's unit of the same number, or sets a field that is not in the space.
    """
    # A sweep folder may come from another person, and a value in it could name a file that the job would load or run.
    # Grid and random search know all units in advance; a searcher's units can only be checked against the space.
    expected = {unit.number: json.loads(json.dumps(unit.as_dict())) for unit in request.units}
    entries = request.plan.space.fields
    for unit in units:
        if expected and expected.get(unit.number) != json.loads(json.dumps(unit.as_dict())):
            raise saved.SavedError(f"{where} is damaged: unit {unit.number} does not belong to this job, space and seeds")
        foreign = [key for trial in unit.trials for key in trial.params if key not in entries]
        if foreign:
            raise saved.SavedError(
                f"{where} is damaged: unit {unit.number} sets {foreign[0]!r:.80}, which is not an entry of SPACE"
            )
        for trial in unit.trials if not expected else ():
            try:
                request.plan.space.check(trial.params, f"{where} is damaged: unit {unit.number}")
            except JobError as error:
                raise saved.SavedError(str(error)) from None


def latest(request: SweepRequest, store: Store) -> str | None:
    """Return the folder of the newest sweep of the same job over the same space; None if there is none."""
    name = request.plan.job.name
    # Converted through JSON, because the stored request has lists where the request in memory has tuples.
    wanted = _identity(json.loads(json.dumps(request.described())), request.plan.job.model_dump(mode="json"))
    # Ids begin with the time, so the last one is the newest.
    for sweep_id in reversed(store.list(f"sweeps/{name}")):
        folder = f"sweeps/{name}/{sweep_id}"
        try:
            if _identity(folders.space(store, folder), folders.job(store, folder)) == wanted:
                return folder
        except (FileNotFoundError, saved.SavedError):  # killed before both files were written, or damaged
            continue
    return None


def has_unfinished(request: SweepRequest, store: Store) -> bool:
    """Return whether the newest sweep of the same job over the same space has not finished."""
    folder = latest(request, store)
    return folder is not None and "summary.json" not in store.list(folder)


def _to_resume(request: SweepRequest, store: Store) -> str:
    folder = latest(request, store)
    if folder is None:
        raise ValueError(
            f"--resume: {store.where('sweeps', request.plan.job.name)} has no sweep of this job over this space "
            "(same files, SPACE, SEEDS, --set, --samples, --seeds)"
        )
    return folder


def _identity(space: JsonObject, tree: JsonObject) -> tuple[JsonObject, Json]:
    """Return the parts of a sweep's space and job that must be equal for it to be resumed."""
    # Paths are ignored, since the same files may be elsewhere (their hashes identify them), and so are `scale` and `track`,
    # which do not change results.
    files = space.get("files")
    places = {sha256: path for sha256, path in files.items() if isinstance(path, str)} if isinstance(files, dict) else {}
    return (
        {name: value for name, value in space.items() if name not in ("path", "files")},
        plan.replaced({name: value for name, value in tree.items() if name not in ("scale", "track")}, places),
    )
