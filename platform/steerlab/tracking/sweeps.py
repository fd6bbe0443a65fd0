"""A sweep as Weights & Biases knows it: a page of its own, whose runs are the trials.

Either the platform's own sweep is shown there: `begin` makes the page before the first trial and every trial's run is created
with its id (`Place.sweep_id`); runs that exist already, such as those of a sweep that was offline, are put on a page afterwards
by `begin(..., prior_runs=ids)`. Or W&B chooses the values: a sweep is defined in its page (`steerlab wandb-sweep` writes the
YAML), and `Agent` asks the server what to run next while the trials are executed on the Ray cluster like any others.

The calls of `begin` and `end` run in a process of their own with a time limit: a sweep never waits long for its page.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from steerlab.job import TrackConfig
from steerlab.tracking import mode_of, spool

CALL_S = 30.0
"""Longest wait for the page of a sweep."""
SWEEP = "wandb_sweep.json"


def begin(track: TrackConfig, config: Mapping[str, Any], directory: Path, prior_runs: Sequence[str] = ()) -> str | None:
    """Make the page of a sweep and return its id; one that was made before, as `directory` remembers, is gone on with.

    `config` is W&B's own: method, metric, parameters (`wandb_space.sweep_config`). Returns None where the job is not tracked
    online or the server does not answer, which is said; trials then share a group, and `begin` with their run ids makes the
    page later.
    """
    path = directory / SWEEP
    if path.exists():
        return spool.read_json(path)["id"]
    if mode_of(track) != "online" or track.wandb is None:
        return None
    request = {
        "do": "begin", "config": dict(config), "project": track.wandb.project, "entity": track.wandb.entity,
        "prior_runs": list(prior_runs),
    }  # fmt: skip
    answer = _call(request)
    if answer is None:
        return None
    directory.mkdir(parents=True, exist_ok=True)
    spool.write_json(path, answer)
    return answer["id"]


def _call(request: dict[str, Any]) -> dict[str, Any] | None:
    paths = [str(Path(__file__).parents[2]), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "steerlab.tracking.sweeps"], input=json.dumps(request), capture_output=True, text=True,
            timeout=CALL_S, check=False, env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
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


@dataclass(frozen=True)
class Suggestion:
    """A trial that W&B asks for."""

    run_id: str
    """The id that its W&B run must have (`Tracker`'s `run_id`)."""
    parameters: dict[str, Any]
    """Values by the names of the sweep's parameters: paths of fields of the job."""


@dataclass
class Agent:
    """Asks a W&B sweep what to run next, for as many trials at a time as the cluster holds.

    agent = Agent("team/steerlab/abc123")
    while not agent.ended:
        agent.poll(running=ids)      # every few seconds
        agent.suggestions            # to be started; take them out of the list
        agent.stopped                # ids of runs that the sweep's early stopping wants ended
    """

    path: str
    """ENTITY/PROJECT/SWEEP, PROJECT/SWEEP or SWEEP."""
    host: str = "ray"
    suggestions: list[Suggestion] = field(default_factory=list)
    stopped: set[str] = field(default_factory=set)
    ended: bool = False
    """The sweep has nothing more to run, or was stopped or deleted in its page."""
    _api: Any = None
    _agent_id: str = ""

    def __post_init__(self) -> None:
        import wandb
        from wandb.apis.public.sweeps import _register_agent

        *before, sweep_id = self.path.strip("/").split("/")
        overrides: Any = dict(zip(("project", "entity"), reversed(before), strict=False))
        self._api = wandb.Api(overrides=overrides, timeout=int(CALL_S))
        try:
            self._agent_id = _register_agent(self._api, self.host, sweep_id=sweep_id)["id"]
        except (wandb.Error, TypeError, KeyError) as error:
            raise ValueError(f"W&B has no sweep {self.path}, or refuses it: {' '.join(str(error).split())[:300]}") from None

    def poll(self, running: Sequence[str]) -> None:
        """Say which runs are alive, and take what the sweep says to do; an unreachable server says nothing."""
        from wandb.apis.public.sweeps import _agent_heartbeat
        from wandb.sdk.sweeps import SweepNotFoundError

        try:
            commands = _agent_heartbeat(self._api, self._agent_id, {}, {run: True for run in running})
        except SweepNotFoundError:
            self.ended = True
            return
        for command in commands:
            kind: Literal["run", "resume", "stop", "exit"] = command["type"]
            if kind in ("run", "resume"):
                values = {name: value["value"] for name, value in (command.get("args") or {}).items()}
                self.suggestions.append(Suggestion(command["run_id"], values))
            elif kind == "stop":
                self.stopped.add(command["run_id"])
            elif kind == "exit":
                self.ended = True


if __name__ == "__main__":
    main()
