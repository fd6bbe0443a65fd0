"""A first job of one's own: a commented job file and a search space for a method, a model and files of rows."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from steerlab import evaluation, methods, models
from steerlab import run as runs
from steerlab.cli.field_table import flow, rows
from steerlab.data import guessing, sources
from steerlab.guards.json_values import JsonObject
from steerlab.job import Job, ModelConfig, Selection, TrainConfig, validate
from steerlab.methods.contract import Method, SteeringConfig, Trained
from steerlab.models import ModelFacts
from steerlab.patches import taps
from steerlab.stages import JobType, Plan

_STEPS, _ROWS = 100, 200
"""Steps of a first training, and rows of a first evaluation: enough to see that everything runs."""
_NORMS = (r".*post_attention_layernorm", r".*(norm|ln)_?\d*", r".*(norm|ln).*")
"""Expressions of the modules that a first job steers; the first one that matches a module of the model is taken."""
_TINY: Mapping[str, JsonObject] = {
    "train": {"source": "tiny:instructions/train", "limit": _ROWS},
    "validation": {"source": "tiny:instructions/validation", "limit": _ROWS},
    "safety": {"source": "tiny:refusals/train", "limit": _ROWS, "loss_on": "response"},
    "basis": {"source": "tiny:refusals/train", "limit": _ROWS},
    "utility": {"source": "tiny:arithmetic/train", "limit": _ROWS, "loss_on": "response"},
    "source": {"source": "tiny:texts/train", "format": "text", "equals": {"label": "farm"}, "limit": 32},
    "target": {"source": "tiny:texts/train", "format": "text", "equals": {"label": "sea"}, "limit": 32},
    "preference": {"source": "tiny:preferences/train", "format": "preference", "limit": _ROWS},
}
"""Made-up rows by role, used where the user has not given rows yet."""
_DRAWN: Mapping[str, JsonObject] = {
    "train": {"source": "pixels:digits/train", "format": "image", "limit": _ROWS},
    "source": {"source": "pixels:digits/test", "format": "text", "equals": {"text": "three"}, "limit": 1, "seeds": [0, 16]},
    "target": {"source": "pixels:digits/test", "format": "text", "equals": {"text": "eight"}, "limit": 1, "seeds": [16, 32]},
}
_MISSING = re.compile(r"data\.(\w+)")
_WANTED = re.compile(r"data\.(\w+)\.(\w+): set (\w+)")
"""Beginnings of messages of the checks that ask for a data set, and for a setting of one."""
_LINE = 118


@dataclass
class Template:
    """The settings of a first job that differ from the defaults, and why."""

    method: str
    model: str
    kind: str
    given: Mapping[str, JsonObject]
    """Data sets that the user has given, by role."""
    data: dict[str, JsonObject] = field(default_factory=dict)
    modules: str | None = None
    max_tokens: int = 256

    @property
    def entry(self) -> Method:
        """The method's entry in the table."""
        return methods.METHODS[self.method]

    @property
    def is_drawing(self) -> bool:
        """Whether the model draws images."""
        return self.kind == "diffusion"

    def tree(self) -> JsonObject:
        """Return the job as a tree of scalars."""
        model: JsonObject = {"source": self.model, **({"kind": self.kind} if self.is_drawing else {})}
        tree: JsonObject = {"name": f"my-{self.method.replace('_', '-')}", "model": model, "data": dict(self.data)}
        tree["method"] = {"name": self.method}
        if issubclass(self.entry.Config, SteeringConfig):
            pooling = self.entry.Config.model_fields["pooling"].default
            # The method's default may name modules that this model lacks.
            if self.entry.Config.model_fields["steer"].default is not None:
                tree["method"] = {"name": self.method, "steer": {"modules": self.modules}}
            tree["extract"] = {"select": {"modules": self.modules}, "pooling": [pooling], "max_tokens": self.max_tokens}
        if isinstance(self.entry, Trained):
            rate = 1e-5 if self.entry.leaves_model else 1e-3
            tree["train"] = {"steps": _STEPS, "lr": rate, "micro_batch": 8, "max_tokens": self.max_tokens}
        tree["evaluate"] = list(self._tasks())
        return tree

    def _tasks(self) -> Iterator[JsonObject]:
        strengths: JsonObject = {"strengths": [1, 0]} if self.entry.leaves_patch and not self.entry.leaves_model else {}
        if self.is_drawing:
            prompts = self.data.get("source") or {**_DRAWN["source"], "seeds": [0, 16]}
            yield {"task": "diversity", "data": {**prompts}, "classifier": {**_DRAWN["train"]}, **strengths}
            return
        if "preference" in self.data:
            yield {"task": "preference", "pairs": _held_out(self.data["preference"]), **strengths}
            return
        role = next(role for role in ("train", "target", "source", "safety") if role in self.data)
        yield {"task": "perplexity", "data": _held_out(self.data[role]), **strengths}

    def job(self) -> Job:
        """Return the job. Raises JobError."""
        return validate(self.tree(), JobType, Path("init"))


