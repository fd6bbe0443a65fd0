"""The contract of a method: a config, a check of it against the model and the job, and a way to change the model.

A method is an instance of one of six classes. The stages see only the class, never the method:

Plain      changes nothing: the model as it is
Prompted   puts text before each prompt; the model stays as it is
Assembled  makes a patch of what its config names, such as a reward model
Trained    trains a `Trainee`, an `nn.Module` whose forward returns the paper's loss
Fitted     computes one map for each place in closed form, from two samples of activations
Edited     changes the weights that another job has trained, in closed form (edited.py)

A trainee derives from one of three bases, which determine what the training saves:

WholeModel      the model's own weights
PatchedModel    the model's own weights, and a patch that trained with them (ASIDE's rotation)
PatchAlone      a patch only; the weights of the model that it started from stay as they are on disk

This file is longer than others because the author of a method reads all of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from pydantic import Field
from torch import Tensor, nn

from steerlab import patches
from steerlab.activations.parquet import Activations
from steerlab.inputs.tokens import IGNORED, Row
from steerlab.job import Job, MethodConfig, Pixels, Pooling, Preamble, Selection
from steerlab.methods.math import lora
from steerlab.methods.preparations import Prepare
from steerlab.models import ModelFacts
from steerlab.patches.maps import Map
from steerlab.steered.language import SteeredModel

if TYPE_CHECKING:
    # transformers takes a second to import, and a job file is checked without it; the annotations need only its name.
    from transformers import PreTrainedModel


class Loss(NamedTuple):
    """A loss as a sum over targets, so that a step is the same however its rows are split over passes and workers."""

    # The loss is a sum instead of a mean: averaging the means of passes with different numbers of targets would not give the
    # mean over all targets.
    total: Tensor
    """Sum over the targets of the batch; the loop divides it by the number of targets of the whole step (`counts`)."""
    # The sums stay on the device, because reading a number from a GPU waits for it; the loop does so once a step.
    metrics: dict[str, Tensor]
    """Further sums over the targets, by name; the loop divides them by the same number and reports them."""


class Size(NamedTuple):
    """Memory of a training, for the estimate before it starts."""

    # Each trained parameter also has a gradient and, with Adam, two moments: the estimate multiplies this number.
    trained: int
    """Number of parameters that train."""
    more_bytes: int = 0
    """Memory of one worker in bytes, not counting the model, the trained parameters and the optimizer's state."""


@dataclass(frozen=True)
class Inputs:
    """Inputs of a trainee besides its model and its config."""

    below: tuple[patches.SavedPatch, ...] = ()
    """Patches that the model carries already, in order. The trainee attaches them together with its own patch, which comes
    last: `patches.attach(model, [*inputs.below, self.patch])`. Empty for a model without patches."""
    # The files are opened but not read: a method reads only the columns that it needs.
    activations: Mapping[str, Activations] = field(default_factory=dict)
    """Extracted activations by the role of their data set (`Trained.roles_read`)."""
    prepared: Mapping[str, Path] = field(default_factory=dict)
    """Output directories of the method's preparations, by the preparation's name."""


