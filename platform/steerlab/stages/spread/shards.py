"""Stream the shards of a data set through a pool of actors that hold a model; a `Maker` turns a shard into a part.

First the rows of the data set are divided into shards, which are written as small files into the work directory
(shard_plan.py). Ray Data then streams the numbers of the missing shards to the actors. An actor reads the texts of a shard,
writes its part and returns the part's record, so that nothing large goes through Ray's object store and memory does not grow
with the data. Ray replaces an actor that dies and repeats its shard; a stage that was killed continues with the missing shards.

With `scale.warm`, tasks replace the actors. Ray keeps their processes for the next stage, which saves a small stage most of its
time.

The file is longer than 300 lines because driver and workers of a pool share its types: requests, records and failures.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
import traceback
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar

from pydantic import TypeAdapter

from steerlab.data.values import Row
from steerlab.guards import late, saved
from steerlab.job import DataSet, ScaleConfig
from steerlab.stages.spread import alone, reserved, shard_plan, subject
from steerlab.stages.spread.shard_plan import Done, Facts, Planned, Shard, WorkFolder
from steerlab.stages.spread.subject import Loading
from steerlab.stages.spread.tally import Tally, following
from steerlab.storage.errors import FullDisk, StoreError
from steerlab.storage.plan import Work

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle

    from steerlab.steered.language import SteeredModel
else:
    ray = late.module("ray")

_POLL_S = 0.5


class Maker(ABC):
    """Makes the parts of shards; each actor has one, for the model that it has loaded."""

    suffix: ClassVar[str]
    """Suffix of the parts' file names, with the dot."""

    @abstractmethod
    def make(self, shard: Shard, path: Path, tell: Callable[[int], None]) -> Facts:
        """Make the part of one shard.

        Args:
            shard: The rows.
            path: Local path of the part, which must appear there whole or not at all.
            tell: Takes the number of the shard's rows that are done so far.

        Returns:
            Size, hash and counts of the part.

        Raises:
            ValueError: the data or the settings are wrong, so that another attempt would fail as well.
        """

    def close(self) -> None:  # noqa: B027
        """Remove hooks from the model; only for makers whose hooks stay on it between shards."""


Make = Callable[["SteeredModel"], Maker]
"""Function (loaded model) -> `Maker`. It must be serialisable, with the stage's parameters that it holds."""
_F = TypeVar("_F", bound=Facts)


@dataclass(frozen=True)
class _Request:
    """What every worker of a pool receives."""

    loading: Loading
    folder: tuple[str, str, str]
    """Address of the stage's work directory."""
    make: Make
    max_failures: int
    run: str
    """Random name of this attempt at the stage."""
    tally: ActorHandle | None = None
    """The actor that counts rows; None with `scale.warm`."""


# JSON texts, because Ray Data infers one Arrow type for each column, and records and failures have different fields.
_Item = dict[str, str]
"""Row that Ray Data hands to a worker: JSON of the planned shard under the key "entry"."""
_Line = dict[str, str]
"""Row that a worker returns to Ray Data: JSON of the part's record, or of a failure, under the key "row"."""


class _Failure(saved.Shape):
    """Error that a worker returns instead of a record, because another attempt would only repeat it."""

    failure: str
    kind: Literal["ValueError", "OSError", "RuntimeError"]
    trace: str


def run(
    work: Work,
    make: Make,
    facts: type[_F],
    data: DataSet,
    rows_per_shard: int,
    check: Callable[[int, Sequence[Row]], None] = lambda num_rows, some: None,
) -> list[_F]:
    """Make the missing parts of a data set's shards and return the facts of all parts, in the order of the shards.

    Args:
        work: The running stage.
        make: Makes the `Maker` of an actor.
        facts: Type of the facts that the maker returns.
        data: The data set.
        rows_per_shard: Number of rows of each shard but the last.
        check: Called with the number of missing rows and some of them before the first actor starts; raises ValueError to stop.

    Raises:
        ValueError: the data or the settings are wrong; no further attempt is made.
        RuntimeError: more than `scale.max_failures` actors died.
        StoreError: a disk is full.
    """
    folder = WorkFolder(work.store.root, work.stage.name, work.stage.key)
    planned = shard_plan.planned(folder, data, rows_per_shard)
    # Parts of an earlier attempt are read through once: a power cut can leave a file of the right size with wrong bytes.
    done = {entry.number: row for entry in planned if (row := folder.done(entry, verify=True)) is not None}
    missing = [entry for entry in planned if entry.number not in done]
    total = sum(entry.rows for entry in planned)
    before = total - sum(entry.rows for entry in missing)
    work.report({"done": before, "total": total})
    if missing:
        check(total - before, folder.shard(missing[0]).rows)
        request = _Request(subject.of(work), folder.address, make, work.scale.max_failures, uuid.uuid4().hex)

        def report(now: int, left_s: float) -> None:
            work.report({"done": before + now, "total": total, "left_s": left_s})

        rows = (_by_processes if work.scale.warm or alone.here() is not None else _by_actors)(
            request, missing, work.scale, report
        )
        done |= {row.number: row for row in rows}
    return [facts.model_validate(done[entry.number].model_dump()) for entry in planned]


