"""CPUs and GPUs that a cluster has, and those that the workers and actors of a stage reserve."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from steerlab.guards import late
from steerlab.guards.private_parts import most_resources
from steerlab.job import ScaleConfig
from steerlab.stages.spread import alone, gpus

if TYPE_CHECKING:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
else:
    ray = late.module("ray")

ANYWHERE = "DEFAULT"
"""Scheduling strategy of the tasks and actors of a stage.

Without one, Ray would place them in the placement group of the sweep's trial that starts them, which has room for the driver
only, and they would wait forever.
"""


def task(function: Callable[..., object], resources: Mapping[str, float]) -> Any:
    """Return a function as a Ray task that reserves CPUs and GPUs; with a GPU its process ends after one call."""
    # Ray (2.60) sets `max_calls` itself only for GPUs of the decorator, not for those of `options`. A process that stayed would
    # hold memory on its GPU, and torch would keep computing there when Ray gives the process another one.
    own_process = {"max_calls": 1} if resources.get("num_gpus") else {}
    return remote(function, **own_process, **resources)


@cache
def remote(function: Callable[..., Any], **options: Any) -> Any:
    """Return a function or a class as a Ray task or actor that is placed `ANYWHERE`."""
    # Cached, because Ray sends a function to the workers once for each object that `ray.remote` made of it. It is not used as a
    # decorator, which would import Ray together with the function's file.
    return ray.remote(scheduling_strategy=ANYWHERE, **options)(function)


def beside_the_driver() -> NodeAffinitySchedulingStrategy:
    """Return the scheduling strategy that keeps an actor on the driver's node."""
    # An autoscaler or a spot market may remove other nodes; without the driver's node the run has ended anyway.
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def available() -> dict[str, float]:
    """Return the number of CPUs and GPUs that the cluster has or, with an autoscaler, can grow to."""
    if alone.here() is not None:
        return present()
    # The larger number counts, since an autoscaler's limit may be below the number of nodes that were added by hand.
    now, limit = ray.cluster_resources(), most_resources()
    return {name: max(now.get(name, 0), limit.get(name, 0)) for name in ("CPU", "GPU")}


def present() -> dict[str, float]:
    """Return the number of CPUs and GPUs that the cluster has now; those of this machine if stages run in this process."""
    if (process := alone.here()) is not None:
        return {"CPU": os.cpu_count() or 1, "GPU": int(process.gpu)}
    now = ray.cluster_resources()
    return {name: now.get(name, 0) for name in ("CPU", "GPU")}


def threads() -> int:
    """Return the number of CPUs that this worker reserved, which is its number of threads."""
    if (process := alone.here()) is not None:
        return process.cpus
    # At least one thread, also for a part of a CPU.
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


def has_gpu() -> bool:
    """Return whether this worker reserved a GPU."""
    # Ray sets CUDA_VISIBLE_DEVICES to the GPUs that a worker reserved; a worker without one must not use another worker's.
    # Imported only here, since drivers that make plans import this file but do not need torch.
    import torch

    process = alone.here()
    return process.gpu if process is not None else torch.cuda.is_available() and bool(ray.get_gpu_ids())


def gpus_of(scale: ScaleConfig, workers: int | None = None) -> float:
    """Return the number of GPUs, maybe a fraction, that each of `workers` processes reserves; 0 for processes on CPUs.

    `workers` is by default the fewest of a training. Raises ValueError if `scale.gpu` requires GPUs and the cluster
    has too few, or torch cannot use them.
    """
    workers = scale.worker_range[0] if workers is None else workers
    if scale.gpu == "never":
        return 0
    # GPUs that an autoscaler could add count too, because it adds them only on request.
    present, needed = available()["GPU"], workers * scale.gpus_per_worker
    if present >= needed and gpus.usable():
        return scale.gpus_per_worker
    if scale.gpu == "require":
        if present >= needed:
            raise ValueError(f"scale.gpu is require: {gpus.in_words()}")
        each = "a GPU" if scale.gpus_per_worker == 1 else f"{scale.gpus_per_worker:g} GPUs"
        raise ValueError(f"scale.gpu is require: {workers} workers need {each} each, the cluster has {present:g}")
    return 0


def uses_gpu(scale: ScaleConfig) -> bool:
    """Return whether each worker of a training gets a GPU. Raises ValueError as `gpus_of` does."""
    return gpus_of(scale) > 0


def check(scale: ScaleConfig) -> None:
    """Refuse workers for which the cluster has too few CPUs or GPUs. Raises ValueError."""
    # Ray would not refuse them but wait forever for more nodes.
    low = scale.worker_range[0]
    needed = low * scale.cpus_per_worker
    cpus = available()["CPU"]
    if needed > cpus:
        raise ValueError(
            f"scale.workers {low} x scale.cpus_per_worker {scale.cpus_per_worker:g} = {needed:g} CPUs, "
            f"but the cluster has {cpus:g}"
        )
    uses_gpu(scale)


def of_actors(scale: ScaleConfig, workers: int = 1) -> dict[str, float]:
    """Return the CPUs and GPUs that each of `workers` actors with a model reserves, as options of Ray.

    Together they reserve at most the CPUs of a training's workers, and each at most the CPUs of the largest node.
    """
    share = scale.worker_range[0] * scale.cpus_per_worker / workers
    # A reservation must fit on one node, but the sum for several workers may be larger.
    return {"num_cpus": min(share, _largest_node()), "num_gpus": gpus_of(scale, workers)}


def _largest_node() -> float:
    if alone.here() is not None:
        return present()["CPU"]
    # Ray also lists dead nodes, which are skipped.
    return max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
