"""Keys of artifacts, field by field over whole jobs: what may change a result changes its key, and nothing else does."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from steerlab import job
from steerlab.data import sources
from steerlab.job import described
from steerlab.stages import JobType, Plan
from steerlab.storage.plan import Stage

ROOT = Path(__file__).parents[2]
JOBS = ("aside", "warp", "lineas", "act", "iav", "dpo", "simpo", "genarm", "extract", "digits", "vanilla")
"""Of jobs/tiny: each way of training, fitting, extracting, choosing and drawing."""
FREE = ("name", "scale", "track")
"""Sections that change no result: how a job is called, spread and shown."""
IDLE = {"extract": ("method", "snapshot")}
"""Sections without a meaning in a job that neither trains nor evaluates."""
SOME: list[Any] = [
    True, False, 0, 1, 2, 3, 5, 0.25, 0.75, 1.5, [], [0], [1], [1.0], [0.5], [[0, 1]], ["data"], ["prompt"], ".*mlp", "pi/3",
    "2024-01-01", {"a": [1]}, {"a": "b"}, "x", None, {"source": "tiny:topics/test", "format": "text"},
]  # fmt: skip
Path_ = tuple[str | int, ...]


def leaves(node: Any, path: Path_ = ()) -> Iterator[Path_]:
    """Every place of a tree that holds no others; of a list the first element."""
    for key, value in node.items() if isinstance(node, dict) else list(enumerate(node))[:1]:
        if isinstance(value, dict | list) and value:
            yield from leaves(value, (*path, key))
        else:
            yield (*path, key)


@cache
def words() -> list[Any]:
    """Every word that some field of a job chooses from."""

    def collected(node: Any) -> Iterator[Any]:
        if isinstance(node, dict):
            yield from node.get("enum", ())
            for value in node.values():
                yield from collected(value)
        elif isinstance(node, list):
            for value in node:
                yield from collected(value)

    return list(dict.fromkeys(collected(json.loads(job.schema(JobType)))))


def put(tree: dict[str, Any], path: Path_, value: Any) -> dict[str, Any]:
    tree = copy.deepcopy(tree)
    node: Any = tree
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return tree


def get(tree: Any, path: Path_) -> Any:
    for key in path:
        tree = tree[key]
    return tree


@cache
def read(name: str) -> tuple[Path, dict[str, Any]]:
    """A job with every field written out; the job that it stands on is left as it is."""
    file = ROOT / "jobs/tiny" / f"{name}.yaml"
    return file, job.read(file, JobType).model_dump(mode="json")


def planned(tree: dict[str, Any], file: Path) -> list[Stage] | None:
    """The plan of a job, None where the job or its plan is refused."""
    try:
        found = job.validate(tree, JobType, file)
        return None if found.model_dump(mode="json") == read(file.stem)[1] else Plan.of(found).stages
    except ValueError:
        return None


def of_base(path: Path_) -> bool:
    return path[:2] == ("model", "source") and len(path) > 2


def of_no_use(tree: dict[str, Any], path: Path_) -> bool:
    """A data set that the job does not have, since its method may not read it; a section that idles; what checks refuse."""
    trains = path[1:] == ("validation",) and tree["train"] is not None
    unread = path[0] == "data" and len(path) == 2 and not trains and get(tree, path) is None
    refused_later = path == ("extract", "keep") and tree["method"]["name"] != "none"
    # A fit place after place reads the model itself and stores no activations.
    stores = not tree["method"].get("incremental") or tree["method"].get("incremental_target") == "plain"
    unstored = path[0] == "extract" and path[1:2] in (("pooling",), ("dtype",), ("rows_per_shard",)) and not stores
    return unread or refused_later or unstored or path[0] in IDLE.get(tree["name"].removeprefix("tiny-"), ())


def another(tree: dict[str, Any], path: Path_, file: Path) -> tuple[Any, list[Stage]] | None:
    """A value of a field that the job may have instead, and the plan with it."""
    old = get(tree, path)
    if isinstance(old, bool):
        values = [not old]
    elif isinstance(old, int | float):
        values = [old + 1, old * 2 + 0.1, old / 2, *SOME]
    else:
        values = [*SOME, *words()]
    for value in values:
        if (value != old or type(value) is not type(old)) and (plan := planned(put(tree, path, value), file)) is not None:
            return value, plan
    return None


def changed(before: list[Stage], after: list[Stage]) -> list[str]:
    """Names of the stages whose keys are no longer there."""
    kept = {stage.key for stage in after}
    return [stage.name for stage in before if stage.key not in kept]


@pytest.mark.parametrize("name", JOBS)
def test_every_field_that_may_change_a_result_is_in_the_key_of_those_that_it_reaches(name: str) -> None:
    file, tree = read(name)
    before = Plan.of(job.read(file, JobType)).stages
    base = [] if isinstance(tree["model"]["source"], str) else Plan.of(JobType.model_validate(tree["model"]["source"])).stages
    below = {stage.key for stage in base}
    num_changed, ineffective, too_far = 0, [], []
    for path in leaves(tree):
        if of_base(path) or of_no_use(tree, path) or (found := another(tree, path, file)) is None:
            continue
        value, after = found
        where = f"{'.'.join(map(str, path))} = {value!r}"
        names = changed(before, after)
        if path[0] in FREE or (path[0] == "evaluate" and path[2:] == ("label",)):
            assert not names, f"{where} changes {names}, and no result"
            continue
        num_changed += 1
        ineffective += [where] if not names and len(after) == len(before) else []
        here = [s.name for s in before if s.key not in {a.key for a in after} and s.key not in below]
        reached = {
            "evaluate": {"evaluate"}, "choose": {"evaluate", "choose"}, "snapshot": {"evaluate", "choose"},
            "train": {"train", "evaluate", "choose", "hidden"},
        }.get(str(path[0]))  # fmt: skip
        if reached is not None and not set(here) <= reached:
            too_far.append(f"{where} changes {sorted(set(here) - reached)}")
        if path[0] == "evaluate" and len(path) > 3 and len(here) > (1 if tree["choose"] is None else 2):  # and at strength 0
            too_far.append(f"{where} changes {len(here)} tasks")
    assert not ineffective, f"{name}: fields that change no key: {ineffective}"
    assert not too_far, f"{name}: {too_far}"
    assert num_changed > 20


@pytest.mark.parametrize("name", JOBS)
def test_other_bytes_of_a_file_are_another_key_and_another_place_is_none(name: str, tmp_path: Path) -> None:
    """For each source of a job: model, tokenizer, template, rows of each role, rows and models of tasks."""
    file, tree = read(name)
    tried = []
    for path in leaves(tree):
        if of_base(path) or path[0] in FREE:
            continue
        own = tmp_path / "_".join(map(str, path)).replace("/", "_")
        own.mkdir()
        places = [own / "rows.jsonl", own / "elsewhere.jsonl"]
        places[0].write_text("one\n")
        first = planned(put(tree, path, str(places[0])), file)
        if first is None:
            continue
        seen: list[str] = []
        described(job.validate(put(tree, path, str(places[0])), JobType, file), lambda one, seen=seen: seen.append(one) or one)
        if str(places[0]) not in seen:
            continue  # a text, but no source
        tried.append(".".join(map(str, path)))
        places[0].rename(places[1])
        moved = planned(put(tree, path, str(places[1])), file)
        assert moved is not None and not changed(first, moved), f"{path}: the key depends on where the file lies"
        places[1].write_text("two\n")
        other = planned(put(tree, path, str(places[1])), file)
        assert other is not None and changed(first, other), f"{path}: other bytes, same keys"
        for stage in other:
            assert str(tmp_path) not in json.dumps(stage.params), f"{path}: a place stands in the parameters of {stage.name}"
    assert len(tried) >= 2, tried


ONE_BY_ONE = ["method={name: linear_act, incremental: true}", "data.source.source=tiny:topics/validation"]


@pytest.mark.parametrize(
    ("name", "overrides"),
    [("act", []), ("act", ONE_BY_ONE), ("aside", []), ("warp", []), ("iav", []), ("digits", [])],
)
def test_what_a_source_holds_now_is_in_the_key_of_all_that_read_it(
    name: str, overrides: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub's branch, a bucket: the same name, other content. Each source is made another one in turn."""

    def planned() -> list[Stage]:
        return Plan.of(job.read(read(name)[0], JobType, overrides)).stages

    before, known, seen = planned(), sources.fingerprint, set[str]()
    monkeypatch.setattr(sources, "fingerprint", lambda source: seen.add(source) or known(source))
    assert [stage.key for stage in planned()] == [stage.key for stage in before]
    named: list[str] = []
    described(job.read(read(name)[0], JobType, overrides), lambda source: named.append(source) or source)
    assert len(seen) >= 3
    for moved in sorted({*seen, *named}):
        monkeypatch.setattr(sources, "fingerprint", lambda source, moved=moved: known(source) + "!" * (source == moved))
        kept = {stage.key for stage in planned()}
        readers = [stage for stage in before if json.dumps(moved) in json.dumps(stage.params)]
        assert readers or moved not in seen, f"{moved} stands in the parameters of no stage"
        unmoved = [f"{stage.name} ({stage.label})" for stage in readers if stage.key in kept]
        assert not unmoved, f"{moved}: other content, same key of {unmoved}"
