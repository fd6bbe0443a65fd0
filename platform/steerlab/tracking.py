"""Weights & Biases, written by the driver alone: one run for each steerlab run, with a fixed id and an own step axis."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import Any

from steerlab.job import TrackConfig


class Tracker:
    """An open W&B run, or nothing when the job names none."""

    def __init__(self, track: TrackConfig, run_id: str, name: str, config: dict[str, Any], directory: Path) -> None:
        self._run: Any = None
        wanted = track.wandb
        if wanted is None or wanted.mode == "disabled":
            return
        import wandb

        mode = wanted.mode
        if mode == "online" and not (os.environ.get("WANDB_API_KEY") or wandb.api.api_key):
            warnings.warn("no W&B API key: the run is written offline; upload it with `wandb sync`", stacklevel=2)
            mode = "offline"
        directory.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=wanted.project,
            entity=wanted.entity,
            id=run_id,
            name=name,
            config=config,
            dir=str(directory),
            mode=mode,
            resume="allow",
            settings=wandb.Settings(silent=True, console="off"),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log(self, metrics: dict[str, Any]) -> None:
        """Record one line of metrics; `step` is the axis."""
        if self._run is not None:
            self._run.log(metrics)

    def finish(self, summary: dict[str, float], exit_code: int) -> None:
        """Write final values and close."""
        if self._run is not None:
            self._run.summary.update(summary)
            self._run.finish(exit_code=exit_code)
