"""Call functions in separate Ray tasks, or in this process if stages run without a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar, TypeVarTuple

from steerlab.guards import late
from steerlab.stages.spread import alone, reserved

if TYPE_CHECKING:
    import ray
else:
    ray = late.module("ray")

# Seconds of one wait, short enough to react to Ctrl-C at once.
_POLL_S = 0.5
_R = TypeVar("_R")
_A = TypeVarTuple("_A")


def result(function: Callable[[*_A], _R], arguments: tuple[*_A], num_cpus: float, num_gpus: float = 0) -> _R:
    """Return `function(*arguments)`, run by a worker that reserves CPUs and GPUs."""
    return next(results(function, [arguments], num_cpus, num_gpus))


def results(
    function: Callable[[*_A], _R], arguments: Sequence[tuple[*_A]], num_cpus: float, num_gpus: float = 0
) -> Iterator[_R]:
    """Yield the results of a function for several tuples of arguments, in the order in which the calls finish."""
    if alone.here() is not None:
        yield from (alone.call(function, some, num_cpus) for some in arguments)
        return
    task = reserved.task(function, {"num_cpus": num_cpus, "num_gpus": num_gpus})
    # All tasks are submitted at once: Ray queues those for which the cluster has no room.
    left: list[ray.ObjectRef] = [task.remote(*some) for some in arguments]
    while left:
        # The waits are short: Python handles a signal, or an exception that another thread raises in this one, only between
        # calls of Ray.
        ended, left = ray.wait(left, timeout=_POLL_S)
        yield from ray.get(ended)
