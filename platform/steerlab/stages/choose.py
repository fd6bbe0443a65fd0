"""The stage that chooses the strength on development rows; the evaluation on other rows then reports it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from steerlab.job import ChooseConfig, Job
from steerlab.plan import Stage, Work

CHOICE = "choice.json"


def stage(job: Job, development: Sequence[Stage]) -> Stage:
    """Return the choosing stage; `development` are the evaluations of `job.choose.tasks` at every candidate."""
    assert job.choose is not None
    rule = job.choose.model_dump(mode="json", include={"metric", "mode", "within"})
    params = {**rule, "labels": [stage.label for stage in development]}
    return Stage("choose", 1, params, run, tuple(development), label=job.choose.metric)


def strengths(choose: ChooseConfig) -> tuple[float, ...]:
    """Return what the development tasks are run at: 0 and the candidates."""
    return (0.0, *(strength for strength in sorted(set(choose.strengths)) if strength))


def run(work: Work) -> None:
    """Read the development metrics and keep the best strength that stays within the bound."""
    table: dict[float, dict[str, float | None]] = {}
    for label, directory in zip(work.params["labels"], work.inputs, strict=True):
        saved = json.loads((directory / "metrics.json").read_text())["strengths"]
        for strength, metrics in saved.items():
            named = {f"{label}/{name.partition('/')[2]}": metric["value"] for name, metric in metrics.items()}
            table.setdefault(float(strength), {}).update(named)
    chosen = best(table, work.params["metric"], work.params["mode"], work.params["within"])
    found = {"strength": chosen, "rule": {n: work.params[n] for n in ("metric", "mode", "within")}, "table": table}
    (work.directory / CHOICE).write_text(json.dumps(found, indent=1))


def best(table: dict[float, dict[str, float | None]], metric: str, mode: str, within: dict[str, Any] | None) -> float:
    """Return the strength with the best metric, 0 among them; of equals the weakest.

    Raises:
        ValueError: the development tasks have no such metric, or could not score it at strength 0.
    """
    for name in (metric, *([within["metric"]] if within else [])):
        if name not in table[0.0]:
            raise ValueError(f"choose: the development tasks have no metric {name!r}; they have {', '.join(table[0.0])}")
        if table[0.0][name] is None:
            raise ValueError(f"choose: {name} could not be scored at strength 0")
    sign = 1 if mode == "min" else -1

    def allowed(values: dict[str, float | None]) -> bool:
        if within is None:
            return True
        value, start = values[within["metric"]], table[0.0][within["metric"]]
        return value is not None and start is not None and value <= start + within["rise"]

    scored = {s: sign * value for s, values in table.items() if (value := values[metric]) is not None and allowed(values)}
    return min(scored, key=lambda strength: (scored[strength], strength))
