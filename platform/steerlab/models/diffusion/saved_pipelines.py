"""Pipelines on disk: loading them, their sizes without weights, and what is checked before."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from steerlab.guards.faults import explained
from steerlab.job import SamplerConfig
from steerlab.models.diffusion import pipeline_index
from steerlab.models.diffusion.families import FAMILIES
from steerlab.models.diffusion.pipeline_index import INDEX
from steerlab.models.diffusion.pipelines import Diffusion, arguments_of
from steerlab.models.diffusion.schedulers import scheduler_like, set_scheduler

if TYPE_CHECKING:
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def is_pipeline(directory: Path) -> bool:
    """Say whether a directory holds a pipeline."""
    return (directory / INDEX).is_file()


def load(
    directory: Path, sampler: SamplerConfig, *, dtype: str = "float32", seed: int = 0, denoiser: Path | None = None
) -> Diffusion:
    """Load a pipeline in evaluation mode; one without weights is initialised from `seed`. `denoiser` is a safetensors file.

    Raises:
        ValueError: a pipeline of an unknown class, a scheduler that it cannot take, or weights of another denoiser.
    """
    name, kind = class_of(directory)
    family = FAMILIES[name]
    if any((directory / family.denoiser).glob("*.safetensors")):
        with explained(f"the pipeline {directory}"):
            pipeline = kind.from_pretrained(directory, dtype=_DTYPES[dtype], **family.options)
    else:
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
    """Return the type in which the denoiser's weights were saved; float32 where there are none."""
    name, _ = class_of(directory)
    for file in sorted((directory / FAMILIES[name].denoiser).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            for weight in opened.keys():  # noqa: SIM118
                return str(opened.get_tensor(weight).dtype).removeprefix("torch.")
    return "float32"


def skeleton(directory: Path) -> Diffusion:
    """Return a pipeline's modules without any weights, to be read only."""
    files = sorted((directory / INDEX, *directory.glob("*/*.json")))
    return _skeleton(directory, tuple((file.name, file.read_bytes()) for file in files if file.is_file()))


@lru_cache(maxsize=8)
def _skeleton(directory: Path, configs: tuple[tuple[str, bytes], ...]) -> Diffusion:
    name, _ = class_of(directory)
    with torch.device("meta"), explained(f"the pipeline in {directory}"):
        parts = {part: module for part, module in parts_of(directory, with_scheduler=False) if isinstance(module, nn.Module)}
        return Diffusion(name, parts, None, SamplerConfig.model_validate({}))


def check_scheduler(directory: Path, sampler: SamplerConfig) -> None:
    """Refuse a sampler that a pipeline in a directory cannot take, without loading weights. Raises ValueError."""
    _, kind = class_of(directory)
    own = next(part for _, part in parts_of(directory, only=("scheduler",)))
    scheduler_like(own, sampler)
    takes = arguments_of(kind)
    for setting, argument in (("timesteps", "timesteps"), ("size", "height")):
        if getattr(sampler, setting) is not None and argument not in takes:
            raise ValueError(f"sampler.{setting}: a {kind.__name__} has no such setting")


def class_of(directory: Path) -> tuple[str, type[DiffusionPipeline]]:
    """Return the name and the class of a pipeline; diffusers is imported here, where it is needed."""
    import diffusers
    from diffusers.utils import logging as diffusers_logging

    from steerlab.models.pixel_pipeline import PixelPipeline

    diffusers_logging.disable_progress_bar()
    name = pipeline_index.read(directory).get("_class_name")
    if not isinstance(name, str) or name not in FAMILIES:
        raise ValueError(f"{directory}: pipelines of class {name!s:.80} are not known here; known: {', '.join(FAMILIES)}")
    return name, PixelPipeline if name == PixelPipeline.__name__ else getattr(diffusers, name)


def parts_of(
    directory: Path, only: Sequence[str] = (), with_scheduler: bool = True
) -> Iterator[tuple[str, nn.Module | SchedulerMixin]]:
    """Make the modules and the scheduler of a pipeline from their configs."""
    from diffusers.models.modeling_utils import ModelMixin
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    for name, (library, kind) in pipeline_index.components(pipeline_index.read(directory)):
        made = getattr(importlib.import_module(library), kind, None) if library in pipeline_index.LIBRARIES else None
        if not inspect.isclass(made) or (only and name not in only):
            continue
        with explained(f"the component {directory / name}"):
            if issubclass(made, transformers.PreTrainedModel):
                part = made(transformers.AutoConfig.from_pretrained(directory / name, trust_remote_code=False))
            elif issubclass(made, ModelMixin) or (with_scheduler and issubclass(made, SchedulerMixin)):
                part = made.from_config(made.load_config(directory / name))  # type: ignore[union-attr]
            else:
                continue
        yield name, part


def _assembled(directory: Path, kind: type[DiffusionPipeline], dtype: torch.dtype) -> DiffusionPipeline:
    """Make a pipeline of embedded configs, none of which needs a tokenizer."""
    index = pipeline_index.read(directory)
    settings = {name: value for name, value in index.items() if name == "classes"}
    parts = dict(parts_of(directory))
    if dtype != torch.float32:
        parts = {name: part.to(dtype) if isinstance(part, nn.Module) else part for name, part in parts.items()}
    return kind(**parts, **settings)


def _load_denoiser(denoiser: nn.Module, path: Path) -> None:
    if path.suffix != ".safetensors":
        raise ValueError(f"sampler.denoiser {path.name}: weights are read from safetensors only, no pickle; convert the file")
    weights, expected = load_file(path), denoiser.state_dict()
    missing = [name for name in expected if name not in weights]
    other = [n for n, w in weights.items() if n not in expected or expected[n].shape != w.shape]
    if missing or other:
        raise ValueError(
            f"sampler.denoiser {path.name} holds the weights of another denoiser than this {type(denoiser).__name__}: "
            f"{len(missing)} are missing, {len(other)} do not fit (first: {(missing + other)[0]})"
        )
    denoiser.load_state_dict({name: weight.to(expected[name].dtype) for name, weight in weights.items()})
