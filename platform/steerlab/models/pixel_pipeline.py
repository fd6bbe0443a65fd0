"""Small diffusion models in pixel space, without an autoencoder, conditioned on captions of a few words or on classes.

A `PixelPipeline` is a diffusers pipeline: a denoiser, a scheduler and, for captions, a table of word vectors. The denoiser
works on pixels in [-1, 1], and the pipeline returns images in [0, 1].
Axes: B images, C channels, H and W pixels, N words, D width of a word's vector.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
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
"""Index of the padding that fills a caption up to its full length."""

# diffusers imports components by the module name in the index, and saved indices hold `OWN` (see pipeline_index.py).
sys.modules.setdefault(OWN, sys.modules[__name__])


class CaptionTable(ModelMixin, ConfigMixin):
    """Text encoder that adds a learned vector for a word and one for its position; padding also has a vector."""

    __module__ = OWN  # diffusers writes the name of a class's module into the index of a saved pipeline

    @register_to_config
    def __init__(self, words: Sequence[str] = (), width: int = 32, length: int = 4) -> None:
        super().__init__()
        self._index = {word: number for number, word in enumerate(words, _EMPTY + 1)}
        self.word = nn.Embedding(len(words) + 1, width)
        self.place = nn.Parameter(0.02 * torch.randn(length, width))

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Return the encodings of captions, (B, N, D)."""
        index_BN = torch.tensor([self.indices(caption) for caption in captions])
        return self.word(index_BN.to(self.place.device, non_blocking=True)) + self.place

    @property
    def known(self) -> list[str]:
        """The words of the table."""
        return list(self._index)

    def indices(self, caption: str) -> list[int]:
        """Return the indices of a caption's words, padded to the length of a caption.

        Raises:
            ValueError: A word is not in the table, or the caption has too many words.
        """
        words, length = caption.lower().split(), len(self.place)
        unknown = [word for word in words if word not in self._index]
        if unknown:
            raise ValueError(
                f"caption {caption!r}: the model does not know {unknown[0]!r}; known words: {', '.join(self._index)}"
            )
        if len(words) > length:
            raise ValueError(f"caption {caption!r} has {len(words)} words; the model reads {length}")
        return [self._index[word] for word in words] + [_EMPTY] * (length - len(words))


class PixelPipeline(DiffusionPipeline):
    """A diffusion pipeline in pixel space whose prompts are captions (with a table of words) or names of `classes`."""

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
        """Words of the table, or classes; each one is a valid prompt by itself."""
        return self._classes if self.words is None else self.words.known

    @property
    def _classes(self) -> list[str]:
        return list(self.config["classes"])

    def condition(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Return the denoiser's arguments that hold the prompts; the empty prompt means no condition.

        Raises:
            ValueError: The model has no such class or word.
        """
        if self.words is not None:
            return {"encoder_hidden_states": self.words(prompts)}
        classes = self._classes
        unknown = [prompt for prompt in prompts if prompt and prompt not in classes]
        if unknown:
            raise ValueError(f"prompt {unknown[0]!r} is not a class of the model: {', '.join(classes)}")
        # The class after the last one means no condition, as in classifier-free guidance (arXiv 2207.12598).
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
        """Draw one image for each prompt, (B, C, H, W) in [0, 1]; with guidance above 1 the unconditional half comes first."""
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
        # Schedulers parametrised by sigma, such as Euler's, start from noise of another standard deviation than 1.
        x_BCHW = x_BCHW * self.scheduler.init_noise_sigma
        step_arguments = self._step_arguments(generator)
        for t in self.scheduler.timesteps:
            inputs = self.scheduler.scale_model_input(torch.cat([x_BCHW] * 2) if guided else x_BCHW, t)
            predicted = self.unet(inputs, t, **condition).sample
            if guided:
                # Classifier-free guidance with scale 1 + w for w in eq. 6 of arXiv 2207.12598, as in diffusers.
                without, with_prompt = predicted.chunk(2)
                predicted = without + guidance_scale * (with_prompt - without)
            x_BCHW = self.scheduler.step(predicted, t, x_BCHW, **step_arguments).prev_sample
        return ((x_BCHW / 2 + 0.5).clamp(0, 1),)

    def _step_arguments(self, generator: list[torch.Generator] | None) -> dict[str, object]:
        # Only schedulers that add noise in each step take a generator.
        return {"generator": generator} if "generator" in _arguments_of(type(self.scheduler).step) else {}


@cache
def _arguments_of(step: Callable[..., object]) -> frozenset[str]:
    return frozenset(inspect.signature(step).parameters)
