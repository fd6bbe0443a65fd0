"""The GPUs of this machine that its torch finds, queried in a separate process.

Ray counts devices, whichever torch was installed: a CPU build of torch beside a GPU can use none of them. The process is
separate, because a process that has queried CUDA holds memory on the device.
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
"""Time limit in seconds for importing torch and the query; a busy node takes half a minute."""
_QUESTION = """
import json, torch
built = torch.backends.cuda.is_built()
number = torch.cuda.device_count() if built else 0
gpus = [torch.cuda.get_device_properties(i) for i in range(number)]
named = [[gpu.name, gpu.total_memory] for gpu in gpus]
print(json.dumps({"torch": torch.__version__, "built": built, "cuda": torch.version.cuda, "gpus": named}))
"""


class TorchDevices(NamedTuple):
    """The GPUs of a machine according to torch."""

    torch: str
    """Version of torch; empty if the query failed."""
    problem: str
    """Reason why torch can use no GPU; empty if it can."""
    gpus: tuple[tuple[str, int], ...] = ()
    """Name and memory in bytes of each GPU."""

    def __str__(self) -> str:
        if self.problem:
            return self.problem
        names = [f"{name}, {num_bytes / 1e9:.0f} GB" for name, num_bytes in self.gpus]
        return "; ".join(f"{names.count(name)} x {name}" for name in dict.fromkeys(names))


def is_present() -> bool:
    """Return whether this machine has a device file of a GPU of NVIDIA's, whether torch can use it or not."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()  # the latter in Windows' Linux


@cache
def here() -> TorchDevices:
    """Query torch about the GPUs of this machine, once in a process."""
    # The variable that hides devices from this process is removed, because a Ray worker that has reserved no GPU sees none.
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", _QUESTION]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, env=environment, check=False)
    except subprocess.TimeoutExpired:
        return TorchDevices("", f"torch did not answer within {_LIMIT_S} s")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return TorchDevices("", f"torch could not be queried: {last[:200]}")
    return read(done.stdout)


def read(answer: str) -> TorchDevices:
    """Return the answer of the query, which is the last line of its output."""
    described = json.loads(answer.strip().splitlines()[-1])
    version, gpus = str(described["torch"]), tuple((str(name), int(size)) for name, size in described["gpus"])
    if not described["built"]:
        return TorchDevices(version, f"torch {version} is a build for CPUs")
    return TorchDevices(version, "" if gpus else f"torch {version} (CUDA {described['cuda']}) finds no GPU and driver", gpus)
