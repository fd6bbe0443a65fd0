"""The parts of tests/mutation.py: after a file is renamed, a part without its tests would look like a result."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
sys.path.insert(0, str(TESTS))

import mutation  # noqa: E402


@pytest.mark.parametrize("name", mutation.PARTS)
def test_sources_and_tests_of_a_part_exist(name: str) -> None:
    part = mutation.PARTS[name]
    assert all(list((TESTS.parent / "platform/steerlab").glob(pattern)) for pattern in part.sources)
    missing = [test for test in part.tests if not (TESTS / test).exists()]
    assert not missing, f"the part {name} names tests that do not exist: {missing}"
