"""What a method is: a config, a check against the model, and one of two ways to make a patch.

A method is *trained*: `module` is an `nn.Module` whose forward is the paper's loss. Or it is *fitted*: `fit` is a closed form
from two samples of activations to one affine map a place. Both may ask for activations that an extraction leaves before them,
and a trained one for preparations of its own, stages that are cached like any other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from steerlab.activations.parquet import Activations
from steerlab.inputs.tokens import IGNORED, Batch, Row
from steerlab.job import ExtractConfig, Job, MethodConfig, Selection
from steerlab.models import ModelFacts
from steerlab.patches.maps import AffineMap
from steerlab.steered.language import SteeredModel
from steerlab.storage.plan import Estimate
from steerlab.storage.tensors import Shape

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Loss(NamedTuple):
    """A loss as a sum, so that any split of a step's rows over passes and workers adds up to the same step."""

    total: Tensor
    """Sum over the batch's targets; the loop divides by the number of targets of the whole step."""
    metrics: dict[str, Tensor]
    """Further sums over targets, reported divided by the same number."""


class Trainee(Protocol):
    """The `nn.Module` that a method hands to the training loop: parameters with `requires_grad` are trained, no others."""

    model: PreTrainedModel
    patch: Any | None
    """The patch that is saved with the weights, or None."""

    def forward(self, batch: Batch) -> Loss:
        """Return the paper's loss of one micro-batch."""
        ...

    def on_step(self, step: int, steps_per_epoch: float) -> None:
        """Follow the training: called before step `step` (from 0) on every worker; at most all steps are one epoch."""
        ...


MIN_SAMPLES = 4
"""Fewer samples say nothing about a distribution (authors' code: `force_small_batch`)."""
Samples = Mapping[str, Tensor]
"""Pooled activations by tap: (N, D), float32."""


@dataclass(frozen=True)
class Inputs:
    """What a method is handed besides its model and config."""

    below: tuple[Any, ...] = ()
    """Patches that the model carries already; the method's own one is attached above them."""
    activations: Mapping[str, Activations] = field(default_factory=dict)
    """Extracted activations by the role of their data set."""
    prepared: Mapping[str, Path] = field(default_factory=dict)
    """What the method's preparations left, by their name."""


NOTHING = Estimate()


@dataclass(frozen=True)
class Moments:
    """A preparation: moments of what the model computes on the rows of a data set (moments.py says what is in them)."""

    name: ClassVar[str] = "moments"
    needs: ClassVar[tuple[str, ...]] = ()
    role: str
    extract: ExtractConfig


class Sums(Protocol):
    """What is added up over the batches of a data set."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Names and shapes of the tensors, float32."""
        ...

    def add(self, batch: Batch, number: int) -> None:
        """Add what one batch gives; `number` is the batch's in the data set, for messages."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the sums, in the order of `shapes`."""
        ...

    def close(self) -> None:
        """Leave the model as it was."""
        ...


@dataclass(frozen=True)
class OverRows:
    """A preparation: a sum over batches of consecutive rows of a data set, spread over workers that hold the model."""

    name: str
    version: int
    role: str
    params: Mapping[str, Any]
    """What it declares besides the model and the rows: JSON values; `rows_per_batch`, `rows_per_shard` (a multiple of it) and
    `max_tokens` are among them."""
    start: Callable[[SteeredModel, Mapping[str, Any], Mapping[str, Path]], Sums]
    """(model, params, directories of what it needs) -> sums at zero."""
    needs: tuple[str, ...] = ()
    """Names of the preparations before it."""
    estimate: Estimate = NOTHING
    """Besides the model."""


@dataclass(frozen=True)
class OverParts:
    """A preparation: parts that are made each by itself, one task a part, from what others left or from the weights."""

    name: str
    version: int
    params: Mapping[str, Any]
    parts: tuple[str, ...]
    make: Callable[[Source, str, Path], dict[str, Any]]
    """(source, part, path of the safetensors file to write) -> what is to be known of it; people are told its `note`."""
    needs: tuple[str, ...] = ()
    reads_model: bool = False
    """True when the parts are made from the model's weights."""
    estimate: Estimate = NOTHING


class Source(NamedTuple):
    """What a part is made from."""

    params: Mapping[str, Any]
    needed: Mapping[str, Path]
    """Directories of the preparations before, by name."""
    model: SteeredModel | None
    """Where the model is read."""


