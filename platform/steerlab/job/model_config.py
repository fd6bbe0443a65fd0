"""Configs of the model of a job, and of the sampling of a diffusion pipeline."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from steerlab.job.source_fields import Source, Template
from steerlab.job.typed import Frozen

JOB_PREFIX = "job:"


class SamplerConfig(Frozen):
    """Sampling settings of a diffusion pipeline. A step is one evaluation of the denoiser; steps count from 0."""

    steps: int = Field(10, ge=1)
    """Number of sampling steps; with `timesteps`, their number."""
    scheduler: str | None = None
    """Class of a scheduler of diffusers (`LCMScheduler`), configured as the pipeline's own; null uses the pipeline's."""
    options: dict[str, bool | int | float | str | None] = {}
    """Settings of the scheduler that replace the pipeline's: {timestep_spacing: trailing}."""
    timesteps: tuple[int, ...] | None = None
    """Explicit timesteps, for schedulers that take them: DMD2 samples in one step at [399]. Null lets the scheduler choose."""
    guidance: float = Field(0.0, ge=0)
    """Scale of classifier-free guidance; 1 or less switches it off. A model with distilled guidance (FLUX) gets the number as
    an input."""
    size: tuple[int, int] | None = None
    """Height and width in pixels; null takes the pipeline's."""
    denoiser: Source | None = None
    """Source of a safetensors file that replaces the denoiser's weights (SDXL-Lightning, DMD2); null uses the model's own."""
    read: tuple[int, ...] = Field((0,), min_length=1)
    """Steps whose activations are read; those of several steps are pooled together."""
    steer: tuple[int, ...] | None = None
    """Steps in which patches act; null is every step."""
    differentiate: tuple[int, ...] | None = None
    """Steps through whose denoiser gradients flow; null is every step up to the last one in `read`."""
    unconditional: bool = False
    """Let patches also act on the unconditional half of the batch in guided steps; activations of that half are never read."""
    images_per_pass: int = Field(64, ge=1)
    """Images that tasks draw in one batch."""

    @model_validator(mode="after")
    def _check(self) -> SamplerConfig:
        if self.timesteps is not None and len(self.timesteps) != self.steps:
            raise ValueError(f"steps {self.steps}: timesteps names {len(self.timesteps)}")
        for name in ("read", "steer", "differentiate"):
            # An index error inside a denoising loop would not name the setting, so the steps are checked here.
            late = [step for step in getattr(self, name) or () if not 0 <= step < self.steps]
            if late:
                raise ValueError(f"{name}: step {late[0]} does not exist; the steps are 0 to {self.steps - 1}")
        if self.differentiate is not None and not set(self.differentiate) & set(self.read):
            raise ValueError("differentiate: give at least one of the steps in read; otherwise there is no gradient")
        return self


class ModelConfig(Frozen):
    """The model that a job starts from, and how it is loaded."""

    source: Source | dict[str, Any]
    """Source of the model (`hf:owner/name`, path, URI, `wheel:NAME==VERSION`, `tiny:model`; see `steerlab describe source`), or
    `job:FILE` for the model that another job trains; a relative FILE starts from the folder of this job's file."""
    kind: Literal["causal_lm", "diffusion"] = "causal_lm"
    """Family of the model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the forward pass; training in bfloat16 also stores float32 master weights."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention implementation of transformers."""
    # An empty setting is excluded from the dump: keys of artifacts are hashes of it, and must not change with a new setting.
    tokenizer: Source | None = Field(None, exclude_if=lambda source: source is None)
    """Source of the tokenizer; null takes the one in the model's folder."""
    chat_template: Template | None = Field(None, exclude_if=lambda source: source is None)
    """Chat template that replaces the tokenizer's: its text, or the source of a Jinja file, of a `tokenizer_config.json`, or of
    a model with one. It gives a base model without a template that of another model. Null uses the tokenizer's."""
    trust_remote_code: bool = Field(False, exclude_if=lambda trusts: not trusts)
    """Run Python code that comes with the checkpoint, which may do anything; false refuses a checkpoint that needs it."""
    sampler: SamplerConfig | None = Field(None, exclude_if=lambda sampler: sampler is None)
    """Sampling of images (kind diffusion); null takes the defaults."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.sampler is not None and self.kind != "diffusion":
            raise ValueError(f"sampler applies to drawing images; kind {self.kind} draws no images")
        for name in ("tokenizer", "chat_template"):
            if getattr(self, name) is not None and self.kind != "causal_lm":
                raise ValueError(f"{name} applies to texts; kind {self.kind} does not use it")
            if getattr(self, name) is not None and not isinstance(self.source, str):
                raise ValueError(f"{name}: another job makes this model; set model.{name} in that job")
        if self.kind == "diffusion" and self.attention == "flash_attention_2":
            raise ValueError("attention flash_attention_2 is a kernel of transformers; diffusers has its own")
        return self

    @property
    def drawing(self) -> SamplerConfig:
        """The sampler's config; the defaults if the job has none."""
        return self.sampler or SamplerConfig.model_validate({})
