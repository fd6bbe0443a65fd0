"""A small stand-in for a Weights & Biases server: it answers the real client and remembers what it was sent."""

from __future__ import annotations

import base64
import json
import re
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Standin:
    """What the server knows; `fail` is a status that it answers to everything from now on."""

    url: str = ""
    fail: int | None = None
    fail_stream: int | None = None
    """A status for the file stream alone: the connection that is lost while a run goes on."""
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    history: dict[str, dict[int, dict[str, Any]]] = field(default_factory=lambda: defaultdict(dict))
    """Run -> offset of the line -> line; a line sent again to its offset replaces itself, as with the real server."""
    overwritten: list[tuple[str, int]] = field(default_factory=list)
    """Offsets that were sent twice with different content."""
    stats: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    exits: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    files: dict[str, bytes] = field(default_factory=dict)
    artifacts: dict[str, dict[str, Any]] = field(default_factory=dict)
    used: list[dict[str, Any]] = field(default_factory=list)
    sweeps: dict[str, dict[str, Any]] = field(default_factory=dict)
    views: list[dict[str, Any]] = field(default_factory=list)
    agents: list[str] = field(default_factory=list)
    heartbeats: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Agent, and the runs that it said are alive."""
    queue: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """Runs and their parameters for agents that have none alive; when it is empty, they are told to exit."""
    stops: Callable[[str, list[dict[str, Any]]], bool] = lambda run, lines: False
    """Early termination: says by its history whether a run that is alive is to stop."""
    config: dict[str, Any] = field(default_factory=dict)
    """Of every sweep that nobody made here."""
    unknown: list[str] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def lines(self, run: str) -> list[dict[str, Any]]:
        """Return a run's history in the order of its offsets."""
        with self.lock:
            return [line for _, line in sorted(self.history[run].items())]


@contextmanager
def serving() -> Iterator[Standin]:
    """Serve on a free port of this machine."""
    state = Standin()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"state": state}))
    state.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    server.handle_error = lambda *_: None  # type: ignore[method-assign]
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Standin
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _answer(self, content: Any, status: int = 200) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return body
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        if self.state.fail:
            return self._answer({"error": "as asked"}, self.state.fail)
        return self._answer(self.state.files.get(self.path, b"{}"))

    def do_PUT(self) -> None:
        body = self._body()
        with self.state.lock:
            self.state.files[self.path] = body
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        state = self.state
        if state.fail:
            return self._answer({"error": "as asked", "errors": [{"message": "as asked"}]}, state.fail)
        if self.path.endswith("/file_stream"):
            if state.fail_stream:
                return self._answer({"error": "as asked"}, state.fail_stream)
            with state.lock:
                return self._answer(_streamed(state, self.path.split("/")[-2], json.loads(body)))
        if self.path == "/graphql":
            request = json.loads(body)
            with state.lock:
                return self._answer({"data": _graphql(state, request["query"], request.get("variables") or {})})
        if "/otel/" not in self.path:
            state.unknown.append(self.path)
        return self._answer({})


def _streamed(state: Standin, run: str, request: dict[str, Any]) -> dict[str, Any]:
    for name, part in (request.get("files") or {}).items():
        if name == "wandb-history.jsonl":
            for number, line in enumerate(part["content"], start=part["offset"]):
                parsed = json.loads(line)
                if number in state.history[run] and state.history[run][number] != parsed:
                    state.overwritten.append((run, number))
                state.history[run][number] = parsed
        elif name == "wandb-events.jsonl":
            state.stats[run] += len(part["content"])
        elif name == "wandb-summary.json":
            state.runs[run]["summary"] = json.loads(part["content"][-1])
    if request.get("complete"):
        state.exits[run].append(request["exitcode"])
    return {"limits": {}}


_PROJECT = {"name": "tests", "id": "UHJvamVjdA==", "entity": {"name": "me", "id": "RW50aXR5"}}


