"""How a job trains, spreads, is tracked, and chooses; what the configs of methods and tasks have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field, SerializeAsAny, model_validator

from steerlab.job.typed import Frozen, Seed


class TrainConfig(Frozen):
    """What the training stage computes. How it is spread over machines is `scale`, which changes no result."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    lr: float = Field(2e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Shape after the warm-up."""
    lr_floor: float = Field(0.0, ge=0, le=1)
    """The cosine ends at this share of `lr`."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up; 0 starts at `lr`."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimizer; torch's own implementation on every device."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of matrices (decoupled in adamw, an L2 term in adam and sgd); vectors (norms, biases) are never decayed."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """SGD's momentum."""
    clip_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this global norm; 0 does not clip."""
    micro_batch: int = Field(4, ge=1)
    """Rows of one forward pass on one worker."""
    grad_accum: int = Field(1, ge=1)
    """Forward passes per step: a step sees micro_batch x grad_accum rows on any number of workers."""
    max_tokens: int = Field(512, ge=8)
    """Longest row; a longer response is cut, a row whose prompt does not fit is dropped, and both are counted."""
    eval_every: int = Field(0, ge=0)
    """Steps between evaluation losses on `data.validation`; 0 only at the end."""
    keep: Literal["last", "best"] = "last"
    """Weights that become the artifact: of the last step, or of the best evaluation loss."""
    snapshots: tuple[int, ...] = ()
    """Steps after which the patch is kept as well, so that one training answers a sweep over `snapshot`."""
    seed: Seed = 0
    """Seed of initialisation, row order and dropout."""

    @property
    def rows_per_step(self) -> int:
        """Rows in one optimizer step, over all workers."""
        return self.micro_batch * self.grad_accum


class ScaleConfig(Frozen):
    """How the work is spread and kept safe. Recorded with every run, never part of an artifact's key."""

    workers: int | tuple[int, int] = 1
    """Ray Train workers; a pair [min, max] makes the run elastic."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: 0 replicates, 1 shards optimizer state, 2 gradients too, 3 parameters too."""
    offload: bool = False
    """Keep optimizer state (ZeRO 1-3) and parameters (ZeRO 3) in CPU memory."""
    gpu: Literal["auto", "require", "never"] = "auto"
    """One GPU a worker: auto takes GPUs when the cluster has enough of them."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs reserved for each worker; also its number of threads."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints: the most that a kill can cost, twice over when the newest was not yet committed."""
    max_failures: int = Field(3, ge=0)
    """Worker failures survived before the stage fails."""
    warm: bool | None = None
    """Read activations, train one worker and evaluate in processes that stay for the next stage, which saves their start; null
    does so for a sweep's trials of one worker without a GPU."""

    @property
    def worker_range(self) -> tuple[int, int]:
        """Smallest and largest number of workers."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)

    @model_validator(mode="after")
    def _check(self) -> ScaleConfig:
        low, high = self.worker_range
        if not 1 <= low <= high:
            raise ValueError(f"workers is a number of at least 1 or a pair [min, max], not {self.workers}")
        if low != high and self.zero_stage:
            raise ValueError("elastic workers need zero_stage 0: ZeRO 1-3 shards cannot be loaded on another number of workers")
        if self.warm and high > 1:
            raise ValueError(f"warm is about trainings of one worker; workers is {self.workers}")
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload needs zero_stage 1, 2 or 3")
        return self


class WandbConfig(Frozen):
    """One Weights & Biases run for each steerlab run."""

    project: str = "steerlab"
    """Project name."""
    entity: str | None = None
    """Team or user; null uses the account's default."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """offline writes files that `steerlab wandb-send` sends; online without a key falls back to offline and says so."""


class TrackConfig(Frozen):
    """Where a run is reported besides its run folder."""

    wandb: WandbConfig | None = None
    """Weights & Biases; null reports nowhere else."""


class MethodConfig(Frozen):
    """Base of the methods' configs; `name` picks the method."""

    name: str
    """The method."""


class TaskConfig(Frozen):
    """Base of the tasks' configs; `task` picks the task."""

    task: str
    """The task."""
    label: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+$")
    """First part of the metrics' names in place of the task's; needed where a job has the same task twice."""
    limit: int | None = Field(None, ge=1, le=2**53)
    """Rows evaluated; null takes all."""
    strengths: tuple[float, ...] = Field((1.0,), min_length=1)
    """Strengths of the patch, evaluated in one batch. The first one gives the headline metrics; where that is 0, the model
    without its patch, 1 gives them, or else the first that is not 0. With `choose` the chosen strength does, and the model
    without the patch is measured as strength 0."""
    seed: Seed = 0
    """Seed of sampling and of the choice of rows."""

    @property
    def trusted_source(self) -> str | None:
        """The source whose own code the task runs, where the job says so."""
        return None


UNPATCHED = 0.0
"""The strength of the model without the patch, bit for bit."""
UNPATCHED_NAME = "strength 0"


def with_headline(headline: float, declared: Sequence[float]) -> tuple[float, ...]:
    """Return a headline strength and, where a task declares more than the patch as it is, its other strengths after it."""
    others = declared if tuple(declared) != (1.0,) else ()
    return tuple(dict.fromkeys([headline, *others]))


def headline_first(strengths: Sequence[float]) -> list[float]:
    """Return different strengths with that of the headline first: never 0, which steers nothing, where there is another one."""
    different = list(dict.fromkeys(strengths))
    steering = [strength for strength in different if strength != UNPATCHED]
    headline = different[0]
    if headline == UNPATCHED and steering:
        headline = 1.0 if 1.0 in steering else steering[0]
    return [headline, *(strength for strength in different if strength != headline)]


class Limit(Frozen):
    """A bound on what a better metric may cost."""

    metric: str
    """Name of a metric of the development tasks, `perplexity/value`."""
    rise: float | None = Field(None, ge=0)
    """The metric may exceed its value at strength 0 by this much (AcT's paper: one point of perplexity, at 14)."""
    factor: float | None = Field(None, ge=1)
    """Or: the metric may be this many times its value at strength 0."""

    @model_validator(mode="after")
    def _check(self) -> Limit:
        if (self.rise is None) == (self.factor is None):
            raise ValueError("give one of rise and factor")
        return self

    def highest(self, start: float) -> float:
        """Return what the metric may be at most when it is `start` at strength 0."""
        return start + self.rise if self.rise is not None else start * (self.factor or 1)


class ChooseConfig(Frozen):
    """The strength is chosen on development rows; `evaluate` then reports it, and 0, on rows of its own."""

    strengths: tuple[float, ...] = Field((0.25, 0.5, 0.75, 1.0), min_length=1)
    """Candidates besides 0."""
    tasks: tuple[SerializeAsAny[TaskConfig], ...] = Field((), min_length=1)
    """Tasks on development rows."""
    metric: str
    """What is made best: `toxicity/share`."""
    mode: Literal["min", "max"] = "min"
    """Direction."""
    within: Limit | None = None
    """Strengths that break this bound are out."""

    @model_validator(mode="after")
    def _check(self) -> ChooseConfig:
        for task in self.tasks:
            if task.strengths not in ((1.0,), type(task).model_fields["strengths"].default):
                raise ValueError(f"tasks: {task.task} has strengths of its own; its candidates are choose.strengths")
        return self
