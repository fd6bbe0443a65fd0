"""Check training checkpoints, whose files may come from a stranger: sizes before reading, contents before loading.

A checkpoint in shared storage may be damaged, belong to another training, or be crafted to exhaust the memory or to run code.
"""

from __future__ import annotations

import pickletools
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypedDict

import torch
from pydantic import Field, FiniteFloat
from safetensors.torch import load_file
from torch import Tensor, nn

from steerlab.guards import files, saved
from steerlab.guards.faults import explained, is_for_people
from steerlab.guards.json_values import JsonObject

META = "steerlab.json"
# The first size fits a million steps with a few metrics each, the second one a description of a hundred thousand tensors.
_LONGEST_META, _LONGEST_PICKLE = 2**28, 2**26
"""Largest bytes of `steerlab.json`, which has the metrics of every step, and of the pickle that describes a file's tensors."""
_ARCHIVE, _PICKLES = b"PK\x03\x04", 5
"""First bytes of torch's zip format, and number of pickles in its older format, which DeepSpeed writes: magic number, protocol
version, system, tensors, names of storages."""
_MOST_SHARING = 8
"""Largest number of names by which a file may refer to the bytes of one tensor; tied weights have two."""
_STATES = re.compile(r"(bf16_)?(zero_pp_rank_[0-9]+_)?mp_rank_00_(model|optim)_states\.pt")
_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer")


class _Meta(saved.Shape):
    """Contents of `steerlab.json`: workers and ZeRO stage of the checkpoint, and the state of the loop."""

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
    """The loop's part of a checkpoint; the engine writes the other files."""

    step: int
    """Number of finished steps."""
    history: list[dict[str, float]]
    """Metrics of each step."""


def read_meta(directory: Path) -> _Meta:
    """Read the `steerlab.json` of a checkpoint. Raises ValueError if it is missing or damaged."""
    try:
        files.check(directory / META, _LONGEST_META)
        return saved.read(directory / META, _Meta)
    except FileNotFoundError:
        raise ValueError(f"{directory} is not a checkpoint: it has no {META}") from None


def check_state(state: JsonObject, steps: int, directory: Path) -> LoopState:
    """Check the state of the loop and return it.

    Args:
        state: the state as it was read.
        steps: number of steps of this training.
        directory: the checkpoint, for messages.

    Raises:
        ValueError: a training of `steps` steps cannot have written this state.
    """
    where = f"{directory / META}: state"
    loop_state = saved.checked(state, _State, where)
    # The history has one line for each step, numbered from 1: the loop uses its end, the report all of it.
    if loop_state.step > steps or [line.step for line in loop_state.history] != list(range(1, loop_state.step + 1)):
        raise ValueError(
            f"{where} is at step {loop_state.step} with {len(loop_state.history)} lines of history; the training has {steps}"
        )
    return saved.like(state, _State, where)


def read_snapshots(path: Path, module: nn.Module, steps: Sequence[int]) -> dict[str, Tensor]:
    """Read the snapshots of the patch in a checkpoint. Raises ValueError if one has another step or shape."""
    with explained(str(path)):
        snapshots = load_file(path)
    # Under ZeRO 3 a parameter's own shape is that of its shard; DeepSpeed keeps the full one in `ds_shape`.
    own = {name: getattr(parameter, "ds_shape", parameter.shape) for name, parameter in module.named_parameters()}
    for name, value in snapshots.items():
        step, _, weight = name.partition("/")
        if step not in map(str, steps) or own.get(f"patch.{weight}", value.shape) != value.shape:
            raise ValueError(f"{path}: {name!r:.100} with {tuple(value.shape)} is not a snapshot of this training")
    return snapshots


def check_files(folder: Path) -> None:
    """Check the tensor files of a checkpoint before DeepSpeed reads them.

    Raises:
        ValueError: a file does not contain tensors only, has an unexpected name, or unpacks to more bytes than its size.
    """
    # The paths are sorted, so that the message of a damaged checkpoint names the same file each time.
    paths = sorted(folder.glob("*_states.pt"))
    if not paths:
        raise ValueError(f"{folder} has no part of a checkpoint")
    for path in paths:
        # DeepSpeed loads every file that matches its own, wider patterns.
        if not _STATES.fullmatch(path.name):
            raise ValueError(f"{path} is not a part of a checkpoint of this training")
        check_file(path)


def check_file(path: Path) -> None:
    """Check that a file has one of torch's two formats for tensors, with a small description. Raises ValueError."""
    # Reading a pipe or a device would not end.
    files.check(path)
    with path.open("rb") as file:
        is_archive = file.read(len(_ARCHIVE)) == _ARCHIVE
    try:
        described = _described_in_archive(path) if is_archive else _described_in_pickles(path)
    except Exception as error:  # on damaged files `zipfile` and `pickletools` raise any kind of error
        if is_for_people(error):
            raise
        raise ValueError(f"{path} cannot be read; it may be truncated: {error!s:.100}") from None
    if described > _LONGEST_PICKLE:
        raise ValueError(f"{path} describes its tensors in more than {_LONGEST_PICKLE:,} bytes, the limit")


def _described_in_archive(path: Path) -> int:
    """Return the number of bytes that describe the tensors in a zip archive. Raises ValueError for compressed members."""
    # torch stores members uncompressed; a compressed one could unpack to terabytes. Only the directory of the archive is read
    # here, not its members.
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    packed = [member for member in members if member.compress_type != zipfile.ZIP_STORED]
    if packed or sum(member.file_size for member in members) > path.stat().st_size:
        raise ValueError(f"{path} has compressed members, which torch does not write")
    return sum(member.file_size for member in members if member.filename.endswith("data.pkl"))


