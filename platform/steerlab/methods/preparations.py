"""What a trained method may ask for before its training: stages that are cached like any other.

Moments of what the model computes, sums over batches of rows, tensors of each row, and parts that are made one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor

from steerlab.inputs.tokens import Batch, Row
from steerlab.job import ExtractConfig
from steerlab.steered.language import SteeredModel
from steerlab.storage.plan import Estimate
from steerlab.storage.tensors import Shape

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
