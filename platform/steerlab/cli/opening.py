"""Open what commands work on: jobs, ROOT, the cluster, and the model in a run folder."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, NamedTuple, TypedDict

from steerlab.cli.terminal import say_line

if TYPE_CHECKING:
    from steerlab.guards.json_values import JsonObject
    from steerlab.job import Job
    from steerlab.run import Reported
    from steerlab.storage.store import Store

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""Pattern of names of runs, the same as for `Job.name`."""


def job_file(name: str) -> Path:
    """Return the path of a job file given to a command; a file at a URI is copied to this machine first.

    URIs occur because the report names a run's job file in its bucket, in the command that repeats the run.

    Raises:
        ValueError: the file at the URI cannot be read.
    """
    if "://" not in name:
        return Path(name)
    from steerlab.data.sources import remote
    from steerlab.job.file import LONGEST

    folder = Path(_copies().name) / hashlib.sha256(name.encode()).hexdigest()[:12]
    folder.mkdir(exist_ok=True)
    # Other job files of the folder are copied too, since `model: {source: "job:base.yaml"}` may name one of them.
    for beside, content in remote.beside(name, LONGEST):
        (folder / beside).write_bytes(content)
    return folder / remote.divided(name)[0].rpartition("/")[2]


@cache
def _copies() -> TemporaryDirectory[str]:
    """Return the folder of copied job files, which is removed when the process ends."""
    return TemporaryDirectory(prefix="steerlab-jobs-")


def read_job(path: Path, overrides: list[str] | None) -> Job:
    """Read a job and apply the overrides of `--set`. Raises JobError."""
    from steerlab import job
    from steerlab.stages import JobType

    return job.read(path, JobType, overrides or ())


def opened_store(root: str | None) -> Store:
    """Open ROOT, or the default one if it is None. Raises ValueError."""
    from steerlab.run import default_root
    from steerlab.storage.store import Store

    return Store.open(root or default_root())


@contextmanager
def joined_ray() -> Iterator[None]:
    """Join a cluster, or start one for this command, and print which."""
    import ray

    from steerlab import run as runs

    say_line(runs.connect())
    try:
        yield
    finally:
        ray.shutdown()


def split(folder: str, root: str | None = None, *, or_sweep: bool = False) -> tuple[str | None, str]:
    """Return ROOT and a run's folder relative to it, for a run that is given by its folder or by its name.

    Args:
        folder: ROOT/runs/NAME/ID or ROOT/sweeps/NAME/ID, a path or a URI; or NAME, which takes the newest run of that name.
        root: ROOT of a name; None takes the default one.
        or_sweep: whether a name may also be that of a sweep; the newest run or sweep of the name is taken.

    Raises:
        ValueError: no finished run has this name.
    """
    if _NAME.fullmatch(folder) and not Path(folder).exists():
        return root, _newest(opened_store(root), folder, or_sweep)
    from steerlab.data.sources import remote

    path, options = remote.divided(folder if "://" in folder else str(Path(folder).absolute()))
    for kind in ("/runs/", "/sweeps/"):
        head, middle, tail = path.rstrip("/").rpartition(kind)
        if middle and tail.count("/") == 1:
            return head + options, middle.lstrip("/") + tail
    return None, folder


def _newest(store: Store, name: str, or_sweep: bool) -> str:
    """Return the folder of the newest finished run of a name. A run's id begins with the time at which it started."""
    sweeps = store.list(f"sweeps/{name}")
    runs = [run for run in store.list(f"runs/{name}") if _is_finished(store, f"runs/{name}/{run}")]
    of_sweeps = {run for run in runs for sweep in sweeps if run.startswith(sweep)}
    candidates = [(run, f"runs/{name}/{run}") for run in runs if run not in of_sweeps]
    if or_sweep:
        candidates += [(sweep, f"sweeps/{name}/{sweep}") for sweep in sweeps]
    if candidates:
        return max(candidates)[1]
    if of_sweeps:
        raise ValueError(f"the runs called {name} are trials of sweeps: give the folder of one, such as runs/{name}/{runs[-1]}")
    names = sorted({*store.list("runs"), *(store.list("sweeps") if or_sweep else ())})
    near = difflib.get_close_matches(name, names, n=3) or names[:10]
    there = f"; its names are {', '.join(near)}" if near else ""
    raise ValueError(f"{name} is not a folder, and no finished run in {store.root} has this name{there}")


def _is_finished(store: Store, folder: str) -> bool:
    return "summary.json" in store.list(folder)


class Loading(TypedDict, total=False):
    """Options of `stacks.load` that a run's job sets."""

    dtype: str | None
    sampler: JsonObject | None
    snapshot: int | None
    inverse: bool


class Artifact(NamedTuple):
    """The model of a run folder, or an exported folder."""

    path: Path
    loading: Loading
    """Options with which the run's job loads it."""
    reported: Reported
    """The strength to use where none is given."""


def artifact_of(folder: str, root: str | None, inverse: bool = False) -> Artifact:
    """Return the model of a run folder or of an exported one, with the inverse of its patch if `inverse` is set.

    Raises:
        ValueError: the folder is neither, or an exported one is to be inverted.
    """
    artifact = _artifact_of(folder, root)
    if not inverse:
        return artifact
    # The run may have evaluated the inverse itself; the inverse of that is the patch.
    loading: Loading = {**artifact.loading, "inverse": not artifact.loading.get("inverse", False)}
    return artifact._replace(loading=loading)


def _artifact_of(folder: str, root: str | None) -> Artifact:
    from steerlab import run as runs
    from steerlab.steered import export as exports

    if (Path(folder) / "prompt.json").is_file():
        return Artifact(Path(folder), {}, runs.Reported(exports.strength_of(Path(folder)), "the one that it was exported at"))
    from steerlab.run import folder as folders
    from steerlab.storage.plan import located

    own_root, below = split(folder, root)
    missing = ValueError(f"{folder} is neither a finished run folder (ROOT/runs/NAME/ID) nor an exported model")
    if own_root is None and not below.startswith("runs/"):
        raise missing
    store = opened_store(root or own_root)
    try:
        summary = folders.read_summary(store, below)
    except FileNotFoundError:
        raise missing from None
    if summary.model is None:
        raise ValueError(f"{folder}: this run evaluated an unchanged model; it has no trained model or patch to load")
    model = folders.job(store, below).get("model", {})
    loading: Loading = {"snapshot": summary.model.snapshot, "inverse": summary.model.inverse}
    if "dtype" in model:
        loading["dtype"] = model["dtype"]
    if "sampler" in model:
        loading["sampler"] = model["sampler"]
    path = located(store, summary.model.stage, summary.model.key)
    return Artifact(path, loading, runs.reported_strength(summary.model_dump()))
