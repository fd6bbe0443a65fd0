"""Train with one worker in a process that remains for the next training, for the small trials of a sweep.

A Ray Train run takes about 16 s on 2 cores to start and stop, even for a short training. Here Ray Train runs in its local mode
inside a process that remains (staying.py), so that imports happen once. The loop is that of `launch`, with bit-identical
results and the same checkpoints. A process that dies is replaced, and the loop continues from the newest checkpoint.
"""

from __future__ import annotations

import tempfile
import uuid
import warnings

import ray
from ray.train import RunConfig, ScalingConfig

from steerlab.guards import private_parts
from steerlab.job import ScaleConfig
from steerlab.stages.spread import alone, reserved, staying
from steerlab.storage.plan import ModelRef, Report
from steerlab.training.request import Request

_Line = dict[str, float] | str
"""Message of a running training: the metrics of a step, or a line for the user."""


def fit(request: Request[ModelRef], scale: ScaleConfig, *, storage: str, report: Report) -> None:
    """Train in a warm process and write the artifact into the folder `output` of `storage`.

    Args:
        request: Description of the training.
        scale: Size of the single worker. A process that dies is replaced up to `scale.max_failures` times.
        storage: Path or URI that all nodes reach. It holds the checkpoints; a later call continues from the newest one.
        report: Takes the metrics of each step once.
    """
    assert scale.worker_range == (1, 1), "several workers need a Ray Train run of their own"
    newest = 0.0

    def receive(line: _Line) -> None:
        nonlocal newest
        if isinstance(line, str):
            warnings.warn(line, stacklevel=2)
        elif line["step"] > newest:  # a process that replaces another repeats the steps since the checkpoint
            newest = line["step"]
            report(line)

    # There is no `owner`, because a training loads its own model and does not retain it.
    held = {"num_cpus": scale.cpus_per_worker, "num_gpus": reserved.gpus_of(scale)}
    staying.call(_train, (request, scale, storage), scale, held, receive)


def prepare(num_processes: int) -> None:
    """Start importing the training loop in several processes; returns at once, while they import."""
    # Ray runs the tasks at the same time in separate processes, if CPUs are free, and reuses the processes.
    for _ in range(num_processes):
        _import.remote()


@ray.remote(num_cpus=1, scheduling_strategy=reserved.ANYWHERE)
def _import() -> None:
    import steerlab.training.loop  # noqa: F401


def _train(tell: staying.Tell[_Line], request: Request[ModelRef], scale: ScaleConfig, storage: str) -> None:
    """Run the loop under Ray Train's local mode."""
    if alone.here() is not None:
        _loop(request, scale, storage, tell)
        return
    # `TorchTrainer`'s local mode is not used: it destroys the process group at the end, to which DeepSpeed keeps a reference.
    private_parts.local_trainer()(
        lambda: _loop(request, scale, storage, tell),
        scaling_config=ScalingConfig(num_workers=0),
        run_config=RunConfig(name="warm", storage_path=tempfile.gettempdir()),
    ).fit()


def _loop(request: Request[ModelRef], scale: ScaleConfig, storage: str, tell: staying.Tell[_Line]) -> None:
    """Train from the newest checkpoint below `storage` to the end, and write the artifact there."""
    import torch
    from torch import distributed

    from steerlab.training import worker

    gpu = reserved.has_gpu()
    if not distributed.is_initialized():
        # The group is created once per process. A group of one needs no port: its `HashStore` is in the process's memory.
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        store = distributed.HashStore()  # type: ignore[attr-defined]
        distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    torch.set_num_threads(max(1, int(scale.cpus_per_worker)))
    seat = worker.Seat(
        rank=0,
        world_size=1,
        local_rank=0,
        device=torch.device("cuda" if gpu else "cpu"),
        storage=storage,
        attempt=uuid.uuid4().hex[:12],
        tell=tell,
        say=tell,
    )
    try:
        worker.run(request, scale, seat)
    finally:
        # The process remains, so the GPU memory in PyTorch's cache is freed for others.
        if gpu:
            torch.cuda.empty_cache()
