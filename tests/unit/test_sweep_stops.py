"""Units that are stopped from outside: the note is obeyed where progress is reported, and a stopped unit is settled."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from steerlab.storage.plan import Stage
from steerlab.storage.store import Store
from steerlab.sweeps import results, stops
from steerlab.sweeps.history import History
from steerlab.sweeps.units import Trial, Unit, trial_id

TRAIN = Stage("train", 1, {}, lambda work: None)
FOLDER = "sweeps/a/1"
REQUEST = f"{FOLDER}/units/0001-x.json"


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "root"))


def test_a_note_is_obeyed_with_the_next_progress(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stops, "_READ_EVERY_S", 0.0)
    obey = stops.Obedience(store, REQUEST)
    obey.before(TRAIN)
    obey.during(TRAIN, {"step": 1})
    stops.ask(store, FOLDER, "0002-y", "W&B stopped it")
    obey.during(TRAIN, {"step": 2})
    stops.ask(store, FOLDER, "0001-x", "W&B stopped it")
    with pytest.raises(stops.Stopped, match="W&B stopped it after step 3 of train"):
        obey.during(TRAIN, {"step": 3})
    with pytest.raises(stops.Stopped, match="W&B stopped it during train"):
        obey.during(TRAIN, {"done": 1, "total": 2})
    with pytest.raises(stops.Stopped, match="W&B stopped it before train"):
        stops.Obedience(store, REQUEST).before(TRAIN)  # the note outlives a restart


def test_notes_are_read_once_in_a_while_and_not_where_a_training_is_only_followed(store: Store) -> None:
    obey = stops.Obedience(store, REQUEST)
    obey.before(TRAIN)
    stops.ask(store, FOLDER, "0001-x", "W&B stopped it")
    obey.during(TRAIN, {"step": 1})
    obey._read_s = float("-inf")
    raised: list[str] = []

    def follow() -> None:
        obey.during(TRAIN, {"step": 2})
        raised.append("nothing")

    thread = threading.Thread(target=follow)
    thread.start()
    thread.join()
    assert raised == ["nothing"]


def test_a_stopped_unit_is_settled_and_a_stopped_sweep_is_not(store: Store) -> None:
    history = History(store, FOLDER)
    for number in (1, 2):
        history.suggest(Unit(number, (Trial(trial_id({"lr": number}), {"lr": number}),), (0,)))
        history.add("start", unit=number)
    history.add("stop", unit=1, reason="W&B stopped it after step 3 of train")
    history.add("stop")
    read = History(store, FOLDER)
    assert read.settled == [1] and [unit.number for unit in read.pending] == [2]
    row, other = results.all_rows(read)
    assert (row["status"], row["reason"], row["param.lr"]) == ("stopped", "W&B stopped it after step 3 of train", 1)
    assert other["status"] == "pending" and not results.scored([row], "m")
