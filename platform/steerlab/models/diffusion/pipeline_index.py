"""The index of a diffusion pipeline's folder: its class, and the library and class of each component."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from steerlab.guards import counts, files, kernels, saved
from steerlab.guards.files import escapes

INDEX = "model_index.json"
"""The file by which a directory is a pipeline."""
OWN = "steerlab.pixels"
"""What files call the module pixel_pipeline.py, wherever it stands: folders that were written once stay readable."""
LIBRARIES = ("diffusers", "transformers", OWN)
"""Where the classes of components come from."""


def components(index: Mapping[str, object]) -> Iterator[tuple[str, tuple[str, str]]]:
    """Yield the components that an index names: library and class."""
    for name, entry in index.items():
        if isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], str):
            yield name, (entry[0], entry[1])


def read(directory: Path) -> dict[str, object]:
    """Read a pipeline's index, which is a stranger's file: diffusers would import any module that it names.

    Raises:
        ValueError: it is no JSON object, names a class of another library, or a component brings code or an adapter.
    """
    from diffusers import pipelines as published

    file = directory / INDEX
    try:
        index = json.loads(files.read(file))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error!s:.100}") from None
    if not isinstance(index, dict):
        raise ValueError(f"{file} holds no JSON object")
    for name, (library, kind) in components(index):
        if library not in LIBRARIES and not inspect.ismodule(getattr(published, library, None)):
            raise ValueError(
                f"{file}: {name!r:.80} is a {library:.80}.{kind:.80}; components are classes of {', '.join(LIBRARIES)} only"
            )
        if escapes(name):
            raise ValueError(f"{file}: the component {name!r:.80} lies outside of the pipeline's folder")
        _check_component(directory / name)
    return index


class _Index(saved.Shape):
    weight_map: dict[str, saved.Inside]


def _check_component(component: Path) -> None:
    """Refuse Python files, configs that name code (transformers asks on standard input whether it may run it), adapters, which
    it would put in unasked, weights of other folders, kernels of a hub, and numbers of parts that no model has."""
    if (component / "adapter_config.json").exists():
        raise ValueError(
            f"{component} holds an adapter (adapter_config.json), which transformers would put into the component: merge it "
            "with peft, or take the adapter's files away"
        )
    for file in sorted(component.rglob("*.py")) if component.is_dir() else ():
        raise ValueError(f"{file}: a pipeline's components bring no code of their own")
    for file in sorted(component.glob("*config.json")) if component.is_dir() else ():
        try:
            config = json.loads(files.read(file))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{file} is not JSON: {error!s:.100}") from None
        if isinstance(config, dict) and "auto_map" in config:
            raise ValueError(f"{file}: a pipeline's components bring no code of their own (auto_map)")
        counts.check_counts(config, str(file))
        kernels.check_kernels(config, str(file))
    for file in sorted(component.glob("*.index.json")) if component.is_dir() else ():
        saved.read(file, _Index)
