"""The command line's own few lines."""

from __future__ import annotations

import pytest

from steerlab.cli import repeated


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (["R", "--strength", "0", "0.5", "1"], ["R", "--strength", "0", "--strength", "0.5", "--strength", "1"]),
        (["--strength", "0", "--strength", "1"], ["--strength", "0", "--strength", "1"]),
        (["--strength", "-1", "2", "--prompt", "3", "4"], ["--strength", "-1", "--strength", "2", "--prompt", "3", "4"]),
        (["--max-new-tokens", "5", "6"], ["--max-new-tokens", "5", "6"]),
    ],
)  # fmt: skip
def test_an_option_takes_several_numbers(given: list[str], meant: list[str]) -> None:
    assert repeated(given, "--strength") == meant
