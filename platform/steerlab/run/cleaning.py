"""Remove artifacts and unfinished work from a ROOT that none of its runs and sweeps names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from steerlab.run import inventory
from steerlab.run.inventory import Address, Inventory
from steerlab.storage import claims
from steerlab.storage.store import Store


@dataclass(frozen=True)
class Leftovers:
    """Artifacts and work directories that may be removed from a ROOT."""

    artifacts: dict[Address, int]
    """Size in bytes of each artifact that no run or sweep names; on a local ROOT also of each incomplete artifact."""
    work: dict[Address, int]
    """Size of each work directory of a stage that no run names, or whose artifact is complete."""

    @property
    def num_bytes(self) -> int:
        """Total size."""
        return sum(self.artifacts.values()) + sum(self.work.values())


@dataclass(frozen=True)
class Removed:
    """Numbers and bytes that were removed."""

    artifacts: int
    work: int
    num_bytes: int


def leftovers(store: Store) -> Leftovers:
    """Return what no run or sweep of a ROOT names and no process is computing.

    Raises:
        ValueError: the artifacts that a run or a sweep names cannot be determined.
    """
    content = inventory.take(store)
    _check(content, store)
    kept = _with_inputs(store, content.named)
    free = {address: size for address, size in content.artifacts.items() if address not in kept}
    if store.is_local:  # in a bucket, an incomplete artifact may be an upload in progress
        free |= content.incomplete
    # Answers of a judge's API cost money, so they stay although no run names them.
    artifacts = {address: size for address, size in free.items() if address[0] != inventory.PAID and _is_free(store, address)}
    done = content.artifacts.keys()
    work = {
        address: size
        for address, size in content.work.items()
        # A killed run continues from its checkpoints, so they stay as long as the run names the stage.
        if (address in done or address not in kept) and _is_free(store, address)
    }
    return Leftovers(artifacts, work)


def remove(store: Store, leftovers: Leftovers) -> Removed:
    """Remove leftovers, except for those that a run has started to name since they were listed."""
    # The artifacts are hidden first, and then the runs are read again. A run that has begun meanwhile writes the names of its
    # artifacts before it looks for them: either its names are seen here, or it finds the artifacts missing and recomputes them.
    hidden = {address: store.hide(*address) for address in leftovers.artifacts if store.has(*address)}
    named = _with_inputs(store, inventory.take(store).named)
    for address in hidden.keys() & named:
        store.show(*address, hidden.pop(address))
    gone = [address for address in leftovers.artifacts if not store.has(*address) and _alone(store, address, store.discard)]
    work = [address for address in leftovers.work if address not in named or store.has(*address)]
    work = [address for address in work if _alone(store, address, store.discard_work)]
    sizes = [*(leftovers.artifacts[address] for address in gone), *(leftovers.work[address] for address in work)]
    return Removed(len(gone), len(work), sum(sizes))


def _alone(store: Store, address: Address, act: Callable[[str, str], None]) -> bool:
    """Act on a stage if no process is computing it; return whether that was so."""
    try:
        with claims.hold(store, "-".join(address), wait=False):
            act(*address)
    except claims.Held:
        return False
    return True


def _check(content: Inventory, store: Store) -> None:
    unclear = [entry for entry in content.entries if entry.problem]
    if unclear:
        more = f" (and {len(unclear) - 1} more like it)" if len(unclear) > 1 else ""
        raise ValueError(
            f"{store.root}/{unclear[0].folder} does not say which artifacts it needs: {unclear[0].problem}{more}; "
            "if you no longer need this folder, remove it; its artifacts can then be removed too"
        )


def _with_inputs(store: Store, named: set[Address]) -> set[Address]:
    """Return artifacts and, as far as their manifests can be read, all artifacts that they were computed from."""
    kept, left = set[Address](), list(named)
    while left:
        address = left.pop()
        if address in kept:
            continue
        kept.add(address)
        left += _inputs(store, address)
    return kept


def _inputs(store: Store, address: Address) -> Sequence[Address]:
    try:
        inputs = store.manifest(*address)["meta"].get("inputs")
    except (ValueError, OSError):  # a missing or damaged manifest: runs name the inputs too
        return []
    pairs = inputs if isinstance(inputs, list) else []
    return [(str(pair[0]), str(pair[1])) for pair in pairs if isinstance(pair, list) and len(pair) == 2]


def _is_free(store: Store, address: Address) -> bool:
    return not claims.is_held(store, "-".join(address))
