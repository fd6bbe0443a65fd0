"""The workers that turn shards into parts: a loaded model with a `Maker`, in an actor or in a warm process."""

from __future__ import annotations

import json
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Literal

from steerlab.guards import late, saved
from steerlab.stages.spread import subject
from steerlab.stages.spread.shard_plan import Done, Facts, Planned, Shard, WorkFolder
from steerlab.stages.spread.subject import Loading
from steerlab.storage.errors import FullDisk

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle

    from steerlab.steered.language import SteeredModel
else:
    ray = late.module("ray")

_POLL_S = 0.5


class Maker(ABC):
    """Make the parts of shards; each actor has one maker, for its loaded model."""

    suffix: ClassVar[str]
    """Suffix of the parts' file names, with the dot."""

    @abstractmethod
    def make(self, shard: Shard, path: Path, tell: Callable[[int], None]) -> Facts:
        """Make the part of one shard.

        Args:
            shard: The rows.
            path: Local path of the part, which must be written atomically.
            tell: Function that takes the number of finished rows of the shard.

        Returns:
            Size, hash and counts of the part.

        Raises:
            ValueError: the data or the settings are wrong, so that another attempt would fail as well.
        """

    def close(self) -> None:  # noqa: B027
        """Remove hooks from the model; only for makers whose hooks stay on it between shards."""


Make = Callable[["SteeredModel"], Maker]
"""Function (loaded model) -> `Maker`. It must be serialisable together with the parameters bound to it."""


@dataclass(frozen=True)
class Request:
    """Arguments that every worker of a pool receives."""

    loading: Loading
    folder: tuple[str, str, str]
    """Address of the stage's work directory."""
    make: Make
    max_failures: int
    run: str
    """Random name of this attempt at the stage."""
    tally: ActorHandle | None = None
    """The actor that counts finished rows; None with `scale.warm`."""


# Rows are JSON texts, because Ray Data infers one Arrow type for each column, and records and failures have different fields.
Item = dict[str, str]
"""Row that Ray Data hands to a worker: JSON of the planned shard under the key "entry"."""
Line = dict[str, str]
"""Row that a worker returns to Ray Data: JSON of the part's record, or of a failure, under the key "row"."""


class Failure(saved.Shape):
    """Error that a worker returns instead of a record, because every further attempt would repeat it."""

    failure: str
    kind: Literal["ValueError", "OSError", "RuntimeError"]
    trace: str


def in_warm_process(request: Request, item: Item) -> Line:
    """Return the record of a shard's part, made in a process that retains the model for the next shard."""
    # Ray repeats a task whose process died. An attempt without a part or a failure counts as a death.
    deaths = WorkFolder(*request.folder).attempts(Planned.model_validate_json(item["entry"]).number, request.run)
    failure = _too_many_deaths(deaths, "processes", request.max_failures)
    if failure is not None:
        return {"row": failure.model_dump_json()}
    # The owner is the stage, not its model, because a model that another stage left in the process must not be used here.
    owner = json.dumps(request.folder)
    worker = Worker(request, partial(subject.loaded_once, owner))
    try:
        return worker(item)
    finally:
        worker.close()


class Worker:
    """An actor of the pool, with a loaded model and a maker of parts."""

    def __init__(self, request: Request, load: Callable[[Loading], SteeredModel] = subject.load) -> None:
        self._folder = WorkFolder(*request.folder)
        self._tally = request.tally
        self._maker: Maker | None = None
        # Ray Data (2.x) restarts actors and repeats their tasks without limit, so a model that does not fit into memory would
        # be loaded forever. The tally outlives the actors and counts how often one was restarted.
        is_new = self._tally is not None and ray.get_runtime_context().was_current_actor_reconstructed
        deaths: int = ray.get(self._tally.died.remote()) if is_new else 0  # type: ignore[assignment]
        self._failure = _too_many_deaths(deaths, "actors", request.max_failures)
        if self._failure is not None:
            return
        try:
            self._maker = request.make(load(request.loading))
        except ValueError as error:
            self._failure = _failure(error)

    def close(self) -> None:
        """Remove the maker's hooks from the model."""
        if self._maker is not None:
            self._maker.close()

    def __call__(self, item: Item) -> Line:
        """Return the record of a shard's part."""
        entry = Planned.model_validate_json(item["entry"])
        # An actor may have been killed between writing the record and returning it; the part is then complete.
        row = self._failure or self._folder.done(entry) or self._make(entry)
        if isinstance(row, Done):
            self._tell(entry, entry.rows)
        return {"row": row.model_dump_json()}

    def _tell(self, entry: Planned, num_rows: int) -> None:
        if self._tally is not None:
            self._tally.tell.remote(entry.number, num_rows)

    def _make(self, entry: Planned) -> Done | Failure:
        """Make and record the part of a shard; return a failure if another attempt would fail in the same way."""
        last_s = time.monotonic()

        def tell(num_rows: int) -> None:
            nonlocal last_s
            if time.monotonic() - last_s > _POLL_S:
                last_s = time.monotonic()
                self._tell(entry, num_rows)

        # Imported by workers only, since the driver imports this file too.
        from steerlab import models

        assert self._maker is not None
        make = self._maker.make
        # Reporting zero rows starts the clock of the estimate after the model has been loaded.
        self._tell(entry, 0)
        try:
            shard = self._folder.shard(entry)
            with models.memory_explained(_SMALLER):
                return self._folder.keep(entry, self._maker.suffix, lambda path: make(shard, path, tell))
        except (ValueError, FullDisk) as error:
            # Other errors of a disk or a network may be temporary, so Ray repeats the shard.
            return _failure(error)


_SMALLER = "lower extract.batch_tokens, or the rows or tokens of a batch in the method's config, or set model.dtype: bfloat16"
"""Advice after an out-of-memory error of a GPU."""


def _failure(error: ValueError | OSError) -> Failure:
    kind = "OSError" if isinstance(error, OSError) else "ValueError"
    return Failure(failure=str(error), kind=kind, trace=traceback.format_exc())


def _too_many_deaths(deaths: int, workers: str, most: int) -> Failure | None:
    """Return a failure if more than `most` workers died, otherwise None."""
    if deaths <= most:
        return None
    text = (
        f"{deaths} {workers} died, more than scale.max_failures {most}; if they ran out of memory, "
        "lower extract.batch_tokens or scale.workers"
    )
    return Failure(failure=text, kind="RuntimeError", trace="")
