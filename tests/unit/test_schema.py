"""The JSON schema and the loader accept the same jobs."""

from __future__ import annotations

import copy
import json
import random
import tomllib
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from pydantic import ValidationError

from steerlab import job
from steerlab.guards import yaml12
from steerlab.run import job_files
from steerlab.stages import JobType
from steerlab.storage.store import Store

ROOT = Path(__file__).parents[2]
SCHEMA = ROOT / "platform/steerlab/job/schema.json"
FILES = sorted((ROOT / "jobs").rglob("*.yaml"))
NUM_MUTANTS = 300
CROSS_FIELD = ("value_error",)
"""Types of errors that no schema can know: what one field says about another, the grammar of sources, regular expressions."""
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 3, 2.0, 0.5, 1e30, 2**40, "", "x", "5", "true", "none", "pi/3", "2*tau", "0.5", "all", "2-3",
    "early, late", "attn_q,attn_k", "float16", [], [0], [1, 2], [1, 2, 3], ["a"], [[0, None]], {}, {"a": 1},
    {"min": 0, "max": 1, "steps": 3}, {"min": 0, "max": 1}, {"source": "tiny:x"}, {"source": []}, {"name": "ise"},
]  # fmt: skip


@pytest.fixture(scope="module")
def schema() -> jsonschema.Draft202012Validator:
    return jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))


def test_the_schema_file_is_that_of_the_code() -> None:
    assert SCHEMA.read_text().strip() == job.schema(JobType), (
        "run: python -m steerlab schema --anew > platform/steerlab/job/schema.json"
    )


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_every_published_job_follows_the_schema_and_names_it(file: Path, schema: jsonschema.Draft202012Validator) -> None:
    text = file.read_text()
    schema.validate(yaml12.load(text))
    named = text.splitlines()[0].removeprefix("# yaml-language-server: $schema=")
    assert (file.parent / named).resolve() == SCHEMA


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a tree."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield (*path, key)
        yield from places(value, (*path, key))


