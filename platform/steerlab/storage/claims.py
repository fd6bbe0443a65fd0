"""Claims: the exclusive right to compute a stage or to drive a sweep below a ROOT, among all processes that use the ROOT.

The processes may be on one machine or on several, in one Ray cluster, in several or in none, with clocks that differ. A claim
is a file that one process alone can create, with the number of a turn, and a second one that its holder rewrites every few
seconds with the next number of a counter:

    ROOT/claims/<name>/000001.json   who holds the claim; created only if it does not exist (exclusive.py)
    ROOT/claims/<name>/000001.beat   the counter

At the end the holder removes both. One who waits looks at the newest turn again and again. If the counter has not changed in
`_LOOKS` looks, the holder is dead or cut off, and the one who waits creates the next turn. A holder that was only stopped
notices it when it goes on (`Claim.lost`). No time of any clock is compared: only the counter, and the number of own looks.

Processes of one machine need not wait for that. Each holds a lock of the kernel (`flock`) as long as it waits for a claim or
has it, and the kernel releases it with the process: a holder whose lock is free is dead.

A holder that is stopped between its last look and its last write, for longer than the lease, could still write after the next
holder has begun. For a stage that is harmless: an artifact that exists is never replaced, and both would be the same.
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

# LOOK_S x LOOKS is 60 s, twelve beats: one who waits takes nobody for dead because a few writes were slow.
BEAT_S = 5.0
"""Seconds between two numbers of a holder's counter."""
LOOK_S, LOOKS = 2.0, 30
"""Seconds between two looks of one who waits, and looks at an unchanged counter after which a claim is taken over."""
Say = Callable[[str], None]


class Held(RuntimeError):
    """Another process holds the claim, and the caller did not want to wait; the message says which process."""


class Lost(RuntimeError):
    """Another process has taken the claim over, because this one was stopped or cut off for too long."""


class _Turn(saved.Shape):
    id: str
    # Bounded: the file lies where others may write, and the text is shown.
    who: str = Field(max_length=300)
    lock: str
    """Name of the lock that the holder has; empty if its file system has no locks."""


class _Newest(NamedTuple):
    """The newest turn of a claim; number 0 if there is none."""

    number: int
    turn: _Turn | None
    beat: str


