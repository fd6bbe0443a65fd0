"""Load the weights of a checkpoint, and check that it has all tensors that its config describes."""

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
"""Largest number of names in a message."""


class Loading(TypedDict):
    """The loading info of transformers: which tensors of a checkpoint did not match the model."""

    missing_keys: set[str]
    unexpected_keys: set[str]
    mismatched_keys: set[tuple[str, torch.Size, torch.Size]]
    """(name, shape in the checkpoint, shape in the model) of each."""
    error_msgs: list[str]


def has_weights(directory: Path) -> bool:
    """Return whether a model's folder holds weights, not only a config."""
    return any(next(directory.glob(pattern), None) for pattern in _WEIGHTS) or bool(_indices(directory))


def check_weights(directory: Path, trust_remote_code: bool = False) -> None:
    """Check that a checkpoint is complete, without reading its values; warn of tensors that the model does not have.

    Raises:
        ValueError: Files or tensors are missing, truncated or of other shapes; the message names them.
    """
    if has_weights(directory):
        # Names, sizes and times are the cache's key, so that files that changed are checked again.
        files = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(directory.iterdir()))
        with explained(f"the checkpoint {directory}"):
            ignored = _checked(directory, files, trust_remote_code)
        if ignored:
            warnings.warn(f"{directory}: tensors that the model does not have are ignored: {listed(ignored)}", stacklevel=2)


@lru_cache(maxsize=8)
def _checked(directory: Path, files: tuple[tuple[str, int, int], ...], trust_remote_code: bool) -> tuple[str, ...]:
    """Return the names of the tensors that the model does not have."""
    config = architecture.read_config(directory, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        check_files(directory)  # packed tensors have other names and shapes than the model's, so only files are checked
        return ()
    _, loading = _read(directory, {"device_map": "meta", "config": config, "trust_remote_code": trust_remote_code})
    return tuple(sorted(loading["unexpected_keys"]))


def load(directory: Path, kwargs: Mapping[str, object]) -> PreTrainedModel:
    """Load a checkpoint with the keyword arguments of `from_pretrained`. Raises ValueError if it is not complete."""
    return _read(directory, kwargs)[0]


def _read(directory: Path, kwargs: Mapping[str, Any]) -> tuple[PreTrainedModel, Loading]:
    """Load a checkpoint and return the model with its loading info."""
    check_files(directory)
    config = kwargs.get("config") or architecture.read_config(directory, kwargs["trust_remote_code"])
    with without_its_report():
        # Shapes that differ are listed by `check_loading`, with missing tensors, instead of raised one by one.
        model, loading = architecture.model_class(config).from_pretrained(
            directory, ignore_mismatched_sizes=True, output_loading_info=True, **kwargs
        )
    check_loading(directory, model, loading)
    return model, loading


def check_loading(directory: Path, model: PreTrainedModel, loading: Loading, optional: tuple[str, ...] = ()) -> None:
    """Check that a model's checkpoint held every tensor, in the model's shapes.

    Args:
        directory: The checkpoint, as the message names it.
        model: The loaded model.
        loading: The loading info of `from_pretrained`.
        optional: Prefixes of the names of tensors that may be missing.

    Raises:
        ValueError: Tensors are missing or of other shapes; the message names the first ones.
    """
    # transformers fills missing tensors with random numbers and only logs a warning.
    missing = [f"{name} is missing" for name in sorted(loading["missing_keys"]) if not name.startswith(optional)]
    shapes = [f"{name} is {list(has)}, not {list(wants)}" for name, has, wants in sorted(loading["mismatched_keys"])]
    faults = [*missing, *shapes, *loading["error_msgs"]]
    if faults:
        raise ValueError(f"{directory}: the checkpoint is not that of a {type(model).__name__}: {listed(faults)}")


def listed(names: Iterable[str]) -> str:
    """Return the first names, and how many more there are, as text for a message."""
    names = list(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


@contextmanager
def without_its_report() -> Iterator[None]:
    """Silence the warnings of transformers, whose table of missing tensors `check_loading` replaces by one line."""
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
    """Raise ValueError if a shard of an index is missing, or if a file of weights is truncated."""
    for index in _indices(directory):
        shards = sorted(set(saved.read(index, _Index).weight_map.values()))
        missing = [name for name in shards if not (directory / name).is_file()]
        if missing:
            raise ValueError(f"{index}: {len(missing)} of {len(shards)} files are missing: {listed(missing)}")
    for file in sorted(directory.glob("*.safetensors")):
        try:
            # Opening compares the header with the size of the file, so it detects a truncated file.
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError, struct.error) as error:
            raise ValueError(f"{file} cannot be read and may be truncated: {error}") from None
    # Other .bin files, such as training_args.bin, hold no weights.
    for file in sorted(directory.glob("pytorch_model*.bin")):
        try:
            # The file is memory-mapped and loaded on the meta device, so that no values are read; `weights_only`, because a
            # pickle may run code.
            torch.load(file, map_location="meta", mmap=True, weights_only=True)
        except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
            raise ValueError(f"{file} cannot be read: {str(error).splitlines()[0]}") from None


def _indices(directory: Path) -> list[Path]:
    return sorted(directory.glob("*.index.json"))
