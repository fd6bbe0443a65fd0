"""Whether a checkpoint holds the weights that its config promises."""

from __future__ import annotations

import logging
import struct
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from safetensors import SafetensorError, safe_open

from steerlab.guards import saved
from steerlab.guards.faults import explained
from steerlab.models.language import architecture

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WEIGHTS = ("*.safetensors", "*.bin")
_SHOWN = 5
"""Names in a message."""


class Loading(TypedDict):
    """What transformers says of the tensors of a checkpoint that it loaded."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, torch.Size, torch.Size]]
    """Name, shape in the checkpoint, shape in the model."""
    error_msgs: list[str]


def has_weights(directory: Path) -> bool:
    """Say whether a model directory holds weights or only a config."""
    return any(next(directory.glob(pattern), None) for pattern in _WEIGHTS) or bool(_indices(directory))


def check_weights(directory: Path, trust_remote_code: bool = False) -> None:
    """Refuse a checkpoint that is not complete, without reading its values; warn of tensors that the model does not take.

    Raises:
        ValueError: files or tensors are missing, cut short or of other shapes; the message names them.
    """
    if has_weights(directory):
        files = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(directory.iterdir()))
        with explained(f"the checkpoint {directory}"):
            ignored = _checked(directory, files, trust_remote_code)
        if ignored:
            warnings.warn(f"{directory}: tensors that the model has no place for are left out: {listed(ignored)}", stacklevel=2)


@lru_cache(maxsize=8)
def _checked(directory: Path, files: tuple[tuple[str, int, int], ...], trust_remote_code: bool) -> tuple[str, ...]:
    """Return the names of the tensors that are left out; once for each state of the files."""
    config = architecture.read_config(directory, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        check_files(directory)  # the names of packed tensors are the quantiser's business
        return ()
    _, loading = _read(directory, {"device_map": "meta", "config": config, "trust_remote_code": trust_remote_code})
    return tuple(sorted(loading["unexpected_keys"]))


def load(directory: Path, kwargs: Mapping[str, Any]) -> PreTrainedModel:
    """Load a checkpoint that is complete. Raises ValueError as `check_weights` does."""
    return _read(directory, kwargs)[0]


def _read(directory: Path, kwargs: Mapping[str, Any]) -> tuple[PreTrainedModel, Loading]:
    """Load a checkpoint and return what its library says of the tensors."""
    check_files(directory)
    config = kwargs.get("config") or architecture.read_config(directory, kwargs["trust_remote_code"])
    with without_its_report():
        model, loading = architecture.model_class(config).from_pretrained(
            directory, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
    check_loading(directory, model, loading)
    return model, loading


def check_loading(directory: Path, model: PreTrainedModel, loading: Loading, optional: tuple[str, ...] = ()) -> None:
    """Refuse a model whose checkpoint lacks tensors, which its library fills with random numbers, or has them of other shapes.

    `optional` names how those begin that may be missing.

    Raises:
        ValueError: with the first names.
    """
    missing = [f"{name} is missing" for name in sorted(loading["missing_keys"]) if not name.startswith(optional)]
    shapes = [f"{name} is {list(has)}, not {list(wants)}" for name, has, wants in sorted(loading["mismatched_keys"])]
    faults = [*missing, *shapes, *loading["error_msgs"]]
    if faults:
        raise ValueError(f"{directory}: the checkpoint is not that of a {type(model).__name__}: {listed(faults)}")


def listed(names: Iterable[str]) -> str:
    """Return a few names and how many there are besides."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@contextmanager
def without_its_report() -> Iterator[None]:
    """Keep the library from logging a table of what is missing, which becomes one line here."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class _Index(saved.Shape):
    weight_map: dict[str, saved.Inside]


def check_files(directory: Path) -> None:
    """Refuse shards that are not there and files that are cut short. Raises ValueError with their names."""
    for index in _indices(directory):
        shards = sorted(set(saved.read(index, _Index).weight_map.values()))
        missing = [name for name in shards if not (directory / name).is_file()]
        if missing:
            raise ValueError(f"{index}: {len(missing)} of {len(shards)} files are missing: {listed(missing)}")
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError, struct.error) as error:
            raise ValueError(f"{file} cannot be read, as if it was not copied to its end: {error}") from None
    for file in sorted(directory.glob("pytorch_model*.bin")):
        try:
            torch.load(file, map_location="meta", mmap=True, weights_only=True)
        except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
            raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None


def _indices(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.index.json"))
