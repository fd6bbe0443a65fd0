"""Check whether this machine or cluster is ready to run jobs, and report what is missing (`steerlab doctor`)."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
import sys
from typing import NamedTuple

from steerlab.guards import torch_devices

_PACKAGES = ("torch", "transformers", "ray", "deepspeed", "datasets", "pyarrow", "pydantic", "safetensors", "gguf")
_LOW_DISK_BYTES = 5_000_000_000


class Finding(NamedTuple):
    """Result of one check."""

    check: str
    """What was checked."""
    ok: bool
    detail: str
    """A version or a size; if the check failed, what to do."""


def examine(root: str) -> list[Finding]:
    """Run all checks and return their results, in the order in which missing parts should be repaired."""
    return [_python(), *map(_package, _PACKAGES), _platform_module(), _root(root), _memory(), _gpu(), _cluster()]


def _python() -> Finding:
    version = ".".join(map(str, sys.version_info[:3]))
    return Finding("Python 3.11 or later", sys.version_info >= (3, 11), version)


def _package(name: str) -> Finding:
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return Finding(name, False, f"{error}; install with `pip install -c cluster/constraints.txt -e .`")
    return Finding(name, True, str(getattr(module, "__version__", "")))


def _platform_module() -> Finding:
    import platform

    # steerlab lies in a folder `platform`; with an `__init__.py` in it, it would hide Python's own module of this name.
    ok = hasattr(platform, "system")
    return Finding("Python's own platform module", ok, "" if ok else "hidden: delete platform/__init__.py")


def _root(root: str) -> Finding:
    from steerlab.storage.store import Store

    try:
        free = Store.open(root).free_bytes()
    except ValueError as error:
        return Finding("ROOT", False, str(error))
    if free is not None and free < _LOW_DISK_BYTES:
        return Finding("ROOT", False, f"{root}: only {free / 1e9:.1f} GB free")
    return Finding("ROOT", True, root + ("" if free is None else f", {free / 1e9:.0f} GB free"))


def _memory() -> Finding:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Ray's object store lies in /dev/shm; if that is too small, Ray falls back to slow files in /tmp.
    shared = shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else 0
    return Finding("memory", total > 4e9, f"{total / 1e9:.0f} GB, /dev/shm {shared / 1e9:.0f} GB free")


def _gpu() -> Finding:
    """Check that torch can use the GPUs of this machine, if there are any."""
    if not torch_devices.is_present():
        return Finding("GPU", True, "none here")
    here = torch_devices.here()
    if not here.problem:
        return Finding("GPU", True, str(here))
    return Finding("GPU", False, f"one is here, but {here.problem}: install a build of torch for CUDA, or set scale.gpu: never")


def _cluster() -> Finding:
    """Check the Ray cluster, if one is running."""
    # No cluster is started for the check: that would take many seconds and show nothing about the cluster of a job.
    import ray

    from steerlab.guards import private_parts
    from steerlab.run import check_address

    if ray.is_initialized():
        return _described()
    try:
        check_address()
    except ValueError as error:
        return Finding("Ray cluster", False, str(error))
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        other = private_parts.running_cluster()
        text = "no cluster runs here" if other is None else f"one runs here, at {other}, which RAY_ADDRESS=auto joins"
        return Finding("Ray cluster", True, f"{text}; each command starts its own cluster")
    try:
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except ConnectionError:
        return Finding("Ray cluster", False, f"no cluster answers at {address}")
    finding = _described()
    ray.shutdown()
    return finding


def _described() -> Finding:
    import ray

    from steerlab.stages.spread import gpus

    resources = ray.cluster_resources()
    text = f"{len(ray.nodes())} nodes, {resources.get('CPU', 0):g} CPUs, {resources.get('GPU', 0):g} GPUs"
    seen = gpus.by_node()
    wrong = [f"{address}: {devices.problem}" for address, devices in seen.items() if devices.problem]
    return Finding("Ray cluster", not wrong, "; ".join([text, *(wrong or ([gpus.in_words()] if seen else []))]))
