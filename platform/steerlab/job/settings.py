"""Configs of training, scaling, tracking and the choice of the strength; bases of the configs of methods and tasks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from pydantic import Field, SerializeAsAny, model_validator

from steerlab.job.typed import Frozen, Seed


class ScaleConfig(Frozen):
    """Distribution of a job and its recovery from failures. Recorded with every run, never part of an artifact's key."""

    workers: int | tuple[int, int] = 1
    """Number of Ray Train workers; a pair [min, max] makes the training elastic."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO stage: 0 replicates everything, 1 shards optimizer state, 2 also gradients, 3 also parameters."""
    offload: bool = False
    """Keep optimizer state (ZeRO 1-3) and parameters (ZeRO 3) in CPU memory."""
    gpu: Literal["auto", "require", "never"] = "auto"
    """auto uses GPUs if the cluster has enough of them and torch can use them, require fails if not, never uses none."""
    gpus_per_worker: float = Field(1, gt=0, le=1)
    """GPUs of each worker: 1, or a part of one for small trials, which then share it; an evaluator takes as much. Memory is not
    divided: all processes on one GPU must fit on it together."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs reserved for each worker; also its number of threads."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints. A failure loses at most this many steps, or twice as many while the newest one is written."""
    max_failures: int = Field(3, ge=0)
    """Worker failures after which the stage fails."""
    warm: bool | None = None
    """Run extraction, training of one worker and evaluation in processes that stay alive for the next stage, which saves their
    start-up time; null does so for trials of a sweep with one worker and no GPU. A process with a GPU ends with its stage."""

    @property
    def worker_range(self) -> tuple[int, int]:
        """Smallest and largest number of workers."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)

    @model_validator(mode="after")
    def _check(self) -> ScaleConfig:
        low, high = self.worker_range
        if not 1 <= low <= high:
            raise ValueError(f"workers is a number of at least 1 or a pair [min, max], not {self.workers}")
        # DeepSpeed's checkpoints hold one shard of the optimizer per worker.
        if low != high and self.zero_stage:
            raise ValueError("elastic workers need zero_stage 0: ZeRO 1-3 shards cannot be loaded on another number of workers")
        if high > 1 and self.gpus_per_worker < 1:
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker:g} is possible with one worker only: NCCL refuses two on one GPU"
            )
        if self.warm and high > 1:
            raise ValueError(f"warm applies to trainings of one worker; workers is {self.workers}")
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload needs zero_stage 1, 2 or 3")
        return self


class WandbConfig(Frozen):
    """Weights & Biases, with one run there for each steerlab run."""

    project: str = "steerlab"
    """Project name."""
    entity: str | None = None
    """Team or user; null uses the account's default."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """offline writes files that `steerlab wandb-send` uploads; online without an API key warns and falls back to offline."""


class MlflowConfig(Frozen):
    """MLflow, with one run there for each steerlab run and a nested one for each strength of the patch."""

    experiment: str = Field("steerlab", min_length=1)
    """Name of the experiment."""
    uri: str | None = None
    """Tracking URI (http://HOST:5000, sqlite:////PATH/mlflow.db); null takes $MLFLOW_TRACKING_URI, else mlflow.db in the run
    folder. Passwords go in MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD."""


class TrackConfig(Frozen):
    """Services to which a run reports, besides its run folder."""

    wandb: WandbConfig | None = None
    """Weights & Biases; null does not report there."""
    mlflow: MlflowConfig | None = Field(default=None, exclude_if=lambda config: config is None)
    """MLflow (the extra `mlflow`); null does not report there."""
    tensorboard: bool = Field(default=False, exclude_if=lambda writes: not writes)
    """Write event files for TensorBoard into the run folder."""


class MethodConfig(Frozen):
    """Base of the methods' configs; `name` chooses the method."""

    name: str
    """Name of the method."""


