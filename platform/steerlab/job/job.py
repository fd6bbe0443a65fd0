"""The config of a job, and the closed job type over the tables of methods and tasks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, SerializeAsAny, create_model, model_validator

from steerlab.guards.json_values import Json, JsonObject
from steerlab.job.data_config import PROMPT_FIELDS, DataConfig
from steerlab.job.extract_config import ExtractConfig
from steerlab.job.foreign_code import Entry
from steerlab.job.model_config import ModelConfig
from steerlab.job.settings import (
    ChooseConfig,
    MethodConfig,
    ScaleConfig,
    TaskConfig,
    TrackConfig,
    with_headline,
)
from steerlab.job.table import Table
from steerlab.job.train_config import TrainConfig
from steerlab.job.typed import Frozen

_M = TypeVar("_M", bound=Entry)
_T = TypeVar("_T", bound=Entry)


class Job(Frozen):
    """One experiment: a model, a method that is applied to it, and the tasks that measure the result."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    """Name of the run folder."""
    model: ModelConfig
    """Model that the method starts from."""
    data: DataConfig = DataConfig.model_validate({})
    """Data sets and prompt format."""
    method: SerializeAsAny[MethodConfig]
    """Method and its hyperparameters."""
    extract: ExtractConfig | None = None
    """Activations to read: for a method that is fitted on them, or as the result itself (method none); null reads none."""
    train: TrainConfig | None = None
    """Training stage; null for methods that are fitted in closed form."""
    scale: ScaleConfig = ScaleConfig.model_validate({})
    """Workers, DeepSpeed, checkpoints."""
    snapshot: int | None = Field(None, ge=1)
    """Step of `train.snapshots` whose weights are evaluated; null takes the end of training."""
    inverse: bool = Field(False, exclude_if=lambda inverse: not inverse)
    """Evaluate the inverse of the patch's maps, which induces what they remove. Does not need another fit or training;
    `method.inverse` saves inverse maps in the artifact."""
    # -0.0 + 0.0 is 0.0: both mean the model without its patch, and must give one key.
    strength: Annotated[float, AfterValidator(lambda strength: strength + 0.0)] | None = None
    """Strength of the patch in the headline metrics of every task; a task that names several `strengths` reports those too.
    0 evaluates only the model without its patch; null uses the strengths of each task, or of `choose`."""
    choose: ChooseConfig | None = None
    """Choice of the strength on development rows; null evaluates the strengths of each task."""
    evaluate: tuple[SerializeAsAny[TaskConfig], ...] = ()
    """Tasks that are run on the result."""
    track: TrackConfig = TrackConfig()
    """Where metrics are reported besides the run folder."""

    @property
    def tasks(self) -> tuple[TaskConfig, ...]:
        """The tasks of `evaluate`, with the strengths at which each is run."""
        # Without a strength the tasks use their own strengths, or those that `choose` sets.
        if self.strength is None:
            return self.evaluate
        return tuple(
            # At strength 0 the tasks' own strengths are dropped, because the headline of several strengths is never 0.
            task.model_copy(update={"strengths": with_headline(self.strength, task.strengths if self.strength else ())})
            for task in self.evaluate
        )

    @property
    def prompt(self) -> JsonObject:
        """Settings of tokenisation, as `inputs.encoding.load` takes them."""
        return prompt_settings(self.model, self.data)

    @model_validator(mode="before")
    @classmethod
    def _with_prompt_of_base(cls, tree: object) -> object:
        """Copy the prompt settings of the job that trains the model: prompts must have the form that they had in its
        training."""
        if not isinstance(tree, Mapping) or (below := _prompt_below(tree)) is None:
            return tree
        data = tree.get("data", {})
        if not isinstance(data, Mapping):
            return tree
        for name, value in below.items():
            if name in data and data[name] != value:
                raise ValueError(
                    f"data.{name} {data[name]!r:.60}: another job makes the model, with prompts of {value!r:.60}; "
                    f"remove data.{name} here, or set it in that job"
                )
        return {**tree, "data": {**below, **data}}

    @model_validator(mode="after")
    def _check(self) -> Job:
        if self.model.attention == "flash_attention_2" and self.model.dtype == "float32":
            raise ValueError("model.attention flash_attention_2 needs model.dtype bfloat16")
        if self.strength is not None and self.choose is not None:
            raise ValueError(
                f"strength {self.strength:g}: the job has `choose` to find the strength; remove one of them (choose=null)"
            )
        if self.strength is not None and not self.evaluate:
            raise ValueError(f"strength {self.strength:g}: the job has no tasks in `evaluate`, so nothing is measured at it")
        if self.train is None:
            return self
        if self.snapshot is not None and self.snapshot not in self.train.snapshots:
            raise ValueError(f"snapshot {self.snapshot} is not one of train.snapshots {list(self.train.snapshots)}")
        # Every number of workers that an elastic run may have must divide the rows, so that results do not depend on it.
        for workers in range(*(self.scale.worker_range[0], self.scale.worker_range[1] + 1)):
            if self.train.rows_per_step % workers:
                raise ValueError(
                    f"scale.workers {workers} does not divide the {self.train.rows_per_step} rows of a step "
                    f"(train.micro_batch {self.train.micro_batch} x train.grad_accum {self.train.grad_accum})"
                )
        return self


def _prompt_below(tree: Mapping[str, Json]) -> JsonObject | None:
    """Return the prompt settings of the first job in the chain of `model.source` jobs; None if the model is a source."""
    settings, base = None, tree
    # Each job in the chain has inherited the settings of the one below, so the last one decides.
    while isinstance(model := base.get("model"), Mapping) and isinstance(source := model.get("source"), Mapping):
        base = source
        data = base.get("data")
        fields = data if isinstance(data, Mapping) else {}
        settings = {name: fields.get(name, DataConfig.model_fields[name].default) for name in PROMPT_FIELDS}
    return settings


def prompt_settings(model: ModelConfig, data: DataConfig) -> JsonObject:
    """Return the settings of tokenisation: the prompt format, and the sources of tokenizer and template if the job has any."""
    elsewhere = {"tokenizer": model.tokenizer, "chat_template": model.chat_template}
    return {
        **data.model_dump(include=set(PROMPT_FIELDS)),
        **{name: source for name, source in elsewhere.items() if source is not None},
    }


def job_type(methods: Table[_M], tasks: Table[_T]) -> type[Job]:
    """Return the job type whose `method`, `evaluate` and `choose.tasks` accept exactly the configs of the given tables."""
    # The types are made here because this layer must not import methods and tasks, which import it.
    method, task = methods.field(), tasks.field()
    chosen_by = (tuple[task, ...], Field(min_length=1, description=ChooseConfig.model_fields["tasks"].description))
    # `choose.tasks` needs the same closed union, so its model is derived again.
    choose = create_model("ChooseConfig", __base__=ChooseConfig, __doc__=ChooseConfig.__doc__, tasks=chosen_by)
    fields: dict[str, Any] = {
        "method": (method, Field(description=Job.model_fields["method"].description)),
        "choose": (choose | None, Field(None, description=Job.model_fields["choose"].description)),
        "evaluate": (tuple[task, ...], Field((), description=Job.model_fields["evaluate"].description)),
    }
    return create_model("Job", __base__=Job, __doc__=Job.__doc__, **fields)
