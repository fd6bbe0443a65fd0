"""The GPUs of a cluster's nodes that torch can use there; Ray counts devices, whatever torch is installed beside them."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from steerlab.guards import late, torch_devices
from steerlab.guards.torch_devices import TorchDevices
from steerlab.stages.spread import alone

if TYPE_CHECKING:
    import ray
else:
    ray = late.module("ray")

_LIMIT_S = 240
"""Seconds for an answer of all nodes: a process is started on each, which imports torch."""
_known: dict[str, TorchDevices] = {}
"""Answers by the node's id: a node does not change while it lives."""


def _ask() -> TorchDevices:
    return torch_devices.here()


def by_node() -> dict[str, TorchDevices]:
    """Return what torch finds on each node on which Ray counts GPUs, by the node's address; here, where stages run here."""
    if alone.here() is not None:
        return {"this machine": torch_devices.here()} if torch_devices.is_present() else {}
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0)}
    # Without a GPU of its own, so that it need not wait for one that is in use.
    ask = ray.remote(num_cpus=0, max_retries=1)(_ask)
    asked = {
        name: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)).remote()
        for name in nodes
        if name not in _known
    }
    # All of them, up to the limit: nodes answer at the same time, and one that hangs costs the limit once.
    done, late = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_LIMIT_S) if asked else ([], [])
    for name, answer in asked.items():
        if answer in done:
            _known[name] = ray.get(answer)
    for name in (name for name, answer in asked.items() if answer in late):
        # Kept as well: asking the node again would take as long again.
        _known[name] = TorchDevices("", f"torch did not answer within {_LIMIT_S} s")
    return {node["NodeManagerAddress"]: _known[name] for name, node in nodes.items()}


def usable() -> bool:
    """Return whether torch can use the GPUs that Ray counts; warns of nodes where it cannot.

    True without such a node: on a cluster that grows, the nodes with GPUs come after something has asked for one.
    """
    wrong = {address: devices for address, devices in by_node().items() if devices.problem}
    for address, devices in wrong.items():
        warnings.warn(f"node {address}: Ray counts GPUs, but {devices.problem}: computing on CPUs", stacklevel=3)
    # One such node is enough: Ray may place a worker there.
    return not wrong


def in_words() -> str:
    """Describe the cluster's GPUs as torch finds them, for people."""
    nodes = by_node()
    return "; ".join(f"{address}: {devices}" for address, devices in nodes.items()) if nodes else "no GPU"
