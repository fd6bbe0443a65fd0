"""The request for a sweep: make its units, check everything before it starts, and count the trials that fit on the cluster."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ray
from ray.tune.schedulers import AsyncHyperBandScheduler, TrialScheduler

from steerlab import run
from steerlab.guards import private_parts
from steerlab.guards.json_values import Json, JsonObject
from steerlab.job import SEED_LIMIT, JobError, own_code
from steerlab.run import capacity, length
from steerlab.stages import Plan
from steerlab.stages.spread import reserved
from steerlab.storage.store import Store
from steerlab.sweeps import results, search, trials
from steerlab.sweeps.history import History
from steerlab.sweeps.space_entries import extremes, finite, is_grid
from steerlab.sweeps.trial import DRIVER_MEMORY_BYTES
from steerlab.sweeps.trials import Say, SweepPlan
from steerlab.sweeps.units import Unit, grouped

SCHEMA = 1
"""Version of the formats of space.json and of a sweep's summary.json."""
_MOST_TRIALS = 100_000
"""Largest number of trials; more are probably a mistake in the space."""
_SEED = 0
"""Seed of random search. It is fixed, because a resumed sweep must draw the same points."""
_DEFAULT_SAMPLES = 10


@dataclass(frozen=True)
class SweepRequest:
    """A sweep that has been checked and can start: its plan, units and seeds."""

    plan: SweepPlan
    num_samples: int
    """Points to draw, or the number of units for a searcher."""
    seeds: tuple[int, ...]
    """Seeds of every trial: those of its training, and of what SEEDS sets."""
    units: list[Unit]
    """All units of a grid or random search; empty when a searcher or W&B suggests them."""

    def described(self) -> JsonObject:
        """Return the content of space.json: everything that distinguishes this sweep from other sweeps of the same job."""
        space = self.plan.space.described()
        settings = self.plan.space.seeds[: len(self.seeds)]
        code = sorted(code.sha256 for code in own_code.codes_in([space, list(self.plan.development)]))
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
            # Those of the seeds that run: further entries of SEEDS change nothing. Left out when empty, so that sweeps from
            # before SEEDS existed can be resumed.
            **({"seed_settings": [dict(own) for own in settings]} if settings else {}),
            "files": {**Plan.of(self.plan.job).files},
            **({"code": [*code]} if code else {}),
        }


@dataclass(frozen=True)
class SweepRun:
    """A running sweep: its request, and the location of its files."""

    request: SweepRequest
    store: Store
    folder: str
    """The sweep's folder, relative to ROOT."""
    history: History
    command: str
    """The command line that started it."""
    say: Say
    """Prints a line for the user."""

    def write_table(self) -> None:
        """Write trials.parquet with the results so far."""
        results.write_table(self.store, f"{self.folder}/trials.parquet", results.all_rows(self.history))


def checked(sweep_plan: SweepPlan, num_samples: int | None, num_seeds: int, say: Say = lambda line: None) -> SweepRequest:
    """Make the units of a sweep and check them; this starts nothing.

    Args:
        sweep_plan: the job and the space.
        num_samples: points to draw, or how often a grid is repeated; None for 10 if the space has anything to draw, else 1.
        num_seeds: number of training seeds of every trial.
        say: receives a line every ten seconds about the progress of the checks.

    Raises:
        ValueError: a value of the space, or a job that it makes, is invalid; the message names it.
    """
    seeds = seeds_of(sweep_plan, num_seeds)
    entries = sweep_plan.space.entries
    drawn = any(not is_grid(entry) and finite(entry) != [entry] for entry in entries.values())
    samples = num_samples or (_DEFAULT_SAMPLES if drawn else 1)
    # A second sample of a grid would repeat each trial with the same seed.
    if samples > 1 and not drawn:
        raise JobError(f"--samples {samples}: {sweep_plan.space.path} is a grid, whose points run once each")
    units: list[Unit] = []
    _check_number(sweep_plan, samples, len(seeds))
    if sweep_plan.space.search_alg is None:
        points = search.drawn_points(sweep_plan.space, sweep_plan.strengths, samples, _SEED)
        units = grouped(sweep_plan.space.path, points, seeds, apart=True, drawn=drawn)
    trials.check(sweep_plan, units, say)
    if sweep_plan.space.scheduler is not None:
        _aim(sweep_plan, sweep_plan.space.scheduler)
    return SweepRequest(sweep_plan, samples, seeds, units)


def seeds_of(sweep_plan: SweepPlan, num_seeds: int) -> tuple[int, ...]:
    """Return `num_seeds` consecutive seeds, the first of which is the job's training seed, or 0 if the job trains nothing.

    Raises:
        JobError: several seeds that would change nothing, more seeds than SEEDS has entries, a space that sets the training
            seed, or a seed beyond the largest one.
    """
    known = len(sweep_plan.space.seeds)
    if known and num_seeds > known:
        raise JobError(f"--seeds {num_seeds}: SEEDS in {sweep_plan.space.path} has {known} entries, one for each seed")
    if sweep_plan.job.train is None and num_seeds > 1 and not known:
        raise JobError(
            f"--seeds {num_seeds}: the job trains nothing, so a training seed has no effect; SEEDS in the space can set other "
            'data for each seed: [{"data.source.shuffle": 0}, {"data.source.shuffle": 1}]'
        )
    if num_seeds > 1 and any(key.strip() == "train.seed" for entry in sweep_plan.space.entries for key in entry.split(",")):
        raise JobError(f"--seeds {num_seeds}: SPACE sets train.seed itself")
    first = sweep_plan.first_seed
    if first + num_seeds > SEED_LIMIT:
        raise JobError(
            f"--seeds {num_seeds}: the seeds begin with train.seed {first} and exceed {SEED_LIMIT - 1}, the largest seed"
        )
    return tuple(first + number for number in range(num_seeds))


