"""What a method is: a config, a check against the model, and what it makes of the model.

There are three kinds, and which one a method is says all that the stages ask of it:

Plain      makes nothing: the model as it is
Trained    a `Trainee`, an `nn.Module` whose forward is the paper's loss; what its training leaves is the trainee's kind
Fitted     a closed form from two samples of activations to one map a place

A trainee derives from one of three bases, by what is left of the training:

WholeModel      the model's own weights
PatchedModel    the model's own weights, and a patch on them that trained with them (ASIDE's rotation)
PatchAlone      a patch on the model that it started from, whose weights stay as they are on disk

The file is longer than others because whoever writes a method reads it as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field
from torch import Tensor, nn

from steerlab import patches
from steerlab.activations.parquet import Activations
from steerlab.inputs.tokens import IGNORED, Row
from steerlab.job import Job, MethodConfig, Pooling, Selection
from steerlab.methods.preparations import Prepare
from steerlab.models import ModelFacts
from steerlab.patches.maps import Map

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Loss(NamedTuple):
    """A loss as a sum, so that any split of a step's rows over passes and workers adds up to the same step."""

    total: Tensor
    """Sum over the batch's targets; the loop divides by the number of targets of the whole step."""
    metrics: dict[str, Tensor]
    """Further sums over targets, reported divided by the same number."""


class Size(NamedTuple):
    """What a training holds, for the estimate before it starts."""

    trained: int
    """Parameters that train."""
    more_bytes: int = 0
    """Bytes of a worker besides the model, what trains, and the optimizer."""


@dataclass(frozen=True)
class Inputs:
    """What a method is handed besides its model and config."""

    below: tuple[patches.SavedPatch, ...] = ()
    """Patches that the model carries already; the method's own one is attached above them."""
    activations: Mapping[str, Activations] = field(default_factory=dict)
    """Extracted activations by the role of their data set."""
    prepared: Mapping[str, Path] = field(default_factory=dict)
    """What the method's preparations left, by their name."""


class Trainee(nn.Module):
    """What trains, and how: parameters with `requires_grad` are trained, no others.

    Made as `Trainee(model, config, inputs)`. Derive from `WholeModel`, `PatchedModel` or `PatchAlone`, not from this.
    """

    trains_on: ClassVar[str] = "train"
    """Role of the data set whose rows are trained on."""
    holds_logits: ClassVar[bool] = True
    """False when the loss makes logits in pieces, so that those of a batch are never there at once; for estimates."""
    leaves_model: ClassVar[bool]
    leaves_patch: ClassVar[bool]
    model: Any
    """A language model, or a diffusion pipeline."""
    patch: Any
    """What is saved as the patch, or None."""

    def forward(self, batch: Any) -> Loss:
        """Return the paper's loss of one micro-batch, a `Batch` of tokens or `Drawings`."""
        raise NotImplementedError

    def on_step(self, step: int, steps_per_epoch: float) -> None:
        """Follow the training: called before step `step` (from 0) on every worker; at most all steps are one epoch."""

    def before_pass(self, is_last: bool) -> None:
        """Prepare for a forward pass of a step; the step's gradients are complete after the last one."""

    def after_step(self, lr: float) -> None:
        """Do what follows the optimizer, on every worker; `lr` is the step's learning rate."""

    def finished(self, state: dict[str, Tensor]) -> patches.SavedPatch:
        """Return the patch to save for a trained state of `patch`: one of the same make with that state."""
        fresh = patches.KINDS[self.patch.kind](**self.patch.spec())
        fresh.load_state_dict(state)
        return fresh

    @classmethod
    def counts(cls, row: Row, loss_on: str) -> int:
        """Return what a row adds to the number that the loss is divided by: its targets, one a row of pairs or images."""
        return sum(row.targets(loss_on))

    @classmethod
    def size(cls, config: Any, skeleton: PreTrainedModel) -> Size | None:
        """Return what trains, by the model's modules without weights; None: all of the model, or next to nothing of it."""
        return None

    def check(self, below: Sequence[patches.SavedPatch] = ()) -> None:
        """Refuse a trainee that contradicts its base class, or that left off patches of the model that it starts from.

        Args:
            below: `Inputs.below`, the patches that the model carries already.

        Raises:
            ValueError: the message names the right base class, or the call that attaches the patches.
        """
        name = type(self).__name__
        stack = patches.attached_patches(self.model) or ()
        # By identity: two patches of one kind may hold equal numbers.
        missing = [patch for patch in below if not any(patch is other for other in stack)]
        if missing:
            raise ValueError(
                f"{name} trains without {len(missing)} of {len(below)} patches that the model carries already "
                f"({missing[0].kind}): call patches.attach(model, [*inputs.below, self.patch]) once, in its constructor"
            )
        frozen = not any(parameter.requires_grad for parameter in self.model.parameters())
        if self.leaves_model and frozen:
            raise ValueError(f"{name} freezes the model, whose weights would be saved as they were: derive it from PatchAlone")
        if self.leaves_patch and self.patch is None:
            raise ValueError(f"{name} has no patch: set self.patch, or derive it from WholeModel")
        if not self.leaves_patch and self.patch is not None:
            raise ValueError(f"{name} has a patch, which WholeModel does not save: derive it from PatchedModel or PatchAlone")


