"""Small diffusion models that draw without a latent space, conditioned on captions of a few words or on classes.

A `PixelPipeline` is a diffusers pipeline like any other: a denoiser, a scheduler and, for captions, a table of words. It draws
in [-1, 1] and hands out images in [0, 1]. Axes: B images, C channels, H and W pixels, N words, D width of a word's vector.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor, nn

from steerlab.models.diffusion.pipeline_index import OWN

_EMPTY = 0
"""Index of the place of no word."""

sys.modules.setdefault(OWN, sys.modules[__name__])


class CaptionTable(ModelMixin, ConfigMixin):
    """A learned vector for each word and each place in a caption; the empty caption has one of its own."""

    __module__ = OWN  # diffusers writes it into the index of a pipeline

    @register_to_config
    def __init__(self, words: Sequence[str] = (), width: int = 32, length: int = 4) -> None:
        super().__init__()
        self._index = {word: number for number, word in enumerate(words, _EMPTY + 1)}
        self.word = nn.Embedding(len(words) + 1, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Return the vectors of captions, (B, N, D)."""
        index_BN = torch.tensor([self.indices(caption) for caption in captions], device=self.place.device)
        return self.word(index_BN) + self.place

    @property
    def known(self) -> list[str]:
        """The words of the table."""
        return list(self._index)

    def indices(self, caption: str) -> list[int]:
        """Return the numbers of a caption's words, filled up with that of no word.

        Raises:
            ValueError: a word is not in the table, or there are too many.
        """
        words, length = caption.lower().split(), len(self.place)
        unknown = [word for word in words if word not in self._index]
        if unknown:
            raise ValueError(f"caption {caption!r}: the model knows no {unknown[0]!r}, but {', '.join(self._index)}")
        if len(words) > length:
            raise ValueError(f"caption {caption!r} has {len(words)} words; the model reads {length}")
        return [self._index[word] for word in words] + [_EMPTY] * (length - len(words))


class PixelPipeline(DiffusionPipeline):
    """A denoiser of images, asked for a caption (with a table of words) or for one of `classes`."""

    _optional_components = ["words"]
    unet: Any
    scheduler: Any
    words: CaptionTable | None

    def __init__(
        self, unet: nn.Module, scheduler: SchedulerMixin, words: CaptionTable | None = None, classes: list[str] | None = None
    ) -> None:
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler, words=words)
        self.register_to_config(classes=list(classes or ()))

    @property
    def prompts(self) -> list[str]:
        """Words or classes, each of which is a prompt."""
        return self._classes if self.words is None else self.words.known

    @property
    def _classes(self) -> list[str]:
        settings: Any = self.config
        return list(settings.classes)

    def condition(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return what the denoiser is given of prompts; the empty one is no condition.

        Raises:
            ValueError: a prompt that the model does not know.
        """
        if self.words is not None:
            return {"encoder_hidden_states": self.words(prompts)}
        classes = self._classes
        unknown = [prompt for prompt in prompts if prompt and prompt not in classes]
        if unknown:
            raise ValueError(f"prompt {unknown[0]!r} is no class of the model: {', '.join(classes)}")
        numbers = [classes.index(prompt) if prompt else len(classes) for prompt in prompts]
        return {"class_labels": torch.tensor(numbers, device=self.unet.device)}

    @torch.no_grad()
    def __call__(
        self,
        prompt: Sequence[str],
        num_inference_steps: int = 10,
        timesteps: Sequence[int] | None = None,
        guidance_scale: float = 0.0,
        generator: list[torch.Generator] | None = None,
        output_type: str = "pt",
    ) -> tuple[Tensor]:
        """Draw one image a prompt, (B, C, H, W) in [0, 1]; above a guidance of 1 the unconditional half comes first."""
        assert output_type == "pt", "images are tensors here"
        sides = self.unet.config.sample_size
        height, width = (sides, sides) if isinstance(sides, int) else sides
        shape = (len(prompt), self.unet.config.in_channels, height, width)
        weight = next(self.unet.parameters())  # diffusers' own properties walk all modules
        device = weight.device
        x_BCHW = randn_tensor(shape, generator=generator, device=device, dtype=weight.dtype)
        guided = guidance_scale > 1
        condition = self.condition([*([""] * len(prompt) if guided else []), *prompt])
        if timesteps is None:
            self.scheduler.set_timesteps(num_inference_steps, device=device)
        else:
            self.scheduler.set_timesteps(timesteps=list(timesteps), device=device)
        x_BCHW = x_BCHW * self.scheduler.init_noise_sigma
        step_arguments = self._step_arguments(generator)
        for t in self.scheduler.timesteps:
            given = self.scheduler.scale_model_input(torch.cat([x_BCHW] * 2) if guided else x_BCHW, t)
            predicted = self.unet(given, t, **condition).sample
            if guided:
                without, with_prompt = predicted.chunk(2)
                predicted = without + guidance_scale * (with_prompt - without)
            x_BCHW = self.scheduler.step(predicted, t, x_BCHW, **step_arguments).prev_sample
        return ((x_BCHW / 2 + 0.5).clamp(0, 1),)

    def _step_arguments(self, generator: list[torch.Generator] | None) -> dict[str, object]:
        return {"generator": generator} if "generator" in _taken_by_step(type(self.scheduler)) else {}


@cache
def _taken_by_step(scheduler: type[Any]) -> frozenset[str]:
    return frozenset(inspect.signature(scheduler.step).parameters)
