"""Training checkpoints as files that somebody else may have left: read within bounds, and compared before they are taken."""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from pydantic import Field, FiniteFloat
from torch import Tensor

from steerlab.guards import files, saved
from steerlab.guards.faults import is_for_people
from steerlab.guards.json_values import JsonObject

META = "steerlab.json"
_LONGEST_META, _LONGEST_PICKLE = 2**28, 2**26
"""Bytes of the numbers of a training, one line a step, and of the part of a file that describes its tensors."""
_ARCHIVE, _PICKLES = b"PK\x03\x04", 5
"""How torch's newer files begin, and the pickles of its older ones, which DeepSpeed writes: magic, version, machine, tensors,
names of storages."""
_MOST_SHARING = 8
"""Names of one tensor: tied weights have two."""
_STATES = re.compile(r"(bf16_)?(zero_pp_rank_[0-9]+_)?mp_rank_00_(model|optim)_states\.pt")
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class _Meta(saved.Shape):
    """What stands beside the tensors: by how many workers they were written, and the state of the loop."""

    world_size: int = Field(ge=1)
    zero_stage: int = Field(ge=0, le=3)
    state: JsonObject


class _Line(saved.Shape):
    __pydantic_extra__: dict[str, FiniteFloat] = Field(init=False)

    step: int


class _State(saved.Shape):
    step: int = Field(ge=0)
    history: list[_Line]


class LoopState(TypedDict):
    """The state of the loop beside that of the engine, as a checkpoint holds it."""

    step: int
    history: list[dict[str, float]]
    """Metrics of each step."""


def read_meta(directory: Path) -> _Meta:
    """Read what stands beside the tensors of a checkpoint. Raises ValueError where it is damaged, or there is none."""
    try:
        files.check(directory / META, _LONGEST_META)
        return saved.read(directory / META, _Meta)
    except FileNotFoundError:
        raise ValueError(f"{directory} is no checkpoint: it has no {META}") from None


def check_state(state: JsonObject, steps: int, directory: Path) -> LoopState:
    """Return a state of the loop; refuse one that no training of `steps` steps has left. Raises ValueError."""
    where = f"{directory / META}: state"
    found = saved.checked(state, _State, where)
    if found.step > steps or [line.step for line in found.history] != list(range(1, found.step + 1)):
        raise ValueError(
            f"{where} is at step {found.step} with {len(found.history)} lines of history; the training has {steps}"
        )
    return saved.like(state, _State, where)


def check_files(folder: Path) -> None:
    """Refuse files of tensors that are none, that unpack to more than they are, or that DeepSpeed would join to others.

    Raises:
        ValueError: with the first of them.
    """
    found = sorted(folder.glob("*_states.pt"))
    if not found:
        raise ValueError(f"{folder} holds no part of a checkpoint")
    for path in found:
        if not _STATES.fullmatch(path.name):
            raise ValueError(f"{path} is no part of a checkpoint of this training")
        check_file(path)


def check_file(path: Path) -> None:
    """Refuse a file that is none of tensors, in either of torch's formats. Raises ValueError."""
    files.check(path)
    with path.open("rb") as file:
        is_archive = file.read(len(_ARCHIVE)) == _ARCHIVE
    try:
        described = _described_in_archive(path) if is_archive else _described_in_pickles(path)
    except Exception as error:  # both parsers fail in every way
        if is_for_people(error):
            raise
        raise ValueError(f"{path} cannot be read, as if it was not copied to its end: {error!s:.100}") from None
    if described > _LONGEST_PICKLE:
        raise ValueError(f"{path} describes its tensors in more than {_LONGEST_PICKLE:,} bytes, which are enough")


