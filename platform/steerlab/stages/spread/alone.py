"""Run stages in this process instead of on a Ray cluster: for Python sessions, notebooks and small jobs of one worker.

The stages call the same functions with the same arguments and the same number of threads as on a cluster, and write the same
artifacts; they only run in another place.

    with alone.stages():
        plan.run(planned.stages, store, scale, listener, records)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar, TypeVarTuple

_R = TypeVar("_R")
_A = TypeVarTuple("_A")


@dataclass(frozen=True)
class Here:
    """Resources of this process, which replace a cluster."""

    gpu: bool
    """Whether stages may use a GPU of this machine."""
    models: Mapping[str, object] = field(default_factory=dict)
    """Models that are loaded already, by source: a stage on such a model uses it instead of loading it again."""
    start: Path | None = None
    """Folder of the model and patches from which a training starts; None for the model that the stage names."""
    cpus: int = 1
    """Number of threads of the running function."""


# A context variable instead of a global, so that other threads of a session can use a cluster at the same time.
_HERE: ContextVar[Here | None] = ContextVar("here", default=None)


def here() -> Here | None:
    """Return the resources of this process if stages run in it; None if they run on a cluster."""
    return _HERE.get()


@contextmanager
def stages(*, gpu: bool = True, models: Mapping[str, object] | None = None, start: Path | None = None) -> Iterator[None]:
    """Run the stages of the `with` block in this process.

    Args:
        gpu: Whether they may use this machine's GPU.
        models: Loaded models by source, which stages use instead of loading them.
        start: Folder of the model and patches from which a training starts.
    """
    import torch

    # The token restores the previous value, so that nested blocks are possible.
    token = _HERE.set(Here(gpu and torch.cuda.is_available(), models or {}, start))
    try:
        yield
    finally:
        _HERE.reset(token)


def call(function: Callable[[*_A], _R], arguments: tuple[*_A], num_cpus: float) -> _R:
    """Return `function(*arguments)`, run in this process with as many threads as its reservation on a cluster has CPUs."""
    import torch

    now = _HERE.get()
    assert now is not None, "`call` needs a block of `stages`"
    # The number of threads is set, since it changes the last bits of sums.
    threads, cpus = torch.get_num_threads(), max(1, int(num_cpus))
    token = _HERE.set(replace(now, cpus=cpus))
    torch.set_num_threads(cpus)
    try:
        return function(*arguments)
    finally:
        torch.set_num_threads(threads)
        _HERE.reset(token)
