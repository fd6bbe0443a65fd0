"""Processes that stay: both kinds run the same, keep what they hold, are replaced when they die, and end when they must."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray.cloudpickle
from ray.exceptions import ActorDiedError, WorkerCrashedError

from steerlab.job import ScaleConfig
from steerlab.stages.spread import staying

pytestmark = pytest.mark.ray

HELD = {"num_cpus": 1}
EITHER = pytest.mark.parametrize("warm", [True, pytest.param(False, marks=pytest.mark.slow)])


@pytest.fixture(autouse=True)
def closed() -> Iterator[None]:
    # Workers cannot import a test's module.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    ray.cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    staying.close()


def scale(warm: bool, **settings: Any) -> ScaleConfig:
    return ScaleConfig.model_validate({"warm": warm, **settings})


def counts(tell: staying.Tell, number: int) -> int:
    for one in range(number):
        tell(one)
    return os.getpid()


def dies(tell: staying.Tell, folder: str, times: int) -> str:
    """Die so many times, then return."""
    lives = len(list(Path(folder).iterdir()))
    (Path(folder) / str(lives)).touch()
    tell(lives)
    if lives < times:
        os.kill(os.getpid(), signal.SIGKILL)
    return f"life {lives}"


def fails(tell: staying.Tell) -> None:
    raise ValueError("the rows are wrong")


def waits(tell: staying.Tell, marker: str) -> None:
    """Tell for ever, and leave a marker when that is no longer wanted."""
    try:
        while True:
            tell(os.getpid())
            time.sleep(0.05)
    except BaseException:
        Path(marker).touch()
        raise


@pytest.mark.parametrize("warm", [True, False])
def test_what_is_told_comes_in_order_and_the_process_stays(cluster: None, warm: bool) -> None:
    told: list[Any] = []
    pids = {staying.call(counts, (3,), scale(warm), HELD, told.append, "model a") for _ in range(4)}
    assert told == [0, 1, 2] * 4
    assert os.getpid() not in pids and len(pids) <= (2 if warm else 1), "one for each CPU, or one actor"


def test_an_actor_is_ended_where_another_model_is_needed(cluster: None) -> None:
    """Not so a task's process: it reserves nothing, and lets go of its model by itself (`subject.loaded_once`)."""
    first, second = (staying.call(counts, (0,), scale(False), HELD, print, owner) for owner in ("model a", "model b"))
    assert first != second
    assert gone(first)


@EITHER
def test_a_process_that_dies_is_replaced(cluster: None, tmp_path: Path, warm: bool) -> None:
    told: list[Any] = []
    assert staying.call(dies, (str(tmp_path), 1), scale(warm), HELD, told.append) == "life 1"
    assert told[-1] == 1


@pytest.mark.slow
@EITHER
def test_one_that_dies_too_often_is_not(cluster: None, tmp_path: Path, warm: bool) -> None:
    with pytest.raises((WorkerCrashedError, ActorDiedError)):
        staying.call(dies, (str(tmp_path), 9), scale(warm, max_failures=1), HELD, lambda line: None)
    assert len(list(tmp_path.iterdir())) == 2


@EITHER
def test_an_error_is_raised_as_it_is_and_not_tried_again(cluster: None, warm: bool) -> None:
    with pytest.raises(ValueError, match="the rows are wrong"):
        staying.call(fails, (), scale(warm), HELD, lambda line: None)


@EITHER
def test_who_listens_no_longer_stops_it(cluster: None, tmp_path: Path, warm: bool) -> None:
    """A sweep that stops a trial raises where it is told: what the trial runs has to end, too."""
    pids: list[int] = []

    def told(pid: int) -> None:
        pids.append(pid)
        if len(pids) > 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        staying.call(waits, (str(tmp_path / "marker"),), scale(warm), HELD, told)
    end_s = time.monotonic() + 20
    while not ((tmp_path / "marker").exists() or gone(pids[0])):
        assert time.monotonic() < end_s, "it goes on"
        time.sleep(0.1)


def gone(pid: int) -> bool:
    """Say whether a process has ended, or ends within a few seconds."""
    try:
        psutil.Process(pid).wait(5)
    except psutil.NoSuchProcess:
        return True
    except psutil.TimeoutExpired:
        return False
    return True
