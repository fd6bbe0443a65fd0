"""A sweep as Weights & Biases knows it: a page of its own, whose runs are the trials.

Either the platform's own sweep is shown there: `begin` makes the page before the first trial and every trial's run is created
with its id (`Place.sweep_id`); the runs of a sweep that was offline, or whose server did not answer, are put on a page
afterwards by `send`. Or W&B chooses the values: a sweep is defined in its page (`steerlab wandb-sweep` writes the YAML), and
`agents` ask the server what to run next while the trials are executed on the Ray cluster like any others.

The calls of `begin` and `end` run in a process of their own with a time limit: a sweep never waits long for its page.
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
from steerlab.tracking import mode_of, spool

CALL_S = 30.0
"""Longest wait for the page of a sweep."""
SWEEP = "wandb_sweep.json"
"""Which page a sweep has."""
ASKED = "wandb_sweep_asked.json"
"""What its page is made of."""


class _Page(saved.Shape):
    """The file SWEEP, as far as it is read."""

    id: str


class _Answer(TypedDict):
    """What `main` prints, and the file SWEEP holds."""

    id: str
    project: str
    entity: str | None


def begin(track: TrackConfig, config: Mapping[str, object], directory: Path) -> str | None:
    """Make the page of a sweep and return its id; one that was made before, as `directory` remembers, is gone on with.

    `config` is W&B's own: method, metric, parameters (`parameters.sweep_config`). Returns None where the job is not tracked
    online or the server does not answer, which is said; trials then share a group, and `send` makes the page later.
    """
    path = directory / SWEEP
    if path.exists():
        return saved.read(path, _Page).id
    mode = mode_of(track)
    if mode == "disabled" or track.wandb is None:
        return None
    asked = {"config": dict(config), "project": track.wandb.project, "entity": track.wandb.entity}
    directory.mkdir(parents=True, exist_ok=True)
    spool.write_json(directory / ASKED, asked)
    return _made(directory, asked, ()) if mode == "online" else None


def is_sweep(directory: Path) -> bool:
    """Say whether a folder is one of a sweep that is, or might have been, on a page."""
    return any((directory / name).is_file() for name in (SWEEP, ASKED))


def send(directory: Path, runs: Sequence[str]) -> str:
    """Make the page of a sweep that has none, of `runs` that W&B has; returns its id.

    Raises:
        ValueError: W&B refuses or does not answer.
    """
    path = directory / SWEEP
    if path.exists():
        return saved.read(path, _Page).id
    made = _made(directory, saved.read(directory / ASKED, dict[str, object]), runs)
    if made is None:
        raise ValueError(f"{directory}: its runs are sent, but it has no page yet; send it again")
    return made


def _made(directory: Path, asked: Mapping[str, object], prior_runs: Sequence[str]) -> str | None:
    answer = _call({**asked, "prior_runs": list(prior_runs)})
    if answer is None:
        return None
    spool.write_json(directory / SWEEP, answer)
    return answer["id"]


def _call(request: Mapping[str, object]) -> _Answer | None:
    paths = [str(files.SOURCE_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
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
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Answer one request from standard input."""
    import wandb

    request = json.load(sys.stdin)
    found = wandb.sweep(
        request["config"], entity=request["entity"], project=request["project"], prior_runs=request["prior_runs"] or None
    )
    print(json.dumps({"id": found, "project": request["project"], "entity": request["entity"]}), flush=True)
    os._exit(0)  # W&B's service would be waited for without a bound


if __name__ == "__main__":
    main()
