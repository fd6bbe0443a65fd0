"""Estimate the memory and disk that the stages of a job need, and refuse a job that does not fit before it starts.

`steerlab plan` compares the estimates of all stages with this machine (`check_machine`). A run compares them with the cluster
(`check_cluster`) only if the job has a `train` section: without one, nothing but the nodes' access to files is checked.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from steerlab import models
from steerlab.data import sources
from steerlab.guards import late
from steerlab.job import own_code
from steerlab.run import sharing
from steerlab.stages import Plan, edit, extraction_size, train
from steerlab.storage import copies, exclusive, plan
from steerlab.storage.store import Store

if TYPE_CHECKING:
    import ray
else:
    ray = late.module("ray")

Estimates = Mapping[str, plan.Estimate]
"""Estimate by the key of the stage. A stage without an entry needs little."""
_SAFETY = 1.1
"""Factor on estimated disk space: the file system and the logs need some too."""


def estimates(planned: Plan, facts: models.ModelFacts, records: list[plan.Record]) -> Estimates:
    """Estimate memory and disk of the stages that are not cached.

    Args:
        planned: the plan of the job.
        facts: sizes of its model.
        records: status of the plan's stages.

    Returns:
        Estimate by stage key. Some depend on the length of the tokenised rows, so this may read the data.
    """
    left = {record.stage.key for record in records if record.status != "cached"}
    source = sources.fetch(planned.source)
    directory, skeleton = models.prepare(source), models.skeleton(source, planned.job.model.trust_remote_code)
    needs: dict[str, plan.Estimate] = {}
    for owner in planned.chain:
        job = owner.job
        for role, stage in (owner.read | owner.extracted).items():
            assert job.extract is not None
            if stage.key in left:
                needs[stage.key] = extraction_size.estimate(job, role, job.extract, facts, directory)
        for preparation in owner.preparing.made.values():
            if preparation.stage.key in left:
                needs[preparation.stage.key] = preparation.estimate(facts, directory)
        if owner.method.changes_trained and owner.model is not None and owner.model.key in left:
            needs[owner.model.key] = edit.estimate(facts)
    for key, job in planned.trainings.items():
        if key in left:
            needs[key] = train.estimate(job, facts, skeleton)
    return needs


def in_words(num_bytes: int) -> str:
    """Return a size as text: "1.50 GB" from 100 MB up, "2.5 MB" below."""
    return f"{num_bytes / 1e9:.2f} GB" if num_bytes >= 1e8 else f"{num_bytes / 1e6:.1f} MB"


def check_disk(records: list[plan.Record], needs: Estimates, store: Store) -> None:
    """Refuse uncached stages that together need more disk than is free at ROOT.

    Raises:
        ValueError: the message lists the need of each stage.
    """
    free = store.free_bytes()  # None for an object store, which has no limit
    left = [(r.stage.name, needs[r.stage.key]) for r in records if r.status != "cached" and r.stage.key in needs]
    # `work_bytes` is the size of the checkpoints, which lie in ROOT until the stage ends.
    sizes = [(name, int((need.disk_bytes + need.work_bytes) * _SAFETY)) for name, need in left]
    if free is not None and sum(size for _, size in sizes) > free:
        parts = " + ".join(f"{in_words(size)} ({name})" for name, size in sizes if size)
        raise ValueError(f"ROOT '{store.root}' has {in_words(free)} free, but the job needs about {parts}")


def check_memory(records: list[plan.Record], needs: Estimates, available: int, where: str) -> None:
    """Refuse uncached stages of which one needs more than `available` bytes of memory on each worker.

    `where` is the machine's name for the message.

    Raises:
        ValueError: the message names the stage that needs most.
    """
    left = [(needs[r.stage.key].memory_bytes, r.stage.name) for r in records if r.status != "cached" and r.stage.key in needs]
    # The maximum, not the sum: the stages of one job run one after another.
    most, name = max(left, default=(0, ""))
    if most > available:
        raise ValueError(
            f"stage {name} needs about {in_words(most)} of memory for each worker; {where} has {in_words(available)}"
        )


def check_machine(records: list[plan.Record], needs: Estimates, store: Store) -> None:
    """Refuse a job that does not fit on this machine. Raises ValueError."""
    check_disk(records, needs, store)
    # With a remote ROOT or cluster, the job would not run in the memory of this machine.
    if store.is_local and not os.environ.get("RAY_ADDRESS"):
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        check_memory(records, needs, memory, "this machine")


def check_cluster(planned: Plan, store: Store, facts: models.ModelFacts) -> None:
    """Refuse a job that the connected Ray cluster cannot run.

    Checked are: the package that a ROOT in an object store needs, and STEERLAB_CACHE_GB; on several nodes, whether a local ROOT
    is one shared folder; the GPUs that the job requires; the workers, if a training of this job or of one that it builds on has
    still to run; and the free disk at ROOT and the memory of the largest node (unless the stages use GPUs).
    Warns of local input files on a cluster of several nodes.

    Raises:
        ValueError: the message says what is missing, with the numbers.
    """
    from steerlab.stages.spread import reserved

    exclusive.check(store.root)
    copies.most_bytes()
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if store.is_local and len(nodes) > 1:
        sharing.check(store, {node["NodeID"]: node["NodeManagerHostname"] for node in nodes})
    # The user's own code travels with the requests to the nodes; all other files are read at their own paths.
    code = {code.path for code in own_code.codes_in(list(planned.start.paths.values()))}
    files = [path for path in planned.start.paths.values() if path not in code]
    if len(nodes) > 1 and files:
        warnings.warn(
            f"{', '.join(files)}: all {len(nodes)} nodes read this path, so it must lie in a folder that they share; "
            "otherwise give a URI (s3://, gs://) or hf:",
            stacklevel=2,
        )
    reserved.gpus_of(planned.job.scale)  # raises if GPUs are required and there are none
    records = plan.status(planned.stages, store)
    left = {record.stage.key for record in records if record.status != "cached"}
    if left & planned.trainings.keys():
        # All stages run with the `scale` of the requested job, including those of the jobs that it builds on.
        reserved.check(planned.job.scale)
    needs = estimates(planned, facts, records)
    check_disk(records, needs, store)
    if not reserved.uses_gpu(planned.job.scale):
        # Ray divides a node's memory between processes and its object store; a worker of one job may use both parts.
        largest = max(sum(node["Resources"].get(name, 0) for name in ("memory", "object_store_memory")) for node in nodes)
        check_memory(records, needs, int(largest), "the largest node")