def _graphql(state: Standin, query: str, given: dict[str, Any]) -> dict[str, Any]:
    found = re.search(r"(?:query|mutation)\s+(\w+)", query)
    name = found.group(1) if found else ""
    answer = _ANSWERS.get(name)
    if answer is None:
        state.unknown.append(f"{name}: {query[:400]}")
        return {}
    return answer(state, given)


def _bucket(state: Standin, given: dict[str, Any]) -> dict[str, Any]:
    known = given["name"] in state.runs
    run = state.runs.setdefault(given["name"], {"summary": {}})
    run.update({key: value for key, value in given.items() if value is not None})
    bucket = {
        "id": base64.b64encode(given["name"].encode()).decode(), "name": given["name"], "displayName": run.get("displayName"),
        "description": "", "config": run.get("config", "{}"), "sweepName": run.get("sweep"), "project": _PROJECT,
        "historyLineCount": len(state.history[given["name"]]),
    }  # fmt: skip
    return {"upsertBucket": {"bucket": bucket, "inserted": not known}}


def _resume(state: Standin, given: dict[str, Any]) -> dict[str, Any]:
    run = state.runs.get(given["name"])
    if run is None:
        return {"model": {**_PROJECT, "bucket": None}}
    lines = state.lines(given["name"])
    bucket = {
        "name": given["name"], "id": "x", "displayName": run.get("displayName"), "summaryMetrics": json.dumps(run["summary"]),
        "logLineCount": 0, "historyLineCount": len(lines), "eventsLineCount": state.stats[given["name"]],
        "historyTail": json.dumps([json.dumps(lines[-1])] if lines else []), "eventsTail": json.dumps([]),
        "config": run.get("config", "{}"), "tags": [], "notes": None, "group": run.get("groupName"),
        "wandbConfig": json.dumps({"t": 1}), "jobType": run.get("jobType"),
    }  # fmt: skip
    return {"model": {**_PROJECT, "bucket": bucket}}


