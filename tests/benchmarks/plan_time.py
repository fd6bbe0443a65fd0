"""What it takes to plan a job that builds on others: python tests/benchmarks/plan_time.py

Seconds of `Plan.of(job).stages` for chains of jobs, the median of some repeats, and the ratio to a chain half as long.
"""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import Any

from steerlab import job
from steerlab.stages import JobType, Plan

FOLDER = Path(__file__).parents[2] / "jobs" / "tiny"
REPEATS = 20


def chain(depth: int) -> job.Job:
    """Return jobs/tiny/vanilla.yaml on itself, each with another seed."""
    tree: dict[str, Any] = job.read(FOLDER / "base.yaml", JobType).model_dump(mode="json")
    for number in range(1, depth):
        own = job.read_tree(FOLDER / "vanilla.yaml", JobType, [f"train.seed={number}"])
        tree = {**own, "name": f"on-{number}", "model": {"source": tree}}
    return job.validate(tree, JobType, FOLDER / "chain.yaml")


def main() -> None:
    """Print the table."""
    before = None
    for depth in (1, 2, 4, 8, 16):
        wanted, seconds = chain(depth), []
        for _ in range(REPEATS):
            start_s = time.perf_counter()
            stages = Plan.of(wanted).stages
            seconds.append(time.perf_counter() - start_s)
        found = statistics.median(seconds)
        grown = "" if before is None else f", {found / before:.2f} times as long as half of it"
        print(f"{depth:2d} jobs, {len(stages):2d} stages: {1000 * found:.1f} ms{grown}")
        before = found


if __name__ == "__main__":
    main()
