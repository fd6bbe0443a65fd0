"""End a sweep: write its table and summary, and evaluate the best trial on rows that were not used for a choice."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from steerlab import run
from steerlab.job import Job
from steerlab.run import MetricNumbers, job_files
from steerlab.stages import Plan
from steerlab.stages.spread import reserved
from steerlab.storage.plan import Listener
from steerlab.sweeps import outcomes, results
from steerlab.sweeps.sweep_request import SCHEMA, SweepRun


class SweepSummary(TypedDict):
    """Content of a sweep's summary.json."""

    schema: int
    """Version of the format."""
    metric: str
    mode: str
    """"min" or "max" of the metric."""
    complete: bool
    """False when the sweep was interrupted."""
    best: results.Best | None
    """None if no trial finished, or none satisfies the bounds of the space and of the job's `choose`."""
    indistinguishable: list[str] | None
    """Ids of other trials whose difference to the best one may be chance. None when that is unknown: the sweep was
    interrupted, or the metric is not stored item by item."""
    development: dict[str, MetricNumbers] | None
    """Metrics of the best trial on the development rows that chose it. None when the sweep has no development tasks."""
    test: dict[str, MetricNumbers] | None
    """Metrics of the best trial on the rows of the job's own tasks. None when the sweep was interrupted."""
    bounds: list[str]
    """Bounds that the best trial satisfies, in words."""
    prices: list[str]
    """Metrics that decided between trials that cannot be distinguished from the best one."""
    predictions: list[outcomes.Outcome]
    """The predictions of the space, with the measured values."""
    warnings: list[str]
    """What a reader of the numbers has to know, as sentences without a full stop."""
    counts: dict[str, int]
    """Number of trials (`trials`), and number of rows by status."""
    seconds: dict[str, float]
    """Seconds spent in each stage."""
    test_runs: NotRequired[list[str]]
    """Run folders that measured `test`."""


def conclude(sweep: SweepRun, interrupted: bool) -> SweepSummary:
    """Write the table and the summary of a sweep; evaluate the best trial on the test rows if the sweep is complete."""
    sweep.write_table()
    plan, rows = sweep.request.plan, results.all_rows(sweep.history)
    scored = results.scored(rows, plan.metric, plan.measure(plan.metric))
    candidates = outcomes.candidates(scored, plan)
    best, close = results.best_of(candidates, plan.mode), None
    if best is not None and not interrupted:
        # Only a complete sweep has a chosen trial: a later trial could still become the best one.
        best, close = outcomes.chosen(best, candidates, scored, plan, sweep.store)
    statuses = [results.text_of(row, "status") for row in rows]
    summary: SweepSummary = {
        "schema": SCHEMA,
        "metric": plan.metric,
        "mode": plan.mode,
        "complete": not interrupted,
        "best": None,
        "indistinguishable": close,
        "development": None,
        "test": None,
        "bounds": [str(bound) for bound in plan.bounds],
        "prices": [price.metric for price in plan.prices],
        "predictions": outcomes.outcomes(plan.space.predictions, rows, sweep.store, plan.measure),
        "warnings": results.warnings_of(rows),
        "counts": {"trials": len({results.text_of(row, "trial_id") for row in rows})}
        | {status: statuses.count(status) for status in sorted(set(statuses))},
        "seconds": results.seconds_of(rows),
    }
    if best is not None:
        summary["best"] = results.best_line(best, plan.metric)
        if plan.development:
            summary["development"] = results.metrics_of_rows(best.rows, plan.measure)
        # best.yaml is written for an interrupted sweep too, since users often want the best trial so far.
        job_files.write(sweep.store, f"{sweep.folder}/best.yaml", plan.best_job(best.params, sweep.request.seeds[0]))
    if best is not None and not interrupted:
        follows = "; now its own tasks run" if plan.development else ""
        sweep.say(f"best: trial {best.trial_id}, {plan.metric} {best.value:.4g}{follows}")
        summary["test"], summary["test_runs"] = _tested(sweep, best)
    sweep.store.write_json(f"{sweep.folder}/summary.json", summary)
    if not interrupted:
        sweep.history.add("end")
    return summary


def _tested(sweep: SweepRun, best: results.Scored) -> tuple[dict[str, MetricNumbers], list[str]]:
    """Return the metrics of the best trial on the job's own tasks, and the folders of the runs that measured them."""
    request, plan = sweep.request, sweep.request.plan
    # Without development tasks, the trials were chosen by the job's own tasks, so their runs already hold these metrics.
    if not plan.development:
        return results.metrics_of_rows(best.rows, plan.measure), [results.text_of(row, "run") for row in best.rows]
    runs = [_report(sweep, plan.best_job(best.params, seed), seed) for seed in request.seeds]
    names = runs[0].summary["metrics"]
    metrics = {name: results.over_seeds([done.summary["metrics"][name] for done in runs], plan.measure(name)) for name in names}
    return metrics, [done.folder for done in runs]


def _report(sweep: SweepRun, job: Job, seed: int) -> run.Run:
    """Run the job's own tasks with the parameters of the best trial."""
    # No process of Ray Tune is running now, so a small job may train in a warm process, as the trials did.
    if job.scale.worker_range == (1, 1) and job.scale.warm is None:
        job = job.model_copy(update={"scale": job.scale.model_copy(update={"warm": not reserved.uses_gpu(job.scale)})})
    # The id is fixed, so that a sweep that is interrupted here and resumed continues this run.
    run_id = f"{sweep.folder.rpartition('/')[2]}-best-{seed}"
    return run.execute(Plan.of(job), sweep.store, Listener(), sweep.command, run_id=run_id)
