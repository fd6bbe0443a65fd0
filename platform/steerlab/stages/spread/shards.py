"""Stream the shards of a data set through a pool of actors that hold a model; what is made of a shard is not known here.

The plan comes first (shard_plan.py): rows of the data set, so many to a shard, as small files in the work directory. Ray
Data streams the numbers of the missing shards to the actors. Each reads its texts, leaves its part and hands back the manifest
row, so that nothing large goes through the object store and memory does not grow with the data. A killed actor is made again
and its shard with it; after a kill of everything the stage continues with the shards that are missing. With `scale.warm` tasks
take the actors' place: their processes stay for the next stage, which saves a small one most of its time.
"""

from __future__ import annotations

import errno
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

import ray
from pydantic import TypeAdapter

from steerlab.data.values import Row
from steerlab.guards import saved
from steerlab.job import DataSet, ScaleConfig
from steerlab.stages.spread import reserved, shard_plan, subject
from steerlab.stages.spread.shard_plan import Done, Facts, Place, Planned, Shard
from steerlab.stages.spread.subject import Loading
from steerlab.stages.spread.tally import Tally, following
from steerlab.storage.plan import Work
from steerlab.storage.store import StoreError

if TYPE_CHECKING:
    from ray.actor import ActorHandle

    from steerlab.steered.language import SteeredModel

_POLL_S = 0.5
_FULL_DISK = (errno.ENOSPC, errno.EDQUOT)


class Maker(ABC):
    """What an actor does with its shards; one is made for each actor, around its model."""

    suffix: ClassVar[str]
    """Of the parts' names."""

    @abstractmethod
    def make(self, shard: Shard, path: Path, tell: Callable[[int], None]) -> Facts:
        """Leave the part at `path`, whole or not at all; return its facts. `tell` takes the number of rows done so far."""

    def close(self) -> None:  # noqa: B027
        """Take off the model what was put on it, where something stays on it between shards."""


Make = Callable[["SteeredModel"], Maker]
"""Makes a `Maker` around a loaded model; what it knows of the stage's parameters can be sent to other processes."""
_F = TypeVar("_F", bound=Facts)


@dataclass(frozen=True)
class _Request:
    """What the workers of a pool are asked for."""

    loading: Loading
    place: tuple[str, str, str]
    make: Make
    max_failures: int
    run: str
    """Names this attempt at the stage."""
    tally: ActorHandle | None = None
    """The actor that counts rows; none where processes stay."""


_Item = dict[str, str]
"""What Ray Data hands to a worker: JSON of the planned shard, under the name entry."""
_Line = dict[str, str]
"""What Ray Data gets back from a worker: JSON of the manifest row or of a failure, under the name row."""


class _Failure(saved.Shape):
    """Stands in place of a manifest row where another attempt would only repeat it."""

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
    """Make the parts that are missing and return the facts of all, in order; `facts` is what the maker leaves.

    `check` sees the number of missing rows and some of them before the first actor starts; it raises ValueError to stop.

    Raises:
        ValueError: the data or the settings are wrong; no other attempt is made.
    """
    place = Place(work.store.root, work.stage.name, work.stage.key)
    planned = shard_plan.planned(place, data, rows_per_shard)
    done = {entry.number: row for entry in planned if (row := place.done(entry, verify=True)) is not None}
    missing = [entry for entry in planned if entry.number not in done]
    total = sum(entry.rows for entry in planned)
    before = total - sum(entry.rows for entry in missing)
    work.report({"done": before, "total": total})
    if missing:
        check(total - before, place.shard(missing[0]).rows)
        request = _Request(subject.of(work), place.address, make, work.scale.max_failures, uuid.uuid4().hex)

        def report(now: int, left_s: float) -> None:
            work.report({"done": before + now, "total": total, "left_s": left_s})

        rows = (_by_processes if work.scale.warm else _by_actors)(request, missing, work.scale, report)
        done |= {row.number: row for row in rows}
    return [facts.model_validate(done[entry.number].model_dump()) for entry in planned]


def collect(work: Work) -> None:
    """Put the parts into the directory that becomes the artifact; they stay in the work directory until it is committed."""
    work.directory.mkdir(parents=True, exist_ok=True)  # an extraction of days may find its empty directory swept away
    Place(work.store.root, work.stage.name, work.stage.key).copy_parts(work.directory)


@contextmanager
def parts(work: Work) -> Iterator[list[Path]]:
    """Give local files of all parts, in the order of the shards."""
    with tempfile.TemporaryDirectory(dir=work.directory.parent) as folder:
        Place(work.store.root, work.stage.name, work.stage.key).copy_parts(Path(folder))
        yield sorted(Path(folder).iterdir())


def _by_actors(
    request: _Request, missing: list[Planned], scale: ScaleConfig, report: Callable[[int, float], None]
) -> Iterator[Done]:
    """Make the missing shards in a pool of actors and yield their manifest rows as they come."""
    tally: Any = Tally.options(scheduling_strategy=reserved.beside_the_driver()).remote()  # type: ignore[attr-defined]
    with following(tally, report, sum(entry.rows for entry in missing)):
        yield from _stream(replace(request, tally=tally), missing, scale)


