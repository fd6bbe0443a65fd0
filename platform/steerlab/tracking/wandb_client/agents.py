"""The agents of a sweep whose values Weights & Biases chooses: one for each trial that runs at once.

W&B hands an agent its next run when the agent says that it has none: that is how `wandb agent` works, and why W&B's own Launch
registers an agent for each of its workers. Their heartbeats are a thread's work, so that no server makes a sweep wait.

    agents = Agents("team/steerlab/abc123", num_agents=8)
    agents.start()
    agents.take()            # a run to be started, or None now
    agents.stopped           # ids of runs that W&B wants ended: early termination, or somebody in the page
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
from steerlab.tracking import NO_KEY, has_key

HEARTBEAT_S = 3.0
_TIMEOUT_S = 30
_CLOSE_S = 1.0


@dataclass(frozen=True)
class Suggestion:
    """A trial that W&B asks for."""

    run_id: str
    """The id that its W&B run must have (`Tracker`'s `run_id`)."""
    parameters: JsonObject
    """Values by the names of the sweep's parameters: paths of fields of the job."""


class _Value(saved.Shape):
    value: Json


class _Command(saved.Shape):
    """What W&B's server tells an agent."""

    type: str
    """`run`, `resume`, `stop` or `exit`."""
    run_id: str = ""
    args: dict[str, _Value] | None = None
    """Values by the name of the parameter."""


class Agents:
    """Ask a W&B sweep what to run next."""

    def __init__(self, path: str, num_agents: int, host: str = "ray") -> None:
        """Register agents with the sweep at `path`: ENTITY/PROJECT/SWEEP, PROJECT/SWEEP or SWEEP.

        Raises:
            ValueError: there is no key, no such sweep, or W&B refuses.
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
            with chdir(files.OWN_FOLDER):  # settings of the current folder would name the server that gets the key
                self._api = wandb.Api(overrides=overrides, timeout=_TIMEOUT_S)
            found = private_parts.sweep_of(self._api, sweep_id)
            self.config: JsonObject = _read(found["config"])
            """The sweep as W&B has it: method, metric, parameters."""
            self._runs: dict[str, list[str]] = {
                private_parts.registered_agent(self._api, host, sweep_id): [] for _ in range(num_agents)
            }
        except (wandb.Error, ValueError, TypeError, KeyError) as error:
            raise ValueError(f"W&B has no sweep {path}, or refuses it: {' '.join(str(error).split())[:300]}") from None

    @property
    def ended(self) -> bool:
        """Whether the sweep has nothing more to run, or was stopped or deleted in its page."""
        return not self._runs and self._suggestions.empty()

    def start(self, running: Sequence[str] = ()) -> None:
        """Begin to send heartbeats; `running` are runs of an earlier process that this one goes on with."""
        agents = list(self._runs)
        for number, run in enumerate(running):
            self._runs[agents[number % len(agents)]].append(run)
        threading.Thread(target=self._serve, daemon=True, name="wandb-agents").start()

    def take(self) -> Suggestion | None:
        """Return the next run to be started; None where W&B has none now."""
        try:
            return self._suggestions.get_nowait()
        except Empty:
            return None

    def release(self, run_id: str) -> None:
        """Say that a run is over; its agent asks for the next one at once."""
        with self._lock:
            self.stopped.discard(run_id)
            for runs in self._runs.values():
                if run_id in runs:
                    runs.remove(run_id)
        self._wake.set()

    def close(self) -> None:
        """Send no more heartbeats."""
        self._closed.set()
        self._wake.set()

    def poll(self) -> None:
        """Send a heartbeat for each agent and take what the sweep says to do; an unreachable server says nothing."""
        for agent, runs in list(self._runs.items()):
            if self._closed.is_set():
                return
            with self._lock:
                alive = dict.fromkeys(runs, True)
            try:
                commands = private_parts.heartbeat(self._api, agent, alive)
            except private_parts.SweepGoneError:  # what runs may end by itself
                self._runs.pop(agent)
                continue
            except (TypeError, KeyError, ValueError):  # an answer without commands
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
        elif command.type == "exit":  # nothing more for this agent, nor for what it still runs: the sweep was cancelled
            self.stopped.update(self._runs.pop(agent))

    def _serve(self) -> None:
        while self._runs and not self._closed.is_set():
            self.poll()
            self._wake.wait(HEARTBEAT_S)
            self._wake.clear()


def _read(config: object) -> JsonObject:
    """Return the configuration that a server sends as YAML, or as JSON, which is YAML."""
    import yaml

    found = yaml.safe_load(config) if isinstance(config, str) else config
    if not isinstance(found, dict):
        raise ValueError(f"its configuration is {json.dumps(found)[:100]}")
    return found
