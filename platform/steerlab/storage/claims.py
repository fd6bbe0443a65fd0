"""Claims: exclusive rights among all processes that use one ROOT: to compute a stage, to remove it, or to drive a sweep.

The processes may be on one machine or on several, in one Ray cluster, in several or in none, with clocks that differ. The
holders of a claim take turns, which are numbered. Each turn has two files:

    ROOT/claims/<name>/000001.json   who holds the claim; created only if it does not exist (exclusive.py)
    ROOT/claims/<name>/000001.beat   a counter, which the holder increases every BEAT_S seconds

The holder removes both files at the end. A waiting process polls the newest turn every LOOK_S seconds. If the counter has not
changed in LOOKS polls, the waiting process regards the holder as dead and creates the next turn. A holder that was only
suspended finds out when it continues (`Claim.lost`). No clock times are compared: a waiting process compares only the counter,
and counts its own polls.

Processes of one machine that share a lock file need not wait so long. A process takes a lock of the kernel (`flock`) before it
waits for processes of other machines, and keeps this lock until it releases the claim. The kernel releases the lock when the
process dies, so a holder whose lock is free is dead.

A holder that is suspended for more than LOOKS x LOOK_S seconds between its last check and its last write may still write after
the next holder has begun. For a stage that is harmless: both compute the same artifact, and an existing one is never replaced.
"""

from __future__ import annotations

import getpass
import hashlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from steerlab.data.sources import cache_root
from steerlab.guards import files, saved
from steerlab.storage.store import Store, StoreError

# LOOK_S x LOOKS is 60 s, or twelve beats, so that a few slow writes do not make a living holder look dead.
BEAT_S = 5.0
"""Seconds after which a holder increases its counter."""
LOOK_S, LOOKS = 2.0, 30
"""Seconds between two polls of a waiting process, and number of polls without a change after which it takes the claim over."""
Say = Callable[[str], None]


class Held(RuntimeError):
    """Another process holds the claim, and the caller did not want to wait; the message names that process."""


class Lost(RuntimeError):
    """Another process has taken the claim over, because this one was suspended or could not reach ROOT for too long."""


class _Turn(saved.Shape):
    id: str
    # The length is limited because other users of ROOT may write this file, and its text is printed.
    who: str = Field(max_length=300)
    lock: str
    """Name of the lock that the holder has (`_locked`); empty if its file system has no locks."""


class _Newest(NamedTuple):
    """The newest turn of a claim, with the value of its counter. Number 0 and None if nobody holds the claim."""

    number: int
    turn: _Turn | None
    beat: str


class Claim:
    """A claim that this process holds."""

    def __init__(self, store: Store, folder: str, number: int, turn: _Turn) -> None:
        self._store, self._folder, self._number, self._turn = store, folder, number, turn
        self._stop = threading.Event()
        self.lost = False
        """Whether this process has noticed that another one has taken the claim over."""

    def check(self) -> None:
        """Read the claim's file, and raise Lost if another process has taken the claim over."""
        self.lost = self.lost or not self._is_mine()
        if self.lost:
            raise Lost("another process has taken over the work of this one, which had shown no sign of life for too long")

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Increase the counter regularly while the block runs; remove the claim's files at its end."""
        # A daemon thread, because Python waits for all other threads before a process can end.
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            # If the store does not answer, the files stay, and the claim is taken over like that of a killed process.
            with suppress(OSError):
                if self._is_mine():
                    _remove(self._store, self._folder, self._number)

    def _beat(self) -> None:
        count = 0
        # An event ends this wait at once; with `time.sleep`, the end of the block would wait for the next beat.
        while not self._stop.wait(BEAT_S):
            count += 1
            # A store that fails now is asked again at the next beat, which also notices if the claim was taken over meanwhile.
            with suppress(OSError):
                if not self._is_mine():
                    self.lost = True
                    return
                # A counter instead of a time stamp, because the clocks of two machines differ.
                self._store.write_text(_file(self._folder, self._number, "beat"), str(count))

    def _is_mine(self) -> bool:
        return _read_turn(self._store, _file(self._folder, self._number)) == self._turn


@contextmanager
def hold(store: Store, name: str, *, wait: bool, say: Say = lambda line: None) -> Iterator[Claim]:
    """Hold a claim while the block runs.

    Args:
        store: The store of the ROOT.
        name: Name of the claim, a valid file name.
        wait: Whether to wait until the present holder has finished. If False, the call raises `Held` once it has seen that
            the holder lives: at once for a process of this machine, else after up to BEAT_S + LOOK_S seconds, when the counter
            changes. A holder whose counter does not change is taken over in either case.
        say: Called with a line of text before this process waits for another one or takes a claim over.

    Raises:
        Held: another process holds the claim, and `wait` is False.
        ValueError: the package that a bucket needs is not installed.
    """
    folder = f"claims/{name}"
    with ExitStack() as stack:
        # The lock comes first, so that only one process of a machine at a time polls the turns and creates the next one.
        lock = stack.enter_context(_locked(store, name, wait, say))
        number, turn = _next(store, folder, lock, wait, say)
        claim = Claim(store, folder, number, turn)
        stack.enter_context(claim.beating())
        yield claim


def is_held(store: Store, name: str) -> bool:
    """Return whether a process holds a claim. True also for a holder on another machine that may have died meanwhile."""
    lock = _lock_path(store, name)
    if files.is_locked(lock):
        return True
    turn = _newest(store, f"claims/{name}").turn
    # The lock is free, so a turn that was created under it belongs to a dead process. A process of this machine may use another
    # lock file: that of a bucket lies in the cache, which each user and container has for itself.
    return turn is not None and turn.lock != _name_of(lock)