class Trainee(nn.Module):
    """A module that the training loop trains: its parameters with `requires_grad` and no others.

    The loop constructs it as `Trainee(model, config, inputs)`. Derive from `WholeModel`, `PatchedModel` or `PatchAlone`, not
    from this class.
    """

    # A class attribute, because a job's data are checked before a model is loaded.
    trains_on: ClassVar[str] = "train"
    """Role of the data set whose rows are trained on."""
    # (B, T, V) logits in float32 are often the largest tensor of a step.
    holds_logits: ClassVar[bool] = True
    """False when the loss computes logits in chunks, so that those of a batch are never in memory at once; for estimates."""
    leaves_model: ClassVar[bool]
    """Whether the artifact holds the model's own weights."""
    leaves_patch: ClassVar[bool]
    """Whether the artifact holds a patch."""
    # `Any`: what the loop hands over depends on the kind of model, and each trainee annotates its own constructor.
    model: Any
    """A language model, or a diffusion pipeline."""
    patch: Any
    """Module whose state is saved as the patch; None if the training has no patch."""
    adapters: lora.Adapters | None
    """Low-rank adapters in the model that train instead of its weights; None if the weights train. `PatchAlone` has none."""

    def forward(self, batch: Any) -> Loss:
        """Return the paper's loss of one micro-batch, a `Batch` of tokens or `Drawings`."""
        raise NotImplementedError

    # The hooks do nothing here instead of being abstract, because most methods need none of them.
    def on_step(self, step: int, steps_per_epoch: float) -> None:
        """Hook before step `step` (from 0), on every worker; `steps_per_epoch` is at most the number of all steps."""

    # WaRP rotates the summed gradient of a step once, and only the loop knows which pass is the last.
    def before_pass(self, is_last: bool) -> None:
        """Hook before each forward pass of a step; the step's gradients are complete after the last one."""

    # A proximal step needs the learning rate as its step size (LinEAS).
    def after_step(self, lr: float) -> None:
        """Hook after the optimizer has moved the parameters, on every worker; `lr` is the step's learning rate."""

    def finished(self, state: dict[str, Tensor]) -> patches.SavedPatch:
        """Return the patch to save, given a trained state dict of `self.patch`: a new patch of its kind with that state."""
        # A new patch is made, because under ZeRO 3 the tensors of `self.patch` are shards, and snapshots are states of earlier
        # steps. It is made from `spec`, as `patches.load` does, so that what is saved can be loaded.
        patch = patches.KINDS[self.patch.kind](**self.patch.spec())
        patch.load_state_dict(state)
        return patch

    def model_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the model's weights to save, by name, given a trained state dict of this module; adapters are folded in."""

        # `model.` and `adapters.` are the names of the trainee's submodules; `patch.` is saved by `finished`.
        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}

        return part("model.") if self.adapters is None else self.adapters.folded(part("model."), part("adapters."))

    @classmethod
    # 1 suits losses that are means within a row: a long pair then weighs as much as a short one.
    def counts(cls, row: Row, loss_on: str) -> int:
        """Return the part of a row in the divisor of the loss, its number of target tokens; override it with 1 for pairs or
        images."""
        # A class method, because the divisor of a step is known from its rows, before any of them is encoded into a batch.
        return sum(row.targets(loss_on))

    @classmethod
    def size(cls, config: Any, skeleton: PreTrainedModel) -> Size | None:
        """Return the memory that the training needs; None if all of the model trains, or too little of it to matter.

        Without an override it is that of the low-rank adapters that a config asks for.

        Args:
            config: the method's config.
            skeleton: the model's modules on the meta device, without weights.
        """
        # For other trainings the result is None, and the estimate takes all of the model's parameters as trained.
        return Size(lora.num_trained(skeleton, config.lora)) if lora.adapts(config) else None

    # The training calls this after the constructor of the method's class has run, which `super().__init__` cannot see.
    def check(self, below: Sequence[patches.SavedPatch] = ()) -> None:
        """Refuse a trainee that contradicts its base class, or that did not attach patches of the model that it starts from.

        Args:
            below: `Inputs.below`, the patches that the model carries already.

        Raises:
            ValueError: the message names the right base class, or the call that attaches the patches.
        """
        name = type(self).__name__
        # A trainee that forgets the patches below would silently train on another model.
        stack = patches.attached_patches(self.model) or ()
        # Patches are compared by identity, because two patches of one kind may hold equal numbers.
        missing = [patch for patch in below if not any(patch is other for other in stack)]
        if missing:
            # The two causes have two remedies: where the weights train, a patch that was made for the old weights cannot be
            # retained.
            remedy = (
                "start from a model without patches, since its own weights train; `steerlab export` folds some kinds"
                if self.leaves_model
                else "call patches.attach(model, [*inputs.below, self.patch]) once, in its constructor"
            )
            raise ValueError(
                f"{name} trains without {len(missing)} of {len(below)} patches that the model carries already "
                f"({missing[0].kind}): {remedy}"
            )
        # A frozen model would be saved as a full copy of weights that are on disk already.
        frozen = not any(parameter.requires_grad for parameter in self.model.parameters())
        if self.leaves_model and frozen:
            raise ValueError(f"{name} freezes the model, whose weights would be saved as they were: derive it from PatchAlone")
        if self.leaves_patch and self.patch is None:
            raise ValueError(f"{name} has no patch: set self.patch, or derive it from WholeModel")
        if not self.leaves_patch and self.patch is not None:
            raise ValueError(f"{name} has a patch, which WholeModel does not save: derive it from PatchedModel or PatchAlone")


class WholeModel(Trainee):
    """Base of trainings that save the model's own weights. Without a `train` section a job evaluates the model as it is.

    With `adapted`, low-rank adapters train, and are folded into the weights that are saved.
    """

    # Class variables, because the table of methods reports what a job saves before anything trains.
    leaves_model, leaves_patch = True, False

    def __init__(self, model: PreTrainedModel, adapted: lora.Lora | None = None) -> None:
        super().__init__()
        # The model is registered first, so that a parameter of both is known by its name in the model.
        self.model = model
        self.adapters = train_weights(model, adapted)
        self.patch = None


class PatchedModel(Trainee):
    """Base of trainings that save the model's own weights and a patch on them, `self.patch`.

    With `adapted`, low-rank adapters train together with the patch, and are folded into the weights that are saved.
    """

    # A rotation of embeddings without the weights that were trained with it would only disturb the base model.
    leaves_model, leaves_patch = True, True

    def __init__(self, model: PreTrainedModel, adapted: lora.Lora | None = None) -> None:
        super().__init__()
        self.model = model
        self.adapters = train_weights(model, adapted)


class PatchAlone(Trainee):
    """Base of trainings that save only a patch, `self.patch`; the model that it is attached to is frozen.

    The constructor attaches the whole stack, the patches that the model carries already and the new one:

        patches.attach(model, [*inputs.below, self.patch])

    The training refuses a trainee that does not attach `inputs.below`.
    """

    # Such a training adds only a patch of a few megabytes, or of one matrix, to the store.
    leaves_model, leaves_patch = False, True

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        # The model is frozen and not only missing from the optimizer: autograd would otherwise compute and store a gradient for
        # every weight.
        self.model = model.requires_grad_(False)

    def train(self, mode: bool = True) -> PatchAlone:
        """Set the patch's training mode; the model stays in evaluation mode."""
        # nn.Module.train sets every submodule, the frozen model among them; the next line takes that back for it.
        super().train(mode)
        # Dropout in a frozen model would only add noise to the patch's gradients.
        self.model.train(False)
        return self


# The sorted values of fewer samples do not describe a distribution, and a slope through two of them is exact but meaningless.
MIN_SAMPLES = 4
"""Smallest sample that a map is fitted on (the authors' code of LinEAS: `force_small_batch`)."""
# The order is that of the arguments of a fit: (config, source, target).
SAMPLES = ("source", "target")
"""Roles of the data sets whose activations a closed form is fitted on."""
Samples = Mapping[str, Tensor]
"""Pooled activations by place: (N, D), float32."""
ANY_KIND = ("causal_lm", "diffusion")
"""All kinds of model, for `Method.kinds`."""


class SteeringConfig(MethodConfig):
    """Hyperparameters of a method that reads activations."""

    pooling: Pooling = "mean"
    """Pooling of the activations."""
    # The steered places may differ from those that are read: CAA reads one token and steers many, LinEAS steers norms and may
    # measure elsewhere.
    steer: Selection | None = None
    """Modules and tokens on which the maps act, among the places that were read; null: all of these places, every token."""
    # The field is excluded at its default, so that the keys of jobs that were written before it existed do not change.
    inverse: bool = Field(False, exclude_if=lambda inverse: not inverse)
    """Apply the inverse maps, which induce what the fitted maps remove."""
    pixels: Pixels = Field("pixel", exclude_if=lambda pixels: pixels == "pixel")
    """In images, mean: the mean of a channel moves and its pixels keep their spread; pixel: each pixel is mapped."""