class WholeModel(Trainee):
    """A training that leaves the model's own weights. Without a `train` section a job evaluates the model as it is."""

    leaves_model, leaves_patch = True, False

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        train_everything(model)
        self.model = model
        self.patch = None


class PatchedModel(Trainee):
    """A training that leaves the model's own weights and a patch on them, `self.patch`."""

    leaves_model, leaves_patch = True, True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        train_everything(model)
        self.model = model


class PatchAlone(Trainee):
    """A training that leaves a patch, `self.patch`, on the model that it started from, which is frozen."""

    leaves_model, leaves_patch = False, True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)

    def train(self, mode: bool = True) -> PatchAlone:
        """Train the patch alone: a frozen model has no dropout."""
        super().train(mode)
        self.model.train(False)
        return self


MIN_SAMPLES = 4
"""Fewer samples say nothing about a distribution (authors' code: `force_small_batch`)."""
Samples = Mapping[str, Tensor]
"""Pooled activations by tap: (N, D), float32."""
ANY_KIND = ("causal_lm", "diffusion")


class SteeringConfig(MethodConfig):
    """Hyperparameters of a method that reads activations."""

    pooling: Pooling = "mean"
    """Pooling of the activations."""
    steer: Selection | None = None
    """Where the maps act, among the places that were read; null: there, on every token."""
    inverse: bool = Field(False, exclude_if=lambda inverse: not inverse)
    """Act with the inverse maps: bring about what the fitted ones take away."""


class SequentialConfig(SteeringConfig):
    """Hyperparameters of a closed form that may be fitted place after place."""

    incremental: bool = True
    """Fit maps one after another, each on what the source texts cause with all maps before it in force."""


@dataclass(frozen=True)
class Method:
    """One entry of the table of methods: what all kinds have, and what the stages ask of any of them."""

    Config: type[MethodConfig]
    """Hyperparameters; defaults are the paper's."""
    _: KW_ONLY
    check: Callable[[Any, ModelFacts, Job], None] = lambda config, facts, job: None
    """Refuse settings that cannot work on a model or in a job, with a ValueError, before anything starts."""
    strength_range: tuple[float, float] | None = None
    """Strengths that mean something; others are warned of. None where any does."""
    kinds: tuple[str, ...] = ("causal_lm",)
    """Kinds of model that the method works on."""

    leaves_model: ClassVar[bool] = False
    leaves_patch: ClassVar[bool] = False

    def reads(self, config: MethodConfig) -> tuple[str, ...]:
        """Return the roles of the data sets whose activations the method wants extracted first."""
        return ()

    def prepares(self, config: MethodConfig, skeleton: PreTrainedModel, prepare: Prepare) -> tuple[str, ...]:
        """Ask for the stages before the training, each after those that it needs. Raises ValueError."""
        return ()

    def walks(self, config: MethodConfig) -> bool:
        """Say whether maps are fitted one after another, on what the source texts cause behind the maps before."""
        return isinstance(config, SequentialConfig) and config.incremental

    def steers(self, config: MethodConfig) -> Selection | None:
        """Return where the patch acts; None where the config does not say, or everywhere."""
        return config.steer if isinstance(config, SteeringConfig) else None


@dataclass(frozen=True)
class Plain(Method):
    """A method that makes nothing."""


