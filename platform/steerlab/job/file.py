"""Read a job file, apply overrides, inline the jobs whose models it starts from, validate it, and dump it as YAML."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from steerlab.guards import files, yaml12
from steerlab.guards.json_values import Json, JsonObject
from steerlab.job.job import Job
from steerlab.job.messages import Choices, cut, explain, models_of, of_tag
from steerlab.job.model_config import JOB_PREFIX
from steerlab.job.typed import Implied, JobError

LONGEST = 2**20
"""Largest job file, in bytes."""

_PART = re.compile(r'"([^"]*)"|([^".]*)')


def read(path: str | Path, kind: type[Job], overrides: Sequence[str] = ()) -> Job:
    """Read a job file, apply overrides, inline the jobs whose models it starts from, and validate it.

    Args:
        path: The YAML file.
        kind: The closed job type, from `job_type`.
        overrides: Texts `a.b=c` as `--set` takes them, applied in order.

    Raises:
        JobError: the message names the file, the key, the value and the allowed values.
    """
    return validate(read_tree(path, kind, overrides), kind, Path(path))


def read_tree(path: str | Path, kind: type[Job], overrides: Sequence[str] = ()) -> JsonObject:
    """Read a job file as a tree of scalars and apply overrides, without validating it. Raises JobError."""
    tree = _load_yaml(Path(path))
    for text in overrides:
        override(tree, text, kind)
    return tree


def validate(tree: Mapping[str, Json], kind: type[Job], path: Path) -> Job:
    """Validate a tree of scalars as a job. Raises JobError.

    `path` is the file that messages name, and whose folder relative `job:` sources start from.
    """
    # Jobs are inlined before validation, which needs the settings of the inner job (`Job._with_prompt_of_base`).
    tree = _inline_jobs(dict(tree), kind, path)
    try:
        return kind.model_validate(tree)
    except ValidationError as error:
        raise JobError(explain(error, kind, str(path))) from None


def inlined(tree: Mapping[str, Json], kind: type[Job], path: Path) -> JsonObject:
    """Return a job's tree with every `job:FILE` replaced by that job's own tree. Raises JobError."""
    return _inline_jobs(dict(tree), kind, path)


def dump(job: Job) -> str:
    """Return a job as YAML, which `read` reads back to an equal job."""
    return yaml12.dump(job.model_dump(mode="json"))


def base_job(job: Job, kind: type[Job]) -> Job | None:
    """Return the job that trains the starting model of this job; None if the model comes from a source."""
    return None if isinstance(job.model.source, str) else kind.model_validate(job.model.source)


def _load_yaml(path: Path) -> JsonObject:
    """Return the mapping in a YAML file. Raises JobError, with the line if it is known, for anything else."""
    content = b""
    try:
        content = files.read(path, LONGEST)
        tree = yaml12.load(content.decode("utf-8-sig"))  # editors on Windows put a byte order mark first
    except FileNotFoundError:
        # Only jobs of the same folder are suggested; searching further would suggest jobs of other studies.
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        # The cutoff is low: most of the path is the same folder, but a name may be misspelt a lot.
        hint = difflib.get_close_matches(str(path), near, n=1, cutoff=0.3)
        raise JobError(f"{path.absolute()}: no such job file" + (f"; did you mean {hint[0]}?" if hint else "")) from None
    except files.FileError as error:
        raise JobError(f"{error}, so it is not a job") from None
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise JobError(f"{path}:{line}: cannot be read as YAML: the file is not UTF-8 text") from None
    except OSError as error:
        raise JobError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml12.YamlError as error:
        where = f"{path}:{error.line}" if error.line else str(path)
        raise JobError(f"{where}: cannot be read as YAML: {error}") from None
    if not isinstance(tree, dict):
        holds = "the file is empty" if tree is None else f"the file holds {'a list' if isinstance(tree, list) else 'one value'}"
        raise JobError(f"{path}: {holds}; a job is a mapping with the keys {', '.join(Job.model_fields)}")
    return tree


def override(tree: JsonObject, text: str, kind: type[Job]) -> None:
    """Apply one `--set` argument to a tree, in place. Raises JobError."""
    where = f"--set {cut(text)}"
    if not (match := re.fullmatch(r'((?:"[^"]*"|[^"=])+)=(.*)', text, re.DOTALL)):
        raise JobError(f"{where}: expected a.b=c")
    key, value = match.groups()
    try:
        # The value is parsed as YAML, so that it means the same in a file and on the command line.
        parsed = yaml12.load_value(value)
    except yaml12.YamlError as error:
        raise JobError(f"{where}: the value cannot be read as YAML: {error}; a text goes in quotes: '{key}=\"...\"'") from None
    if isinstance(parsed, str) and parsed.startswith(JOB_PREFIX):
        # A relative path in a job file starts from that file's folder; on the command line, from the current folder.
        parsed = f"{JOB_PREFIX}{_expanded(parsed, where).absolute()}"
    put(tree, key, parsed, where, kind)


def _expanded(source: str, where: str) -> Path:
    """Return the path in `job:PATH`, with `~` expanded; `where` begins the message of a JobError."""
    # Null characters are refused here, because `Path` accepts them and the operating system's error does not name the problem.
    if "\0" in source:
        raise JobError(f"{where} {cut(source)}: no path holds a null character")
    try:
        return Path(source.removeprefix(JOB_PREFIX)).expanduser()
    except RuntimeError:
        raise JobError(f"{where} {cut(source)}: this machine has no user of this name") from None


def put(tree: JsonObject, key: str, value: Json, where: str, kind: type[Job]) -> None:
    """Set one value of a tree, in place.

    A section that the tree does not have starts from its default, so that a single value of a default can be changed.

    Args:
        tree: A job as a tree of scalars.
        key: Path of the value: `evaluate.0.limit`; list items by number from 0, a key that contains dots in "quotes".
        value: The new value.
        where: Beginning of the message of an error.
        kind: The job type, which knows the defaults.

    Raises:
        JobError: the path leads through a scalar or past the end of a list.
    """
    node: Json = tree
    models: list[type[BaseModel] | Choices] = [kind]
    *parents, last = _parts(key, where)
    for part in parents:
        if isinstance(node, list):
            node = node[_index(node, part, where)]
        else:
            # A union has several models; those that the tag in the tree (`name`, `task`) chooses give the default.
            fields = [model.model_fields[part] for model in of_tag(models, node) if part in model.model_fields]
            # This also replaces an explicit null: `--set train.steps=5` turns the section on.
            if node.get(part) is None:
                node[part] = _default(fields[0], node) if fields else {}
            node, models = node[part], [model for field in fields for model in models_of(field)]
        if not isinstance(node, dict | list):
            raise JobError(f"{where}: {part} holds {cut(repr(node))}, not a group of settings")
    if isinstance(node, list):
        node[_index(node, last, where)] = value
    else:
        node[last] = value


def _default(field: FieldInfo, node: Mapping[str, Json]) -> Json:
    """Return the default of a section of the config `node`, as a tree; an empty section if it has none."""
    implied = next((entry for entry in field.metadata if isinstance(entry, Implied)), None)
    if implied is not None:
        return implied.of(node)
    if isinstance(field.default, BaseModel):
        return field.default.model_dump(mode="json", exclude_unset=True)
    if isinstance(field.default, tuple):
        items = field.default
        return [item.model_dump(mode="json", exclude_unset=True) if isinstance(item, BaseModel) else item for item in items]
    return {}


def _parts(key: str, where: str) -> list[str]:
    """Split the path of a key at its dots; a part in quotes may contain dots."""
    parts, at = [], 0
    while at <= len(key):
        match = _PART.match(key, at)
        part = match and (match[1] if match[1] is not None else match[2].strip())
        if not match or not part or key[match.end() : match.end() + 1] not in ("", "."):
            raise JobError(
                f'{where}: {cut(key)!r} is not the path of a key: a.b.c, list items by number, a key with dots in "quotes"'
            )
        parts.append(part)
        at = match.end() + 1
    return parts


def _index(node: list[Json], part: str, where: str) -> int:
    if not re.fullmatch("[0-9]{1,9}", part) or int(part) >= len(node):
        raise JobError(f"{where}: {cut(part)} is not an item of a list of {len(node)} (numbered from 0)")
    return int(part)


def _inline_jobs(tree: JsonObject, kind: type[Job], path: Path, seen: tuple[Path, ...] = ()) -> JsonObject:
    """Replace `model.source: job:FILE` by that job's tree, recursively; `seen` are the files on the way here."""
    # The path is resolved, because a cycle may go through links or different relative paths.
    here = path.resolve()
    if here in seen:
        raise JobError(f"{path}: model.source forms a circle: {' -> '.join(p.name for p in (*seen, here))}")
    model = tree.get("model")
    if not isinstance(model, dict):
        return tree
    source = model.get("source")
    if isinstance(source, str) and source.startswith(JOB_PREFIX):
        other = path.parent / _expanded(source, f"{path}: model.source")
        try:
            below = _load_yaml(other)
        except JobError as error:
            raise JobError(f"{path}: model.source: {error}") from None
        # The inner jobs are resolved first, because relative paths in them start from their own file's folder.
        below = _inline_jobs(below, kind, other, (*seen, here))
        return {**tree, "model": {**model, "source": _resolved(below, kind, str(other))}}
    if isinstance(source, dict):
        below = _inline_jobs(source, kind, path, seen)
        return {**tree, "model": {**model, "source": _resolved(below, kind, f"{path}: model.source")}}
    return tree


def _resolved(tree: JsonObject, kind: type[Job], where: str) -> JsonObject:
    """Return the validated job as a tree with every default written out, so that equal jobs have equal trees (and keys)."""
    try:
        return kind.model_validate(tree).model_dump(mode="json")
    except ValidationError as error:
        raise JobError(explain(error, kind, where)) from None
