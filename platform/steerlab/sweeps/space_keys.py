"""Refuse unknown keys of a search space, with the path that was probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

from steerlab.job import Job, JobError
from steerlab.stages import JobType
from steerlab.sweeps.space import Space


def check_keys(space: Space, job: Job) -> None:
    """Refuse keys whose first part is not a field of a job. Deeper parts are checked when the job is validated."""
    sections = list(JobType.model_fields)
    written = [("SPACE", entry) for entry in space.entries]
    written += [(f"SEEDS[{number}]", key) for number, settings in enumerate(space.seeds) for key in settings]
    for where, entry in written:
        for key in [part.strip() for part in entry.split(",")] if "," in entry else [entry]:
            if key.partition(".")[0] not in sections:
                near = _nearest_path(key, [*sections, *_paths(job.model_dump(mode="json"), "")])
                hint = f"did you mean {near!r}? " if near else ""
                raise JobError(f"{space.path}: {where}[{entry!r}]: unknown key; {hint}valid beginnings: {', '.join(sections)}")


def _paths(node: object, prefix: str) -> Iterator[str]:
    """Yield the paths of all fields of a job's tree."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in items:
        yield f"{prefix}{name}"
        yield from _paths(child, f"{prefix}{name}.")


def _nearest_path(key: str, paths: Iterable[str]) -> str | None:
    """Return the path that ends most like `key`: users often omit the beginning, as in `steer.layers`."""
    ends: dict[str, str] = {}
    for path in sorted(paths, key=lambda path: path.count(".")):  # among equal ends, the least nested one
        parts = path.split(".")
        for number in range(len(parts)):
            ends.setdefault(".".join(parts[number:]), path)
    # A lower cutoff than 0.65 would take `share` for `where`: the paths of a job have hundreds of different ends.
    near = difflib.get_close_matches(key, ends, n=1, cutoff=0.65)
    return ends[near[0]] if near else None
