"""Data, tokenizers and templates of strangers that are small and become large, never end, or name what is not theirs."""

from __future__ import annotations

import copy
import datetime
import json
import lzma
import signal
import sys
import time
import uuid
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_families import FAMILIES, family

from steerlab import models
from steerlab.data import sources
from steerlab.data.sources import budget, parse
from steerlab.data.worlds import tiny_checkpoint
from steerlab.guards import yaml12, yaml_limits
from steerlab.guards.faults import TooLong, explained, limited
from steerlab.inputs import encoding, rendering, tokenising
from steerlab.inputs.encoding import Encoder
from steerlab.models.language import growth

COMMIT = "0" * 40
Tree = dict[str, Any]


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    tiny_checkpoint.write_model(folder)
    return folder


def said(ask: Callable[[], Any]) -> str:
    """Return what is said of a thing that is refused: one short line."""
    with pytest.raises(ValueError) as refused:
        ask()
    message = str(refused.value)
    assert "\n" not in message and len(message) < 500
    return message


# Sources


@pytest.mark.parametrize(
    "source",
    [
        "hf:a/b@/etc/passwd", "hf:a/b@../../x", "hf:a/b@x/../../y", "hf:a/b@a b", "hf:a/b@main\\..\\x", "hf:..", "hf:../..",
        "hf:a/b#../../x", "hf:a/b@main#/etc/passwd",
    ],
)  # fmt: skip
def test_no_part_of_a_hubs_name_is_a_path_of_this_machine(source: str) -> None:
    assert "points outside its repository" in (message := said(lambda: parse(source))) or "is not hf:owner/name" in message


@pytest.mark.parametrize("revision", ["main", "v1.0", "refs/pr/3", "feature/a-b_c", COMMIT, "v1.0+cu1"])
def test_revisions_as_the_hub_has_them_are_known(revision: str) -> None:
    assert parse(f"hf:owner/name@{revision}#config/train").version == revision


@pytest.mark.parametrize("content", [b"a token of somebody", b"\xff\xfe", b"x" * 5_000, COMMIT.encode() + b"0"])
def test_what_is_no_commit_in_the_hubs_cache_is_not_taken_for_one(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    (tmp_path / "models--o--n" / "refs").mkdir(parents=True)
    (tmp_path / "models--o--n" / "refs" / "main").write_bytes(content)
    for ask in (sources.fingerprint, sources.fetch):
        message = said(lambda ask=ask: ask("hf:o/n"))
        assert "refs/main" in message and "somebody" not in message


def test_a_data_set_of_the_hub_has_an_owner_and_is_never_the_current_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "o" / "n").mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "o" / "n"):
        (folder / "train.csv").write_text("text\nprivate\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    for name in ("csv", "text", "pandas"):
        assert "names no owner" in said(lambda name=name: sources.rows(f"hf:{name}@{COMMIT}#train"))
    assert "cannot be fetched from the hub" in said(lambda: sources.rows(f"hf:o/n@{COMMIT}#train"))


def test_a_damaged_data_set_of_the_hub_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise datasets.exceptions.DatasetGenerationError("An error occurred\nwhile") from ValueError("no JSON")

    monkeypatch.setattr(datasets, "load_dataset", broken)
    message = said(lambda: sources.rows(f"hf:o/n@{COMMIT}#train"))
    assert message == f"'hf:o/n@{COMMIT}#train' is not a data set that can be read: DatasetGenerationError: no JSON"

    def half(*_: Any, **__: Any) -> Any:
        yield {"text": "a"}
        raise KeyError("features")

    monkeypatch.setattr(datasets, "load_dataset", half)
    assert "is not a data set that can be read: KeyError" in said(lambda: sources.rows(f"hf:o/n@{COMMIT}#train"))


@pytest.mark.parametrize("inside", ["a.zip!/etc/passwd", "a.zip!../x", "a.zip!b/../../x", "a/..!b", "a.zip!b!/x", "!/x"])
def test_a_member_of_an_archive_lies_in_it(inside: str) -> None:
    for package in ("wheel:a==1", "sdist:a==1", "deb:ab"):
        assert said(lambda package=package: parse(f"{package}#{inside}")).endswith("points outside its package")


# YAML


@pytest.mark.parametrize("text", ["- " * 50_000 + "x", "[" * 50_000, "{a: " * 50_000, "? " * 50_000, "[" * 65 + "]" * 65])
def test_yaml_that_is_nested_deeply_does_not_end_the_process(text: str, tmp_path: Path) -> None:
    (tmp_path / "rows.yaml").write_text(text)
    assert said(lambda: sources.rows(str(tmp_path / "rows.yaml"))).endswith("nested more than 64 deep")


def test_aliases_nest_no_deeper_than_what_is_written() -> None:
    chain = "- &a0 [x]\n" + "".join(f"- &a{i} [*a{i - 1}]\n" for i in range(1, 100))
    for load in (yaml12.load, yaml12.load_rows):
        assert "aliases (*) expanded, the values are nested more than 64 deep" in said(lambda load=load: load(chain))
        assert load("- &a {x: [1]}\n- *a\n") == [{"x": [1]}] * 2
        assert load("[" * 64 + "]" * 64)


def test_a_yaml_file_of_too_many_values_is_refused_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yaml_limits, "MAX_ROW_VALUES", 1_000)
    assert said(lambda: yaml12.load_rows("- x\n" * 1_001)) == "there are more than 1,000 values"


