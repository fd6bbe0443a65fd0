"""Run functions in processes that remain for the next call, so that imports and models are loaded once.

With `scale.warm` a call is a Ray task, whose process Ray reuses for the next task. An idle process reserves no CPU, which suits
the small trials of a sweep. Otherwise, and for all calls that reserve a GPU, a call goes to an actor. The actor belongs to the
thread that runs the plan, and is ended as soon as another model is needed: an idle process would hold GPU memory that Ray
counts as free, and torch keeps its first device even if Ray assigns another one to the process.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar, TypeVarTuple

from steerlab.guards import late
from steerlab.job import ScaleConfig
from steerlab.stages.spread import alone
from steerlab.stages.spread.reserved import remote

if TYPE_CHECKING:
    import ray
    from ray.actor import ActorHandle
else:
    ray = late.module("ray")

_L = TypeVar("_L")
_R = TypeVar("_R")
_A = TypeVarTuple("_A")
Tell = Callable[[_L], None]
"""Function that takes a message, such as progress, from a running function."""


# Messages and results have different types, since a function may return an object of any type.
class _Message(NamedTuple, Generic[_L]):
    """Message of a running function."""

    value: _L


class _Result(NamedTuple, Generic[_R]):
    """Return value of a function."""

    value: _R


class _Open(threading.local):
    """The actor that this thread used last, and its owner; thread-local because each thread runs its own plan."""

    owner = ""
    actor: ActorHandle | None = None


_open = _Open()


def call(
    function: Callable[[Tell[_L], *_A], _R],
    arguments: tuple[*_A],
    scale: ScaleConfig,
    reserved: Mapping[str, float],
    receive: Tell[_L],
    owner: str = "",
) -> _R:
    """Return `function(tell, *arguments)`, run in another process.

    A process that dies is replaced up to `scale.max_failures` times, and the function is restarted.

    Args:
        function: A function of a module; its first argument sends messages to `receive`.
        arguments: Its other arguments, sent to the process.
        scale: `warm` and `max_failures` set how the function runs.
        reserved: CPUs and GPUs that the process reserves, as options of Ray.
        receive: Called in this process with each message.
        owner: Name of the state that the process holds. Calls with the same owner, one after another, share an actor.
    """
    if alone.here() is not None:
        return alone.call(function, (receive, *arguments), reserved["num_cpus"])
    # `failures_left` runs from `max_failures` down to 0.
    for failures_left in reversed(range(scale.max_failures + 1)):
        lines = _start(function, arguments, scale, reserved, owner)
        try:
            for line in lines:
                # The generator yields references; `get` raises the function's own error, or Ray's error for a dead process.
                item: _Message[_L] | _Result[_R] = ray.get(line)
                if isinstance(item, _Result):
                    return item.value
                receive(item.value)
        except BaseException as error:
            # BaseException, because the function must also stop after a Ctrl-C. The process is ended even after a death: the
            # error may mean that one message was lost while the process is still alive.
            if _keeps(scale, reserved):
                # The task is cancelled; its process remains for the next one.
                ray.cancel(lines)
            else:
                close()
            if not (_is_death(error) and failures_left):
                raise
    # In the last iteration `failures_left` is 0, so every error has been raised above.
    raise AssertionError("the last failure is raised")


def _is_death(error: BaseException) -> bool:
    """Return whether the process has died or can no longer be reached."""
    from ray import exceptions as of

    lost = (of.ObjectLostError, of.ActorUnavailableError)
    return isinstance(error, (of.WorkerCrashedError, of.NodeDiedError, of.OutOfMemoryError, of.ActorDiedError, *lost))


def close() -> None:
    """End this thread's actor, and with it the model that it holds."""
    # The actor is killed, since it may be in the middle of a long call.
    if _open.actor is not None:
        ray.kill(_open.actor)
    _open.owner, _open.actor = "", None


def every(seconds: float, tell: Tell[tuple[*_A]]) -> Callable[[*_A], None]:
    """Return a function that passes its arguments to `tell`, at most once in `seconds`; other calls do nothing."""
    # `monotonic`, since the time of day may be set back.
    last_s = time.monotonic()

    def sometimes(*values: *_A) -> None:
        nonlocal last_s
        if time.monotonic() - last_s > seconds:
            last_s = time.monotonic()
            tell(values)

    return sometimes


def _keeps(scale: ScaleConfig, reserved: Mapping[str, float]) -> bool:
    """Return whether a process remains after its call, for other calls."""
    return bool(scale.warm) and not reserved.get("num_gpus")


def _start(
    function: Callable[[Tell[_L], *_A], _R],
    arguments: tuple[*_A],
    scale: ScaleConfig,
    reserved: Mapping[str, float],
    owner: str,
) -> ray.ObjectRefGenerator:
    """Start the function and return references to its messages and its result, in the order in which it yields them."""
    name = function.__name__.strip("_")  # Ray lists the process under this name: ray::train, ray::evaluate
    if _keeps(scale, reserved):
        # `call` restarts a function itself, since it must distinguish a death from an error of the function.
        task = remote(_in_task, num_returns="streaming").options(**reserved, max_retries=0, name=name)
        return task.remote(function, arguments)
    # One actor at a time for each thread: two would hold two models at once.
    if _open.actor is None or owner != _open.owner:
        close()
        _open.actor = remote(_Actor).options(**reserved).remote()
        _open.owner = owner
    assert _open.actor is not None
    # With a streaming generator, messages arrive while the function runs; otherwise a call of an actor returns only once.
    return _open.actor.run.options(num_returns="streaming", name=name).remote(function, arguments)


def _in_task(function: Callable[[Tell[_L], *_A], _R], arguments: tuple[*_A]) -> Iterator[_Message[_L] | _Result[_R]]:
    yield from _lines(function, arguments)


class _Actor:
    def run(self, function: Callable[[Tell[_L], *_A], _R], arguments: tuple[*_A]) -> Iterator[_Message[_L] | _Result[_R]]:
        yield from _lines(function, arguments)


def _lines(function: Callable[[Tell[_L], *_A], _R], arguments: tuple[*_A]) -> Iterator[_Message[_L] | _Result[_R]]:
    """Yield the messages of a function, and its result last."""
    # The function runs in another thread, because only a generator can stream from a Ray task: this one waits at `get` until
    # the function has something to send. The queue has no limit, so that the function never waits for a slow driver.
    lines: queue.SimpleQueue[_Message[_L] | _Result[_R] | BaseException] = queue.SimpleQueue()
    stopped = threading.Event()

    def tell(line: _L) -> None:
        # A thread cannot be ended from outside, so a cancelled function ends at its next message.
        if stopped.is_set():
            raise _Stopped
        lines.put(_Message(line))

    def run() -> None:
        try:
            lines.put(_Result(function(tell, *arguments)))
        except BaseException as error:  # raised below, so that Ray receives it
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
        # The thread is joined, so that the process does not run two functions on one model at once.
        stopped.set()
        thread.join()


class _Stopped(BaseException):
    """End a function whose caller has stopped. It is a BaseException, so that `except Exception` does not catch it."""