class TaskConfig(Frozen):
    """Base of the tasks' configs; `task` chooses the task."""

    task: str
    """Name of the task."""
    label: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+$")
    """First part of the metrics' names; null takes the task's name. Required if a job has the same task twice."""
    limit: int | None = Field(None, ge=1, le=2**53)
    """Number of rows that are evaluated; null takes all."""
    strengths: tuple[float, ...] = Field((1.0,), min_length=1)
    """Strengths of the patch, evaluated in one batch. The first one gives the headline metrics; if it is 0 (the model without
    its patch), 1 does if it is among them, otherwise the first that is not 0. If the job has `choose`, the chosen strength
    gives the headline, and the model without the patch is also measured, as strength 0."""
    seed: Seed = 0
    """Seed of sampling and of the choice of rows."""
    seeds: tuple[Seed, ...] = Field((), exclude_if=lambda seeds: not seeds)
    """Seeds with which the task is run one after another, instead of `seed`, on the rows that the first one chooses. Each item
    then counts with its mean over the seeds, intervals are over items, and the standard deviation of each metric between seeds
    is reported beside it. Empty runs the task once, with `seed`."""

    @property
    def rows_seed(self) -> int:
        """Seed of the choice of rows: the same whichever of `seeds` is being run."""
        return self.seeds[0] if self.seeds else self.seed

    @model_validator(mode="before")
    @classmethod
    def _with_first_seed(cls, tree: object) -> object:
        """Take the first of `seeds` as `seed`, so that a config never holds a seed that is not run."""
        seeds = tree.get("seeds") if isinstance(tree, Mapping) else None
        if not isinstance(tree, Mapping) or not isinstance(seeds, Sequence) or isinstance(seeds, str) or not seeds:
            return tree
        if tree.get("seed", seeds[0]) != seeds[0]:
            raise ValueError(
                f"seed {tree['seed']!r:.40}: the task is run with `seeds`, whose first is {seeds[0]!r:.40}; remove it"
            )
        return {**tree, "seed": seeds[0]}

    @model_validator(mode="after")
    def _check_seeds(self) -> TaskConfig:
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds {list(self.seeds)}: a repeated seed gives the same numbers again")
        return self

    @property
    def trusted_source(self) -> str | None:
        """Source whose own code the task runs because the job allows it; None if it runs none."""
        return None


UNPATCHED = 0.0
"""Strength at which the outputs are those of the model without the patch, bit for bit."""
UNPATCHED_NAME = "strength 0"


def with_headline(headline: float, declared: Sequence[float]) -> tuple[float, ...]:
    """Return the headline strength, then the strengths that a task declares, unless it declares only the default (1.0,)."""
    # (1.0,) is the default: a task that does not name strengths reports the headline only.
    others = declared if tuple(declared) != (1.0,) else ()
    return tuple(dict.fromkeys([headline, *others]))


def headline_first(strengths: Sequence[float]) -> list[float]:
    """Return the distinct strengths with the headline first: the first one, but 0 (the unpatched model) only if there is no
    other.

    If the first strength is 0, the headline is 1 if it is among them, otherwise the first strength that is not 0.
    """
    # A dict, unlike a set, has the order in which they were written.
    different = list(dict.fromkeys(strengths))
    steering = [strength for strength in different if strength != UNPATCHED]
    headline = different[0]
    if headline == UNPATCHED and steering:
        headline = 1.0 if 1.0 in steering else steering[0]
    return [headline, *(strength for strength in different if strength != headline)]


class Limit(Frozen):
    """An upper bound of a second metric, relative to its value at strength 0; give one of `rise` and `factor`."""

    metric: str
    """Name of a metric of the development tasks, such as `perplexity/value`."""
    rise: float | None = Field(None, ge=0)
    """Amount by which the metric may exceed its value at strength 0 (AcT's paper: one point of perplexity, from 14)."""
    factor: float | None = Field(None, ge=1)
    """Factor by which the metric may exceed its value at strength 0."""

    @model_validator(mode="after")
    def _check(self) -> Limit:
        if (self.rise is None) == (self.factor is None):
            raise ValueError("give one of rise and factor")
        return self

    def highest(self, start: float) -> float:
        """Return the largest allowed value of the metric if it is `start` at strength 0."""
        if self.rise is not None:
            return start + self.rise
        factor = self.factor or 1.0
        # A metric below 0 may rise by the same share of its size; multiplied by a factor above 1 it would have to fall.
        return start * factor if start >= 0 else start - start * (factor - 1)


class ChooseConfig(Frozen):
    """Choice of the strength on development rows. `evaluate` then reports the chosen strength, and 0, on its own rows."""

    strengths: tuple[float, ...] = Field((0.25, 0.5, 0.75, 1.0), min_length=1)
    """Candidate strengths; 0 is always a candidate too."""
    tasks: tuple[SerializeAsAny[TaskConfig], ...] = Field((), min_length=1)
    """Tasks on development rows."""
    metric: str
    """Metric of these tasks that is optimised, such as `toxicity/share`."""
    mode: Literal["min", "max"] = "min"
    """Whether the metric is minimised or maximised."""
    within: Limit | None = None
    """Bound that excludes strengths; null excludes no strength."""

    @model_validator(mode="after")
    def _check(self) -> ChooseConfig:
        for task in self.tasks:
            if task.strengths not in ((1.0,), type(task).model_fields["strengths"].default):
                raise ValueError(f"tasks: {task.task} has strengths of its own; its candidates are choose.strengths")
        return self
