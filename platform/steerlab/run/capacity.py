"""What the stages of a job need, and whether there is so much of it: said, and refused, before anything starts."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping

import ray

from steerlab import models
from steerlab.data import sources
from steerlab.job import own_code
from steerlab.stages import Plan, extract, train
from steerlab.storage import plan
from steerlab.storage.store import Store

Estimates = Mapping[str, plan.Estimate]
"""By the key of the stage; nothing where it is small."""
_SAFETY = 1.1
"""Free disk asked for, relative to the estimate."""


def estimates(planned: Plan, facts: models.ModelFacts, records: list[plan.Record]) -> Estimates:
    """Estimate what the stages of a job's plan need that are still to run; some are judged by the length of their rows."""
    left = {record.stage.key for record in records if record.status != "cached"}
    source = sources.fetch(planned.source)
    directory, skeleton = models.prepare(source), models.skeleton(source, planned.job.model.trust_remote_code)
    found: dict[str, plan.Estimate] = {}
    for owner in planned.chain:
        job = owner.job
        for role, stage in (owner.read | owner.extracted).items():
            assert job.extract is not None
            if stage.key in left:
                found[stage.key] = extract.estimate(job, role, job.extract, facts, directory)
        for made in owner.preparing.made.values():
            if made.stage.key in left:
                found[made.stage.key] = made.estimate(facts, directory)
    for key, job in planned.trainings.items():
        if key in left:
            found[key] = train.estimate(job, facts, skeleton)
    return found


def in_words(num_bytes: int) -> str:
    """Write a size for people."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def check_disk(records: list[plan.Record], needs: Estimates, store: Store) -> None:
    """Refuse stages that are still to run and together need more disk than ROOT has.

    Raises:
        ValueError: with what each of them needs.
    """
    free = store.free_bytes()
    left = [(r.stage.name, needs[r.stage.key]) for r in records if r.status != "cached" and r.stage.key in needs]
    sizes = [(name, int((need.disk_bytes + need.work_bytes) * _SAFETY)) for name, need in left]
    if free is not None and sum(size for _, size in sizes) > free:
        parts = " + ".join(f"{in_words(size)} ({name})" for name, size in sizes if size)
        raise ValueError(f"ROOT '{store.root}' has {in_words(free)} free; needed are about {parts}")


def check_memory(records: list[plan.Record], needs: Estimates, available: int, where: str) -> None:
    """Refuse a stage that needs more memory than there is.

    Raises:
        ValueError: with the stage that needs most.
    """
    left = [(needs[r.stage.key].memory_bytes, r.stage.name) for r in records if r.status != "cached" and r.stage.key in needs]
    most, name = max(left, default=(0, ""))
    if most > available:
        raise ValueError(f"stage {name} needs about {in_words(most)} of memory a worker; {where} has {in_words(available)}")


def check_machine(records: list[plan.Record], needs: Estimates, store: Store) -> None:
    """Refuse what this machine cannot hold, where a job would run on it. Raises ValueError."""
    check_disk(records, needs, store)
    if store.is_local and not os.environ.get("RAY_ADDRESS"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        check_memory(records, needs, memory, "this machine")


def check_cluster(planned: Plan, store: Store, facts: models.ModelFacts) -> None:
    """Refuse what the cluster or the disk cannot hold; Ray must be connected. Raises ValueError."""
    from steerlab.stages.spread import reserved

    nodes = [node for node in ray.nodes() if node["Alive"]]
    if store.is_local and len(nodes) > 1:
        raise ValueError(
            f"ROOT '{store.root}' is a local path, but the cluster has {len(nodes)} nodes: use a URI (s3://, gs://)"
        )
    code = {one.path for one in own_code.codes_in(list(planned.start.paths.values()))}  # which travels with the requests
    files = [path for path in planned.start.paths.values() if path not in code]
    if len(nodes) > 1 and files:
        warnings.warn(
            f"{', '.join(files)}: all {len(nodes)} nodes read this path, so it must lie in a folder that they share; "
            "else give a URI (s3://, gs://) or hf:",
            stacklevel=2,
        )
    if planned.job.train is None:
        return
    reserved.check(planned.job.scale)
    records = plan.status(planned.stages, store)
    needs = estimates(planned, facts, records)
    check_disk(records, needs, store)
    if not reserved.uses_gpu(planned.job.scale):
        largest = max(sum(node["Resources"].get(name, 0) for name in ("memory", "object_store_memory")) for node in nodes)
        check_memory(records, needs, int(largest), "the largest node")
