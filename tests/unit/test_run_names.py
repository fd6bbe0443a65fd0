"""Runs and sweeps by name: the newest finished one; trials of sweeps only by their folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from steerlab.cli.opening import split


def make(root: Path, *folders: str, finished: Sequence[str] | None = None) -> None:
    for folder in folders:
        (root / folder).mkdir(parents=True)
        if finished is None or folder in finished:
            (root / folder / "summary.json").write_text("{}")


def test_a_name_is_the_newest_finished_run(tmp_path: Path) -> None:
    make(tmp_path, "runs/a/20260101-1-x", "runs/a/20260102-1-x", "runs/b/20260103-1-x")
    make(tmp_path, "runs/a/20260104-1-x", finished=())
    assert split("a", str(tmp_path)) == (str(tmp_path), "runs/a/20260102-1-x")


def test_a_name_of_trials_is_refused_and_of_a_sweep_is_the_sweep(tmp_path: Path) -> None:
    make(tmp_path, "sweeps/a/20260101-1-x", "runs/a/20260101-1-x-0001-y-0", "runs/a/20260101-1-x-best-0")
    with pytest.raises(ValueError, match=r"the runs called a are trials of sweeps: .* runs/a/20260101-1-x-best-0"):
        split("a", str(tmp_path))
    assert split("a", str(tmp_path), or_sweep=True)[1] == "sweeps/a/20260101-1-x"
    make(tmp_path, "runs/a/20260102-1-x")
    assert split("a", str(tmp_path))[1] == split("a", str(tmp_path), or_sweep=True)[1] == "runs/a/20260102-1-x"


def test_a_name_that_nothing_has_is_refused_with_near_ones(tmp_path: Path) -> None:
    make(tmp_path, "runs/first/20260101-1-x")
    with pytest.raises(ValueError, match=r"frist is not a folder, and no finished run in .* its names are first"):
        split("frist", str(tmp_path))


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, "runs/a/1", "exported")
    monkeypatch.chdir(tmp_path)
    assert split("runs/a/1") == (str(tmp_path), "runs/a/1")
    assert split("s3://bucket/x/runs/a/1") == ("s3://bucket/x", "runs/a/1")
    assert split("exported") == (None, "exported")
