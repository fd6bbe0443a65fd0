"""The stage that runs one task on a model: one artifact a task, one loaded model for all tasks of a plan."""

from __future__ import annotations

import json
import threading
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import ray

from steerlab import sources
from steerlab.evaluation import TASKS
from steerlab.job import Job, ScaleConfig, TaskConfig
from steerlab.plan import ModelRef, Stage, Work

_POLL_S = 0.5


class _Open(threading.local):
    """The evaluator of the model that this thread used last: one thread runs one plan."""

    name = ""
    actor: Any = None


_open = _Open()


def stage(job: Job, task: TaskConfig, subject: Stage | None) -> Stage:
    """Return the stage of one task; `subject` is the stage that leaves the model, None when it comes from the source."""
    config = task.model_dump(mode="json", exclude={"label"})
    params: dict[str, Any] = {
        "task": config,
        "task_version": TASKS[task.task].version,
        "model": {"dtype": job.model.dtype, "attention": job.model.attention},
        "fingerprints": {
            name: sources.fingerprint(value)
            for name, value in sorted(config.items())
            if name.endswith("source") and isinstance(value, str)
        },
    }
    if subject is None:
        assert isinstance(job.model.source, str)
        params["model"] |= {"source": job.model.source, "fingerprint": sources.fingerprint(job.model.source)}
        params["prompt"] = {"prompt_style": job.data.prompt_style, "response_role": job.data.response_role}
    return Stage("evaluate", 1, params, run, () if subject is None else (subject,), label=task.label or task.task)


def run(work: Work) -> None:
    """Run the task in an actor that keeps its model for the tasks to come."""
    evaluator = _evaluator(work)
    future = evaluator.evaluate.remote(work.params["task"])
    while not ray.wait([future], timeout=_POLL_S)[0]:
        done, total = ray.get(evaluator.progress.remote())
        if total:
            work.report({"done": done, "total": total})
    result: dict[str, Any] = ray.get(future)  # type: ignore[assignment]
    pq.write_table(pa.Table.from_pylist(result["observations"], schema=OBSERVATIONS), work.directory / "observations.parquet")
    (work.directory / "samples.json").write_text(json.dumps(result["samples"], indent=1, ensure_ascii=False))
    (work.directory / "metrics.json").write_text(json.dumps(result["metrics"], indent=1))


OBSERVATIONS = pa.schema(
    [
        ("metric", pa.string()),
        ("id", pa.string()),
        ("value", pa.float64()),
        ("weight", pa.float64()),
        ("strength", pa.float64()),
    ]
)
"""One scored item: value null when it could not be parsed, weight 0 when it does not count for the metric."""


def close() -> None:
    """Let go of the loaded model."""
    if _open.actor is not None:
        ray.kill(_open.actor)
    _open.name, _open.actor = "", None


def _evaluator(work: Work) -> Any:
    if work.stage.inputs:
        subject = work.stage.inputs[0]
        ref = ModelRef(artifact=(work.store.root, subject.name, subject.key))
    else:
        ref = ModelRef(source=work.params["model"]["source"])
    made_of = {"ref": asdict(ref), "model": work.params["model"], "prompt": work.params.get("prompt")}
    name = json.dumps(made_of, sort_keys=True)
    if name != _open.name:
        close()
        _open.actor = Evaluator.options(**_resources(work.scale)).remote(made_of)  # type: ignore[attr-defined]
        _open.name = name
    return _open.actor


def _resources(scale: ScaleConfig) -> dict[str, float]:
    cluster = ray.cluster_resources()
    gpus = 1 if scale.gpu != "never" and cluster.get("GPU", 0) >= 1 else 0
    largest = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
    return {"num_cpus": min(scale.worker_range[0] * scale.cpus_per_worker, largest), "num_gpus": gpus}


@ray.remote(max_concurrency=2)  # type: ignore[call-overload]
class Evaluator:
    """A loaded model that runs tasks, one after another."""

    def __init__(self, made_of: dict[str, Any]) -> None:
        import torch

        from steerlab import generation, models, tokens

        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
        device = "cuda" if torch.cuda.is_available() and ray.get_gpu_ids() else "cpu"
        loading = {name: made_of["model"][name] for name in ("dtype", "attention")}
        directory = ModelRef(**made_of["ref"]).locate()
        if made_of["prompt"] is None:
            self._model = generation.load(directory, device=device, **loading)
        else:
            model = models.load_model(directory, **loading).to(device)  # type: ignore[arg-type]
            encoder = tokens.Encoder(models.load_tokenizer(directory), **made_of["prompt"])
            self._model = generation.SteeredModel(model, encoder)
        self._done: tuple[int, int] = (0, 0)
        self._model.progress = self._progress

    def _progress(self, done: int, total: int) -> None:
        self._done = (done, total)

    def progress(self) -> tuple[int, int]:
        """Return (rows done, rows in all) of the pass that runs now."""
        return self._done

    def evaluate(self, config: dict[str, Any]) -> dict[str, Any]:
        """Run one task and summarise its observations, for each strength."""
        from steerlab.evaluation.metrics import summarise_all

        task = TASKS[config["task"]]
        result = task.run(self._model, task.Config.model_validate(config))
        metrics = {
            str(strength): {name: metric._asdict() for name, metric in found.items()}
            for strength, found in summarise_all(result).items()
        }
        return {
            "observations": [observation._asdict() for observation in result.observations],
            "samples": result.samples,
            "metrics": {"strengths": metrics, "transforms": result.transforms},
        }
