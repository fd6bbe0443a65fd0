"""Mutants of everything that a stranger may hand in: each gives an answer or one message within two seconds, never a traceback.

The default run takes a few of each kind; `pytest -m fuzz -s tests/fuzz` takes them all and prints the table.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import mutants
import pytest
import test_schema
import yaml
from mutants import Tally, try_one

from steerlab import job, models, patches, report, run
from steerlab.activations.parquet import Activations
from steerlab.cli import opening
from steerlab.data import rows
from steerlab.job import DataSet
from steerlab.stages import JobType
from steerlab.steered import export, stacks
from steerlab.steered.model import Asked
from steerlab.storage.store import Store
from steerlab.sweeps import space
from steerlab.tracking import spool

JOBS = sorted((Path(__file__).parents[2] / "jobs").rglob("*.yaml"))
SPACES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.py"))
SEED = 7
KEYS = (
    "'train.lr'", "3", "None", "''", "'train'", "'method.name, train.lr'", "'.'", "'a..b'", "('a', 'b')", "'strength'",
    "'\\x00'",
)  # fmt: skip
VALUES = (
    *map(repr, mutants.HOSTILE), "tune.grid_search([])", "tune.grid_search(3)", "tune.choice([])", "np.int64(3)", "object()",
    "tune.uniform(2, 1)", "tune.loguniform(0, 1)", "lambda: 1", "exit()", "tune.grid_search([{1: 2}])", "float('nan')", "1/0",
    "np.arange(5)", "tune.quniform(0, 1, 0)", "{tune.uniform(0, 1): 1}", "tune.sample_from(lambda s: 1/0)",
)  # fmt: skip
"""Keys and values of spaces, as Python writes them."""


def sized(few: int, many: int) -> Any:
    """A few cases in the default run, many with -m fuzz."""
    return pytest.mark.parametrize("number", [few, pytest.param(many, marks=pytest.mark.fuzz)])


def held(tally: Tally) -> None:
    print(f"\n{tally.line()} (seed {SEED})")
    assert not tally.others, "\n".join([tally.line(), *tally.others[:20]])
    assert tally.counts["refused"] > 0, "nothing was refused, so nothing was tried"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")


@sized(300, 10_000)
def test_jobs(number: int, tmp_path: Path) -> None:
    trees, draw = [yaml.safe_load(path.read_text()) for path in JOBS], random.Random(SEED)
    tally = Tally("jobs")
    for i in range(number):
        k = draw.randrange(len(JOBS))
        if i % 2:
            tree = mutants.mutated_tree(trees[k], draw, trees)
            try_one(tally, f"{JOBS[k].stem}#{i}", lambda tree=tree, k=k: job.validate(tree, JobType, JOBS[k]))
        else:
            text = mutants.mutated_text(JOBS[k].read_text(), draw).encode(errors="surrogatepass")
            path = tmp_path / JOBS[k].name
            path.write_bytes(text)
            try_one(tally, f"{JOBS[k].stem}#{i}", lambda path=path: job.read(path, JobType))
    held(tally)


@sized(300, 10_000)
def test_schema_and_loader_agree(number: int) -> None:
    """An editor says of a changed job what `steerlab plan` does, but for what one field says about another."""
    schema = jsonschema.Draft202012Validator(json.loads(test_schema.SCHEMA.read_text()))
    trees, draw = [yaml.safe_load(path.read_text()) for path in JOBS], random.Random(SEED)
    said = []
    for i in range(number):
        tree = test_schema.without_base(mutants.mutated_tree(draw.choice(trees), draw, trees))
        if isinstance(tree, dict):
            # Keys of JSON are texts.
            found = test_schema.disagreement(json.loads(json.dumps(tree)), schema)
            said += [] if found is None else [f"#{i}: {found}"]
    print(f"\nschema and loader: {number} jobs, {len(said)} disagreements (seed {SEED})")
    assert not said, "\n".join(said[:10])


@sized(200, 5_000)
def test_overrides(number: int) -> None:
    trees, draw = [yaml.safe_load(path.read_text()) for path in JOBS], random.Random(SEED)
    tally = Tally("--set")
    for i in range(number):
        k = draw.randrange(len(JOBS))
        key = ".".join(map(str, draw.choice(list(mutants.places(trees[k])))))
        value = draw.choice(mutants.HOSTILE)
        value = value if isinstance(value, str) and draw.random() < 0.5 else str(value)
        if draw.random() < 0.3:
            key = mutants.mutated_text(key, draw)
        if draw.random() < 0.3:
            value = mutants.mutated_text(value, draw)
        try_one(tally, f"{JOBS[k].stem}#{i}", lambda k=k, key=key, value=value: job.read(JOBS[k], JobType, [f"{key}={value}"]))
    held(tally)


@sized(40, 500)
def test_spaces(number: int, tmp_path: Path) -> None:
    """A space is the author's own program; what it may say wrong ends in a message all the same."""
    draw, tally = random.Random(SEED), Tally("spaces")
    for i in range(number):
        if draw.random() < 0.5:
            entries = ", ".join(f"{draw.choice(KEYS)}: {draw.choice(VALUES)}" for _ in range(draw.choice((1, 1, 2))))
            begin = "import numpy as np\nfrom ray import tune\n"
            text = f"{begin}SPACE = {{{entries}}}\nMETRIC, MODE = {draw.choice(VALUES)}, 'max'\n"
        else:
            text = mutants.mutated_text(draw.choice(SPACES).read_text(), draw)
        path = tmp_path / f"s{i}.py"
        path.write_bytes(text.encode(errors="surrogatepass"))
        try_one(tally, f"space#{i}", lambda path=path: space.load(path))
    held(tally)


