"""Run a sweep from its job and space to its table: begin or go on, let Ray Tune run the units, say what came out.

ROOT/sweeps/<job>/<sweep id>/   job.yaml, space.json, history.jsonl, units/, trials.parquet, summary.json, best.yaml, tune/
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import ConcurrencyLimiter

from steerlab import job as jobs
from steerlab import run, tracking
from steerlab.guards import private_parts, saved
from steerlab.job import Job, JobError, own_code
from steerlab.run import capacity
from steerlab.run import folder as folders
from steerlab.stages import Plan
from steerlab.stages.spread import reserved
from steerlab.storage import claims, plan
from steerlab.storage.store import Store
from steerlab.sweeps import page, processes, results, search, trials
from steerlab.sweeps.agent import Agent
from steerlab.sweeps.clerk import MAX_DEATHS, Clerk
from steerlab.sweeps.entries import finite, is_grid
from steerlab.sweeps.history import History
from steerlab.sweeps.trial import DRIVER_MEMORY_BYTES, TrialRequest, run_unit
from steerlab.sweeps.trials import Say, SweepPlan, Unit

SCHEMA = 1
_MOST_TRIALS = 100_000
_SEED = 0
_DEFAULT_SAMPLES = 10


@dataclass(frozen=True)
class Asked:
    """A sweep as it was asked for, checked, its known units made."""

    plan: SweepPlan
    num_samples: int
    seeds: tuple[int, ...]
    units: list[Unit]
    """All of them for grid and random search; none where a searcher suggests them."""

    def described(self) -> dict[str, Any]:
        """Return what makes this sweep another one than its neighbours."""
        space = self.plan.space.described()
        code = sorted(one.sha256 for one in own_code.codes_in([space, list(self.plan.development)]))
        return {
            "schema": SCHEMA,
            "path": str(self.plan.space.path),
            "metric": self.plan.metric,
            "mode": self.plan.mode,
            **space,
            "development": list(self.plan.development),
            "strengths": list(self.plan.strengths),
            "samples": self.num_samples,
            "seeds": list(self.seeds),
            "files": Plan.of(self.plan.job).places,
            **({"code": code} if code else {}),
        }


@dataclass(frozen=True)
class Outcome:
    """What a sweep left."""

    folder: str
    """Path below ROOT."""
    summary: dict[str, Any]
    interrupted: bool


def asked(found: SweepPlan, num_samples: int | None, num_seeds: int, say: Say = lambda line: None) -> Asked:
    """Make the units of a sweep and check them; nothing is started. `say` is told how far that is, where it takes long.

    Raises:
        ValueError: with one message for people.
    """
    seeds = trials.seeds_of(found, num_seeds)
    entries = found.space.entries
    drawn = any(not is_grid(entry) and finite(entry) != [entry] for entry in entries.values())
    samples = num_samples or (_DEFAULT_SAMPLES if drawn else 1)
    if samples > 1 and not drawn:
        raise JobError(f"--samples {samples}: {found.space.path} is a grid, in which every point counts once")
    units: list[Unit] = []
    _check_number(found, samples, len(seeds))
    if found.space.search_alg is None:
        points = search.drawn_points(found.space, found.strengths, samples, _SEED)
        units = trials.grouped(found, points, seeds, apart=True, drawn=drawn)
    trials.check(found, units, say)
    if found.space.scheduler is not None:
        _aim(found)
    return Asked(found, samples, seeds, units)


def _check_number(found: SweepPlan, samples: int, num_seeds: int) -> None:
    """Refuse more trials than anybody can read, with the arithmetic. Raises JobError."""
    grids = {entry: len(value["grid_search"]) for entry, value in found.space.entries.items() if is_grid(value)}
    factors = {**grids, "--samples": samples, "--seeds": num_seeds}
    if (number := math.prod(factors.values())) > _MOST_TRIALS:
        written = " x ".join(f"{factor:,} ({name})" for name, factor in factors.items() if factor != 1)
        raise JobError(f"{found.space.path}: {written} = {number:,} trials, more than {_MOST_TRIALS:,}")


def _aim(found: SweepPlan) -> None:
    """Give a scheduler without a metric the loss that the training reports, and let trainings end by themselves.

    Raises:
        JobError: nothing is trained, or the scheduler would stop every trial before its training ends.
    """
    if found.job.train is None:
        raise JobError(f"{found.space.path}: SCHEDULER stops trainings early, and the job trains nothing")
    scheduler: Any = found.space.scheduler
    if isinstance(scheduler, AsyncHyperBandScheduler):
        steps = max((value for value in finite(found.space.entries.get("train.steps")) or [] if value), default=0)
        steps = steps or found.job.train.steps
        if (last := private_parts.last_step(scheduler)) < steps:
            raise JobError(f"{found.space.path}: SCHEDULER: max_t {last:g} stops every trial before its {steps} steps end")
        private_parts.let_last_trials_end(scheduler)
    metric = "eval/loss" if found.job.data.validation is not None else "train/loss"
    scheduler.set_search_properties(metric, "min")


def concurrency(asked: Asked) -> int:
    """Return how many trials the cluster can run at once.

    Raises:
        ValueError: a trial asks for more than the cluster can ever have, with the arithmetic.
    """
    found = asked.plan
    made = [found.job_of(u.shared, u.seeds[0], u.strengths) for u in asked.units] or [found.job_of({}, None, found.strengths)]
    scales = {job.scale.model_dump_json(): job.scale for job in made}.values()
    available = reserved.available()
    largest = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
    fits = []
    for scale in scales:
        reserved.check(scale)
        workers, cpus = scale.worker_range[0], scale.cpus_per_worker
        if cpus > max(largest, available["CPU"] if len(ray.nodes()) == 1 else 0.0):
            raise ValueError(f"scale.cpus_per_worker {cpus:g}, but the largest node has {largest:g} CPUs")
        fits.append(available["CPU"] / (workers * cpus))
        if reserved.uses_gpu(scale):
            fits.append(available["GPU"] / workers)
    fits.append(ray.cluster_resources().get("memory", 0) / DRIVER_MEMORY_BYTES)
    return max(1, int(min(fits)))


@own_code.held()
def sweep(
    asked: Asked,
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
    num_at_once = min(concurrency(asked), at_once or sys.maxsize)
    agent = Agent(wandb_sweep, asked.plan, asked.seeds, num_at_once) if wandb_sweep is not None else None
    folder = _to_resume(asked, store) if resume else f"sweeps/{asked.plan.job.name}/{run.new_id()}"
    try:
        with claims.hold(store, f"sweep-{folder.rpartition('/')[2]}", wait=False):
            history = _begin(asked, store, folder)
            left = len(history.pending)
            say(f"{folder}: {len(history.courses)} units, {left} left, {num_at_once} at once" if asked.units else f"{folder}")
            interrupted = _run(asked, store, folder, history, num_at_once, command, say, agent)
            tracking.drain(tracking.FINISH_WAIT_S)
            return Outcome(folder, _conclude(asked, store, folder, history, interrupted, command, say), interrupted)
    except claims.Held:
        raise ValueError(f"{store.root}/{folder} is run by another process; wait for it or stop it first") from None


def _begin(asked: Asked, store: Store, folder: str) -> History:
    """Write down what the sweep is, or read how far it came."""
    history = History(store, folder)
    _check_units(asked, [course.unit for course in history.courses.values()], f"{store.root}/{folder}/history.jsonl")
    if history.started:
        history.add("resume")
    else:
        store.write_text(f"{folder}/job.yaml", jobs.dump(asked.plan.job))
        store.write_json(f"{folder}/space.json", asked.described())
        store.write_json(f"{folder}/environment.json", run.environment(""))
        history.add("begin", sweep=folder.rpartition("/")[2], job=asked.plan.job.name)
    for unit in asked.units:
        if unit.number not in history.courses:
            history.suggest(unit)
    return history


def _check_units(asked: Asked, units: Iterable[Unit], where: str) -> None:
    """Refuse units of an earlier run of the sweep that this space does not give: they would set other fields of the job.

    Raises:
        ValueError: a unit is not that of its number where all are known, or sets what is no entry of the space.
    """
    known = {unit.number: json.loads(json.dumps(unit.as_dict())) for unit in asked.units}
    entries = asked.plan.space.fields
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
                asked.plan.space.check(trial.params, f"{where} is damaged: unit {unit.number}")
            except JobError as error:
                raise saved.SavedError(str(error)) from None


def latest(asked: Asked, store: Store) -> str | None:
    """Return the folder of the newest sweep of the same job over the same space, None if there is none."""
    name = asked.plan.job.name
    wanted = _identity(json.loads(json.dumps(asked.described())), asked.plan.job.model_dump(mode="json"))
    for sweep_id in reversed(store.list(f"sweeps/{name}")):
        folder = f"sweeps/{name}/{sweep_id}"
        try:
            if _identity(folders.space(store, folder), folders.job(store, folder)) == wanted:
                return folder
        except (FileNotFoundError, saved.SavedError):  # killed before it had begun, or not what was asked for
            continue
    return None


def _to_resume(asked: Asked, store: Store) -> str:
    found = latest(asked, store)
    if found is None:
        raise ValueError(
            f"--resume: {store.root}/sweeps/{asked.plan.job.name} has no sweep of this job over this space "
            "(same files, --set, --samples, --seeds)"
        )
    return found


def _identity(space: dict[str, Any], tree: dict[str, Any]) -> tuple[Any, Any]:
    """Return what must be equal for a sweep to be gone on with: not where space and files lie, nor how the work is spread."""
    files = space.get("files", {})
    return (
        {name: value for name, value in space.items() if name not in ("path", "files")},
        plan.replaced({name: value for name, value in tree.items() if name not in ("scale", "track")}, files),
    )


def _run(
    asked: Asked,
    store: Store,
    folder: str,
    history: History,
    num_at_once: int,
    command: str,
    say: Say,
    agent: Agent | None,
) -> bool:
    """Let Ray Tune run what is not settled; say whether it was interrupted."""
    suggester: search.Suggests | None = agent
    if agent is not None:
        agent.start(store, folder, history)
    elif asked.plan.space.search_alg is not None:
        space, mode = asked.plan.space, asked.plan.mode
        suggester = search.Suggester(space, mode, asked.plan.strengths, asked.seeds, asked.num_samples)
    elif not history.pending:
        return False
    scheduler = asked.plan.space.scheduler
    if scheduler is not None:
        search.replay(scheduler, history)
    sweep_id = page.begin(asked.plan, store, folder) if agent is None else agent.sweep_id

    def request(unit: Unit) -> dict[str, Any]:
        shown = {"page": sweep_id, "wandb_run": agent.runs.get(unit.name) if agent is not None else None}
        return _request(asked, store, folder, unit, {"command": command, "stoppable": agent is not None, **shown})

    feed = search.Feed(history, request, suggester)
    write = lambda: results.write_table(store, f"{folder}/trials.parquet", results.all_rows(history))  # noqa: E731
    write()
    _quiet()
    processes.keep()
    tuner = tune.Tuner(
        tune.with_resources(run_unit, {"memory": DRIVER_MEMORY_BYTES}),
        tune_config=tune.TuneConfig(
            search_alg=ConcurrencyLimiter(feed, max_concurrent=num_at_once),
            scheduler=scheduler,
            num_samples=-1,
            reuse_actors=True,
            trial_name_creator=lambda trial: feed.units[trial.trial_id].name,
            trial_dirname_creator=lambda trial: feed.units[trial.trial_id].name,
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=f"{store.root}/{folder}",
            callbacks=[Clerk(history, feed, asked.plan.metric, asked.plan.mode, write, say, store, agent)],
            failure_config=tune.FailureConfig(max_failures=MAX_DEATHS),
            verbose=0,
        ),
    )
    try:
        tuner.fit()
    finally:
        if agent is not None:
            agent.close()
    is_exhausted = suggester is None or (not suggester.waiting and suggester.next(history) is None)
    if not history.pending and is_exhausted:
        return False
    history.add("stop")
    return True


def _quiet() -> None:
    """Keep Ray Tune from writing what the history says, and from printing what nobody here reads."""
    os.environ.setdefault("TUNE_DISABLE_AUTO_CALLBACK_LOGGERS", "1")
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    # A unit's last report is its rows, which a scheduler has no use for.
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    for name in ("ray.tune", "ray.train"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _request(asked: Asked, store: Store, folder: str, unit: Unit, told: dict[str, Any]) -> dict[str, Any]:
    """Write down what the process that runs a unit needs to know, and return where: Ray Tune keeps what it is given."""
    made = [asked.plan.job_of(unit.shared, seed, unit.strengths) for seed in unit.seeds]
    choose = asked.plan.job.choose
    bound = choose.within if choose is not None and asked.plan.development else None
    scheduler: Any = asked.plan.space.scheduler
    trees = [job.model_dump(mode="json") for job in made]
    request = TrialRequest(
        sweep=folder.rpartition("/")[2],
        unit=unit.as_dict(),
        jobs=tuple(trees),
        metric=asked.plan.metric,
        within=bound,
        watched=private_parts.metric_of(scheduler),
        code=own_code.codes_in(trees),
        **told,
    )
    path = f"{folder}/units/{unit.name}.json"
    store.write_json(path, request.model_dump(mode="json"))
    # Read again by another process, perhaps hours later: what it runs is what was asked for here.
    digest = hashlib.sha256(store.read_bytes(path)).hexdigest()
    return {"root": store.root, "request": path, "sha256": digest, "warm": all(job.scale.warm for job in made)}


def _conclude(
    asked: Asked, store: Store, folder: str, history: History, interrupted: bool, command: str, say: Say
) -> dict[str, Any]:
    """Write table and summary; of a sweep that is complete, also what the best trial measures on the rows that report."""
    rows = results.all_rows(history)
    results.write_table(store, f"{folder}/trials.parquet", rows)
    metric = asked.plan.metric
    found = results.scored(rows, metric)
    best = results.best_of(found, asked.plan.mode)
    statuses = [row["status"] for row in rows]
    summary: dict[str, Any] = {
        "schema": SCHEMA,
        "metric": metric,
        "mode": asked.plan.mode,
        "complete": not interrupted,
        "best": None,
        "indistinguishable": None,
        "development": None,
        "test": None,
        "counts": {"trials": len({row["trial_id"] for row in rows})} | {s: statuses.count(s) for s in sorted(set(statuses))},
        "seconds": results.seconds_of(rows),
    }
    if best is not None:
        summary["best"] = results.best_line(best, metric)
        if asked.plan.development:
            summary["development"] = results.metrics_of_rows(best.rows)
        store.write_text(f"{folder}/best.yaml", jobs.dump(_best_job(asked.plan, best, None)))
    if best is not None and not interrupted:
        summary["indistinguishable"] = results.indistinguishable(found, best, metric, store)
        say(f"best: trial {best.trial_id}, {metric} {best.value:.4g}" + "; its own tasks follow" * bool(asked.plan.development))
        summary |= _tested(asked, store, folder, best, command)
    store.write_json(f"{folder}/summary.json", summary)
    if not interrupted:
        history.add("end")
    return summary


def _tested(asked: Asked, store: Store, folder: str, best: results.Scored, command: str) -> dict[str, Any]:
    """Return what the best trial measures on the rows of the job's own tasks, and the runs that say so.

    Without development rows these are the rows that it was chosen by, so its own runs have said it already.
    """
    if not asked.plan.development:
        return {"test": results.metrics_of_rows(best.rows), "test_runs": [row["run"] for row in best.rows]}
    done = [_report(_best_job(asked.plan, best, seed), store, folder, seed, command) for seed in asked.seeds]
    names = done[0].summary["metrics"]
    found = {name: results.over_seeds([result.summary["metrics"][name] for result in done]) for name in names}
    return {"test": found, "test_runs": [result.folder for result in done]}


def _best_job(found: SweepPlan, best: results.Scored, seed: int | None) -> Job:
    params = {name.removeprefix("param."): value for name, value in best.rows[0].items() if name.startswith("param.")}
    return found.best_job(params, seed)


def _report(job: Job, store: Store, folder: str, seed: int, command: str) -> run.Run:
    """Run the best trial's own tasks: those of the job, on the rows that nothing was chosen by."""
    if job.scale.worker_range == (1, 1) and job.scale.warm is None:
        job = job.model_copy(update={"scale": job.scale.model_copy(update={"warm": not reserved.uses_gpu(job.scale)})})
    run_id = f"{folder.rpartition('/')[2]}-best-{seed}"
    return run.execute(Plan.of(job), store, plan.Listener(), command, run_id=run_id)


def check_cluster(asked: Asked, store: Store) -> None:
    """Refuse what the cluster or the disk cannot hold. Raises ValueError."""
    planned = Plan.of(asked.plan.job_of(asked.units[0].shared if asked.units else {}, None, asked.plan.strengths))
    capacity.check_cluster(planned, store, run.facts_of(planned))