def _held_out(data: JsonObject) -> JsonObject:
    """Return a data set of the evaluation: the test rows of a made-up source, the same rows of a file."""
    source = data["source"]
    assert isinstance(source, str)
    held_out = source.replace("/train", "/test") if source.startswith("tiny:") else source
    return {**{name: value for name, value in data.items() if name != "loss_on"}, "source": held_out, "limit": _ROWS}


def of(method: str, model: str, given: Mapping[str, str]) -> Template:
    """Return a template that passes the checks of `steerlab plan`.

    Args:
        method: Name of a method.
        model: Source of the model.
        given: Sources of rows by role; the role "" is that of the rows which the method works on.

    Raises:
        ValueError: the method is not known, no format fits the rows, or the method does not support the model.
    """
    if method not in methods.METHODS:
        # The validation of a job has the better message: it lists the methods, and names the nearest one.
        validate({"name": "first", "model": {"source": model}, "method": {"name": method}}, JobType, Path("init"))
    facts = models.facts(sources.fetch(_absolute(model)))
    entry = methods.METHODS[method]
    main = (
        entry.module.trains_on
        if isinstance(entry, Trained) and not entry.reads(entry.Config.model_validate({"name": method}))
        else "source"
    )
    named = {(role or main): source for role, source in given.items()}
    unknown = [role for role in named if role not in _TINY]
    if unknown:
        raise ValueError(f"--data {unknown[0]}=...: there are {', '.join(_TINY)}")
    sets = {role: {"source": source, **guessing.settings_of(source, role)} for role, source in named.items()}
    template = Template(method, model, facts.kind, sets, max_tokens=_longest(facts))
    template.modules = _modules(template)
    for role in [main, *(role for role in sets if role != main)]:
        template.data[role] = dict(sets.get(role) or _stand_in(template, role))
    return _completed(template)


def _longest(facts: ModelFacts) -> int:
    return min(256, facts.max_positions or 256)


def _absolute(model: str) -> str:
    source = ModelConfig.model_validate({"source": model}).source
    assert isinstance(source, str)
    return source


def _stand_in(template: Template, role: str) -> JsonObject:
    table = _DRAWN if template.is_drawing else _TINY
    if role not in table:
        raise ValueError(f"method {template.method} needs rows of data.{role}: give them with --data {role}=FILE")
    return table[role]


def _completed(template: Template) -> Template:
    """Add the data sets and settings that the method asks for, until the checks before a start pass. Raises ValueError."""
    while True:
        try:
            planned = Plan.of(template.job())
            runs.check(planned)
            return template
        except ValueError as error:
            wanted = _WANTED.search(str(error))
            if wanted is not None and template.data.get(wanted[1], {}).get(wanted[2]) != wanted[3]:
                template.data[wanted[1]][wanted[2]] = wanted[3]
                continue
            missing = _MISSING.search(str(error))
            if missing is None or missing[1] not in _TINY or missing[1] in template.data:
                raise
            template.data[missing[1]] = dict(_stand_in(template, missing[1]))


def _modules(template: Template) -> str | None:
    """Return an expression of modules that the model has, for a first job to steer; None if the method steers none."""
    if not issubclass(template.entry.Config, SteeringConfig):
        return None
    skeleton = models.skeleton(sources.fetch(_absolute(template.model)), False)
    for pattern in (r"unet.*norm.*", *_NORMS) if template.is_drawing else _NORMS:
        try:
            taps.select(skeleton, Selection(modules=pattern))
            return pattern
        except ValueError:
            continue
    raise ValueError(f"{template.model} has no module whose name contains norm: set modules in extract.select.modules of a job")


def written(template: Template, job_file: Path) -> tuple[str, str]:
    """Return the texts of the job file and of its search space."""
    return "\n".join(_job_lines(template, job_file)) + "\n", _space(template, job_file)


