"""Processes that stay, so that imports and models are paid for once: where a stage runs something with a model on its own.

There are two kinds. With `scale.warm` it is a task, whose process Ray keeps for the next one: what a sweep's small trials need,
since an idle process reserves nothing. Otherwise it is an actor of the thread that runs the plan, which is ended when another
model is needed: an idle process would hold the memory of a GPU unseen. What runs is the same; a process that dies is replaced.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar, TypeVarTuple

import ray
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    WorkerCrashedError,
)

from steerlab.job import ScaleConfig
from steerlab.stages.spread.reserved import ANYWHERE

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_DIED = (WorkerCrashedError, NodeDiedError, ObjectLostError, OutOfMemoryError, ActorDiedError, ActorUnavailableError)
_L = TypeVar("_L")
_R = TypeVar("_R")
_A = TypeVarTuple("_A")
Tell = Callable[[_L], None]
"""Takes what a function tells while it runs."""


class _Told(NamedTuple, Generic[_L]):
    """What a function tells while it runs."""

    value: _L


class _Result(NamedTuple, Generic[_R]):
    """What a function returns."""

    value: _R


class _Open(threading.local):
    """The actor that this thread used last: one thread runs one plan."""

    owner = ""
    actor: ActorHandle | None = None


_open = _Open()


def call(
    function: Callable[[Tell[_L], *_A], _R],
    arguments: tuple[*_A],
    scale: ScaleConfig,
    reserved: Mapping[str, float],
    told: Tell[_L],
    owner: str = "",
) -> _R:
    """Return `function(tell, *arguments)` of another process; `told` sees what it tells.

    `owner` is what an actor is kept for: the next call of the same owner finds what it left in the process. A process that dies
    is replaced up to `scale.max_failures` times, and the function begins again.
    """
    for failures_left in reversed(range(scale.max_failures + 1)):
        lines = _started(function, arguments, scale, reserved, owner)
        try:
            for line in lines:
                said: _Told[_L] | _Result[_R] = ray.get(line)
                if isinstance(said, _Result):
                    return said.value
                told(said.value)
        except BaseException as error:
            # Also where it died: the loss of one line is no proof that the process is gone.
            if scale.warm:
                ray.cancel(lines)
            else:
                close()
            if not (isinstance(error, _DIED) and failures_left):
                raise
    raise AssertionError("the last failure is raised")


def close() -> None:
    """End this thread's actor, and with it the model that it holds."""
    if _open.actor is not None:
        ray.kill(_open.actor)
    _open.owner, _open.actor = "", None


def every(seconds: float, tell: Tell[tuple[*_A]]) -> Callable[[*_A], None]:
    """Return a function that tells its arguments, but not more often than this."""
    told_s = time.monotonic()

    def sometimes(*values: *_A) -> None:
        nonlocal told_s
        if time.monotonic() - told_s > seconds:
            told_s = time.monotonic()
            tell(values)

    return sometimes


def _started(
    function: Callable[[Tell[_L], *_A], _R],
    arguments: tuple[*_A],
    scale: ScaleConfig,
    reserved: Mapping[str, float],
    owner: str,
) -> ray.ObjectRefGenerator:
    """Begin, and return references to the lines that come."""
    name = function.__name__.strip("_")  # as people see the process: ray::train, ray::evaluate
    if scale.warm:
        task = _in_task.options(**reserved, max_retries=0, name=name)  # type: ignore[attr-defined]
        return task.remote(function, arguments)
    if _open.actor is None or owner != _open.owner:
        close()
        _open.actor = _Actor.options(**reserved).remote()  # type: ignore[attr-defined]
        _open.owner = owner
    assert _open.actor is not None
    return _open.actor.run.options(num_returns="streaming", name=name).remote(function, arguments)


@ray.remote(num_returns="streaming", scheduling_strategy=ANYWHERE)
def _in_task(function: Callable[[Tell[_L], *_A], _R], arguments: tuple[*_A]) -> Iterator[_Told[_L] | _Result[_R]]:
    yield from _lines(function, arguments)


@ray.remote(scheduling_strategy=ANYWHERE)
class _Actor:
    def run(self, function: Callable[[Tell[_L], *_A], _R], arguments: tuple[*_A]) -> Iterator[_Told[_L] | _Result[_R]]:
        yield from _lines(function, arguments)


def _lines(function: Callable[[Tell[_L], *_A], _R], arguments: tuple[*_A]) -> Iterator[_Told[_L] | _Result[_R]]:
    """Yield what a function tells while it runs in a thread beside, and its result last."""
    lines: queue.SimpleQueue[_Told[_L] | _Result[_R] | BaseException] = queue.SimpleQueue()
    stopped = threading.Event()

    def tell(line: _L) -> None:
        if stopped.is_set():
            raise _Stopped
        lines.put(_Told(line))

    def run() -> None:
        try:
            lines.put(_Result(function(tell, *arguments)))
        except BaseException as error:  # raised below, where Ray sees it
            lines.put(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        while True:
            line = lines.get()
            if isinstance(line, BaseException):
                raise line
            yield line
            if isinstance(line, _Result):
                return
    finally:
        stopped.set()
        thread.join()


class _Stopped(BaseException):
    """The driver no longer wants the result."""
