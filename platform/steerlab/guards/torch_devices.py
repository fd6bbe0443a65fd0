"""The GPUs of this machine as its torch finds them, asked in a process of its own.

Ray counts devices, whatever torch was installed: a CPU build of torch beside a GPU can use none of them. A process of its own,
because a process that has asked CUDA keeps memory on the device.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

_LIMIT_S = 120
"""Seconds for importing torch and asking it; a node that is busy takes half a minute."""
_QUESTION = """
import json, torch
built = torch.backends.cuda.is_built()
number = torch.cuda.device_count() if built else 0
gpus = [torch.cuda.get_device_properties(i) for i in range(number)]
named = [[gpu.name, gpu.total_memory] for gpu in gpus]
print(json.dumps({"torch": torch.__version__, "built": built, "cuda": torch.version.cuda, "gpus": named}))
"""


class TorchDevices(NamedTuple):
    """What torch says about a machine's GPUs."""

    torch: str
    """Version of torch; empty if it could not be asked."""
    problem: str
    """Why torch can use no GPU; empty if it can."""
    gpus: tuple[tuple[str, int], ...] = ()
    """Name and memory in bytes of each GPU."""

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        names = [f"{name}, {num_bytes / 1e9:.0f} GB" for name, num_bytes in self.gpus]
        return "; ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def is_present() -> bool:
    """Return whether this machine has a device file of a GPU of NVIDIA's, whatever torch can do with it."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()  # the latter in Windows' Linux


@cache
def here() -> TorchDevices:
    """Ask torch about the GPUs of this machine; once in a process."""
    # Without what hides devices from this process: a Ray worker that has reserved none sees none.
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", _QUESTION]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return TorchDevices("", f"torch did not answer within {_LIMIT_S} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return TorchDevices("", f"torch could not be asked: {last[:200]}")
    return read(done.stdout)


def read(answer: str) -> TorchDevices:
    """Return what torch answered, the last line of its output."""
    described = json.loads(answer.strip().splitlines()[-1])
    version, gpus = str(described["torch"]), tuple((str(name), int(size)) for name, size in described["gpus"])
    if not described["built"]:
        return TorchDevices(version, f"torch {version} is a build for CPUs")
    return TorchDevices(version, "" if gpus else f"torch {version} (CUDA {described['cuda']}) finds no GPU and driver", gpus)