def _by_processes(
    request: _Request, missing: list[Planned], scale: ScaleConfig, report: Callable[[int, float], None]
) -> Iterator[Done]:
    """Make the missing shards in warm processes. No actor follows them: Ray would give it the process that is warm."""
    started_s, num_rows, now = time.monotonic(), {entry.number: entry.rows for entry in missing}, 0
    for row in _stream(request, missing, scale):
        now += num_rows[row.number]
        report(now, (time.monotonic() - started_s) * (sum(num_rows.values()) - now) / now)
        yield row


def _stream(request: _Request, missing: list[Planned], scale: ScaleConfig) -> Iterator[Done]:
    """Send the missing shards to the workers and yield their manifest rows as they come."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    low, high = (min(workers, len(missing)) for workers in scale.worker_range)
    items = [{"entry": entry.model_dump_json()} for entry in missing]
    # As for all workers, also where fewer shards are left: the threads of an actor change the last bits of its sums.
    resources = reserved.of_actors(scale, scale.worker_range[0])
    cpus, gpus = resources["num_cpus"], resources["num_gpus"]
    source = ray.data.from_items(items, override_num_blocks=len(items))
    if scale.warm:
        lines = source.map(
            partial(_in_warm_process, request), compute=ray.data.TaskPoolStrategy(high), num_cpus=cpus, num_gpus=gpus
        )
    else:
        lines = source.map(
            _Worker,  # type: ignore[arg-type]
            fn_constructor_args=(request,),
            # One shard waits at each actor while it works on another.
            compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high, max_tasks_in_flight_per_actor=2),
            num_cpus=cpus,
            num_gpus=gpus,
        )
    for line in lines.iter_rows():
        row = _LINE.validate_json(line["row"])
        if isinstance(row, _Failure):
            error = _ERRORS[row.kind](row.failure)
            error.add_note(row.trace)
            raise error
        yield row


def _in_warm_process(request: _Request, item: _Item) -> _Line:
    """Return the manifest row of a shard from a process that keeps the model for the stage's next one."""
    deaths = Place(*request.place).attempts(Planned.model_validate_json(item["entry"]).number, request.run)
    failure = _too_many_deaths(deaths, "processes", request.max_failures)
    if failure is not None:
        return {"row": failure.model_dump_json()}
    owner = json.dumps(request.place)
    worker = _Worker(request, partial(subject.kept, owner))
    try:
        return worker(item)
    finally:
        worker.close()


class _Worker:
    """An actor of the pool: a loaded model and what it makes of its shards."""

    def __init__(self, request: _Request, load: Callable[[Loading], SteeredModel] = subject.load) -> None:
        self._place = Place(*request.place)
        self._tally = request.tally
        self._maker: Maker | None = None
        # Ray Data restarts actors and repeats their tasks without end: a model that does not fit has to be noticed here.
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
        """Leave the model without hooks."""
        if self._maker is not None:
            self._maker.close()

    def __call__(self, item: _Item) -> _Line:
        """Return the manifest row of a shard, made now or by an actor that was killed too late to hand it back."""
        entry = Planned.model_validate_json(item["entry"])
        row = self._failure or self._place.done(entry) or self._made(entry)
        if isinstance(row, Done):
            self._tell(entry, entry.rows)
        return {"row": row.model_dump_json()}

    def _tell(self, entry: Planned, num_rows: int) -> None:
        if self._tally is not None:
            self._tally.tell.remote(entry.number, num_rows)

    def _made(self, entry: Planned) -> Done | _Failure:
        told_s = time.monotonic()

        def tell(num_rows: int) -> None:
            nonlocal told_s
            if time.monotonic() - told_s > _POLL_S:
                told_s = time.monotonic()
                self._tell(entry, num_rows)

        assert self._maker is not None
        make = self._maker.make
        self._tell(entry, 0)
        try:
            shard = self._place.shard(entry)
            return self._place.keep(entry, self._maker.suffix, lambda path: make(shard, path, tell))
        except ValueError as error:
            return _failure(error)
        except OSError as error:
            if error.errno not in _FULL_DISK:
                raise
            message = f"no space left for part {entry.number} in {self._place.address[0]}"
            return _failure(error).model_copy(update={"failure": message})


_LINE: TypeAdapter[Done | _Failure] = TypeAdapter(Done | _Failure)
_ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": StoreError, "RuntimeError": RuntimeError}
"""What the driver raises for a failure."""


def _failure(error: ValueError | OSError) -> _Failure:
    kind = "OSError" if isinstance(error, OSError) else "ValueError"
    return _Failure(failure=str(error), kind=kind, trace=traceback.format_exc())


def _too_many_deaths(deaths: int, which: str, most: int) -> _Failure | None:
    """Return a failure where another attempt would only be one more death."""
    if deaths <= most:
        return None
    text = (
        f"{deaths} {which} died, more than scale.max_failures {most}; if they ran out of memory, "
        "lower extract.batch_tokens or scale.workers"
    )
    return _Failure(failure=text, kind="RuntimeError", trace="")
