"""What a trained method asks for before its training: stages that are cached like any other, spread over the cluster.

A method's `prepares(config, skeleton, prepare)` calls the functions of `prepare`, each for one stage, in the order in which
they need each other, and returns the names of those that its training reads:

    def prepares(config, skeleton, prepare):
        prepare.moments("safety", extract)
        prepare.map_parts("basis", 1, {}, parts, eigenbasis, needs=("moments",))
        return ("basis",)

How shards and parts reach the workers, and how a stage goes on after a kill, is the business of `stages/`. All leave a
directory that `tensors.Parts` opens, but moments have their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from steerlab.inputs.tokens import Batch, Row
from steerlab.job import ExtractConfig
from steerlab.steered.language import SteeredModel
from steerlab.storage.plan import Estimate
from steerlab.storage.tensors import Shape

MOMENTS = "moments"
"""Name of the preparation that `Prepare.moments` makes."""
NOTHING = Estimate()


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


class Source(NamedTuple):
    """What a part is made from."""

    params: Mapping[str, Any]
    needed: Mapping[str, Path]
    """Directories of the preparations before, by name."""
    model: SteeredModel | None
    """Where the model is read."""


StartSums = Callable[[SteeredModel, Mapping[str, Any], Mapping[str, Path]], Sums]
"""(model, params, directories of what is needed) -> sums at zero."""
StartKeeper = Callable[[SteeredModel, Mapping[str, Any]], Keeper]
"""(model, params) -> keeper."""
MakePart = Callable[[Source, str, Path], dict[str, Any]]
"""(source, part, path of the safetensors file to write) -> what is to be known of it; people are told its `note`."""


class Prepare:
    """Takes a method's preparations and makes nothing of them: for a check of its settings. Others make stages.

    `params` are what a stage declares besides the model and the rows, JSON values; `version` is raised when its code changes,
    `needs` names preparations before it, and `estimate` is what it takes besides the model.
    """

    def moments(self, role: str, config: ExtractConfig) -> None:
        """Take moments of what the model computes on the rows of a data set (activations/moments.py)."""

    def sum_over_rows(
        self,
        name: str,
        version: int,
        role: str,
        params: Mapping[str, Any],
        start: StartSums,
        *,
        needs: tuple[str, ...] = (),
        estimate: Estimate = NOTHING,
    ) -> None:
        """Sum over batches of consecutive rows of a data set, on workers that hold the model.

        `rows_per_batch`, `rows_per_shard` (a multiple of it) and `max_tokens` are among `params`.
        """

    def map_parts(
        self,
        name: str,
        version: int,
        params: Mapping[str, Any],
        parts: tuple[str, ...],
        make: MakePart,
        *,
        needs: tuple[str, ...] = (),
        reads_model: bool = False,
        estimate: Estimate = NOTHING,
    ) -> None:
        """Make parts each by itself, one task a part, from what others left or, where it reads the model, from the weights."""

    def keep_of_rows(
        self, name: str, version: int, role: str, params: Mapping[str, Any], start: StartKeeper, values_per_target: int
    ) -> None:
        """Keep tensors of every row that the training will see, cut as it cuts them, so that no model need run there.

        `batch_tokens` and `rows_per_shard` are among `params`, to which `train.max_tokens` is added; `values_per_target`
        numbers are kept of each token in the loss, in the model's type: for estimates.
        """
