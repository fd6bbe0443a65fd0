"""Preparations: stages that a trained method needs before its training. They are cached and spread over the cluster.

A method's `prepares(config, skeleton, prepare)` declares each stage by a call of a function of `prepare`, after the stages that
it depends on, and returns the names of the stages whose output its training reads:

    def prepares(config, skeleton, prepare):
        prepare.moments("safety", extract)
        prepare.map_parts("basis", 1, {}, parts, eigenbasis, needs=("moments",))
        return ("basis",)

The folder `stages/` distributes shards and parts to the workers and continues a stage that was killed. The output directory of
a stage is opened by `storage.tensors.Parts`; that of moments by `activations.moments.Moments`.
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

# A method with one set of moments can use this name.
MOMENTS = "moments"
"""Name of the preparation that `Prepare.moments` makes."""
NOTHING = Estimate()
"""Estimate of a stage that needs almost no memory or disk besides the model."""
# The name is limited to 40 characters, because it is part of folder names, whose length file systems limit.
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
# A parameter of such a name would be overwritten silently when the stage's key is made.
_RESERVED = {"data", "data_fingerprint", "code", "model", "prompt", "prompt_fingerprints", "encoding"}
"""Names of the parameters that the platform adds to a stage's own."""


# A stage declares sums instead of results: each worker sums over its own rows, and the platform adds their sums.
class Sums(Protocol):
    """Tensors that are summed over the batches of a data set."""

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Names and shapes of the tensors, float32."""
        ...

    def add(self, batch: Batch, number: int) -> None:
        """Add the contribution of one batch; `number` is the batch's number in the data set, for messages."""
        ...

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the sums, in the order of `shapes`."""
        ...

    def close(self) -> None:
        """Remove all hooks from the model."""
        ...


# Each row's tensors have names of their own, because files of different shards are read together, by row.
class Keeper(Protocol):
    """Computes tensors that are stored for each row of a data set."""

    def shapes(self, number: int, row: Row) -> Mapping[str, Shape]:
        """Return the names and shapes of the tensors of row `number`; no two rows share a name."""
        ...

    def keep(self, batch: Batch) -> Iterator[tuple[str, Tensor]]:
        """Yield the tensors of a batch's rows, row by row, in the order of `shapes`."""
        ...

    def close(self) -> None:
        """Remove all hooks from the model."""
        ...


class Source(NamedTuple):
    """Inputs from which a part is made."""

    # The parameters are JSON, because they are hashed into the key and sent to workers.
    params: Mapping[str, Json]
    """The parameters that the stage declares."""
    # The directories are on this node: outputs of earlier stages are fetched before the part is made.
    needed: Mapping[str, Path]
    """Output directories of the preparations in `needs`, by name."""
    model: SteeredModel | None
    """The model, if the stage has `reads_model`; else None."""


StartSums = Callable[[SteeredModel, Mapping[str, Json], Mapping[str, Path]], Sums]
"""(model, params, output directories of the preparations in `needs`) -> sums at zero."""
StartKeeper = Callable[[SteeredModel, Mapping[str, Json]], Keeper]
"""(model, params) -> keeper."""
MakePart = Callable[[Source, str, Path], Mapping[str, object]]
"""(source, part, path of the safetensors file to write) -> facts about the part, stored beside it; `note` is shown to users."""


@dataclass(frozen=True)
class Moments:
    """Declares moments of the model's activations on the rows of a data set."""

    # The name is the key under which the training finds the output (`Inputs.prepared`).
    name: str
    role: str
    """Role of the data set."""
    # The field is the section of a job that extracts, so that a job which only extracts these moments has the same stage.
    config: ExtractConfig


@dataclass(frozen=True)
class SumOverRows:
    """Declares sums over batches of consecutive rows of a data set, on workers that hold the model."""

    name: str
    # The author raises the version by hand: the code is not hashed, so that reformatting it changes no artifact's key.
    version: int
    role: str
    params: Mapping[str, Json]
    start: StartSums
    needs: tuple[str, ...]
    estimate: Estimate


@dataclass(frozen=True)
class KeepOfRows:
    """Declares tensors of every row that the training will see."""

    name: str
    version: int
    role: str
    params: Mapping[str, Json]
    start: StartKeeper
    values_per_target: int


@dataclass(frozen=True)
class MapParts:
    """Declares parts that do not depend on each other; each is one task on the cluster."""

    name: str
    version: int
    params: Mapping[str, Json]
    parts: tuple[str, ...]
    make: MakePart
    needs: tuple[str, ...]
    reads_model: bool
    estimate: Estimate


Preparation = Moments | SumOverRows | KeepOfRows | MapParts
"""A declared preparation, as `Prepare` passes it to `Prepare.make`."""


