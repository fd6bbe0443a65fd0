"""The catalogue of methods, tasks, sections of a job and sources, as Markdown.

Every sentence in it is one that the code already has: the docstrings of modules, configs and fields, and their JSON schema.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeAlias, get_args

from pydantic import BaseModel, JsonValue, TypeAdapter

from steerlab import evaluation, methods
from steerlab.evaluation.statistics.measures import Measure
from steerlab.job import (
    ChooseConfig,
    DataConfig,
    DataSet,
    ExtractConfig,
    JobError,
    Limit,
    MethodConfig,
    ModelConfig,
    SamplerConfig,
    ScaleConfig,
    Selection,
    TaskConfig,
    TrackConfig,
    TrainConfig,
    WandbConfig,
    grammar,
)
from steerlab.stages import JobType

_Schema: TypeAlias = Mapping[str, JsonValue]

_SECTIONS: dict[str, type[BaseModel]] = {
    "job": JobType,
    "model": ModelConfig,
    "sampler": SamplerConfig,
    "data": DataConfig,
    "data set": DataSet,
    "extract": ExtractConfig,
    "selection": Selection,
    "train": TrainConfig,
    "scale": ScaleConfig,
    "choose": ChooseConfig,
    "choose.within": Limit,
    "evaluate": TaskConfig,
    "track": TrackConfig,
    "track.wandb": WandbConfig,
}
"""Sections of a job file by the name that people look for."""
_CLIP = "hf:openai/clip-vit-base-patch32"
_DRAWN: dict[str, JsonValue] = {"source": "pixels:digits/test", "format": "text", "seeds": [0, 5]}
_REQUIRED: dict[str, dict[str, JsonValue]] = {
    "win_rate": {"judge_source": "hf:ORG/NAME"},
    "struq": {"source": "alpaca_farm_evaluations.json"},
    "bipia": {"source": "BIPIA/benchmark"},
    "purple": {"source": "purple.json"},
    "concept": {"concept": "sea"},
    "lm_eval": {"name": "arc_easy"},
    "image_concept": {"data": _DRAWN, "concept": "bold", "clip_source": _CLIP},
    "image_similarity": {"data": _DRAWN},
    "diversity": {"data": _DRAWN},
    "clip_score": {"data": _DRAWN, "clip_source": _CLIP},
    "controllability": {"of": {"task": "perplexity"}, "metric": "perplexity/value"},
}
"""Values of the fields without a default, in the example of a task."""
_ARROWS = {"lower": "↓", "higher": "↑", None: ""}


@dataclass(frozen=True)
class Entry:
    """One thing that can be described: a method, a task or a section of a job."""

    name: str
    kind: str
    Config: type[BaseModel]
    inherited: frozenset[str] = frozenset()
    """Fields that are described once for all entries of this kind."""

    @cached_property
    def about(self) -> str:
        """The docstring of a method's or task's module (what it is, the paper, where this code departs), or of a section."""
        # A file of one's own is no module that others can import.
        described = self.Config if self.kind == "section" else sys.modules.get(self.Config.__module__, self.Config)
        paragraphs = (inspect.getdoc(described) or "").split("\n\n")
        return "\n\n".join(_paragraph(paragraph) for paragraph in paragraphs)

    def fields(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield name, type with its range, default and meaning of each field."""
        for name, kind, default, meaning in _fields(self.Config):
            if name.partition(".")[0] not in self.inherited:
                yield name, kind, default, meaning


def _paragraph(text: str) -> str:
    """Return a paragraph of a docstring as Markdown: what is indented or holds columns is shown as it is."""
    lines = text.split("\n")
    is_list = any(line.startswith("- ") for line in lines)
    shown = [number for number, line in enumerate(lines) if line.startswith("  ") or re.search(r"\S   +\S", line)]
    if is_list or not shown:
        return text
    first = shown[0]
    return "\n".join([*lines[:first], *([""] if first else []), "```text", *lines[first:], "```"])


def _fields(config: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str, str]]:
    """Yield the fields of a config; those of a config within that is no section of its own follow, under its name."""
    schema = config.model_json_schema()
    if "$ref" in schema:  # a config that holds others of its own kind
        schema = schema["$defs"][schema["$ref"].rpartition("/")[2]]
    required = _names(schema.get("required"))
    for name, field in _objects(schema.get("properties")).items():
        meaning = " ".join(str(field.get("description", "")).split())
        default = "required" if name in required else _default(config.model_fields[name].get_default(call_default_factory=True))
        yield f"{prefix}{name}", _type(field), default, meaning
        for within in _configs_within(config.model_fields[name].annotation):
            yield from _fields(within, f"{prefix}{name}.")


