"""What a sweep ends with: table, summary, and the best trial on the rows that nothing was chosen by."""

from __future__ import annotations

from typing import NotRequired, TypedDict

from steerlab import job as jobs
from steerlab import run
from steerlab.job import Job
from steerlab.run import MetricNumbers
from steerlab.stages import Plan
from steerlab.stages.spread import reserved
from steerlab.storage.plan import Listener
from steerlab.sweeps import results
from steerlab.sweeps.sweep_request import SCHEMA, SweepRun


class SweepSummary(TypedDict):
    """What summary.json of a sweep holds."""

    schema: int
    metric: str
    mode: str
    complete: bool
    best: results.Best | None
    indistinguishable: list[str] | None
    """Other trials that the data cannot tell from the best one; None where nothing tells."""
    development: dict[str, MetricNumbers] | None
    """Metrics of the best trial on the rows that chose it, where others report it."""
    test: dict[str, MetricNumbers] | None
    """Its metrics on the rows of the job's own tasks."""
    counts: dict[str, int]
    """Trials, and rows by status."""
    seconds: dict[str, float]
    """By stage."""
    test_runs: NotRequired[list[str]]


def conclude(sweep: SweepRun, interrupted: bool) -> SweepSummary:
    """Write table and summary; of a sweep that is complete, also what the best trial measures on the rows that report."""
    sweep.write_table()
    plan, rows = sweep.request.plan, results.all_rows(sweep.history)
    scored = results.scored(rows, plan.metric)
    best = results.best_of(scored, plan.mode)
    statuses = [results.text_of(row, "status") for row in rows]
    summary: SweepSummary = {
        "schema": SCHEMA,
        "metric": plan.metric,
        "mode": plan.mode,
        "complete": not interrupted,
        "best": None,
        "indistinguishable": None,
        "development": None,
        "test": None,
        "counts": {"trials": len({results.text_of(row, "trial_id") for row in rows})}
        | {status: statuses.count(status) for status in sorted(set(statuses))},
        "seconds": results.seconds_of(rows),
    }
    if best is not None:
        summary["best"] = results.best_line(best, plan.metric)
        if plan.development:
            summary["development"] = results.metrics_of_rows(best.rows)
        sweep.store.write_text(f"{sweep.folder}/best.yaml", jobs.dump(plan.best_job(best.params, None)))
    if best is not None and not interrupted:
        summary["indistinguishable"] = results.indistinguishable(scored, best, plan.metric, sweep.store)
        follows = "; its own tasks follow" if plan.development else ""
        sweep.say(f"best: trial {best.trial_id}, {plan.metric} {best.value:.4g}{follows}")
        summary["test"], summary["test_runs"] = _tested(sweep, best)
    sweep.store.write_json(f"{sweep.folder}/summary.json", summary)
    if not interrupted:
        sweep.history.add("end")
    return summary


def _tested(sweep: SweepRun, best: results.Scored) -> tuple[dict[str, MetricNumbers], list[str]]:
    """Return what the best trial measures on the rows of the job's own tasks, and the runs that say so.

    Without development rows these are the rows that it was chosen by, so its own runs have said it already.
    """
    request = sweep.request
    if not request.plan.development:
        return results.metrics_of_rows(best.rows), [results.text_of(row, "run") for row in best.rows]
    runs = [_report(sweep, request.plan.best_job(best.params, seed), seed) for seed in request.seeds]
    names = runs[0].summary["metrics"]
    metrics = {name: results.over_seeds([one.summary["metrics"][name] for one in runs]) for name in names}
    return metrics, [one.folder for one in runs]


def _report(sweep: SweepRun, job: Job, seed: int) -> run.Run:
    """Run the best trial's own tasks: those of the job, on the rows that nothing was chosen by."""
    if job.scale.worker_range == (1, 1) and job.scale.warm is None:
        job = job.model_copy(update={"scale": job.scale.model_copy(update={"warm": not reserved.uses_gpu(job.scale)})})
    run_id = f"{sweep.folder.rpartition('/')[2]}-best-{seed}"
    return run.execute(Plan.of(job), sweep.store, Listener(), sweep.command, run_id=run_id)
