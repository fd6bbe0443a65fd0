"""The index of a diffusion pipeline's folder: its class, and the library and class of each component."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from steerlab.guards import counts, files, kernels, saved
from steerlab.guards.files import escapes

INDEX = "model_index.json"
"""Name of the index; a directory that holds this file is a pipeline."""
OWN = "steerlab.pixels"
"""Name of the module pixel_pipeline.py in saved indices. It stays the same when the file moves, so old folders still load."""
LIBRARIES = ("diffusers", "transformers", OWN)
"""Libraries whose classes a component may have."""


def components(index: Mapping[str, object]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the name of each component of an index, with its library and class."""
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], str):
            yield name, (entry[0], entry[1])


def read(directory: Path) -> dict[str, object]:
    """Read a pipeline's index and check the files of its components, which may come from an untrusted source.

    Raises:
        ValueError: The index is not a JSON object or names a class of another library, or a component holds code or an
            adapter.
    """
    from diffusers import pipelines as published

    file = directory / INDEX
    try:
        index = json.loads(files.read(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error!s:.100}") from None
    if not isinstance(index, dict):
        raise ValueError(f"{file} does not hold a JSON object")
    for name, (library, kind) in components(index):
        # diffusers imports any module that the index names. It also accepts its own pipeline modules as libraries, for classes
        # that are defined beside a pipeline.
        if library not in LIBRARIES and not inspect.ismodule(getattr(published, library, None)):
            raise ValueError(
                f"{file}: {name!r:.80} is a {library:.80}.{kind:.80}; components are classes of {', '.join(LIBRARIES)} only"
            )
        if escapes(name):
            raise ValueError(f"{file}: the component {name!r:.80} is outside the pipeline's folder")
        _check_component(directory / name)
    return index


class _Index(saved.Shape):
    weight_map: dict[str, saved.Inside]


def _check_component(component: Path) -> None:
    """Raise ValueError if a component holds code, an adapter, kernels of a hub, weights outside its folder or absurd sizes."""
    # transformers merges an adapter that is beside a config into the model without a request.
    if (component / "adapter_config.json").exists():
        raise ValueError(
            f"{component} holds an adapter (adapter_config.json), which transformers would put into the component: merge it "
            "with peft, or remove the adapter's files"
        )
    for file in sorted(component.rglob("*.py")) if component.is_dir() else ():
        raise ValueError(f"{file}: a pipeline's components may not bring code of their own")
    for file in sorted(component.glob("*config.json")) if component.is_dir() else ():
        try:
            config = json.loads(files.read(file))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON: {error!s:.100}") from None
        # For a config with auto_map, transformers asks on standard input whether it may run the code, and a worker would hang.
        if isinstance(config, dict) and "auto_map" in config:
            raise ValueError(f"{file}: a pipeline's components may not bring code of their own (auto_map)")
        counts.check_counts(config, str(file))
        kernels.check_kernels(config, str(file))
    for file in sorted(component.glob("*.index.json")) if component.is_dir() else ():
        saved.read(file, _Index)