def collect(work: Work) -> None:
    """Put the parts into the directory that becomes the artifact."""
    WorkFolder(work.store.root, work.stage.name, work.stage.key).copy_parts(work.directory)


@contextmanager
def parts(work: Work) -> Iterator[list[Path]]:
    """Provide local files of all parts, in the order of the shards; they are removed at the end of the block."""
    # On the disk of the artifact, so that hard links to parts in a local ROOT are possible.
    with tempfile.TemporaryDirectory(dir=work.directory.parent) as folder:
        WorkFolder(work.store.root, work.stage.name, work.stage.key).copy_parts(Path(folder))
        yield sorted(Path(folder).iterdir())


def _by_actors(
    request: _Request, missing: list[Planned], scale: ScaleConfig, report: Callable[[int, float], None]
) -> Iterator[Done]:
    """Make the missing parts in a pool of actors and yield their records as they come."""
    beside: Any = reserved.beside_the_driver()
    tally: Any = ray.remote(num_cpus=0, scheduling_strategy=beside)(Tally).remote()
    with following(tally, report, sum(entry.rows for entry in missing)):
        yield from _stream(replace(request, tally=tally), missing, scale)


def _by_processes(
    request: _Request, missing: list[Planned], scale: ScaleConfig, report: Callable[[int, float], None]
) -> Iterator[Done]:
    """Make the missing parts in warm processes and yield their records as they come."""
    # Progress is counted by finished shards, without a `Tally`: Ray would start that actor in one of the warm processes.
    started_s, num_rows, now = time.monotonic(), {entry.number: entry.rows for entry in missing}, 0
    for row in _stream(request, missing, scale):
        now += num_rows[row.number]
        report(now, (time.monotonic() - started_s) * (sum(num_rows.values()) - now) / now)
        yield row


def _stream(request: _Request, missing: list[Planned], scale: ScaleConfig) -> Iterator[Done]:
    """Send the missing shards to the workers and yield the records of their parts as they come."""
    # In the order in which they end; `run` puts them into that of the shards.
    for line in _lines(request, missing, scale):
        row = _LINE.validate_json(line["row"])
        if isinstance(row, _Failure):
            # Raised here, in the driver: an exception inside a worker would make Ray Data repeat the shard.
            error = _ERRORS[row.kind](row.failure)
            error.add_note(row.trace)
            raise error
        yield row


def _lines(request: _Request, missing: list[Planned], scale: ScaleConfig) -> Iterator[_Line]:
    """Yield what the workers return, as it comes."""
    items = [{"entry": entry.model_dump_json()} for entry in missing]
    # The share of one worker of the configured number, even if fewer shards are left: the number of CPUs decides the number of
    # PyTorch's threads, which changes the last bits of sums. A resumed stage must make the same parts.
    resources = reserved.of_actors(scale, scale.worker_range[0])
    if alone.here() is not None:
        yield from (alone.call(_in_warm_process, (request, item), resources["num_cpus"]) for item in items)
        return
    # Imported here: it takes a second, and workers read this file too.
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # Not more workers than shards: each would load the model for nothing.
    low, high = (min(workers, len(missing)) for workers in scale.worker_range)
    cpus, gpus = resources["num_cpus"], resources["num_gpus"]
    # A block for each shard: Ray Data would otherwise put several into one task, and a death would repeat all of them.
    source = ray.data.from_items(items, override_num_blocks=len(items))
    # A task's process stays: with a GPU it would hold its memory, and its device when Ray gives it another one.
    if scale.warm and not gpus:
        lines = source.map(
            partial(_in_warm_process, request), compute=ray.data.TaskPoolStrategy(high), num_cpus=cpus, num_gpus=gpus
        )
    else:
        lines = source.map(
            _Worker,  # type: ignore[arg-type]
            fn_constructor_args=(request,),
            # Two tasks for each actor: the next shard waits there while the actor works on the first, so that it never idles.
            compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high, max_tasks_in_flight_per_actor=2),
            num_cpus=cpus,
            num_gpus=gpus,
        )
    yield from lines.iter_rows()


