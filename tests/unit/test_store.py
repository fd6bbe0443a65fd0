"""The artifact store: whole or absent, on a local disk and on a filesystem without renames."""

import errno
import json
import os
import pickle
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3_server

from steerlab.cli import opening
from steerlab.data.sources import remote
from steerlab.storage import copies, parted
from steerlab.storage.store import Store, StoreError

KEY = "k" * 64


@pytest.fixture(scope="module")
def server() -> Iterator[s3_server.Server]:
    with s3_server.running() as running:
        yield running


@pytest.fixture(params=["local", "objects", "s3", "fsspec"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: s3_server.Server) -> Store:
    """A store on the disk, on pyarrow's filesystem in memory, on an S3 server whose address is in the URI, and by fsspec."""
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))
    roots = {
        "local": str(tmp_path / "root"),
        "objects": "mock:///bucket/root",
        "s3": server.root(tmp_path.name),
        "fsspec": f"memory://bucket/{tmp_path.name}",
    }
    return Store.open(roots[request.param])


@pytest.fixture
def local(tmp_path: Path) -> Store:
    return Store.open(str(tmp_path / "root"))


def _commit(store: Store, text: str = "hello", meta: dict[str, Any] | None = None) -> None:
    with store.temporary("train", KEY) as directory:
        (directory / "deep").mkdir()
        (directory / "deep" / "a.txt").write_text(text)
        (directory / "empty").touch()
        store.commit("train", KEY, directory, meta or {})


def test_commit_is_read_back_whole(store: Store) -> None:
    assert not store.has("train", KEY)
    _commit(store, meta={"lr": 0.1})
    assert store.has("train", KEY)
    assert (store.local("train", KEY) / "deep" / "a.txt").read_text() == "hello"
    manifest = store.manifest("train", KEY)
    sha256 = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"
    xxh3 = "b5e9c1ad071b3e7fc779cfaa5e523818"
    assert manifest["files"][0] == {"path": "deep/a.txt", "bytes": 5, "sha256": sha256, "xxh3": xxh3}
    assert (manifest["stage"], manifest["key"], manifest["meta"], manifest["schema"]) == ("train", KEY, {"lr": 0.1}, 2)
    assert store.list("artifacts/train") == [KEY]


def test_nothing_temporary_is_left(store: Store, tmp_path: Path) -> None:
    _commit(store)
    store.local("train", KEY)
    assert [list((tmp_path / place).glob("tmp/*")) for place in ("root", "cache")] == [[], []]


def test_exception_leaves_nothing(store: Store, tmp_path: Path) -> None:
    with pytest.raises(KeyError), store.temporary("train", KEY) as directory:
        (directory / "x").touch()
        raise KeyError
    assert not directory.exists()
    assert not store.has("train", KEY)


def test_first_commit_wins(store: Store) -> None:
    _commit(store, "first")
    _commit(store, "second")
    assert (store.local("train", KEY) / "deep" / "a.txt").read_text() == "first"


