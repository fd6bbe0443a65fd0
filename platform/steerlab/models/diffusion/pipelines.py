"""Diffusion pipelines as modules: loading, samplers, and which rows of a denoiser's call are what.

`Diffusion` holds a diffusers pipeline; its parts are submodules under the pipeline's own names, and calling it draws. Every
evaluation of the denoiser is a *pass* with a number, its step. Hooks on the denoiser's modules ask `now` which pass runs:
whether it is read, whether patches act, and which rows have a prompt. A guided pass is a batch of two halves, and the
pipeline's class says which of them is conditional. Axes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

import importlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from steerlab.guards.faults import explained
from steerlab.job import SamplerConfig
from steerlab.models.diffusion import pipeline_index
from steerlab.models.diffusion.pipeline_index import INDEX

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MAX_ENCODED = 4096
"""Prompts whose encodings are kept."""


@dataclass(frozen=True)
class Pass:
    """One evaluation of the denoiser."""

    step: int
    is_read: bool
    is_steered: bool
    conditional: slice
    """Rows that have a prompt."""
    num_rows: int
    steers_all: bool
    """Whether patches act on the rows without a prompt as well."""
    device: torch.device

    @property
    def num_images(self) -> int:
        """Rows that have a prompt."""
        return len(range(*self.conditional.indices(self.num_rows)))

    def with_prompt(self, value: Tensor) -> Tensor:
        """Return the rows that have a prompt."""
        return value if self.num_images == self.num_rows else value[self.conditional]

    def strengths(self, strength_B: Tensor | None) -> Tensor | None:
        """Spread the strengths of the images over the rows of the pass; None for 1 everywhere."""
        num_images = self.num_images
        if num_images == self.num_rows or (self.steers_all and strength_B is None):
            return strength_B
        each_B = torch.ones(num_images, device=self.device) if strength_B is None else strength_B
        if self.steers_all:
            return torch.cat([each_B] * (self.num_rows // num_images))
        spread_R = torch.zeros(self.num_rows, dtype=each_B.dtype, device=each_B.device)
        spread_R[self.conditional] = each_B
        return spread_R


class _Family(NamedTuple):
    """What is known of a class of pipelines."""

    denoiser: Literal["unet", "transformer"]
    conditional: Literal["first", "second"]
    """Half of a guided batch that has the prompt."""
    encode: Callable[[Any, str, bool], dict[str, Tensor]] | None = None
    """(pipeline, prompt, guided) -> arguments of a call for one prompt, each with the prompt as its first axis; None where the
    pipeline is given the prompts themselves, because what encodes them is trained with the denoiser."""
    shared: Callable[[Any, str], dict[str, Any]] = lambda pipeline, prompt: {}
    """(pipeline, a prompt) -> further arguments, the same for all prompts."""
    gives_arrays: bool = False
    """Images come as NumPy arrays alone."""
    example: Callable[[Any], str] = lambda pipeline: "a photo"
    """A prompt that the pipeline understands."""
    doubles: bool = True
    """Whether guidance above 1 makes a batch of two halves; else it is a number that the denoiser is given."""
    options: Mapping[str, Any] = {}
    """Arguments of loading."""


def _encode_clip(pipeline: Any, prompt: str, guided: bool) -> dict[str, Tensor]:
    found = pipeline.encode_prompt(prompt, pipeline.device, 1, guided, "" if guided else None)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: value for name, value in zip(names, found, strict=True) if value is not None}


def _encode_two_clips(pipeline: Any, prompt: str, guided: bool) -> dict[str, Tensor]:
    found = pipeline.encode_prompt(prompt, device=pipeline.device, do_classifier_free_guidance=guided)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return {name: value for name, value in zip(names, found, strict=True) if value is not None}


def _encode_flux(pipeline: Any, prompt: str, guided: bool) -> dict[str, Tensor]:
    prompt_embeds, pooled, _ = pipeline.encode_prompt(prompt, prompt, max_sequence_length=_flux_length(pipeline))
    return {"prompt_embeds": prompt_embeds, "pooled_prompt_embeds": pooled}


def _flux_length(pipeline: Any) -> int:
    return min(256, pipeline.tokenizer_2.model_max_length)


def _encode_class(pipeline: Any, prompt: str, guided: bool) -> dict[str, Tensor]:
    labels = {name.lower(): number for name, number in pipeline.labels.items()}
    number = int(prompt) if prompt.isdigit() else labels.get(prompt.lower())
    classes = pipeline.transformer.config.num_embeds_ada_norm
    if number is None or not 0 <= number < classes:
        known = f"one of {', '.join(list(pipeline.labels)[:8])}, ... or " if pipeline.labels else ""
        raise ValueError(f"prompt {prompt!r} is no class of the model: give {known}a number from 0 to {classes - 1}")
    return {"class_labels": torch.tensor([number])}


_FAMILIES: dict[str, _Family] = {
    "StableDiffusionPipeline": _Family("unet", "second", _encode_clip, options={"safety_checker": None}),
    "StableDiffusionXLPipeline": _Family("unet", "second", _encode_two_clips),
    "FluxPipeline": _Family(
        "transformer",
        "second",
        _encode_flux,
        lambda pipeline, prompt: {"max_sequence_length": _flux_length(pipeline)},
        doubles=False,
    ),
    # DiTPipeline puts the classes first and the null class behind them.
    "DiTPipeline": _Family("transformer", "first", _encode_class, gives_arrays=True, example=lambda pipeline: "0"),
    "PixelPipeline": _Family("unet", "second", example=lambda pipeline: pipeline.prompts[0]),
}


class Diffusion(nn.Module):
    """A pipeline that draws when it is called, or, without one (`skeleton`), its modules alone."""

    def __init__(self, architecture: str, parts: Mapping[str, nn.Module], pipeline: Any, sampler: SamplerConfig) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.family, self.pipeline, self.sampler = _FAMILIES[architecture], pipeline, sampler
        self.architecture = architecture
        self._here = threading.local()
        self._latest: Pass | None = None
        self._encoded: dict[tuple[str, bool], dict[str, Tensor]] = {}
        self._checkpointing = False
        self.denoiser.register_forward_pre_hook(self._enter, with_kwargs=True)
        self.denoiser.register_forward_hook(self._leave, always_call=True)

    @property
    def denoiser_name(self) -> str:
        """Name of the part that draws: what is read and steered lies in it."""
        return self.family.denoiser

    @property
    def denoiser(self) -> Any:
        """The part that draws."""
        return self.get_submodule(self.family.denoiser)

    @property
    def small_prompt(self) -> str:
        """A prompt that the pipeline understands."""
        return self.family.example(self.pipeline)

    @property
    def config(self) -> Any:
        """The denoiser's config."""
        return self.denoiser.config

    @property
    def device(self) -> torch.device:
        """Device of the denoiser."""
        return next(self.denoiser.parameters()).device

    @property
    def now(self) -> Pass | None:
        """The pass that runs in this thread or, between passes, ran last: the backward pass may compute activations again."""
        return getattr(self._here, "now", self._latest)

    @property
    def num_reads(self) -> int:
        """Passes of a drawing that are read."""
        return len(self.sampler.read)

    def unsteered_share(self) -> str | None:
        """Say on which part of what the denoiser computes patches do not act; None where they act on all of it."""
        sampler = self.sampler
        if sampler.steer is not None and set(sampler.steer) != set(range(sampler.steps)):
            return f"patches act in the steps {list(sampler.steer)} of {sampler.steps} alone (sampler.steer)"
        if self._doubles(sampler.guidance) and not sampler.unconditional:
            return f"at guidance {sampler.guidance:g} the half without a prompt is not steered (sampler.unconditional)"
        return None

    def _doubles(self, guidance: float) -> bool:
        """Say whether a guided step is a batch of two halves."""
        # A denoiser that takes the scale as a condition (latent consistency models) draws with one.
        return guidance > 1 and self.family.doubles and getattr(self.config, "time_cond_proj_dim", None) is None

    def loading_lines(self, directory: Path) -> str:
        """Return Python that loads what the pipeline's library wrote, and draws as the sampler says."""
        kind, sampler = type(self.pipeline), self.sampler
        module = "diffusers" if kind.__module__.startswith("diffusers.") else kind.__module__
        settings = {
            "num_inference_steps": sampler.steps,
            "timesteps": None if sampler.timesteps is None else list(sampler.timesteps),
            "guidance_scale": sampler.guidance,
            "height": sampler.size and sampler.size[0],
            "width": sampler.size and sampler.size[1],
        }
        prompt = int(self.small_prompt) if self.small_prompt.isdigit() else self.small_prompt  # a class by its number
        given = ", ".join(f"{name}={value!r}" for name, value in settings.items() if value is not None)
        return (
            f"from {module} import {kind.__name__}\n"
            f"pipeline = {kind.__name__}.from_pretrained({str(directory)!r})\n"
            f"images = pipeline([{prompt!r}], {given})[0]"
        )

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are computed again in the backward pass."""
        return self._checkpointing

    def gradient_checkpointing_enable(self, **_options: Any) -> None:
        """Compute activations again in the backward pass.

        Raises:
            ValueError: patches act in some steps only, and what is computed again does not know its step.
        """
        if self.sampler.steer is not None:
            raise ValueError(
                f"scale.gradient_checkpointing with model.sampler.steer {list(self.sampler.steer)}: what is computed again "
                "does not know its step; steer all steps or leave checkpointing off"
            )
        self.denoiser.enable_gradient_checkpointing()
        self._checkpointing = True

    def forward(
        self, prompts: Sequence[str], seeds: Sequence[int], guidance: float | None = None, steps: int | None = None
    ) -> Tensor:
        """Draw an image for each prompt from the noise of its seed, (B, C, H, W) in [0, 1].

        `guidance` and `steps` take the place of the sampler's.

        Raises:
            FloatingPointError: the denoiser gives NaN or infinite values; step and seed are named.
        """
        guidance = self.sampler.guidance if guidance is None else guidance
        here = self._here
        here.step, here.seeds = -1, list(seeds)
        arguments = {
            **self._conditions(prompts, self._doubles(guidance)),
            **self._schedule(steps),
            "guidance_scale": guidance,
            "generator": [torch.Generator().manual_seed(int(seed)) for seed in seeds],
        }
        call = inspect.unwrap(type(self.pipeline).__call__)  # without torch.no_grad, which diffusers wraps around it
        try:
            images_BCHW = _images(call(self.pipeline, **arguments)[0])
            self._check_finite(images_BCHW, "the image is NaN or infinite behind the denoiser (scheduler or decoder),")
            return images_BCHW
        except (ValueError, TypeError) as error:
            if "timesteps" in str(error) and self.sampler.timesteps is not None:
                raise ValueError(f"sampler.timesteps: {error}") from None
            raise
        finally:
            here.seeds = None

    def _schedule(self, steps: int | None) -> dict[str, Any]:
        sampler, takes = self.sampler, _arguments(type(self.pipeline))
        found: dict[str, Any] = {"num_inference_steps": steps or sampler.steps, "output_type": "pt"}
        if sampler.timesteps is not None and (steps is None or steps == len(sampler.timesteps)):
            found["timesteps"] = list(sampler.timesteps)
        if sampler.size is not None:
            found["height"], found["width"] = sampler.size
        if "return_dict" in takes:
            found["return_dict"] = False
        if self.family.gives_arrays:
            found["output_type"] = "np"
        return found

    def _conditions(self, prompts: Sequence[str], guided: bool) -> dict[str, Any]:
        """Return what a call is given of the prompts; text encoders, which are frozen, run once a prompt."""
        encode = self.family.encode
        if encode is None:
            return {"prompt": list(prompts)}
        found = []
        for prompt in prompts:
            if (prompt, guided) not in self._encoded:
                if len(self._encoded) >= _MAX_ENCODED:
                    self._encoded.clear()
                with torch.no_grad():
                    self._encoded[prompt, guided] = encode(self.pipeline, prompt, guided)
            found.append(self._encoded[prompt, guided])
        joined = {name: torch.cat([one[name] for one in found]) for name in found[0]}
        if "class_labels" in joined:
            return {"class_labels": joined["class_labels"].tolist()}
        return {**joined, **self.family.shared(self.pipeline, prompts[0])}

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Note which pass begins; without a drawing (training) there is none."""
        here = self._here
        if getattr(here, "seeds", None) is None:
            return
        here.step += 1
        num_rows, num_images = len(args[0] if args else next(iter(kwargs.values()))), len(here.seeds)
        if num_rows not in (num_images, 2 * num_images):
            raise ValueError(f"{self.architecture} evaluates {num_rows} rows for {num_images} images: unknown what they are")
        half = slice(0, num_images) if num_rows == num_images or self.family.conditional == "first" else slice(num_images, None)
        sampler, step = self.sampler, here.step
        steered = sampler.steer is None or step in sampler.steer
        here.now = Pass(step, step in sampler.read, steered, half, num_rows, sampler.unconditional, self.device)
        self._latest = here.now
        through = sampler.differentiate
        here.grad = None
        if through is not None and step not in through and torch.is_grad_enabled():
            here.grad = torch.is_grad_enabled()
            torch.set_grad_enabled(False)

    def _leave(self, _module: nn.Module, _args: Any, output: Any) -> None:
        here = self._here
        if getattr(here, "seeds", None) is None:
            return
        if here.grad is not None:
            torch.set_grad_enabled(here.grad)
        if output is None:
            return  # an error, or a reader that has all it wants
        self._check_finite(output[0], "the denoiser gives a NaN or infinite value for the image")

    def _check_finite(self, value_R: Tensor, what: str) -> None:
        """Name step and seed of the first row that is not finite; rows are images, once or twice."""
        here = self._here
        good_R = value_R.detach().flatten(1).isfinite().all(1)
        if not bool(good_R.all()):
            row = int(good_R.int().argmin()) % len(here.seeds)
            raise FloatingPointError(f"step {here.step}: {what} of seed {here.seeds[row]}")