@contextmanager
def _locked(store: Store, name: str, wait: bool, say: Say) -> Iterator[str]:
    """Hold the lock by which the processes of this machine exclude each other; yield its name, empty if there are no locks."""
    path = _lock_path(store, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The lock file is never removed: a process that waits for it would then lock a deleted file, which excludes nobody.
    with ExitStack() as stack:
        # `enter_context` instead of `with`: an OSError of the caller's block must not be treated as an error of the lock.
        try:
            stack.enter_context(files.locked(path, wait=False))
        except BlockingIOError:
            holder = _newest(store, f"claims/{name}").turn
            who = "another process of this machine" if holder is None else holder.who
            if not wait:
                raise Held(who) from None
            say(f"waits for {who}")
            stack.enter_context(files.locked(path))
        except OSError as error:
            if error.errno not in files.NO_LOCKS:
                raise
            yield ""
            return
        yield _name_of(path)


def _name_of(lock: Path) -> str:
    """Return the name of a lock file; one that no turn has if the file does not exist."""
    # A lock excludes only the processes that run on the same kernel and lock the same file, so its name holds both.
    try:
        status = lock.stat()
    except FileNotFoundError:
        return "no file"
    return f"{files.kernel()}:{status.st_dev}:{status.st_ino}"


def _lock_path(store: Store, name: str) -> Path:
    if store.is_local:
        return store.on_disk("claims", f"{name}.lock")
    # A bucket has no locks, so the processes of this machine lock a file in their cache, one for each ROOT and claim.
    return cache_root() / "claims" / f"{hashlib.sha256(store.root.encode()).hexdigest()[:16]}-{name}.lock"


def _next(store: Store, folder: str, lock: str, wait: bool, say: Say) -> tuple[int, _Turn]:
    """Create the next turn as soon as the newest one has ended or its holder is dead; return its number and content."""
    # The random id makes each turn unique, which `_is_mine` relies on: another process may have the same user and number.
    mine = _Turn(id=uuid.uuid4().hex, who=_who(), lock=lock)
    seen, looks = _Newest(0, None, ""), 0
    while True:
        newest = _newest(store, folder)
        # Counts this process's own polls without a change, so that no clock decides whether the holder is dead.
        looks = looks + 1 if newest == seen else 0
        # A living holder would still hold this lock, which this process holds now.
        is_dead = newest.turn is not None and lock != "" and newest.turn.lock == lock
        if newest.turn is not None and not is_dead and looks < LOOKS:
            if newest[:2] != seen[:2]:
                say(f"waits for {newest.turn.who}")
            elif looks == 0 and not wait:  # the counter has changed since the last poll, so the holder lives
                raise Held(newest.turn.who)
            seen = newest
            time.sleep(LOOK_S)
            continue
        if newest.turn is not None:
            why = "has died" if is_dead else f"has shown no sign of life for {LOOKS * LOOK_S:.0f} s"
            say(f"{newest.turn.who} {why}: its work is taken over")
        seen = _Newest(0, None, "")
        if (number := _take(store, folder, newest, mine)) is not None:
            return number, mine


def _take(store: Store, folder: str, previous: _Newest, mine: _Turn) -> int | None:
    """Create the turn after `previous` and remove all earlier ones; return its number, None if another process was faster."""
    number = previous.number + 1
    # Exclusion rests on this step alone: if several processes create the same turn, the store lets one of them succeed.
    if not store.create_json(_file(folder, number), mine.model_dump()):
        return None
    # `previous` may be outdated: this process may have been suspended since, or its NFS client may have shown an old listing
    # (after a creation it reads a new one). Meanwhile other processes may have had turns, whose numbers start again at 1 once
    # all earlier ones are gone.
    turns = _turns(store, folder)
    is_unchanged = previous.turn is None or _read_turn(store, _file(folder, previous.number)) == previous.turn
    if max(turns, default=0) != number or not is_unchanged:
        _remove(store, folder, number)
        return None
    for earlier in turns:
        if earlier != number:
            _remove(store, folder, earlier)
    return number


def _file(folder: str, number: int, kind: str = "json") -> str:
    return f"{folder}/{number:06d}.{kind}"


def _remove(store: Store, folder: str, number: int) -> None:
    # The turn is removed first: a counter without a turn is ignored, but a turn without its counter would count as held.
    store.remove(_file(folder, number))
    store.remove(_file(folder, number, "beat"))


def _turns(store: Store, folder: str) -> list[int]:
    # The folder may hold other files, such as half-written ones, which are not turns.
    names = (name.removesuffix(".json") for name in store.list(folder) if name.endswith(".json"))
    return [int(name) for name in names if name.isascii() and name.isdigit()]


def _newest(store: Store, folder: str) -> _Newest:
    while number := max(_turns(store, folder), default=0):
        turn = _read_turn(store, _file(folder, number))
        # None means that the turn has ended since it was listed, so the folder is listed again.
        if turn is not None:
            return _Newest(number, turn, _read_beat(store, _file(folder, number, "beat")))
    return _Newest(0, None, "")


def _read_turn(store: Store, path: str) -> _Turn | None:
    """Return the turn in a file; None if the file does not exist."""
    try:
        return saved.checked(store.read_json(path), _Turn, path)
    except FileNotFoundError:
        return None
    except (StoreError, saved.SavedError):  # counts as a holder: a later version of steerlab may have written it
        return _Turn(id="", who="a process that left no name", lock="")


def _read_beat(store: Store, path: str) -> str:
    try:
        return store.read_text(path)
    except (FileNotFoundError, StoreError):
        return ""


def _who() -> str:
    try:
        user = getpass.getuser()
    except (KeyError, OSError):  # a container may run as a user without a name
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}, process {os.getpid()}"[:300]