def of_files(
    tally: Tally, number: int, folders: list[Path], scratch: Path, use: Callable[[Path], Any], *, also_trees: bool = True
) -> None:
    """Change one file of a folder in each case: its bytes, or the tree of a JSON file."""
    draw = random.Random(SEED)
    for i in range(number):
        source = draw.choice(folders)
        files = sorted(path for path in source.rglob("*") if path.is_file())
        victim = draw.choice(files)
        target = scratch / "mutant"
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(source, target, copy_function=os.link)
        path = target / victim.relative_to(source)
        content = victim.read_bytes()
        path.unlink()
        if draw.random() < 0.03:
            pass  # it is missing
        elif also_trees and path.suffix == ".json" and draw.random() < 0.7:
            tree = json.loads(content)
            changed = (
                mutants.mutated_tree(tree, draw, [tree]) if isinstance(tree, dict | list) else draw.choice(mutants.HOSTILE)
            )
            path.write_text(json.dumps(changed))
        else:
            path.write_bytes(mutants.mutated_bytes(content, draw))
        try_one(tally, f"{source.name}/{victim.relative_to(source)}#{i}", lambda target=target: use(target))


@sized(40, 1_000)
def test_patches(number: int, patch_dirs: list[Path], tmp_path: Path) -> None:
    tally = Tally("patches")
    of_files(tally, number, patch_dirs, tmp_path, patches.load)
    held(tally)


@sized(40, 1_000)
def test_shards(number: int, shard_dir: Path, tmp_path: Path) -> None:
    def use(folder: Path) -> None:
        found = Activations.open(folder)
        for module in found.modules:
            found.column(module)

    tally = Tally("shards")
    of_files(tally, number, [shard_dir], tmp_path, use)
    held(tally)


