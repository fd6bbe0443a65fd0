"""Run functions in processes that stay for the next call, so that imports and models are loaded once.

With `scale.warm` a call is a Ray task, whose process Ray keeps for the next task. An idle process reserves no CPU, which suits
the small trials of a sweep. Otherwise, and for all that reserves a GPU, a call goes to an actor that belongs to the thread that
runs the plan, and that is ended as soon as another model is needed: an idle process would hold GPU memory that Ray counts as
free, and torch keeps the first device that it was given when Ray gives the process another one.
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
"""Takes a message, such as progress, from a function that is running."""


# Two types, since a function may return what looks like a message.
class _Message(NamedTuple, Generic[_L]):
    """Message of a function that is running."""

    value: _L


class _Result(NamedTuple, Generic[_R]):
    """Return value of a function."""

    value: _R


class _Open(threading.local):
    """The actor that this thread used last, and its owner; thread-local because each thread runs a plan of its own."""

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

    A process that dies is replaced up to `scale.max_failures` times, and the function begins again.

    Args:
        function: A function of a module; its first argument sends messages to `receive`.
        arguments: Its other arguments, sent to the process.
        scale: `warm` and `max_failures` decide how it runs.
        reserved: CPUs and GPUs that the process reserves, as options of Ray.
        receive: Called in this process with each message.
        owner: Name of the state that the process holds. Calls with the same owner, one after another, share an actor.
    """
    if alone.here() is not None:
        return alone.call(function, (receive, *arguments), reserved["num_cpus"])
    # From `max_failures` down to 0.
    for failures_left in reversed(range(scale.max_failures + 1)):
        lines = _start(function, arguments, scale, reserved, owner)
        try:
            for line in lines:
                # The generator yields references; `get` raises the function's own error, or that of a death.
                item: _Message[_L] | _Result[_R] = ray.get(line)
                if isinstance(item, _Result):
                    return item.value
                receive(item.value)
        except BaseException as error:
            # BaseException: after a Ctrl-C, too, the function must not go on. Even after a death the process is ended: the
            # error may mean that one message was lost, while the process is alive.
            if _keeps(scale, reserved):
                # The task is told to stop; its process stays for the next one.
                ray.cancel(lines)
            else:
                close()
            if not (_is_death(error) and failures_left):
                raise
    # `failures_left` is 0 in the last turn, where every error is raised above.
    raise AssertionError("the last failure is raised")


def _is_death(error: BaseException) -> bool:
    """Return whether the process has died, or cannot be reached any more."""
    from ray import exceptions as of

    lost = (of.ObjectLostError, of.ActorUnavailableError)
    return isinstance(error, (of.WorkerCrashedError, of.NodeDiedError, of.OutOfMemoryError, of.ActorDiedError, *lost))


def close() -> None:
    """End this thread's actor, and with it the model that it holds."""
    # Killed and not asked to end: it may be in the middle of a long call.
    if _open.actor is not None:
        ray.kill(_open.actor)
    _open.owner, _open.actor = "", None


def every(seconds: float, tell: Tell[tuple[*_A]]) -> Callable[[*_A], None]:
    """Return a function that passes its arguments to `tell`, at most once in so many seconds; other calls do nothing."""
    # Not the time of day, which a clock may set back.
    last_s = time.monotonic()

    def sometimes(*values: *_A) -> None:
        nonlocal last_s
        if time.monotonic() - last_s > seconds:
            last_s = time.monotonic()
            tell(values)

    return sometimes


def _keeps(scale: ScaleConfig, reserved: Mapping[str, float]) -> bool:
    """Return whether a process stays after its call, for whatever comes next."""
    return bool(scale.warm) and not reserved.get("num_gpus")


def _start(
    function: Callable[[Tell[_L], *_A], _R],
    arguments: tuple[*_A],
    scale: ScaleConfig,
    reserved: Mapping[str, float],
    owner: str,
) -> ray.ObjectRefGenerator:
    """Start the function and return references to its messages and its result, in the order in which it yields them."""
    name = function.__name__.strip("_")  # the process is listed under it: ray::train, ray::evaluate
    if _keeps(scale, reserved):
        # `call` starts a function again itself, since it has to tell a death from an error of the function.
        task = remote(_in_task, num_returns="streaming").options(**reserved, max_retries=0, name=name)
        return task.remote(function, arguments)
    # One actor at a time for each thread: two would hold two models at once.
    if _open.actor is None or owner != _open.owner:
        close()
        _open.actor = remote(_Actor).options(**reserved).remote()
        _open.owner = owner
    assert _open.actor is not None
    # A streaming generator, since a call of an actor returns once otherwise: messages arrive while the function runs.
    return _open.actor.run.options(num_returns="streaming", name=name).remote(function, arguments)


def _in_task(function: Callable[[Tell[_L], *_A], _R], arguments: tuple[*_A]) -> Iterator[_Message[_L] | _Result[_R]]:
    yield from _lines(function, arguments)


class _Actor:
    def run(self, function: Callable[[Tell[_L], *_A], _R], arguments: tuple[*_A]) -> Iterator[_Message[_L] | _Result[_R]]:
        yield from _lines(function, arguments)


def _lines(function: Callable[[Tell[_L], *_A], _R], arguments: tuple[*_A]) -> Iterator[_Message[_L] | _Result[_R]]:
    """Yield the messages of a function, and its result last."""
    # The function runs in a thread of its own, because a generator is the only way to stream from a Ray task: this one waits
    # at `get` until the function has something to send.
    # Without a limit: a function that computes never waits for a driver that is slow to read.
    lines: queue.SimpleQueue[_Message[_L] | _Result[_R] | BaseException] = queue.SimpleQueue()
    stopped = threading.Event()

    def tell(line: _L) -> None:
        # Python cannot end a thread from outside, so a cancelled function ends at its next message.
        if stopped.is_set():
            raise _Stopped
        lines.put(_Message(line))

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
        # Joined, so that the process does not run two functions on one model at once.
        stopped.set()
        thread.join()


class _Stopped(BaseException):
    """Ends a function whose caller has gone. A BaseException, so that `except Exception` in the function lets it pass."""
