"""`steerlab run` on a ROOT whose disk fills at a random step: exit code 1, one message, and the same command goes on."""

from __future__ import annotations

import glob
import random
import time
from pathlib import Path
from typing import Any

import pytest
from commands import LIMIT_S, Command
from disks import mounted

pytestmark = [pytest.mark.ray, pytest.mark.faults]

STEPS = 12
JOB: dict[str, Any] = {
    "name": "full",
    "model": {"source": "tiny:model"},
    "data": {"prompt_style": "plain", "train": {"source": "tiny:pretrain/train", "limit": 64}},
    "method": {"name": "vanilla"},
    "train": {"steps": STEPS, "lr": 2e-3, "micro_batch": 8, "max_tokens": 64},
}


@pytest.mark.parametrize("warm", [True, False], ids=["warm", "ray train"])
@pytest.mark.parametrize("number", range(5))
def test_a_full_root(number: int, warm: bool, chance: random.Random, tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 128 << 20) as disk:
        job = {**JOB, "scale": {"checkpoint_every": 2, "warm": warm}}
        command = Command(job, tmp_path, disk.path / "root")
        process = command.start()
        command.wait_for_step(process, chance.randrange(1, STEPS - 3))
        disk.fill(chance.randrange(100_000))
        full_s = time.monotonic()
        assert process.wait(LIMIT_S) == 1, command.said
        print(f"from the full disk to the message: {time.monotonic() - full_s:.1f} s")
        assert command.said.count("failed stage train") == 1, command.said
        assert "no space left for" in command.said and "make room" in command.said
        assert not glob.glob(f"{command.root}/artifacts/*/*")
        disk.make_room()
        assert command.start().wait(LIMIT_S) == 0, command.said
        assert command.runs[-1] == list(range(1, STEPS + 1))
