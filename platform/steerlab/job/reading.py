"""Read a job file, apply overrides, inline the jobs that it builds on, validate; dump it, print its schema."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from steerlab.job.frozen import JobError
from steerlab.job.messages import explain
from steerlab.job.model import JOB_PREFIX
from steerlab.job.whole import Job


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