# Tables


def arrow(path: Path, column: Any, compression: str | None = "zstd") -> str:
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_file(str(path), pa.schema([("text", column.type)]), options=options) as writer:
        writer.write_batch(pa.record_batch([column], ["text"]))
    return str(path)


def list_of_nulls(path: Path) -> str:
    values = pa.nulls(20_000_000)
    return arrow(path, pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values))


def list_of_bits(path: Path) -> str:
    count = 20_000_000
    values = pa.Array.from_buffers(pa.bool_(), count, [None, pa.py_buffer(bytes(count // 8))])
    return arrow(path, pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), values))


def structs_of_nothing(path: Path) -> str:
    empty = pa.StructArray.from_arrays([pa.nulls(1_000_000)], ["a"])
    return arrow(path, pa.ListArray.from_arrays(pa.array([0, len(empty)], pa.int32()), empty))


def keys_in_a_dictionary(path: Path) -> str:
    count = 400
    keys = pa.DictionaryArray.from_arrays(pa.array(np.zeros(count, np.int8)), pa.array(["k" * 400_000]))
    offsets = pa.array(np.arange(count + 1, dtype=np.int32))
    return arrow(path, pa.MapArray.from_arrays(offsets, keys, pa.array(np.zeros(count, np.int8))))


def zeros(path: Path) -> str:
    return arrow(path, pa.array(np.zeros(20_000_000, np.int64)))


def parquet_nulls(path: Path) -> str:
    """One row that is a list of nulls, of which Parquet writes the number."""
    values = pa.array(np.zeros(1, np.int8)).take(pa.nulls(9_000_000, pa.int32()))
    pq.write_table(pa.table({"text": pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), values)}), path)
    return str(path)


def parquet_texts(path: Path) -> str:
    """A text that stands once, in one row's list many times."""
    texts = pa.DictionaryArray.from_arrays(pa.array(np.zeros(300, np.int32)), pa.array(["y" * 2**19]))
    column = pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), texts)
    pq.write_table(pa.table({"text": column}), path, compression="zstd", store_schema=False)
    return str(path)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("a.arrow", list_of_nulls), ("b.arrow", list_of_bits), ("c.arrow", structs_of_nothing),
        ("d.arrow", keys_in_a_dictionary), ("e.parquet", parquet_nulls), ("f.parquet", parquet_texts),
    ],
)  # fmt: skip
def test_a_table_that_becomes_large_is_refused_before_it_is(
    name: str, make: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "_MOST_DECODED", 2**27)
    path = make(tmp_path / name)
    message = said(lambda: list(sources.rows(path)))
    assert message.startswith(name) and message.endswith("it may have been made to fill the memory")


