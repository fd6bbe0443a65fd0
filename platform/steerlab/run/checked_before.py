"""Store the results of a job's checks, so that a later command on the same job need not load its model's code.

A check is a pure function of the job, of the files that it names and of the code that checks; its results (sizes of the model,
warnings, estimates) are stored under a hash of these in this machine's cache. A refused job is checked again.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import sys
import sysconfig
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from steerlab.data import sources
from steerlab.guards import files, saved
from steerlab.job import described
from steerlab.models import ModelFacts
from steerlab.run import capacity, checks
from steerlab.run.prompt_checks import state_of
from steerlab.run.task_checks import check_named
from steerlab.stages import Plan
from steerlab.storage.plan import Estimate, Record
from steerlab.storage.whole import written_whole

_LIBRARIES = ("torch", "transformers", "tokenizers", "diffusers", "datasets", "pydantic", "numpy")


def _of_fields(kind: type[object]) -> BeforeValidator:
    """Return an annotation that builds a dataclass from a dict of its fields, which pydantic's strict mode would refuse."""
    return BeforeValidator(lambda value: kind(**value) if isinstance(value, dict) else value)


class _Outcome(saved.Shape):
    """Stored results of a job's checks."""

    facts: Annotated[ModelFacts, _of_fields(ModelFacts)]
    warnings: list[str]
    needs: dict[str, Annotated[Estimate, _of_fields(Estimate)]] = {}
    """Estimate by the key of the stage. A stage that needs little has no entry."""
    estimated: list[str] = []
    """Keys of all stages that were estimated, with or without an entry in `needs`."""


def check(planned: Plan, path: Path | None = None) -> ModelFacts:
    """Refuse a job that cannot work as `checks.check` does, and return the sizes of its model; repeats earlier warnings."""
    file = _file(planned)
    outcome = _read(file)
    if outcome is None:
        facts, texts = _checked(planned, path)
        _write(file, _Outcome(facts=facts, warnings=texts))
        return facts
    for text in outcome.warnings:
        warnings.warn(text, stacklevel=2)
    # Packages, environment variables and services that the tasks name may have changed although no file has.
    for below in planned.chain:
        check_named(below.job, outcome.facts)
    return outcome.facts


def estimates(planned: Plan, facts: ModelFacts, records: list[Record]) -> capacity.Estimates:
    """Estimate memory and disk of the stages that are not cached, as `capacity.estimates` does."""
    left = [record.stage.key for record in records if record.status != "cached"]
    file = _file(planned)
    outcome = _read(file)
    if outcome is not None and set(left) <= set(outcome.estimated):
        return {key: outcome.needs[key] for key in left if key in outcome.needs}
    needs = capacity.estimates(planned, facts, records)
    if outcome is not None:
        more = {"needs": {**outcome.needs, **needs}, "estimated": sorted({*outcome.estimated, *left})}
        _write(file, outcome.model_copy(update=more))
    return needs


def _checked(planned: Plan, path: Path | None) -> tuple[ModelFacts, list[str]]:
    """Check a job; return the sizes of its model and the texts of the warnings, which are also raised as warnings."""
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always", UserWarning)
        try:
            facts = checks.check(planned, path)
        finally:
            texts = list(dict.fromkeys(str(one.message) for one in given if one.category is UserWarning))
    for one in given:
        warnings.warn_explicit(one.message, one.category, one.filename, one.lineno)
    return facts, texts


def _file(planned: Plan) -> Path | None:
    """Return the file of a job's results; None if a source is missing, for which the check has the better message."""
    try:
        jobs = [described(below.job, sources.fingerprint) for below in planned.chain]
        model = state_of(sources.fetch(planned.source))
    except (ValueError, OSError):
        return None
    identity = json.dumps([jobs, model, _code()], sort_keys=True, default=str)
    return sources.cache_root() / "checks" / f"{hashlib.sha256(identity.encode()).hexdigest()}.json"


@cache
def _code() -> Sequence[object]:
    """Return a value that changes with this package, a library or the set of installed packages."""
    here = Path(__file__).parents[1]
    # Times and sizes stand for the content, which would take longer to read: all files are checked each time.
    own = [(str(file.relative_to(here)), file.stat().st_mtime_ns, file.stat().st_size) for file in sorted(here.rglob("*.py"))]
    versions = [importlib.metadata.version(name) for name in _LIBRARIES]
    # The folder changes with every package that is installed into it or removed from it.
    installed = [Path(sysconfig.get_path(kind)).stat().st_mtime_ns for kind in ("purelib", "platlib")]
    return [sys.version, own, versions, installed]


def _read(file: Path | None) -> _Outcome | None:
    """Return stored results; None if they are missing or damaged."""
    try:
        return None if file is None else saved.read(file, _Outcome)
    except (FileNotFoundError, saved.SavedError, files.FileError, TypeError):
        return None


def _write(file: Path | None, outcome: _Outcome) -> None:
    if file is None:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with written_whole(file) as scratch:
            scratch.write_text(outcome.model_dump_json())
    except OSError:
        # If the cache cannot be written, the job is only checked again the next time.
        return
