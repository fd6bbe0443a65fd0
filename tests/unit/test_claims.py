"""Claims: one holder at a time among processes of any machines, whatever their clocks say."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import s3_server

from steerlab.storage import claims, exclusive
from steerlab.storage.store import Store, StoreError

NAME = "train-" + "k" * 64
TURN = {"id": "x", "who": "ann@elsewhere, process 7", "lock": "another machine"}


@pytest.fixture(scope="module")
def server() -> Iterator[s3_server.Server]:
    with s3_server.running() as running:
        yield running


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: s3_server.Server) -> Store:
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))
    return Store.open(str(tmp_path / "root") if request.param == "local" else server.root(tmp_path.name))


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], None]], None]:
    """Set what happens between two looks, which then take no time; three of them make a claim free."""
    monkeypatch.setattr(claims, "LOOKS", 3)

    def set_(between: Callable[[], None]) -> None:
        monkeypatch.setattr(claims.time, "sleep", lambda s: between())

    return set_


def test_of_many_writers_one_creates_the_file(store: Store) -> None:
    made: list[int] = []
    barrier = threading.Barrier(8)

    def write(number: int) -> None:
        barrier.wait()
        if store.create_json("claims/a/1.json", number):
            made.append(number)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [store.read_json("claims/a/1.json")] == made
    assert store.list("claims/a") == ["1.json"]


def test_a_claim_leaves_nothing_and_can_be_held_again(store: Store) -> None:
    for _ in range(2):
        with claims.hold(store, NAME, wait=False) as claim:
            claim.check()
            assert store.list(f"claims/{NAME}") == ["000001.json"]
        assert store.list(f"claims/{NAME}") == []


def test_a_holder_of_this_machine_is_named_and_not_waited_for(store: Store) -> None:
    with (
        claims.hold(store, NAME, wait=False),
        pytest.raises(claims.Held, match=f"process {os.getpid()}$"),
        claims.hold(store, NAME, wait=False),
    ):
        pass


def test_a_holder_elsewhere_that_lives_is_waited_for_and_named(store: Store, looks: Any) -> None:
    store.write_json(f"claims/{NAME}/000001.json", TURN)
    counts, lines = iter(range(50)), []

    def between() -> None:
        count = next(counts)
        store.write_text(f"claims/{NAME}/000001.beat", str(count))
        if count == 20:  # it ends, after many more looks than a dead one gets
            store.remove(f"claims/{NAME}/000001.json")

    looks(between)
    with claims.hold(store, NAME, wait=True, say=lines.append):
        assert next(counts) == 21
    assert lines == ["waits for ann@elsewhere, process 7"]
    store.write_json(f"claims/{NAME}/000001.json", TURN)
    with pytest.raises(claims.Held, match="ann@elsewhere"), claims.hold(store, NAME, wait=False):
        pass


@pytest.mark.parametrize("hours", [-25, 0, 25])
def test_a_holder_elsewhere_that_is_dead_is_followed_whatever_the_clocks_say(
    store: Store, looks: Any, monkeypatch: pytest.MonkeyPatch, hours: float
) -> None:
    store.write_json(f"claims/{NAME}/000004.json", TURN)
    store.write_text(f"claims/{NAME}/000004.beat", "12")
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + hours * 3600)
    number, lines = [0], []

    def between() -> None:
        number[0] += 1

    looks(between)
    with claims.hold(store, NAME, wait=True, say=lines.append):
        assert store.list(f"claims/{NAME}") == ["000005.json"]
    assert number[0] == claims.LOOKS
    assert lines[1].startswith("ann@elsewhere, process 7 has shown no sign of life for")


def test_a_process_of_this_machine_that_died_is_followed_at_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    code = f"""
import os, signal
from steerlab.storage import claims
from steerlab.storage.store import Store
with claims.hold(Store({store.root!r}), {NAME!r}, wait=True):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == -9
    assert store.list(f"claims/{NAME}") == ["000001.json"]
    monkeypatch.setattr(claims.time, "sleep", lambda s: pytest.fail("waited for a dead process"))
    with claims.hold(store, NAME, wait=False):
        assert store.list(f"claims/{NAME}") == ["000002.json"]


def test_a_holder_that_was_stopped_for_too_long_notices_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.01)
    with claims.hold(store, NAME, wait=True) as claim:
        claim.check()
        # As another process does that takes it over.
        store.write_json(f"claims/{NAME}/000002.json", TURN)
        store.remove(f"claims/{NAME}/000001.json")
        with pytest.raises(claims.Lost, match="another process has taken over"):
            claim.check()
        assert claim.lost
    assert "000002.json" in store.list(f"claims/{NAME}"), "the claim of the other one stays"


def test_the_counter_of_a_holder_goes_on(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "BEAT_S", 0.01)
    with claims.hold(store, NAME, wait=True):
        seen = set[str]()
        end_s = time.monotonic() + 60
        while len(seen) < 3 and time.monotonic() < end_s:
            if "000001.beat" in store.list(f"claims/{NAME}"):
                seen.add(store.read_text(f"claims/{NAME}/000001.beat"))
    assert len(seen) >= 3


