"""A byte flipped, a file cut, a file gone: named, refused or made again, and never used."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import stages
import torch
from damage import DAMAGES, files_below, times

from steerlab import patches
from steerlab.guards import saved
from steerlab.job import DataSet, ScaleConfig
from steerlab.patches import EmbeddingPatch
from steerlab.stages.spread.shard_plan import Facts, Planned, WorkFolder, planned
from steerlab.storage import manifests, plan
from steerlab.storage.plan import Stage
from steerlab.storage.store import Store, StoreError
from steerlab.storage.whole import size_and_sha256
from steerlab.tracking import spool

Damage = Callable[[Path, random.Random], None]
every = pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)


@pytest.fixture(autouse=True)
def _another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget what this process has compared, as a process that reads an artifact for the first time has."""
    monkeypatch.setattr(manifests, "_verified", {})


def made(root: str, chance: random.Random) -> tuple[Store, Stage]:
    """A store with the artifact of a stage: files of some sizes, one of them empty, one in a folder."""
    store = Store.open(root)
    contents = {"a.bin": chance.randbytes(5000), "deep/b.json": b'{"x": 1}', "empty": b""}

    def fill(directory: Path) -> None:
        for name, content in contents.items():
            (directory / name).parent.mkdir(exist_ok=True)
            (directory / name).write_bytes(content)

    stage = stages.stage("make", chance.random(), fill=fill)
    stages.made(store, stage)
    return store, stage


@every
@times(5)
def test_a_file_of_an_artifact(damage: Damage, number: int, chance: random.Random, tmp_path: Path) -> None:
    """On a local ROOT: refused by every reader, with what to do; made again after that was done."""
    store, stage = made(str(tmp_path), chance)
    directory = Path(store.path("make", stage.key))
    victim = chance.choice([path for path in files_below(directory) if path.name != "manifest.json" and path.stat().st_size])
    damage(victim, chance)
    manifests._verified.clear()
    with pytest.raises(StoreError, match=rf"{directory} is damaged: .*; remove the directory and it is made again") as said:
        store.local("make", stage.key)
    assert victim.name in str(said.value) and "\n" not in str(said.value)
    for path in sorted(directory.rglob("*"), reverse=True):
        path.unlink() if path.is_file() else path.rmdir()
    directory.rmdir()
    plan.run([stage], store, ScaleConfig(), plan.Listener(), [])
    assert (store.local("make", stage.key) / "deep/b.json").read_bytes() == b'{"x": 1}'


@every
@times(5)
def test_a_manifest(damage: Damage, number: int, chance: random.Random, tmp_path: Path) -> None:
    """Damaged, it is no cached stage: `plan` names it, a run refuses it; gone, the stage is computed again."""
    store, stage = made(str(tmp_path), chance)
    path = Path(store.path("make", stage.key)) / "manifest.json"
    before = json.loads(path.read_text())
    damage(path, chance)
    (record,) = plan.status([stage], store)
    records: list[plan.Record] = []
    if not path.exists():
        assert record.status == "to run"
        plan.run([stage], store, ScaleConfig(), plan.Listener(), records)
        assert records[0].status == "ran"
        return
    try:  # a flipped bit may turn one kind of white space into another, or a digit of a number into an equal one
        same = json.loads(path.read_bytes()) == before
    except ValueError:
        same = False
    assert record.status == ("cached" if same else "damaged")
    if not same:
        assert record.damage.endswith("; remove the directory and it is made again") and "manifest.json" in record.damage
        with pytest.raises(StoreError, match=r"manifest\.json .*; remove the directory and it is made again"):
            plan.run([stage], store, ScaleConfig(), plan.Listener(), records)
        with pytest.raises(StoreError, match=r"manifest\.json"):
            store.local("make", stage.key)


