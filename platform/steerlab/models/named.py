"""Models that tasks name, beside the one that a job steers: classifiers, sentence encoders, models of images.

They are read as carefully as language models are: no code of their own, no kernels of a hub, no adapters, no parts that no
model has, and weights only where a checkpoint holds all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
import transformers

from steerlab.guards import saved
from steerlab.guards.faults import explained
from steerlab.models import loadable, loading
from steerlab.models.language import architecture, weights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Kind: TypeAlias = type[Any]
"""A class of transformers, or an auto class, that loads a model or a processor; these have no parent in common."""

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_MOST_PIXELS = 2_048
"""Height or width to which a processor makes an image."""
_SIZES = ("height", "width", "shortest_edge", "longest_edge")


def read_config(directory: Path, kind: Kind | None = None) -> PreTrainedConfig:
    """Read the config of a model that a task names; `kind` is the class, or the auto class, that is to load it.

    Raises:
        ValueError: it cannot be read, needs code of its own, or is that of a model of another kind.
    """
    config = architecture.read_any_config(loadable.prepare(directory))
    mapping = getattr(kind, "_model_mapping", None)
    own = getattr(kind, "config_class", None)
    is_other = (mapping is not None and type(config) not in mapping) or (own is not None and not isinstance(config, own))
    if kind is not None and is_other:
        raise ValueError(f"{directory} holds a {config.model_type}, of which there is no {kind.__name__.removeprefix('Auto')}")
    return config


def check(directory: Path, kind: Kind) -> PreTrainedConfig:
    """Refuse a model that cannot be made, without its weights, and return its config. Raises ValueError as `read_config`."""
    config = read_config(directory, kind)
    make = getattr(kind, "from_config", kind)
    with torch.device("meta"), explained(f"the model in {directory}"):
        make(config)
    return config


def load(directory: Path, kind: Kind, optional: tuple[str, ...] = ()) -> PreTrainedModel:
    """Load a model whose checkpoint holds all its weights but those whose names begin as `optional` says.

    Raises:
        ValueError: as `read_config` does, or weights are missing, cut short or of other shapes.
    """
    config = read_config(directory, kind)
    weights.check_files(directory)
    model: Any = None
    with explained(f"the checkpoint {directory}"), weights.without_its_report():
        # First without values: what a config asks for and no file holds would be made of random numbers.
        for place in ({"device_map": "meta"}, {}):
            model, found = kind.from_pretrained(
                directory,
                config=config,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
                **place,
            )
            weights.check_loading(directory, model, found, optional)
    return model.eval()


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model that a task names. Raises ValueError where there is none that can be used."""
    tokenizer = loading.load_tokenizer(directory)
    longest: object = tokenizer.model_max_length
    if not isinstance(longest, int | float) or longest < 1:
        raise ValueError(f"the tokenizer in {directory} has model_max_length {longest!r:.40}, which is no number of tokens")
    return tokenizer


def load_processor(directory: Path, kind: Kind) -> Any:
    """Load what prepares images for a model, by its class. Raises ValueError where it cannot be read, or makes them huge."""
    check_processor(directory)
    with explained(f"the processor of images in {directory}"):
        return kind.from_pretrained(directory, trust_remote_code=False)


def check_processor(directory: Path) -> None:
    """Refuse a processor of images that brings code of its own, or makes images larger than any model takes.

    Raises:
        ValueError: with the file.
    """
    for file in (directory / name for name in _PROCESSORS):
        if not file.is_file():
            continue
        raw = saved.read(file, dict[str, object])
        named = raw.get("image_processor_type") or raw.get("feature_extractor_type") or raw.get("processor_class")
        if "auto_map" in raw and not (isinstance(named, str) and hasattr(transformers, named)):
            raise ValueError(f"{file}: the processor needs code that comes with the checkpoint, which no task runs")
        _check_pixels(raw, file)


def _check_pixels(raw: Mapping[str, object], file: Path) -> None:
    left: list[tuple[str, object]] = list(raw.items())
    while left:
        name, value = left.pop()
        if isinstance(value, Mapping):
            left += [(f"{name}.{key}", one) for key, one in value.items()]
        elif isinstance(value, int | float) and _is_size(name) and value > _MOST_PIXELS:
            raise ValueError(f"{file}: {name:.60} is {value!s:.30}; images are made {_MOST_PIXELS:,} pixels wide at most")


def _is_size(name: str) -> bool:
    return name.rpartition(".")[2] in _SIZES or name in ("size", "crop_size", "pad_size")
