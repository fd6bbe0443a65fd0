"""Write tensors into a safetensors file one at a time, and read single tensors by name from a directory of such files.

The safetensors library writes a file only from tensors that are all in memory; here memory holds one. Its format is a header
of JSON with the name, type, shape and position of each tensor, then their bytes (https://github.com/huggingface/safetensors).
"""

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
"""Names of types in the header of a safetensors file."""


class Shape(NamedTuple):
    """Type and sizes of a tensor that will be written."""

    dtype: torch.dtype
    sizes: Sequence[int]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return self.dtype.itemsize * math.prod(self.sizes)


class TensorWriter:
    """Writes the header of a file, then its tensors in the order of the header."""

    def __init__(self, file: IO[bytes], shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> None:
        self._file, self._left = file, list(shapes.items())
        header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
        start = 0
        # Positions follow from the shapes alone, so the header can be written before the first tensor exists.
        for name, shape in shapes.items():
            end = start + shape.num_bytes
            header[name] = {"dtype": _NAMES[shape.dtype], "shape": list(shape.sizes), "data_offsets": [start, end]}
            start = end
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)  # padding, so that the tensors begin at a multiple of 8 bytes and can be mapped
        file.write(len(text).to_bytes(8, "little") + text)

    def write(self, name: str, tensor: Tensor) -> None:
        """Append the next tensor. Raises ValueError if name, type or shape are not those of the header."""
        expected, shape = self._left.pop(0)
        if (name, tensor.dtype, tuple(tensor.shape)) != (expected, shape.dtype, tuple(shape.sizes)):
            raise ValueError(f"{name} {tensor.dtype} {tuple(tensor.shape)} was written where the header has {expected} {shape}")
        # numpy's buffer is used, because `bytes()` would copy a tensor of gigabytes once more. The tensor is viewed as bytes,
        # because numpy has no bfloat16.
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)

    def check_whole(self) -> None:
        """Raise ValueError if a tensor of the header was not written."""
        if self._left:
            raise ValueError(f"{len(self._left)} tensors of the header were not written, the first is {self._left[0][0]}")


@contextmanager
def writing(path: Path, shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None = None) -> Iterator[TensorWriter]:
    """Provide a writer of a safetensors file, which appears at the end of the block or, after an exception, not at all.

    Args:
        path: Path of the file.
        shapes: Types and shapes of its tensors by name, in the order in which they will be written.
        metadata: Texts for the header.
    """
    with written_whole(path) as scratch, scratch.open("wb") as file:
        writer = TensorWriter(file, shapes, metadata or {})
        yield writer
        # The check is inside the block of `written_whole`, so that an incomplete file is removed and never gets its name.
        writer.check_whole()


def write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a safetensors file of tensors that are in memory, atomically."""
    with writing(path, {name: Shape(tensor.dtype, tensor.shape) for name, tensor in tensors.items()}) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


INDEX = "index.json"
"""File in a directory of parts that lists their tensors."""


class _Index(saved.Shape):
    parts: dict[str, JsonObject]
    tensors: dict[str, saved.Inside]


@dataclass(frozen=True)
class Parts:
    """A directory of safetensors files that were made separately, with an index of their tensors."""

    directory: Path
    facts: dict[str, JsonObject]
    """Facts about each part, as `write_index` got them, by the part's name."""
    _file_of: dict[str, str]

    @classmethod
    def open(cls, directory: Path) -> Parts:
        """Open a directory by its index. Raises ValueError if the index is damaged, FileNotFoundError if it is absent."""
        index = saved.read(directory / INDEX, _Index)
        return cls(directory, index.parts, index.tensors)

    @staticmethod
    def write_index(directory: Path, facts: Mapping[str, Mapping[str, object]], files: Mapping[str, str]) -> None:
        """Write the index of a directory.

        Args:
            directory: Directory that holds the parts.
            facts: Facts about each part, by its name.
            files: File name of each part, by its name.
        """
        # Only the headers are read. The index has the file of each tensor, so that readers open no file unnecessarily.
        file_of: dict[str, str] = {}
        for path in files.values():
            with safe_open(directory / path, "pt") as file:
                file_of |= dict.fromkeys(file.keys(), path)
        (directory / INDEX).write_text(json.dumps({"parts": dict(facts), "tensors": file_of}, indent=1))

    @property
    def files(self) -> set[Path]:
        """The safetensors files."""
        return {self.directory / path for path in self._file_of.values()}

    def tensor(self, name: str) -> Tensor:
        """Return a tensor, mapped from the disk: pages of it take memory when they are read.

        Raises:
            ValueError: no tensor has this name.
        """
        (tensor,) = self.tensors([name])
        return tensor

    def tensors(self, names: Sequence[str]) -> list[Tensor]:
        """Return the tensors of these names, in the order of `names`; each file is opened once."""
        unknown = [name for name in names if name not in self._file_of]
        if unknown:
            # Only the first few names are listed, because a model has thousands of tensors.
            raise ValueError(f"{self.directory} holds no {unknown[0]}; it has {', '.join(list(self._file_of)[:3])} ...")
        tensors: dict[str, Tensor] = {}
        for path in {self._file_of[name] for name in names}:
            with safe_open(self.directory / path, "pt") as file:
                tensors |= {name: file.get_tensor(name) for name in names if self._file_of[name] == path}
        return [tensors[name] for name in names]
