"""Ray Tune over the units of a sweep: what it is given, and what it is kept from."""

from __future__ import annotations

import hashlib
import logging
import os
from typing import NotRequired, TypedDict

from ray import tune
from ray.tune.search import ConcurrencyLimiter

from steerlab.guards import private_parts
from steerlab.job import own_code
from steerlab.storage.store import Store
from steerlab.sweeps import page, processes, search
from steerlab.sweeps.agent import Agent
from steerlab.sweeps.clerk import MAX_DEATHS, Clerk
from steerlab.sweeps.sweep_request import SweepRequest, SweepRun
from steerlab.sweeps.trial import DRIVER_MEMORY_BYTES, TrialRequest, UnitConfig, run_unit
from steerlab.sweeps.units import Unit, UnitRecord


class Told(TypedDict):
    """What the process of a unit is told besides the unit and its jobs (`TrialRequest` says what each is)."""

    command: str
    stoppable: NotRequired[bool]
    page: NotRequired[str | None]
    wandb_run: NotRequired[str | None]


def run_units(sweep: SweepRun, num_at_once: int, agent: Agent | None) -> bool:
    """Let Ray Tune run the units that are not settled; say whether it was interrupted."""
    request, history = sweep.request, sweep.history
    if agent is not None:
        agent.start(sweep.store, sweep.folder, history)
    suggester = agent if agent is not None else _searcher(request)
    if suggester is None and not history.pending:
        return False
    if request.plan.space.scheduler is not None:
        search.replay(request.plan.space.scheduler, history)
    page_id = page.begin(request.plan, sweep.store, sweep.folder) if agent is None else agent.sweep_id

    def config_of(unit: Unit) -> UnitConfig:
        wandb_run = agent.runs.get(unit.name) if agent is not None else None
        told: Told = {"command": sweep.command, "stoppable": agent is not None, "page": page_id, "wandb_run": wandb_run}
        return _request(request, sweep.store, sweep.folder, unit, told)

    feed = search.Feed(history, config_of, suggester)
    sweep.write_table()
    _quiet()
    processes.keep()
    try:
        _tuner(sweep, feed, num_at_once, agent).fit()
    finally:
        if agent is not None:
            agent.close()
    is_exhausted = suggester is None or (not suggester.waiting and suggester.next(history) is None)
    if not history.pending and is_exhausted:
        return False
    history.add("stop")
    return True


def _searcher(request: SweepRequest) -> search.Suggests | None:
    """Return who suggests units; None for grid and random search, whose units are all known."""
    space = request.plan.space
    if space.search_alg is None:
        return None
    return search.Suggester(space, request.plan.mode, request.plan.strengths, request.seeds, request.num_samples)


def _tuner(sweep: SweepRun, feed: search.Feed, num_at_once: int, agent: Agent | None) -> tune.Tuner:
    plan = sweep.request.plan
    clerk = Clerk(sweep.history, feed, plan.metric, plan.mode, sweep.write_table, sweep.say, sweep.store, agent)
    return tune.Tuner(
        tune.with_resources(run_unit, {"memory": DRIVER_MEMORY_BYTES}),
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(feed, max_concurrent=num_at_once),
            scheduler=plan.space.scheduler,
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=lambda trial: feed.units[trial.trial_id].name,
            trial_dirname_creator=lambda trial: feed.units[trial.trial_id].name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=f"{sweep.store.root}/{sweep.folder}",
            callbacks=[clerk],
            failure_config=tune.FailureConfig(max_failures=MAX_DEATHS),
            verbose=0,
        ),
    )


def _quiet() -> None:
    """Keep Ray Tune from writing what the history says, and from printing what nobody here reads."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # A unit's last report is its rows, which a scheduler has no use for.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _request(request: SweepRequest, store: Store, folder: str, unit: Unit, told: Told) -> UnitConfig:
    """Write down what the process that runs a unit needs to know, and return where: Ray Tune keeps what it is given."""
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
        **told,
    )
    path = f"{folder}/units/{unit.name}.json"
    store.write_json(path, trial_request.model_dump(mode="json"))
    # Read again by another process, perhaps hours later: what it runs is what was asked for here.
    digest = hashlib.sha256(store.read_bytes(path)).hexdigest()
    return {"root": store.root, "request": path, "sha256": digest, "warm": all(job.scale.warm for job in unit_jobs)}
