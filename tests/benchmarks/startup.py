"""What commands cost that compute nothing: python tests/benchmarks/startup.py

CPU seconds (user and system, all threads) of processes, median of some repeats, beside those of `import torch` in the same
turn: a machine that is busy slows all of them. Bytecode is cached, as it is after the first command of a user.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPEATS = 5
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "steerlab --help": ["-m", "steerlab", "--help"],
    "steerlab schema": ["-m", "steerlab", "schema"],
    "steerlab plan jobs/tiny/aside.yaml, again": ["-m", "steerlab", "plan", "jobs/tiny/aside.yaml"],
    "steerlab run jobs/tiny/extract.yaml, wholly cached": ["-m", "steerlab", "run", "jobs/tiny/extract.yaml"],
}


def main() -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory() as scratch:
        environment = {**os.environ, "STEERLAB_ROOT": f"{scratch}/root", "STEERLAB_CACHE": f"{scratch}/cache"}
        environment |= {"PYTHONPYCACHEPREFIX": f"{scratch}/bytecode"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)

        def cpu_s(arguments: list[str]) -> float:
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

        first = {name: cpu_s(arguments) for name, arguments in COMMANDS.items()}
        turns = [{name: cpu_s(arguments) for name, arguments in COMMANDS.items()} for _ in range(REPEATS)]
    for name in COMMANDS:
        found = statistics.median(turn[name] for turn in turns)
        ratio = statistics.median(turn[name] / turn["import torch"] for turn in turns)
        print(f"{name}: {found:.2f} s of CPU, {ratio:.2f} times that of importing torch; the first time {first[name]:.2f} s")


if __name__ == "__main__":
    main()
