"""Supported classes of diffusion pipelines: how each takes a prompt, and which half of a guided batch has the prompt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from diffusers.pipelines.dit.pipeline_dit import DiTPipeline
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import StableDiffusionXLPipeline


class Family(NamedTuple):
    """Settings by which one class of pipelines is loaded and called."""

    denoiser: Literal["unet", "transformer"]
    """Name of the component that predicts the noise."""
    conditional: Literal["first", "second"]
    """Half of the batch that has the prompt, under classifier-free guidance; the other half has the empty prompt."""
    encode: Callable[[Any, str, bool], dict[str, Tensor]] | None = None
    """(pipeline, prompt, guided) -> arguments that encode one prompt, with prompts as the first axis of each. None if the
    pipeline takes the prompts as text, because its encoder is trained together with the denoiser."""
    shared: Callable[[Any, str], dict[str, object]] = lambda pipeline, prompt: {}
    """(pipeline, a prompt) -> further arguments of the call, the same for all prompts."""
    gives_arrays: bool = False
    """Whether the pipeline returns images as NumPy arrays only, not as tensors."""
    example: Callable[[Any], str] = lambda pipeline: "a photo"
    """(pipeline) -> a prompt that the pipeline accepts, for test calls."""
    doubles: bool = True
    """Whether guidance above 1 doubles the batch; otherwise the denoiser takes the guidance scale as an input."""
    options: Mapping[str, object] = {}
    """Further arguments of `from_pretrained`."""


def _encode_clip(pipeline: StableDiffusionPipeline, prompt: str, guided: bool) -> dict[str, Tensor]:
    encoded = pipeline.encode_prompt(prompt, pipeline.device, 1, guided, "" if guided else None)
    names = ("prompt_embeds", "negative_prompt_embeds")
    # Without guidance the negative embeddings are None (diffusers 0.42).
    return {name: value for name, value in zip(names, encoded, strict=True) if value is not None}


def _encode_two_clips(pipeline: StableDiffusionXLPipeline, prompt: str, guided: bool) -> dict[str, Tensor]:
    encoded = pipeline.encode_prompt(prompt, device=pipeline.device, do_classifier_free_guidance=guided)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return {name: value for name, value in zip(names, encoded, strict=True) if value is not None}


def _encode_flux(pipeline: FluxPipeline, prompt: str, guided: bool) -> dict[str, Tensor]:
    # The third result, the positions of the text, is the same for every prompt, and the pipeline's call makes it again.
    encoded = pipeline.encode_prompt(prompt, prompt, max_sequence_length=_flux_length(pipeline))[:2]
    names = ("prompt_embeds", "pooled_prompt_embeds")
    return {name: value for name, value in zip(names, encoded, strict=True) if value is not None}


def _flux_length(pipeline: FluxPipeline) -> int:
    # FLUX.1-schnell reads at most 256 tokens, and tokenizers of small test pipelines fewer.
    return min(256, pipeline.tokenizer_2.model_max_length)


def _encode_class(pipeline: DiTPipeline, prompt: str, guided: bool) -> dict[str, Tensor]:
    labels = {name.lower(): number for name, number in pipeline.labels.items()}
    number = int(prompt) if prompt.isdigit() else labels.get(prompt.lower())
    classes = pipeline.transformer.config.num_embeds_ada_norm
    if number is None or not 0 <= number < classes:
        names = f"one of {', '.join(list(pipeline.labels)[:8])}, ... or " if pipeline.labels else ""
        raise ValueError(f"prompt {prompt!r} is not a class of the model: give {names}a number from 0 to {classes - 1}")
    return {"class_labels": torch.tensor([number])}


FAMILIES: dict[str, Family] = {
    # The safety checker would replace images by black ones, which would then be scored as the model's.
    "StableDiffusionPipeline": Family("unet", "second", _encode_clip, options={"safety_checker": None}),
    "StableDiffusionXLPipeline": Family("unet", "second", _encode_two_clips),
    "FluxPipeline": Family(
        "transformer",
        "second",
        _encode_flux,
        lambda pipeline, prompt: {"max_sequence_length": _flux_length(pipeline)},
        doubles=False,
    ),
    # DiTPipeline puts the classes in the first half of the batch and the null class in the second.
    "DiTPipeline": Family("transformer", "first", _encode_class, gives_arrays=True, example=lambda pipeline: "0"),
    "PixelPipeline": Family("unet", "second", example=lambda pipeline: pipeline.prompts[0]),
}
