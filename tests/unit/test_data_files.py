"""Files as people have them: compressed, in shards, with marks and headers or without; what cannot be read is one message."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from steerlab.data import rows, sources
from steerlab.data.sources import SourceError
from steerlab.job import DataSet

TWO = [{"text": "one"}, {"text": "zwölf"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in TWO)


def _zstd(content: bytes) -> bytes:
    return pa.compress(content, codec="zstd", asbytes=True)


PACK: dict[str, Callable[[bytes], bytes]] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": _zstd}


def put(folder: Path, name: str, content: str | bytes | list[Any] | dict[str, Any]) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list | dict):
        content = json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def texts(source: str, **settings: Any) -> list[str]:
    data = DataSet.model_validate({"source": source, "format": "text", **settings})
    rows.check(data)
    return [row["text"] for row in rows.read(data)]


@pytest.mark.parametrize("suffix", PACK)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "tsv", "txt", "parquet", "yaml"])
def test_a_compressed_file_is_read_as_the_plain_one(tmp_path: Path, kind: str, suffix: str) -> None:
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(TWO), tmp_path / "plain.parquet")
        plain = (tmp_path / "plain.parquet").read_bytes()
    else:
        plain = {
            "jsonl": LINES, "json": json.dumps(TWO), "csv": "text,n\none,1\nzwölf,2\n", "tsv": "n\ttext\n1\tone\n2\tzwölf\n",
            "txt": "one\n\nzwölf", "yaml": "- {text: one}\n- {text: zwölf}\n",
        }[kind].encode()  # fmt: skip
    source = put(tmp_path, f"a.{kind}{suffix}", PACK[suffix](plain))
    assert texts(source) == ["one", "zwölf"]
    assert texts(put(tmp_path, f"b.{kind}{suffix}", plain)) == ["one", "zwölf"], "unpacked on its way, under its old name"


@pytest.mark.parametrize("suffix", PACK)
def test_an_archive_that_is_not_whole_is_named(tmp_path: Path, suffix: str) -> None:
    packed = PACK[suffix](LINES.encode() * 500)
    with pytest.raises(SourceError, match=rf"a\.jsonl\{suffix} is damaged or incomplete"):
        texts(put(tmp_path, f"a.jsonl{suffix}", packed[:-5]))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lines in a document.json", LINES),
        ("documents one behind the other.json", json.dumps(TWO[0], indent=1) + "\n" + json.dumps(TWO[1], indent=1)),
        ("a list in lines.jsonl", json.dumps(TWO)),
        ("a list over many lines.jsonl", json.dumps(TWO, indent=2)),
        ("a list in an object.json", json.dumps({"data": TWO})),
        ("a list in an object over lines.jsonl", json.dumps({"version": 1, "data": TWO}, indent=2)),
        ("a list in an object on a line.jsonl", json.dumps({"version": 1, "data": TWO})),
        ("a list deep in an object.json", json.dumps({"about": {"by": "ann"}, "data": {"train": TWO}})),
        ("texts alone.json", json.dumps(["one", "zwölf"])),
        ("texts in an object.json", json.dumps({"version": 1, "prompts": ["one", "zwölf"]})),
        ("LINES.JSONL", LINES),
        ("lines.ndjson", LINES.replace("\n", "\r\n\r\n")),
        ("marked.jsonl", "\ufeff" + LINES),
        ("two marked files joined.jsonl", "".join("\ufeff" + line + "\n" for line in LINES.splitlines())),
        ("marked.json", "\ufeff" + json.dumps(TWO)),
        ("marked.txt", "\ufeffone\r\nzwölf\r\n"),
        ("Marked.Csv", "\ufefftext,n\r\none,1\r\n\r\nzwölf,2\r\n"),
        ("marked.yaml", "\ufeff- {text: one}\n- {text: zwölf}\n"),
    ],
)
def test_rows_are_found_where_they_lie(tmp_path: Path, name: str, content: str) -> None:
    assert texts(put(tmp_path, name, content)) == ["one", "zwölf"]


def test_an_object_that_is_a_row_is_one_row(tmp_path: Path) -> None:
    row = {"text": "one", "tags": [{"x": 1}]}
    assert texts(put(tmp_path, "a.jsonl", row)) == ["one"]
    assert texts(put(tmp_path, "a.json", row)) == ["one"]
    assert texts(put(tmp_path, "b.json", {"text": "one, two"})) == ["one, two"]


def test_an_object_of_columns_is_a_table_where_it_has_the_fields(tmp_path: Path) -> None:
    source = put(tmp_path, "a.json", {"text": ["one", "two"], "label": ["x", "y"]})
    assert texts(source, equals={"label": "y"}) == ["two"]
    assert texts(source, field="label") == ["x", "y"]
    assert texts(put(tmp_path, "b.json", {"none": ["one"], "art": ["two"]})) == ["one", "two"], "subsets, as before"


@pytest.mark.parametrize("is_file", [True, False])
def test_arrow_data_are_read(tmp_path: Path, is_file: bool) -> None:
    table = pa.Table.from_pylist(TWO)
    folder = tmp_path / "saved"
    folder.mkdir()
    path = folder / "data-00000-of-00001.arrow"
    with (pa.ipc.new_file if is_file else pa.ipc.new_stream)(str(path), table.schema) as writer:
        writer.write_table(table)
    put(folder, "dataset_info.json", {"features": {}})
    put(folder, "state.json", {"_split": None})
    assert texts(str(folder)) == ["one", "zwölf"]
    path.write_bytes(path.read_bytes()[:150])
    with pytest.raises(SourceError, match=r"arrow is not Arrow data, or is incomplete"):
        texts(str(path))


def test_of_several_lists_one_is_named(tmp_path: Path) -> None:
    source = put(tmp_path, "a.json", {"data": {"train": TWO, "test": [{"text": "three"}]}})
    with pytest.raises(
        SourceError, match=r"holds 2 lists of objects, not one .*; choose one with rows_at: data.train or data.test"
    ):
        texts(source)
    assert texts(source, rows_at="data.test") == ["three"]
    with pytest.raises(
        SourceError, match=r"rows_at 'data.dev': a.json holds nothing there, .* lists of objects in it: data.train, data.t"
    ):
        texts(source, rows_at="data.dev")
    with pytest.raises(SourceError, match=r"rows_at applies to JSON and YAML; a.csv is neither"):
        texts(put(tmp_path, "a.csv", "text\none\n"), rows_at="data")


def test_captions_and_styles_of_images(tmp_path: Path) -> None:
    coco = {
        "info": {"year": 2017},
        "licenses": [{"id": 1}],
        "images": [{"id": 7, "file_name": "7.jpg"}],
        "annotations": [{"image_id": 7, "id": 1, "caption": "a dog"}, {"image_id": 7, "id": 2, "caption": "a cat"}],
    }
    assert texts(put(tmp_path, "captions.json", coco), field="caption") == ["a dog", "a cat"]
    styles = put(tmp_path, "styles.json", {"art": "pixel art, watercolor", "photo": "bokeh"})
    assert texts(styles) == ["pixel art", "watercolor", "bokeh"]
    assert texts(styles, subset="art") == ["pixel art", "watercolor"]


def test_columns_are_separated_as_the_ending_says(tmp_path: Path) -> None:
    names = {"columns": ["question", "text"]}
    assert texts(put(tmp_path, "a.csv", 'Q,"a, b"\nR,c\n'), **names) == ["a, b", "c"]
    assert texts(put(tmp_path, "a.tsv", 'Q\t"a\tb"\nR\tc\n'), **names) == ["a\tb", "c"]
    assert texts(put(tmp_path, "a.txt", 'Q\t"a, b"\nR\tc\n'), **names) == ['"a, b"', "c"]
    with pytest.raises(SourceError, match=r"row 1 has another number of cells than columns \(question, text\): 3, not 2"):
        texts(put(tmp_path, "b.csv", "Q,a,b\n"), **names)
    headed = put(tmp_path, "headed.csv", "question,text\na,b\n")
    with pytest.raises(SourceError, match=r"headed.csv row 1 holds the names in `columns`: the file has a header of its own"):
        texts(headed, **names)
    with pytest.raises(SourceError, match=r"columns are for a text file without a header; a.json has names of its own"):
        texts(put(tmp_path, "a.json", TWO), **names)


def test_quotes_that_quote_nothing_are_text_where_tabs_separate(tmp_path: Path) -> None:
    assert texts(put(tmp_path, "a.tsv", 'n\ttext\n1\t"Hello" he said\n2\tb "c"\n')) == ['"Hello" he said', 'b "c"']
    assert texts(put(tmp_path, "b.tsv", 'n\ttext\n1\t"a ""b""\nc"\n')) == ['a "b"\nc']


def test_columns_without_a_name_are_no_fields(tmp_path: Path) -> None:
    data = DataSet(source=put(tmp_path, "a.csv", ",text,\n0,a,\n1,b,\n"), format="text")
    assert rows.read(data) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"a\.jsonl line 2 is not UTF-8: the byte e9 after '.*caf'"),
        ("a.txt", b"a\n\ncaf\xe9\n", r"a\.txt line 3 is not UTF-8"),
        ("a.csv", b"text\ncaf\xe9\n", r"a\.csv line 2 is not UTF-8"),
        ("a.json", b'["a",\n"caf\xe9"]', r"a\.json line 2 is not UTF-8"),
        ("a.csv", "text\na\n".encode("utf-16"), r"a\.csv line 1 is not UTF-8: it begins as UTF-16 does"),
        ("a.jsonl", "", "has no rows"),
        ("a.json", "\n", "has no rows"),
        ("a.csv", "text\n", "has no rows"),
        ("a.jsonl.gz", gzip.compress(b"", mtime=0), "has no rows"),
        ("a.parquet", b"", r"a\.parquet is not a Parquet file, or is incomplete"),
        ("a.jsonl", "[" * 100_000 + "]" * 100_000, "a.jsonl is nested too deeply"),
        ("a.jsonl", '{"text": "a"}\n{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "a.jsonl line 2 is nested too deeply"),
        ("a.json", '{"a":' * 100_000, "a.json is nested too deeply"),
        ("a.jsonl", '{"text": "a", "n": ' + "9" * 5000 + "}", "a.jsonl line 1 is not JSON: Exceeds the limit"),
        ("a.csv", "text,text\na,b\n", r"a\.csv has two columns of the name 'text'"),
        ("a.csv", 'text,n\n"never closed,1\nb,2\n', r"a\.csv line 3 is not a row of a table"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', r"a\.jsonl row 2 is a list, not an object"),
        ("a.jsonl.zip", "x", r"a\.jsonl\.zip is not of a type that is read here"),
        ("a.json", {"art": "x", "n": 3}, r"a\.json holds 0 lists of objects, not one \(its keys: art, n\)"),
    ],
)
def test_what_cannot_be_read_is_one_message(tmp_path: Path, name: str, content: Any, message: str) -> None:
    with pytest.raises(SourceError, match=message):
        texts(put(tmp_path, name, content))


def test_rows_that_are_none_are_left_out_where_that_is_asked(tmp_path: Path) -> None:
    lines = '{"text": "a"}\n{"text":\n[1]\n{"text": 3}\n{"text": null}\n{"text": "half \\ud83d"}\n{"n": 1}\n{"text": "b"}\n'
    source = put(tmp_path, "a.jsonl", lines)
    with pytest.raises(SourceError, match=r"line 2 is not JSON: .* \(skip_bad: true skips such rows\)"):
        texts(source)
    with pytest.warns(
        UserWarning, match=r"a\.jsonl: 6 of 8 rows are bad and were skipped; the first: a\.jsonl line 2 is not JSON"
    ):
        assert texts(source, skip_bad=True) == ["a", "b"]
    with pytest.warns(
        UserWarning, match="1 of 2 rows are bad and were skipped; the first: a.csv row 2 has another number of cells"
    ):
        assert texts(put(tmp_path, "a.csv", "text,n\na,1\nb\n"), skip_bad=True) == ["a"]
    with pytest.raises(
        ValueError, match=r"no rows remain; 1 were read, 0 pass .*; 1 are bad, the first: b\.jsonl row 1: field 'text'"
    ):
        texts(put(tmp_path, "b.jsonl", {"text": [1]}), skip_bad=True)


# Data sets of several files


def _shards(folder: Path, names: list[str]) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(pa.table({"text": [name]}), path)
        else:
            path.write_text(json.dumps({"text": name}) + "\n")


def test_a_folder_of_shards_is_one_data_set_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    names = [f"train-0000{i}-of-00003.parquet" for i in range(3)]
    _shards(tmp_path / "a", names)
    (tmp_path / "a" / "README.md").write_text("read me")
    (tmp_path / "a" / "_SUCCESS.txt").write_text("")
    assert texts(str(tmp_path / "a")) == names
    assert texts((tmp_path / "a").as_uri() + "/") == names
    _shards(tmp_path / "b", [f"part-{i}.jsonl" for i in range(11)])
    assert texts(str(tmp_path / "b"))[-2:] == ["part-9.jsonl", "part-10.jsonl"]
    assert texts(str(tmp_path / "b" / "part-1*")) == ["part-1.jsonl", "part-10.jsonl"]


def test_a_folder_of_several_data_sets_is_not_mixed(tmp_path: Path) -> None:
    _shards(tmp_path, ["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"])
    with pytest.raises(SourceError, match=r"is a directory of 2 data sets: name one .*test-.*train-.* or several by a pattern"):
        texts(str(tmp_path))
    assert texts(str(tmp_path / "**" / "train-*")) == ["data/train-00000-of-00001.parquet"]


def test_a_shard_that_is_missing_is_said(tmp_path: Path) -> None:
    _shards(tmp_path, ["train-00000-of-00002.parquet"])
    with pytest.raises(SourceError, match="holds 1 of 2 shards"):
        texts(str(tmp_path))


def test_folders_and_patterns_without_data(tmp_path: Path) -> None:
    (tmp_path / "a.md").touch()
    with pytest.raises(SourceError, match=r"is a directory that holds no data: no file that ends in .json"):
        texts(str(tmp_path))
    with pytest.raises(SourceError, match=r"\*\.jsonl' matches no file"):
        texts(str(tmp_path / "*.jsonl"))
    _shards(tmp_path, ["b[1].jsonl"])
    assert texts(str(tmp_path / "b[1].jsonl")) == ["b[1].jsonl"], "a name that is there is no pattern"


def test_keys_follow_the_content_of_folders_and_patterns_and_how_a_file_is_read(tmp_path: Path) -> None:
    _shards(tmp_path, ["a/part-0.jsonl", "a/part-1.jsonl"])
    folder, pattern = str(tmp_path / "a"), str(tmp_path / "a" / "part-*")
    before = [sources.fingerprint(source) for source in (folder, pattern)]
    (tmp_path / "a").rename(tmp_path / "b")
    moved = [sources.fingerprint(str(tmp_path / "b")), sources.fingerprint(str(tmp_path / "b" / "part-*"))]
    assert moved == before
    (tmp_path / "b" / "part-1.jsonl").write_text('{"text": "other"}\n')
    after = [sources.fingerprint(str(tmp_path / "b")), sources.fingerprint(str(tmp_path / "b" / "part-*"))]
    assert after[0] != before[0] and after[1] != before[1]
    names = ["a.jsonl", "a.JSONL", "a.csv.gz", "a.jsonl.gz", "a.GGUF"]
    keys = [sources.fingerprint(put(tmp_path / str(i), name, "x")).partition("@")[0] for i, name in enumerate(names)]
    assert keys == ["file.jsonl", "file.jsonl", "file.csv.gz", "file.jsonl.gz", "file.GGUF"]


# Files that are made to fill the memory or to take for ever


def bombs(folder: Path) -> Iterator[tuple[Path, str]]:
    """Small files that are large when they are read, and what is said of each."""
    text = "x" * 2**20
    table = pa.table({"text": pa.DictionaryArray.from_arrays([0] * 2_000, [text])})
    pq.write_table(table, folder / "repeats.parquet", compression="zstd")
    yield folder / "repeats.parquet", r"repeats\.parquet has [0-9,]+ bytes, and more than 67,108,864 when it is decoded"
    with pa.OSFile(str(folder / "repeats.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    yield folder / "repeats.arrow", r"repeats\.arrow has [0-9,]+ bytes, and more than"
    with gzip.open(folder / "line.jsonl.gz", "wb", compresslevel=1) as file:
        for _ in range(10):
            file.write(b"x" * 2**20)
    yield folder / "line.jsonl.gz", r"line\.jsonl\.gz line 1 has more than 8,388,608 characters"
    (folder / "aliases.yaml").write_text(
        "a0: &a0 {x: [{t: 1}]}\n" + "".join(f"a{i}: &a{i} {{x: *a{i - 1}, y: *a{i - 1}}}\n" for i in range(1, 30))
    )
    yield folder / "aliases.yaml", "aliases .* expanded, there are more than 1000000"
    (folder / "circle.yaml").write_text("a: &a {b: *a}\n")
    yield folder / "circle.yaml", r"circle\.yaml is not YAML: "
    (folder / "deep.yaml").write_text("[" * 5_000)
    yield folder / "deep.yaml", r"deep\.yaml is not YAML: "
    (folder / "columns.csv").write_text(",".join(f"c{i}" for i in range(60_000)) + ",c0\n")
    yield folder / "columns.csv", r"columns\.csv has two columns of the name 'c0'"
    (folder / "coco.json").write_text('{"images": [], "annotations": [3]}')
    yield folder / "coco.json", r"coco\.json holds 0 lists of objects"


def test_a_small_file_does_not_fill_the_memory_or_take_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerlab.data.sources.budget._MOST_DECODED", 2**26)
    monkeypatch.setattr("steerlab.data.sources.compressed._LONGEST_LINE", 2**23)
    for path, message in bombs(tmp_path):
        began_s = time.monotonic()
        with pytest.raises(SourceError, match=message):
            list(sources.rows(str(path)))
        assert time.monotonic() - began_s < 20, path.name


def test_numbers_of_base_60_and_dates_in_yaml_are_texts(tmp_path: Path) -> None:
    """YAML 1.2: `59:59` is no number of seconds, and a day is as it is written."""
    (tmp_path / "rows.yaml").write_text(f"- text: {':'.join(['59'] * 100_000)}\n- {{text: 2024-01-01}}\n- {{text: no}}\n")
    assert [row["text"][:10] for row in sources.rows(str(tmp_path / "rows.yaml"))] == ["59:59:59:5", "2024-01-01", "no"]


def test_a_value_that_python_has_no_type_for_names_its_column(tmp_path: Path) -> None:
    far = pa.array([2**62], pa.timestamp("ms"))
    pq.write_table(pa.table({"text": ["a"], "when": far}), tmp_path / "far.parquet")
    with pytest.raises(SourceError, match=r"far\.parquet: the column 'when', of type timestamp\[.*\], cannot be read: "):
        list(sources.rows(str(tmp_path / "far.parquet")))


def test_dictionaries_are_read_as_their_texts(tmp_path: Path) -> None:
    table = pa.table({"text": ["a", None, "b", "a"] * 600, "kind": pa.array(["x", "y"] * 1200).dictionary_encode()})
    pq.write_table(table, tmp_path / "rows.parquet")
    assert list(sources.rows(str(tmp_path / "rows.parquet"))) == table.to_pylist()
