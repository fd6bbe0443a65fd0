"""Stream the shards of a data set through workers that hold a model; a worker's `Maker` turns each shard into a part.

    shard     consecutive rows of the data set
    part      the file that is made from a shard
    record    path, size, hash and counts of a finished part

First the rows of the data set are divided into shards, which are written as small files into the work directory
(shard_plan.py). Ray Data then streams the numbers of the missing shards to the workers. A worker reads the texts of a shard,
writes the part and returns its record, so that nothing large goes through Ray's object store, and memory does not grow with the
data. If a worker dies, Ray repeats its shard. A stage that was killed continues with the missing shards.

The workers are a pool of actors. With `scale.warm` and no GPU they are tasks instead, whose processes Ray keeps for the next
stage; this saves a small stage most of its time. Without a cluster (alone.py), this process makes the parts one after another.

This file is the driver's side; the workers' side is shard_worker.py.
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
        make: Makes the `Maker` of a worker.
        facts: Type of the facts (file and counts of a part) that the maker returns.
        data: The data set.
        rows_per_shard: Number of rows of each shard but the last.
        check: Called before the first worker starts, with the number of rows in missing shards and the rows of one of these
            shards; it raises ValueError to stop the stage.

    Raises:
        ValueError: the data or the settings are wrong; no further attempt is made.
        RuntimeError: more than `scale.max_failures` actors died or, in warm processes, as many attempts at one shard.
        StoreError: a disk is full.
    """
    folder = WorkFolder(work.store.root, work.stage.name, work.stage.key)
    shards = shard_plan.planned(folder, data, rows_per_shard)
    # The parts of an earlier attempt are hashed once, because a power cut can leave a file of the right size with wrong bytes.
    records = {shard.number: record for shard in shards if (record := folder.done(shard, verify=True)) is not None}
    missing = [shard for shard in shards if shard.number not in records]
    total = sum(shard.rows for shard in shards)
    before = total - sum(shard.rows for shard in missing)
    work.report({"done": before, "total": total})
    if missing:
        check(total - before, folder.shard(missing[0]).rows)
        request = Request(subject.of(work), folder.address, make, work.scale.max_failures, uuid.uuid4().hex)

        def report(now: int, left_s: float) -> None:
            work.report({"done": before + now, "total": total, "left_s": left_s})

        make_parts = _counting_shards if alone.here() is not None or _in_tasks(work.scale) else _counting_rows
        records |= {record.number: record for record in make_parts(request, missing, work.scale, report)}
    return [facts.model_validate(records[shard.number].model_dump()) for shard in shards]


def collect(work: Work) -> None:
    """Put the parts into the directory that becomes the artifact."""
    WorkFolder(work.store.root, work.stage.name, work.stage.key).copy_parts(work.directory)


@contextmanager
def parts(work: Work) -> Iterator[list[Path]]:
    """Yield the paths of local files of all parts, in the order of the shards; they are removed at the end of the block."""
    # In a folder on the disk of the artifact, so that parts in a local ROOT can be hard links instead of copies.
    with tempfile.TemporaryDirectory(dir=work.directory.parent) as folder:
        WorkFolder(work.store.root, work.stage.name, work.stage.key).copy_parts(Path(folder))
        yield sorted(Path(folder).iterdir())


def _counting_rows(
    request: Request, missing: list[Planned], scale: ScaleConfig, report: Callable[[int, float], None]
) -> Iterator[Done]:
    """Make the missing parts and yield their records as they finish; progress is counted by rows, in an actor (`Tally`)."""
    beside: Any = reserved.beside_the_driver()
    tally: Any = ray.remote(num_cpus=0, scheduling_strategy=beside)(Tally).remote()
    with following(tally, report, sum(shard.rows for shard in missing)):
        yield from _stream(replace(request, tally=tally), missing, scale)


def _counting_shards(
    request: Request, missing: list[Planned], scale: ScaleConfig, report: Callable[[int, float], None]
) -> Iterator[Done]:
    """Make the missing parts and yield their records as they finish; progress is counted by finished shards."""
    # Without a `Tally`: Ray would start that actor in one of the warm processes, and a run without a cluster has no actors.
    started_s, num_rows, num_done = time.monotonic(), {shard.number: shard.rows for shard in missing}, 0
    for record in _stream(request, missing, scale):
        num_done += num_rows[record.number]
        report(num_done, (time.monotonic() - started_s) * (sum(num_rows.values()) - num_done) / num_done)
        yield record


def _in_tasks(scale: ScaleConfig) -> bool:
    """Return whether the workers are tasks in warm processes; if not, they are actors."""
    # With a GPU, actors are used even with `scale.warm`: the process of a task stays and would keep the GPU's memory, and its
    # device even when Ray assigns another one to the next task.
    return bool(scale.warm) and not reserved.gpus_of(scale, scale.worker_range[0])


def _stream(request: Request, missing: list[Planned], scale: ScaleConfig) -> Iterator[Done]:
    """Send the missing shards to the workers and yield the records of their parts as they finish, in any order.

    Raises:
        ValueError, StoreError, RuntimeError: a worker returned a failure.
    """
    for line in _lines(request, missing, scale):
        result = _RESULT.validate_json(line["row"])
        if isinstance(result, Failure):
            # A worker returns its error, and the driver raises it: an exception in a worker would make Ray Data repeat the
            # shard.
            error = _ERRORS[result.kind](result.failure)
            error.add_note(result.trace)
            raise error
        yield result


def _lines(request: Request, missing: list[Planned], scale: ScaleConfig) -> Iterator[Line]:
    """Yield the results of the workers, records and failures as JSON, in the order in which they finish."""
    items = [{"entry": shard.model_dump_json()} for shard in missing]
    # A worker's share of the CPUs follows from the configured number of workers, even if fewer shards are missing. It sets the
    # number of PyTorch's threads, which affects the last bits of sums, and a resumed stage must make the same parts.
    resources = reserved.of_actors(scale, scale.worker_range[0])
    if alone.here() is not None:
        yield from (alone.call(in_warm_process, (request, item), resources["num_cpus"]) for item in items)
        return
    # Imported here, because the import takes a second and workers import this module, too.
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # At most one worker for each shard, because a worker without a shard would load the model for nothing.
    low, high = (min(workers, len(missing)) for workers in scale.worker_range)
    cpus, gpus = resources["num_cpus"], resources["num_gpus"]
    # One block for each shard. Otherwise Ray Data may put several shards into one task, and a death would repeat all of them.
    source = ray.data.from_items(items, override_num_blocks=len(items))
    if _in_tasks(scale):
        lines = source.map(
            partial(in_warm_process, request), compute=ray.data.TaskPoolStrategy(high), num_cpus=cpus, num_gpus=gpus
        )
    else:
        lines = source.map(
            Worker,  # type: ignore[arg-type]
            fn_constructor_args=(request,),
            # Two tasks in flight for each actor, so that the next shard waits at the actor, and the actor is never idle.
            compute=ray.data.ActorPoolStrategy(min_size=low, max_size=high, max_tasks_in_flight_per_actor=2),
            num_cpus=cpus,
            num_gpus=gpus,
        )
    yield from lines.iter_rows()


_RESULT: TypeAdapter[Done | Failure] = TypeAdapter(Done | Failure)
_ERRORS: dict[str, type[Exception]] = {"ValueError": ValueError, "OSError": StoreError, "RuntimeError": RuntimeError}
"""Kind of a failure -> exception that the driver raises."""
