"""Diffusion pipelines as modules: calling one draws images.

`Diffusion` holds a diffusers pipeline. The pipeline's components are submodules with the pipeline's own names. Each evaluation
of the denoiser is a *pass*, numbered by its step. Hooks on the denoiser's modules read the property `now` to learn which pass
runs: whether its activations are recorded, whether patches act, and which rows have a prompt. Under classifier-free guidance a
pass is a batch of two halves, and the pipeline's family (`families.py`) determines which half has the prompt.
Axes: B images, C channels, H and W pixels, R rows of a batch (B or 2 B).
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
"""Number of prompts whose encodings are cached."""


class Diffusion(nn.Module):
    """A diffusion pipeline as a module. Without a pipeline (see `skeleton`) it holds the modules only and cannot draw."""

    def __init__(self, architecture: str, parts: Mapping[str, nn.Module], pipeline: Any, sampler: SamplerConfig) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)
        self.family, self.pipeline, self.sampler = FAMILIES[architecture], pipeline, sampler
        self.architecture = architecture
        # Several threads may call one model at a time (methods/math/sequential_fit.py), each in a step of its own.
        self._here = threading.local()
        self._latest: Pass | None = None
        self._encoded: dict[tuple[str, bool], dict[str, Tensor]] = {}
        self._checkpointing = False
        self.denoiser.register_forward_pre_hook(self._enter, with_kwargs=True)
        # With `always_call`, `_leave` turns gradients on again even if the denoiser raises an error.
        self.denoiser.register_forward_hook(self._leave, always_call=True)

    @property
    def denoiser_name(self) -> str:
        """Name of the denoiser among the components; all modules that are read or steered are in it."""
        return self.family.denoiser

    @property
    def denoiser(self) -> Any:
        """The component that predicts the noise."""
        return self.get_submodule(self.family.denoiser)

    @property
    def small_prompt(self) -> str:
        """A prompt that the pipeline accepts, for test calls."""
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
        """The pass that runs in this thread; otherwise the pass that began last in any thread; None before the first pass."""
        # With gradient checkpointing autograd computes activations again after the pass, on a GPU in a thread of its own.
        return getattr(self._here, "now", self._latest)

    @property
    def num_reads(self) -> int:
        """Number of steps of one drawing whose activations are recorded."""
        return len(self.sampler.read)

    def unsteered_share(self) -> str | None:
        """Describe the steps or rows on which patches do not act; None if they act on all."""
        sampler = self.sampler
        if sampler.steer is not None and set(sampler.steer) != set(range(sampler.steps)):
            return f"patches act in the steps {list(sampler.steer)} of {sampler.steps} only (sampler.steer)"
        if self._doubles(sampler.guidance) and not sampler.unconditional:
            return f"at guidance {sampler.guidance:g} the half without a prompt is not steered (sampler.unconditional)"
        return None

    def _doubles(self, guidance: float) -> bool:
        """Return whether the denoiser evaluates each image twice, with and without its prompt."""
        # Latent consistency models take the guidance scale as an input of the denoiser (`time_cond_proj_dim`) and run once.
        return guidance > 1 and self.family.doubles and getattr(self.config, "time_cond_proj_dim", None) is None

    def loading_lines(self, directory: Path) -> str:
        """Return Python code that loads a pipeline saved in `directory` and draws with the settings of the sampler."""
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
        arguments = ", ".join(f"{name}={value!r}" for name, value in settings.items() if value is not None)
        return (
            f"from {module} import {kind.__name__}\n"
            f"pipeline = {kind.__name__}.from_pretrained({str(directory)!r})\n"
            f"images = pipeline([{prompt!r}], {arguments})[0]"
        )

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether the backward pass computes activations again instead of storing them."""
        return self._checkpointing

    def gradient_checkpointing_enable(self, **_options: object) -> None:
        """Let the backward pass compute activations again instead of storing them, which saves memory.

        Raises:
            ValueError: Patches act in some steps only: activations computed again do not know their step.
        """
        if self.sampler.steer is not None:
            raise ValueError(
                f"scale.gradient_checkpointing with model.sampler.steer {list(self.sampler.steer)}: activations computed again "
                "do not know their step; steer all steps or turn checkpointing off"
            )
        self.denoiser.enable_gradient_checkpointing()
        self._checkpointing = True

    def forward(
        self, prompts: Sequence[str], seeds: Sequence[int], guidance: float | None = None, steps: int | None = None
    ) -> Tensor:
        """Draw one image for each prompt, starting from the noise of its seed.

        Args:
            prompts: One prompt for each image.
            seeds: Seed of the noise for each image.
            guidance: Guidance scale; None is that of the sampler.
            steps: Number of denoising steps; None is that of the sampler.

        Returns:
            Images (B, C, H, W), float32 in [0, 1].

        Raises:
            FloatingPointError: The denoiser returns NaN or infinite values; the message names the step and the seed.
        """
        guidance = self.sampler.guidance if guidance is None else guidance
        here = self._here
        here.step, here.seeds, here.good = -1, list(seeds), []
        arguments = {
            **self._conditions(prompts, self._doubles(guidance)),
            **self._schedule(steps),
            "guidance_scale": guidance,
            # The generators are on the CPU, so that a seed gives the same noise on every device and in every batch.
            "generator": [torch.Generator().manual_seed(int(seed)) for seed in seeds],
        }
        # diffusers wraps the call in torch.no_grad, but gradients flow through the denoiser here.
        call = inspect.unwrap(type(self.pipeline).__call__)
        try:
            try:
                images_BCHW = _images(call(self.pipeline, **arguments)[0])
            finally:
                # The check also runs after the reader of activations has ended the drawing by an exception.
                self._check_passes()
            what = "the image is NaN or infinite after the denoiser (scheduler or decoder),"
            self._refuse(here.step, _finite(images_BCHW), what)
            return images_BCHW
        except (ValueError, TypeError) as error:
            # A scheduler may refuse the values only when it is called, and the message has to name the setting.
            if "timesteps" in str(error) and self.sampler.timesteps is not None:
                raise ValueError(f"sampler.timesteps: {error}") from None
            raise
        finally:
            here.seeds = None  # the drawing is over: a later call of the denoiser alone is not a pass

    def _schedule(self, steps: int | None) -> dict[str, object]:
        """Return the arguments of the pipeline's call that set steps, size and kind of output."""
        sampler, takes = self.sampler, arguments_of(type(self.pipeline))
        # A list of timesteps has the sampler's number of steps, so a call with another number does not use the list.
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
        """Return the arguments of the call that hold the prompts, as text or encoded."""
        encode = self.family.encode
        if encode is None:
            return {"prompt": list(prompts)}
        conditions = []
        # Text encoders are frozen, so each prompt is encoded once.
        for prompt in prompts:
            if (prompt, guided) not in self._encoded:
                if len(self._encoded) >= _MAX_ENCODED:
                    self._encoded.clear()
                with torch.no_grad():
                    self._encoded[prompt, guided] = encode(self.pipeline, prompt, guided)
            conditions.append(self._encoded[prompt, guided])
        joined = {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}
        if "class_labels" in joined:  # DiTPipeline takes a list of numbers (diffusers 0.42)
            return {"class_labels": joined["class_labels"].tolist()}
        return {**joined, **self.family.shared(self.pipeline, prompts[0])}

    def _enter(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Set `now` to the pass that begins, if a drawing runs in this thread."""
        here = self._here
        if getattr(here, "seeds", None) is None:  # the denoiser is called on its own: by training, or to compute again
            return
        here.step += 1
        num_rows, num_images = len(args[0] if args else next(iter(kwargs.values()))), len(here.seeds)
        if num_rows not in (num_images, 2 * num_images):
            raise ValueError(f"{self.architecture} evaluates {num_rows} rows for {num_images} images, which is not supported")
        half = slice(0, num_images) if num_rows == num_images or self.family.conditional == "first" else slice(num_images, None)
        sampler, step = self.sampler, here.step
        steered = sampler.steer is None or step in sampler.steer
        here.now = Pass(step, step in sampler.read, steered, half, num_rows, sampler.unconditional, self.device)
        self._latest = here.now
        # Gradients are off during the steps through which they must not flow; `_leave` turns them on again.
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
            return  # the denoiser raised an error, or the reader of activations stopped it after the last module that it reads
        # Every pass is checked, because NaN spreads from its first step to all later ones.
        here.good.append((here.step, _finite(output[0])))

    def _check_passes(self) -> None:
        """Raise FloatingPointError with the step and the seed of the first row of a pass that holds NaN or infinity."""
        here = self._here
        # All passes are checked together, so that the program waits for a GPU once and not in every step.
        if here.good and not bool(torch.cat([good_R for _, good_R in here.good]).all()):
            for step, good_R in here.good:
                self._refuse(step, good_R, "the denoiser gives a NaN or infinite value for the image")

    def _refuse(self, step: int, good_R: Tensor, what: str) -> None:
        if not bool(good_R.all()):
            # Rows are the images once, or twice under guidance. `argmin` does not accept booleans.
            seeds = self._here.seeds
            raise FloatingPointError(f"step {step}: {what} of seed {seeds[int(good_R.int().argmin()) % len(seeds)]}")


def _finite(value_R: Tensor) -> Tensor:
    """Return a mask of the rows without NaN and infinity, (R,)."""
    return value_R.detach().flatten(1).isfinite().all(1)


@cache
def arguments_of(pipeline: type) -> frozenset[str]:
    """Return the names of the arguments of a pipeline's call."""
    return frozenset(inspect.signature(pipeline.__call__).parameters)


def _images(images: Tensor | npt.NDArray[np.float32]) -> Tensor:
    """Return images as (B, C, H, W) in [0, 1], float32."""
    if not isinstance(images, Tensor):
        images = torch.from_numpy(images).movedim(-1, 1)
    return images.float()
