"""Classes of pipelines: how each is asked, and which half of a guided batch has the prompt."""

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
    """What is known of a class of pipelines."""

    denoiser: Literal["unet", "transformer"]
    conditional: Literal["first", "second"]
    """Half of a guided batch that has the prompt."""
    encode: Callable[[Any, str, bool], dict[str, Tensor]] | None = None
    """(pipeline, prompt, guided) -> arguments of a call for one prompt, each with the prompt as its first axis; None where the
    pipeline is given the prompts themselves, because what encodes them is trained with the denoiser."""
    shared: Callable[[Any, str], dict[str, object]] = lambda pipeline, prompt: {}
    """(pipeline, a prompt) -> further arguments, the same for all prompts."""
    gives_arrays: bool = False
    """Images come as NumPy arrays alone."""
    example: Callable[[Any], str] = lambda pipeline: "a photo"
    """A prompt that the pipeline understands."""
    doubles: bool = True
    """Whether guidance above 1 makes a batch of two halves; else it is a number that the denoiser is given."""
    options: Mapping[str, object] = {}
    """Arguments of loading."""


def _encode_clip(pipeline: StableDiffusionPipeline, prompt: str, guided: bool) -> dict[str, Tensor]:
    found = pipeline.encode_prompt(prompt, pipeline.device, 1, guided, "" if guided else None)
    names = ("prompt_embeds", "negative_prompt_embeds")
    return {name: value for name, value in zip(names, found, strict=True) if value is not None}


def _encode_two_clips(pipeline: StableDiffusionXLPipeline, prompt: str, guided: bool) -> dict[str, Tensor]:
    found = pipeline.encode_prompt(prompt, device=pipeline.device, do_classifier_free_guidance=guided)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    return {name: value for name, value in zip(names, found, strict=True) if value is not None}


def _encode_flux(pipeline: FluxPipeline, prompt: str, guided: bool) -> dict[str, Tensor]:
    encoded = pipeline.encode_prompt(prompt, prompt, max_sequence_length=_flux_length(pipeline))[:2]
    names = ("prompt_embeds", "pooled_prompt_embeds")
    return {name: value for name, value in zip(names, encoded, strict=True) if value is not None}


def _flux_length(pipeline: FluxPipeline) -> int:
    return min(256, pipeline.tokenizer_2.model_max_length)


def _encode_class(pipeline: DiTPipeline, prompt: str, guided: bool) -> dict[str, Tensor]:
    labels = {name.lower(): number for name, number in pipeline.labels.items()}
    number = int(prompt) if prompt.isdigit() else labels.get(prompt.lower())
    classes = pipeline.transformer.config.num_embeds_ada_norm
    if number is None or not 0 <= number < classes:
        known = f"one of {', '.join(list(pipeline.labels)[:8])}, ... or " if pipeline.labels else ""
        raise ValueError(f"prompt {prompt!r} is no class of the model: give {known}a number from 0 to {classes - 1}")
    return {"class_labels": torch.tensor([number])}


FAMILIES: dict[str, Family] = {
    "StableDiffusionPipeline": Family("unet", "second", _encode_clip, options={"safety_checker": None}),
    "StableDiffusionXLPipeline": Family("unet", "second", _encode_two_clips),
    "FluxPipeline": Family(
        "transformer",
        "second",
        _encode_flux,
        lambda pipeline, prompt: {"max_sequence_length": _flux_length(pipeline)},
        doubles=False,
    ),
    # DiTPipeline puts the classes first and the null class behind them.
    "DiTPipeline": Family("transformer", "first", _encode_class, gives_arrays=True, example=lambda pipeline: "0"),
    "PixelPipeline": Family("unet", "second", example=lambda pipeline: pipeline.prompts[0]),
}
