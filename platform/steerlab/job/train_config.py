"""The config of a training: steps or epochs, learning rate, optimizer, rows of a step, evaluation and when it stops."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, model_validator

from steerlab.job.typed import Frozen, Seed


class TrainConfig(Frozen):
    """Settings of the training stage. The number of workers is in `scale`, which is not part of an artifact's key."""

    # Fields of later versions are excluded from the key at their default, so that the keys of older artifacts do not change.
    steps: int | None = Field(None, ge=1, exclude_if=lambda steps: steps is None)
    """Optimizer steps; give either this or `epochs`."""
    epochs: float | None = Field(None, gt=0, exclude_if=lambda epochs: epochs is None)
    """Passes over the rows, from which the steps follow once the rows are counted: ceil(epochs x rows / rows of a step)."""
    lr: float = Field(2e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    lr_floor: float = Field(0.0, ge=0, le=1)
    """Learning rate at the end of the cosine and the linear schedule, as a share of `lr`."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up; 0 starts at `lr`."""
    warmup_ratio: float = Field(0.0, ge=0, le=1, exclude_if=lambda ratio: not ratio)
    """Linear warm-up as a share of all steps, rounded up; give either this or `warmup_steps`."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimizer, in torch's implementation on every device."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates of the first and second moment."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of matrices (decoupled in adamw, an L2 term in adam and sgd); vectors (norms, biases) are never decayed."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """SGD's momentum."""
    clip_norm: float = Field(1.0, ge=0)
    """Global norm to which gradients are clipped; 0 does not clip."""
    micro_batch: int = Field(4, ge=1)
    """Rows of one forward pass on one worker."""
    grad_accum: int = Field(1, ge=1)
    """Forward passes per step of a single worker. A step has micro_batch x grad_accum rows, divided among the workers."""
    max_tokens: int = Field(512, ge=8)
    """Tokens of a row. A longer response is cut, a row whose prompt does not fit is dropped, and both are counted."""
    eval_every: int = Field(0, ge=0)
    """Steps between evaluation losses on `data.validation`; 0 evaluates only at the end."""
    patience: int | None = Field(None, ge=1, exclude_if=lambda patience: patience is None)
    """Stop early, after this number of evaluations in a row without a new lowest evaluation loss; null trains all steps."""
    keep: Literal["last", "best"] = "last"
    """Weights that become the artifact: those of the last step, or of the step with the lowest evaluation loss."""
    snapshots: tuple[int, ...] = ()
    """Steps after which the patch is stored as well, so that a sweep over the job's `snapshot` needs one training."""
    skip_steps: int = Field(0, ge=0, exclude_if=lambda steps: not steps)
    """Maximum number of bad steps that are skipped: their gradients are dropped, and weights and optimizer do not change. A
    step is bad if its loss or a gradient is NaN or infinite, or its loss a spike. 0 stops at the first one."""
    spike: float | None = Field(None, gt=1, exclude_if=lambda spike: spike is None)
    """A loss above this multiple of the median of the 20 steps before is a spike; null detects only NaN and infinity."""
    seed: Seed = 0
    """Seed of initialisation, row order and dropout."""
    deterministic: bool = Field(False, exclude_if=lambda deterministic: not deterministic)
    """Use only torch's deterministic operations, so that two runs on one kind of GPU end with the same bits; an
    operation without a deterministic form is refused by its name. Slower. On the CPU in float32 trainings are deterministic
    without it."""
    tf32: bool = Field(False, exclude_if=lambda tf32: not tf32)
    """Multiply matrices of float32 on a GPU with the 10 bits of TF32, several times as fast; has no effect on bfloat16 and on
    the CPU."""

    @property
    def rows_per_step(self) -> int:
        """Rows in one optimizer step, over all workers."""
        return self.micro_batch * self.grad_accum

    @property
    def num_steps(self) -> int:
        """Maximum number of optimizer steps, of a config that names them or was `resolved`."""
        assert self.steps is not None, "the steps of a training in epochs are known once its rows are counted: `resolved`"
        return self.steps

    def resolved(self, num_rows: int) -> TrainConfig:
        """Return the config with `steps` and `warmup_steps` in numbers, for a training on `num_rows` rows.

        Raises:
            ValueError: a snapshot or the end of the warm-up comes after the last step.
        """
        # The quotient is rounded first: 1.1 x 50 is 55.00000000000001 in floating point, and its ceiling would be 56.
        steps = self.steps or math.ceil(round((self.epochs or 0.0) * num_rows / self.rows_per_step, 9)) or 1
        self._check_steps(steps)
        warmup = math.ceil(round(self.warmup_ratio * steps, 9)) or self.warmup_steps
        return self.model_copy(update={"steps": steps, "epochs": None, "warmup_steps": warmup, "warmup_ratio": 0.0})

    @model_validator(mode="after")
    def _check(self) -> TrainConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                "steps: this key is required, or epochs"
                if self.steps is None
                else f"steps {self.steps} and epochs {self.epochs:g} both set the length of the training: set one to null"
            )
        if self.warmup_ratio and self.warmup_steps:
            raise ValueError(
                f"warmup_ratio {self.warmup_ratio:g} and warmup_steps {self.warmup_steps} both set the length of the warm-up: "
                "remove one"
            )
        if self.steps is not None:
            self._check_steps(self.steps)
        return self._check_patience()

    def _check_steps(self, steps: int) -> None:
        # The steps are checked before training, because a snapshot that is never taken would be noticed only after hours.
        late = [step for step in self.snapshots if not 1 <= step <= steps]
        if late:
            raise ValueError(f"train.snapshots {late}: not between 1 and train.steps {steps}")
        if self.warmup_steps > steps:
            raise ValueError(f"train.warmup_steps {self.warmup_steps} is more than train.steps {steps}")

    def _check_patience(self) -> TrainConfig:
        if self.patience is not None and not self.eval_every:
            raise ValueError(f"patience {self.patience} counts evaluation losses: set eval_every to the steps between them")
        if self.patience is not None and self.snapshots:
            raise ValueError(
                f"patience {self.patience}: a training that stops early may never reach the snapshots {list(self.snapshots)}; "
                "remove one of them"
            )
        return self


def stops(losses: Sequence[float], patience: int) -> bool:
    """Return whether a training stops early: its last `patience` evaluation losses are not below the lowest one before them."""
    # `index` finds the first of equal losses, because a loss that is only reached again is not progress.
    return bool(losses) and len(losses) - 1 - losses.index(min(losses)) >= patience
