"""The contract of methods that change what another job has trained: a closed form on weights, without a training of their own.

Such a method is an instance of `Edited`. A job names the trained job as its model, and the platform hands the method one weight
at a time, as it is in three models of the chain of jobs:

    unaligned     before its alignment: the model from which the aligned one was trained, or the source `method.unaligned`
    before        aligned: the model from which the trained job started
    after         the result of the trained job, with its patches merged in

What the method returns is saved as a patch on the trained model, W - W_after, so that strength 0 is the trained model and every
strength between 0 and 1 goes part of the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from pydantic import Field
from torch import Tensor

from steerlab.job import MethodConfig, Source
from steerlab.methods.contract import Method
from steerlab.methods.preparations import Prepare
from steerlab.models import WeightPlace

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class EditConfig(MethodConfig):
    """Hyperparameters of a method that compares a model with the one before its alignment."""

    unaligned: Source | None = Field(None, exclude_if=lambda source: source is None)
    """Source of the model before its alignment, such as the base of a chat model; null takes the model from which the aligned
    one was trained by a job."""


# All architectures have the orientation (M, N) here: formulas need not know that GPT-2 stores (N, M).
class Weight(NamedTuple):
    """One parameter in the three models, float32; (M, N) for a linear layer, however the model stores it."""

    # The parameter has this name in all three models; the stage refuses a model without it.
    name: str
    # Embeddings, norms and biases have no place, so methods that weigh a change by a layer's inputs skip them.
    place: WeightPlace | None
    """The linear layer, if the method's `places` names it; None for all other parameters."""
    before: Tensor
    after: Tensor
    unaligned: Tensor | None
    """None if the method does not ask for this model."""
    # A function, because N x N float64 numbers are read from disk for one layer at a time, and only for methods that need them.
    second_moment: Callable[[], Tensor]
    """Returns the mean of x x^T over the inputs x of the linear layer in the model before, (N, N) float64, if the method has
    asked for these moments (`Prepare.moments`)."""


class Edit(NamedTuple):
    """The new value of a parameter."""

    # The method returns the weight instead of its difference: the platform subtracts in one place and saves the difference as
    # the patch.
    weight: Tensor
    facts: Mapping[str, float] = {}
    """Numbers about it, stored with the patch."""


@dataclass(frozen=True)
class Edited(Method):
    """A method that computes weights from those before and after the training of another job."""

    # The function gets one weight at a time, because three models of 7B parameters in float32 would take 84 GB.
    edit: Callable[[Any, Weight], Edit | None]
    """(config, weight) -> the weight that replaces `after`; None retains the trained weight."""
    _: KW_ONLY
    # The model may be without values, because stages are planned on modules that have none.
    places: Callable[[Any, PreTrainedModel], list[WeightPlace]] = lambda config, model: []
    """(config, the model, with or without values) -> the linear layers that the method treats as such."""
    # A third model is loaded only for methods that read it.
    needs_unaligned: bool = False
    """Whether the method reads the model before its alignment. Needs a config derived from `EditConfig`."""
    preparations: Callable[[Any, PreTrainedModel, Prepare], tuple[str, ...]] | None = None
    """As `Trained.preparations`; they read the model before the training."""

    leaves_patch: ClassVar[bool] = True
    # Jobs have no `train` section: the training is that of the job which `model.source` names.
    closed_form: ClassVar[bool] = True
    changes_trained: ClassVar[bool] = True
    shared_example: ClassVar[str | None] = "jobs/tiny/realign.yaml"

    def __post_init__(self) -> None:
        # This is checked when the method is defined: without the field a job could not name the model, and would fail only
        # after the trained job had run.
        if self.needs_unaligned and not issubclass(self.Config, EditConfig):
            raise TypeError(f"{self.Config.__name__} of a method that reads the unaligned model: derive it from EditConfig")

    def needs_unaligned_job(self, config: MethodConfig) -> bool:
        """Return whether the method compares with the model before its alignment, and its config does not name that model."""
        return self.needs_unaligned and isinstance(config, EditConfig) and config.unaligned is None

    @property
    def is_prepared(self) -> bool:
        """Whether the method has `preparations`."""
        return self.preparations is not None

    def prepares(self, config: MethodConfig, skeleton: PreTrainedModel, prepare: Prepare) -> tuple[str, ...]:
        """Declare the `preparations`, and return the names of those that `edit` reads."""
        if self.preparations is None:
            return ()
        # The preparations read the model before the training: X in the papers are the inputs of the aligned model.
        names = self.preparations(config, skeleton, prepare)
        prepare.check_read(names)
        # Only the preparations that `edit` reads are returned; further stages may be inputs of these.
        return names
