"""The job itself, and its closed type over the methods and tasks that there are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, Field, SerializeAsAny, create_model, model_validator

from steerlab.guards.json_values import Json, JsonObject
from steerlab.job.data_set import PROMPT_FIELDS, DataConfig, ExtractConfig
from steerlab.job.foreign_code import Entry
from steerlab.job.model_config import ModelConfig
from steerlab.job.settings import (
    ChooseConfig,
    MethodConfig,
    ScaleConfig,
    TaskConfig,
    TrackConfig,
    TrainConfig,
    with_headline,
)
from steerlab.job.table import Table
from steerlab.job.typed import Frozen

_M = TypeVar("_M", bound=Entry)
_T = TypeVar("_T", bound=Entry)


class Job(Frozen):
    """One piece of work: a model, a method on it, and what is measured."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=80)
    """Name of the run folder."""
    model: ModelConfig
    """The model the method starts from."""
    data: DataConfig = DataConfig.model_validate({})
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
    strength: Annotated[float, AfterValidator(lambda strength: strength + 0.0)] | None = None  # -0.0 is no other strength
    """The strength of the patch that every task reports, before the other `strengths` of tasks that name several; 0 evaluates
    the model without its patch, and nothing else; null leaves it to the tasks, or to `choose`."""
    choose: ChooseConfig | None = None
    """How the strength is chosen; null evaluates the strengths of each task."""
    evaluate: tuple[SerializeAsAny[TaskConfig], ...] = ()
    """Tasks run on the result."""
    track: TrackConfig = TrackConfig()
    """Reporting."""

    @property
    def tasks(self) -> tuple[TaskConfig, ...]:
        """The tasks of `evaluate`, each at the strengths that it is run at."""
        if self.strength is None:
            return self.evaluate
        return tuple(
            # Without the patch nothing else is run: of several strengths the headline is never 0.
            task.model_copy(update={"strengths": with_headline(self.strength, task.strengths if self.strength else ())})
            for task in self.evaluate
        )

    @property
    def prompt(self) -> JsonObject:
        """Settings by which texts become tokens, as `encoding.load` takes them."""
        return prompt_settings(self.model, self.data)

    @model_validator(mode="before")
    @classmethod
    def _is_asked_as_its_base(cls, tree: object) -> object:
        """Take the prompt settings of the job that makes the model: the model was trained on them, and keeps them."""
        if not isinstance(tree, Mapping) or (below := _prompt_below(tree)) is None:
            return tree
        data = tree.get("data", {})
        if not isinstance(data, Mapping):
            return tree
        for name, value in below.items():
            if name in data and data[name] != value:
                raise ValueError(
                    f"data.{name} {data[name]!r:.60}: the model is made by another job, which asks it with {value!r:.60}; "
                    f"leave data.{name} out here, or set it in that job"
                )
        return {**tree, "data": {**below, **data}}

    @model_validator(mode="after")
    def _check(self) -> Job:
        if self.model.attention == "flash_attention_2" and self.model.dtype == "float32":
            raise ValueError("model.attention flash_attention_2 needs model.dtype bfloat16")
        if self.strength is not None and self.choose is not None:
            raise ValueError(
                f"strength {self.strength:g}: the job has `choose` to find the strength; leave one of them out (choose=null)"
            )
        if self.strength is not None and not self.evaluate:
            raise ValueError(f"strength {self.strength:g}: the job has no tasks in `evaluate`, so nothing is measured at it")
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


def _prompt_below(tree: Mapping[str, Json]) -> JsonObject | None:
    """Return the prompt settings of the job at the bottom of those that a job stands on; None where it stands on none."""
    settings, base = None, tree
    while isinstance(model := base.get("model"), Mapping) and isinstance(source := model.get("source"), Mapping):
        base = source
        data = base.get("data")
        given = data if isinstance(data, Mapping) else {}
        settings = {name: given.get(name, DataConfig.model_fields[name].default) for name in PROMPT_FIELDS}
    return settings


def prompt_settings(model: ModelConfig, data: DataConfig) -> JsonObject:
    """Return the settings by which texts become tokens: how they are asked, and what does not lie beside the model."""
    elsewhere = {"tokenizer": model.tokenizer, "chat_template": model.chat_template}
    return {
        **data.model_dump(include=set(PROMPT_FIELDS)),
        **{name: source for name, source in elsewhere.items() if source is not None},
    }


def job_type(methods: Table[_M], tasks: Table[_T]) -> type[Job]:
    """Make the closed job type whose `method` and `evaluate` hold configs of the given tables."""
    method, task = methods.field(), tasks.field()
    chosen_by = (tuple[task, ...], Field(min_length=1, description=ChooseConfig.model_fields["tasks"].description))
    choose = create_model("ChooseConfig", __base__=ChooseConfig, __doc__=ChooseConfig.__doc__, tasks=chosen_by)
    fields: dict[str, Any] = {
        "method": (method, Field(description=Job.model_fields["method"].description)),
        "choose": (choose | None, Field(None, description=Job.model_fields["choose"].description)),
        "evaluate": (tuple[task, ...], Field((), description=Job.model_fields["evaluate"].description)),
    }
    return create_model("Job", __base__=Job, __doc__=Job.__doc__, **fields)