def _configs_within(annotation: object) -> Iterator[type[BaseModel]]:
    """Yield the configs of an annotation, those of sections, methods and tasks left out: they are described by themselves."""
    described = {*_SECTIONS.values()}
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        if annotation not in described and not issubclass(annotation, MethodConfig | TaskConfig):
            yield annotation
        return
    for argument in get_args(annotation):
        yield from _configs_within(argument)


def entries() -> list[Entry]:
    """Return everything that can be described: sections, methods, tasks."""
    of_tasks = frozenset(TaskConfig.model_fields)
    return [
        *(Entry(name, "section", config) for name, config in _SECTIONS.items()),
        *(Entry(name, "method", method.Config, frozenset({"name"})) for name, method in methods.METHODS.items()),
        *(Entry(name, "task", task.Config, of_tasks) for name, task in evaluation.TASKS.items()),
    ]


def describe(name: str) -> str:
    """Return what is known of a method, a task, a section or `source`, as Markdown. Raises ValueError with near names."""
    if name in ("source", "sources"):
        return _sources()
    if name.endswith(".py"):
        return _written(_own(name))
    described = {entry.name: entry for entry in entries()}
    if name not in described:
        with_field = [entry.name for entry in described.values() if name in {field for field, *_ in entry.fields()}]
        if with_field:
            raise ValueError(f"{name} is a field of {', '.join(with_field)}: describe one of them")
        near = difflib.get_close_matches(name, [*described, "source"], n=3) or [*described, "source"]
        raise ValueError(f"nothing is called {name!r:.60}; there are {', '.join(near)}")
    return _written(described[name])


def _own(file: str) -> Entry:
    """Return the method or task of a file. Raises ValueError, JobError."""
    try:
        return Entry(file, "method", methods.TABLE.of_file(file).Config, frozenset({"name"}))
    except JobError as of_method:
        try:
            return Entry(file, "task", evaluation.TABLE.of_file(file).Config, frozenset(TaskConfig.model_fields))
        except JobError:
            raise of_method from None


def catalogue() -> str:
    """Return the whole catalogue as one Markdown page."""
    found = entries()
    parts = [
        "# Catalogue",
        "Methods, tasks, the sections of a job, and sources, with every field. This page is printed by\n"
        "`python -m steerlab describe --all`; a test compares the two. `steerlab describe NAME` prints one entry.",
        *(f"## {title}\n\n{intro}" for title, intro in (("Methods", _METHODS),)),
        *(_written(entry) for entry in found if entry.kind == "method"),
        f"## Tasks\n\n{_TASKS}",
        *(_written(entry) for entry in found if entry.kind == "task"),
        f"## Sections of a job\n\n{_OF_SECTIONS}",
        *(_written(entry) for entry in found if entry.kind == "section"),
        _sources(),
    ]
    return "\n\n".join(parts) + "\n"


_METHODS = "Fields of `method`. The arrow after a measure of a task says which way is better."
_TASKS = "An entry of `evaluate`. The fields that every task has are those of [evaluate](#evaluate-section)."
_OF_SECTIONS = (
    "`data set` stands for each data set below `data` and in tasks, `selection` for `extract.select` and `method.steer`."
)


def example(entry: Entry) -> str:
    """Return a minimal use of a method or task: a job of this repository, or an entry of `evaluate`."""
    if entry.kind == "task":
        return f"{{{', '.join(f'{name}: {_flow(value)}' for name, value in task_example(entry.name).items())}}}"
    file, override = method_example(entry.name)
    return f"steerlab run {file}{override}"


def task_example(name: str) -> dict[str, JsonValue]:
    """Return the smallest entry of `evaluate` with a task."""
    return {"task": name, **_REQUIRED.get(name, {})}


def method_example(name: str) -> tuple[str, str]:
    """Return a job file of this repository with a method, and the override for a method that the file does not name."""
    fitted = isinstance(methods.METHODS[name], methods.Fitted)
    file = _FILES.get(name, "act" if fitted else name)
    return f"jobs/tiny/{file}.yaml", f" --set method.name={name}" if fitted and file == "act" else ""


_FILES = {"none": "extract", "denoise": "digits"}
"""Jobs of jobs/tiny that are not called by the name of their method."""