class Claim:
    """A claim that this process holds."""

    def __init__(self, store: Store, folder: str, number: int, turn: _Turn) -> None:
        self._store, self._folder, self._number, self._turn = store, folder, number, turn
        self._stop = threading.Event()
        self.lost = False
        """Whether another process has taken the claim over, as far as it was noticed."""

    def check(self) -> None:
        """Raise Lost if another process has taken the claim over by now."""
        self.lost = self.lost or not self._is_mine()
        if self.lost:
            raise Lost("another process has taken over what this one was computing: it had given no sign of life for too long")

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Keep the counter going while the block runs; remove the claim at its end."""
        # A daemon, so that it cannot keep a process alive that is ending.
        thread = threading.Thread(target=self._beat, daemon=True)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()
            # If the store does not answer, the claim is left as that of a process that was killed.
            with suppress(OSError):
                if self._is_mine():
                    _remove(self._store, self._folder, self._number)

    def _beat(self) -> None:
        count = 0
        # An event and no sleep: the end of the block does not wait for the next beat.
        while not self._stop.wait(BEAT_S):
            count += 1
            # A store that fails for a while is asked again with the next beat; if meanwhile the claim is taken over, that is
            # seen then.
            with suppress(OSError):
                if not self._is_mine():
                    self.lost = True
                    return
                # A counter that changes, and no time: clocks of two machines differ.
                self._store.write_text(_file(self._folder, self._number, "beat"), str(count))

    def _is_mine(self) -> bool:
        return _read_turn(self._store, _file(self._folder, self._number)) == self._turn


@contextmanager
def hold(store: Store, name: str, *, wait: bool, say: Say = lambda line: None) -> Iterator[Claim]:
    """Hold a claim while the block runs.

    Args:
        store: The store whose users exclude each other.
        name: Name of the claim: a file name.
        wait: Whether to wait until other holders are done. Otherwise a living holder ends this call, which may take the
            seconds between two of its signs of life, and a dead one is waited out.
        say: Takes a line for people when there is somebody to wait for.

    Raises:
        Held: another process holds the claim, and `wait` is False.
        ValueError: the package that a bucket needs is not installed.
    """
    folder = f"claims/{name}"
    with ExitStack() as stack:
        # The lock first: of the processes of one machine only one looks at the turns at all.
        lock = stack.enter_context(_locked(store, name, wait, say))
        number, turn = _next(store, folder, lock, wait, say)
        claim = Claim(store, folder, number, turn)
        stack.enter_context(claim.beating())
        yield claim


def is_held(store: Store, name: str) -> bool:
    """Return whether a process holds a claim, or may hold it: that of another machine may have died."""
    lock = _lock_path(store, name)
    if files.is_locked(lock):
        return True
    turn = _newest(store, f"claims/{name}").turn
    # Of this machine's processes the lock, which is free, has said that they are dead.
    return turn is not None and turn.lock.partition(":")[0] != files.kernel()


@contextmanager
def _locked(store: Store, name: str, wait: bool, say: Say) -> Iterator[str]:
    """Hold the lock by which the processes of this machine exclude each other; yield its name, empty if there are no locks."""
    path = _lock_path(store, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The lock file is never removed: a process that waits for it would lock a file that others no longer see.
    with ExitStack() as stack:
        # Entered by hand, so that an error of the caller's block is not taken for one of the lock.
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
        status = path.stat()
        # A lock excludes those only who have the same kernel and the same file.
        yield f"{files.kernel()}:{status.st_dev}:{status.st_ino}"


def _lock_path(store: Store, name: str) -> Path:
    if store.is_local:
        return store.on_disk("claims", f"{name}.lock")
    # A bucket has no locks: processes of this machine share a file of their own for each ROOT.
    return cache_root() / "claims" / f"{hashlib.sha256(store.root.encode()).hexdigest()[:16]}-{name}.lock"


def _next(store: Store, folder: str, lock: str, wait: bool, say: Say) -> tuple[int, _Turn]:
    """Create the next turn as soon as the newest one has ended, or its holder is dead."""
    # The id is what `_is_mine` compares: user, machine and process number may come again.
    mine = _Turn(id=uuid.uuid4().hex, who=_who(), lock=lock)
    seen, looks = _Newest(0, None, ""), 0
    while True:
        newest = _newest(store, folder)
        # Own looks at an unchanged turn and counter: no clock is read.
        looks = looks + 1 if newest == seen else 0
        # This process has the lock that the holder has to have.
        is_dead = newest.turn is not None and lock != "" and newest.turn.lock == lock
        if newest.turn is not None and not is_dead and looks < LOOKS:
            if newest[:2] != seen[:2]:
                say(f"waits for {newest.turn.who}")
            elif looks == 0 and not wait:  # its counter has moved
                raise Held(newest.turn.who)
            seen = newest
            time.sleep(LOOK_S)
            continue
        if newest.turn is not None:
            why = "has died" if is_dead else f"has given no sign of life in {LOOKS * LOOK_S:.0f} s"
            say(f"{newest.turn.who} {why}: its work is taken over")
        seen = _Newest(0, None, "")
        if (number := _take(store, folder, newest, mine)) is not None:
            return number, mine


def _take(store: Store, folder: str, past: _Newest, mine: _Turn) -> int | None:
    """Create the turn after `past` and remove those before it; return its number, or None if another process was faster."""
    number = past.number + 1
    # The one step that excludes: of several that create this turn, the store lets one through.
    if not store.create_json(_file(folder, number), mine.model_dump()):
        return None
    # What was seen before the creation may be old: this process was stopped since, or a client of NFS had kept a listing, which
    # the creation has made it read anew. Meanwhile others may have had their turns, and numbers begin again at 1.
    turns = _turns(store, folder)
    as_seen = past.turn is None or _read_turn(store, _file(folder, past.number)) == past.turn
    if max(turns, default=0) != number or not as_seen:
        _remove(store, folder, number)
        return None
    for earlier in turns:
        if earlier != number:
            _remove(store, folder, earlier)
    return number


def _file(folder: str, number: int, kind: str = "json") -> str:
    return f"{folder}/{number:06d}.{kind}"


def _remove(store: Store, folder: str, number: int) -> None:
    # The turn before its counter: a counter alone is no turn.
    store.remove(_file(folder, number))
    store.remove(_file(folder, number, "beat"))


def _turns(store: Store, folder: str) -> list[int]:
    # Files of other names, such as half-written ones, are no turns.
    names = (name.removesuffix(".json") for name in store.list(folder) if name.endswith(".json"))
    return [int(name) for name in names if name.isascii() and name.isdigit()]


def _newest(store: Store, folder: str) -> _Newest:
    while number := max(_turns(store, folder), default=0):
        turn = _read_turn(store, _file(folder, number))
        # None: it has ended since it was listed, so what is there now is listed again.
        if turn is not None:
            return _Newest(number, turn, _read_beat(store, _file(folder, number, "beat")))
    return _Newest(0, None, "")


def _read_turn(store: Store, path: str) -> _Turn | None:
    """Return a turn; None if there is none."""
    try:
        return saved.checked(store.read_json(path), _Turn, path)
    except FileNotFoundError:
        return None
    except (StoreError, saved.SavedError):  # not written here; waited for, since it may be a later version's
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