@pytest.mark.parametrize(("name", "make"), [("zeros.arrow", zeros), ("nulls.parquet", parquet_nulls)])
def test_what_a_file_says_of_itself_is_counted_before_it_is_unpacked(
    name: str, make: Callable[[Path], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(budget, "_MOST_DECODED", 2**26)
    monkeypatch.setattr(budget.Budget, "rows", lambda *_: pytest.fail("they were unpacked"))
    assert "more than 67,108,864 when it is decoded" in said(lambda: list(sources.rows(make(tmp_path / name))))


def test_a_text_that_stands_once_in_a_parquet_file_stands_once_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []
    monkeypatch.setattr(budget.Budget, "rows", lambda _, batch: sizes.append(batch.nbytes) or iter(()))
    assert list(sources.each_row(parquet_texts(tmp_path / "texts.parquet"))) == []
    assert sizes and max(sizes) < 2**20


@pytest.mark.parametrize(
    "column",
    [
        pa.ListViewArray.from_arrays(pa.array([0, 0], pa.int32()), pa.array([2, 2], pa.int32()), pa.array(["a", "b"])),
        pa.RunEndEncodedArray.from_arrays(pa.array([300_000], pa.int32()), pa.array(["y"])),
        pa.array(["y" * 100], pa.string_view()),
        pa.UnionArray.from_sparse(pa.array([0], pa.int8()), [pa.array(["a"])]),
        pa.StructArray.from_arrays([pa.array([b"a"], pa.binary_view())], ["a"]),
        pa.DictionaryArray.from_arrays(pa.array([0, 0], pa.int8()), pa.array([["a"], ["b"]])),
    ],
)
def test_types_whose_values_are_repeated_without_being_written_are_refused(column: Any, tmp_path: Path) -> None:
    message = said(lambda: list(sources.rows(arrow(tmp_path / "a.arrow", column))))
    assert message.startswith("a.arrow: the column 'text' is of type ") and "which is not read here" in message


def test_tables_of_every_ordinary_type_are_read_as_they_are(tmp_path: Path) -> None:
    table = pa.table(
        {
            "json": pa.ExtensionArray.from_storage(pa.json_(), pa.array(['{"a":1}', None, "3"])),
            "id": pa.ExtensionArray.from_storage(pa.uuid(), pa.array([uuid.UUID(int=1).bytes] * 3, pa.binary(16))),
            "texts": [["x", "y"], None, []],
            "turns": [[{"role": "user", "content": "a"}], [{"role": None, "content": "b"}], None],
            "pairs": pa.array([[("a", "1")], None, [("b", None)]], pa.map_(pa.string(), pa.string())),
            "deep": pa.array([[["q"]], [None], None], pa.large_list(pa.list_(pa.large_string()))),
            "point": pa.array([[1, 2], None, [3, 4]], pa.list_(pa.int8(), 2)),
            "when": [datetime.datetime(2020, 1, 1)] * 3,
            "price": [Decimal("1.20")] * 3,
            "bytes": [b"a", None, b"\xff"],
            "nothing": pa.nulls(3),
            "bits": [True, None, False],
            "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
            "number": pa.array([1, 2, 1]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert list(sources.rows(str(tmp_path / "a.parquet"))) == pq.read_table(tmp_path / "a.parquet").to_pylist()
    for compression in ("zstd", "lz4", None):
        options = pa.ipc.IpcWriteOptions(compression=compression)
        for new in (pa.ipc.new_file, pa.ipc.new_stream):
            with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, new(file, table.schema, options=options) as writer:
                writer.write_table(table)
            assert list(sources.rows(str(tmp_path / "a.arrow"))) == table.to_pylist()


def test_lines_that_a_small_file_unpacks_to_have_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steerlab.data.sources.compressed._LONGEST_BYTES", 2**16)
    path = tmp_path / "lines.txt.xz"
    path.write_bytes(lzma.compress(b"\n" * 1_000_000))
    assert "lines.txt.xz unpacks to more than" in said(lambda: list(sources.rows(str(path))))
    for name, content in (("plain.txt", b"\n" * 100_000 + b"a\n"), ("few.txt.xz", lzma.compress(b"\n" * 900 + b"a\n"))):
        (tmp_path / name).write_bytes(content)
        assert sources.rows(str(tmp_path / name)) == [{"text": "a"}]


# Tokenizers


def loads(folder: Path, **parts: Any) -> Encoder:
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps(content | parts))
    return encoding.load(folder, {"prompt_style": "plain"})


def around(ids: int, times: int) -> Tree:
    piece = {"SpecialToken": {"id": "<bos>", "type_id": 0}}
    special = {"<bos>": {"id": "<bos>", "ids": [1] * ids, "tokens": ["<bos>"] * ids}}
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing", "single": [*[piece] * times, text], "pair": [text, other], "special_tokens": special,
    }  # fmt: skip


def repeated(times: int) -> Tree:
    text, other = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {"type": "TemplateProcessing", "single": [text] * times, "pair": [text, other], "special_tokens": {}}


def replaced(pattern: Tree, content: str) -> Tree:
    return {"type": "Replace", "pattern": pattern, "content": content}


def in_turn(name: str, steps: list[Tree]) -> Tree:
    return {"type": "Sequence", name: steps}


SPACE = {"type": "Metaspace", "replacement": "_", "prepend_scheme": "always", "split": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


@pytest.mark.parametrize(
    ("part", "step", "message"),
    [
        ("post_processor", around(200, 200), "the post-processor of .* puts 40,000 tokens around a text, which no"),
        ("post_processor", in_turn("processors", [around(600, 1)] * 2), "puts 1,200 tokens around a text"),
        ("post_processor", repeated(1_000), "the post-processor of .* repeats a text 1,000 times"),
        ("post_processor", in_turn("processors", [repeated(2)] * 30), "repeats a text 128 times"),
        ("normalizer", {"type": "Prepend", "prepend": "q" * 1_000}, "the normalizer of .* makes 1,001 characters of one"),
        ("normalizer", replaced({"String": "e"}, "q" * 900), "makes 900 characters of one"),
        ("normalizer", replaced({"Regex": ""}, "q" * 900), "makes 901 characters of one"),
        ("normalizer", in_turn("normalizers", [replaced({"Regex": "(?=.)"}, "q")] * 30), "makes 1,073,741,824 characters"),
        ("normalizer", in_turn("normalizers", [{"type": "ByteLevel"}] * 5), "makes 1,024 characters of one"),
        ("pre_tokenizer", in_turn("pretokenizers", [BYTES] * 20), "the pre_tokenizer of .* makes 1,099,511,627,776 characters"),
        ("pre_tokenizer", in_turn("pretokenizers", [SPACE] * 20), "the pre_tokenizer of .* makes 1,048,576 characters"),
        ("decoder", replaced({"Regex": "."}, "q" * 900), "the decoder of .* makes 900 characters of one"),
        ("decoder", in_turn("decoders", [{"type": "BPEDecoder", "suffix": ""}] * 10), "the decoder of .* makes 1,024"),
    ],
)  # fmt: skip
def test_a_tokenizer_that_makes_much_of_little_is_refused(part: str, step: Tree, message: str, model_dir: Path) -> None:
    with pytest.raises(ValueError, match=message):
        loads(model_dir, **{part: step})


def test_real_tokenizers_are_far_from_the_bounds() -> None:
    for name in FAMILIES:
        tokenizer = family(name).tokenizer
        growth.check(tokenizer, Path())
        assert growth.of(tokenizer) <= 4
    assert growth._replaced({"Regex": " {2,}"}, 1) == growth._replaced({"Regex": r"\s+"}, 1) == 1
    assert growth._replaced({"Regex": " *"}, 1) == growth._replaced({"Regex": "a{0,2}"}, 1) == 2


def test_texts_that_a_tokenizer_makes_longer_are_tokenised_fewer_at_a_time(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = loads(model_dir, normalizer=replaced({"String": "e"}, "sea " * 10))
    assert list(tokenising._together([0, 1, 2], ["x" * 10] * 3, growth=40)) == [[0, 1, 2]]
    monkeypatch.setattr(tokenising, "_LONGEST_TEXT", 800)
    assert list(tokenising._together([0, 1, 2], ["x" * 10] * 3, growth=40)) == [[0, 1], [2]]
    monkeypatch.setattr(tokenising, "_LONGEST_MADE", 3_200)
    assert len(encoder.encode_data([{"text": "e" * 80}], "text", 10_000).rows) == 1
    with pytest.raises(
        ValueError, match=r"row 2 has 81 characters, more than 80 \(this tokenizer may make 40 characters of one\)"
    ):
        encoder.encode_data([{"text": "a"}, {"text": "e" * 81}], "text", 100)


@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer", "decoder"])
def test_an_expression_at_which_the_tokenizers_library_gives_up_is_said_in_a_line(part: str, model_dir: Path) -> None:
    """It ends in a panic of Rust, which is no Exception."""
    pattern = {"Regex": "(x+x+)+y"}
    step = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    encoder = loads(model_dir, **{part: step if part == "pre_tokenizer" else replaced(pattern, "z")})
    if part == "decoder":
        encoder.tokenizer.add_tokens(["x" * 40])
        ids = [encoder.tokenizer.convert_tokens_to_ids("x" * 40)]
        asked: list[Callable[[], Any]] = [lambda: encoder.decode(ids), lambda: encoder.shown(ids[0])]
    else:
        row = {"instruction": "x" * 40, "input": "", "output": "a"}
        asked = [lambda: encoder.encode(encoder.from_row(row, "instruction"))]
    for ask in asked:
        message = said(ask)
        assert message.startswith("the tokenizer ") and "cannot be read: PanicException: " in message


def test_what_ends_a_program_is_no_damaged_file() -> None:
    for ending in (KeyboardInterrupt, SystemExit, GeneratorExit):
        with pytest.raises(ending), explained("a file"):
            raise ending


# Templates


def test_a_limit_that_a_library_swallows_rings_again() -> None:
    began_s, swallowed = time.monotonic(), 0
    with pytest.raises(TooLong, match="a program takes longer than"), limited("a program", seconds=0.1):
        while time.monotonic() - began_s < 20:
            try:
                time.sleep(0.01)
            except TooLong:
                if swallowed:
                    raise
                swallowed += 1
    assert swallowed == 1
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_limit_breaks_off_no_step_of_its_own() -> None:
    """One that is raised while limits are taken back would leave a timer that rings for ever."""
    with limited("a program", seconds=60):
        ring: Any = signal.getsignal(signal.SIGALRM)
        for module in ("steerlab.guards.faults", "contextlib"):
            assert ring(signal.SIGALRM, SimpleNamespace(f_globals={"__name__": module})) is None
        with pytest.raises(TooLong):
            ring(signal.SIGALRM, sys._getframe())


def test_an_outer_limit_goes_on_behind_an_inner_one() -> None:
    with pytest.raises(TooLong, match="the outer"), limited("the outer", seconds=0.3):
        with pytest.raises(TooLong, match="the inner"), limited("the inner", seconds=0.05):
            time.sleep(10)
        time.sleep(10)
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_a_template_swallows_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jinja computes what is constant while it compiles, and takes what is raised there for something to be computed later."""
    monkeypatch.setattr(rendering, "_LIMIT_S", 0.2)
    tokenizer = copy.deepcopy(family("chatml base").tokenizer)
    tokenizer.chat_template = "{{ 1|round(20000000, 'ceil') }}" + str(tokenizer.chat_template)
    encoder = Encoder(tokenizer)
    message = said(lambda: encoder.encode(encoder.conversation("a", "b", "c")))
    assert message.endswith("the chat template takes longer than 0.2 s, and may never end, for one row")


def test_a_template_without_an_end_is_not_tried_in_other_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = copy.deepcopy(family("chatml base").tokenizer)
    asked: list[Any] = []

    def endless(*given: Any, **_: Any) -> Any:
        asked.append(given)
        raise TooLong("the chat template takes longer than 5 s")

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", endless)
    encoder = Encoder(tokenizer)
    for _ in range(2):
        assert "takes longer than 5 s" in said(lambda: encoder.encode(encoder.conversation("a", "b", "c")))
    assert len(asked) == 1


def test_a_tokenizer_that_is_loaded_by_models_alone_is_checked_too(model_dir: Path) -> None:
    content = json.loads((model_dir / "tokenizer.json").read_text()) | {"post_processor": around(200, 200)}
    (model_dir / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="puts 40,000 tokens around a text"):
        models.load_tokenizer(model_dir)


def test_a_library_that_gives_up_ends_a_command_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Its panic is no Exception; what else is none goes through."""
    import typer

    from steerlab.cli.terminal import explained as command

    class PanicException(BaseException):
        """As a library written in Rust raises it."""

    with pytest.raises(typer.Exit) as ended, command():
        raise PanicException("internal error \x1b[2J")
    assert ended.value.exit_code == 2
    said = capsys.readouterr().err
    assert "the tokenizer failed on a text: internal error" in said and "\x1b" not in said
    with pytest.raises(SystemExit), command():
        raise SystemExit(3)