class SequentialConfig(SteeringConfig):
    """Hyperparameters of a closed form that may be fitted one place after another."""

    # The fit is causal: a place is fitted on what it will see at inference, when all earlier maps act.
    incremental: bool = True
    """Fit the maps one after another, each on activations with all earlier maps applied; false: fit all at once."""
    incremental_target: Literal["steered", "plain"] = Field("steered", exclude_if=lambda target: target == "steered")
    """Target of an incremental fit. steered: the target texts are read with the earlier maps, as the source texts are (authors'
    code); plain: they are read once from the model without maps."""


@dataclass(frozen=True)
class Method:
    """One entry of the table of methods: the fields and questions that all classes share."""

    # A job's `method` section is read into it; an unknown key is an error that lists its fields.
    Config: type[MethodConfig]
    """Hyperparameters; defaults are the paper's."""
    _: KW_ONLY
    # The check gets facts instead of a model, because a job is checked on a machine that may not hold its model.
    check: Callable[[Any, ModelFacts, Job], None] = lambda config, facts, job: None
    """(config, facts about the model, job): raises ValueError for settings that cannot work, before anything starts."""
    # A strength beyond the range gives a warning instead of an error: it is an extrapolation that a user may want.
    strength_range: tuple[float, float] | None = None
    """Lowest and highest meaningful strength of the patch; others give a warning. None: any strength."""
    kinds: tuple[str, ...] = ("causal_lm",)
    """Kinds of model that the method works on."""
    example: str | None = None
    """Job file of the repository that uses the method, for the catalogue. None if it has none."""

    leaves_model: ClassVar[bool] = False
    leaves_patch: ClassVar[bool] = False
    closed_form: ClassVar[bool] = False
    """Whether the method makes its result without a `train` section."""
    changes_trained: ClassVar[bool] = False
    """Whether the method changes what another job has trained, and so reads the model from which that training started."""
    puts_preamble: ClassVar[bool] = False
    """Whether the method puts a preamble before each prompt."""
    needs_training: ClassVar[bool] = False
    """Whether a job needs a `train` section, unless the model that it starts from is trained already."""
    shared_example: ClassVar[str | None] = None
    """Job file whose method may be any of this class, for methods without an `example`."""

    # The result is roles instead of data sets, because the stages that extract are planned from the job.
    def reads(self, config: MethodConfig) -> tuple[str, ...]:
        """Return the roles of the data sets whose activations are extracted before the method runs."""
        return ()

    def prepares(self, config: MethodConfig, skeleton: PreTrainedModel, prepare: Prepare) -> tuple[str, ...]:
        """Declare the stages before the training by calls of `prepare`, and return the names that the training reads.

        Raises:
            ValueError: a stage cannot be made for this config or model.
        """
        return ()

    @property
    def is_prepared(self) -> bool:
        """Whether `prepares` may declare stages: only then is the model's code loaded to plan a job."""
        return False

    # The planner asks this first, because the activations that such a fit reads are not extracted before it.
    def walks(self, config: MethodConfig) -> bool:
        """Return whether maps are fitted one after another, each on activations with all earlier maps applied."""
        # The class of the config decides, not the method's name, so that a closed form in a user's own file is fitted in this
        # way too.
        return isinstance(config, SequentialConfig) and config.incremental

    def reads_model(self, config: MethodConfig) -> bool:
        """Return whether the method needs activations of the model, extracted before it runs or read by the fit itself."""
        return self.walks(config) or bool(self.reads(config))

    def steers(self, config: MethodConfig) -> Selection | None:
        """Return the modules and tokens on which the patch acts; None if the config does not restrict them."""
        return config.steer if isinstance(config, SteeringConfig) else None

    def pools(self, config: MethodConfig) -> Pooling | None:
        """Return the pooling of the activations that the method reads; None for a method that never reads activations."""
        return config.pooling if isinstance(config, SteeringConfig) else None

    def leaves_maps(self, config: MethodConfig) -> bool:
        """Return whether the patch is one of maps of activations, which alone have an inverse."""
        return self.leaves_patch and isinstance(config, SteeringConfig)

    def needs_unaligned_job(self, config: MethodConfig) -> bool:
        """Return whether the chain of jobs must hold the model before its alignment."""
        return False


