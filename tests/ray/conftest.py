"""A real Ray cluster of two CPUs for the tests of this folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import steerlab


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Start Ray once; every test of the folder shares it."""
    import ray

    os.environ.pop("RAY_ADDRESS", None)
    # Ray's workers inherit the environment, not pytest's import path.
    os.environ["PYTHONPATH"] = str(Path(steerlab.__file__).parent.parent)
    ray.init(num_cpus=2, logging_level=logging.ERROR, log_to_driver=False, address="local")
    node = ray._private.worker._global_node
    assert node is not None
    started = [info.process for infos in node.all_processes.values() for info in infos]
    yield
    ray.shutdown()
    for process in started:  # one that is still ending when it is forgotten would be a warning, and that an error
        process.wait(timeout=60)