def _files(state: Standin, given: dict[str, Any]) -> dict[str, Any]:
    made = [
        {"name": name, "uploadUrl": f"{state.url}/upload/{given['run']}/{name}", "displayName": name} for name in given["files"]
    ]
    return {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": made}}


def _artifact(state: Standin, given: dict[str, Any]) -> dict[str, Any]:
    asked = given["input"]
    name = asked["artifactCollectionName"]
    state.artifacts[name] = asked
    made = {
        "id": base64.b64encode(name.encode()).decode(), "state": "COMMITTED", "digest": asked["digest"],
        "artifactSequence": {"id": "x", "latestArtifact": {"id": "x", "versionIndex": 0}},
    }  # fmt: skip
    return {"createArtifact": {"artifact": made}}


def _use(state: Standin, given: dict[str, Any]) -> dict[str, Any]:
    asked = given["input"]
    state.used.append({"run": asked.get("runName"), "artifact": base64.b64decode(asked["artifactID"]).decode()})
    return {"useArtifact": {"artifact": {"id": asked["artifactID"], "digest": "", "description": None, "state": "COMMITTED"}}}


def _by_id(state: Standin, given: dict[str, Any]) -> dict[str, Any]:
    name = base64.b64decode(given["id"]).decode()
    made = state.artifacts[name]
    entity = {"name": "me", "id": "x", "__typename": "Entity"}
    project = {"name": "tests", "id": "x", "internalId": "x", "entity": entity, "__typename": "Project"}
    return {
        "artifact": {
            "__typename": "Artifact", "id": given["id"], "versionIndex": 0, "artifactType": {"name": made["artifactTypeName"]},
            "artifactSequence": {"__typename": "ArtifactSequence", "name": name, "project": project}, "description": None,
            "metadata": made["metadata"], "ttlDurationSeconds": -2, "ttlIsInherited": True, "tags": [], "historyStep": None,
            "state": "COMMITTED", "size": 0, "digest": made["digest"], "commitHash": "x", "fileCount": 1,
            "createdAt": "2026-01-01T00:00:00Z", "updatedAt": None, "aliases": [],
        }
    }  # fmt: skip


def _sweep(state: Standin, given: dict[str, Any]) -> dict[str, Any]:
    name = f"sweep{len(state.sweeps) + 1}"
    state.sweeps[name] = given
    return {"upsertSweep": {"sweep": {"name": name, "id": name, "project": _PROJECT}, "configValidationWarnings": []}}


def _agent(state: Standin, given: dict[str, Any]) -> dict[str, Any]:
    state.agents.append(f"agent{len(state.agents) + 1}")
    return {"createAgent": {"agent": {"id": state.agents[-1]}}}


def _heartbeat(state: Standin, given: dict[str, Any]) -> dict[str, Any]:
    alive = json.loads(given["runState"])
    state.heartbeats.append((given["id"], alive))
    commands: list[dict[str, Any]]
    if alive:
        commands = [{"type": "stop", "run_id": run} for run in alive if state.stops(run, state.lines(run))]
    elif state.queue:
        run, parameters = state.queue.pop(0)
        commands = [{"type": "run", "run_id": run, "args": {name: {"value": value} for name, value in parameters.items()}}]
    else:
        commands = [{"type": "exit"}]
    return {"agentHeartbeat": {"agent": {"id": given["id"]}, "commands": json.dumps(commands)}}


def _sweep_with_runs(state: Standin, given: dict[str, Any]) -> dict[str, Any]:
    known = state.sweeps.get(given["sweep"])
    config = known["config"] if known is not None else json.dumps(state.config)
    found = {"id": "x", "name": given["sweep"], "state": "RUNNING", "config": config, "runs": {"edges": []}}
    return {"project": {"sweep": None if given["sweep"] == "nowhere" else found}}


def _view(state: Standin, given: dict[str, Any]) -> dict[str, Any]:
    state.views.append(given)
    view = {
        "id": "dmlldw==", "type": "runs", "name": given.get("name"), "displayName": given.get("displayName"), "description": "",
        "spec": given.get("spec"), "project": {"id": "x", "name": "tests", "entityName": "me"},
    }  # fmt: skip
    return {"upsertView": {"view": view, "inserted": True}}


_VIEWER = {
    "id": "x", "username": "me", "flags": "{}", "entity": "me", "name": "me", "email": "", "admin": False, "deletedAt": None,
    "teams": {"edges": []}, "apiKeys": {"edges": []},
}  # fmt: skip
_NODE = {
    "cursor": "x",
    "node": {
        "id": "x",
        "name": "tests",
        "entityName": "me",
        "createdAt": "2026-01-01T00:00:00Z",
        "isBenchmark": False,
        "user": None,
    },
}
_ANSWERS: dict[str, Any] = {
    "Viewer": lambda state, given: {"viewer": _VIEWER, "serverInfo": {}},
    "ServerFeaturesQuery": lambda state, given: {"serverInfo": {"features": []}},
    "RunResumeStatus": _resume,
    "UpsertBucket": _bucket,
    "RunState": lambda state, given: {"project": {"run": {"state": "running"}}},
    "CreateRunFiles": _files,
    "MarkRunFilesUploaded": lambda state, given: {"markRunFilesUploaded": {"success": True}},
    "ArtifactType": lambda state, given: {"project": {"artifact": None}},
    "ArtifactByID": _by_id,
    "OrganizationCoreWeaveOrganizationID": lambda state, given: {"entity": {"organization": None}},
    "CreateArtifact": _artifact,
    "UseArtifact": _use,
    "UpsertSweep": _sweep,
    "CreateAgent": _agent,
    "SweepWithRuns": _sweep_with_runs,
    "Heartbeat": _heartbeat,
    "GetProjects": lambda state, given: {"models": {"pageInfo": {"endCursor": None, "hasNextPage": False}, "edges": [_NODE]}},
    "ProjectInternalId": lambda state, given: {"project": {"id": "x", "internalId": "x"}},
    "UpsertView2": _view,
    "upsertView": _view,
}
