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

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from torch import Tensor

from steerlab.guards.json_values import Json
from steerlab.inputs.tokens import Batch, Row
from steerlab.job import ExtractConfig
from steerlab.steered.language import SteeredModel
from steerlab.storage.plan import Estimate
from steerlab.storage.tensors import Shape

MOMENTS = "moments"
"""Name of the preparation that `Prepare.moments` makes."""
NOTHING = Estimate()
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
_RESERVED = {"data", "data_fingerprint", "code", "model", "prompt", "prompt_fingerprints", "encoding"}
"""Parameters that the platform adds to a stage's own."""


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

    params: Mapping[str, Json]
    needed: Mapping[str, Path]
    """Directories of the preparations before, by name."""
    model: SteeredModel | None
    """Where the model is read."""


StartSums = Callable[[SteeredModel, Mapping[str, Json], Mapping[str, Path]], Sums]
"""(model, params, directories of what is needed) -> sums at zero."""
StartKeeper = Callable[[SteeredModel, Mapping[str, Json]], Keeper]
"""(model, params) -> keeper."""
MakePart = Callable[[Source, str, Path], Mapping[str, object]]
"""(source, part, path of the safetensors file to write) -> what is to be known of it; people are told its `note`."""


@dataclass(frozen=True)
class Moments:
    """Moments of what the model computes on the rows of a data set."""

    name: str
    role: str
    """Of the data set."""
    config: ExtractConfig


@dataclass(frozen=True)
class SumOverRows:
    """Sums over batches of consecutive rows of a data set, on workers that hold the model."""

    name: str
    version: int
    role: str
    params: Mapping[str, Json]
    start: StartSums
    needs: tuple[str, ...]
    estimate: Estimate


@dataclass(frozen=True)
class KeepOfRows:
    """Tensors of every row that the training will see."""

    name: str
    version: int
    role: str
    params: Mapping[str, Json]
    start: StartKeeper
    values_per_target: int


@dataclass(frozen=True)
class MapParts:
    """Parts that are each made by itself, one task a part."""

    name: str
    version: int
    params: Mapping[str, Json]
    parts: tuple[str, ...]
    make: MakePart
    needs: tuple[str, ...]
    reads_model: bool
    estimate: Estimate


Preparation = Moments | SumOverRows | KeepOfRows | MapParts
"""What a method asks for before its training, as `Prepare` hands it to whoever makes it."""


class Prepare:
    """Takes a method's preparations and makes nothing of them: for a check of its settings. Others override `make`.

    `params` are what a stage declares besides the model and the rows, JSON values; `version` is raised when its code changes,
    `needs` names preparations before it, and `estimate` is what it takes besides the model.
    """

    def __init__(self, roles: Collection[str] | None = None) -> None:
        """Take preparations over the data sets of these roles; None takes any."""
        self._roles = roles
        self._asked: list[str] = []

    def make(self, preparation: Preparation) -> None:
        """Make a preparation whose settings have been checked: here, nothing."""

    def check_read(self, names: Iterable[str]) -> None:
        """Refuse names that a training reads and that were not asked for. Raises ValueError."""
        self._check_needs(names, "its training reads")

    def _ask(
        self,
        name: str,
        role: str | None = None,
        needs: Iterable[str] = (),
        params: Mapping[str, Json] | None = None,
        also: str = "",
    ) -> None:
        """Refuse what could not be told apart, found or made. Raises ValueError."""
        if not _NAME.fullmatch(name) or name == "model":
            raise ValueError(f"a preparation is called {name!r:.60}: small letters, digits and underscores, and not model")
        if name in self._asked:
            raise ValueError(f"two preparations are called {name}: the second would take the place of the first")
        if role is not None and self._roles is not None and role not in self._roles:
            raise ValueError(f"preparation {name}: the job has no data.{role}; it has {', '.join(self._roles) or 'none'}")
        self._check_needs(needs, f"preparation {name} needs")
        if taken := _RESERVED & {*(params or {})}:
            raise ValueError(
                f"preparation {name}: its parameter {taken.pop()} would be that of the platform; call it otherwise"
            )
        missing = [needed for needed in also.split() if needed not in (params or {})]
        if missing:
            raise ValueError(f"preparation {name}: {missing[0]} is missing among its parameters")
        self._asked.append(name)

    def _check_needs(self, names: Iterable[str], who: str) -> None:
        unknown = [name for name in names if name not in self._asked]
        if unknown:
            raise ValueError(
                f"{who} {unknown[0]}, which was not asked for before; there are {', '.join(self._asked) or 'none'}"
            )

    def moments(self, role: str, config: ExtractConfig, *, name: str = MOMENTS) -> None:
        """Take moments of what the model computes on the rows of a data set (activations/moments.py)."""
        self._ask(name, role)
        self.make(Moments(name, role, config))

    def sum_over_rows(
        self,
        name: str,
        version: int,
        role: str,
        params: Mapping[str, Json],
        start: StartSums,
        *,
        needs: tuple[str, ...] = (),
        estimate: Estimate = NOTHING,
    ) -> None:
        """Sum over batches of consecutive rows of a data set, on workers that hold the model.

        `rows_per_batch`, `rows_per_shard` (a multiple of it) and `max_tokens` are among `params`.
        """
        self._ask(name, role, needs, params, "rows_per_batch rows_per_shard max_tokens")
        self.make(SumOverRows(name, version, role, params, start, needs, estimate))

    def map_parts(
        self,
        name: str,
        version: int,
        params: Mapping[str, Json],
        parts: tuple[str, ...],
        make: MakePart,
        *,
        needs: tuple[str, ...] = (),
        reads_model: bool = False,
        estimate: Estimate = NOTHING,
    ) -> None:
        """Make parts each by itself, one task a part, from what others left or, where it reads the model, from the weights."""
        self._ask(name, None, needs, params)
        self.make(MapParts(name, version, params, parts, make, needs, reads_model, estimate))

    def keep_of_rows(
        self, name: str, version: int, role: str, params: Mapping[str, Json], start: StartKeeper, values_per_target: int
    ) -> None:
        """Keep tensors of every row that the training will see, cut as it cuts them, so that no model need run there.

        `batch_tokens` and `rows_per_shard` are among `params`, to which `train.max_tokens` is added; `values_per_target`
        numbers are kept of each token in the loss, in the model's type: for estimates.
        """
        if "max_tokens" in params:
            raise ValueError(f"preparation {name}: its parameter max_tokens would be that of the training; leave it out")
        self._ask(name, role, (), params, "batch_tokens rows_per_shard")
        self.make(KeepOfRows(name, version, role, params, start, values_per_target))