def _job_lines(template: Template, job_file: Path) -> Iterator[str]:
    tree = template.tree()
    title = (template.entry.Config.__doc__ or "").strip().split("\n")[0]
    yield f"# A first job with the method {template.method}: {title}"
    yield f"# steerlab plan {job_file}    what would run; steerlab run {job_file} runs it; steerlab describe {template.method}"
    yield f"name: {tree['name']}"
    yield f"model: {flow(tree['model'])}  # a folder, hf:OWNER/NAME, or another source: steerlab describe source"
    yield "data:"
    for role, data in template.data.items():
        note = "" if role in template.given else "  # a stand-in: put rows of your own here"
        yield f"  {role}: {flow(data)}{note}"
    yield "  # prompt_style: plain            # the bare texts in the chat template, without ASIDE's headings"
    yield from _method_lines(template)
    if "extract" in tree:
        yield f"extract: {flow(tree['extract'])}  # where activations are extracted"
    if "train" in tree:
        yield "train:"
        about = {name: meaning for name, _, _, meaning in rows(TrainConfig)}
        train = tree["train"]
        assert isinstance(train, dict)
        yield from (_commented(f"  {name}: {flow(value)}", about[name]) for name, value in train.items())
    yield "evaluate:"
    tasks = tree["evaluate"]
    assert isinstance(tasks, list)
    yield from (f"  - {flow(task)}" for task in tasks)
    yield "# Name rows here on which the method was not fitted. `steerlab describe tasks` lists all tasks."


def _method_lines(template: Template) -> Iterator[str]:
    yield "method:"
    settings = template.tree()["method"]
    assert isinstance(settings, dict)
    yield from (f"  {name}: {flow(value)}" for name, value in settings.items())
    for name, _, default, meaning in rows(template.entry.Config):
        # A field of a nested config is skipped: it could not be given without the rest of that config.
        if name not in settings and "." not in name and default != "required":
            yield _commented(f"  # {name}: {default.strip('`')}", meaning)


def _commented(line: str, meaning: str) -> str:
    """Return a line with the first sentence of a field's meaning, cut to the width of a page."""
    sentence = re.split(r"(?<=[.;])\s", meaning, maxsplit=1)[0].rstrip(".;")
    start = f"{line:<40}  # "
    return start + textwrap.shorten(sentence, max(20, _LINE - len(start)), placeholder=" ...")


_KNOBS: tuple[tuple[Callable[[Template], bool], str, str], ...] = (
    (lambda t: t.entry.leaves_patch and not t.entry.leaves_model, "strength", "[0.0, 0.25, 0.5, 0.75, 1.0]"),
    (lambda t: isinstance(t.entry, Trained), "train.lr", "[1e-5, 1e-4, 1e-3]"),
)


def _space(template: Template, job_file: Path) -> str:
    """Return the text of a search space over the strength of the patch, or over the learning rate."""
    key, values = next(((key, values) for fits, key, values in _KNOBS if fits(template)), ("strength", "[0.0, 0.5, 1.0]"))
    metric, mode = _metric(template)
    return (
        f'"""A first search space for {job_file.name}: {key}.\n\nsteerlab sweep {job_file} {space_file(job_file)}\n"""\n\n'
        "from ray import tune\n\n"
        f'SPACE = {{"{key}": tune.grid_search({values})}}  # any field of the job; also tune.loguniform, tune.choice, ...\n'
        f'METRIC = "{metric}"  # of the job\'s tasks: steerlab describe TASK\n'
        f'MODE = "{mode}"\n'
    )


def _metric(template: Template) -> tuple[str, str]:
    """Return the first metric of the job's task that has a better direction, and how it is optimised."""
    task = template.job().evaluate[0]
    measures = evaluation.TASKS[task.task].measures(task)
    chosen = next(measure for measure in measures if measure.better is not None)
    return f"{task.task}/{chosen.name}", "max" if chosen.better == "higher" else "min"


def space_file(job_file: Path) -> Path:
    """Return the path of the search space beside a job file."""
    return job_file.with_name(f"{job_file.stem.replace('-', '_')}_space.py")


def checked(job_file: Path) -> None:
    """Read the written job and space as `plan` and `sweep` do. Raises ValueError if these commands would refuse them."""
    from steerlab import job as jobs
    from steerlab.sweeps import space as spaces
    from steerlab.sweeps import trials

    runs.check(Plan.of(jobs.read(job_file, JobType)), job_file)
    trials.plan(job_file, (), spaces.load(space_file(job_file)))
