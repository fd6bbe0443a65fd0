"""The catalogue of methods, tasks, sections of a job and sources, as Markdown.

All its sentences come from the code: the docstrings of modules, configs and fields, and their JSON schema.
"""

from __future__ import annotations

import difflib
import inspect
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from pydantic import BaseModel, JsonValue

from steerlab import evaluation, methods
from steerlab.cli import field_table
from steerlab.evaluation.statistics.measures import Measure
from steerlab.job import JobError, TaskConfig, grammar

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
        # The module of a user's own file is not in `sys.modules`, so the docstring of its config is taken instead.
        described = self.Config if self.kind == "section" else sys.modules.get(self.Config.__module__, self.Config)
        paragraphs = (inspect.getdoc(described) or "").split("\n\n")
        return "\n\n".join(_paragraph(paragraph) for paragraph in paragraphs)

    def fields(self) -> Iterator[tuple[str, str, str, str]]:
        """Yield name, type with its range, default and meaning of each field."""
        for name, kind, default, meaning in field_table.rows(self.Config):
            if name.partition(".")[0] not in self.inherited:
                yield name, kind, default, meaning


def _paragraph(text: str) -> str:
    """Return a paragraph of a docstring as Markdown: indented lines and lines with columns become a code block."""
    lines = text.split("\n")
    is_list = any(line.startswith("- ") for line in lines)
    shown = [number for number, line in enumerate(lines) if line.startswith("  ") or re.search(r"\S   +\S", line)]
    if is_list or not shown:
        return text
    first = shown[0]
    return "\n".join([*lines[:first], *([""] if first else []), "```text", *lines[first:], "```"])


def entries() -> list[Entry]:
    """Return everything that can be described: sections, methods, tasks."""
    of_tasks = frozenset(TaskConfig.model_fields)
    return [
        *(Entry(name, "section", config) for name, config in field_table.SECTIONS.items()),
        *(Entry(name, "method", method.Config, frozenset({"name"})) for name, method in methods.METHODS.items()),
        *(Entry(name, "task", task.Config, of_tasks) for name, task in evaluation.TASKS.items()),
    ]


def describe(name: str) -> str:
    """Return the description of a method, a task, a section, a field or `source`, as Markdown.

    `methods`, `tasks` and `sections` list them. Raises ValueError with near names.
    """
    if name in ("source", "sources"):
        return _sources()
    if name.endswith(".py"):
        return _written(_own(name))
    described = {entry.name: entry for entry in entries()}
    if name in described:
        return _written(described[name])
    if (kind := name.removesuffix("s")) in ("method", "task", "section"):
        return _listed([entry for entry in described.values() if entry.kind == kind])
    if fields := _fields(name, described.values()):
        return _table(("of", "field", "type", "default", "meaning"), fields)
    known = [*described, "source", *dict.fromkeys(field for entry in described.values() for field, *_ in entry.fields())]
    near = difflib.get_close_matches(name, known, n=3) or [*described, "source"]
    raise ValueError(f"nothing is called {name!r:.60}; there are {', '.join(near)}")


def names() -> list[str]:
    """Return all names that `describe` takes, for the completion in a shell."""
    return ["source", "methods", "tasks", "sections", *(entry.name for entry in entries())]


def _listed(some: Iterable[Entry]) -> str:
    """Return a table of methods, tasks or sections with the first sentence about each."""
    rows = [(f"`{entry.name}`", " ".join(entry.about.split("\n\n")[0].split())) for entry in some]
    return _table(("name", "what it is"), rows)


def _fields(name: str, some: Iterable[Entry]) -> list[tuple[str, str, str, str, str]]:
    """Return the rows of all fields of one name, `lr`, or of one section's field, `train.lr`."""
    of, _, field = name.rpartition(".")
    fields = [(entry, row) for entry in some for row in entry.fields() if row[0] in (field, name)]
    return [(f"`{entry.name}`", f"`{row[0]}`", *row[1:]) for entry, row in fields if of in ("", entry.name) or row[0] == name]


def _table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(_cell(text) for text in row) + " |" for row in body]
    return "\n".join(["| " + " | ".join(header) + " |", "|" + "---|" * len(header), *lines])


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
    described = entries()
    parts = [
        "# Catalogue",
        "Methods, tasks, the sections of a job, and sources, with every field. This page is printed by\n"
        "`python -m steerlab describe --all`; a test compares the two. `steerlab describe NAME` prints one entry.",
        f"## Methods\n\n{_METHODS}",
        *(_written(entry) for entry in described if entry.kind == "method"),
        f"## Tasks\n\n{_TASKS}",
        *(_written(entry) for entry in described if entry.kind == "task"),
        f"## Sections of a job\n\n{_OF_SECTIONS}",
        *(_written(entry) for entry in described if entry.kind == "section"),
        _sources(),
    ]
    return "\n\n".join(parts) + "\n"


_METHODS = "Fields of `method`. The arrow after a measure of a task says which way is better."
_TASKS = "An entry of `evaluate`. The fields that every task has are those of [evaluate](#evaluate-section)."
_OF_SECTIONS = "`data set` means each data set below `data` and in tasks, `selection` for `extract.select` and `method.steer`."


def example(entry: Entry) -> str | None:
    """Return a minimal use of a method or task: a job of this repository, or an entry of `evaluate`. None without one."""
    if entry.kind == "task":
        return f"{{{', '.join(f'{name}: {field_table.flow(value)}' for name, value in task_example(entry.name).items())}}}"
    job = method_example(entry.name)
    return None if job is None else f"steerlab run {' '.join(job)}"


def task_example(name: str) -> dict[str, JsonValue]:
    """Return the smallest entry of `evaluate` with a task."""
    return {"task": name, **evaluation.TASKS[name].example}


def method_example(name: str) -> tuple[str, ...] | None:
    """Return a job file of this repository for a method, and the option that sets the method if the file names another one."""
    method = methods.METHODS[name]
    if method.example is not None:
        return (method.example,)
    return None if method.shared_example is None else (method.shared_example, "--set", f"method.name={name}")


def _written(entry: Entry) -> str:
    parts = [f"### {entry.name} ({entry.kind})", entry.about]
    if entry.name in evaluation.TASKS:
        parts.append(_measured(entry))
    is_own = entry.name not in evaluation.TASKS and entry.name not in methods.METHODS
    if not is_own and (minimal := example(entry)) is not None:
        parts.append(f"Minimal {'entry' if entry.kind == 'task' else 'job'}: `{minimal}`")
    rows = [(f"`{field[0]}`", *field[1:]) for field in entry.fields()]
    if rows:
        parts.append(_table(("field", "type", "default", "meaning"), rows))
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