@every
@times(5)
def test_a_copy_in_the_cache_of_a_node(
    damage: Damage, number: int, chance: random.Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The artifact in the bucket is whole, so it is downloaded again, with a line."""
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))
    store, stage = made("mock:///bucket/root", chance)
    copy = store.local("make", stage.key)
    whole = {path: path.read_bytes() for path in files_below(copy)}
    victim = chance.choice([path for path, content in whole.items() if content])
    damage(victim, chance)
    manifests._verified.clear()
    with pytest.warns(UserWarning, match=rf"{victim.name} .*; it is downloaded again"):
        again = store.local("make", stage.key)
    assert {path: path.read_bytes() for path in files_below(again)} == whole
    assert not list((tmp_path / "cache" / "tmp").iterdir())


class Lines(Facts):
    """Facts of a part, as a maker returns them."""

    rows: int


@every
@times(5)
def test_the_parts_of_a_stage_that_was_killed(damage: Damage, number: int, chance: random.Random, tmp_path: Path) -> None:
    """Part, record, texts and plan: what is not as it was written counts as missing, and is made again."""
    texts = [json.dumps([{"text": f"{chance.random()}"}]) for _ in range(3)]
    folder = WorkFolder(str(tmp_path), "extract", "k")
    entries = []
    for n, text in enumerate(texts):
        folder.write_texts(n, text)
        entries.append(
            Planned(number=n, first=n, rows=1, sha256=size_and_sha256(tmp_path / f"work/extract/k/plan/{n:05d}.json")["sha256"])
        )
    folder.plan = entries

    def make(path: Path) -> Lines:
        path.write_bytes(chance.randbytes(3000))
        return Lines(path=path.name, **size_and_sha256(path), rows=7)

    for entry in entries:
        folder.keep(entry, ".bin", make)
    whole = {entry.number: folder.done(entry, verify=True) for entry in entries}
    assert all(whole.values())
    victim = chance.choice(files_below(tmp_path / "work"))
    damage(victim, chance)
    kind = victim.parent.name
    again = WorkFolder(str(tmp_path), "extract", "k")
    left = {entry.number: again.done(entry, verify=True) for entry in entries}
    if kind in ("parts", "done"):
        n = int(victim.stem.removeprefix("part-"))
        # A flipped bit between two values of JSON changes nothing.
        assert left[n] is None or (kind == "done" and left[n] == whole[n])
        assert {i: row for i, row in left.items() if i != n} == {i: row for i, row in whole.items() if i != n}
    elif kind == "plan":
        with pytest.raises(ValueError, match=r"the texts of shard \d in .* are (damaged|missing); run the same command again"):
            again.shard(entries[int(victim.stem)])
    else:
        assert again.plan in (None, entries)
    if any(row is None for row in left.values()) or again.plan is None:
        (tmp_path / "out").mkdir()
        with pytest.raises(ValueError, match=r"damaged or missing; run the same command again to recompute it"):
            again.copy_parts(tmp_path / "out")


def test_texts_that_are_no_text_any_more_are_planned_again(tmp_path: Path) -> None:
    """Of the flipped bits, an eighth make bytes that no UTF-8 text has; those are damaged texts like others."""
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": f"row {n}"}) + "\n" for n in range(4)))
    data = DataSet.model_validate({"source": str(tmp_path / "rows.jsonl"), "format": "text"})
    folder = WorkFolder(str(tmp_path), "extract", "k")
    entries = planned(folder, data, 2)
    victim = tmp_path / "work/extract/k/plan/00001.json"
    whole = victim.read_bytes()
    victim.write_bytes(b"\xff" + whole[1:])
    with pytest.raises(ValueError, match=r"the texts of shard 1 in .* are damaged; run the same command again"):
        WorkFolder(str(tmp_path), "extract", "k").shard(entries[1])
    assert planned(WorkFolder(str(tmp_path), "extract", "k"), data, 2) == entries and victim.read_bytes() == whole


@every
@times(5)
def test_a_patch(damage: Damage, number: int, chance: random.Random, tmp_path: Path) -> None:
    """A patch that was saved or exported; nobody has a manifest of it."""
    patch = EmbeddingPatch(16, 0.5, shift=True)
    patches.save(patch, tmp_path, "model")
    before = json.loads((tmp_path / "patch.json").read_text())
    damage(chance.choice(files_below(tmp_path)), chance)
    try:
        loaded = patches.load(tmp_path)
    except FileNotFoundError as error:
        assert "patch.json" in str(error)
    except ValueError as error:
        assert str(tmp_path) in str(error) and "\n" not in str(error)
    else:
        assert json.loads((tmp_path / "patch.json").read_text()) == before
        assert all(torch.equal(loaded.tensors()[name], tensor) for name, tensor in patch.tensors().items())


@every
@times(5)
def test_a_spool(damage: Damage, number: int, chance: random.Random, tmp_path: Path) -> None:
    """The lines that go to W&B: a changed one is named; those after a cut are missing, and none has another value."""
    made_ = spool.Spool(tmp_path, {"mode": "offline"})
    for step in range(1, 21):
        made_.append({"kind": "log", "axis": "train/step", "data": {"train/step": step, "train/loss": chance.random()}})
    made_.close()
    path = tmp_path / spool.EVENTS
    whole = list(spool.read(path))
    damage(path, chance)
    if not path.exists():
        assert list(spool.read(path)) == []
        return
    try:
        left = list(spool.read(path))
    except saved.SavedError as error:
        assert str(error).startswith(f"{path} line ") and "remove the folder" in str(error) and "\n" not in str(error)
    else:
        assert left == whole[: len(left)]


class Server:
    """A run of W&B's client whose server has lines already."""

    offline = False

    def __init__(self, lines: list[dict[str, float]]) -> None:
        self.lines = lines
        self.starting_step = len(lines)

    @property
    def summary(self) -> dict[str, float]:
        return self.lines[-1] if self.lines else {}

    def define_metric(self, *names: str, **how: str) -> None:
        pass

    def log(self, data: dict[str, float], step: int, commit: bool) -> None:
        assert step == len(self.lines), "W&B refuses a step that it has, and leaves gaps for one beyond"
        self.lines.append(data)


@times(5)
def test_a_spool_that_was_cut_loses_no_later_line(number: int, chance: random.Random, tmp_path: Path) -> None:
    """The server has more lines than the file: those of the next process follow them, once each."""
    from steerlab.tracking.run_history import History

    server = Server([])

    def process(first: int, last: int, *, is_cut: bool) -> None:
        lines = spool.Spool(tmp_path, {"mode": "online"})
        for step in range(first, last + 1):
            lines.append({"kind": "log", "axis": "train/step", "data": {"train/step": step}})
            if step == first:  # the writer begins while the process does
                server.starting_step = len(server.lines)
                history = History(server, tmp_path)  # type: ignore[arg-type]
        lines.close()
        assert history.send(lambda: True) == 1
        if is_cut:
            content = (tmp_path / spool.EVENTS).read_bytes()
            (tmp_path / spool.EVENTS).write_bytes(content[: chance.randrange(len(content))])

    end = chance.randrange(10, 20)
    process(1, end, is_cut=True)
    kept = len([event for event in spool.read(tmp_path / spool.EVENTS) if event["kind"] == "log"])
    process(kept + 1 if chance.random() < 0.5 else end + 1, 30, is_cut=chance.random() < 0.5)
    process(31, 40, is_cut=False)
    assert [line["train/step"] for line in server.lines] == list(range(1, 41))
