"""Files that a stranger hands in run nothing, write nowhere and are refused in one message."""

from __future__ import annotations

import importlib.util
import io
import json
import pickle
import py_compile
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import joblib
import pytest

from steerlab import models
from steerlab.cli import terminal
from steerlab.data import sources
from steerlab.data.sources import remote
from steerlab.data.worlds import tiny
from steerlab.evaluation.judging import scorers
from steerlab.guards import expressions, texts
from steerlab.guards.faults import is_for_people
from steerlab.job import DataSet
from steerlab.run import execution
from steerlab.storage.store import MANIFEST, Store, StoreError
from steerlab.tracking import spool


class Payload:
    """A pickle of it leaves a file where it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    """What the code of a stranger leaves where it runs."""
    return tmp_path / "marker"


def code(marker: Path) -> str:
    return f"import pathlib; pathlib.Path({str(marker)!r}).touch()\nclass Thing: pass\n"


# Pipelines

Edit = Callable[[Path, dict[str, Any]], None]


def names_a_module(folder: Path, index: dict[str, Any]) -> None:
    index["safety_checker"] = ["stranger", "Thing"]


def names_a_function(folder: Path, index: dict[str, Any]) -> None:
    index["unet"] = ["os", "system"]


def names_a_submodule(folder: Path, index: dict[str, Any]) -> None:
    index["unet"] = ["diffusers.utils", "Thing"]


def brings_a_module(folder: Path, index: dict[str, Any]) -> None:
    (folder / "unet" / "diffusers.py").write_text((folder.parent / "stranger.py").read_text())


def brings_code_by_its_config(folder: Path, index: dict[str, Any]) -> None:
    (folder / "unet" / "thing.py").write_text((folder.parent / "stranger.py").read_text())
    config = json.loads((folder / "unet" / "config.json").read_text())
    (folder / "unet" / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoModel": "thing.Thing"}}))


def lies_outside(folder: Path, index: dict[str, Any]) -> None:
    index["../stranger"] = ["diffusers", "UNet2DModel"]


def is_a_list(folder: Path, index: dict[str, Any]) -> None:
    index["_class_name"] = ["stranger", "Thing"]


@pytest.mark.parametrize("with_weights", [False, True])
@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (names_a_module, r"'safety_checker' is a stranger.Thing; components are classes of diffusers, transformers"),
        (names_a_function, r"'unet' is a os.system; components are"),
        (names_a_submodule, r"'unet' is a diffusers.utils.Thing; components are"),
        (brings_a_module, r"unet/diffusers.py: a pipeline's components may not bring code"),
        (brings_code_by_its_config, r"unet/\w+.(py|json): a pipeline's components may not bring code"),
        (lies_outside, r"'../stranger' is outside the pipeline's folder"),
        (is_a_list, r"'_class_name' is a stranger.Thing; components are"),
    ],
)
def test_a_pipeline_runs_no_module_that_it_names(
    edit: Edit,
    message: str,
    with_weights: bool,
    digits_dir: Path,
    tmp_path: Path,
    marker: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A module on the path, one in the folder itself, and functions of the standard library; while planning and loading."""
    (tmp_path / "stranger.py").write_text(code(marker))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "pipeline"
    if with_weights:
        models.load_model(digits_dir).pipeline.save_pretrained(folder)
    else:
        shutil.copytree(digits_dir, folder)
    index = json.loads((folder / "model_index.json").read_text())
    edit(folder, index)
    (folder / "model_index.json").write_text(json.dumps(index))
    for load in (models.facts, models.load_model):
        with pytest.raises(ValueError, match=message):
            load(folder)
    assert not marker.exists()


