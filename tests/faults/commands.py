"""`steerlab run` as a process with a Ray cluster of its own: followed, killed, started again."""

from __future__ import annotations

import glob
import json
import os
import subprocess
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import yaml
from safetensors.torch import load_file

from steerlab import run

LIMIT_S = 600
_MARK = "STEERLAB_FAULTS_RUN"
"""Variable in the environment of all processes that a command starts."""


class Command:
    """`steerlab run` of a job, with a cluster of its own."""

    def __init__(self, job: dict[str, Any], folder: Path, root: Path | None = None) -> None:
        self.root = root or folder / "root"
        (folder / "job.yaml").write_text(yaml.safe_dump(job))
        self._command = [sys.executable, "-m", "steerlab", "run", str(folder / "job.yaml"), "--root", str(self.root)]
        self._log, self._mark = folder / "log", f"{_MARK}={uuid.uuid4().hex}"
        package, (name, _, value) = Path(run.__file__).parents[2], self._mark.partition("=")
        self._environment = {**os.environ, "PYTHONPATH": str(package), "RAY_ADDRESS": "local", name: value}

    def start(self) -> subprocess.Popen[bytes]:
        # Into a file: a process of Ray that outlives the command would hold a pipe open.
        with self._log.open("wb") as log:
            return subprocess.Popen(self._command, env=self._environment, stdout=log, stderr=log)

    @property
    def said(self) -> str:
        """Everything that the last start has printed, on one line."""
        return " ".join(self._log.read_text(errors="replace").split())

    def kill_all(self, process: subprocess.Popen[bytes]) -> None:
        """SIGKILL the command and everything that it started, also what starts meanwhile."""
        process.kill()
        process.wait()
        while members := [member for member in psutil.process_iter() if self._is_own(member)]:
            for member in members:
                with suppress(psutil.NoSuchProcess):
                    member.kill()
            psutil.wait_procs(members, timeout=5)

    def _is_own(self, member: psutil.Process) -> bool:
        name, _, value = self._mark.partition("=")
        try:
            return member.environ().get(name) == value
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            return False

    @property
    def runs(self) -> list[list[int]]:
        """The steps in the metrics of each run."""
        files = sorted(glob.glob(str(self.root / "runs/*/*/metrics.jsonl")))
        return [[json.loads(line)["step"] for line in Path(file).read_text().splitlines()] for file in files]

    def wait_for_step(self, process: subprocess.Popen[bytes], step: int) -> None:
        deadline_s = time.monotonic() + LIMIT_S
        while not self.runs or len(self.runs[-1]) < step:
            assert process.poll() is None and time.monotonic() < deadline_s, self.said
            time.sleep(0.05)

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        (found,) = glob.glob(str(self.root / "artifacts/train/*/model/model.safetensors"))
        return load_file(found)
