"""Run the units of a sweep with Ray Tune: configure it, write the request of each unit, and disable its own logs."""

from __future__ import annotations

import hashlib
import logging
import os
from functools import partial
from typing import NotRequired, TypedDict

from ray import tune
from ray.tune.search import ConcurrencyLimiter

from steerlab.guards import private_parts
from steerlab.job import own_code
from steerlab.storage.store import Store
from steerlab.sweeps import outcomes, page, processes, search
from steerlab.sweeps.agent import Agent
from steerlab.sweeps.clerk import MAX_DEATHS, Clerk
from steerlab.sweeps.sweep_request import SweepRequest, SweepRun
from steerlab.sweeps.trial import DRIVER_MEMORY_BYTES, TrialRequest, UnitConfig, run_unit
from steerlab.sweeps.units import Unit, UnitRecord


class UnitContext(TypedDict):
    """Fields of a `TrialRequest` that do not depend on the unit and its jobs."""

    command: str
    stoppable: NotRequired[bool]
    page: NotRequired[str | None]
    wandb_run: NotRequired[str | None]


def run_units(sweep: SweepRun, num_at_once: int, agent: Agent | None) -> bool:
    """Run the units that are not settled.

    Args:
        sweep: the sweep.
        num_at_once: largest number of units that run at the same time.
        agent: W&B's choice of points; None for the space's own search.

    Returns:
        True if the sweep was interrupted, with units still to run.
    """
    request, history = sweep.request, sweep.history
    if agent is not None:
        agent.start(sweep.store, sweep.folder, history)
    suggester = agent if agent is not None else _searcher(request)
    if suggester is None and not history.pending:
        return False
    if request.plan.space.scheduler is not None:
        # Only settled units are replayed: a pending unit runs again and reports its steps itself.
        search.replay(request.plan.space.scheduler, history)
    page_id = page.begin(request.plan, sweep.store, sweep.folder) if agent is None else agent.sweep_id

    def config_of(unit: Unit) -> UnitConfig:
        wandb_run = agent.runs.get(unit.name) if agent is not None else None
        context: UnitContext = {
            "command": sweep.command,
            "stoppable": agent is not None,
            "page": page_id,
            "wandb_run": wandb_run,
        }
        return _request(request, sweep.store, sweep.folder, unit, context)

    feed = search.Feed(history, config_of, suggester)
    sweep.write_table()
    _quiet()
    processes.keep()
    # Ray Tune handles Ctrl-C itself and returns from `fit`, so an interruption is recognised by the remaining units.
    try:
        _tuner(sweep, feed, num_at_once, agent).fit()
    finally:
        if agent is not None:
            agent.close()
    # One more unit is requested, since Ray Tune may have returned before the searcher reported its end.
    is_exhausted = suggester is None or (not suggester.waiting and suggester.next(history) is None)
    if not history.pending and is_exhausted:
        return False
    history.add("stop")
    return True


def _searcher(request: SweepRequest) -> search.Suggests | None:
    """Return the search over the space; None for grid and random search, whose units are all in the request."""
    space = request.plan.space
    if space.search_alg is None:
        return None
    return search.Suggester(space, request.plan.mode, request.plan.strengths, request.seeds, request.num_samples)


def _tuner(sweep: SweepRun, feed: search.Feed, num_at_once: int, agent: Agent | None) -> tune.Tuner:
    plan = sweep.request.plan
    filesystem, base = sweep.store.opened(sweep.folder)
    clerk = Clerk(
        sweep.history,
        feed,
        plan.metric,
        plan.mode,
        sweep.write_table,
        sweep.say,
        sweep.store,
        agent,
        partial(outcomes.keeps_all, plan),
    )
    return tune.Tuner(
        tune.with_resources(run_unit, {"memory": DRIVER_MEMORY_BYTES}),
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(feed, max_concurrent=num_at_once),
            scheduler=plan.space.scheduler,
            num_samples=-1,  # until the searcher returns FINISHED
            reuse_actors=True,  # the next unit runs in a process that has already imported everything
            # Folders are named as in the history, instead of by Ray Tune's random ids.
            trial_name_creator=lambda trial: feed.units[trial.trial_id].name,
            trial_dirname_creator=lambda trial: feed.units[trial.trial_id].name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=base,
            storage_filesystem=filesystem,
            callbacks=[clerk],
            # A restarted process takes finished stages from the store and resumes a training from its checkpoint.
            failure_config=tune.FailureConfig(max_failures=MAX_DEATHS),
            verbose=0,
        ),
    )


def _quiet() -> None:
    """Turn off Ray Tune's own log files and progress tables: the history contains the same information."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # Ray Tune refuses reports without the scheduler's metric, and a unit's last report holds only its outcome.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _request(request: SweepRequest, store: Store, folder: str, unit: Unit, context: UnitContext) -> UnitConfig:
    """Write a unit's request to a file of the sweep, and return the configuration for its process, which refers to the file."""
    # Ray Tune keeps every configuration in memory and writes it to its state, so the configuration does not contain the jobs.
    plan, scheduler = request.plan, request.plan.space.scheduler
    unit_jobs = [plan.job_of(unit.shared, seed, unit.strengths) for seed in unit.seeds]
    trees = [job.model_dump(mode="json") for job in unit_jobs]
    trial_request = TrialRequest(
        sweep=folder.rpartition("/")[2],
        unit=UnitRecord.of(unit),
        jobs=tuple(trees),
        metric=plan.metric,
        within=plan.job.choose.within if plan.job.choose is not None and plan.development else None,
        watched=None if scheduler is None else private_parts.metric_of(scheduler),
        code=own_code.codes_in(trees),
        **context,
    )
    path = f"{folder}/units/{unit.name}.json"
    store.write_json(path, trial_request.model_dump(mode="json"))
    # Another process reads the file, perhaps hours later. The hash ensures that it runs exactly this request.
    digest = hashlib.sha256(store.read_bytes(path)).hexdigest()
    return {"root": store.root, "request": path, "sha256": digest, "warm": all(job.scale.warm for job in unit_jobs)}
