"""The stage that makes a patch from a source in the method's config, such as a reward model."""

from __future__ import annotations

from typing import NamedTuple

from steerlab import patches
from steerlab.guards.json_values import JsonObject
from steerlab.job import Job, own_code
from steerlab.job.own_code import Code
from steerlab.methods import TABLE
from steerlab.methods.contract import Assembled
from steerlab.stages import evaluate, fit
from steerlab.stages.spread import calls, reserved, subject
from steerlab.stages.spread.subject import Loading, Subject
from steerlab.storage.plan import Stage, Work


class Params(subject.OnModel):
    """Parameters of the stage."""

    method: JsonObject
    """The method's config."""
    fingerprints: dict[str, str | list[str]]
    """Fingerprints of the sources that the config names, by their keys in it."""


def stage(job: Job, model: Subject) -> Stage:
    """Return the stage that makes the patch of the job's method."""
    params = Params(method=subject.dumped(job.method), fingerprints=evaluate.fingerprints(job.method), **model.fields)
    return Stage("assemble", 1, subject.dumped(params), run, model.inputs, job.method.name, model.paths)


def run(work: Work) -> None:
    """Make the patch in one Ray task, and write it with the prompt settings and a reference to its model."""
    params = Params.model_validate(work.params)
    arguments = (subject.of(work), params.method, own_code.codes_in(params.method))
    made = calls.result(_assemble, arguments, **reserved.of_actors(work.scale))
    patches.save(made.patch, work.directory / "patch", made.fingerprint)
    fit.write_base(work, params, made.prompt)


class _Made(NamedTuple):
    patch: patches.SavedPatch
    fingerprint: str
    """Fingerprint of the model that the patch is for."""
    prompt: JsonObject
    """Prompt settings of that model."""


def _assemble(loading: Loading, config: JsonObject, codes: tuple[Code, ...]) -> _Made:
    from steerlab import models

    # Received before the config is read, because the method may be one of the files sent with this task.
    own_code.receive(codes)
    method = TABLE.of(config)
    assert isinstance(method, Assembled)
    model = subject.load(loading)
    patch = method.assemble(method.Config.model_validate(config), model)
    # The fingerprint is that of the model without hooks, as `patches.load` will see it.
    model.detach()
    return _Made(patch, models.fingerprint(model.model), dict(model.encoder.spec))
