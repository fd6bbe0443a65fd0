"""Load the models that a task's config names beside the steered one: classifiers, sentence encoders, vision models.

They are checked as language models are. A model is refused if it needs code or kernels from elsewhere, holds an adapter, has
absurd sizes, or if its checkpoint lacks weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from steerlab.guards import late, saved
from steerlab.guards.faults import explained
from steerlab.models import loadable, loading
from steerlab.models.language import architecture, weights

if TYPE_CHECKING:
    import transformers
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
else:
    transformers = late.module("transformers")

Kind: TypeAlias = type[Any]
"""A class of transformers, or an auto class, that loads a model or a processor. These classes share no base class."""

_PROCESSORS = ("preprocessor_config.json", "processor_config.json")
_MOST_PIXELS = 2_048
"""Largest height or width, in pixels, to which a processor may resize an image."""
_SIZES = ("height", "width", "shortest_edge", "longest_edge")
"""Keys of a processor's settings that hold a size in pixels."""


def read_config(directory: Path, kind: Kind | None = None) -> PreTrainedConfig:
    """Read the config of a model that a task uses.

    Args:
        directory: Folder of the checkpoint.
        kind: Class, or auto class, that will load the model; None skips this check.

    Raises:
        ValueError: The config cannot be read, needs code of its own, or belongs to a model that `kind` does not load.
    """
    config = architecture.read_any_config(loadable.prepare(directory))
    # An auto class has a table from configs to models, and a model's class has the class of its config (transformers 5.23).
    mapping = getattr(kind, "_model_mapping", None)
    own = getattr(kind, "config_class", None)
    is_other = (mapping is not None and type(config) not in mapping) or (own is not None and not isinstance(config, own))
    if kind is not None and is_other:
        raise ValueError(
            f"{directory} holds a {config.model_type}, which cannot be loaded as a {kind.__name__.removeprefix('Auto')}"
        )
    return config


def check(directory: Path, kind: Kind) -> PreTrainedConfig:
    """Build the model without weights to see that its config is valid, and return the config. Raises as `read_config` does."""
    config = read_config(directory, kind)
    make = getattr(kind, "from_config", kind)
    with torch.device("meta"), explained(f"the model in {directory}"):
        make(config)
    return config


def load(directory: Path, kind: Kind, optional: tuple[str, ...] = ()) -> PreTrainedModel:
    """Load a model in evaluation mode and check that its checkpoint is complete.

    Args:
        directory: Folder of the checkpoint.
        kind: Class, or auto class, that loads the model.
        optional: Prefixes of the names of weights that the checkpoint may lack.

    Raises:
        ValueError: As in `read_config`, or weights are missing, truncated or of other shapes.
    """
    config = read_config(directory, kind)
    weights.check_files(directory)
    model: Any = None
    with explained(f"the checkpoint {directory}"), weights.without_its_report():
        # The model is loaded on the meta device first: weights that no file holds would be filled with random numbers, and a
        # wrong config may describe more of them than fit into memory.
        for place in ({"device_map": "meta"}, {}):
            model, loading_info = kind.from_pretrained(
                directory,
                config=config,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=False,
                **place,
            )
            weights.check_loading(directory, model, loading_info, optional)
    return model.eval()


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model that a task uses. Raises ValueError if it is missing or its maximum length is invalid."""
    tokenizer = loading.load_tokenizer(directory)
    # The value is read from a file, so it may be of any type.
    longest: object = tokenizer.model_max_length
    if not isinstance(longest, int | float) or longest < 1:
        raise ValueError(f"the tokenizer in {directory} has model_max_length {longest!r:.40}, which is not a number of tokens")
    return tokenizer


def load_processor(directory: Path, kind: Kind) -> Any:
    """Load an image processor of class `kind`. Raises ValueError if it cannot be read or as in `check_processor`."""
    check_processor(directory)
    with explained(f"the processor of images in {directory}"):
        return kind.from_pretrained(directory, trust_remote_code=False)


def check_processor(directory: Path) -> None:
    """Check the settings of an image processor before it is loaded.

    Raises:
        ValueError: It needs code that comes with the checkpoint, or enlarges images beyond the input of any model.
    """
    for file in (directory / name for name in _PROCESSORS):
        if not file.is_file():
            continue
        raw = saved.read(file, dict[str, object])
        named = raw.get("image_processor_type") or raw.get("feature_extractor_type") or raw.get("processor_class")
        # transformers prefers a class of its own to the code that `auto_map` names, if it has a class of this name.
        if "auto_map" in raw and not (isinstance(named, str) and hasattr(transformers, named)):
            raise ValueError(f"{file}: the processor needs code that comes with the checkpoint, which no task runs")
        _check_pixels(raw, file)


def _check_pixels(raw: Mapping[str, object], file: Path) -> None:
    # A list is used instead of recursion, because a file may nest deeper than Python's stack.
    entries: list[tuple[str, object]] = list(raw.items())
    while entries:
        name, value = entries.pop()
        if isinstance(value, Mapping):
            entries += [(f"{name}.{key}", inner) for key, inner in value.items()]
        elif isinstance(value, int | float) and _is_size(name) and value > _MOST_PIXELS:
            raise ValueError(f"{file}: {name:.60} is {value!s:.30}; the maximum is {_MOST_PIXELS:,} pixels")


def _is_size(name: str) -> bool:
    return name.rpartition(".")[2] in _SIZES or name in ("size", "crop_size", "pad_size")
