"""Claims: the exclusive right to compute a stage or to drive a sweep below a ROOT.

Two runs on one ROOT exclude each other, so that the second waits and then uses the first one's artifact,

- on a local ROOT: always when they run on one machine, in whatever Ray cluster or process. (The claim is a lock of the kernel,
  `flock`. On a network disk it excludes other machines only if the disk passes locks on; NFS 4 does, some others do not.)
- on an object store: only if both run in the same Ray cluster. (The claim is the name of an actor, which one cluster knows.)

Two Ray clusters on one bucket do NOT exclude each other. They share every artifact that is finished, but if both need the same
missing one at the same time, both compute it in the same work directory, where each may overwrite the other's checkpoints and
parts. Let one cluster at a time compute on a bucket, or give each its own ROOT.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steerlab.guards import files
from steerlab.storage.store import Store

if TYPE_CHECKING:
    from ray.actor import ActorHandle

_POLL_S = 0.2


class Held(RuntimeError):
    """Another process holds the claim, and the caller did not want to wait."""


@contextmanager
def hold(store: Store, name: str, *, wait: bool) -> Iterator[None]:
    """Hold a claim while the block runs. It ends with the process, in whatever way that dies.

    Args:
        store: The store whose users exclude each other (see the top of this file for the exceptions).
        name: Name of the claim: a file name.
        wait: Whether to wait until other holders are done.

    Raises:
        Held: another process holds the claim, and `wait` is False.
    """
    if store.is_local:
        path = _lock_file(store, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        # The lock file is never removed: a process that waits for it would lock a file that others no longer see.
        with ExitStack() as lock:
            # Entered by hand, so that a BlockingIOError of the caller's block is not taken for a held claim.
            try:
                lock.enter_context(files.locked(path, wait=wait))
            except BlockingIOError:
                raise Held(name) from None
            yield
        return
    actor = _claim_actor(f"claim-{name}", wait)
    try:
        yield
    finally:
        import ray

        # Ray ends the actor with its driver in any case; without this line the claim would last until the driver ends.
        ray.kill(actor)


def is_held(store: Store, name: str) -> bool:
    """Return whether a process of this machine holds a claim on a local ROOT; False on an object store, which cannot tell."""
    return store.is_local and files.is_locked(_lock_file(store, name))


def _lock_file(store: Store, name: str) -> Path:
    # A folder of its own: `tmp` and `work` are swept, and a lock file must not be.
    return Path(store.root.removeprefix("file://")) / "claims" / f"{name}.lock"


def _claim_actor(name: str, wait: bool) -> ActorHandle:
    """Start the actor whose name is the claim. Raises Held if the name is taken and `wait` is False."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Claim:
        def held(self) -> bool:
            return True

    # On the driver's node: if another node goes away, its actors die, and the claim with them, while the work goes on.
    beside_the_driver: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    make: Any = ray.remote(num_cpus=0, scheduling_strategy=beside_the_driver)(Claim)
    while True:
        try:
            # A namespace of its own: without one, Ray gives each job a random one, and no two jobs see the same name.
            # Not detached: Ray ends it with the driver, so that no claim outlives its holder.
            actor = make.options(name=name, namespace="steerlab").remote()
            ray.get(actor.held.remote())  # returns when the actor has started, and with it the claim
            return actor
        except ValueError:  # Ray 2's error for a name that is taken: another driver of this cluster holds the claim
            if not wait:
                raise Held(name) from None
            # Ray 2 has no way to wait for a name to become free.
            time.sleep(_POLL_S)