@dataclass(frozen=True)
class Plain(Method):
    """A method that does not change the model."""


@dataclass(frozen=True)
class Prompted(Method):
    """A method that puts text before each prompt; weights and activations do not change."""

    preamble: Callable[[Any, Sequence[Mapping[str, object]]], Preamble]
    """(config, rows of `data.examples`) -> the preamble. There are no rows if the job has no such data set."""

    closed_form: ClassVar[bool] = True
    puts_preamble: ClassVar[bool] = True


@dataclass(frozen=True)
class Assembled(Method):
    """A method whose patch is made of what its config names; nothing is trained, and activations are not read."""

    # The function gets a loaded model, because whether a tokenizer or a width fits is known only then.
    assemble: Callable[[Any, SteeredModel], patches.SavedPatch]
    """(config, the model that the patch is for) -> the patch. Raises ValueError if the two do not go together."""

    closed_form: ClassVar[bool] = True
    leaves_patch: ClassVar[bool] = True


@dataclass(frozen=True)
class Trained(Method):
    """A method that trains."""

    module: type[Trainee]
    """The trainee, constructed as `module(model, config, inputs)`; it attaches its patch to the model."""
    _: KW_ONLY
    # The extraction is a stage of its own, which other jobs with the same texts and model share.
    roles_read: tuple[str, ...] = ()
    """Roles of the data sets whose activations are extracted first. Needs a config derived from `SteeringConfig`."""
    # The function reads names and shapes only: stages are planned, and their memory estimated, before any weight is loaded.
    preparations: Callable[[Any, PreTrainedModel, Prepare], tuple[str, ...]] | None = None
    """(config, the model's modules without weights, prepare) -> names of the preparations that the training reads. It declares
    the stages before the training (preparations.py) and raises ValueError for one that cannot be made. None: the method has
    none."""

    def __post_init__(self) -> None:
        # This is checked when the method is defined, so that the error names the class to change. Only these bases are allowed,
        # because what an artifact holds follows from them.
        if not issubclass(self.module, WholeModel | PatchedModel | PatchAlone):
            raise TypeError(f"{self.module.__name__}: derive it from WholeModel, PatchedModel or PatchAlone")
        if self.roles_read and not issubclass(self.Config, SteeringConfig):
            raise TypeError(f"{self.Config.__name__} of a method that reads activations: derive it from SteeringConfig")

    @property
    def leaves_model(self) -> bool:  # type: ignore[override]
        """Whether the artifact holds the model's own weights."""
        # The property reads the trainee's class, so that the table of methods and the training cannot disagree.
        return self.module.leaves_model

    @property
    def leaves_patch(self) -> bool:  # type: ignore[override]
        """Whether the artifact holds a patch, whose strength can be varied."""
        return self.module.leaves_patch

    @property
    def needs_training(self) -> bool:  # type: ignore[override]
        """Whether a job needs a `train` section, unless the model that it starts from is trained already."""
        # A whole model without training is the model itself, which is a baseline. A patch without training would do nothing.
        return self.leaves_patch

    def reads(self, config: MethodConfig) -> tuple[str, ...]:
        """Return `roles_read`."""
        return self.roles_read

    @property
    def is_prepared(self) -> bool:
        """Whether the method has `preparations`."""
        return self.preparations is not None

    def prepares(self, config: MethodConfig, skeleton: PreTrainedModel, prepare: Prepare) -> tuple[str, ...]:
        """Declare the `preparations`, and return the names of those that the training reads."""
        if self.preparations is None:
            return ()
        names = self.preparations(config, skeleton, prepare)
        # The check follows all declarations, because a training may read any of them, in any order.
        prepare.check_read(names)
        return names


