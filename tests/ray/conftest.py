"""A real Ray cluster of two CPUs for the tests of this folder."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def cluster() -> Iterator[None]:
    """Start Ray once; every test of the folder shares it."""
    import ray

    os.environ.pop("RAY_ADDRESS", None)
    ray.init(num_cpus=2, logging_level=logging.ERROR, log_to_driver=False, address="local")
    yield
    ray.shutdown()
