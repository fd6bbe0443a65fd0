"""What a cluster has, and what workers and actors reserve of it."""

from __future__ import annotations

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from steerlab.guards.private_parts import most_resources
from steerlab.job import ScaleConfig

ANYWHERE = "DEFAULT"
"""Scheduling of what a stage starts: said aloud, it is not in the placement group of a trial, which fits a driver alone."""


def beside_the_driver() -> NodeAffinitySchedulingStrategy:
    """Keep an actor on the driver's node: it shares the driver's fate, not that of a node that may be taken away."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)


def available() -> dict[str, float]:
    """Return what the cluster has or, with an autoscaler, can grow to."""
    now, limit = ray.cluster_resources(), most_resources()
    return {name: max(now.get(name, 0), limit.get(name, 0)) for name in ("CPU", "GPU")}


def uses_gpu(scale: ScaleConfig) -> bool:
    """Decide whether workers get a GPU each. Raises ValueError when they must and the cluster has too few."""
    gpus = available()["GPU"]
    enough = gpus >= scale.worker_range[0]
    if scale.gpu == "require" and not enough:
        raise ValueError(f"scale.gpu is require: {scale.worker_range[0]} workers need a GPU each, the cluster has {gpus:g}")
    return scale.gpu != "never" and enough


def check(scale: ScaleConfig) -> None:
    """Refuse more workers than the cluster can ever hold. Raises ValueError."""
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
    """Return what one of `workers` actors that hold the model reserves: together no more than a training's workers."""
    gpus = 1 if scale.gpu != "never" and ray.cluster_resources().get("GPU", 0) >= workers else 0
    largest = max(node["Resources"].get("CPU", 1) for node in ray.nodes() if node["Alive"])
    share = scale.worker_range[0] * scale.cpus_per_worker / workers
    return {"num_cpus": min(share, largest), "num_gpus": gpus}