@sized(80, 1_000)
def test_tables(number: int, tables: list[Path], tmp_path: Path) -> None:
    draw, tally = random.Random(SEED), Tally("tables")
    for i in range(number):
        path = draw.choice(tables)
        mutant = tmp_path / f"{i}{path.suffix}"
        mutant.write_bytes(mutants.mutated_bytes(path.read_bytes(), draw))
        settings = draw.choice(({}, {"where": {"label": [0, None]}}, {"equals": {"label": 1}}, {"skip_bad": True}))

        def use(mutant: Path = mutant, settings: dict[str, Any] = settings) -> None:
            data = DataSet.model_validate({"source": str(mutant), "format": "text", **settings})
            rows.check(data)
            rows.read(data)

        try_one(tally, f"{path.name}#{i}", use)
    held(tally)


def _give_sizes(root: Path) -> None:
    """Write the sizes of changed files into their manifests, as somebody does who means harm."""
    for path in root.glob("artifacts/*/*/manifest.json"):
        try:
            manifest = json.loads(path.read_text())
            for file in manifest["files"]:
                if (path.parent / file["path"]).is_file():
                    file["bytes"] = (path.parent / file["path"]).stat().st_size
        except Exception:  # the manifest is what was changed
            continue
        path.unlink()  # a link to that of all mutants
        path.write_text(json.dumps(manifest))


@sized(48, 1_000)
def test_run_folders(number: int, run_root: Path, tmp_path: Path) -> None:
    """Folders of runs and sweeps and the artifacts that they name, read by each command that reads them, in turn."""
    folders, exported = ("runs/tiny/1", "runs/tiny/2"), tmp_path / "exported"

    def page(root: Path) -> None:
        store = Store(str(root))
        report.page([report.read(store, folder) for folder in folders])
        report.page([], sweeps=[report.read_sweep(store, "sweeps/tiny/1")])

    def compare(root: Path) -> None:
        run.compare(*(run.Side(Store(str(root)), folder) for folder in folders))

    def generate(root: Path) -> None:
        result = opening.artifact_of(str(root / folders[0]), None)
        stacks.load(result.path, **result.loading).side_by_side(Asked("a", (result.reported.strength,), max_new_tokens=2))

    def export_(root: Path) -> None:
        result = opening.artifact_of(str(root / folders[0]), None)
        shutil.rmtree(exported, ignore_errors=True)
        export.write(result.path, exported, strength=result.reported.strength, loading=result.loading)

    def use(root: Path) -> None:
        if next(consistent):
            _give_sizes(root)
        next(turn)(root)

    for command in (page, compare, generate, export_):
        command(run_root)  # the whole folder gives an answer
    turn, consistent = itertools.cycle((page, compare, generate, export_)), itertools.cycle((True, True, True, True, False))
    tally = Tally("folders of runs and sweeps")
    of_files(tally, number, [run_root], tmp_path, use)
    held(tally)


@sized(15, 1_000)
def test_exported_folders(number: int, exported_dirs: list[Path], tmp_path: Path) -> None:
    tally = Tally("exported folders")
    of_files(tally, number, exported_dirs, tmp_path, lambda folder: stacks.load(folder).detach())
    held(tally)


@sized(15, 1_000)
def test_gguf(number: int, gguf_file: Path, tmp_path: Path) -> None:
    tally = Tally("GGUF files")
    of_files(tally, number, [gguf_file.parent], tmp_path, models.load_model)
    held(tally)


@sized(60, 1_000)
def test_spools(number: int, tmp_path: Path) -> None:
    source = tmp_path / "spool"
    made = spool.Spool(source, {"mode": "offline", "project": "p"})
    for step in range(4):
        made.append({"kind": "log", "axis": "step", "data": {"step": step, "train/loss": 1 / (step + 1)}})
    made.append({"kind": "table", "key": "t", "columns": ["a"], "rows": [[1]]})
    made.append({"kind": "finish", "status": "done"})
    made.close()

    def use(folder: Path) -> None:
        opened = spool.Spool(folder, spool.read_settings(folder))
        opened.status()
        list(spool.read(folder / spool.EVENTS))
        opened.close()

    tally = Tally("W&B spools")
    of_files(tally, number, [source], tmp_path, use)
    held(tally)
