"""Write a job into a run or sweep folder, with the line by which editors find the schema that completes and explains it."""

from __future__ import annotations

from importlib import resources
from pathlib import PurePosixPath

from steerlab.job import Job, dump
from steerlab.storage.errors import NotTextError
from steerlab.storage.store import Store

_SCHEMA = "schema.json"
"""Path of the schema in ROOT, which the last writing version has replaced with its own."""


def write(store: Store, path: str, job: Job) -> None:
    """Write a job with all its settings to a path below ROOT, and the schema to ROOT.

    The first line names the schema by a relative path, so that it stays valid when ROOT is moved.
    """
    schema = resources.files("steerlab.job").joinpath(_SCHEMA).read_text(encoding="utf-8")
    if _present(store) != schema:
        store.write_text(_SCHEMA, schema)
    up = "../" * (len(PurePosixPath(path).parts) - 1)
    store.write_text(path, f"# yaml-language-server: $schema={up}{_SCHEMA}\n{dump(job)}")


def _present(store: Store) -> str | None:
    try:
        return store.read_text(_SCHEMA)
    except (FileNotFoundError, NotTextError):  # a damaged copy is written again
        return None
