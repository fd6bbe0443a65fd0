"""What commands cost that compute nothing: python tests/benchmarks/startup.py

CPU seconds (user and system, all threads) of processes, median of some repeats, beside those of `import torch` in the same
turn: a machine that is busy slows all of them. Bytecode is cached, as it is after the first command of a user. The artifact of
the cached run is an empty stand-in, which such a run does not open.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from steerlab import job
from steerlab.stages import JobType, Plan
from steerlab.storage.store import Store

ROOT = Path(__file__).parents[2]
REPEATS = 3
COMMANDS = {
    "import torch": ["-c", "import torch"],
    "steerlab --help": ["-m", "steerlab", "--help"],
    "steerlab schema": ["-m", "steerlab", "schema"],
    "steerlab plan jobs/tiny/aside.yaml, again": ["-m", "steerlab", "plan", "jobs/tiny/aside.yaml"],
    "steerlab run jobs/tiny/extract.yaml, wholly cached": ["-m", "steerlab", "run", "jobs/tiny/extract.yaml"],
}


def put_artifacts(root: str) -> None:
    """Put an artifact where each stage of the cached run looks for its own."""
    store = Store.open(root)
    for stage in Plan.of(job.read(ROOT / "jobs/tiny/extract.yaml", JobType)).stages:
        with store.temporary(stage.name, stage.key) as directory:
            (directory / "part").write_text("made by hand")
            store.commit(stage.name, stage.key, directory, {"params": dict(stage.params), "seconds": 1.0})


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

        os.environ.update(environment)
        put_artifacts(f"{scratch}/root")
        first = {name: cpu_s(arguments) for name, arguments in COMMANDS.items()}
        turns = [{name: cpu_s(arguments) for name, arguments in COMMANDS.items()} for _ in range(REPEATS)]
    for name in COMMANDS:
        found = statistics.median(turn[name] for turn in turns)
        ratio = statistics.median(turn[name] / turn["import torch"] for turn in turns)
        print(f"{name}: {found:.2f} s of CPU, {ratio:.2f} times that of importing torch; the first time {first[name]:.2f} s")


if __name__ == "__main__":
    main()