def test_faster_process_wins_between_check_and_rename(local: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    _commit(local, "first")
    answers = iter([False])  # the first look came before the other process's rename
    has = local.has
    monkeypatch.setattr(local, "has", lambda stage, key: next(answers, None) is not False and has(stage, key))
    _commit(local, "second")
    assert (local.local("train", KEY) / "deep" / "a.txt").read_text() == "first"
    assert local.list("tmp") == []


def test_many_threads_commit_one_artifact(local: Store) -> None:
    threads = [threading.Thread(target=_commit, args=(local, f"{i}")) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert local.manifest("train", KEY)["files"][0]["bytes"] == 1
    assert (local.local("train", KEY) / "deep" / "a.txt").read_text() in "01234567"
    assert local.list("tmp") == []


def test_directory_without_manifest_does_not_count_and_is_replaced(local: Store) -> None:
    _commit(local, "old")
    Path(local.path("train", KEY), "manifest.json").unlink()
    assert not local.has("train", KEY)
    with pytest.raises(StoreError, match="there is no artifact train/kkk"):
        local.local("train", KEY)
    _commit(local, "new")
    assert (local.local("train", KEY) / "deep" / "a.txt").read_text() == "new"


def test_directory_from_elsewhere_is_copied(store: Store, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "x").write_text("1")
    store.commit("train", KEY, outside, {})
    assert (store.local("train", KEY) / "x").read_text() == "1"
    assert [path.name for path in outside.iterdir()] == ["x"]


def test_artifacts_have_the_permissions_that_the_umask_gives(local: Store, tmp_path: Path) -> None:
    _commit(local)
    (tmp_path / "plain").mkdir()
    assert Path(local.path("train", KEY)).stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize(("damage", "message"), [("", "has 0 bytes, its manifest has 5"), (None, r"deep/a.txt is missing")])
def test_damaged_artifact_is_noticed(store: Store, damage: str | None, message: str) -> None:
    _commit(store)
    path = store.local("train", KEY) / "deep" / "a.txt"
    path.unlink() if damage is None else path.write_text(damage)
    if not store.is_local:  # a copy in the cache, which the artifact in the bucket replaces
        with pytest.warns(UserWarning, match=f"{message}.*; it is downloaded again"):
            assert (store.local("train", KEY) / "deep" / "a.txt").read_text() == "hello"
        return
    with pytest.raises(StoreError, match=f"{message}.*; remove the directory and it is made again"):
        store.local("train", KEY)


def test_download_compares_sums(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))
    store = Store("mock:///bucket")
    _commit(store)
    with store._fs.open_output_stream(f"{store.path('train', KEY)}/deep/a.txt") as stream:
        stream.write(b"jello")
    with pytest.raises(StoreError, match=r"a\.txt has changed since it was written"):
        store.local("train", KEY)
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert left == [f"{KEY}.lock"]


@pytest.mark.parametrize("moment", ["filling", "committed"])
def test_killed_process_leaves_the_whole_or_nothing(local: Store, moment: str) -> None:
    code = f"""
import os, signal
from steerlab.storage.store import Store
store = Store({local.root!r})
with store.temporary("train", {KEY!r}) as directory:
    (directory / "x").write_text("1")
    if {moment == "committed"}:
        store.commit("train", {KEY!r}, directory, {{}})
    os.kill(os.getpid(), signal.SIGKILL)
"""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env, check=False).returncode == -9
    assert local.has("train", KEY) == (moment == "committed")
    directories = [path for path in Path(local.root, "tmp").iterdir() if path.is_dir()]
    assert len(directories) == (moment == "filling")
    assert local.sweep_temporary() == (moment == "filling")
    assert [name for name in local.list("tmp") if not name.endswith(".lock")] == []


SWEEP = """
import sys, time
clock = time.time
time.time = lambda: clock() + 25 * 3600
from steerlab.storage.store import Store
store = Store(sys.argv[1])
store.sweep_temporary_of("train", sys.argv[2]) if len(sys.argv) > 2 else print(store.sweep_temporary())
"""


