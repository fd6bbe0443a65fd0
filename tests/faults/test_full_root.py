"""`steerlab run` on a ROOT whose disk fills at a random step: exit code 1, one message, and the same command goes on."""

from __future__ import annotations

import glob
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from disks import Disk, mounted

from steerlab import run

pytestmark = [pytest.mark.ray, pytest.mark.faults]

STEPS, LIMIT_S = 12, 600
JOB: dict[str, Any] = {
    "name": "full",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "train": {"source": "tiny:pretrain/train", "limit": 64}},
    "method": {"name": "vanilla"},
    "train": {"steps": STEPS, "lr": 2e-3, "micro_batch": 8, "max_tokens": 64},
    "scale": {"checkpoint_every": 2},
}


def started(disk: Disk, *options: str) -> subprocess.Popen[str]:
    (disk.path.parent / "job.yaml").write_text(yaml.safe_dump(JOB))
    command = ["run", str(disk.path.parent / "job.yaml"), "--root", str(disk.path / "root"), *options]
    environment = {**os.environ, "PYTHONPATH": str(Path(run.__file__).parents[2]), "RAY_ADDRESS": "local"}
    return subprocess.Popen(
        [sys.executable, "-m", "steerlab", *command], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def num_steps(disk: Disk) -> int:
    return sum(len(Path(file).read_text().splitlines()) for file in glob.glob(f"{disk.path}/root/runs/*/*/metrics.jsonl"))


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "ray train"])
@pytest.mark.parametrize("number", range(5))
def test_a_full_root(number: int, warm: bool, chance: random.Random, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 64 << 20) as disk:
        process = started(disk, "--set", f"scale.warm={str(warm).lower()}")
        deadline_s, step = time.monotonic() + LIMIT_S, chance.randrange(1, STEPS - 3)
        while num_steps(disk) < step:
            assert process.poll() is None and time.monotonic() < deadline_s, process.communicate()
            time.sleep(0.02)
        disk.fill(chance.randrange(100_000))
        full_s = time.monotonic()
        _, said = process.communicate(timeout=LIMIT_S)
        print(f"from the full disk to the message: {time.monotonic() - full_s:.1f} s")
        assert process.returncode == 1, said
        lines = [line for line in said.splitlines() if line.startswith("failed")]
        assert len(lines) == 1 and "no space left for" in lines[0] and "make room" in lines[0], said
        assert not glob.glob(f"{disk.path}/root/artifacts/*/*")
        disk.make_room()
        again = started(disk, "--json", "--set", f"scale.warm={str(warm).lower()}")
        out, said = again.communicate(timeout=LIMIT_S)
        assert again.returncode == 0, said
        folder = Path(json.loads(out)[0]["folder"])
        assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()] == list(
            range(1, STEPS + 1)
        )
