"""Small parts of the storage: references to artifacts, manifests, chains of models, files of tensors, stores by scheme."""

from __future__ import annotations

import json
import struct
from collections import OrderedDict
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from steerlab.data import sources
from steerlab.guards import files
from steerlab.job import ScaleConfig
from steerlab.storage import bases, claims, copies, exclusive, manifests, plan
from steerlab.storage.plan import ModelRef
from steerlab.storage.store import Store, StoreError
from steerlab.storage.tensors import Parts, write
from steerlab.storage.whole import size_and_sha256


@pytest.fixture(params=["disk", "bucket"])
def store(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))
    name = request.node.name.replace("[", "-").replace("]", "")
    return Store.open(str(tmp_path / "root") if request.param == "disk" else f"memory://{name}")


def commit(store: Store, stage: str, key: str, content: dict[str, str], meta: dict[str, Any] | None = None) -> None:
    with store.temporary(stage, key) as directory:
        for name, text in content.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(text)
        store.commit(stage, key, directory, {"params": {"a": 1}, "seconds": 2.5, **(meta or {})})


def test_a_reference_leads_to_its_folder_and_those_of_the_models_below(store: Store) -> None:
    commit(store, "train", "aa", {"prompt.json": "{}", "model/weights": "w"})
    commit(store, "fit", "bb", {"prompt.json": "{}", "base.json": json.dumps({"stage": "train", "key": "aa"})})
    reference = ModelRef(artifact=(store.root, "train", "aa"), subfolder="model")
    assert (reference.locate() / "weights").read_text() == "w"
    directory = ModelRef(artifact=(store.root, "fit", "bb")).locate()
    # The model below was brought here too, and is found beside the patch.
    assert bases.below(directory).joinpath("model/weights").read_text() == "w"
    assert [path.name for path in bases.chain(directory)] == ["bb", "aa"]
    assert ModelRef(source="tiny:model").locate() == sources.fetch("tiny:model")


def test_the_manifest_says_how_an_artifact_was_made(store: Store) -> None:
    commit(store, "train", "aa", {"x": "1"})
    made = plan.made(store, "train", "aa")
    assert (made.params, made.seconds) == ({"a": 1}, 2.5)
    commit(store, "train", "bb", {"x": "1"}, {"seconds": "long"})
    with pytest.raises(ValueError, match=rf"the manifest of train/bb in {store.root}"):
        plan.made(store, "train", "bb")
    with pytest.raises(Exception, match="train/cc"):
        plan.made(store, "train", "cc")


@pytest.mark.parametrize("base", [{"stage": "train", "key": ""}, {"stage": "", "key": "aa"}, {"stage": "train", "key": "aa"}])
def test_a_model_below_that_is_missing_is_named(base: dict[str, str], tmp_path: Path) -> None:
    directory = tmp_path / "artifacts/fit/bb"
    directory.mkdir(parents=True)
    (directory / "base.json").write_text(json.dumps(base))
    for name in ("train", "aa"):  # folders of half a name hold settings of prompts, but are no artifact
        (tmp_path / "artifacts" / name).mkdir(exist_ok=True)
        (tmp_path / "artifacts" / name / "prompt.json").write_text("{}")
    with pytest.raises(ValueError, match="which is missing: copy it to"):
        bases.below(directory)


def test_folders_of_the_work_become_part_of_the_artifact(store: Store, tmp_path: Path) -> None:
    work = tmp_path / "made"
    for name in ("a", "b/c"):
        (work / name).parent.mkdir(parents=True, exist_ok=True)
        (work / name).write_text(name)
    target = tmp_path / "artifact"
    target.mkdir()
    (target / "before").write_text("x")
    for path in sorted(path for path in work.rglob("*") if path.is_file()):
        store.write_bytes(f"work/train/aa/output/{path.relative_to(work)}", path.read_bytes())
    store.move_from_work("train", "aa", "output", target)
    there = {path.relative_to(target).as_posix(): path.read_text() for path in target.rglob("*") if path.is_file()}
    assert there == {"a": "a", "b/c": "b/c", "before": "x"}


def test_an_artifact_is_removed_once_and_not_while_it_exists(store: Store) -> None:
    commit(store, "train", "aa", {"x": "1"})
    store.discard("train", "aa")
    assert store.has("train", "aa"), "only what was hidden is removed"
    store.hide("train", "aa")
    store.discard("train", "aa")
    store.discard("train", "aa")  # another process was faster
    assert not store.has("train", "aa") and "aa" not in store.list("artifacts/train")