@dataclass(frozen=True)
class Trained(Method):
    """A method that trains."""

    module: type[Trainee]
    """Made of (model, config, inputs): the surgery or the hooks, and what trains."""
    _: KW_ONLY
    roles_read: tuple[str, ...] = ()
    """Roles of the data sets whose activations are extracted first, for a config that says how (`SteeringConfig`)."""
    preparations: Callable[[Any, PreTrainedModel, Prepare], tuple[str, ...]] = lambda config, skeleton, prepare: ()
    """(config, the model's modules without weights, what takes preparations) -> names of those that the training reads; it
    asks for the stages before the training, and refuses what cannot be made with a ValueError (preparations.py)."""

    def __post_init__(self) -> None:
        if not issubclass(self.module, WholeModel | PatchedModel | PatchAlone):
            raise TypeError(f"{self.module.__name__}: derive it from WholeModel, PatchedModel or PatchAlone")
        if self.roles_read and not issubclass(self.Config, SteeringConfig):
            raise TypeError(f"{self.Config.__name__} of a method that reads activations: derive it from SteeringConfig")

    @property
    def leaves_model(self) -> bool:  # type: ignore[override]
        """Whether the result holds the model's own weights."""
        return self.module.leaves_model

    @property
    def leaves_patch(self) -> bool:  # type: ignore[override]
        """Whether the result holds a patch, whose strength can be varied."""
        return self.module.leaves_patch

    @property
    def needs_training(self) -> bool:
        """Whether a job without a `train` section is a mistake."""
        return self.leaves_patch

    def reads(self, config: MethodConfig) -> tuple[str, ...]:
        """Return `roles_read`."""
        return self.roles_read

    def prepares(self, config: MethodConfig, skeleton: PreTrainedModel, prepare: Prepare) -> tuple[str, ...]:
        """Ask for `preparations`, and return the names of those that the training reads."""
        read = self.preparations(config, skeleton, prepare)
        prepare.check_read(read)
        return read


@dataclass(frozen=True)
class Fitted(Method):
    """A closed form. One that walks reads the target alone, and takes the source texts through the model itself."""

    Config: type[SteeringConfig]
    fit: Callable[[Any, Samples, Samples], Mapping[str, Map]]
    """(config, source, target) -> maps; never asks whether it is called for all places at once or for one after another."""
    _: KW_ONLY
    check: Callable[[Any, ModelFacts, Job], None] = lambda config, facts, job: check_roles(config, facts, job)
    kinds: tuple[str, ...] = ANY_KIND

    leaves_patch: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not issubclass(self.Config, SteeringConfig):
            raise TypeError(f"{self.Config.__name__} of a closed form: derive it from SteeringConfig")

    def reads(self, config: MethodConfig) -> tuple[str, ...]:
        """Return the roles of both samples, or of the target."""
        return ("target",) if self.walks(config) else ("source", "target")


def language_modelling_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the summed next-token cross-entropy (nats) over the labelled tokens, in float32."""
    return nn.functional.cross_entropy(
        logits_BTV[:, :-1].float().flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that receive gradients."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def train_everything(model: PreTrainedModel) -> None:
    """Let every weight receive gradients; transformers leaves a loaded model so, a frozen one may come from elsewhere."""
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def check_masters(job: Job) -> None:
    """Refuse to train the model's own weights in bfloat16 where the optimizer keeps no float32 copies of them."""
    if job.model.dtype == "bfloat16" and job.scale.zero_stage == 0:
        raise ValueError("model.dtype bfloat16 trains with float32 master weights, which needs scale.zero_stage 1, 2 or 3")


def check_roles(config: MethodConfig, facts: ModelFacts, job: Job) -> None:
    """Refuse a job without source and target texts, or with the same texts on both sides."""
    missing = [role for role in ("source", "target") if role not in job.data.by_role]
    if missing:
        raise ValueError(
            f"data.{missing[0]}: method {config.name} needs this data set; it moves source texts towards target texts"
        )
    source, target = job.data.by_role["source"], job.data.by_role["target"]
    if source == target:
        raise ValueError("data.source and data.target are the same rows, so there is nothing to move")
    if source.format != target.format:
        raise ValueError(
            f"data.source has format {source.format} and data.target {target.format}: activations of texts that are read in "
            "different ways differ for that reason alone"
        )
    for role, data in (("source", source), ("target", target)):
        each = 1 if data.seeds is None else data.seeds[1] - data.seeds[0]
        if data.limit is not None and data.limit * each < MIN_SAMPLES:
            drawings = "" if data.seeds is None else f" of {each} seeds each"
            raise ValueError(f"data.{role}.limit {data.limit}{drawings}: a distribution needs {MIN_SAMPLES} samples or more")


def check_samples(source_ND: Tensor, target_MD: Tensor) -> None:
    """Refuse samples that no map can be fitted on.

    Raises:
        ValueError: fewer than 4 samples on a side, other widths, or a value that is no number.
    """
    for side, x in (("source", source_ND), ("target", target_MD)):
        if len(x) < MIN_SAMPLES:
            raise ValueError(f"the {side} has {len(x)} samples; a distribution needs {MIN_SAMPLES} or more")
        if not bool(x.isfinite().all()):
            row, neuron = (int(i) for i in (~x.isfinite()).nonzero()[0])
            raise ValueError(f"the {side} activation of row {row}, neuron {neuron} is {float(x[row, neuron])}")
    if source_ND.shape[1] != target_MD.shape[1]:
        raise ValueError(f"source and target have {source_ND.shape[1]} and {target_MD.shape[1]} neurons")