def _described_in_archive(path: Path) -> int:
    """Return the bytes that describe the tensors; every member lies in the archive as it is."""
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    packed = [member for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed or sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError(f"{path} unpacks to more bytes than it has, which no file of torch does")
    return sum(member.file_size for member in members if member.filename.endswith("data.pkl"))


def _described_in_pickles(path: Path) -> int:
    """Return the bytes that describe the tensors, or more than are allowed: pickles that stand before their numbers."""
    with path.open("rb") as file:
        for _ in range(_PICKLES):
            for _code, _argument, position in pickletools.genops(file):
                if (position or 0) > _LONGEST_PICKLE:
                    return _LONGEST_PICKLE + 1
        return file.tell()


def check_tensors(loaded: object, path: Path) -> None:
    """Refuse tensors that say they are larger than what the file holds, such as one number spread over a gigabyte.

    Raises:
        ValueError: with the shape of the first.
    """
    total, most = 0, _MOST_SHARING * path.stat().st_size
    for tensor in _tensors(loaded):
        if tensor.layout != torch.strided or tensor.is_quantized or _is_spread(tensor):
            raise ValueError(f"{path} holds a tensor {_shown(tensor)} whose numbers are not in the file")
        total += tensor.numel() * tensor.element_size()
        if total > most:
            raise ValueError(f"{path} holds tensors of more than {most:,} bytes, {_MOST_SHARING} times what it has")


def _is_spread(tensor: Tensor) -> bool:
    repeats = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return repeats or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def _tensors(loaded: object) -> Iterator[Tensor]:
    """Yield the tensors in a value at any depth; what is reached twice is looked at once."""
    left: list[object] = [loaded]
    seen = set[int]()
    while left:
        value = left.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen and not isinstance(value, str | bytes | int | float | type):
            seen.add(id(value))
            if isinstance(value, Mapping):
                left += value.values()
            elif isinstance(value, list | tuple | set):
                left += value
            else:
                left += vars(value).values() if hasattr(value, "__dict__") else ()


def check_module(found: object, own: Mapping[str, Tensor], trained: Sequence[str], path: Path) -> None:
    """Refuse weights that are not those of the module. Raises ValueError with the first name."""
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds no weights (module)")
    missing = [name for name in trained if name not in found]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of the weights that are trained, {missing[0]} the first")
    for name, value in found.items():
        if name not in own:
            raise ValueError(f"{path}: the training has no weight {name!r:.100}")
        _compare(value, own[name], f"{path}: {name}")


def check_optimizer(found: object, own: torch.optim.Optimizer, parameters: Sequence[Tensor], path: Path) -> None:
    """Refuse a state of the optimizer that is not of its parameters, or has other settings. Raises ValueError."""
    state, groups = (found.get("state"), found.get("param_groups")) if isinstance(found, Mapping) else (None, None)
    if not isinstance(state, Mapping) or not isinstance(groups, list) or len(groups) != len(own.param_groups):
        raise ValueError(f"{path} holds no state of this training's optimizer")
    for group, mine in zip(groups, own.param_groups, strict=True):
        for name in mine.keys() - {"params", "lr"}:
            if not isinstance(group, Mapping) or group.get(name, mine[name]) != mine[name]:
                raise ValueError(f"{path}: the optimizer has another {name} than the training")
    for number, moments in state.items():
        where = f"{path}: the optimizer's state {number!r:.20}"
        if type(number) is not int or not 0 <= number < len(parameters) or not isinstance(moments, Mapping):
            raise ValueError(f"{where} is that of no parameter")
        for name, value in moments.items():
            if name in _MOMENTS and value is not None:
                _compare(value, parameters[number], f"{where}, {name}")
            elif isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"{where}, {name!r:.40}, is a tensor {_shown(value)}, not a number")


def _compare(value: object, own: Tensor, where: str) -> None:
    if not isinstance(value, Tensor) or value.shape != own.shape or value.dtype != own.dtype:
        shown = _shown(value) if isinstance(value, Tensor) else f"{value!r:.40}"
        raise ValueError(f"{where} is {shown}, not {_shown(own)}")


def _shown(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
