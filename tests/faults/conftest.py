"""Faults at random moments and places, from a seed that is printed.

    python -m pytest -m faults -s tests/faults               every fault as often as tests/README.md says
    STEERLAB_FAULTS_SEED=7 python -m pytest -m faults ...     the same moments again

The default run takes each fault once, with seed 0.
"""

from __future__ import annotations

import os
import random
import time

import pytest

SEED = int(os.environ.get("STEERLAB_FAULTS_SEED") or time.time_ns() % 1_000_000)


def pytest_report_header() -> str:
    return f"seed of the faults: STEERLAB_FAULTS_SEED={SEED}"


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    """Random numbers of this test: the same ones for the same seed, and always those of seed 0 in the default run."""
    seed = SEED if request.node.get_closest_marker("faults") else 0
    print(f"{request.node.name}: STEERLAB_FAULTS_SEED={seed}")
    return random.Random(f"{seed} {request.node.name}")