def test_a_claim_of_another_machine_counts_and_one_of_a_dead_process_here_does_not(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not claims.is_held(store, "train-aa")
    with claims.hold(store, "train-aa", wait=True):
        assert claims.is_held(store, "train-aa")
        # The lock of a process that died is free.
        monkeypatch.setattr(files, "is_locked", lambda path: False)
        assert not claims.is_held(store, "train-aa") or not store.is_local
        # A process with another cache has another lock file for a bucket, and none that says whether this holder lives.
        monkeypatch.setenv("STEERLAB_CACHE", "/nowhere/cache")
        assert claims.is_held(store, "train-aa") == (not store.is_local)
        # Locks of another machine cannot be seen from here.
        monkeypatch.setattr(files, "kernel", lambda: "of another machine")
        assert claims.is_held(store, "train-aa")


def test_tensors_in_memory_are_a_file_that_others_read(tmp_path: Path) -> None:
    tensors = {"b": torch.randn(3, 5), "a": torch.arange(7, dtype=torch.float64), "half": torch.ones(2, dtype=torch.bfloat16)}
    for names in (["b"], ["b", "a"], ["half", "b", "a"]):
        path = tmp_path / f"{len(names)}.safetensors"
        write(path, {name: tensors[name] for name in names})
        read = load_file(path)
        assert read.keys() == set(names) and all(torch.equal(read[name], tensors[name]) for name in names)
        (length,) = struct.unpack("<Q", path.read_bytes()[:8])
        assert length % 8 == 0, "tensors begin at a multiple of 8 bytes, so that they can be mapped"
        assert len(path.read_bytes()) == 8 + length + sum(tensors[name].nbytes for name in names)


def test_tensors_of_several_parts_are_read_together(tmp_path: Path) -> None:
    for part in range(3):
        write(tmp_path / f"{part}.safetensors", {f"{part}.{i}": torch.full((2,), 10.0 * part + i) for i in range(2)})
    Parts.write_index(tmp_path, {str(part): {} for part in range(3)}, {str(part): f"{part}.safetensors" for part in range(3)})
    parts, names = Parts.open(tmp_path), ["2.1", "0.0", "1.1", "0.1"]
    assert [float(tensor[0]) for tensor in parts.tensors(names)] == [21.0, 0.0, 11.0, 1.0]
    assert parts.files == {tmp_path / f"{part}.safetensors" for part in range(3)}


@pytest.mark.parametrize(
    ("root", "kind", "options"),
    [
        ("gs://bucket/x", "gs", {"token": None, "endpoint_url": None}),
        ("gs://anonymous@bucket/x", "gs", {"token": "anon", "endpoint_url": None}),
        (
            "gs://anonymous@bucket/x?endpoint_override=127.0.0.1:1&scheme=http",
            "gs",
            {"token": "anon", "endpoint_url": "http://127.0.0.1:1"},
        ),
        ("abfs://me:pass@box/x", "abfs", {"account_name": "me", "account_key": "pass", "anon": False}),
        ("abfss://box:pass@me.dfs.core.windows.net/x", "abfs", {"account_name": "me", "account_key": "pass", "anon": False}),
        ("abfs://box@host/x?account_name=named", "abfs", {"account_name": "named", "account_key": None, "anon": False}),
        ("memory://x", "memory", {}),
    ],
)
def test_each_scheme_is_opened_with_what_its_uri_says(
    root: str, kind: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, dict[str, object]]] = []
    monkeypatch.setattr(fsspec, "filesystem", lambda name, **given: asked.append((name, given)))
    exclusive._filesystem(root)
    ((name, given),) = asked
    assert given.pop("read_timeout", 10.0) == exclusive._READ_S
    assert (name, given) == (kind, options)


def test_a_manifest_without_the_fast_sum_is_compared_by_its_sha256(tmp_path: Path) -> None:
    """Manifests of schema 1 have no XXH3 sums."""
    path = tmp_path / "a.bin"
    path.write_bytes(b"content")
    file: Any = {"path": "a.bin", **size_and_sha256(path)}
    manifests.check_sum(tmp_path, path, file)
    path.write_bytes(b"Content")
    with pytest.raises(StoreError, match=r"a\.bin has changed since it was written"):
        manifests.check_sum(tmp_path, path, file)


def test_a_file_that_was_verified_before_does_not_end_the_check_of_the_others(tmp_path: Path) -> None:
    listed: list[Any] = []
    for name in ("a.bin", "b.bin"):
        (tmp_path / name).write_bytes(b"content")
        listed.append({"path": name, **size_and_sha256(tmp_path / name)})
    manifests.verify(tmp_path, {"files": listed})  # type: ignore[typeddict-item]
    (tmp_path / "b.bin").write_bytes(b"Content")
    with pytest.raises(StoreError, match=r"b\.bin has changed"):
        manifests.verify(tmp_path, {"files": listed})  # type: ignore[typeddict-item]


def test_the_copies_used_longest_ago_lose_their_protection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copies, "_MOST_PINS", 2)
    monkeypatch.setattr(copies, "_pins", OrderedDict())
    for name in ("a", "b", "a", "c"):
        copies.pin(tmp_path / name)
    assert [path.name for path in copies._pins] == ["a", "c"]


def test_the_status_of_a_stage_that_is_there(store: Store, tmp_path: Path) -> None:
    def make(work: plan.Work) -> None:
        (work.directory / "a.txt").write_text("a")

    stage = plan.Stage("make", 1, {"x": 1}, make)
    assert [record.status for record in plan.status([stage], store)] == ["to run"]
    plan.run([stage], store, ScaleConfig(), plan.Listener(), [])
    assert [record.status for record in plan.status([stage], store)] == ["cached"]
