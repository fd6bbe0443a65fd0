"""Files written tensor by tensor are safetensors files like any other, whole or absent."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from steerlab.storage.tensors import Parts, Shape, writing

TENSORS = {
    "b/vectors": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "a": torch.arange(7, dtype=torch.float64),
    "count": torch.tensor(41),
    "bits": torch.tensor([1, 2, 255], dtype=torch.uint8),
}


def shapes() -> dict[str, Shape]:
    return {name: Shape(tensor.dtype, tensor.shape) for name, tensor in TENSORS.items()}


def write(path: Path) -> None:
    with writing(path, shapes(), {"made": "here"}) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)


def test_what_is_written_in_turn_reads_like_a_file_written_at_once(tmp_path: Path) -> None:
    write(tmp_path / "x.safetensors")
    found = load_file(tmp_path / "x.safetensors")
    assert found.keys() == TENSORS.keys()
    assert all(torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"made": "here"}


def write_only(path: Path, name: str) -> None:
    with writing(path, shapes()) as writer:
        writer.write(name, TENSORS[name])


def test_a_file_that_is_not_whole_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 tensors of the header were not written, the first is a"):
        write_only(tmp_path / "x.safetensors", "b/vectors")
    with pytest.raises(ValueError, match=r"a torch.float64 \(7,\) was written where the header has b/vectors"):
        write_only(tmp_path / "x.safetensors", "a")
    assert not list(tmp_path.iterdir())


def test_parts_are_read_by_name(tmp_path: Path) -> None:
    write(tmp_path / "0.safetensors")
    with writing(tmp_path / "1.safetensors", {"more": Shape(torch.float32, [2])}) as writer:
        writer.write("more", torch.ones(2))
    Parts.write_index(tmp_path, {"first": {"rank": 3}, "second": {}}, {"first": "0.safetensors", "second": "1.safetensors"})
    parts = Parts.open(tmp_path)
    assert parts.facts == {"first": {"rank": 3}, "second": {}}
    assert torch.equal(parts.tensor("more"), torch.ones(2)) and torch.equal(parts.tensor("a"), TENSORS["a"])
    with pytest.raises(ValueError, match="holds no other; it has"):
        parts.tensor("other")