def _in_warm_process(request: _Request, item: _Item) -> _Line:
    """Return the record of a shard's part, made in a process that keeps the model for the next shard."""
    # Ray repeats a task whose process died. An attempt that left no part and no failure is such a death.
    deaths = WorkFolder(*request.folder).attempts(Planned.model_validate_json(item["entry"]).number, request.run)
    failure = _too_many_deaths(deaths, "processes", request.max_failures)
    if failure is not None:
        return {"row": failure.model_dump_json()}
    # Owned by the stage, not by its model: what another stage keeps in the process must not count as loaded here.
    owner = json.dumps(request.folder)
    worker = _Worker(request, partial(subject.loaded_once, owner))
    try:
        return worker(item)
    finally:
        worker.close()


class _Worker:
    """An actor of the pool: a loaded model and the maker of its parts."""

    def __init__(self, request: _Request, load: Callable[[Loading], SteeredModel] = subject.load) -> None:
        self._folder = WorkFolder(*request.folder)
        self._tally = request.tally
        self._maker: Maker | None = None
        # Ray Data (2.x) restarts actors and repeats their tasks without end, so a model that does not fit into memory would be
        # loaded for ever. The tally outlives the actors and counts how often one was started again.
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

    def __call__(self, item: _Item) -> _Line:
        """Return the record of a shard's part."""
        entry = Planned.model_validate_json(item["entry"])
        # An actor may have been killed between writing the record and returning it; then the part is not made again.
        row = self._failure or self._folder.done(entry) or self._make(entry)
        if isinstance(row, Done):
            self._tell(entry, entry.rows)
        return {"row": row.model_dump_json()}

    def _tell(self, entry: Planned, num_rows: int) -> None:
        if self._tally is not None:
            self._tally.tell.remote(entry.number, num_rows)

    def _make(self, entry: Planned) -> Done | _Failure:
        """Make and record the part of a shard; return a failure where another attempt would end the same way."""
        last_s = time.monotonic()

        def tell(num_rows: int) -> None:
            nonlocal last_s
            if time.monotonic() - last_s > _POLL_S:
                last_s = time.monotonic()
                self._tell(entry, num_rows)

        # By workers only: the driver reads this file, too.
        from steerlab import models

        assert self._maker is not None
        make = self._maker.make
        # Zero rows start the clock of the estimate, after the model has been loaded.
        self._tell(entry, 0)
        try:
            shard = self._folder.shard(entry)
            with models.memory_explained(_SMALLER):
                return self._folder.keep(entry, self._maker.suffix, lambda path: make(shard, path, tell))
        except (ValueError, FullDisk) as error:
            # Any other error of a disk or a network may pass: Ray repeats the shard.
            return _failure(error)


_SMALLER = "lower extract.batch_tokens, or the rows or tokens of a batch in the method's config, or set model.dtype: bfloat16"
"""What takes less memory of a GPU."""
_LINE: TypeAdapter[Done | _Failure] = TypeAdapter(Done | _Failure)
_ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": StoreError, "RuntimeError": RuntimeError}
"""Exceptions that the driver raises, by the kind of the failure."""


def _failure(error: ValueError | OSError) -> _Failure:
    kind = "OSError" if isinstance(error, OSError) else "ValueError"
    return _Failure(failure=str(error), kind=kind, trace=traceback.format_exc())


def _too_many_deaths(deaths: int, workers: str, most: int) -> _Failure | None:
    """Return a failure if more than `most` workers died, else None."""
    if deaths <= most:
        return None
    text = (
        f"{deaths} {workers} died, more than scale.max_failures {most}; if they ran out of memory, "
        "lower extract.batch_tokens or scale.workers"
    )
    return _Failure(failure=text, kind="RuntimeError", trace="")
