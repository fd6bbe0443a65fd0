"""Stream the shards of a data set through a pool of actors that hold a model; a `Maker` turns a shard into a part.

First the rows of the data set are divided into shards, which are written as small files into the work directory
(shard_plan.py). Ray Data then streams the numbers of the missing shards to the actors. An actor reads the texts of a shard,
writes its part and returns the part's record, so that nothing large goes through Ray's object store and memory does not grow
with the data. Ray replaces an actor that dies and repeats its shard; a stage that was killed continues with the missing shards.

With `scale.warm`, tasks replace the actors. Ray keeps their processes for the next stage, which saves a small stage most of its
time.

This file is the side of the driver; the workers are in shard_worker.py.
"""

from __future__ import annotations

import logging
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import TypeAdapter

from steerlab.data.values import Row
from steerlab.guards import late
from steerlab.job import DataSet, ScaleConfig
from steerlab.stages.spread import alone, reserved, shard_plan, subject
from steerlab.stages.spread.shard_plan import Done, Facts, Planned, WorkFolder
from steerlab.stages.spread.shard_worker import Failure, Line, Make, Request, Worker, in_warm_process
from steerlab.stages.spread.tally import Tally, following
from steerlab.storage.errors import StoreError
from steerlab.storage.plan import Work

if TYPE_CHECKING:
    import ray
else:
    ray = late.module("ray")

_F = TypeVar("_F", bound=Facts)


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
        request = Request(subject.of(work), folder.address, make, work.scale.max_failures, uuid.uuid4().hex)

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
    request: Request, missing: list[Planned], scale: ScaleConfig, report: Callable[[int, float], None]
) -> Iterator[Done]:
    """Make the missing parts in a pool of actors and yield their records as they come."""
    beside: Any = reserved.beside_the_driver()
    tally: Any = ray.remote(num_cpus=0, scheduling_strategy=beside)(Tally).remote()
    with following(tally, report, sum(entry.rows for entry in missing)):
        yield from _stream(replace(request, tally=tally), missing, scale)


def _by_processes(
    request: Request, missing: list[Planned], scale: ScaleConfig, report: Callable[[int, float], None]
) -> Iterator[Done]:
    """Make the missing parts in warm processes and yield their records as they come."""
    # Progress is counted by finished shards, without a `Tally`: Ray would start that actor in one of the warm processes.
    started_s, num_rows, now = time.monotonic(), {entry.number: entry.rows for entry in missing}, 0
    for row in _stream(request, missing, scale):
        now += num_rows[row.number]
        report(now, (time.monotonic() - started_s) * (sum(num_rows.values()) - now) / now)
        yield row


def _stream(request: Request, missing: list[Planned], scale: ScaleConfig) -> Iterator[Done]:
    """Send the missing shards to the workers and yield the records of their parts as they come."""
    # In the order in which they end; `run` puts them into that of the shards.
    for line in _lines(request, missing, scale):
        row = _LINE.validate_json(line["row"])
        if isinstance(row, Failure):
            # Raised here, in the driver: an exception inside a worker would make Ray Data repeat the shard.
            error = _ERRORS[row.kind](row.failure)
            error.add_note(row.trace)
            raise error
        yield row


def _lines(request: Request, missing: list[Planned], scale: ScaleConfig) -> Iterator[Line]:
    """Yield what the workers return, as it comes."""
    items = [{"entry": entry.model_dump_json()} for entry in missing]
    # The share of one worker of the configured number, even if fewer shards are left: the number of CPUs decides the number of
    # PyTorch's threads, which changes the last bits of sums. A resumed stage must make the same parts.
    resources = reserved.of_actors(scale, scale.worker_range[0])
    if alone.here() is not None:
        yield from (alone.call(in_warm_process, (request, item), resources["num_cpus"]) for item in items)
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
            partial(in_warm_process, request), compute=ray.data.TaskPoolStrategy(high), num_cpus=cpus, num_gpus=gpus
        )
    else:
        lines = source.map(
            Worker,  # type: ignore[arg-type]
            fn_constructor_args=(request,),
            # Two tasks for each actor: the next shard waits there while the actor works on the first, so that it never idles.
            compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high, max_tasks_in_flight_per_actor=2),
            num_cpus=cpus,
            num_gpus=gpus,
        )
    yield from lines.iter_rows()


_LINE: TypeAdapter[Done | Failure] = TypeAdapter(Done | Failure)
_ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": StoreError, "RuntimeError": RuntimeError}
"""Exceptions that the driver raises, by the kind of the failure."""
