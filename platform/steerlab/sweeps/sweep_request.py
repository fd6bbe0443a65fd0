"""A sweep as it was asked for: its units, checked before anything starts, and how many trials the cluster runs at once."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ray
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from steerlab import run
from steerlab.guards import private_parts
from steerlab.guards.json_values import JsonObject
from steerlab.job import JobError, own_code
from steerlab.run import capacity
from steerlab.stages import Plan
from steerlab.stages.spread import reserved
from steerlab.storage.store import Store
from steerlab.sweeps import results, search, trials
from steerlab.sweeps.entries import finite, is_grid
from steerlab.sweeps.history import History
from steerlab.sweeps.trial import DRIVER_MEMORY_BYTES
from steerlab.sweeps.trials import Say, SweepPlan
from steerlab.sweeps.units import Unit, grouped

SCHEMA = 1
_MOST_TRIALS = 100_000
_SEED = 0
_DEFAULT_SAMPLES = 10


@dataclass(frozen=True)
class SweepRequest:
    """A sweep as it was asked for, checked, its known units made."""

    plan: SweepPlan
    num_samples: int
    seeds: tuple[int, ...]
    units: list[Unit]
    """All of them for grid and random search; none where a searcher suggests them."""

    def described(self) -> JsonObject:
        """Return what makes this sweep another one than its neighbours."""
        space = self.plan.space.described()
        code = sorted(one.sha256 for one in own_code.codes_in([space, list(self.plan.development)]))
        return {
            "schema": SCHEMA,
            "path": str(self.plan.space.path),
            "metric": self.plan.metric,
            "mode": self.plan.mode,
            **space,
            "development": [*self.plan.development],
            "strengths": [*self.plan.strengths],
            "samples": self.num_samples,
            "seeds": [*self.seeds],
            "files": {**Plan.of(self.plan.job).files},
            **({"code": [*code]} if code else {}),
        }


@dataclass(frozen=True)
class SweepRun:
    """A sweep that runs: what was asked for, and where its record lies."""

    request: SweepRequest
    store: Store
    folder: str
    """Path below ROOT."""
    history: History
    command: str
    """The command line that started it."""
    say: Say

    def write_table(self) -> None:
        """Write trials.parquet as far as the sweep is."""
        results.write_table(self.store, f"{self.folder}/trials.parquet", results.all_rows(self.history))


def checked(found: SweepPlan, num_samples: int | None, num_seeds: int, say: Say = lambda line: None) -> SweepRequest:
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
        units = grouped(found.space.path, points, seeds, apart=True, drawn=drawn)
    trials.check(found, units, say)
    if found.space.scheduler is not None:
        _aim(found, found.space.scheduler)
    return SweepRequest(found, samples, seeds, units)


def _check_number(found: SweepPlan, samples: int, num_seeds: int) -> None:
    """Refuse more trials than anybody can read, with the arithmetic. Raises JobError."""
    grids = {entry: len(value["grid_search"]) for entry, value in found.space.entries.items() if is_grid(value)}
    factors = {**grids, "--samples": samples, "--seeds": num_seeds}
    if (number := math.prod(factors.values())) > _MOST_TRIALS:
        written = " x ".join(f"{factor:,} ({name})" for name, factor in factors.items() if factor != 1)
        raise JobError(f"{found.space.path}: {written} = {number:,} trials, more than {_MOST_TRIALS:,}")


def _aim(found: SweepPlan, scheduler: TrialScheduler) -> None:
    """Give a scheduler without a metric the loss that the training reports, and let trainings end by themselves.

    Raises:
        JobError: nothing is trained, or the scheduler would stop every trial before its training ends.
    """
    if found.job.train is None:
        raise JobError(f"{found.space.path}: SCHEDULER stops trainings early, and the job trains nothing")
    if isinstance(scheduler, AsyncHyperBandScheduler):
        values = finite(found.space.entries.get("train.steps")) or []
        steps = max((value for value in values if isinstance(value, int | float)), default=0)
        steps = steps or found.job.train.steps
        if (last := private_parts.last_step(scheduler)) < steps:
            raise JobError(f"{found.space.path}: SCHEDULER: max_t {last:g} stops every trial before its {steps} steps end")
        private_parts.let_last_trials_end(scheduler)
    metric = "eval/loss" if found.job.data.validation is not None else "train/loss"
    scheduler.set_search_properties(metric, "min")


def concurrency(request: SweepRequest) -> int:
    """Return how many trials the cluster can run at once.

    Raises:
        ValueError: a trial asks for more than the cluster can ever have, with the arithmetic.
    """
    found = request.plan
    made = [found.job_of(u.shared, u.seeds[0], u.strengths) for u in request.units] or [found.job_of({}, None, found.strengths)]
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


def check_cluster(request: SweepRequest, store: Store) -> None:
    """Refuse what the cluster or the disk cannot hold. Raises ValueError."""
    planned = Plan.of(request.plan.job_of(request.units[0].shared if request.units else {}, None, request.plan.strengths))
    capacity.check_cluster(planned, store, run.facts_of(planned))
