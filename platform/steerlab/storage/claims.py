"""Claims: the only right to do something below ROOT, held by one process of all that use it."""

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
    """Somebody else holds a claim that nobody wants to wait for."""


@contextmanager
def hold(store: Store, name: str, *, wait: bool) -> Iterator[None]:
    """Hold a claim; it ends with the process that holds it, however that dies. Raises Held if it is taken and not waited for.

    On a local ROOT it is a file lock, which the kernel gives back; elsewhere the name of a Ray actor, which Ray gives back when
    the driver that made it is gone. Two Ray clusters on one bucket are not kept apart.
    """
    if store.is_local:
        path = Path(store.root.removeprefix("file://")) / "claims" / f"{name}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(files.locked(path, wait=wait))
            except BlockingIOError:
                raise Held(name) from None
            yield
        return
    actor = _claim_actor(f"claim-{name}", wait)
    try:
        yield
    finally:
        import ray

        ray.kill(actor)


def _claim_actor(name: str, wait: bool) -> ActorHandle:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    class Claim:
        def held(self) -> bool:
            return True

    beside_the_driver: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    make: Any = ray.remote(num_cpus=0, scheduling_strategy=beside_the_driver)(Claim)
    while True:
        try:
            actor = make.options(name=name, namespace="steerlab").remote()
            ray.get(actor.held.remote())
            return actor
        except ValueError:  # the name is taken: somebody else is running this stage
            if not wait:
                raise Held(name) from None
            time.sleep(_POLL_S)
