"""Config of the data sets of a job by their use, and of the prompt format that they share."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from steerlab.job.data_set import DataSet
from steerlab.job.typed import Frozen

PromptStyle = Literal["aside", "plain"]
ResponseRole = Literal["data", "instruction", "response"]
MAX_EXAMPLES = 100
"""Maximum number of worked examples before a question; a whole file of them would make every prompt too long."""
PROMPT_FIELDS = ("prompt_style", "response_role", "thinking")
"""Fields of `DataConfig` that determine how texts become tokens."""


class DataConfig(Frozen):
    """The data sets of a job, by their use, and the prompt format that they share."""

    train: DataSet | None = None
    """Rows of the training stage."""
    validation: DataSet | None = None
    """Rows of the evaluation loss during training."""
    safety: DataSet | None = None
    """Rows that show behaviour to preserve, such as refusals of harmful requests."""
    basis: DataSet | None = None
    """Rows whose activations span a method's basis; null takes those of `safety`."""
    utility: DataSet | None = None
    """Rows that show abilities, such as solved problems, for a method that distinguishes them from the behaviour of
    `safety`."""
    source: DataSet | None = None
    """Texts with the behaviour to steer away from; a method moves their activations towards those of `target`."""
    target: DataSet | None = None
    """Texts with the behaviour to steer to."""
    preference: DataSet | None = None
    """Pairs of a preferred and a rejected response (format preference)."""
    examples: DataSet | None = None
    """Worked examples before each question (method prompt), of format instruction. `limit`, which must be given, is their
    number."""
    prompt_style: PromptStyle = "aside"
    """aside: the framing of ASIDE's paper (arXiv 2503.10566) with headings Instruction, Input, Response; plain: the bare texts
    in the chat template. Rows of messages keep their own turns in both."""
    response_role: ResponseRole = "data"
    """Role of response tokens (ASIDE's paper: data)."""
    thinking: bool = Field(False, exclude_if=lambda thinks: not thinks)
    """true: prompts end where the chat template lets the model begin a thought (Qwen 3: before `<think>`), and thoughts in
    answers are trained. false: prompts end as before a stored answer without a thought."""

    @property
    def by_role(self) -> dict[str, DataSet]:
        """The data sets of the job, by use; uses without a data set are omitted."""
        data_sets = {
            "train": self.train,
            "validation": self.validation,
            "safety": self.safety,
            "basis": self.basis,
            "utility": self.utility,
            "source": self.source,
            "target": self.target,
            "preference": self.preference,
            "examples": self.examples,
        }
        return {role: data for role, data in data_sets.items() if data is not None}

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        for role, data in self.by_role.items():
            if role != "validation" and (data.format == "preference") != (role == "preference"):
                raise ValueError(f"{role}: rows of format {data.format} are not valid here; pairs belong in data.preference")
            if data.weight is not None and not data.also:
                raise ValueError(
                    f"{role}.weight {data.weight:g}: there is no other data set to mix with; list other data sets in `also`"
                )
            formats = dict.fromkeys(part.format for part in data.parts)
            if role == "examples" and (set(formats) != {"instruction"} or data.also):
                raise ValueError(f"examples: worked examples are rows of format instruction from one source, not {data.format}")
            if role == "examples" and (data.limit is None or data.limit > MAX_EXAMPLES):
                raise ValueError(f"examples.limit: give the number of worked examples, {MAX_EXAMPLES} or fewer")
            if len(formats) > 1 and role not in ("train", "validation"):
                raise ValueError(
                    f"{role}.also: rows of formats {' and '.join(formats)}; only train and validation can mix formats"
                )
        return self
