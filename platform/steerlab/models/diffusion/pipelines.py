"""Diffusion pipelines as modules, which draw when they are called.

`Diffusion` holds a diffusers pipeline; its parts are submodules under the pipeline's own names, and calling it draws. Every
evaluation of the denoiser is a *pass* with a number, its step. Hooks on the denoiser's modules ask `now` which pass runs:
whether it is read, whether patches act, and which rows have a prompt. A guided pass is a batch of two halves, and the
pipeline's class says which of them is conditional. Axes: B images, C channels, H and W pixels.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from steerlab.job import SamplerConfig
from steerlab.models.diffusion.families import FAMILIES
from steerlab.models.diffusion.passes import Pass

_MAX_ENCODED = 4096
"""Prompts whose encodings are kept."""


class Diffusion(nn.Module):
    """A pipeline that draws when it is called, or, without one (`skeleton`), its modules alone."""

    def __init__(self, architecture: str, parts: Mapping[str, nn.Module], pipeline: Any, sampler: SamplerConfig) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.family, self.pipeline, self.sampler = FAMILIES[architecture], pipeline, sampler
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

    def gradient_checkpointing_enable(self, **_options: object) -> None:
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

    def _schedule(self, steps: int | None) -> dict[str, object]:
        sampler, takes = self.sampler, arguments_of(type(self.pipeline))
        settings: dict[str, object] = {"num_inference_steps": steps or sampler.steps, "output_type": "pt"}
        if sampler.timesteps is not None and (steps is None or steps == len(sampler.timesteps)):
            settings["timesteps"] = list(sampler.timesteps)
        if sampler.size is not None:
            settings["height"], settings["width"] = sampler.size
        if "return_dict" in takes:
            settings["return_dict"] = False
        if self.family.gives_arrays:
            settings["output_type"] = "np"
        return settings

    def _conditions(self, prompts: Sequence[str], guided: bool) -> dict[str, object]:
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

    def _leave(self, _module: nn.Module, _args: object, output: Any) -> None:
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
def arguments_of(pipeline: type) -> frozenset[str]:
    """Return the names of the arguments of a pipeline\'s call."""
    return frozenset(inspect.signature(pipeline.__call__).parameters)


def _images(images: Tensor | npt.NDArray[np.float32]) -> Tensor:
    """Return images as (B, C, H, W) in [0, 1], float32."""
    if not isinstance(images, Tensor):
        images = torch.from_numpy(images).movedim(-1, 1)
    return images.float()
