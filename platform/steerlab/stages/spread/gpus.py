"""Find the GPUs that torch can use on the nodes of a cluster; Ray counts devices even if torch cannot use them."""

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
"""Longest wait for the answers of all nodes, each of which starts a process that imports torch."""
_known: dict[str, TorchDevices] = {}
"""Answers by the node's id; the answer of a node does not change while it is alive."""


def _ask() -> TorchDevices:
    return torch_devices.here()


def by_node() -> dict[str, TorchDevices]:
    """Return the devices that torch finds on each node with GPUs, by address; those of this process if stages run in it."""
    if alone.here() is not None:
        return {"this machine": torch_devices.here()} if torch_devices.is_present() else {}
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    nodes = {node["NodeID"]: node for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU", 0)}
    # The task reserves no GPU, so that it need not wait for one that is in use.
    ask = ray.remote(num_cpus=0, max_retries=1)(_ask)
    asked = {
        name: ask.options(scheduling_strategy=NodeAffinitySchedulingStrategy(name, soft=False)).remote()
        for name in nodes
        if name not in _known
    }
    # One wait for all nodes, which answer at the same time: several hanging nodes cost the time limit only once.
    done, late = ray.wait(list(asked.values()), num_returns=len(asked), timeout=_LIMIT_S) if asked else ([], [])
    for name, answer in asked.items():
        if answer in done:
            _known[name] = ray.get(answer)
    for name in (name for name, answer in asked.items() if answer in late):
        # The failure is cached as well, because asking the node again would take the whole limit again.
        _known[name] = TorchDevices("", f"torch did not answer within {_LIMIT_S} s")
    return {node["NodeManagerAddress"]: _known[name] for name, node in nodes.items()}


def usable() -> bool:
    """Return whether torch can use the GPUs that Ray counts; warns of nodes where it cannot.

    True if no node has GPUs yet: a cluster that grows adds nodes with GPUs only on request.
    """
    wrong = {address: devices for address, devices in by_node().items() if devices.problem}
    for address, devices in wrong.items():
        warnings.warn(f"node {address}: Ray counts GPUs, but {devices.problem}: computing on CPUs", stacklevel=3)
    # A single such node is enough to return False, since Ray may place a worker there.
    return not wrong


def in_words() -> str:
    """Describe the cluster's GPUs as torch finds them, for messages."""
    nodes = by_node()
    return "; ".join(f"{address}: {devices}" for address, devices in nodes.items()) if nodes else "no GPU"