@cache
def _arguments(pipeline: type[Any]) -> frozenset[str]:
    return frozenset(inspect.signature(pipeline.__call__).parameters)


def _images(found: Any) -> Tensor:
    """Return images as (B, C, H, W) in [0, 1], float32."""
    if not isinstance(found, Tensor):
        found = torch.from_numpy(found).movedim(-1, 1)
    return found.float()


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
    name, kind = _class_of(directory)
    family = _FAMILIES[name]
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
    name, _ = _class_of(directory)
    for file in sorted((directory / _FAMILIES[name].denoiser).glob("*.safetensors")):
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
    name, _ = _class_of(directory)
    with torch.device("meta"), explained(f"the pipeline in {directory}"):
        parts = dict(_parts(directory, with_scheduler=False))
        return Diffusion(name, parts, None, SamplerConfig.model_validate({}))


def set_scheduler(pipeline: Any, sampler: SamplerConfig) -> None:
    """Give a pipeline the scheduler of a job, made from the settings of its own.

    Raises:
        ValueError: there is no such scheduler, the pipeline cannot take it, or it knows no such setting or no timesteps.
    """
    pipeline.scheduler = scheduler_like(pipeline.scheduler, sampler)


def scheduler_like(own: Any, sampler: SamplerConfig) -> Any:
    """Return the scheduler that a sampler asks for in place of a pipeline's own; `set_scheduler` says what is refused."""
    import diffusers
    from diffusers.schedulers.scheduling_utils import SchedulerMixin

    kind: Any = type(own) if sampler.scheduler is None else getattr(diffusers, sampler.scheduler, None)
    if not _is_a(kind, SchedulerMixin):
        raise ValueError(
            f"sampler.scheduler {sampler.scheduler!r} is no scheduler of diffusers; the pipeline's is {type(own).__name__}"
        )
    mine, others = {type(own).__name__, *own._compatibles}, {kind.__name__, *kind._compatibles}
    listed = type(own).__name__ in others or kind.__name__ in mine
    # Those that diffusers lists nowhere (LCM, TCD) go with schedules of the same sort: of betas, or of flows.
    if not listed and _follows_betas(type(own)) != _follows_betas(kind):
        raise ValueError(
            f"sampler.scheduler {kind.__name__}: the pipeline cannot take it in place of its {type(own).__name__}; it takes "
            f"{', '.join(sorted(mine))}"
        )
    unknown = [name for name in sampler.options if name not in inspect.signature(kind.__init__).parameters]
    if unknown:
        raise ValueError(f"sampler.options.{unknown[0]}: {kind.__name__} has no such setting")
    if sampler.timesteps is not None and "timesteps" not in inspect.signature(kind.set_timesteps).parameters:
        raise ValueError(f"sampler.timesteps: {kind.__name__} takes a number of steps only")
    return kind.from_config(own.config, **sampler.options)


