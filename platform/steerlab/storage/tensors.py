"""Tensors on disk one at a time: written in turn, and read by name from the files of a directory."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from steerlab.guards import saved
from steerlab.guards.json_values import JsonObject
from steerlab.storage.whole import written_whole

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.uint8: "U8",
}


class Shape(NamedTuple):
    """Type and sizes of a tensor that is still to come."""

    dtype: torch.dtype
    sizes: Sequence[int]

    @property
    def num_bytes(self) -> int:
        """Bytes that the tensor takes."""
        return self.dtype.itemsize * math.prod(self.sizes)


class TensorWriter:
    """Takes the tensors of a file in the order in which they were announced."""

    def __init__(self, file: IO[bytes], shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> None:
        self._file, self._left = file, list(shapes.items())
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        start = 0
        for name, shape in shapes.items():
            end = start + shape.num_bytes
            header[name] = {"dtype": _NAMES[shape.dtype], "shape": list(shape.sizes), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # the format's way to align what follows
        file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor. Raises ValueError if it is not the one that was announced."""
        expected, shape = self._left.pop(0)
        if (name, tensor.dtype, tuple(tensor.shape)) != (expected, shape.dtype, tuple(shape.sizes)):
            raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)} comes where {expected} {shape} was announced")
        # Over numpy's buffer: bytes() would copy a tensor of gigabytes once more. As bytes: numpy has no bfloat16.
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def check_whole(self) -> None:
        """Raise ValueError when an announced tensor did not come."""
        if self._left:
            raise ValueError(f"{len(self._left)} announced tensors did not come, {self._left[0][0]} the first")


@contextmanager
def writing(path: Path, shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None = None) -> Iterator[TensorWriter]:
    """Give a writer of a safetensors file that appears whole at the end of the block, or not at all."""
    with written_whole(path) as scratch, scratch.open("wb") as file:
        writer = TensorWriter(file, shapes, metadata or {})
        yield writer
        writer.check_whole()


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file whole, or not at all."""
    with writing(path, {name: Shape(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


_INDEX = "index.json"


class _Index(saved.Shape):
    parts: dict[str, JsonObject]
    tensors: dict[str, saved.Inside]


@dataclass(frozen=True)
class Parts:
    """A directory of safetensors files, each made by itself, and what is known of them."""

    directory: Path
    facts: dict[str, JsonObject]
    """What was told of each part, by its name."""
    _file_of: dict[str, str]

    @classmethod
    def open(cls, directory: Path) -> Parts:
        """Read the index of a directory."""
        index = saved.read(directory / _INDEX, _Index)
        return cls(directory, index.parts, index.tensors)

    @staticmethod
    def write_index(directory: Path, facts: Mapping[str, Mapping[str, object]], files: Mapping[str, str]) -> None:
        """Write the index of parts that lie in the directory; `files` holds the file name of each part."""
        file_of: dict[str, str] = {}
        for path in files.values():
            with safe_open(directory / path, "pt") as file:
                file_of |= dict.fromkeys(file.keys(), path)
        (directory / _INDEX).write_text(json.dumps({"parts": dict(facts), "tensors": file_of}, indent=1))

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, mapped from the disk: it takes memory where it is read.

        Raises:
            ValueError: there is none of this name.
        """
        (found,) = self.tensors([name])
        return found

    def tensors(self, names: Sequence[str]) -> list[Tensor]:
        """Return tensors, each as `tensor` does, opening each file once."""
        unknown = [name for name in names if name not in self._file_of]
        if unknown:
            raise ValueError(f"{self.directory} holds no {unknown[0]}; it has {', '.join(list(self._file_of)[:3])} ...")
        found: dict[str, Tensor] = {}
        for path in {self._file_of[name] for name in names}:
            with safe_open(self.directory / path, "pt") as file:
                found |= {name: file.get_tensor(name) for name in names if self._file_of[name] == path}
        return [found[name] for name in names]
