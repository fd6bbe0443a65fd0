"""The quickstart: the tiny base model, then vanilla, ISE and ASIDE at several angles, evaluated, in one table.

Entry point of jobs/quickstart.sh, which sends it to a cluster with `ray job submit`; it runs in any steerlab environment:

    python jobs/quickstart.py --root ROOT

Two jobs run at a time when the cluster has two CPUs. What is in ROOT already is not run again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

JOBS = Path(__file__).parent / "tiny"
COLUMNS = {
    "vanilla": ("vanilla.yaml", []),
    "ISE": ("ise.yaml", []),
    "ASIDE pi/4": ("aside.yaml", ["method.angle_rad=pi/4"]),
    "ASIDE pi/2": ("aside.yaml", ["method.angle_rad=pi/2"]),
    "ASIDE 3pi/4": ("aside.yaml", ["method.angle_rad=3*pi/4"]),
}
console = Console(width=120)


def run_job(file: str, overrides: list[str], root: str) -> dict:
    """Run one job with the command line; return its record. Exits with the job's message when it fails."""
    sets = [part for override in overrides for part in ("--set", override)]
    command = [sys.executable, "-m", "steerlab", "run", str(JOBS / file), "--root", root, "--json", *sets]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    if done.returncode:
        raise SystemExit(done.returncode)
    return json.loads(done.stdout)[0]


def main(root: Annotated[str, typer.Option(help="Where results go: an absolute path or a URI.")]) -> None:
    """Run the jobs and print the table."""
    began_s = time.monotonic()

    def step(text: str) -> None:
        console.print(f"[{time.monotonic() - began_s:4.0f} s] {text}".replace("[", "\\["), highlight=False)

    step("training the tiny base model (1 of 2)")
    base = run_job("base.yaml", [], root)
    step(f"fine-tuning and evaluating {len(COLUMNS)} models (2 of 2)")

    def column(name: str) -> dict:
        record = run_job(*COLUMNS[name], root)
        step(f"  {name} done")
        return record

    with ThreadPoolExecutor(2) as pool:
        records = {"base": base, **dict(zip(COLUMNS, pool.map(column, COLUMNS), strict=True))}
    table = Table("tiny world", *records, title="Tiny-world results, one seed: value +- standard error")
    for metric in next(iter(records.values()))["summary"]["metrics"]:
        table.add_row(metric, *(cell(record["summary"]["metrics"][metric]) for record in records.values()))
    console.print(table)
    for name, record in records.items():
        console.print(f"{name}: {record['folder']}", soft_wrap=True, highlight=False)


def cell(metric: dict) -> str:
    """Write a metric, or a dash when nothing was scored."""
    if metric["value"] is None:
        return "-"
    return f"{metric['value']:.2f}" + ("" if metric["stderr"] is None else f" +- {metric['stderr']:.2f}")


if __name__ == "__main__":
    typer.run(main)