@dataclass(frozen=True)
class Fitted(Method):
    """A method that computes its maps in closed form from source and target activations."""

    Config: type[SteeringConfig]
    # Places are in the order in which the model runs them; a place without a map is missing from the result.
    fit: Callable[[Any, Samples, Samples], Mapping[str, Map]]
    """(config, source, target) -> maps by place. It is called once with all places, or once for each (`walks`), and must give
    the same maps either way for the same samples."""
    _: KW_ONLY
    # A lambda, because `check_roles` is defined further below.
    check: Callable[[Any, ModelFacts, Job], None] = lambda config, facts, job: check_roles(config, facts, job)
    kinds: tuple[str, ...] = ANY_KIND

    leaves_patch: ClassVar[bool] = True
    closed_form: ClassVar[bool] = True
    shared_example: ClassVar[str | None] = "jobs/tiny/act.yaml"

    def __post_init__(self) -> None:
        # The stage that makes the patch reads `steer`, `inverse` and `pixels` from the config of every closed form.
        if not issubclass(self.Config, SteeringConfig):
            raise TypeError(f"{self.Config.__name__} of a closed form: derive it from SteeringConfig")

    def reads(self, config: MethodConfig) -> tuple[str, ...]:
        """Return the roles of the samples that are extracted first: those that the fit does not read itself (`walked`)."""
        # Maps that are fitted all at once read both samples from extracted activations; a sequential fit reads there only what
        # comes from the plain model.
        return tuple(role for role in SAMPLES if role not in self.walked(config))

    def walked(self, config: MethodConfig) -> tuple[str, ...]:
        """Return the roles of the texts that the fit itself runs through the model; none unless it `walks`."""
        # Each map changes what later places compute, so these activations do not exist before the fit.
        if not self.walks(config):
            return ()
        # `walks` has checked the class already; the assertion is for the type checker.
        assert isinstance(config, SequentialConfig)
        # The source is walked in either case, since its activations after a fitted map exist only with that map.
        return SAMPLES if config.incremental_target == "steered" else ("source",)


def language_modelling_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the summed next-token cross-entropy in nats over the labelled tokens, computed in float32.

    Args:
        logits_BTV: logits of each token, (B, T, V).
        labels_BT: token ids, (B, T), `IGNORED` where a token is not a target; position t is predicted from t - 1.
    """
    # The loss is computed in float32, because a log-sum-exp over a vocabulary has only two or three digits in bfloat16. It is a
    # sum, because means of passes with different numbers of targets would weigh the tokens of short passes more. Logits of the
    # last position predict nothing, and nothing predicts position 0, so that (B (T - 1), V) meets (B (T - 1),).
    return nn.functional.cross_entropy(
        logits_BTV[:, :-1].float().flatten(0, 1), labels_BT[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def next_token_loss(logits_BTV: Tensor, labels_BT: Tensor) -> Loss:
    """Return `language_modelling_loss`, and as `token_accuracy` the number of targets whose own token has the largest logit.

    Args:
        logits_BTV: logits of each token, (B, T, V).
        labels_BT: token ids, (B, T), `IGNORED` where a token is not a target; position t is predicted from t - 1.
    """
    # A prediction is never IGNORED, so positions that are not targets never count as right. Logits of position t - 1 are
    # compared with the label of t, (B, T - 1), without gradients, as an argmax has none.
    is_right_BT = logits_BTV[:, :-1].detach().argmax(-1) == labels_BT[:, 1:]
    return Loss(language_modelling_loss(logits_BTV, labels_BT), {"token_accuracy": is_right_BT.float().sum()})


# The optimizer, the checkpoint and the artifact's report of trained parameters all use this function.
def trained_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that receive gradients, by name."""
    # The order is that of registration, on which the optimizer's state in a checkpoint relies. Tied weights come once, under
    # their first name.
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def train_everything(model: PreTrainedModel) -> None:
    """Let every weight receive gradients."""
    # transformers loads a model unfrozen, but the model may come from code that froze it.
    for parameter in model.parameters():
        parameter.requires_grad_(True)


