"""Load diffusion pipelines from disk, build them without weights, and check them before loading."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from steerlab.guards import late
from steerlab.guards.faults import explained
from steerlab.job import SamplerConfig
from steerlab.models.diffusion import pipeline_index
from steerlab.models.diffusion.families import FAMILIES
from steerlab.models.diffusion.pipeline_index import INDEX
from steerlab.models.diffusion.pipelines import Diffusion, arguments_of
from steerlab.models.diffusion.schedulers import scheduler_like, set_scheduler

if TYPE_CHECKING:
    import transformers
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
else:
    transformers = late.module("transformers")

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_pipeline(directory: Path) -> bool:
    """Return whether a directory holds a diffusion pipeline."""
    return (directory / INDEX).is_file()


def load(
    directory: Path, sampler: SamplerConfig, *, dtype: str = "float32", seed: int = 0, denoiser: Path | None = None
) -> Diffusion:
    """Load a pipeline in evaluation mode.

    Args:
        directory: Folder with a `model_index.json`.
        sampler: Scheduler, number of steps and guidance of the drawings.
        dtype: Type of the weights: float32, bfloat16 or float16.
        seed: Seed of the initial weights, if the folder holds configs only.
        denoiser: A safetensors file whose weights replace those of the denoiser; None uses the saved ones.

    Raises:
        ValueError: The pipeline's class is unknown, it cannot take the scheduler, or the weights are of another denoiser.
    """
    name, kind = class_of(directory)
    family = FAMILIES[name]
    if any((directory / family.denoiser).glob("*.safetensors")):
        with explained(f"the pipeline {directory}"):
            pipeline = kind.from_pretrained(directory, dtype=_DTYPES[dtype], **family.options)
    else:
        # The caller's random numbers must not depend on whether weights were initialised here.
        with torch.random.fork_rng(), explained(f"the pipeline {directory}"):
            torch.manual_seed(seed)
            pipeline = _assembled(directory, kind, _DTYPES[dtype])
    if denoiser is not None:
        _load_denoiser(getattr(pipeline, family.denoiser), denoiser)
    set_scheduler(pipeline, sampler)
    pipeline.set_progress_bar_config(disable=True)
    parts = {part: module.eval() for part, module in pipeline.components.items() if isinstance(module, nn.Module)}
    return Diffusion(name, parts, pipeline, sampler)


def saved_dtype(directory: Path) -> str:
    """Return the type in which the denoiser's weights were saved; float32 if the folder holds no weights."""
    name, _ = class_of(directory)
    for file in sorted((directory / FAMILIES[name].denoiser).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            # The first tensor is enough, because diffusers saves all weights of a component in one type.
            for weight in opened.keys():  # noqa: SIM118
                return str(opened.get_tensor(weight).dtype).removeprefix("torch.")
    return "float32"


def skeleton(directory: Path) -> Diffusion:
    """Return a pipeline's modules on the meta device, which hold shapes but no values. Callers share the result."""
    # The contents of the configs are part of the cache's key, so that a changed file gives another skeleton.
    files = sorted((directory / INDEX, *directory.glob("*/*.json")))
    return _skeleton(directory, tuple((file.name, file.read_bytes()) for file in files if file.is_file()))


@lru_cache(maxsize=8)
def _skeleton(directory: Path, configs: tuple[tuple[str, bytes], ...]) -> Diffusion:
    name, _ = class_of(directory)
    with torch.device("meta"), explained(f"the pipeline in {directory}"):
        parts = {part: module for part, module in parts_of(directory, with_scheduler=False) if isinstance(module, nn.Module)}
        return Diffusion(name, parts, None, SamplerConfig.model_validate({}))


def check_scheduler(directory: Path, sampler: SamplerConfig) -> None:
    """Raise ValueError if the pipeline in `directory` cannot take the sampler's settings, without loading weights."""
    _, kind = class_of(directory)
    own = next(part for _, part in parts_of(directory, only=("scheduler",)))
    scheduler_like(own, sampler)
    takes = arguments_of(kind)
    for setting, argument in (("timesteps", "timesteps"), ("size", "height")):
        if getattr(sampler, setting) is not None and argument not in takes:
            raise ValueError(f"sampler.{setting}: a {kind.__name__} has no such setting")


def class_of(directory: Path) -> tuple[str, type[DiffusionPipeline]]:
    """Return the name and the class of the pipeline in `directory`. Raises ValueError if the class is unknown."""
    # diffusers takes seconds to import, and jobs with language models do not need it.
    import diffusers
    from diffusers.utils import logging as diffusers_logging

    from steerlab.models.pixel_pipeline import PixelPipeline

    diffusers_logging.disable_progress_bar()
    name = pipeline_index.read(directory).get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"{directory}: pipelines of class {name!s:.80} are not supported; supported: {', '.join(FAMILIES)}")
    return name, PixelPipeline if name == PixelPipeline.__name__ else getattr(diffusers, name)


def parts_of(
    directory: Path, only: Sequence[str] = (), with_scheduler: bool = True
) -> Iterator[tuple[str, nn.Module | SchedulerMixin]]:
    """Yield the name and the new instance, with random weights, of each module and the scheduler, built from their configs.

    `only` restricts the names; empty means all.
    """
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    for name, (library, kind) in pipeline_index.components(pipeline_index.read(directory)):
        part_class = getattr(importlib.import_module(library), kind, None) if library in pipeline_index.LIBRARIES else None
        if not inspect.isclass(part_class) or (only and name not in only):
            continue
        with explained(f"the component {directory / name}"):
            if issubclass(part_class, transformers.PreTrainedModel):
                part = part_class(transformers.AutoConfig.from_pretrained(directory / name, trust_remote_code=False))
            elif issubclass(part_class, ModelMixin) or (with_scheduler and issubclass(part_class, SchedulerMixin)):
                part = part_class.from_config(part_class.load_config(directory / name))  # type: ignore[union-attr]
            else:  # a tokenizer or an image processor, or the scheduler of a skeleton
                continue
        yield name, part


def _assembled(directory: Path, kind: type[DiffusionPipeline], dtype: torch.dtype) -> DiffusionPipeline:
    """Return a pipeline with random weights, built from the configs of its components. It has no tokenizer."""
    index = pipeline_index.read(directory)
    settings = {name: value for name, value in index.items() if name == "classes"}
    parts = dict(parts_of(directory))
    if dtype != torch.float32:
        parts = {name: part.to(dtype) if isinstance(part, nn.Module) else part for name, part in parts.items()}
    return kind(**parts, **settings)


def _load_denoiser(denoiser: nn.Module, path: Path) -> None:
    """Replace a denoiser's weights by those of a safetensors file. Raises ValueError if names or shapes differ."""
    if path.suffix != ".safetensors":
        raise ValueError(
            f"sampler.denoiser {path.name}: weights are read from safetensors only, not from a pickle; convert the file"
        )
    # A pickle may run any code when it is loaded; a safetensors file cannot.
    weights, expected = load_file(path), denoiser.state_dict()
    missing = [name for name in expected if name not in weights]
    other = [n for n, w in weights.items() if n not in expected or expected[n].shape != w.shape]
    if missing or other:
        raise ValueError(
            f"sampler.denoiser {path.name} holds the weights of another denoiser than this {type(denoiser).__name__}: "
            f"{len(missing)} are missing, {len(other)} do not fit (first: {(missing + other)[0]})"
        )
    denoiser.load_state_dict({name: weight.to(expected[name].dtype) for name, weight in weights.items()})
