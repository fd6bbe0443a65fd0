"""The stage of method `prompt`: its artifact names a model and the preamble of its prompts."""

from __future__ import annotations

from pydantic import Field

from steerlab.data import rows
from steerlab.guards import saved
from steerlab.guards.json_values import JsonObject
from steerlab.job import DataSet, Job, Preamble
from steerlab.methods import TABLE
from steerlab.methods.contract import Prompted
from steerlab.stages import fit
from steerlab.stages.spread import subject
from steerlab.stages.spread.subject import Subject
from steerlab.storage.bases import PROMPT, SavedPrompt
from steerlab.storage.plan import Stage, Work


class Params(subject.OnModel):
    """Parameters of the stage."""

    method: JsonObject
    """The method's config."""
    examples: DataSet | None = Field(default=None, exclude_if=lambda data: data is None)
    """The worked examples."""
    examples_fingerprint: str | list[str] | None = Field(default=None, exclude_if=lambda fingerprint: fingerprint is None)


def stage(job: Job, model: Subject) -> Stage:
    """Return the stage that adds a preamble to the prompts of a job's model."""
    examples = job.data.examples
    params = Params(
        **model.fields,
        method=subject.dumped(job.method),
        examples=examples,
        examples_fingerprint=None if examples is None else rows.fingerprint(examples),
    )
    return Stage("prompt", 1, subject.dumped(params), run, model.inputs, job.method.name, model.paths)


def preamble(job: Job) -> Preamble:
    """Return the preamble that a job's method adds to each prompt; reads the rows of `data.examples`."""
    method = TABLE.of(job.method)
    assert isinstance(method, Prompted)
    return method.preamble(job.method, [] if job.data.examples is None else rows.read(job.data.examples))


def run(work: Work) -> None:
    """Write the prompt settings and the reference to the model, in the driver, since no model is loaded."""
    params = Params.model_validate(work.params)
    method = TABLE.of(params.method)
    assert isinstance(method, Prompted)
    config = method.Config.model_validate(params.method)
    worded = method.preamble(config, [] if params.examples is None else rows.read(params.examples))
    if subject.MODEL in work.inputs:
        below = saved.read(work.inputs[subject.MODEL] / PROMPT, SavedPrompt)
    else:
        assert params.prompt is not None, "a source has prompt settings"
        below = SavedPrompt.model_validate(params.prompt.model_dump(mode="json"))
    prompt = below.model_copy(update={"preamble": below.preamble.then(worded)})
    fit.write_base(work, params, prompt.model_dump(mode="json", exclude_none=True))