def _is_a(kind: Any, parent: type[Any]) -> bool:
    return inspect.isclass(kind) and issubclass(kind, parent)


def _follows_betas(kind: Any) -> bool:
    return "beta_start" in inspect.signature(kind.__init__).parameters


def check_scheduler(directory: Path, sampler: SamplerConfig) -> None:
    """Refuse a sampler that a pipeline in a directory cannot take, without loading weights. Raises ValueError."""
    _, kind = _class_of(directory)
    own = next(part for _, part in _parts(directory, only=("scheduler",)))
    scheduler_like(own, sampler)
    takes = _arguments(kind)
    for setting, argument in (("timesteps", "timesteps"), ("size", "height")):
        if getattr(sampler, setting) is not None and argument not in takes:
            raise ValueError(f"sampler.{setting}: a {kind.__name__} has no such setting")


def _class_of(directory: Path) -> tuple[str, type[Any]]:
    """Return the name and the class of a pipeline; diffusers is imported here, where it is needed."""
    import diffusers
    from diffusers.utils import logging as diffusers_logging

    from steerlab.models.pixel_pipeline import PixelPipeline

    diffusers_logging.disable_progress_bar()
    name = pipeline_index.read(directory).get("_class_name")
    if not isinstance(name, str) or name not in _FAMILIES:
        raise ValueError(f"{directory}: pipelines of class {name!s:.80} are not known here; known: {', '.join(_FAMILIES)}")
    return name, PixelPipeline if name == PixelPipeline.__name__ else getattr(diffusers, name)


def _parts(directory: Path, only: Sequence[str] = (), with_scheduler: bool = True) -> Iterator[tuple[str, Any]]:
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


def _assembled(directory: Path, kind: type[Any], dtype: torch.dtype) -> Any:
    """Make a pipeline of embedded configs, none of which needs a tokenizer."""
    index = pipeline_index.read(directory)
    settings = {name: value for name, value in index.items() if name == "classes"}
    parts = dict(_parts(directory))
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