def _described_in_pickles(path: Path) -> int:
    """Return the number of bytes of the pickles at the start of a file of the older format, or the limit plus one."""
    # `genops` parses a pickle without running it; the tensors' raw numbers come after the pickles.
    with path.open("rb") as file:
        for _ in range(_PICKLES):
            # The position is the number of parsed bytes, so that parsing of an endless pickle stops at the limit.
            for _code, _argument, position in pickletools.genops(file):
                if (position or 0) > _LONGEST_PICKLE:
                    return _LONGEST_PICKLE + 1
        return file.tell()


def check_tensors(loaded: object, path: Path) -> None:
    """Check that the tensors in a loaded file are not larger than the file.

    Raises:
        ValueError: a tensor is sparse, quantised, or repeats few stored numbers; or all are together larger than the file.
    """
    # A stride of 0 makes a tensor of any size from one stored number; the first copy of it would exhaust the memory.
    total, most = 0, _MOST_SHARING * path.stat().st_size
    for tensor in _tensors(loaded):
        if tensor.layout != torch.strided or tensor.is_quantized or _is_spread(tensor):
            raise ValueError(f"{path} holds a tensor {_shown(tensor)} whose values are not all in the file")
        total += tensor.numel() * tensor.element_size()
        # The sum is checked too: many tensors of allowed sizes could still exceed the memory.
        if total > most:
            raise ValueError(f"{path} has tensors of more than {most:,} bytes, {_MOST_SHARING} times its size")


def _is_spread(tensor: Tensor) -> bool:
    # A tensor repeats values if it has a stride of 0, or is a view larger than its storage.
    repeats = any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return repeats or tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes()


def _tensors(loaded: object) -> Iterator[Tensor]:
    """Yield the tensors in nested containers and objects."""
    # A stack, not recursion: a file may nest deeper than Python's recursion limit. `seen` ends cycles.
    stack: list[object] = [loaded]
    seen = set[int]()
    while stack:
        value = stack.pop()
        if isinstance(value, Tensor):
            yield value
        elif id(value) not in seen and not isinstance(value, str | bytes | int | float | type):
            seen.add(id(value))
            if isinstance(value, Mapping):
                stack += value.values()
            elif isinstance(value, list | tuple | set):
                stack += value
            else:
                stack += vars(value).values() if hasattr(value, "__dict__") else ()


def check_module(weights: object, own: Mapping[str, Tensor], trained: Sequence[str], path: Path) -> None:
    """Check that the weights in a file fit the module.

    Args:
        weights: the weights as they were read.
        own: the state dict of the module.
        trained: names of the trained parameters, all of which the file must hold; frozen ones may be missing.
        path: the file, for messages.

    Raises:
        ValueError: the file has no weights, lacks a trained one, or has one of another name, shape or dtype.
    """
    if not isinstance(weights, Mapping):
        raise ValueError(f"{path} has no weights (module)")
    missing = [name for name in trained if name not in weights]
    if missing:
        raise ValueError(f"{path} lacks {len(missing)} of the trained weights, the first is {missing[0]}")
    for name, value in weights.items():
        if name not in own:
            raise ValueError(f"{path}: the training has no weight {name!r:.100}")
        # The dtype is compared too: `load_state_dict` would silently convert another one.
        _compare(value, own[name], f"{path}: {name}")


def check_optimizer(optimizer_state: object, own: torch.optim.Optimizer, parameters: Sequence[Tensor], path: Path) -> None:
    """Check that an optimizer's state in a file fits the optimizer of this training.

    Args:
        optimizer_state: the state dict as it was read.
        own: the optimizer.
        parameters: its parameters, by their number in the state.
        path: the file, for messages.

    Raises:
        ValueError: the state has other settings, other parameters, or moments of another shape or dtype.
    """
    is_state = isinstance(optimizer_state, Mapping)
    state, groups = (optimizer_state.get("state"), optimizer_state.get("param_groups")) if is_state else (None, None)
    if not isinstance(state, Mapping) or not isinstance(groups, list) or len(groups) != len(own.param_groups):
        raise ValueError(f"{path} has no state of this training's optimizer")
    for group, mine in zip(groups, own.param_groups, strict=True):
        # The loop writes the learning rate at every step, so a difference in it has no effect.
        # A missing key is accepted: torch's `__setstate__` fills in the defaults of keys that a newer version has added.
        for name in mine.keys() - {"params", "lr"}:
            if not isinstance(group, Mapping) or group.get(name, mine[name]) != mine[name]:
                raise ValueError(f"{path}: the optimizer has another {name} than the training")
    for number, moments in state.items():
        where = f"{path}: the optimizer's state {number!r:.20}"
        # `type`, not `isinstance`: True is an int.
        if type(number) is not int or not 0 <= number < len(parameters) or not isinstance(moments, Mapping):
            raise ValueError(f"{where} does not belong to a parameter")
        for name, value in moments.items():
            if name in _MOMENTS and value is not None:
                _compare(value, parameters[number], f"{where}, {name}")
            # torch's step counters are tensors of one number.
            elif isinstance(value, Tensor) and value.numel() != 1:
                raise ValueError(f"{where}, {name!r:.40}, is a tensor {_shown(value)}, not a number")


def _compare(value: object, own: Tensor, where: str) -> None:
    if not isinstance(value, Tensor) or value.shape != own.shape or value.dtype != own.dtype:
        shown = _shown(value) if isinstance(value, Tensor) else f"{value!r:.40}"
        raise ValueError(f"{where} is {shown}, not {_shown(own)}")


def _shown(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
