"""Check that a folder is the same on all nodes of the cluster: every node reads a file that was written here."""

from __future__ import annotations

import uuid
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING

from steerlab.guards import late
from steerlab.storage.store import Store

if TYPE_CHECKING:
    import ray
else:
    ray = late.module("ray")

_SAY_S, _LIMIT_S = 10, 120
"""Seconds after which a warning says that nodes are waited for, and seconds after which a node counts as one that fails."""
_ADVICE = "Give a folder that all nodes share, or a URI (s3://, gs://)"


def check(store: Store, nodes: Mapping[str, str]) -> None:
    """Refuse a local ROOT that is not one folder, shared by all nodes.

    Args:
        store: A store with a local ROOT.
        nodes: Names of the nodes, for the message, by their ids.

    Raises:
        ValueError: a node does not see what this process has written into ROOT, or does not answer.
    """
    probe, content = f"tmp/probe-{uuid.uuid4().hex}", uuid.uuid4().hex
    store.write_text(probe, content)
    try:
        read = _read_on(list(nodes), str(store.on_disk(probe)))
    finally:
        store.remove(probe)
    foreign = [name for node, name in nodes.items() if read[node] != content]
    if foreign:
        raise ValueError(
            f"ROOT '{store.root}' is not the same folder on all {len(nodes)} nodes: "
            f"{', '.join(foreign[:5])} cannot read a file that was written there. {_ADVICE}"
        )


def _read_on(nodes: list[str], path: str) -> dict[str, str]:
    """Return what each node reads at a path; "" if the file is missing, or the node does not answer."""

    # Defined here, so that Ray sends it by value and the nodes need not import this package for it.
    def read(path: str) -> str:
        try:
            with open(path, encoding="utf-8") as file:
                return file.read(100)
        except OSError:
            return ""

    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # Each task is bound to its node. It reserves no CPU: a node may have none free, and a head node may have none at all.
    task = ray.remote(num_cpus=0, max_retries=0)(read)
    asked = {
        task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote(path): node for node in nodes
    }
    _, left = ray.wait(list(asked), num_returns=len(asked), timeout=_SAY_S)
    if left:
        warnings.warn(f"waiting for {len(left)} of {len(nodes)} nodes to read a file in ROOT", stacklevel=4)
        _, left = ray.wait(list(asked), num_returns=len(asked), timeout=_LIMIT_S - _SAY_S)
    return {node: "" if answer in left else _content(answer) for answer, node in asked.items()}


def _content(answer: ray.ObjectRef[str]) -> str:
    from ray.exceptions import RayError

    try:
        return ray.get(answer)
    except RayError:  # the node has died
        return ""
