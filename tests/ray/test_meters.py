"""The platform's own numbers as Prometheus reads them from a node of a real cluster."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest
import ray

from steerlab.storage.plan import Record, Stage
from steerlab.tracking import prometheus

pytestmark = [pytest.mark.ray, pytest.mark.slow]
BOARD = Path(__file__).parents[2] / "dashboards/grafana/steerlab.json"


def exported(wanted: set[str]) -> dict[str, float]:
    """Read the metrics page of this node until it shows every wanted name; return the lines of the platform."""
    (node,) = [node for node in ray.nodes() if node["Alive"]]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline_s = time.monotonic() + 60
    while True:
        with urllib.request.urlopen(url, timeout=5) as answer:
            text = answer.read().decode()
        lines = [line for line in text.splitlines() if line.startswith("ray_steerlab_")]
        names = {re.split(r"[{ ]", line)[0] for line in lines}
        if wanted <= names:
            return {line.rpartition(" ")[0]: float(line.rpartition(" ")[2]) for line in lines}
        assert time.monotonic() < deadline_s, f"missing: {sorted(wanted - names)}"
        time.sleep(1)


def test_a_node_exports_what_the_panels_show(cluster: None) -> None:
    stage = Stage("metered", 1, {}, lambda work: None)  # a name that no other test of the cluster counts under
    prometheus.reported(stage, {"step": 1, "steps_per_s": 4.0, "train/loss": 0.5})
    prometheus.reported(stage, {"done": 30, "total": 100})
    prometheus.reported(stage, {"done": 50, "total": 100})
    for status in ("ran", "cached", "cached"):
        prometheus.ended(Record(stage, status, 2.0))
    prometheus.trials("sweeps/a/1", {"finished": 3, "running": 1})
    expressions = " ".join(re.findall(r'"expr": "([^"\\]*(?:\\.[^"\\]*)*)"', json.dumps(json.loads(BOARD.read_text()))))
    shown = set(re.findall(r"ray_steerlab_\w+", expressions))
    assert shown, "the panels ask for the platform's numbers"
    found = exported(shown)

    def value(name: str, **tags: str) -> float:
        (line,) = [k for k in found if k.startswith(name + "{") and all(f'{tag}="{v}"' in k for tag, v in tags.items())]
        return found[line]

    assert value("ray_steerlab_stages_total", stage="metered", status="cached") == 2
    assert value("ray_steerlab_rows_total", stage="metered") == 50
    assert value("ray_steerlab_step_seconds", stage="metered") == 0.25
    assert value("ray_steerlab_trials", sweep="sweeps/a/1", state="finished") == 3