def test_a_clock_ahead_removes_no_directory_of_a_living_process(local: Store) -> None:
    """Nor do files that look as old as can be."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    with local.temporary("train", KEY) as directory:
        (directory / "x").touch()
        for path in (directory, directory / "x"):
            os.utime(path, (0, 0))
        for arguments in ([], [KEY]):
            swept = subprocess.run(
                [sys.executable, "-c", SWEEP, local.root, *arguments], env=env, capture_output=True, text=True
            )
            assert (swept.stdout, swept.returncode) == ("0\n" if not arguments else "", 0), swept.stderr
        assert (directory / "x").exists()
    assert local.list("tmp") == []


def test_directories_of_another_machine_are_removed_by_the_holder_of_their_claim_alone(local: Store) -> None:
    left = Path(local.root, "tmp", f"train-{KEY[:12]}-0123456789ab")
    left.mkdir()
    Path(f"{left}.lock").write_text("the kernel of another machine")
    assert local.sweep_temporary() == 0
    local.sweep_temporary_of("train", "a" * 64)
    assert left.exists()
    local.sweep_temporary_of("train", KEY)
    assert local.list("tmp") == []


def test_full_disk_is_one_line_with_bytes(store: Store) -> None:
    expected = r"^no space left for artifact train/kkk.*: [\d,]+ bytes free; make room and run the same command again$"
    with pytest.raises(StoreError, match=expected), store.temporary("train", KEY):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not store.has("train", KEY)


def test_other_errors_pass_as_they_are(store: Store) -> None:
    with pytest.raises(FileNotFoundError), store.temporary("train", KEY):
        Path("/no/such/file").read_text()


# Work


def test_work_survives_and_is_discarded(store: Store) -> None:
    work = store.work("train", KEY)
    assert work == (str(store.on_disk("work", "train", KEY)) if store.is_local else store.where("work", "train", KEY))
    store.write_json(f"work/train/{KEY}/step.json", 3)
    assert store.work("train", KEY) == work
    assert store.read_json(f"work/train/{KEY}/step.json") == 3
    store.discard_work("train", KEY)
    store.discard_work("train", KEY)
    assert store.list(f"work/train/{KEY}") == []


@pytest.mark.parametrize(
    ("root", "expected"),
    [
        ("s3://b/p/?scheme=http", "s3://b/p/work/k?scheme=http"),
        ("s3://b?region=a&endpoint_override=h:1", "s3://b/work/k?region=a&endpoint_override=h:1"),
        ("s3://KEY:a%2Fb@b/p", "s3://KEY:a%2Fb@b/p/work/k"),
        ("abfs://container@account/x", "abfs://container@account/x/work/k"),
        ("file:///a%20b/", "file:///a%20b/work/k"),
        ("/a/b?c/", "/a/b?c/work/k"),
    ],
)
def test_a_folder_below_root_comes_before_the_options_of_a_uri(root: str, expected: str) -> None:
    assert remote.joined(root, "work", "k") == remote.joined(remote.joined(root), "work/k") == expected
    # What a run prints as its folder leads back to ROOT.
    assert opening.split(remote.joined(root, "runs/a/1")) == (remote.joined(root), "runs/a/1")


def test_one_root_has_one_name_however_it_ends(server: s3_server.Server) -> None:
    assert Store(server.root("x/")).root == Store(server.root("x")).root


def test_a_scheme_whose_package_is_missing_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paramiko", None)
    with pytest.raises(ValueError, match=r"ROOT 'sftp://host/x' needs the package paramiko: pip install paramiko"):
        Store("sftp://host/x")


# Records


def test_json_is_replaced_in_one_step(store: Store) -> None:
    store.write_json("runs/a/summary.json", {"x": 1})
    store.write_json("runs/a/summary.json", {"x": "ä"})
    assert store.read_json("runs/a/summary.json") == {"x": "ä"}
    assert store.list("runs/a") == ["summary.json"]


def test_json_that_cannot_be_written_leaves_the_old(store: Store) -> None:
    store.write_json("a.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        store.write_json("a.json", float("nan"))
    assert store.read_json("a.json") == 1


def test_lines_are_appended(store: Store) -> None:
    assert store.read_lines("runs/a/metrics.jsonl") == []
    for step in range(3):
        store.append_line("runs/a/metrics.jsonl", {"step": step})
    assert store.read_lines("runs/a/metrics.jsonl") == [{"step": 0}, {"step": 1}, {"step": 2}]


def test_half_a_line_swallows_no_other(local: Store) -> None:
    local.append_line("m.jsonl", {"step": 0})
    with Path(local.root, "m.jsonl").open("a") as file:
        file.write('{"step": 1, "lo')
    local.append_line("m.jsonl", {"step": 2})
    assert local.read_lines("m.jsonl") == [{"step": 0}, {"step": 2}]


def test_broken_json_is_named(local: Store) -> None:
    Path(local.root, "a.json").write_text("{")
    with pytest.raises(StoreError, match=r"a.json is not JSON"):
        local.read_json("a.json")


def test_list_of_an_absent_directory_is_empty(store: Store) -> None:
    assert store.list("runs/nothing") == []


def test_copies_of_a_node_stay_within_a_size_and_those_in_use_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four artifacts of 1 MB where 2.5 MB are allowed: the two used longest ago go, unless a process uses them."""
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(copies, "_pins", OrderedDict())
    store, paths = Store("mock:///bucket"), {}

    def use(key: str, *, keep: bool = False) -> Path:
        if not store.has("train", key):
            with store.temporary("train", key) as directory:
                (directory / "x").write_bytes(bytes(1_000_000))
                store.commit("train", key, directory, {})
        paths[key] = store.local("train", key)
        used_s = len(paths)
        os.utime(copies._lock_of(paths[key]), (used_s, used_s))
        if not keep:  # as when the process ends
            os.close(copies._pins.popitem()[1])
        return paths[key]

    use("a", keep=True)
    for key in "bc":
        use(key)
    monkeypatch.setenv("STEERLAB_CACHE_GB", "0.0025")
    use("d")
    assert [key for key in "abcd" if paths[key].exists()] == ["a", "d"]
    assert (use("b") / "x").stat().st_size == 1_000_000, "it is downloaded again"
    monkeypatch.setenv("STEERLAB_CACHE_GB", "many")
    with pytest.raises(ValueError, match=r"STEERLAB_CACHE_GB is 'many': give the gigabytes"):
        copies.most_bytes()


class Counting:
    """A file system that counts its requests."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.requests = inner, 0

    def __getattr__(self, name: str) -> Any:
        self.requests += name != "type_name"
        return getattr(self.inner, name)


def test_a_line_is_one_request_however_long_the_file(
    server: s3_server.Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parted, "MOST_PARTS", 5)
    store = Store.open(server.root(tmp_path.name))
    store.append_line("m.jsonl", 0)
    counting: Any = Counting(store._fs)
    store._fs = counting
    for number in range(1, 5):
        before = counting.requests
        store.append_lines("m.jsonl", [number, -number])
        assert counting.requests == before + 1
    for number in range(5, 30):
        store.append_line("m.jsonl", number)
    expected = [0, *(sign * number for number in range(1, 5) for sign in (1, -1)), *range(5, 30)]
    assert store.read_lines("m.jsonl") == expected
    assert len(store.list("m.jsonl.parts")) <= 5
    # Another process goes on, and a merge that was killed before it removed the parts doubles nothing.
    other = Store(store.root)
    other.append_line("m.jsonl", 30)
    monkeypatch.setattr(other, "remove", lambda path: None)
    other.merge_lines("m.jsonl")
    assert other.list("m.jsonl.parts")
    assert Store(store.root).read_lines("m.jsonl") == [*expected, 30]
    assert [json.loads(line) for line in other.read_text("m.jsonl").splitlines()] == [*expected, 30]
    Store(store.root).append_line("m.jsonl", 31)
    store.merge_lines("m.jsonl")
    assert Store(store.root).read_lines("m.jsonl") == [*expected, 30, 31]
    assert store.list("m.jsonl.parts") == []


# Opening


@pytest.mark.parametrize("root", ["out", "./out", "~/out", ""])
def test_relative_root_is_refused(root: str) -> None:
    with pytest.raises(ValueError, match="is a relative path: give an absolute path"):
        Store.open(root)


def test_unknown_scheme_is_refused() -> None:
    with pytest.raises(ValueError, match=r"ROOT 'nope://x': nope:// is not read here; known: s3"):
        Store.open("nope://x")


def test_root_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"^ROOT '.*' cannot be written: [^\n]+$"):
        Store.open(str(tmp_path / "file" / "root"))


def test_kinds_of_root(tmp_path: Path) -> None:
    assert Store.open(tmp_path.as_uri()).is_local
    assert (Store(str(tmp_path)).free_bytes() or 0) > 0
    objects = Store("mock:///bucket")
    assert not objects.is_local
    assert objects.free_bytes() is None


def test_store_can_be_sent_to_another_process(local: Store) -> None:
    _commit(local)
    assert pickle.loads(pickle.dumps(local)).has("train", KEY)


def test_manifest_is_plain_json(local: Store) -> None:
    _commit(local)
    assert json.loads(Path(local.path("train", KEY), "manifest.json").read_text())["key"] == KEY


def test_a_reader_sees_the_old_or_the_new_never_a_part(local: Store) -> None:
    """One thread writes a long file again and again; every read in between is one of the two contents."""
    contents = [{"x": [number] * 20_000} for number in (1, 2)]
    local.write_json("a.json", contents[0])
    ended = threading.Event()

    def write() -> None:
        for number in range(60):
            local.write_json("a.json", contents[number % 2])
        ended.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        while not ended.is_set():
            assert local.read_json("a.json") in contents
    finally:
        writer.join()


@pytest.mark.parametrize("at", [0, 1, 2])
def test_an_upload_that_is_cut_short_is_no_artifact(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files first, the manifest last: cut before any of the three writes, nothing is there that counts."""
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))
    store = Store.open("mock:///bucket/root")
    whole, opened = store._fs, []

    class Cut:
        def __getattr__(self, name: str) -> Any:
            return getattr(whole, name)

        def open_output_stream(self, path: str) -> Any:
            opened.append(path)
            if len(opened) > at:
                raise OSError("the connection is gone")
            return whole.open_output_stream(path)

    store._fs = Cut()  # type: ignore[assignment]
    with pytest.raises(OSError, match="the connection is gone"):
        _commit(store)
    assert not store.has("train", KEY)
    store._fs = whole
    _commit(store)
    assert (store.local("train", KEY) / "deep" / "a.txt").read_text() == "hello"