def test_file_systems_without_locks_and_damaged_turns_are_waited_out(
    store: Store, looks: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *, wait: bool = True) -> Any:
        raise OSError(37, "No locks available")

    monkeypatch.setattr(claims.files, "locked", refuse)
    store.write_text(f"claims/{NAME}/000001.json", "{")
    lines: list[str] = []
    looks(lambda: None)
    with claims.hold(store, NAME, wait=True, say=lines.append):
        assert store.list(f"claims/{NAME}") == ["000002.json"]
    assert lines[0] == "waits for a process that left no name"


def test_a_bucket_whose_package_is_missing_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exclusive, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the package gcsfs, .*: pip install 'steerlab\[gs\]'"):
        exclusive.check("gs://bucket/x")
    exclusive.check("/a/folder")


class Killed(BaseException):
    """Ends a thread as SIGKILL ends a process."""


class Switched:
    """A store in memory in which one of several threads does its next operation at a time, chosen at random.

    As with a client of NFS, a thread may be shown an old listing, but not after it has made a file. Now and then the thread
    that is chosen is killed instead.
    """

    def __init__(self, seed: int) -> None:
        self.files: dict[str, Any] = {}
        self.inside: set[int] = set()
        """Threads that hold the claim."""
        self.held = 0
        self._random, self._ticks = random.Random(seed), 0
        self._changed = threading.Condition()
        self._kept: dict[int, list[str]] = {}
        self._waiting: set[int] = set()
        self._threads: set[int] = set()
        self._next: int | None = None

    def run(self, *threads: Callable[[], None]) -> None:
        """Run the threads to their ends."""

        def whole(work: Callable[[], None]) -> None:
            try:
                self.step()
                work()
            except Killed:
                pass
            finally:
                with self._changed:
                    self._threads.discard(threading.get_ident())
                    self._changed.notify_all()

        started = [threading.Thread(target=whole, args=(work,), daemon=True) for work in threads]
        with self._changed:
            for thread in started:
                thread.start()
                assert thread.ident is not None
                self._threads.add(thread.ident)
            while self._threads:
                assert self._changed.wait_for(lambda: self._next is None and self._waiting == self._threads, timeout=60)
                if self._threads:
                    self._next = self._random.choice(sorted(self._waiting))
                    self._changed.notify_all()

    def step(self) -> None:
        """Wait for this thread's next turn."""
        me = threading.get_ident()
        with self._changed:
            if me not in self._threads:
                raise Killed
            self._waiting.add(me)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._next == me)
            self._waiting.remove(me)
            self._next = None
            self._ticks += 1
            if self._random.random() < 0.01:
                self._threads.remove(me)
                self.inside.discard(me)
                raise Killed

    def create_json(self, path: str, content: Any) -> bool:
        self.step()
        self._kept.pop(threading.get_ident(), None)
        return path not in self.files and self.files.setdefault(path, content) is content

    def list(self, folder: str) -> list[str]:
        self.step()
        me = threading.get_ident()
        if me not in self._kept or self._random.random() < 0.5:
            self._kept[me] = sorted(path.removeprefix(f"{folder}/") for path in self.files)
        return self._kept[me]

    def read_json(self, path: str) -> Any:
        self.step()
        if path not in self.files:
            raise FileNotFoundError
        return self.files[path]

    def read_text(self, path: str) -> str:
        self.step()
        turn = self.files.get(path.replace(".beat", ".json"))
        if turn is None:
            raise StoreError("gone")
        # A living holder's counter is another one at each look.
        return str(self._ticks) if int(turn["who"]) in self._threads else ""

    def remove(self, path: str) -> None:
        self.step()
        self.files.pop(path, None)


@pytest.mark.parametrize("start", range(4))
def test_two_never_hold_a_claim_in_whatever_order_their_steps_come(start: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contenders that hold a claim again and again, in 50 random orders of their single steps, with kills and old listings."""
    monkeypatch.setattr(claims.time, "sleep", lambda s: None)
    monkeypatch.setattr(claims, "LOOKS", 2)
    monkeypatch.setattr(claims.Claim, "_beat", lambda self: None)
    monkeypatch.setattr(claims, "_who", lambda: str(threading.get_ident()))

    @contextmanager
    def no_lock(*_: object) -> Iterator[str]:
        yield ""

    monkeypatch.setattr(claims, "_locked", no_lock)
    held = 0
    for seed in range(start * 50, start * 50 + 50):
        store = Switched(seed)
        store.run(*[partial(_hold_often, store)] * 5)
        held += store.held
    assert held > 500


def _hold_often(store: Any) -> None:
    for _ in range(4):
        with claims.hold(store, "a", wait=True):
            store.inside.add(threading.get_ident())
            store.held += 1
            assert len(store.inside) == 1
            store.step()
            store.inside.remove(threading.get_ident())