def train_weights(model: PreTrainedModel, adapted: lora.Lora | None) -> lora.Adapters | None:
    """Let every weight receive gradients, or add low-rank adapters that train instead and return them."""
    # `Adapters` freezes the model itself before it adds what trains.
    if adapted is not None:
        return lora.Adapters(model, adapted)
    train_everything(model)
    return None


def check_masters(job: Job) -> None:
    """Raise ValueError for training the model's own weights in bfloat16 without float32 copies in the optimizer."""
    if lora.adapts(job.method):  # adapters are always float32
        return
    # bfloat16 has 8 bits of mantissa, so an update smaller than 1/256 of a weight would be rounded away. From ZeRO 1 on,
    # DeepSpeed stores float32 copies with its shards.
    if job.model.dtype == "bfloat16" and job.scale.zero_stage == 0:
        raise ValueError("model.dtype bfloat16 trains with float32 master weights, which needs scale.zero_stage 1, 2 or 3")


def check_roles(config: MethodConfig, facts: ModelFacts, job: Job) -> None:
    """Raise ValueError for a job without source and target texts, or with the same texts on both sides."""
    # The job is checked before anything is extracted, because the fit itself would fail only hours later.
    missing = [role for role in ("source", "target") if role not in job.data.by_role]
    if missing:
        raise ValueError(
            f"data.{missing[0]}: method {config.name} needs this data set; it moves source texts towards target texts"
        )
    source, target = job.data.by_role["source"], job.data.by_role["target"]
    # Equal samples give the identity as every method's map, which cannot be what the job was meant to do.
    if source == target:
        raise ValueError("data.source and data.target are the same rows, so there is nothing to move")
    if source.format != target.format:
        raise ValueError(
            f"data.source has format {source.format} and data.target {target.format}: activations of texts that are read in "
            "different ways differ for that reason alone"
        )
    for role, data in (("source", source), ("target", target)):
        # A prompt of a diffusion model gives one sample for each seed.
        num_seeds = 1 if data.seeds is None else data.seeds[1] - data.seeds[0]
        # Without a limit the number of rows is known only after they are read; `check_samples` checks it then.
        if data.limit is not None and data.limit * num_seeds < MIN_SAMPLES:
            drawings = "" if data.seeds is None else f" of {num_seeds} seeds each"
            raise ValueError(f"data.{role}.limit {data.limit}{drawings}: a distribution needs {MIN_SAMPLES} samples or more")


def check_samples(source_ND: Tensor, target_MD: Tensor) -> None:
    """Check that a map can be fitted on two samples of activations, (N, D) and (M, D).

    Raises:
        ValueError: fewer than 4 samples on a side, different widths, or a NaN or infinite value.
    """
    for side, x in (("source", source_ND), ("target", target_MD)):
        if len(x) < MIN_SAMPLES:
            raise ValueError(f"the {side} has {len(x)} samples; a distribution needs {MIN_SAMPLES} or more")
        # One NaN would make the map of its neuron NaN, and with it every logit.
        if not bool(x.isfinite().all()):
            # The message names the first such value; the caller names the place.
            row, neuron = (int(i) for i in (~x.isfinite()).nonzero()[0])
            raise ValueError(f"the {side} activation of row {row}, neuron {neuron} is {float(x[row, neuron])}")
    # A map has one width, so samples of two widths come from two places or two models.
    if source_ND.shape[1] != target_MD.shape[1]:
        raise ValueError(f"source and target have {source_ND.shape[1]} and {target_MD.shape[1]} neurons")
