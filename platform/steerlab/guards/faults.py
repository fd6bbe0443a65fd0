"""Whose fault an error is: what this platform says to people, or what went wrong inside of it; and an end to what has none."""

from __future__ import annotations

import dis
import pickle
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType

try:
    import resource
except ImportError:  # Windows has none
    resource = None  # type: ignore[assignment]


_PANIC = "PanicException"
"""What a library written in Rust raises where it gives up, which is no Exception; its class cannot be imported."""


def is_for_people(error: BaseException) -> bool:
    """Say whether an error's message was written for the person who asked: a statement of this platform raised it.

    An operation that failed in the midst of our code (`int("x")`, a missing key), or a library's own error, is an internal
    error, whatever its type: its message speaks of things that the person has never seen.
    """
    raised = _innermost(error.__traceback__)
    if raised is None or raised.tb_frame.f_globals.get("__name__", "").partition(".")[0] != __name__.partition(".")[0]:
        return False
    instructions = {one.offset: one.opname for one in dis.get_instructions(raised.tb_frame.f_code)}
    return instructions.get(raised.tb_lasti) == "RAISE_VARARGS"


def gave_up(error: BaseException) -> bool:
    """Say whether a library written in Rust gave up: on a text, or on what a file told it to do with texts."""
    return type(error).__name__ == _PANIC


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Name the file of which a library says that it is damaged, in words or by the error that it runs into.

    Raises:
        ValueError: the file cannot be read. What this platform says itself is passed on.
    """
    try:
        yield
    except BaseException as error:  # parsers of strangers' files fail in every way: struct.error, KeyError, bare Exception
        if not isinstance(error, Exception) and not gave_up(error):
            raise
        if is_for_people(error) or isinstance(error, FileNotFoundError | PermissionError):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, pickle.UnpicklingError):  # torch advises to run it all the same
            reason = "a pickle holds more than tensors and numbers, and is not read, since it could run code; give safetensors"
        raise ValueError(f"{what} cannot be read: {reason}") from error


_AGAIN_S = 0.5


class TooLong(Exception):
    """Something took longer than its limit, or more memory."""


@contextmanager
def limited(what: str, *, seconds: float, num_bytes: int | None = None) -> Iterator[None]:
    """End what runs inside after some time or memory: a stranger's program, such as a chat template, may have no end itself.

    Only the main thread can be interrupted; what runs elsewhere was tried there before. Memory is limited on Linux, by the
    address space of the whole process, so the limit is no promise of exactness.

    Raises:
        TooLong: with a message that begins with `what`.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    try:
        with _ended_after(seconds, f"{what} takes longer than {seconds:g} s, as if it did not end"), _within(num_bytes):
            yield
    except MemoryError:
        if num_bytes is None:
            raise
        raise TooLong(f"{what} asks for more than {num_bytes / 2**30:g} GiB of memory") from None


@contextmanager
def _within(num_bytes: int | None) -> Iterator[None]:
    """Let the process have so much more address space than it has now; beyond it, an allocation raises MemoryError."""
    status = Path("/proc/self/statm")
    if num_bytes is None or resource is None or not status.exists():
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(status.read_text().split()[0]) * resource.getpagesize() + num_bytes
    if soft == resource.RLIM_INFINITY or most < soft:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextmanager
def _ended_after(seconds: float, message: str) -> Iterator[None]:
    def end(_: int, frame: FrameType | None) -> None:
        if frame is not None and frame.f_globals.get("__name__") in (__name__, contextmanager.__module__):
            return  # the limits themselves are being set or taken back, which nothing may break off
        raise TooLong(message)

    # It rings again until somebody hears it: a library may take what is raised for an error of its own, and go on.
    before, outer = signal.signal(signal.SIGALRM, end), signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
    began_s = time.monotonic()
    try:
        yield
    finally:
        left_s = max(1e-3, outer[0] - (time.monotonic() - began_s)) if outer[0] else 0
        signal.setitimer(signal.ITIMER_REAL, left_s, outer[1])
        signal.signal(signal.SIGALRM, before)


def _innermost(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace
