"""Two users of one ROOT: what the first one makes, the second one can read, lock, continue and replace."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from steerlab.guards import files
from steerlab.storage import claims
from steerlab.storage.store import Store

KEY = "k" * 64
GROUP = 4321


def test_what_safetensors_makes_private_is_shared_as_the_umask_says(tmp_path: Path) -> None:
    for umask in (0o022, 0o002, 0o077):
        before = os.umask(umask)
        try:
            store = Store.open(str(tmp_path / f"{umask:o}"))
            with store.temporary("train", KEY) as directory:
                inner = Path(tempfile.mkdtemp(dir=directory))
                save_file({"a": torch.zeros(1)}, inner / "patch.safetensors")
                assert stat.S_IMODE((inner / "patch.safetensors").stat().st_mode) == 0o600
                store.commit("train", KEY, directory, {})
        finally:
            os.umask(before)
        made = store.local("train", KEY)
        modes = {stat.S_IMODE(path.stat().st_mode) for path in made.rglob("*.safetensors")}
        assert modes == {0o666 & ~umask}
        assert {stat.S_IMODE(path.stat().st_mode) for path in (made, made / inner.name)} == {0o777 & ~umask}


def test_a_lock_of_another_user_can_be_held(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, opened = tmp_path / "a.lock", os.open
    path.touch(0o644)

    def refuse(where: Path, flags: int, *mode: int) -> int:
        if flags & os.O_RDWR:
            raise PermissionError(13, "Permission denied")
        return opened(where, flags, *mode)

    monkeypatch.setattr(files.os, "open", refuse)
    with files.locked(path), pytest.raises(BlockingIOError), files.locked(path, wait=False):
        pass


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder of a group, that other users can enter: those of pytest are their owner's."""
    folder = Path(tempfile.mkdtemp(prefix="shared-"))
    os.chown(folder, 0, GROUP)
    folder.chmod(0o2775)
    yield folder / "root"
    shutil.rmtree(folder)


def as_user(uid: int, do: Callable[[], None]) -> None:
    """Do something in a child process as a user of the group, with umask 002."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setgroups([])
            os.setgid(GROUP)
            os.setuid(uid)
            os.umask(0o002)
            do()
            code = 0
        except BaseException as error:
            os.write(2, f"user {uid}: {error!r}\n".encode())
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become two users")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_two_users_write_into_one_root(root: Path) -> None:
    def first() -> None:
        store = Store.open(str(root))
        store.append_line("sweeps/a/1/history.jsonl", {"line": 1})
        with claims.hold(store, "train-a", wait=True), store.temporary("train", KEY) as directory:
            save_file({"a": torch.zeros(1)}, directory / "patch.safetensors")
            store.commit("train", KEY, directory, {})
        store.work("fit", KEY)
        store.write_text(f"work/fit/{KEY}/part", "half")
        left = root / "tmp" / f"fit-{KEY[:12]}-0123456789ab"
        left.mkdir()
        Path(f"{left}.lock").write_text(files.kernel())

    def second() -> None:
        store = Store.open(str(root))
        store.append_line("sweeps/a/1/history.jsonl", {"line": 2})
        assert load_file(store.local("train", KEY) / "patch.safetensors")["a"].tolist() == [0]
        assert store.sweep_temporary() == 1
        with claims.hold(store, "train-a", wait=False), store.temporary("fit", KEY) as directory:
            store.move_from_work("fit", KEY, "", directory)
            store.commit("fit", KEY, directory, {})
        store.discard_work("fit", KEY)

    as_user(12345, first)
    as_user(12346, second)
    store = Store(str(root))
    assert (store.local("fit", KEY) / "part").read_text() == "half"
    assert store.read_lines("sweeps/a/1/history.jsonl") == [{"line": 1}, {"line": 2}]


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become two users")
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_root_of_another_user_says_how_it_is_shared(root: Path) -> None:
    root.mkdir(mode=0o755)

    def second() -> None:
        with pytest.raises(ValueError, match=r"cannot be written: .*chmod -R g\+rwXs on it, and all users umask 002$"):
            Store.open(str(root))

    as_user(12346, second)
