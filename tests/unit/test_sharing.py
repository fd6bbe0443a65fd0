"""A local ROOT on several nodes is refused where one of them does not see what is written there."""

from __future__ import annotations

from pathlib import Path

import pytest

from steerlab.run import sharing
from steerlab.storage.store import Store

NODES = {"1": "head", "2": "worker-a", "3": "worker-b"}


def test_nodes_that_read_what_was_written_share_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "_read_on", lambda nodes, path: {node: Path(path).read_text() for node in nodes})
    store = Store.open((tmp_path / "a b").as_uri())
    sharing.check(store, NODES)
    assert store.list("tmp") == []


@pytest.mark.parametrize("foreign", ["", "another folder's"])
def test_nodes_that_do_not_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: str) -> None:
    monkeypatch.setattr(
        sharing, "_read_on", lambda nodes, path: dict(zip(nodes, (Path(path).read_text(), foreign, foreign), strict=True))
    )
    store = Store.open(str(tmp_path / "root"))
    with pytest.raises(ValueError, match=r"is not the same folder on all 3 nodes: worker-a, worker-b cannot read"):
        sharing.check(store, NODES)
    assert store.list("tmp") == []
