"""CPUs and GPUs: how many a cluster has, and how many the workers and actors of a stage reserve."""

from __future__ import annotations

import os

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from steerlab.guards.private_parts import most_resources
from steerlab.job import ScaleConfig
from steerlab.stages.spread import alone

ANYWHERE = "DEFAULT"
"""Scheduling strategy of the tasks and actors of a stage.

Without one, Ray would place them in the placement group of the sweep's trial that starts them, which has room for the driver
only, and they would wait for ever.
"""


def beside_the_driver() -> NodeAffinitySchedulingStrategy:
    """Return the scheduling strategy that keeps an actor on the driver's node."""
    # Other nodes may be taken away by an autoscaler or a spot market; without the driver's node the run has ended anyway.
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def available() -> dict[str, float]:
    """Return the number of CPUs and GPUs that the cluster has or, with an autoscaler, can grow to."""
    if alone.here() is not None:
        return present()
    now, limit = ray.cluster_resources(), most_resources()
    return {name: max(now.get(name, 0), limit.get(name, 0)) for name in ("CPU", "GPU")}


def present() -> dict[str, float]:
    """Return the number of CPUs and GPUs that the cluster has now; those of this machine where stages run in this process."""
    if (process := alone.here()) is not None:
        return {"CPU": os.cpu_count() or 1, "GPU": int(process.gpu)}
    now = ray.cluster_resources()
    return {name: now.get(name, 0) for name in ("CPU", "GPU")}


def threads() -> int:
    """Return the number of CPUs that this worker reserved, which is its number of threads."""
    if (process := alone.here()) is not None:
        return process.cpus
    return max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1)))


def has_gpu() -> bool:
    """Return whether this worker reserved a GPU."""
    # Ray sets CUDA_VISIBLE_DEVICES to the GPUs that a worker reserved; without one it must not take another worker's.
    # Imported here: drivers that make plans read this file and need no torch.
    import torch

    process = alone.here()
    return process.gpu if process is not None else torch.cuda.is_available() and bool(ray.get_gpu_ids())


def uses_gpu(scale: ScaleConfig) -> bool:
    """Return whether each worker gets a GPU. Raises ValueError if `scale.gpu` requires it and the cluster has too few."""
    # Those that an autoscaler could add count, too: it adds them only after something has asked.
    gpus = available()["GPU"]
    enough = gpus >= scale.worker_range[0]
    if scale.gpu == "require" and not enough:
        raise ValueError(f"scale.gpu is require: {scale.worker_range[0]} workers need a GPU each, the cluster has {gpus:g}")
    return scale.gpu != "never" and enough


def check(scale: ScaleConfig) -> None:
    """Refuse workers for which the cluster has too few CPUs or GPUs. Raises ValueError."""
    # Ray does not refuse them: it waits for nodes that never come.
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

    Together they reserve no more than the workers of a training do; none reserves more than the largest node has.
    """
    gpus = 1 if scale.gpu != "never" and present()["GPU"] >= workers else 0
    share = scale.worker_range[0] * scale.cpus_per_worker / workers
    # A reservation must fit on one node, which the share of several workers may not.
    return {"num_cpus": min(share, _largest_node()), "num_gpus": gpus}


def _largest_node() -> float:
    if alone.here() is not None:
        return present()["CPU"]
    return max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