class Keeper(Protocol):
    """What is kept of each row of a data set."""

    def shapes(self, number: int, row: Row) -> Mapping[str, Shape]:
        """Names and shapes of the tensors that will be kept of the row of this number; no two rows share a name."""
        ...

    def keep(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a batch's rows, row by row, in the order of `shapes`."""
        ...

    def close(self) -> None:
        """Leave the model as it was."""
        ...


@dataclass(frozen=True)
class OfEachRow:
    """A preparation: tensors of every row that the training will see, cut as it cuts them, so that no model need run there."""

    name: str
    version: int
    role: str
    params: Mapping[str, Any]
    """What it declares besides the model, the rows and `train.max_tokens`: JSON values; `batch_tokens` and `rows_per_shard` are
    among them."""
    start: Callable[[SteeredModel, Mapping[str, Any]], Keeper]
    """(model, params) -> keeper."""
    values_per_target: int
    """Numbers kept of each token in the loss, in the model's type; for estimates."""
    needs: tuple[str, ...] = ()
    """None: the model and the rows are enough."""


Preparation = Moments | OverRows | OverParts | OfEachRow


def _targets(row: Row, loss_on: str) -> int:
    return sum(row.targets(loss_on))


@dataclass(frozen=True)
class Method:
    """One entry of the table of methods."""

    Config: type[MethodConfig]
    """Hyperparameters; defaults are the paper's."""
    module: Callable[..., nn.Module] | None = None
    """(model, config, inputs) -> Trainee: the surgery or the hooks, and what trains."""
    fit: Callable[[Any, Samples, Samples], dict[str, AffineMap]] | None = None
    """(config, source, target) -> maps; never asks which of the two ways of `walks` it is called in."""
    reads: Callable[[Any], tuple[str, ...]] = lambda config: ()
    """Roles of the data sets whose activations the method wants extracted first."""
    walks: Callable[[Any], bool] = lambda config: False
    """True when maps are fitted one after another, each on what the source texts cause behind the maps before it."""
    pooling: Callable[[Any], str] = lambda config: "mean"
    """Pooling of the activations that are read."""
    steers: Callable[[Any], Selection | None] = lambda config: None
    """Where fitted maps act; None: on every token of the places that were read."""
    prepares: Callable[[Any, PreTrainedModel], tuple[Preparation, ...]] = lambda config, skeleton: ()
    """(config, the model's modules without weights) -> stages before the training, each after those that it needs."""
    trains_with: tuple[str, ...] = ()
    """Names of the preparations that the training reads, where there are such."""
    finished: Callable[[Any, dict[str, Tensor]], Any] | None = None
    """(trainee, trained state of its patch) -> the patch that is saved; None: one of the same make with that state."""
    before_pass: Callable[[Any, bool], None] = lambda module, is_last: None
    """(trainee, whether the step's gradients are complete after it) -> None: what comes before each forward pass."""
    trains: Callable[[Any, PreTrainedModel], tuple[int, int]] | None = None
    """(config, skeleton) -> trained parameters and bytes of a worker besides model and optimizer, where the model's own weights
    are frozen; None: a small patch."""
    holds_logits: bool = True
    """False when the loss makes logits in pieces, so that those of a batch are never there at once; for estimates."""
    check: Callable[[Any, ModelFacts, Job], None] = lambda config, facts, job: None
    """Refuse settings that cannot work on a model or in a job, with a ValueError, before anything starts."""
    trains_on: str = "train"
    """Role of the data set whose rows are trained on."""
    trains_model: bool = True
    """False when the model's own weights are frozen: the result is the patch alone."""
    counts: Callable[[Row, str], int] = _targets
    """(row, loss_on) -> what a row adds to the number that the loss is divided by."""
    after_step: Callable[[Any, float], None] = lambda module, lr: None
    """(trainee, learning rate) -> None: what follows the optimizer on every worker."""
    needs_training: bool = True
    """False when a job without a `train` section evaluates the model as it is."""
    leaves_patch: bool = True
    """False when the result is weights alone, so that there is no strength to vary."""
    strength_range: tuple[float, float] | None = None
    """Strengths that mean something; others are warned of. None where any does."""
    kinds: tuple[str, ...] = ("causal_lm",)
    """Kinds of model that the method works on."""


ANY_KIND = ("causal_lm", "diffusion")


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


def fitted(
    kind: type[MethodConfig],
    fit: Callable[[Any, Samples, Samples], dict[str, AffineMap]],
    walks: Callable[[Any], bool] = lambda config: False,
    strength_range: tuple[float, float] | None = None,
) -> Method:
    """Return the entry of a closed form; its config has `pooling` and `steer`. One that walks reads the target alone."""
    return Method(
        kind,
        fit=fit,
        reads=lambda config: ("target",) if walks(config) else ("source", "target"),
        walks=walks,
        pooling=lambda config: config.pooling,
        steers=lambda config: config.steer,
        check=check_roles,
        trains_model=False,
        strength_range=strength_range,
        kinds=ANY_KIND,
    )


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