# `prepares` calls an object instead of returning a list, so that one function of the method can describe the stages without a
# job, check them with one, and plan them.
class Prepare:
    """Takes the declarations of a method's preparations and checks them. Subclasses override `make` to plan the stages.

    The arguments that several functions share:

    params     JSON values on which the result depends besides the model and the rows; part of the stage's key
    version    number that the author of a method raises when the code of the stage changes; part of the stage's key
    needs      names of earlier preparations whose output the stage reads
    estimate   memory and disk that the stage needs, not counting the model
    """

    def __init__(self, roles: Collection[str] | None = None) -> None:
        """Accept preparations over the data sets of these roles; None accepts any role."""
        # None and an empty collection differ: with an empty collection, of a job without data sets, every role is refused.
        self._roles = roles
        self._names: list[str] = []

    def has(self, role: str) -> bool:
        """Return whether the job has a data set of this role; False if the check runs without a job."""
        return self._roles is not None and role in self._roles

    # The class that plans a job overrides this; the declarations are checked in the same way with and without one.
    def make(self, preparation: Preparation) -> None:
        """Plan a preparation whose settings have been checked. Does nothing here: this class only checks."""

    def check_read(self, names: Iterable[str]) -> None:
        """Raise ValueError if the training reads a preparation that was not declared."""
        self._check_needs(names, "its training reads")

    def _declare(
        self,
        name: str,
        role: str | None = None,
        needs: Iterable[str] = (),
        params: Mapping[str, Json] | None = None,
        also: str = "",
    ) -> None:
        """Raise ValueError for an invalid or repeated name, a missing data set, an unknown need, or wrong parameters."""
        # `model` is the name under which the stages pass the model itself. Other names become part of paths and of stage names.
        if not _NAME.fullmatch(name) or name == "model":
            raise ValueError(f"a preparation is called {name!r:.60}: small letters, digits and underscores, and not model")
        # The stage's directory is called by this name.
        if name in self._names:
            raise ValueError(f"two preparations are called {name}: the second would replace the first")
        # With None the check runs without a job, to describe the method.
        if role is not None and self._roles is not None and role not in self._roles:
            raise ValueError(f"preparation {name}: the job has no data.{role}; it has {', '.join(self._roles) or 'none'}")
        # Only earlier preparations may be needed, so that the stages are in an order in which they can run.
        self._check_needs(needs, f"preparation {name} needs")
        # The platform's parameters and the method's are merged into one dict, from which the stage's key is made.
        if taken := _RESERVED & {*(params or {})}:
            raise ValueError(
                f"preparation {name}: its parameter {taken.pop()} would be that of the platform; call it otherwise"
            )
        # The check is made here, where the message can name the preparation; the stage itself would fail on a worker.
        missing = [needed for needed in also.split() if needed not in (params or {})]
        if missing:
            raise ValueError(f"preparation {name}: {missing[0]} is missing among its parameters")
        # The name is recorded last, so that a refused declaration is not among the declared ones.
        self._names.append(name)

    def _check_needs(self, names: Iterable[str], who: str) -> None:
        unknown = [name for name in names if name not in self._names]
        if unknown:
            raise ValueError(f"{who} {unknown[0]}, which was not declared before; declared: {', '.join(self._names) or 'none'}")

    def moments(self, role: str, config: ExtractConfig, *, name: str = MOMENTS) -> None:
        """Declare moments of the model's activations on the rows of a data set (activations/moments.py).

        Args:
            role: role of the data set.
            config: the places to read, with `keep: moments`.
            name: name of the preparation.
        """
        # An extraction has no parameters of its own besides its config.
        self._declare(name, role)
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
        """Declare sums over batches of consecutive rows of a data set, on workers that hold the model.

        `params` must hold `rows_per_batch`, `rows_per_shard` (a multiple of it) and `max_tokens`.
        """
        self._declare(name, role, needs, params, "rows_per_batch rows_per_shard max_tokens")
        # A shard holds whole batches (`rows_per_shard` is a multiple of `rows_per_batch`), because sums of |.| depend on which
        # rows form a batch.
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
        # Parts that do not read the model run in tasks without one, because a model takes minutes to load.
        reads_model: bool = False,
        estimate: Estimate = NOTHING,
    ) -> None:
        """Declare parts that do not depend on each other, each made by one call of `make` in one task of the cluster.

        A part is made from the output of the preparations in `needs` and, with `reads_model`, from the model.
        """
        # No role is passed: parts are made from the output of other stages, not from rows.
        self._declare(name, None, needs, params)
        self.make(MapParts(name, version, params, parts, make, needs, reads_model, estimate))

    def keep_of_rows(
        self, name: str, version: int, role: str, params: Mapping[str, Json], start: StartKeeper, values_per_target: int
    ) -> None:
        """Declare tensors of every row that the training will see, so that the training need not run the model.

        Rows are cut as the training cuts them. `params` must hold `batch_tokens` and `rows_per_shard`; `train.max_tokens` is
        added to them. `values_per_target` is how many numbers, in the model's dtype, are stored for each token in the loss; it
        serves the estimate only.
        """
        # Rows must be cut as the training cuts them, or the stored tensors would belong to other tokens.
        if "max_tokens" in params:
            raise ValueError(f"preparation {name}: its parameter max_tokens would be that of the training; remove it")
        self._declare(name, role, (), params, "batch_tokens rows_per_shard")
        self.make(KeepOfRows(name, version, role, params, start, values_per_target))
