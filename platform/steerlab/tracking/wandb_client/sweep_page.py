"""The page of a sweep in Weights & Biases, on which each trial is a run.

Here the platform chooses the points and W&B only shows them: `begin` creates the page before the first trial, and each trial's
run names its id (`Place.sweep_id`). `send` creates the page afterwards if the sweep was offline or the server did not answer.
(If W&B chooses the points, the page exists before the sweep: see `agents`.)

W&B's client runs in a separate process with a time limit, so a sweep waits at most CALL_S seconds for its page.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypedDict

from steerlab.guards import files, saved
from steerlab.job import TrackConfig
from steerlab.tracking import spool
from steerlab.tracking.wandb_mode import mode_of

CALL_S = 30.0
"""Longest time that W&B may take to create a page."""
SWEEP = "wandb_sweep.json"
"""File in a sweep's folder that names its page."""
ASKED = "wandb_sweep_asked.json"
"""File in a sweep's folder with the request for its page, from which `send` can create the page later."""


class _Page(saved.Shape):
    """Fields of the file SWEEP that are used here."""

    id: str


class _Answer(TypedDict):
    """Output of `main`, and content of the file SWEEP."""

    id: str
    project: str
    entity: str | None


def begin(track: TrackConfig, config: Mapping[str, object], directory: Path) -> str | None:
    """Create the page of a sweep, or reuse the one that the sweep already has.

    Args:
        track: the job's tracking.
        config: W&B's configuration of the sweep (`parameters.sweep_config`).
        directory: folder of the files SWEEP and ASKED.

    Returns:
        Id of the page. None if the job is not tracked online, or the server does not answer (with a warning); the trials then
        share a group only, and `send` can create the page later.
    """
    path = directory / SWEEP
    if path.exists():
        return saved.read(path, _Page).id
    mode = mode_of(track)
    if mode == "disabled" or track.wandb is None:
        return None
    request = {"config": dict(config), "project": track.wandb.project, "entity": track.wandb.entity}
    directory.mkdir(parents=True, exist_ok=True)
    # Written before the call, so that `send` can create the page later if W&B does not answer.
    spool.write_json(directory / ASKED, request)
    return _create(directory, request, ()) if mode == "online" else None


def is_sweep(directory: Path) -> bool:
    """Return whether a folder is that of a sweep with a page, or for which `send` can create one."""
    return any((directory / name).is_file() for name in (SWEEP, ASKED))


def send(directory: Path, runs: Sequence[str]) -> str:
    """Create the page of a sweep from `runs`, ids of runs that W&B has; return the page's id.

    If the sweep already has a page, its id is returned.

    Raises:
        ValueError: W&B refuses or does not answer.
    """
    path = directory / SWEEP
    if path.exists():
        return saved.read(path, _Page).id
    page_id = _create(directory, saved.read(directory / ASKED, dict[str, object]), runs)
    if page_id is None:
        raise ValueError(f"{directory}: its runs are sent, but it has no page yet; send it again")
    return page_id


def _create(directory: Path, request: Mapping[str, object], prior_runs: Sequence[str]) -> str | None:
    answer = _call({**request, "prior_runs": list(prior_runs)})
    if answer is None:
        return None
    spool.write_json(directory / SWEEP, answer)
    return answer["id"]


def _call(request: Mapping[str, object]) -> _Answer | None:
    """Create a sweep's page in another process; warn and return None if W&B does not answer in time."""
    paths = [str(files.SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        # A process can be killed after CALL_S; a thread that waits for a server cannot be.
        done = subprocess.run(
            [sys.executable, "-P", "-m", "steerlab.tracking.wandb_client.sweep_page"],
            input=json.dumps(request), capture_output=True, text=True, timeout=CALL_S, check=False, cwd=files.OWN_FOLDER,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        warnings.warn(f"W&B: no answer in {CALL_S:.0f} s; the sweep has no page there, its runs share a group", stacklevel=3)
        return None
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        warnings.warn(f"W&B: {reason[:300]}; the sweep has no page there, its runs share a group", stacklevel=3)
        return None
    # W&B's client prints to standard output too; the answer is the last line.
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Create the page that the JSON on standard input describes, and print its id as JSON."""
    import wandb

    request = json.load(sys.stdin)
    sweep_id = wandb.sweep(
        request["config"], entity=request["entity"], project=request["project"], prior_runs=request["prior_runs"] or None
    )
    print(json.dumps({"id": sweep_id, "project": request["project"], "entity": request["entity"]}), flush=True)
    os._exit(0)  # a normal exit would wait for W&B's service process without a time limit


if __name__ == "__main__":
    main()
