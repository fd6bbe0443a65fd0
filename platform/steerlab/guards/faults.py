"""Distinguish messages to users from internal errors; limit the time and memory of code that may not end."""

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
"""Class that libraries in Rust (PyO3: tokenizers, safetensors) raise for a panic. It derives from BaseException and cannot be
imported."""


def is_for_people(error: BaseException) -> bool:
    """Return whether an error's message is written for users: whether a `raise` statement of this package raised it.

    An operation that failed inside our code (`int("x")`, a missing key) and an error of a library are internal errors of any
    type: their messages are about things that the user has never seen.
    """
    # The frame that raised decides, not the one that caught, because a library calls our code back.
    raised = _innermost(error.__traceback__)
    if raised is None or raised.tb_frame.f_globals.get("__name__", "").partition(".")[0] != __name__.partition(".")[0]:
        return False
    # The bytecode distinguishes `raise ValueError(...)` from a ValueError that an expression in the same function raised.
    instructions = {each.offset: each.opname for each in dis.get_instructions(raised.tb_frame.f_code)}
    return instructions.get(raised.tb_lasti) == "RAISE_VARARGS"


def gave_up(error: BaseException) -> bool:
    """Return whether an error is a panic of a library in Rust, such as a tokenizer on a damaged file."""
    return type(error).__name__ == _PANIC


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn a library's error while it reads a file into a ValueError that names the file.

    Args:
        what: The file, as the message names it.

    Raises:
        ValueError: the library failed. Errors with a message for users, and of missing files, are passed on.
    """
    try:
        yield
    except BaseException as error:  # parsers of damaged files raise anything: struct.error, KeyError, bare Exception
        # KeyboardInterrupt and SystemExit are BaseExceptions too, and must pass.
        if not isinstance(error, Exception) and not gave_up(error):
            raise
        if is_for_people(error) or isinstance(error, FileNotFoundError | PermissionError):
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        if isinstance(error, pickle.UnpicklingError):  # torch's message advises `weights_only=False`, which would run it
            reason = "a pickle holds more than tensors and numbers, and is not read, since it could run code; give safetensors"
        raise ValueError(f"{what} cannot be read: {reason}") from error


_AGAIN_S = 0.5
"""Seconds between two interruptions of code that continued after the first."""


class TooLong(Exception):
    """Code took more time or memory than `limited` allows."""


@contextmanager
def limited(what: str, *, seconds: float, num_bytes: int | None = None) -> Iterator[None]:
    """Interrupt the block after a time, or when it allocates too much memory: a chat template may loop forever.

    Memory is limited on Linux only, through the address space of the whole process, so the limit is approximate. In other
    threads than the main one it is not limited.

    Args:
        what: Beginning of the message.
        seconds: Time after which the block is interrupted.
        num_bytes: Memory that the block may allocate; None does not limit it.

    Raises:
        TooLong: the block reached a limit.
    """
    # Python delivers signals to the main thread only. Code of another thread was run once in the main thread before.
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return
    try:
        with _ended_after(seconds, f"{what} takes longer than {seconds:g} s, and may never end"), _within(num_bytes):
            yield
    except MemoryError:
        if num_bytes is None:
            raise
        raise TooLong(f"{what} asks for more than {num_bytes / 2**30:g} GiB of memory") from None


@contextmanager
def _within(num_bytes: int | None) -> Iterator[None]:
    """Limit the process's address space to its present size plus `num_bytes`; an allocation beyond raises MemoryError."""
    status = Path("/proc/self/statm")
    if num_bytes is None or resource is None or not status.exists():
        yield
        return
    # RLIMIT_AS is used instead of RLIMIT_DATA, which counts memory of mmap since Linux 4.7 only.
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
            return  # the limits themselves are being set or reset: interrupted there, they would stay in force
        raise TooLong(message)

    # The timer repeats, because a library may catch the exception as an error of its own and continue.
    before, outer = signal.signal(signal.SIGALRM, end), signal.setitimer(signal.ITIMER_REAL, seconds, _AGAIN_S)
    began_s = time.monotonic()
    try:
        yield
    finally:
        # Blocks may be nested, so the outer timer gets its remaining time, at least a moment, since 0 would disarm it.
        left_s = max(1e-3, outer[0] - (time.monotonic() - began_s)) if outer[0] else 0
        signal.setitimer(signal.ITIMER_REAL, left_s, outer[1])
        signal.signal(signal.SIGALRM, before)


def _innermost(trace: TracebackType | None) -> TracebackType | None:
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace
