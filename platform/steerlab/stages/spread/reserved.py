"""CPUs and GPUs: how many a cluster has, and how many the workers and actors of a stage reserve."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from steerlab.guards import late
from steerlab.guards.private_parts import most_resources
from steerlab.job import ScaleConfig

if TYPE_CHECKING:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
else:
    ray = late.module("ray")

ANYWHERE = "DEFAULT"
"""Scheduling strategy of the tasks and actors of a stage.

Without one, Ray would place them in the placement group of the sweep's trial that starts them, which has room for the driver
only, and they would wait for ever.
"""


@cache
def remote(function: Callable[..., Any], **options: Any) -> Any:
    """Return a function or a class as a Ray task or actor that is placed `ANYWHERE`."""
    # Cached, because Ray sends a function to the workers once for each object that it made of it. No decorator of the function,
    # which would import Ray with its file.
    return ray.remote(scheduling_strategy=ANYWHERE, **options)(function)


def beside_the_driver() -> NodeAffinitySchedulingStrategy:
    """Return the scheduling strategy that keeps an actor on the driver's node."""
    # Other nodes may be taken away by an autoscaler or a spot market; without the driver's node the run has ended anyway.
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def available() -> dict[str, float]:
    """Return the number of CPUs and GPUs that the cluster has or, with an autoscaler, can grow to."""
    now, limit = ray.cluster_resources(), most_resources()
    return {name: max(now.get(name, 0), limit.get(name, 0)) for name in ("CPU", "GPU")}


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
    gpus = 1 if scale.gpu != "never" and ray.cluster_resources().get("GPU", 0) >= workers else 0
    # A reservation must fit on one node, which the share of several workers may not.
    largest = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
    share = scale.worker_range[0] * scale.cpus_per_worker / workers
    return {"num_cpus": min(share, largest), "num_gpus": gpus}
