"""W&B agents: they ask a sweep of Weights & Biases for the next run. Each concurrent trial has one agent.

W&B gives an agent its next run when the agent's heartbeat reports no run, as in `wandb agent`; W&B Launch also
registers an agent for each of its workers. A thread sends the heartbeats, so that a slow server never blocks the sweep.

    agents = Agents("team/steerlab/abc123", num_agents=8)
    agents.start()
    agents.take()            # a run to be started, or None now
    agents.stopped           # ids of runs that W&B wants to stop: by early termination, or by a user on the page
    agents.release(run_id)   # it is over
"""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from contextlib import chdir
from dataclasses import dataclass
from queue import Empty, SimpleQueue

from steerlab.guards import files, private_parts, saved
from steerlab.guards.json_values import Json, JsonObject
from steerlab.tracking.wandb_mode import NO_KEY, has_key

HEARTBEAT_S = 3.0
"""Seconds between two heartbeats."""
_TIMEOUT_S = 30
"""Seconds after which a request to W&B fails."""


@dataclass(frozen=True)
class Suggestion:
    """A run that W&B asks to execute."""

    run_id: str
    """Id that the W&B run must have (`tracking.Place.run_id`)."""
    parameters: JsonObject
    """Values by the names of the sweep's parameters (`parameters.parameter_name`)."""


class _Value(saved.Shape):
    value: Json


class _Command(saved.Shape):
    """A command of W&B's server to an agent."""

    type: str
    """`run`, `resume`, `stop` or `exit`."""
    run_id: str = ""
    args: dict[str, _Value] | None = None
    """Values by the name of the parameter."""


class Agents:
    """The registered agents of one W&B sweep, with the runs that each executes."""

    def __init__(self, path: str, num_agents: int, host: str = "ray") -> None:
        """Register agents with a sweep.

        Args:
            path: ENTITY/PROJECT/SWEEP, PROJECT/SWEEP or SWEEP.
            num_agents: number of runs to execute at the same time.
            host: name of the agents' host on W&B's page.

        Raises:
            ValueError: no API key is set, the sweep does not exist, or W&B refuses.
        """
        import wandb

        if not has_key():
            raise ValueError(NO_KEY)
        *before, sweep_id = path.strip("/").split("/")
        overrides: dict[str, str] = dict(zip(("project", "entity"), reversed(before), strict=False))
        self._suggestions: SimpleQueue[Suggestion] = SimpleQueue()
        self._lock = threading.Lock()
        self._wake, self._closed = threading.Event(), threading.Event()
        self.stopped: set[str] = set()
        try:
            # W&B's client reads `wandb/settings` in the current folder, where a stranger's project could name another server
            # that would receive the API key.
            with chdir(files.OWN_FOLDER):
                self._api = wandb.Api(overrides=overrides, timeout=_TIMEOUT_S)
            sweep = private_parts.sweep_of(self._api, sweep_id)
            self.config: JsonObject = _read(sweep["config"])
            """W&B's configuration of the sweep: method, metric, parameters."""
            self._runs: dict[str, list[str]] = {
                private_parts.registered_agent(self._api, host, sweep_id): [] for _ in range(num_agents)
            }
        except (wandb.Error, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"W&B has no sweep {path}, or refuses it: {' '.join(str(error).split())[:300]}") from None

    @property
    def ended(self) -> bool:
        """Whether the sweep has no further runs, or was stopped or deleted on its page."""
        return not self._runs and self._suggestions.empty()

    def start(self, running: Sequence[str] = ()) -> None:
        """Start sending heartbeats; `running` are ids of runs that this process continues after a restart."""
        agents = list(self._runs)
        # W&B gives an agent no run while it reports one as running, so a restart first finishes its earlier runs.
        for number, run in enumerate(running):
            self._runs[agents[number % len(agents)]].append(run)
        threading.Thread(target=self._serve, daemon=True, name="wandb-agents").start()

    def take(self) -> Suggestion | None:
        """Return the next run to start; None if W&B has none now."""
        try:
            return self._suggestions.get_nowait()
        except Empty:
            return None

    def release(self, run_id: str) -> None:
        """Report that a run has ended; its agent asks for the next one at once."""
        # The lock guards `stopped` and the lists of runs, which the heartbeat thread changes too.
        with self._lock:
            self.stopped.discard(run_id)
            for runs in self._runs.values():
                if run_id in runs:
                    runs.remove(run_id)
        self._wake.set()

    def close(self) -> None:
        """Stop sending heartbeats."""
        self._closed.set()
        self._wake.set()

    def poll(self) -> None:
        """Send a heartbeat for each agent, and execute the commands in the answers. Does nothing while it is unreachable."""
        for agent, runs in list(self._runs.items()):
            if self._closed.is_set():
                return
            with self._lock:
                # The runs are copied under the lock; the request is outside, since `release` must not wait for a server.
                alive = dict.fromkeys(runs, True)
            try:
                commands = private_parts.heartbeat(self._api, agent, alive)
            except private_parts.SweepGoneError:
                self._runs.pop(agent)  # its running trials end normally
                continue
            except (TypeError, KeyError, ValueError):  # the answer has no commands, for example while the server is down
                continue
            with self._lock:
                for command in commands or ():
                    self._obey(agent, command)

    def _obey(self, agent: str, answer: Mapping[str, object]) -> None:
        command = saved.checked(answer, _Command, "W&B's answer")
        if command.type in ("run", "resume"):
            self._runs[agent].append(command.run_id)
            values = {name: argument.value for name, argument in (command.args or {}).items()}
            self._suggestions.put(Suggestion(command.run_id, values))
        elif command.type == "stop":
            self.stopped.add(command.run_id)
        elif command.type == "exit":  # the sweep was cancelled: its running trials stop too, and this agent gets no more runs
            self.stopped.update(self._runs.pop(agent))

    def _serve(self) -> None:
        while self._runs and not self._closed.is_set():
            self.poll()
            # `release` and `close` set the event, so that a free agent asks for its next run at once.
            self._wake.wait(HEARTBEAT_S)
            self._wake.clear()


def _read(config: object) -> JsonObject:
    """Return a sweep's configuration, which the server sends as YAML text, JSON text or an object."""
    import yaml

    tree = yaml.safe_load(config) if isinstance(config, str) else config
    if not isinstance(tree, dict):
        raise ValueError(f"its configuration is {json.dumps(tree)[:100]}")
    return tree
