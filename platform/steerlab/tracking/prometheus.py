"""Metrics of the platform for Prometheus and Grafana, through Ray's metrics agent: rates, step times, cache hits, trials.

Every process that runs stages inside a Ray cluster reports; on each node, Ray's dashboard agent exports these metrics together
with Ray's own. The scrape configuration and the panels are in `dashboards/grafana`. Outside a cluster nothing is counted.

    steerlab_stages_total{stage, status}        stages that ended, by "ran", "cached" and "failed"
    steerlab_stage_seconds{stage}               histogram of the durations of stages that ran
    steerlab_rows_total{stage}                  rows that streaming stages have processed; its rate is rows/s
    steerlab_step_seconds{stage}                seconds of a training step, from the last report
    steerlab_train_loss{stage}                  loss of the last step
    steerlab_trials{sweep, state}               trials of a sweep by state
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from steerlab.guards import late
from steerlab.storage.plan import Record, Stage

if TYPE_CHECKING:
    import ray
    from ray.util.metrics import Counter, Gauge, Histogram
else:
    ray = late.module("ray")

_SECONDS = [0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000, 10000, 30000]
"""Upper bounds of the buckets of the histogram of stage durations, in seconds."""
STATES = ("pending", "running", "finished", "pruned", "stopped", "failed")
_rows: dict[str, float] = {}
"""Rows that each stage has reported so far, by the stage's key: stages report totals, but a counter takes increments."""


def _in_cluster() -> bool:
    # A process that has not imported Ray is not in a cluster, so Ray is not imported for this check.
    return "ray" in sys.modules and ray.is_initialized()


# The functions are cached, so that a process has one object for each metric.
@cache
def _counter(name: str, description: str, *tags: str) -> Counter:
    from ray.util.metrics import Counter

    return Counter(f"steerlab_{name}", description, tag_keys=tags)


@cache
def _gauge(name: str, description: str, *tags: str) -> Gauge:
    from ray.util.metrics import Gauge

    return Gauge(f"steerlab_{name}", description, tag_keys=tags)


@cache
def _histogram(name: str, description: str, *tags: str) -> Histogram:
    from ray.util.metrics import Histogram

    return Histogram(f"steerlab_{name}", description, boundaries=_SECONDS, tag_keys=tags)


def ended(record: Record) -> None:
    """Count a stage that ended."""
    if not _in_cluster():
        return
    stage = record.stage.name
    # Ray's exporter appends _total to the name of a counter.
    _counter("stages", "Stages that ended, by status.", "stage", "status").inc(1, {"stage": stage, "status": record.status})
    if record.status == "ran":
        _histogram("stage_seconds", "Seconds that stages took.", "stage").observe(record.seconds, {"stage": stage})


def reported(stage: Stage, metrics: Mapping[str, float]) -> None:
    """Export the report of a running stage: seconds per step and loss of a training, or the number of rows done."""
    if not _in_cluster():
        return
    tags = {"stage": stage.name}
    if metrics.get("steps_per_s"):
        _gauge("step_seconds", "Seconds of one training step.", "stage").set(1 / metrics["steps_per_s"], tags)
    if "train/loss" in metrics:
        _gauge("train_loss", "Loss of the last training step.", "stage").set(metrics["train/loss"], tags)
    if "done" in metrics:
        more = metrics["done"] - _rows.get(stage.key, 0)
        _rows[stage.key] = metrics["done"]
        # A stage that is repeated after a failure reports smaller totals, and a counter must not decrease.
        if more > 0:
            _counter("rows", "Rows that stages have processed.", "stage").inc(more, tags)


def trials(sweep: str, states: Mapping[str, int]) -> None:
    """Export the number of trials of a sweep in each state; missing states count 0."""
    if _in_cluster():
        for state in STATES:
            _gauge("trials", "Trials of a sweep by state.", "sweep", "state").set(
                states.get(state, 0), {"sweep": sweep, "state": state}
            )