def _check_number(sweep_plan: SweepPlan, samples: int, num_seeds: int) -> None:
    """Refuse more than _MOST_TRIALS trials; the message shows the product. Raises JobError."""
    # Checked before the points are drawn, since too many would fill the memory.
    grids = {entry: len(value["grid_search"]) for entry, value in sweep_plan.space.entries.items() if is_grid(value)}
    factors = {**grids, "--samples": samples, "--seeds": num_seeds}
    if (number := math.prod(factors.values())) > _MOST_TRIALS:
        written = " x ".join(f"{factor:,} ({name})" for name, factor in factors.items() if factor != 1)
        raise JobError(f"{sweep_plan.space.path}: {written} = {number:,} trials, more than {_MOST_TRIALS:,}")


def _aim(sweep_plan: SweepPlan, scheduler: TrialScheduler) -> None:
    """Configure a scheduler: it compares trials by the loss that trainings report, and lets the best trials reach their end.

    Raises:
        JobError: the job trains nothing, or the scheduler would stop every trial before its training ends.
    """
    if sweep_plan.job.train is None:
        raise JobError(f"{sweep_plan.space.path}: SCHEDULER stops trainings early, but the job trains nothing")
    if isinstance(scheduler, AsyncHyperBandScheduler):
        point, steps = _longest(sweep_plan)
        if (last := private_parts.last_step(scheduler)) < steps:
            which = ", ".join(f"{key} {value}" for key, value in point.items())
            whose = f"trials with {which} before their" if which else "every trial before its"
            raise JobError(f"{sweep_plan.space.path}: SCHEDULER: max_t {last:g} stops {whose} {steps} steps end")
        # ASHA stops a trial at max_t before its last report is handled, so the trial would never be evaluated.
        private_parts.let_last_trials_end(scheduler)
    # The loss on training rows rewards overfitting, so it counts only if there are no validation rows.
    metric = "eval/loss" if sweep_plan.job.data.validation is not None else "train/loss"
    scheduler.set_search_properties(metric, "min")


def _longest(sweep_plan: SweepPlan) -> tuple[dict[str, Json], int]:
    """Return the values of the space on which the number of steps depends, for the longest training, and its number."""

    def steps(point: dict[str, Json]) -> int:
        try:
            return length.of(sweep_plan.job_of(point, None, sweep_plan.strengths)).num_steps
        except JobError:  # these values need other values of other keys
            return 0

    values = {key: extremes(entry) for key, entry in sweep_plan.space.entries.items() if key.split(".")[0] in ("train", "data")}
    # The start is the first value of each key; the job's own values may occur in no trial.
    point = {key: of_key[0] for key, of_key in values.items() if of_key}
    longest = steps(point)
    decisive: dict[str, Json] = {}
    # Keys are varied separately: the steps are a product (epochs x rows / rows of a step), so each factor has its own maximum.
    for key, of_key in values.items():
        for value in of_key[1:]:
            number = steps({**point, key: value})
            if number != longest:
                decisive[key] = value if number > longest else point[key]
            if number > longest:
                point, longest = {**point, key: value}, number
    return decisive, longest


def concurrency(request: SweepRequest) -> int:
    """Return how many trials the cluster can run at the same time: at least 1.

    Raises:
        ValueError: a trial needs more than the cluster has; the message shows both numbers.
    """
    sweep_plan = request.plan
    unit_jobs = [sweep_plan.job_of(u.shared, u.seeds[0], u.strengths) for u in request.units] or [
        sweep_plan.job_of({}, None, sweep_plan.strengths)
    ]
    scales = {job.scale.model_dump_json(): job.scale for job in unit_jobs}.values()
    available = reserved.available()
    # Ray places the CPUs of one worker on one node, so the sum over nodes may be too large.
    largest = max(node["Resources"].get("CPU", 0.0) for node in ray.nodes() if node["Alive"])
    fits = []
    for scale in scales:
        reserved.check(scale)
        workers, cpus = scale.worker_range[0], scale.cpus_per_worker
        if cpus > max(largest, available["CPU"] if len(ray.nodes()) == 1 else 0.0):
            raise ValueError(f"scale.cpus_per_worker {cpus:g}, but the largest node has {largest:g} CPUs")
        # A trial needs at least its smallest number of workers (`scale.workers` may be a range).
        fits.append(available["CPU"] / (workers * cpus))
        if gpus := reserved.gpus_of(scale):
            fits.append(available["GPU"] / (workers * gpus))
    # A trial's own process reserves memory but no CPU (see `trial.DRIVER_MEMORY_BYTES`).
    fits.append(ray.cluster_resources().get("memory", 0) / DRIVER_MEMORY_BYTES)
    return max(1, int(min(fits)))


def check_cluster(request: SweepRequest, store: Store) -> None:
    """Refuse a sweep whose first unit does not fit into the memory of the cluster or onto the disk. Raises ValueError."""
    # Only the first unit is checked: an estimate reads rows, which would take long for thousands of units.
    planned = Plan.of(request.plan.job_of(request.units[0].shared if request.units else {}, None, request.plan.strengths))
    capacity.check_cluster(planned, store, run.facts_of(planned))
