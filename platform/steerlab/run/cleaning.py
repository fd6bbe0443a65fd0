"""Remove from a ROOT what no run and no sweep names: artifacts, and the work directories of stages that nobody continues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from steerlab.run import inventory
from steerlab.run.inventory import Address, Inventory
from steerlab.storage import claims
from steerlab.storage.store import Store


@dataclass(frozen=True)
class Leftovers:
    """What may be removed from a ROOT."""

    artifacts: dict[Address, int]
    """Size in bytes of each artifact that no run and no sweep names, and on a disk of each that is incomplete."""
    work: dict[Address, int]
    """Size of each work directory of a stage that no run names, or whose artifact is complete."""

    @property
    def num_bytes(self) -> int:
        """Size of all of it."""
        return sum(self.artifacts.values()) + sum(self.work.values())


@dataclass(frozen=True)
class Removed:
    """What was removed."""

    artifacts: int
    work: int
    num_bytes: int


def leftovers(store: Store) -> Leftovers:
    """Return what no run and no sweep of a ROOT names, and no process works on.

    Raises:
        ValueError: a run or a sweep does not say which artifacts it names.
    """
    content = inventory.take(store)
    _check(content, store)
    kept = _with_inputs(store, content.named)
    free = {address: size for address, size in content.artifacts.items() if address not in kept}
    if store.is_local:  # in a bucket, an incomplete one may be an upload that goes on
        free |= content.incomplete
    # Answers of a judge are named by no run, and they were paid for.
    artifacts = {address: size for address, size in free.items() if address[0] != inventory.PAID and _is_free(store, address)}
    done = content.artifacts.keys()
    work = {
        address: size
        for address, size in content.work.items()
        # The checkpoints of a run that was killed: it continues from them, so they stay as long as the run names the stage.
        if (address in done or address not in kept) and _is_free(store, address)
    }
    return Leftovers(artifacts, work)


def remove(store: Store, leftovers: Leftovers) -> Removed:
    """Remove leftovers, except for what a run has come to name since they were looked up."""
    # First they cease to exist, and then the runs are asked again: a run that has begun meanwhile wrote down the names of its
    # artifacts before it looked for them, so either it is seen here, or it has found them missing and makes them again.
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
    """Do something to a stage that no process computes; return whether it was done."""
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
            "remove the folder if you need it no longer, then nothing of it is kept"
        )


def _with_inputs(store: Store, named: set[Address]) -> set[Address]:
    """Return artifacts and all those that they were made from, as far as their manifests can be read."""
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
    except (ValueError, OSError):  # missing or damaged: the runs name its inputs, too
        return []
    pairs = inputs if isinstance(inputs, list) else []
    return [(str(pair[0]), str(pair[1])) for pair in pairs if isinstance(pair, list) and len(pair) == 2]


def _is_free(store: Store, address: Address) -> bool:
    return not claims.is_held(store, "-".join(address))
