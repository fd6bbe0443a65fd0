"""The history of an open W&B run: the events of its spool, each sent as a line with its own step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from steerlab.guards import files, saved
from steerlab.tracking import spool
from steerlab.tracking.events import Line, StageEnded, step_of

if TYPE_CHECKING:
    import wandb

_E = TypeVar("_E", Line, StageEnded)
_LINES = ("log", "table", "gallery", "images")
"""Kinds of events that become lines of the W&B run's history."""
_RESUMED = "a process of this run died before it recorded its end"


class History:
    """Send the events of a spool to an open run. Line k of the spool is step k of the run's history."""

    def __init__(self, run: wandb.Run, directory: Path) -> None:
        self.run = run
        self.events, self.folder = directory / spool.EVENTS, directory.parent
        self.online = not run.offline
        self.held = run.starting_step if self.online else 0
        """Number of lines of the history that the server has."""
        self.number = 0
        """Step of the next line on the server."""
        self.seen = 0
        """Number of lines of the spool that were read."""
        self.axes: set[str] = set()
        """Step axes that were defined in the run."""
        self.first = directory / spool.FIRST
        self.lost_after: int | None = None
        """Number of lines of the spool after which lines of the server are missing; None if none are missing."""
        earlier = [event["kind"] for event in spool.read(self.events)]
        # Lines of earlier processes of the run. If the spool has fewer than the server, it was lost or truncated in between.
        num_earlier = sum(kind in _LINES for kind in earlier[: _last(earlier, "open")])
        if self.first.exists():
            self.number = saved.read(self.first, spool.First).step
            if self.held > self.number + sum(kind in _LINES for kind in earlier):
                self.lost_after = num_earlier
        elif self.held and not num_earlier:
            # The spool has only lines of this process, but the server already has others.
            self.lost_after = 0

    def send(self, ended: Callable[[], bool]) -> int:
        """Send events until the run ends, and return its exit code; 1 if its process died without a `finish`."""
        for event in spool.follow(self.events, ended):
            if event["kind"] == "log" or event["kind"] == "table" or event["kind"] == "gallery" or event["kind"] == "images":
                self._line(event)
            elif event["kind"] == "stage":
                _keep(event, lambda event: _link(self.run, event, self.online))
            elif event["kind"] == "finish":
                self.run.summary.update(event["summary"])
                self.run.config.update(event.get("config", {}), allow_val_change=True)
                self.run.name = event.get("name", self.run.name)
                return int(event["exit_code"])
        print(_RESUMED, flush=True)
        return 1

    def _line(self, event: Line) -> None:
        axis = _axis_of(event)
        if axis is not None and axis not in self.axes:
            self.axes.add(axis)
            # W&B's own step counts all lines of the run, so each stage gets an axis with its own steps.
            self.run.define_metric(axis)
            self.run.define_metric(axis.rpartition("/")[0] + "/*", step_metric=axis)
        if self.seen == self.lost_after:
            # The lines of this process continue after those that the server has.
            self.number = self.held
            self.first.unlink(missing_ok=True)
        # Lines before `held` were sent by an earlier process. They are counted, so that line k has step k.
        if self.number >= self.held and not self._is_known(event):
            if self.online and not self.first.exists():
                spool.write_json(self.first, {"step": self.number - self.seen})
            _keep(event, self._log)
        self.number += 1
        self.seen += 1

    def _log(self, event: Line) -> None:
        self.run.log({**self._content(event), "_timestamp": event.get("time")}, self.number, commit=True)

    def _content(self, event: Line) -> Mapping[str, object]:
        """Return the content of a line in W&B's types. Raises ValueError for an image outside the run's folder."""
        import wandb

        if event["kind"] == "table":
            listed: list[Iterable[object]] = [*event["rows"]]
            table = wandb.Table(columns=[*event["columns"]], data=listed, allow_mixed_types=True)
            return {event["key"]: table}
        if event["kind"] == "gallery":
            rows: list[Iterable[object]] = [
                [*row, self._image(path)] for row, path in zip(event["rows"], event["paths"], strict=True)
            ]
            return {event["key"]: wandb.Table(columns=[*event["columns"], "image"], data=rows, allow_mixed_types=True)}
        if event["kind"] == "images":
            pairs = zip(event["paths"], event["captions"], strict=True)
            images = [self._image(path, caption) for path, caption in pairs]
            if "strength" not in event:
                return {event["key"]: images}
            # One key and one axis for all strengths: W&B's media panel then moves through them with a slider.
            section = event["key"].rpartition("/")[0]
            return {f"{section}/images": images, f"{section}/strength": event["strength"]}
        return event["data"]

    def _image(self, path: str, caption: str | None = None) -> wandb.Image:
        import wandb

        # A spool may come from another person: its paths must not send other images of this machine to W&B.
        if not Path(path).resolve().is_relative_to(self.folder.resolve()):
            raise ValueError(f"{path} is not an image of the run in {self.folder}")
        files.check(Path(path))
        return wandb.Image(path, caption=caption)

    def _is_known(self, event: Line) -> bool:
        """Return whether the server already has this line from a lost spool."""
        if not self.held or event["kind"] != "log" or self.number > self.held:
            return False
        last = self.run.summary.get(event["axis"])
        is_known = last is not None and step_of(event) <= last
        self.number -= is_known  # the caller counts the line, which must not get another step
        return is_known


def _axis_of(event: Line) -> str | None:
    """Return the axis of a line's values; None if they are on W&B's own axis."""
    if event["kind"] == "log":
        return event["axis"]
    return f"{event['key'].rpartition('/')[0]}/strength" if event["kind"] == "images" and "strength" in event else None


def _last(kinds: Sequence[str], kind: str) -> int:
    return max((number for number, other in enumerate(kinds) if other == kind), default=0)


def _keep(event: _E, send: Callable[[_E], None]) -> None:
    """Send one event. An event that W&B refuses is skipped and logged, so that the rest of the run is sent."""
    import wandb

    try:
        send(event)
    except (OSError, ValueError, TypeError, wandb.Error) as error:
        print(f"skipped {event['kind']} {event.get('key', '')}: {error}", flush=True)


def _link(run: wandb.Run, event: StageEnded, online: bool) -> None:
    """Record in W&B that the run used or made an artifact. Only a reference to its URI is sent, not its content."""
    import wandb

    def reference(stage: str, key: str, uri: str, **facts: object) -> wandb.Artifact:
        artifact = wandb.Artifact(f"{stage}-{key[:16]}", type=stage, metadata={"key": key, **facts})
        artifact.add_reference(uri, name="artifact", checksum=False)
        return artifact

    facts = {
        "label": event["label"],
        "seconds": event["seconds"],
        "inputs": [f"{name}-{key[:16]}" for name, key, _ in event["inputs"]],
    }
    artifact = reference(event["stage"], event["key"], event["uri"], **facts)
    if event["status"] == "ran":
        run.log_artifact(artifact)
    if not online:
        return  # W&B's client cannot use artifacts offline; instead, the artifact's metadata contains its inputs
    for name, key, uri in event["inputs"] if event["status"] == "ran" else []:
        run.use_artifact(reference(name, key, uri))
    if event["status"] == "cached":
        run.use_artifact(artifact)