def mutated(tree: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """A job with a value changed, a key taken away, misspelt or added, at any depth."""
    tree = copy.deepcopy(tree)
    path = draw.choice(list(places(tree)))
    node = tree
    for key in path[:-1]:
        node = node[key]
    kind = draw.random()
    if kind < 0.75:
        node[path[-1]] = draw.choice(VALUES)
    elif kind < 0.85:
        del node[path[-1]]
    elif isinstance(node, dict):
        node[f"{path[-1]}_"] = node.pop(path[-1]) if kind < 0.95 else draw.choice(VALUES)
    return tree


def resolved(file: Path) -> dict[str, Any]:
    """A job with every field written out, so that every field is changed some time."""
    return job.read(file, JobType).model_dump(mode="json")


def refusals(tree: dict[str, Any]) -> list[Any]:
    """The loader's errors, those of the jobs that it builds on included, but for what one field says about another."""
    model = tree.get("model")
    below = model.get("source") if isinstance(model, dict) else None
    found = refusals(below) if isinstance(below, dict) else []
    try:
        JobType.model_validate(tree)
    except ValidationError as error:
        errors = error.errors()
        # The other choices of a union have errors of their own about the same value; a list is short of items that are refused.
        said = {chosen(one["loc"]) for one in errors if one["type"] in CROSS_FIELD} - {None}
        errors = [one for one in errors if not (one["type"] == "too_short" and one["input"])]
        found += [one for one in errors if one["type"] not in CROSS_FIELD and chosen(one["loc"]) not in said] or [None]
    return found


def chosen(place: tuple[int | str, ...]) -> tuple[int | str, ...] | None:
    """Return the place of the union of which a choice (`list[...]`, `function-after[...]`) has an error; None without one."""
    return next((place[:number] for number, key in enumerate(place) if "[" in str(key)), None)


def disagreement(tree: Any, schema: jsonschema.Draft202012Validator) -> str | None:
    """Return what the one says of a job that the other does not, None where they agree."""
    found, is_valid = refusals(tree), schema.is_valid(tree)
    if any(one is not None for one in found) and is_valid:
        return f"the schema accepts {json.dumps(tree)[:3000]}: {found[0]}"
    if not found and not is_valid:
        return f"the loader accepts what the schema refuses: {next(schema.iter_errors(tree)).message[-500:]}"
    return None


def without_base(tree: Any) -> Any:
    """Return a job that stands on a model of the tiny world where it stood on another job, which lies elsewhere."""
    model = tree.get("model") if isinstance(tree, dict) else None
    if isinstance(model, dict) and str(model.get("source")).startswith("job:"):
        model["source"] = "tiny:model"
    return tree


def test_schema_and_loader_agree_on_changed_jobs(schema: jsonschema.Draft202012Validator) -> None:
    draw = random.Random(17)
    trees = [yaml12.load(file.read_text()) for file in FILES] + [resolved(file) for file in FILES]
    accepted = refused = 0
    for number in range(NUM_MUTANTS):
        tree = without_base(mutated(trees[number % len(trees)], draw))
        assert (said := disagreement(tree, schema)) is None, said
        accepted += schema.is_valid(tree)
        refused += not schema.is_valid(tree)
    assert accepted > NUM_MUTANTS * 0.1 and refused > NUM_MUTANTS * 0.4, (accepted, refused)


@pytest.mark.parametrize(
    ("path", "value", "fits"),
    [
        (("method", "angle_rad"), "pi/2", True),
        (("method", "angle_rad"), "-3 * pi / 4", True),
        (("method", "angle_rad"), "pi/0", False),
        (("method", "angle_rad"), "0.5", False),
        (("train", "steps"), 1e3, True),
        (("train", "steps"), 1.5, False),
        (("train", "steps"), True, False),
        (("train", "seed"), 2**32, False),
        (("train", "seed"), 2**32 - 1, True),
        (("evaluate", 0, "seed"), -1, False),
        (("scale", "zero_stage"), 1.0, True),
        (("scale", "zero_stage"), True, False),
        (("evaluate", 0), {"limit": 3}, False),
        (("model", "source"), {"name": "b"}, False),
        (("data", "train", "source"), [], False),
    ],
)
def test_values_of_each_kind(path: tuple[Any, ...], value: Any, fits: bool, schema: jsonschema.Draft202012Validator) -> None:
    tree = yaml12.load((ROOT / "jobs/tiny/aside.yaml").read_text())
    node = tree
    for key in path[:-1]:
        node = node.setdefault(key, {}) if isinstance(node, dict) else node[key]
    node[path[-1]] = value
    assert schema.is_valid(tree) is fits
    try:
        job.validate(tree, JobType, ROOT / "jobs/tiny/aside.yaml")
    except job.JobError:
        assert not fits
    else:
        assert fits


@pytest.mark.parametrize("before", [b"{}", b"{\xff}"])
@pytest.mark.parametrize("folder", ["runs/a/1/job.yaml", "sweeps/a/1/best.yaml"])
def test_what_the_tool_writes_names_the_schema_and_follows_it(
    folder: str, before: bytes, schema: jsonschema.Draft202012Validator, tmp_path: Path
) -> None:
    """A folder that is moved together with ROOT keeps its schema; an older or a damaged one is replaced by the newer."""
    store = Store.open(str(tmp_path / "root"))
    store.write_bytes("schema.json", before)
    wanted = job.read(ROOT / "jobs/tiny/vanilla.yaml", JobType)
    job_files.write(store, folder, wanted)
    (tmp_path / "root").rename(tmp_path / "moved")
    file = tmp_path / "moved" / folder
    first, _, rest = file.read_text().partition("\n")
    named = (file.parent / first.removeprefix("# yaml-language-server: $schema=")).resolve()
    assert named == tmp_path / "moved/schema.json" and named.read_text() == SCHEMA.read_text()
    schema.validate(yaml12.load(rest))
    assert job.read(file, JobType) == wanted


def test_the_wheel_holds_the_schema_with_what_editors_show(schema: jsonschema.Draft202012Validator) -> None:
    """hatchling takes all of the package's folder; the schema is found as the installed package finds it."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert build == {"packages": ["platform/steerlab"]}
    published = json.loads(resources.files("steerlab.job").joinpath("schema.json").read_text())
    assert published == schema.schema
    fields = [
        (name, field, settings)
        for name, config in published["$defs"].items()
        for field, settings in config.get("properties", {}).items()
    ]
    undescribed = [f"{name}.{field}" for name, field, settings in fields if not settings.get("description")]
    assert len(fields) > 300 and not undescribed
