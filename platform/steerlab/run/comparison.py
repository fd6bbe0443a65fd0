"""Two runs, item by item."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import pyarrow.parquet as pq

from steerlab.evaluation.metrics import Difference, Observation, Transform, paired_difference
from steerlab.run.record import labelled
from steerlab.store import Store


def compare(store: Store, first: str, second: str) -> dict[str, Difference]:
    """Return second minus first for every metric that both runs measured on the same items, with a 95 % interval.

    Raises:
        ValueError: a task of the two runs has other data or settings, so its items are not pairs.
    """
    a, b = (_measured(store, folder) for folder in (first, second))
    differences = {}
    for name in a:
        if name not in b:
            continue
        if a[name].task != b[name].task:
            raise ValueError(f"{name} was measured on other data or with other settings in the two runs, so items do not pair")
        if not all(any(o.weight for o in side[name].observations if o.value is not None) for side in (a, b)):
            continue  # nothing scored on one side (SEP where no probe was executed): there is no difference to speak of
        differences[name] = paired_difference(b[name].observations, a[name].observations, transform=a[name].transform)
    return differences


class _Measured(NamedTuple):
    """One metric of a run at its first strength."""

    observations: list[Observation]
    transform: Transform
    task: Any
    """What was asked and of which data: equal for runs whose items are the same."""


def _measured(store: Store, folder: str) -> dict[str, _Measured]:
    found: dict[str, _Measured] = {}
    for label, key in store.read_json(f"{folder}/summary.json")["evaluations"].items():
        directory = store.local("evaluate", key)
        params = store.manifest("evaluate", key)["meta"]["params"]
        task = [{**params["task"], "strengths": None}, params["task_version"], params["fingerprints"]]
        saved = json.loads((directory / "metrics.json").read_text())
        first = float(next(iter(saved["strengths"])))
        for row in pq.read_table(directory / "observations.parquet").to_pylist():
            if row["strength"] == first:
                name = labelled(row["metric"], label)
                transform = saved["transforms"].get(row["metric"], "identity")
                found.setdefault(name, _Measured([], transform, task)).observations.append(Observation(**row))
    return found