def _written(entry: Entry) -> str:
    parts = [f"### {entry.name} ({entry.kind})", entry.about]
    if entry.name in evaluation.TASKS:
        parts.append(_measured(entry))
    if entry.name in evaluation.TASKS or entry.name in methods.METHODS:
        parts.append(f"Minimal {'entry' if entry.kind == 'task' else 'job'}: `{example(entry)}`")
    rows = ["| " + " | ".join(_cell(text) for text in (f"`{field[0]}`", *field[1:])) + " |" for field in entry.fields()]
    if rows:
        parts.append("\n".join(["| field | type | default | meaning |", "|---|---|---|---|", *rows]))
    return "\n\n".join(parts)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*") if "`" not in text else text.replace("|", "\\|")


def _measured(entry: Entry) -> str:
    task = evaluation.TASKS[entry.name]
    config = task.Config.model_validate(task_example(entry.name))
    return f"Measures: {', '.join(_measure(entry.name, measure) for measure in task.measures(config))}."


def _measure(task: str, measure: Measure) -> str:
    arrow = _ARROWS[measure.better]
    return f"`{task}/{measure.name}`" + (f" {arrow}" if arrow else "") + (f" ({measure.unit})" if measure.unit else "")


def _sources() -> str:
    grammar_text = (inspect.getdoc(grammar) or "").partition("\n\n")[2].strip()
    return f"### source (sources)\n\nWhere models and rows come from.\n\n```text\n{grammar_text}\n```"


def _names(value: JsonValue) -> list[str]:
    return [str(name) for name in value] if isinstance(value, list) else []


def _objects(value: JsonValue) -> dict[str, dict[str, JsonValue]]:
    return {name: one for name, one in value.items() if isinstance(one, dict)} if isinstance(value, dict) else {}


_LONGEST = 90
"""Characters of a default that are shown."""


def _default(default: object) -> str:
    """Write a default; of a config within, what differs from its own defaults."""
    if isinstance(default, BaseModel):
        value = default.model_dump(mode="json", exclude_defaults=True)
    else:
        value = TypeAdapter(object).dump_python(default, mode="json")
    if isinstance(value, list) and len(value) > 4:
        return f"{len(value)} values"
    text = _flow(value).replace("\n", "\\n").replace("`", "'")
    return f"`{text}`" if len(text) <= _LONGEST else f"`{text[: _LONGEST - 1]}…`"


def _flow(value: JsonValue) -> str:
    """Write a value as YAML in one line."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name}: {_flow(one)}" for name, one in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, str):
        return f'"{value}"' if not value or set(value) & set(":#,[]{}") else value
    return f"{value:.6g}" if isinstance(value, float) else str(value)


_BOUNDS = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))


def _type(field: _Schema) -> str:
    """Write the type of a field: what it may be and within which range."""
    if "enum" in field or "const" in field:
        choices = field.get("enum", [field.get("const")])
        return " or ".join(f"`{_flow(choice)}`" for choice in choices) if isinstance(choices, list) else ""
    if "$ref" in field:
        return _referred(str(field["$ref"]))
    if isinstance(tagged := field.get("discriminator"), dict):
        return "[a task](#tasks)" if tagged["propertyName"] == "task" else "[a method](#methods)"
    for several in ("anyOf", "oneOf", "allOf"):
        options = field.get(several)
        if isinstance(options, list):
            return " or ".join(dict.fromkeys(_type(one) for one in options if isinstance(one, dict)))
    return _WRITTEN.get(str(field.get("type")), _anything)(field)


def _referred(reference: str) -> str:
    name = reference.rpartition("/")[2]
    section = next((section for section, config in _SECTIONS.items() if config.__name__ == name), None)
    return f"[{section}](#{section.replace(' ', '-').replace('.', '')}-section)" if section else f"a {name.lower()}"


def _number(field: _Schema) -> str:
    bounds = ", ".join(f"{sign} {_flow(field[key])}" for key, sign in _BOUNDS if key in field)
    return ("integer" if field["type"] == "integer" else "number") + (f" {bounds}" if bounds else "")


def _array(field: _Schema) -> str:
    items, prefix = field.get("items"), field.get("prefixItems")
    if isinstance(prefix, list):
        return f"pair of {_type(prefix[0])}" if isinstance(prefix[0], dict) else "pair"
    return f"list of {_type(items)}" if isinstance(items, dict) and items else "list"


def _object(field: _Schema) -> str:
    values = field.get("additionalProperties")
    return f"names to {_type(values)}" if isinstance(values, dict) and values else "object"


def _anything(field: _Schema) -> str:
    return "any value"


_WRITTEN: dict[str, Callable[[_Schema], str]] = {
    "integer": _number,
    "number": _number,
    "array": _array,
    "object": _object,
    "string": lambda field: "text",
    "boolean": lambda field: "true or false",
    "null": lambda field: "null",
}
