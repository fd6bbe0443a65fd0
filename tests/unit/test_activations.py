"""The on-disk format: what other readers see, what damage is noticed, which pages are touched."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from steerlab.activations import part_writing
from steerlab.activations.parquet import Activations

WIDTHS = {"model.layers.1": 6, "model.layers.1.mlp": 4}
METADATA = {"model_key": "k" * 64, "architecture": "Tiny", "pooling": ["mean"], "modules": list(WIDTHS)}


def values(start: int, end: int) -> dict[str, np.ndarray[Any, Any]]:
    """Rows that tell row, neuron and column by their numbers."""
    rows = np.arange(start, end, dtype=np.float32)[:, None]
    return {name: rows + np.arange(width) / 8 + 100 * width for name, width in WIDTHS.items()}


def table(start: int, end: int, dtype: str = "float32", tokens: bool = False, **found: Any) -> pa.Table:
    rows = range(start, end)
    about: dict[str, Any] = {
        "sample_id": list(rows),
        "label": ["source"] * len(rows),
        "text_sha256": [f"{i:064}" for i in rows],
    }
    if tokens:
        about |= {"token_index": [0] * len(rows), "token_id": [7] * len(rows), "role": ["data"] * len(rows)}
    made = values(start, end) | found
    return part_writing.table(about, made, part_writing.schema(WIDTHS, dtype, tokens, METADATA))


def write(directory: Path, *parts: list[pa.Table]) -> Path:
    directory.mkdir(exist_ok=True)
    facts = [part_writing.write_part(groups, directory / f"part-{i:05d}.parquet") for i, groups in enumerate(parts)]
    (directory / "parts.json").write_text(json.dumps(facts))
    return directory


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """Two parts, the first of two row groups."""
    return write(tmp_path / "a", [table(0, 3), table(3, 5)], [table(5, 8)])


def test_columns_come_back_in_sample_order(written: Path) -> None:
    found = Activations.open(written, "k" * 64)
    assert (found.modules, found.num_rows, found.labels) == (list(WIDTHS), 8, ["source"] * 8)
    for name, expected in values(0, 8).items():
        column = found.column(name)
        assert column.dtype == torch.float32
        np.testing.assert_array_equal(column.numpy(), expected)
    assert found.metadata["architecture"] == "Tiny"
    assert found.metadata["dtype"] == "float32"


def test_a_column_whose_name_begins_another_is_read_alone(written: Path) -> None:
    """Of a part whose other columns are overwritten, the one that is asked for still comes back."""
    part = written / "part-00000.parquet"
    content = bytearray(part.read_bytes())
    metadata = pq.ParquetFile(part).metadata
    for group in range(metadata.num_row_groups):
        column = metadata.row_group(group).column(4)
        assert column.path_in_schema == "model.layers.1.mlp.list.element"
        content[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(
            column.total_compressed_size
        )
    part.write_bytes(bytes(content))
    found = Activations.open(written)
    np.testing.assert_array_equal(found.column("model.layers.1").numpy(), values(0, 8)["model.layers.1"])
    with pytest.raises(ValueError, match="remove the artifact"):
        found.column("model.layers.1.mlp")


def test_float16_halves_the_file_and_keeps_its_digits(tmp_path: Path) -> None:
    directory = write(tmp_path / "half", [table(0, 8, "float16")])
    column = Activations.open(directory).column("model.layers.1")
    assert column.dtype == torch.float32
    np.testing.assert_array_equal(column.numpy(), values(0, 8)["model.layers.1"].astype(np.float16).astype(np.float32))
    kind = pq.read_schema(directory / "part-00000.parquet").field("model.layers.1").type
    assert kind == pa.list_(pa.field("element", pa.float16(), nullable=False), 6)


def test_a_value_above_float16_names_module_row_and_value() -> None:
    large = values(3, 5)["model.layers.1.mlp"]
    large[1, 2] = -70000.0
    with pytest.raises(ValueError, match=r"model.layers.1.mlp, row 4: -70000 exceeds the range of float16 .*dtype: float32"):
        table(3, 5, "float16", **{"model.layers.1.mlp": large})
    large[1, 2] = np.inf  # the model's own infinity is no overflow: it is kept and counted
    table(3, 5, "float16", **{"model.layers.1.mlp": large})


def test_bad_values_are_counted_and_named(tmp_path: Path) -> None:
    bad = values(3, 5)["model.layers.1.mlp"]
    bad[1, 2], bad[1, 3] = np.nan, -np.inf
    directory = write(tmp_path / "bad", [table(0, 3), table(3, 5, **{"model.layers.1.mlp": bad})])
    (facts,) = json.loads((directory / "parts.json").read_text())
    assert (facts["rows"], facts["nan"], facts["bad_module"], facts["bad_row"]) == (5, 2, "model.layers.1.mlp", 4)
    found = Activations.open(directory)
    assert found.column("model.layers.1").shape == (5, 6)
    with pytest.raises(ValueError, match=r"model.layers.1.mlp, row 4 holds a NaN or infinite value \(1 such rows\)"):
        found.column("model.layers.1.mlp")


def test_columns_are_told_by_name_and_not_by_order(tmp_path: Path) -> None:
    about = {"text_sha256": ["0" * 64], "label": ["source"], "sample_id": [0]}
    widths = {"first": 2, "second": 2}
    made = {"second": np.float32([[3, 4]]), "first": np.float32([[1, 2]])}
    kind = part_writing.schema(widths, "float32", False, METADATA | {"modules": list(widths)})
    found = Activations.open(write(tmp_path / "order", [part_writing.table(about, made, kind)]))
    assert (found.column("first").tolist(), found.column("second").tolist()) == ([[1, 2]], [[3, 4]])


def test_several_poolings_have_a_column_each(tmp_path: Path) -> None:
    widths = {"m@mean": 2, "m@last": 2}
    metadata = METADATA | {"pooling": ["mean", "last"], "modules": ["m"]}
    about = {"sample_id": [0], "label": ["target"], "text_sha256": ["0" * 64]}
    made = {"m@mean": np.float32([[1, 2]]), "m@last": np.float32([[3, 4]])}
    directory = write(
        tmp_path / "several", [part_writing.table(about, made, part_writing.schema(widths, "float32", False, metadata))]
    )
    found = Activations.open(directory)
    assert found.column("m", "last").tolist() == [[3, 4]]
    with pytest.raises(ValueError, match="choose one pooling of m: mean, last"):
        found.column("m")
    with pytest.raises(ValueError, match="holds no 'm' with pooling max; modules: m; pooling: mean, last"):
        found.column("m", "max")


def test_tokens_have_position_id_and_role(tmp_path: Path) -> None:
    directory = write(tmp_path / "tokens", [table(0, 2, tokens=True)])
    found = Activations.open(directory)
    assert [found.about(name).to_pylist() for name in ("token_index", "token_id", "role")] == [[0, 0], [7, 7], ["data"] * 2]


def test_other_readers_read_the_parts(written: Path) -> None:
    files = sorted(map(str, written.glob("*.parquet")))
    frame = pd.concat([pd.read_parquet(file) for file in files])
    assert list(frame.columns) == ["sample_id", "label", "text_sha256", *WIDTHS]
    np.testing.assert_array_equal(np.stack(frame["model.layers.1"].to_list()), values(0, 8)["model.layers.1"])
    assert list(pd.read_parquet(files[0], columns=["model.layers.1"]).columns) == ["model.layers.1"]
    rows = datasets.Dataset.from_parquet(files, cache_dir=str(written / "cache"))
    assert isinstance(rows, datasets.Dataset)
    np.testing.assert_array_equal(rows.with_format("numpy")["model.layers.1.mlp"][:], values(0, 8)["model.layers.1.mlp"])
    plain = pq.read_table(files[0])
    assert not any(isinstance(kind, pa.ExtensionType) for kind in plain.schema.types)


def test_activations_of_another_model_are_refused(written: Path) -> None:
    with pytest.raises(ValueError, match=r"activations of another model \(Tiny, kkkkkkkkkkkk\) than this one \(jjj"):
        Activations.open(written, "j" * 64)


def test_what_is_no_directory_of_activations_is_refused(tmp_path: Path, written: Path) -> None:
    with pytest.raises(ValueError, match=r"parts.json is missing"):
        Activations.open(tmp_path)
    pq.write_table(pa.table({"x": [1]}), written / "part-00001.parquet")
    facts = json.loads((written / "parts.json").read_text())
    facts[1] |= {"rows": 1, "bytes": (written / "part-00001.parquet").stat().st_size}
    (written / "parts.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="holds no activations of this platform"):
        Activations.open(written)


@pytest.mark.parametrize("damage", ["missing", "cut", "footer"])
def test_missing_and_damaged_parts_are_refused(written: Path, damage: str) -> None:
    part = written / "part-00001.parquet"
    content = part.read_bytes()
    if damage == "missing":
        part.unlink()
    else:
        part.write_bytes(content[:-9] if damage == "cut" else content[:-8] + bytes(8))
    with pytest.raises(ValueError, match=r"part-00001.parquet: .*; remove the artifact and extract again"):
        Activations.open(written)


def test_a_flipped_byte_is_noticed_when_its_column_is_read(written: Path) -> None:
    part = written / "part-00001.parquet"
    column = pq.ParquetFile(part).metadata.row_group(0).column(4)
    assert column.path_in_schema.startswith("model.layers.1.mlp.")
    content = bytearray(part.read_bytes())
    content[column.data_page_offset + column.total_compressed_size - 3] ^= 1
    part.write_bytes(bytes(content))
    found = Activations.open(written)
    found.column("model.layers.1")
    with pytest.raises(ValueError, match=r"part-00001.parquet: .*; remove the artifact"):
        found.column("model.layers.1.mlp")


def test_a_part_that_fails_midway_leaves_nothing(tmp_path: Path) -> None:
    def groups() -> Any:
        yield table(0, 3)
        raise ValueError("the second group fails")

    with pytest.raises(ValueError, match="second group"):
        part_writing.write_part(groups(), tmp_path / "part-00000.parquet")
    assert not list(tmp_path.iterdir())
