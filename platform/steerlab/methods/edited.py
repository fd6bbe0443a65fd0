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


class Weight(NamedTuple):
    """One parameter in the three models, float32; (M, N) for a linear layer, however the model stores it."""

    name: str
    place: WeightPlace | None
    """The linear layer, if the method's `places` names it; None for all other parameters."""
    before: Tensor
    after: Tensor
    unaligned: Tensor | None
    """None if the method does not ask for this model."""
    second_moment: Callable[[], Tensor]
    """Returns the mean of x x^T over the inputs x of the linear layer in the model before, (N, N) float64, if the method has
    asked for these moments (`Prepare.moments`)."""


class Edit(NamedTuple):
    """A parameter as the method wants it."""

    weight: Tensor
    facts: Mapping[str, float] = {}
    """Numbers about it, kept beside the patch."""


@dataclass(frozen=True)
class Edited(Method):
    """A method that computes weights from those before and after the training of another job."""

    edit: Callable[[Any, Weight], Edit | None]
    """(config, weight) -> the weight that takes the place of `after`; None leaves it as it was trained."""
    _: KW_ONLY
    places: Callable[[Any, PreTrainedModel], list[WeightPlace]] = lambda config, model: []
    """(config, the model, with or without values) -> the linear layers that the method treats as such."""
    needs_unaligned: bool = False
    """Whether the method reads the model before its alignment. Needs a config derived from `EditConfig`."""
    preparations: Callable[[Any, PreTrainedModel, Prepare], tuple[str, ...]] | None = None
    """As `Trained.preparations`; they read the model before the training."""

    leaves_patch: ClassVar[bool] = True
    closed_form: ClassVar[bool] = True
    changes_trained: ClassVar[bool] = True
    shared_example: ClassVar[str | None] = "jobs/tiny/realign.yaml"

    def __post_init__(self) -> None:
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
        names = self.preparations(config, skeleton, prepare)
        prepare.check_read(names)
        return names