@pytest.mark.parametrize("content", ["", "[]", "3", "{", "[" * 100_000, '{"_class_name": null}', '{"unet": [1, 2]}'])
def test_a_pipeline_whose_index_is_none_is_refused_in_a_line(content: str, digits_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    shutil.copytree(digits_dir, folder)
    (folder / "model_index.json").write_text(content)
    with pytest.raises(ValueError, match=r"model_index\.json|pipelines of class") as refusal:
        models.facts(folder)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500


# Artifacts


@pytest.mark.parametrize("name", ["/outside", "../outside", "a/../../../outside", "..\\outside", "", "a\0b"])
def test_a_manifest_names_no_file_outside_of_its_artifact(name: str, tmp_path: Path) -> None:
    """Neither on a local ROOT nor where its files are downloaded into the cache."""
    store = Store.open(str(tmp_path / "root"))
    with store.temporary("train", "k") as directory:
        (directory / "file").write_text("content")
        store.commit("train", "k", directory, {})
    path = Path(store.path("train", "k")) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["files"][0]["path"] = name.replace("/outside", f"{tmp_path}/outside") if name == "/outside" else name
    path.write_text(json.dumps(manifest))
    for ask in (store.local, store.manifest):
        with pytest.raises(StoreError, match=r"is damaged: manifest.json names .* outside of the artifact"):
            ask("train", "k")
    assert not list(tmp_path.rglob("outside"))


@pytest.mark.parametrize(
    "content", ["[]", "null", '{"files": 3, "meta": {}}', '{"files": [1], "meta": {}}', '{"files": []}', "[" * 100_000,
                '{"files": [{"path": "file", "bytes": "7", "sha256": ""}], "meta": {}}'],
)  # fmt: skip
def test_a_manifest_that_is_none_is_refused_in_a_line(content: str, tmp_path: Path) -> None:
    store = Store.open(str(tmp_path))
    store.write_text(f"artifacts/train/k/{MANIFEST}", content)
    with pytest.raises(StoreError, match=r"is damaged|is not JSON") as refusal:
        store.local("train", "k")
    assert "\n" not in str(refusal.value)


# Pickles and code of packages


def cached(tmp_path: Path, package: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Copy an unpacked package into a cache of its own, and return its folder there."""
    unpacked = sources.fetch(package)
    copy = tmp_path / "cache" / "packages" / unpacked.name
    shutil.copytree(unpacked, copy)
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))
    return copy


@pytest.mark.parametrize("file", ["vectorizer.joblib", "model.joblib"])
def test_a_pickle_that_was_changed_after_it_was_unpacked_is_not_loaded(
    file: str, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package, _, inside = scorers.PROFANITY.partition("#")
    path = cached(tmp_path, package, monkeypatch) / inside / file
    path.write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(ValueError, match="is not the file of wheel:alt-profanity-check"):
        scorers.profanity()
    assert not marker.exists()
    joblib.load(path)
    assert marker.exists(), "the payload works"


@pytest.mark.parametrize("how", ["changed", "beside", "compiled"])
def test_code_that_was_changed_after_it_was_unpacked_does_not_run(
    how: str, tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = cached(tmp_path, "wheel:reasoning-gym==0.1.25", monkeypatch)
    factory = package / "reasoning_gym" / "factory.py"
    if how == "changed":
        factory.write_text(code(marker) + factory.read_text())
    elif how == "beside":
        (package / "json.py").write_text(code(marker))
    else:
        compiled_in_place_of(factory, code(marker) + factory.read_text())
    if how == "compiled":
        assert len(sources.rows("gym:gsm_symbolic?seed=11&size=2")) == 2, "what is compiled is not looked at"
    else:
        with pytest.raises(ValueError, match=r"is not the content of wheel:reasoning-gym==0.1.25, so its code is not run"):
            sources.rows("gym:gsm_symbolic?seed=11&size=2")
    assert not marker.exists()


def compiled_in_place_of(path: Path, text: str) -> None:
    """Leave compiled code that Python would take for that of a file."""
    own, compiled = path.read_text(), importlib.util.cache_from_source(str(path))
    path.write_text(text)
    py_compile.compile(str(path), compiled, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
    path.write_text(own)


# What would hang


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("s3://", r"'s3://' names no bucket or host"),
        ("gym:gsm_symbolic?seed=0&size=999999999999", r"with a size below 10,000,000"),
        ("/", r"/ matches more than 100,000 files and folders|/ is a directory of|is a directory that holds no data"),
    ],
)
def test_a_source_of_everything_is_refused(source: str, message: str) -> None:
    with pytest.raises(sources.SourceError, match=message):
        sources.rows(source, limit=1)


def test_what_would_be_drawn_for_ever_is_refused_with_the_arithmetic() -> None:
    with pytest.raises(ValueError, match=r"limit is 1000000000000: the maximum for instructions/train is 10,000,000 rows"):
        tiny.rows("instructions/train", 10**12)
    with pytest.raises(ValueError, match=r"draw each text 1,000,000,000 times; the maximum is 100,000"):
        DataSet(source="a.txt", format="text", seeds=(0, 1_000_000_000))


@pytest.mark.parametrize("pattern", ["(.*)*x", "(a|a)*" * 20 + "b", "(?:(?:.*)*)*!", "(.+)+\\d"])
def test_an_expression_that_takes_for_ever_is_refused_within_seconds(pattern: str) -> None:
    names = [f"model.layers.{'a' * 40}.{number}.mlp.down_proj" for number in range(300)]
    began_s = time.monotonic()
    try:
        assert expressions.whole(pattern, names) == [name for name in names if name == "nothing"]
    except ValueError as refusal:
        assert "takes longer than 1 s on the names of modules" in str(refusal)
    assert time.monotonic() - began_s < 10


@pytest.mark.parametrize("pattern", ["[", "*", "(?P<a>", "(" * 3000, "a" * 20_000])
def test_what_is_no_expression_is_refused_in_a_short_line(pattern: str) -> None:
    with pytest.raises(ValueError, match="module pattern") as refusal:
        expressions.whole(pattern, ["a"])
    assert len(str(refusal.value)) < 500 and "\n" not in str(refusal.value)


# What is shown


def test_no_text_moves_the_cursor_or_turns_a_line_round() -> None:
    assert texts.plain("a\x1b[2Jb\u202ec\x07\n\té") == "a\\x1b[2Jb\\u202ec\\x07\n\té"
    assert len(texts.shown("x" * 10**6)) < 2_001
    stream = io.StringIO()
    console = terminal.PlainConsole(file=stream, force_terminal=True, width=60)
    table = terminal.folding_table("name\x1b[31m")
    table.add_row("\x1b]0;title\x07 \u2066text")
    console.print(table)
    console.print("a\x1b[2J \u202e")
    for moving in ("\x1b[31m", "\x1b]0", "\x1b[2J", "\u202e", "\u2066", "\x07"):
        assert moving not in stream.getvalue()


SECRETS = [
    ("s3://AKIA:s3cr3t@bucket/a", "s3://***@bucket/a"),
    ("--set data.train.source=s3://AKIA:s3cr3t@b/x?region=eu", "--set data.train.source=s3://***@b/x?region=eu"),
    ("s3://b/x?access_key=AKIA&secret_key=s3cr3t&region=eu", "s3://b/x?access_key=***&secret_key=***&region=eu"),
    ("https://me:s3cr3t@host:80/simple/ failed", "https://***@host:80/simple/ failed"),
    ("abfs://c@a.dfs/x?sas_token=s3cr3t", "abfs://c@a.dfs/x?sas_token=***"),
    ("s3://AK:s3/s3cr3t@bucket/x.jsonl' cannot be read", "s3://***@bucket/x.jsonl' cannot be read"),
    ("https://tok_s3cr3t@host/a failed", "https://***@host/a failed"),
    ("abfs://c@a.dfs/x?client_secret=s3cr3t&account_key=s3cr3t", "abfs://c@a.dfs/x?client_secret=***&account_key=***"),
    ("abfs://c:s3cr3t@a.dfs/x", "abfs://***@a.dfs/x"),
    ("s3://b/a@b/c.txt and https://host/@user", "s3://b/a@b/c.txt and https://host/@user"),
    ("a mail me@host, 12:30 and hf:o/n@main", "a mail me@host, 12:30 and hf:o/n@main"),
]


@pytest.mark.parametrize(("text", "masked"), SECRETS)
def test_passwords_are_left_out_of_what_is_shown(text: str, masked: str) -> None:
    found = texts.without_secrets(text)
    assert "s3cr3t" not in found
    assert found == masked
    stream = io.StringIO()
    terminal.PlainConsole(file=stream, width=200).print(text)
    assert "s3cr3t" not in stream.getvalue()
    assert "s3cr3t" not in json.dumps(texts.everywhere(texts.plain, {"source": [text], text: 1}))


def test_a_message_names_no_password(tmp_path: Path) -> None:
    plan = [sys.executable, "-m", "steerlab", "plan", "a.yaml", "--root", "nothing://AKIA:s3cr3t@bucket/x"]
    done = subprocess.run(plan, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 2
    assert "bucket" in done.stderr and "s3cr3t" not in done.stderr + done.stdout


def test_what_is_written_for_wandb_names_no_password(tmp_path: Path) -> None:
    root = "s3://AKIA:s3cr3t@bucket/x"
    store = SimpleNamespace(root=root, where=lambda *parts: remote.joined(root, *parts))
    where = execution._uri(store, SimpleNamespace(name="train", key="k"))  # type: ignore[arg-type]
    assert where == "s3://bucket/x/artifacts/train/k", "the bucket's owner finds it by this reference"
    made = spool.Spool(tmp_path, {"mode": "offline", "project": "p", "notes": root})
    made.append({"kind": "stage", "key": "k", "uri": f"{root}/artifacts", "inputs": [["a", "b", root]]})
    made.append({"kind": "table", "key": "t", "columns": ["a"], "rows": [[f"see {root}"]]})
    made.close()
    assert all(b"s3cr3t" not in path.read_bytes() for path in tmp_path.iterdir())
    assert b"***@bucket" in (tmp_path / spool.EVENTS).read_bytes()


# Whose fault it is


def test_only_what_the_platform_says_is_called_the_users_mistake() -> None:
    def raised(call: Callable[[], Any]) -> BaseException:
        try:
            call()
        except Exception as error:
            return error
        raise AssertionError("nothing was raised")

    assert is_for_people(raised(lambda: sources.parse("")))
    assert is_for_people(raised(lambda: DataSet.model_validate({"source": ""}))) is False, "pydantic's own words"
    assert is_for_people(raised(lambda: int("x"))) is False
    assert is_for_people(raised(lambda: texts.shown(3))) is False  # type: ignore[arg-type]
    assert is_for_people(raised(lambda: json.loads("{"))) is False


def test_an_internal_error_shows_its_traceback_and_exits_with_70(tmp_path: Path) -> None:
    program = (
        "import sys; from steerlab import cli, job; job.read = lambda *a, **k: int('x'); "
        "sys.argv = ['steerlab', 'plan', 'a.yaml', '--root', sys.argv[1]]; cli.main()"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 70
    assert "Traceback" in done.stderr and "internal error" in done.stderr
    program = program.replace("int('x')", "(_ for _ in ()).throw(job.JobError('no'))")
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 70, "only statements of the platform itself speak to people"
    plan = [sys.executable, "-m", "steerlab", "plan", "nothing.yaml", "--root", str(tmp_path)]
    done = subprocess.run(plan, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
